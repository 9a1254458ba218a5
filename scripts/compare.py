# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Trains the models of a plan on the same data, and writes one table and one picture of them.

    python scripts/compare.py configuration/compare/variants.yaml --dataset_path FILE
    python scripts/compare.py configuration/compare/windows.yaml --dataset_path FILE --seeds 0 1 2 --max_steps 3000 \\
        --warmup_steps 300
    python scripts/compare.py configuration/compare/variants.yaml --dataset_path FILE --only aft-simple transformer \\
        --max_hours 2
    python scripts/compare.py configuration/compare/variants.yaml --table_only --output_dir benchmarks

Each run is pretrain_enwik8.py in a process of its own, with the folder <runs_dir>/<plan>/<run>-seed<k>. Flags that are
not listed below go to every run, and win over the plan. A finished run is skipped and an interrupted one continues
from its last checkpoint; a run of which the plan, the flags or the data have changed since is an error (--table_only,
which knows neither flags nor data, notices a changed model).

A plan is a YAML file:

    training_preset: ../training/small.yaml      # optional; paths start at the plan's folder
    training: {batch_size: 16, max_steps: 300}   # flags of pretrain_enwik8.py
    seeds: [0]
    reference: name                              # the run whose training time is the budget at equal wall-clock,
    seconds: 600                                 # in place of it: the budget itself
    runs:
      name: {model_preset: ../models/a.json}
      other: {model_preset: ../models/a.json, model_override: {window_size: 8}, training: {batch_size: 8}}

Whatever is chosen is chosen on valid; pretrain_enwik8.py scores test once, when a run ends.
"""

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

import modeling_aft
from shared.atomic_files import write_whole
from shared.compare_table import RESULT, write_table
from shared.console import any_text, run_program
from shared.machine import peak_bytes, processor_name
from shared.pretraining import load_data, pretrain
from shared.pretraining_arguments import GROUPS, PATHS, build_config, check_arguments, parse_arguments
from shared.run_log import read_log
from shared.settings_files import read_json, read_yaml


ENTRY = "entry.json"
# Flags that change neither the weights nor the scores, so that an unfinished comparison may go on with others.
MAY_DIFFER_WHEN_CONTINUED = {
    *("training_preset", "model_preset", "model_override", "dataset", "dataset_path", "dataset_url", "cache_dir"),
    *("output_dir", "resume", "overwrite", "tensorboard", "save_every", "keep_checkpoints"),
    *("sample_every", "sample_bytes", "sample_prompt"),
}
# Flags that this program sets itself for each run, which neither the plan's training nor the command line may set.
SET_BY_COMPARE = {"training_preset", "model_preset", "model_override", "seed", "output_dir", "resume", "overwrite"}
SAME_IN_ALL_RUNS = {"dataset", "dataset_path", "dataset_url", "cache_dir"}  # no run of a plan has data of its own


class FailedRuns(RuntimeError, ChildProcessError):
    """Runs failed in processes of their own."""


@dataclass
class Plan:
    """
    The content of a plan; `training` and `model_override` map names to values, as the module docstring shows.

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


@dataclass
class PlannedRun:
    """One model and seed: its folder, and the flags of pretrain_enwik8.py that train it there."""

    name: str
    seed: int
    folder: Path
    flags: list[str]

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()


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
        return {
            key: str(path.resolve().parent / str(value)) if key in (*PATHS, "training_preset") else value
            for key, value in found.items()
        }

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


def plan_runs(plan: Plan, runs_dir: Path, seeds: list[int], more_flags: list[str]) -> list[PlannedRun]:
    """
    Every run of a plan, seed by seed.

    Args:
        more_flags: flags of pretrain_enwik8.py for all runs, which win over those of the plan.

    Raises:
        ValueError: `more_flags` has a flag that the plan sets for a single run, or that this program sets itself.
    """
    explicit = {item.partition("=")[0][2:].replace("-", "_") for item in more_flags if item.startswith("--")}
    for name, run in plan.runs.items():
        if clash := sorted(explicit & {*run["training"], *SET_BY_COMPARE}):
            raise ValueError(f"--{clash[0]} must be left out: run {name} of {plan.name} has its own")
    training = {key: value for key, value in plan.training.items() if key not in explicit}
    preset = [] if plan.training_preset is None else ["--training_preset", plan.training_preset]
    planned = []
    for seed in seeds:
        for name, run in plan.runs.items():
            folder = runs_dir / plan.name / f"{name}-seed{seed}"
            values = {**training, **run["training"], "model_preset": run["model_preset"], "seed": seed}
            values |= {"output_dir": folder, "resume": "auto"}
            flags = [*preset, *(text for key, value in values.items() for text in (f"--{key}", str(value)))]
            if override := [f"{key}={json.dumps(value)}" for key, value in run["model_override"].items()]:
                flags += ["--model_override", *override]
            planned.append(PlannedRun(name, seed, folder, [*flags, *more_flags]))
    return planned


def describe_entries(planned: list[PlannedRun], whole: bool = True) -> list[dict]:
    """
    What decides the result of each run: model configuration and, if `whole`, arguments and checksum of the data.

    Raises:
        ValueError: one error that lists every run whose flags or model are not allowed.
    """
    entries, problems, data = [], [], None
    for run in planned:
        try:
            args = parse_arguments(run.flags)
            config = check_arguments(args, num_processes=1) if whole else build_config(args)
        except ValueError as error:
            problems.append(f"run {run.name}: {error}")
            continue
        model = config.to_diff_dict()
        model.pop("transformers_version", None)
        entry = {"model_config": model}
        if whole:
            data = data or load_data(args)[1].sha256  # no run of a plan has data of its own
            entry |= {
                "data": data,
                **{key: value for key, value in vars(args).items() if key not in MAY_DIFFER_WHEN_CONTINUED},
            }
        entries.append(json.loads(json.dumps(entry)))  # as it will be read again: tuples become lists
    if problems:
        raise ValueError("\n".join(problems))
    return entries


def check_folders(planned: list[PlannedRun], entries: list[dict]) -> None:
    """
    Checks that what is in the folders was made of these entries.

    Raises:
        ValueError: one error that names every run and value that has changed.
    """
    problems = []
    for run, entry in zip(planned, entries, strict=True):
        path = run.folder / ENTRY
        saved = read_json(path, "run") if path.is_file() else entry
        problems += [
            f"{run.folder}: {key} is {value!r} but was {saved.get(key)!r}"
            for key, value in entry.items()
            if value != saved.get(key)
        ]
    if problems:
        advice = "remove these folders, choose another --runs_dir, or go back to the earlier values"
        raise ValueError(f"these runs were made of other entries; {advice}:\n" + "\n".join(problems))


def check_seeds(folders: dict[str, list[Path]]) -> None:
    """
    Checks that the seeds of each run were trained alike.

    Raises:
        ValueError: one error that names every run and value that differs.
    """
    problems = []
    for name, each in folders.items():
        entries = [read_json(folder / ENTRY, "run") for folder in each]
        for key in set().union(*entries) - {"seed"}:
            if len(found := dict.fromkeys(repr(entry.get(key)) for entry in entries)) > 1:
                problems.append(f"{name}: {key} is {' and '.join(found)}")
    if problems:
        raise ValueError("the seeds of a run must have been trained alike, got " + "; ".join(sorted(problems)))


def train(run: PlannedRun, command: str) -> None:
    """Trains one run in this process, and leaves its result file, whose presence means that the run is complete."""
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type
    peak = peak_bytes(lambda: pretrain(run.flags), device)
    events = read_log(run.folder / "run.jsonl")
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    if resumed and resumed[-1] == events[-1]["step"]:
        peak = None  # this process has only scored
    result = {"name": run.name, "seed": run.seed, "peak_bytes": peak, "processor": processor_name(device)}
    result |= {"modeling_aft": modeling_aft.__version__, "command": command}
    write_whole(run.folder / RESULT, json.dumps(result, indent=2) + "\n")


def run_process(run: PlannedRun, command: str, seconds: float) -> bool:
    """
    Trains one run in a process of its own, so that its peak memory is its own, for so many seconds at most.

    Returns:
        Whether it went well; a run whose time is over has, and continues from its last checkpoint another time.
    """
    process = get_context("spawn").Process(target=run_program, args=(partial(train, run, command),))
    process.start()
    try:
        process.join(None if math.isinf(seconds) else seconds)
    finally:
        stopped = process.is_alive()
        if stopped:
            process.terminate()
            process.join()
    return stopped or process.exitcode == 0


def train_all(planned: list[PlannedRun], entries: list[dict], command: str, hours: float) -> list[PlannedRun]:
    """Trains what is not finished yet until the hours are over; returns the runs that failed."""
    deadline = time.monotonic() + 3600 * hours
    failed = []
    for number, (run, entry) in enumerate(zip(planned, entries, strict=True), start=1):
        left = deadline - time.monotonic()
        what = "finished" if run.finished else "trains" if left > 0 else "no time left"
        print(f"{number}/{len(planned)} {run.folder.name}: {what}", flush=True)
        if run.finished or left <= 0:
            continue
        write_whole(run.folder / ENTRY, json.dumps(entry, indent=2) + "\n")
        if not run_process(run, command, left):
            failed.append(run)
    return failed


def parse_own_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    The flags of this program, and those that are for pretrain_enwik8.py.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("plan", type=Path, help="YAML file; stands before the flags")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train these runs of the plan; the table has all")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the plan's")
    parser.add_argument("--max_hours", type=float, default=math.inf, help="after these, train no more")
    parser.add_argument("--seconds", type=float, help="the budget at equal wall-clock, in place of the plan's")
    parser.add_argument("--table_only", action="store_true", help="train nothing: table and picture of what is there")
    parser.add_argument("--runs_dir", default="runs/compare", help="default: %(default)s")
    parser.add_argument("--output_dir", help="of table and picture; default: <runs_dir>/<plan>")
    args, more_flags = parser.parse_known_args(argv)
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)!r}"
        for name, ok, allowed in (
            ("seeds", args.seeds is None or are_seeds(args.seeds), "different whole numbers from 0"),
            ("max_hours", args.max_hours > 0, "positive"),
            ("seconds", args.seconds is None or 0 < args.seconds < math.inf, "positive and finite"),
            ("runs_dir", args.runs_dir != "", "a path"),
            ("output_dir", args.output_dir != "", "a path"),
        )
        if not ok
    ]
    if args.table_only and more_flags:
        problems.append(f"--table_only must stand without flags of training, got {shlex.join(more_flags)}")
    if problems:
        raise ValueError("compare.py: " + "; ".join(problems))
    args.runs_dir, args.output_dir = Path(args.runs_dir), args.output_dir and Path(args.output_dir)
    return args, more_flags


@any_text()
def main(argv: list[str] | None = None) -> list[Path]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the files it wrote.

    Raises:
        ValueError: a flag, the plan, or a run's arguments are wrong, or a finished run does not belong to the plan.
        FailedRuns: runs failed; the table of the others is written all the same.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, more_flags = parse_own_arguments(argv)
    plan = read_plan(args.plan)
    if unknown := sorted(set(args.only or ()) - plan.runs.keys()):
        raise ValueError(f"--only must name runs of the plan ({', '.join(plan.runs)}), got {', '.join(unknown)}")
    planned = plan_runs(plan, args.runs_dir, args.seeds or plan.seeds, more_flags)
    entries = describe_entries(planned, whole=not args.table_only)
    check_folders(planned, entries)
    failed = []
    if not args.table_only:
        chosen = [index for index, run in enumerate(planned) if run.name in (args.only or plan.runs)]
        command = shlex.join(["python", "scripts/compare.py", *argv])
        failed = train_all([planned[i] for i in chosen], [entries[i] for i in chosen], command, args.max_hours)
    folders = {name: [run.folder for run in planned if run.name == name and run.finished] for name in plan.runs}
    check_seeds(folders)
    written = []
    if any(folders.values()):
        stem = (args.output_dir or args.runs_dir / plan.name) / f"compare-{plan.name}"
        written = write_table(stem, folders, plan.reference, args.seconds or plan.seconds)
    elif args.table_only:
        raise ValueError(f"--table_only needs finished runs of the plan, and {args.runs_dir / plan.name} has none")
    for path in written:
        print(f"wrote {path}")
    if failed:
        raise FailedRuns("these runs failed, see above: " + ", ".join(run.folder.name for run in failed))
    return written


if __name__ == "__main__":
    run_program(main)
