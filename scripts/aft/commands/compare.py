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

    aft compare configuration/compare/variants.yaml --dataset_path FILE
    aft compare configuration/compare/windows.yaml --dataset_path FILE --seeds 0 1 2 --max_steps 3000 \\
        --warmup_steps 300
    aft compare configuration/compare/variants.yaml --dataset_path FILE --only aft-simple transformer \\
        --max_hours 2
    aft compare configuration/compare/variants.yaml --table_only --output_dir benchmarks
    aft compare configuration/compare/images.yaml --data FOLDER
    aft compare configuration/compare/translation.yaml --jobs 2

Each run is `aft pretrain`, or what the plan says, in a process of its own, with the folder
<runs_dir>/<plan>/<run>-seed<k>. Flags that are not listed below go to every run, and win over the plan. A finished
run is skipped and an interrupted one continues from its last checkpoint; a run of which the plan, the flags or the
data have changed since is an error (--table_only, which knows neither flags nor data, notices a changed model).

With --jobs several runs train at once, each on a GPU of its own, or on its share of the cores; what a run prints is in
its folder then, in output.txt. The times of runs can be compared if all had as many neighbours.

A plan is a YAML file:

    command: pretrain                            # the default; or classify or seq2seq, see below
    training_preset: ../training/small.yaml      # optional; paths start at the plan's folder
    training: {batch_size: 16, max_steps: 300}   # flags of `aft pretrain`
    seeds: [0]
    reference: name                              # the run whose training time is the budget at equal wall-clock,
    seconds: 600                                 # in place of it: the budget itself
    runs:
      name: {model_preset: ../models/a.json}
      other: {model_preset: ../models/a.json, model_override: {window_size: 8}, training: {batch_size: 8}}

With `command: classify` the runs are classifiers of pictures that begin from nothing: `training` has flags of
`aft classify`, its recipe among them, and a run has `model` in place of model_preset. With `command: seq2seq` they are
encoder-decoders, with flags of `aft seq2seq`; the table has the scores of what they write for test, too.

Whatever is chosen is chosen on valid, or on what is held out; test is scored once, when a run ends.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

from aft.compare_plan import are_seeds, read_plan
from aft.console import any_text
from aft.flags import FlagParser, find_preset


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    The flags of this program, and those that are for the runs.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("compare", __doc__)
    parser.add_argument("plan", help="YAML file, or the name of a plan of the package; stands before the flags")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train these runs of the plan; the table has all")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the plan's")
    parser.add_argument("--jobs", type=int, help="runs at once, sharing GPUs or cores (default: one for each GPU)")
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
            ("jobs", args.jobs is None or args.jobs >= 1, "at least 1"),
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
        raise ValueError("aft compare: " + "; ".join(problems))
    args.plan = read_plan(Path(find_preset(args.plan, "compare", "plan")))
    if unknown := sorted(set(args.only or ()) - args.plan.runs.keys()):
        known = ", ".join(args.plan.runs)
        raise ValueError(f"--only must name runs of the plan ({known}), got {', '.join(unknown)}")
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
    args, more_flags = parse_arguments(argv)
    from aft.comparison import compare

    return compare(args, more_flags, argv)
