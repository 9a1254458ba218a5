# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The plan of `aft compare`: a YAML file of models to train alike."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from aft.atomic_files import check_file
from aft.flags import find_preset
from aft.picture_arguments import PictureArguments
from aft.pretraining_arguments import GROUPS, from_folder
from aft.settings_files import read_yaml
from aft.text_arguments import TextArguments


# Flags that this program sets itself for each run, which neither the plan's training nor the command line may set.
SET_BY_COMPARE = {"training_preset", "model_preset", "model_override", "seed", "output_dir", "resume", "overwrite"}
PRESETS = {"training_preset": "training", "model_preset": "models"}  # kinds of files, which have names as well
# No run of a plan has data of its own.
SAME_IN_ALL_RUNS = {entry.name for group in (TextArguments, PictureArguments) for entry in fields(group)}


@dataclass
class Plan:
    """
    The content of a plan; `training` and `model_override` map names to values, as `aft compare --help` shows.

    Attributes:
        name: of the file, without its suffix.
        runs: for each name, a mapping with `model_preset` and maybe `model_override` and `training`.
    """

    name: str
    runs: dict[str, dict]
    training_preset: str | None
    training: dict
    seeds: list[int]
    reference: str | None
    seconds: float | None


def are_seeds(value) -> bool:
    """Whether this is a list of different whole numbers from 0: one that stands twice would count a run twice."""
    if not isinstance(value, list) or not value or any(type(seed) is not int or seed < 0 for seed in value):
        return False
    return len(set(value)) == len(value)


def is_name(name) -> bool:
    """Whether the folder of a run can have this name: runs lie beside each other, and nowhere else."""
    if not isinstance(name, (str, int, float)) or not str(name).isprintable():
        return False
    return str(name) not in ("", ".", "..") and not set(str(name)) & set("/\\")


def read_plan(path: Path) -> Plan:
    """
    The plan in a YAML file, with all paths made absolute.

    Raises:
        ValueError: one error that lists everything that is wrong with its keys.
    """
    content = read_yaml(path, "plan")
    problems = []

    def check_keys(found, allowed: set[str], where: str) -> dict:
        if not isinstance(found, dict):
            problems.append(f"{where} must be a mapping, got {found!r}")
            return {}
        if unknown := sorted(map(str, set(found) - allowed)):
            problems.append(f"{where} has unknown keys {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")
        return {key: with_paths(key, value) for key, value in found.items()}

    def with_paths(key: str, value):
        folder = path.resolve().parent
        if key in PRESETS:
            return preset(folder, key, str(value))
        if isinstance(value, list):
            return [with_paths(key, item) for item in value]
        return from_folder(folder, key, value) if isinstance(value, str) else value

    def preset(folder: Path, key: str, value: str) -> str:
        """A file that is named from the folder of the plan, or a preset by its name."""
        try:
            found = value if (folder / value).exists() else find_preset(value, PRESETS[key], key)
            check_file(folder / found, key)
        except ValueError as error:
            problems.append(str(error))
            return value
        return str(folder / found)

    of_training = {entry.name for group in GROUPS for entry in fields(group)} - SET_BY_COMPARE
    content = check_keys(content, {entry.name for entry in fields(Plan)} - {"name"}, "the plan")
    training = check_keys(content.get("training", {}), of_training, "training")
    runs = {}
    given = content.get("runs")
    if not isinstance(given, dict) or not given:
        problems.append(f"runs must map names to runs, at least one, got {given!r}")
        given = {}
    for name, run in given.items():
        run = check_keys(run, {"model_preset", "model_override", "training"}, f"run {name}")
        if "model_preset" not in run:
            problems.append(f"run {name} must have a model_preset")
        if not isinstance(override := run.setdefault("model_override", {}), dict):
            problems.append(f"run {name}: model_override must be a mapping, got {override!r}")
        of_run = of_training - SAME_IN_ALL_RUNS
        run["training"] = check_keys(run.get("training", {}), of_run, f"run {name}: training")
        if not is_name(name) or str(name) in runs:
            problems.append(f"the name of a run must be that of a folder, and of one run, got {name!r}")
        runs[str(name)] = run
    seeds = content.get("seeds", [0])
    if not are_seeds(seeds):
        problems.append(f"seeds must be a list of different whole numbers from 0, got {seeds!r}")
    reference = content.get("reference")
    if reference is not None and reference not in runs:
        problems.append(f"reference must be one of the runs ({', '.join(runs)}), got {reference!r}")
    seconds = content.get("seconds")
    if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
        problems.append(f"seconds must be a positive number, got {seconds!r}")
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return Plan(path.stem, runs, content.get("training_preset"), training, seeds, reference, seconds)
