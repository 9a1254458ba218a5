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
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from aft import classifying_flags, picture_arguments, pretraining_arguments, seq2seq_flags
from aft.atomic_files import check_file
from aft.finetuning_flags import names_of_training_arguments
from aft.flags import find_preset, from_folder
from aft.settings_files import read_yaml
from aft.text_arguments import TextArguments


def names_of(*groups: type) -> set[str]:
    """The flags of dataclasses."""
    return {entry.name for group in groups for entry in fields(group)}


@dataclass(frozen=True)
class Rules:
    """
    What a plan may say of runs of a command.

    Attributes:
        program (`str`): the class that trains and reads them, as `pkgutil.resolve_name` takes it.
        groups: dataclasses of the flags of the command.
        more_flags: the names of those that no dataclass of ours has.
        model (`str`): the flag that names the file of a model, and key of a run.
        resume (`str`): the flag by which a run goes on.
        presets: keys of the plan and of a run that name a file, and the kind of presets, which have names as well.
        set_by_compare: flags that this program sets itself for each run, which neither the plan's training nor the
            command line may set.
        same_in_all_runs: those of the data, which are the same for all runs of a plan.
        paths: flags whose values are paths, which begin at the plan's folder.
        maybe_paths: those whose values may be names too.
    """

    program: str
    groups: tuple[type, ...]
    model: str
    resume: str
    presets: dict[str, str]
    set_by_compare: set[str]
    same_in_all_runs: set[str]
    paths: tuple[str, ...]
    maybe_paths: tuple[str, ...]
    more_flags: Callable[[], list[str]] = list

    @property
    def training(self) -> set[str]:
        """The flags that the training of a plan may set."""
        return (names_of(*self.groups) | {*self.more_flags()}) - self.set_by_compare


def rules_on_trainer(program: str, flags: ModuleType, same_in_all_runs: set[str]) -> Rules:
    """Those of a command on Trainer, whose flags are in a module."""
    return Rules(
        program=program,
        groups=flags.GROUPS,
        model="model",
        resume="resume_from_checkpoint",
        presets={"model": flags.PRESETS},
        set_by_compare={"model", "model_override", "seed", "output_dir", "resume_from_checkpoint"},
        same_in_all_runs=same_in_all_runs,
        paths=("cache_dir",),
        maybe_paths=flags.MAYBE_PATHS,
        more_flags=names_of_training_arguments,
    )


COMMANDS = {
    "pretrain": Rules(
        program="aft.compare_pretrained:Pretrained",
        groups=pretraining_arguments.GROUPS,
        model="model_preset",
        resume="resume",
        presets={"training_preset": "training", "model_preset": "models"},
        set_by_compare={
            *("training_preset", "model_preset", "model_override", "seed", "output_dir", "resume", "overwrite")
        },
        same_in_all_runs=names_of(TextArguments, picture_arguments.PictureArguments),
        paths=pretraining_arguments.PATHS,
        maybe_paths=pretraining_arguments.MAYBE_PATHS,
    ),
    "classify": rules_on_trainer(
        "aft.compare_classified:Classified",
        classifying_flags,
        names_of(classifying_flags.PictureArguments) - {"image_size", "crop_ratio", "search_steps"},
    ),
    "seq2seq": rules_on_trainer(
        "aft.compare_seq2seq:EncoderDecoders",
        seq2seq_flags,
        names_of(seq2seq_flags.Seq2SeqInputs) - {"length_penalty", "search_steps"},
    ),
}


@dataclass
class Plan:
    """
    The content of a plan; `training` and `model_override` map names to values, as `aft compare --help` shows.

    Attributes:
        name: of the file, without its suffix.
        command: that of `aft` which trains the runs, one of COMMANDS.
        runs: for each name, a mapping with the model and maybe `model_override` and `training`.
    """

    name: str
    command: str
    runs: dict[str, dict]
    training_preset: str | None
    training: dict
    seeds: list[int]
    reference: str | None
    seconds: float | None

    @property
    def rules(self) -> Rules:
        return COMMANDS[self.command]


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
    command = content.get("command", "pretrain")
    if command not in (*COMMANDS,):
        raise ValueError(f"{path}: command must be one of {', '.join(COMMANDS)}, got {command!r}")
    rules, problems = COMMANDS[command], []

    def check_keys(found, allowed: set[str], where: str) -> dict:
        if not isinstance(found, dict):
            problems.append(f"{where} must be a mapping, got {found!r}")
            return {}
        if unknown := sorted(map(str, set(found) - allowed)):
            problems.append(f"{where} has unknown keys {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")
        return {key: with_paths(key, value) for key, value in found.items()}

    def with_paths(key: str, value):
        folder = path.resolve().parent
        if key in rules.presets:
            return preset(folder, key, str(value))
        if isinstance(value, list):
            return [with_paths(key, item) for item in value]
        return from_folder(folder, key, value, rules.paths, rules.maybe_paths) if isinstance(value, str) else value

    def preset(folder: Path, key: str, value: str) -> str:
        """A file that is named from the folder of the plan, or a preset by its name."""
        try:
            found = value if (folder / value).exists() else find_preset(value, rules.presets[key], key)
            check_file(folder / found, key)
        except ValueError as error:
            problems.append(str(error))
            return value
        return str(folder / found)

    foreign = {"training_preset"} - rules.presets.keys()
    content = check_keys(content, {entry.name for entry in fields(Plan)} - {"name"} - foreign, "the plan")
    of_training = rules.training
    training = check_keys(content.get("training", {}), of_training, "training")
    runs = {}
    given = content.get("runs")
    if not isinstance(given, dict) or not given:
        problems.append(f"runs must map names to runs, at least one, got {given!r}")
        given = {}
    for name, run in given.items():
        run = check_keys(run, {rules.model, "model_override", "training"}, f"run {name}")
        if rules.model not in run:
            problems.append(f"run {name} must have a {rules.model}")
        if not isinstance(override := run.setdefault("model_override", {}), dict):
            problems.append(f"run {name}: model_override must be a mapping, got {override!r}")
        of_run = of_training - rules.same_in_all_runs
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
    return Plan(path.stem, command, runs, content.get("training_preset"), training, seeds, reference, seconds)
