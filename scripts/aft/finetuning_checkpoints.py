# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The checkpoints of finetune.py: which of them a run continues from, that they are whole, and of this run."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from aft.atomic_files import write_whole
from aft.checkpointing import sha256
from aft.finetuning_arguments import FinetuningArguments


TRAINER_STATE = "trainer_state.json"
CHECKSUMS = "checksums.json"  # of all files but these two, the last of which an evaluation changes


def write_checksums(checkpoint: Path) -> None:
    """Adds the sha256 of its files to a checkpoint that has been written."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    own = {
        path.relative_to(checkpoint).as_posix(): path for path in files if path.name not in (TRAINER_STATE, CHECKSUMS)
    }
    write_whole(checkpoint / CHECKSUMS, json.dumps({name: sha256(path) for name, path in own.items()}, indent=2))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are those that were written, or are not known."""
    if not (checkpoint / CHECKSUMS).is_file():  # the run was stopped before it came to that
        return None
    try:
        files = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError) as error:
        return f"{checkpoint / CHECKSUMS} is damaged: {error}"
    for name, expected in files:
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
        if sha256(checkpoint / name) != expected:
            return f"{checkpoint / name} is damaged: it has another sha256 than it was saved with"
    return None


def trainer_state(checkpoint: Path) -> dict | None:
    """What Trainer knows in a checkpoint that is whole, else None: its file is the last that is written."""
    if not re.fullmatch(r"checkpoint-\d+", checkpoint.name):
        return None
    try:
        return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def newest_whole(found: list[Path], resume: str, process_index: int) -> list[Path]:
    """
    Those of some checkpoints, oldest first, that are left without the newest ones that are damaged, which one process
    reports.

    Raises:
        ValueError: none is left.
    """
    left, damages = list(found), []
    while left and (damage := find_damage(left[-1])):
        damages.append(damage)
        left.pop()
    if damages and not left:
        raise ValueError(f"--resume_from_checkpoint {resume}: no checkpoint is whole: {'; '.join(damages)}")
    if damages and process_index == 0:
        print(f"{'; '.join(damages)}: going on from {left[-1]}", file=sys.stderr)
    return left


def find_checkpoint(args: FinetuningArguments, verify: bool = False) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means; of auto and true, the newest that is whole.

    Args:
        verify: whether to read its files, and of auto and true to go back to an older one where they are damaged.

    Raises:
        ValueError: there is none, it is damaged, or the output folder holds a run that would be lost.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    found = sorted((path for path in folder.glob("checkpoint-*") if trainer_state(path) is not None), key=step_of)
    if resume in ("auto", "true"):
        found = newest_whole(found, resume, args.process_index) if verify else found
        resumed = found[-1] if found else None
    else:
        resumed = None if resume is None else Path(resume)
    if resume not in (None, "auto") and (resumed is None or trainer_state(resumed) is None):
        raise ValueError(
            f"--resume_from_checkpoint {resume}: no whole checkpoint; allowed: the path of a folder checkpoint-N with "
            f"{TRAINER_STATE}, true if --output_dir {folder} has one, or auto"
        )
    if verify and resumed is not None and (damage := find_damage(resumed)):
        raise ValueError(f"--resume_from_checkpoint {resume}: {damage}")
    continues = resumed is not None and resumed.resolve().parent == folder.resolve()
    if args.trains and not continues and (found or (folder / "config.json").exists()):
        raise ValueError(
            f"--output_dir {folder} holds a run; continue it with --resume_from_checkpoint auto, or choose another"
        )
    newer = [path.name for path in found if continues and step_of(path) > step_of(resumed)]
    if args.trains and newer:
        raise ValueError(
            f"--resume_from_checkpoint {resume}: --output_dir {folder} has newer checkpoints ({', '.join(newer)}), "
            "which would be mixed with those of this run; remove them, or choose another --output_dir"
        )
    return None if resumed is None else str(resumed)


def check_identity(checkpoint: Path, identity: dict) -> None:
    """
    Checks that the run that wants to continue from a checkpoint is the one that wrote it.

    Args:
        identity: of this run, as `describe_run` returns it. A flag that only one of both has is of another version of
            transformers, and does not count.

    Raises:
        ValueError: names every entry that differs, with both values.
    """
    try:
        saved = trainer_state(checkpoint)["stateful_callbacks"]["RunIdentity"]["args"]["identity"]
    except (KeyError, TypeError):
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: it does not say what its run is made of") from None
    if differing := list(differences(identity, saved, identity.keys() & saved.keys())):
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: cannot resume: " + "; ".join(differing))


def differences(now: dict, before: dict, names: Iterable[str], prefix: str = "") -> Iterator[str]:
    """Which of the entries differ, with both values; those of a mapping in a mapping one by one."""
    for name in sorted(names):
        new, old = now.get(name), before.get(name)
        if isinstance(new, dict) and isinstance(old, dict):
            yield from differences(new, old, new.keys() | old.keys(), f"{prefix}{name}.")
        elif new != old:
            yield f"{prefix}{name} is {new!r} but was {old!r}"
