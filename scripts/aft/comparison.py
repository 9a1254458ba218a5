# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The models of a plan, trained on the same data, in one table and one picture: what `aft compare` does."""

import argparse
import json
import math
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from threading import Lock

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

import modeling_aft
from aft.atomic_files import write_whole
from aft.compare_plan import Plan
from aft.compare_program import ENTRY, RESULT, Program, find_program
from aft.compare_table import write_table
from aft.console import run_elsewhere
from aft.machine import peak_bytes, processor_name
from aft.pretraining_arguments import named_flags


OUTPUT = "output.txt"  # of a run beside others
STARTING = Lock()  # of a process, which takes over the environment


class FailedRuns(RuntimeError, ChildProcessError):
    """Runs failed in processes of their own."""


@dataclass
class PlannedRun:
    """One model and seed: its folder, and the flags of a command of `aft` that train it there."""

    name: str
    seed: int
    folder: Path
    flags: list[str]
    program: str  # the command

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()


def plan_runs(plan: Plan, runs_dir: Path, seeds: list[int], more_flags: list[str]) -> list[PlannedRun]:
    """
    Every run of a plan, seed by seed.

    Args:
        more_flags: flags of the plan's command for all runs, which win over those of the plan.

    Raises:
        ValueError: `more_flags` has a flag that the plan sets for a single run, or that this program sets itself.
    """
    rules = plan.rules
    explicit = named_flags(more_flags, rules.groups)
    for name, run in plan.runs.items():
        if clash := sorted(explicit & {*run["training"], *rules.set_by_compare}):
            raise ValueError(f"--{clash[0]} must be left out: run {name} of {plan.name} has its own")
    training = {key: value for key, value in plan.training.items() if key not in explicit}
    preset = [] if plan.training_preset is None else ["--training_preset", plan.training_preset]
    planned = []
    for seed in seeds:
        for name, run in plan.runs.items():
            folder = runs_dir / plan.name / f"{name}-seed{seed}"
            values = {**training, **run["training"], rules.model: run[rules.model], "seed": seed}
            values |= {"output_dir": folder, rules.resume: "auto"}
            flags = list(preset)
            for key, value in values.items():
                flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
            if override := [f"{key}={json.dumps(value)}" for key, value in run["model_override"].items()]:
                flags += ["--model_override", *override]
            planned.append(PlannedRun(name, seed, folder, [*flags, *more_flags], plan.command))
    return planned


def describe_entries(program: Program, planned: list[PlannedRun], whole: bool = True) -> list[dict]:
    """
    What decides the result of each run: model configuration and, if `whole`, arguments and checksum of the data.

    Raises:
        ValueError: one error that lists every run whose flags or model are not allowed.
    """
    entries, problems = [], []
    for run in planned:
        try:
            entry = program.describe(run.flags, whole)
        except ValueError as error:
            problems.append(f"run {run.name}: {error}")
            continue
        entries.append(json.loads(json.dumps(entry)))  # as it will be read again: tuples become lists
    if problems:
        raise ValueError("\n".join(problems))
    return entries


def check_folders(program: Program, planned: list[PlannedRun], entries: list[dict]) -> None:
    """
    Checks that what is in the folders was made of these entries.

    Raises:
        ValueError: one error that names every run and value that has changed.
    """
    problems = []
    for run, entry in zip(planned, entries, strict=True):
        saved = program.read_entry(run.folder) if (run.folder / ENTRY).is_file() else entry
        known = program.known_keys([entry, saved])
        problems += [
            f"{run.folder}: {key} is {value!r} but was {saved.get(key)!r}"
            for key, value in entry.items()
            if key in known and value != saved.get(key)
        ]
    if problems:
        advice = "remove these folders, choose another --runs_dir, or go back to the earlier values"
        raise ValueError(f"these runs were made of other entries; {advice}:\n" + "\n".join(problems))


def check_seeds(program: Program, folders: dict[str, list[Path]]) -> None:
    """
    Checks that the seeds of each run were trained alike.

    Raises:
        ValueError: one error that names every run and value that differs.
    """
    problems = []
    for name, each in folders.items():
        entries = [program.read_entry(folder) for folder in each]
        for key in program.known_keys(entries) - {"seed"} if entries else ():
            if len(found := dict.fromkeys(repr(entry.get(key)) for entry in entries)) > 1:
                problems.append(f"{name}: {key} is {' and '.join(found)}")
    if problems:
        raise ValueError("the seeds of a run must have been trained alike, got " + "; ".join(sorted(problems)))


def train(run: PlannedRun, command: str) -> None:
    """Trains one run in this process, and leaves its result file, whose presence means that the run is complete."""
    program = find_program(run.program)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type
    peak = peak_bytes(lambda: program.train(run.flags), device)
    result = {"name": run.name, "seed": run.seed, "peak_bytes": peak if program.has_trained(run.folder) else None}
    result |= {"processor": processor_name(device), "modeling_aft": modeling_aft.__version__, "command": command}
    result |= program.facts(run.flags)
    write_whole(run.folder / RESULT, json.dumps(result, indent=2) + "\n")


def places(jobs: int) -> list[dict[str, str]]:
    """What the environment of each of `jobs` processes at once has, so that they share the GPUs, or the cores."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} for index in range(jobs)]
    threads = torch.get_num_threads() // jobs
    return [{"OMP_NUM_THREADS": str(max(threads, 1))}] * jobs


def train_planned(fields: dict, command: str) -> None:
    """Trains the run with these fields."""
    train(PlannedRun(**fields), command)


def run_process(run: PlannedRun, command: str, seconds: float, place: dict[str, str] | None = None) -> bool:
    """
    Trains one run in a process of its own, so that its peak memory is its own, for so many seconds at most.

    Args:
        place: of several runs at once: what the environment of this one has. What it prints goes to its folder.

    Returns:
        Whether it went well; a run whose time is over has, and continues from its last checkpoint another time.
    """
    output = None if place is None else run.folder / OUTPUT
    call = (__name__, "train_planned", (vars(run), command), output)  # nothing that imports this module too early
    process = get_context("spawn").Process(target=run_elsewhere, args=call)
    with STARTING:
        before = dict(os.environ)
        os.environ.update(place or {})
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
    try:
        process.join(None if math.isinf(seconds) else seconds)
    finally:
        stopped = process.is_alive()
        if stopped:
            process.terminate()
            process.join()
    return stopped or process.exitcode == 0


def train_all(
    planned: list[PlannedRun], entries: list[dict], command: str, hours: float, jobs: int = 1
) -> list[PlannedRun]:
    """Trains what is not finished yet until the hours are over, `jobs` at once; returns the runs that failed."""
    deadline = time.monotonic() + 3600 * hours
    free = Queue()
    for place in places(jobs):
        free.put(place)

    def train_one(number: int, run: PlannedRun, entry: dict) -> bool:
        place = free.get()
        try:
            left = deadline - time.monotonic()
            what = "finished" if run.finished else "trains" if left > 0 else "no time left"
            print(f"{number}/{len(planned)} {run.folder.name}: {what}", flush=True)
            if run.finished or left <= 0:
                return True
            write_whole(run.folder / ENTRY, json.dumps(entry, indent=2) + "\n")
            return run_process(run, command, left, **({} if jobs == 1 else {"place": place}))
        finally:
            free.put(place)

    work = list(zip(range(1, len(planned) + 1), planned, entries, strict=True))
    if jobs == 1:
        went_well = [train_one(*one) for one in work]
    else:
        with ThreadPoolExecutor(jobs) as pool:
            went_well = list(pool.map(lambda one: train_one(*one), work))
    return [run for run, ok in zip(planned, went_well, strict=True) if not ok]


def compare(args: argparse.Namespace, more_flags: list[str], argv: list[str]) -> list[Path]:
    """
    Trains what is to be trained, and writes the table and the picture.

    Args:
        args: the flags of `aft compare`.
        more_flags: those that go to every run.
        argv: all of them as they were written.

    Returns:
        The files it wrote.

    Raises:
        ValueError: the plan or a run's arguments are wrong, or a finished run does not belong to the plan.
        FailedRuns: runs failed; the table of the others is written all the same.
    """
    plan, program = args.plan, find_program(args.plan.command)
    planned = plan_runs(plan, args.runs_dir, args.seeds or plan.seeds, more_flags)
    entries = describe_entries(program, planned, whole=not args.table_only)
    check_folders(program, planned, entries)
    failed = []
    if not args.table_only:
        chosen = [index for index, run in enumerate(planned) if run.name in (args.only or plan.runs)]
        command = shlex.join(["aft", "compare", *argv])
        jobs = min(args.jobs or max(torch.cuda.device_count(), 1), max(len(chosen), 1))
        failed = train_all([planned[i] for i in chosen], [entries[i] for i in chosen], command, args.max_hours, jobs)
    folders = {name: [run.folder for run in planned if run.name == name and run.finished] for name in plan.runs}
    check_seeds(program, folders)
    written = []
    if any(folders.values()):
        stem = (args.output_dir or args.runs_dir / plan.name) / f"compare-{plan.name}"
        written = write_table(program, stem, folders, plan.reference, args.seconds or plan.seconds)
    elif args.table_only:
        raise ValueError(f"--table_only needs finished runs of the plan, and {args.runs_dir / plan.name} has none")
    for path in written:
        print(f"wrote {path}")
    if failed:
        raise FailedRuns("these runs failed, see above: " + ", ".join(run.folder.name for run in failed))
    return written
