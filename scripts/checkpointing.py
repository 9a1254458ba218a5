# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Checkpoints that are written whole or not at all, and how a run finds the one to continue from."""

import json
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from whole_files import sync


STATE_FILE = "checkpoint.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict, keep: int) -> None:
    """
    Saves weights, optimizer and `state` as `folder / "step-N"`, N = `state["step"]`, and removes all but the `keep`
    newest. Everything is written to a temporary sibling and reaches the disk before the sibling is renamed. All
    processes must call this; with several machines, `folder` must be on a file system that they share.
    """
    target = folder / f"step-{state['step']}"
    temporary = folder / f"{target.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        sync(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; what an interrupted save left behind is no checkpoint."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[5:]))


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """
    The checkpoint that `--resume` means: None for "none", the newest or None for "auto", else the path itself.

    Raises:
        ValueError: the path is no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return next(reversed(complete_checkpoints(folder)), None)
    if not (Path(resume) / STATE_FILE).is_file():
        raise ValueError(
            f"--resume {resume}: no {STATE_FILE} there; allowed: auto, none, the path of a whole checkpoint"
        )
    return Path(resume)


def read_state(checkpoint: Path, identity: dict) -> dict:
    """
    The `state` of a checkpoint, after a check that the run that wants to continue is the same one.

    Args:
        identity (`dict`): everything that decides the weights; compared with the checkpoint's `identity`.

    Raises:
        ValueError: names every entry that differs, with both values.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    identity, saved = json.loads(json.dumps(identity)), state["identity"]
    differing = [
        f"{name} is {identity.get(name)!r} but was {saved.get(name)!r}"
        for name in sorted(identity.keys() | saved.keys())
        if identity.get(name) != saved.get(name)
    ]
    if differing:
        raise ValueError(f"cannot resume from {checkpoint}: " + "; ".join(differing))
    return state
