# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Checkpoints that are whole, and known to be, and how a run finds the one to continue from."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from safetensors import SafetensorError

from aft.atomic_files import sync
from aft.console import one_line


STATE_FILE = "checkpoint.json"
PART = ".tmp"  # the end of the name of what is being written or removed
# What a run did that is older than the flag that says so.
EARLIER = {
    **{"carry_state": False, "stream_length": None, "objective": "causal"},
    **{"horizontal_flip": False, "color_shift": 0},
}
ABANDONED = ".abandoned"  # of what is younger than the checkpoint that a run goes on from


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict) -> None:
    """
    Saves weights, optimizer and `state` as `folder / "step-N"`, N = `state["step"]`, with the sha256 of every file.
    Everything is written to a temporary sibling and reaches the disk before the sibling is renamed. All processes must
    call this; with several machines, `folder` must be on a file system that they share.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    target = folder / f"step-{state['step']}"
    temporary = folder / f"{target.name}{PART}"
    if accelerator.is_main_process:
        for left in folder.glob(f"step-*{PART}"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_state(temporary, state)
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            remove(target)
            os.rename(temporary, target)
            sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # which torch and safetensors make of a full disk
        free = shutil.disk_usage(folder).free
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).partition("\n")[0]
        raise OSError(f"the checkpoint {target} cannot be written, {free:,} bytes are free: {reason}") from error
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Loads what `save_checkpoint` saved into what `accelerator` has prepared; all processes must call this.

    Raises:
        ValueError: it does not load.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # a checkpoint without checksums may be damaged in any way
        raise ValueError(f"{checkpoint} does not load: {type(error).__name__}: {one_line(error)}") from error


def write_state(checkpoint: Path, state: dict) -> None:
    """Writes the last file of a checkpoint: `state`, and the checksums of the others and of itself."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    content = {**state, "files": {name: sha256(path) for name, path in files.items()}}
    content["sha256"] = sha256_of_state(content)
    (checkpoint / STATE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_state(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint that may be there: none of it, or all of it, bears its name."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f"{checkpoint.name}{PART}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(checkpoint, gone)
        shutil.rmtree(gone)


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Removes all checkpoints but the `keep` newest and that of step `best`, and those that were abandoned."""
    older = [path for path in complete_checkpoints(folder)[:-keep] if step_of(path) != best]
    for old in (*older, *folder.glob(f"step-*{ABANDONED}")):
        remove(old)


def abandon(folder: Path, after: int) -> list[str]:
    """
    Sets the checkpoints of steps after `after` aside: a run that goes on from there makes them anew, and does not
    continue from them meanwhile. The newest is first, so that whatever stops this leaves a run to continue. `prune`
    removes them, when there is a new one.
    """
    younger = [path for path in step_folders(folder) if step_of(path) > after]
    for path in reversed(younger):
        aside = path.with_name(path.name + ABANDONED)
        remove(aside)
        os.rename(path, aside)
    if younger:
        sync(folder)
    return [path.name for path in younger]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that have the name of a checkpoint, oldest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; what an interrupted save left behind is no checkpoint."""
    return [path for path in step_folders(folder) if (path / STATE_FILE).is_file()]


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """
    The checkpoint that `--resume` means: None for "none"; for "auto" the newest that is whole, with a message about
    newer ones that are damaged, or None if there is none at all; else the path itself.

    Raises:
        ValueError: the path is no complete checkpoint, or what it means is damaged; the message names the file.
    """
    if resume == "none":
        return None
    if resume == "auto":
        damages = []
        for checkpoint in reversed(complete_checkpoints(folder)):
            try:
                check_whole(checkpoint)
            except ValueError as error:
                damages.append(str(error))
                continue
            if damages and PartialState().is_main_process:
                print(f"{'; '.join(damages)}: going on from {checkpoint}", file=sys.stderr)
            return checkpoint
        if damages:
            raise ValueError(f"--resume auto: no checkpoint is whole: {'; '.join(damages)}")
        return None
    if not (Path(resume) / STATE_FILE).is_file():
        raise ValueError(
            f"--resume {resume}: no {STATE_FILE} there; allowed: auto, none, the path of a whole checkpoint"
        )
    check_whole(Path(resume))
    return Path(resume)


def read_content(checkpoint: Path) -> dict:
    """What is in the state file of a checkpoint; a ValueError names it if it is damaged."""
    path = checkpoint / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = content.pop("sha256", None)
        if recorded is None and "files" not in content and isinstance(content["identity"], dict):
            return content  # of a version that had no checksums
        if recorded != sha256_of_state(content):
            raise ValueError("it has another sha256 than it was saved with")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    return content


def check_whole(checkpoint: Path) -> None:
    """Reads a checkpoint and compares its checksums; a ValueError names the file that is missing or damaged."""
    for name, expected in read_content(checkpoint).get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if sha256(path) != expected:
            raise ValueError(f"{path} is damaged: it has another sha256 than it was saved with")


def read_state(checkpoint: Path, identity: dict) -> dict:
    """
    The `state` of a checkpoint, after a check that the run that wants to continue is the same one.

    Args:
        identity (`dict`): everything that decides the weights; compared with the checkpoint's `identity`.

    Raises:
        ValueError: names every entry that differs, with both values.
    """
    state = read_content(checkpoint)
    state.pop("files", None)
    identity = json.loads(json.dumps(identity))
    saved = {**EARLIER, **state["identity"]}
    differing = [
        f"{name} is {identity.get(name)!r} but was {saved.get(name)!r}"
        for name in sorted(identity.keys() | saved.keys())
        if identity.get(name) != saved.get(name)
    ]
    if differing:
        raise ValueError(f"cannot resume from {checkpoint}: " + "; ".join(differing))
    return state
