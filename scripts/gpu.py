# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Checks and measures on an NVIDIA GPU all that is open for GPUs, and says on one page which goals are met.

    python scripts/gpu.py                     # all parts that have not finished, in 25 minutes
    python scripts/gpu.py --minutes 9         # as much as fits; the same again goes on where it stopped
    python scripts/gpu.py tests tune          # these parts, whether they have finished or not
    python scripts/gpu.py --device cpu --output_dir runs/gpu     # a dry run at tiny sizes

The parts, in their order:

    compile    the Triton kernels for an H100, with registers and spills; needs no GPU
    tests      the tests of the kernels, and all that are marked gpu; needs pytest
    tune       times the layouts of the kernels, and writes the best where the kernels read them
    ceiling    copies, exp, matrix products
    operator   AFT's operators beside attention: forward, and forward and backward
    train      training steps of models beside GPT-2, Llama and, where the package fla is, its recurrent models
    decode     decoding steps by batch and context, and with the largest batch of each model
    report     pictures, which need matplotlib, and the page README.md, which every run writes

Each part is one or more steps, and each step a process that is ended when its share of the time is over; what one
leaves the others get. --output_dir holds everything: CSV files, what each step printed, gpu-steps.csv with what became
of it, and the page. A step that has finished there on the same kind of processor is not run again, unless its part is
named or --again is given. What failed, or had no time, is said with its last lines, and stops no other step; the exit
status is then 1.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from aft.atomic_files import write_rows
from aft.benchmark_rows import STEP_COLUMNS, read_rows
from aft.console import any_text, run_program
from aft.folder_lock import locked
from aft.gpu_plan import PARTS, PLANNED_MINUTES, ROOT, Step, make_plan
from aft.gpu_report import STEPS_FILE, write_page


FINISHED, FAILED, OVER, NO_TIME, LEFT_OUT = "finished", "failed", "out of time", "no time left", "left out"
SHORTEST = 5.0  # seconds, of a step that is begun
LAST = 15  # lines


def environment() -> dict[str, str]:
    """That of processes which find the package and the programs of this repository."""
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def call(arguments: list[str], log: Path, seconds: float) -> int | None:
    """Runs a process at the root of the repository, with all that it starts; its exit status, None if it was ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the others of its group, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_step(step: Step, folder: Path, seconds: float) -> dict:
    """What became of it: some columns of its row."""
    if step.missing:
        return {"status": LEFT_OUT, "last_lines": f"needs the package {', '.join(step.missing)}"}
    if seconds < SHORTEST:
        return {"status": NO_TIME}
    arguments = step.arguments(seconds)
    log = folder / "logs" / f"{step.part}-{re.sub('[^a-z0-9_]+', '-', step.name.lower())}.txt"
    began = time.monotonic()
    status = call(arguments, log, seconds)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST:]
    return {
        "status": {0: FINISHED, None: OVER}.get(status, FAILED),
        "seconds": f"{time.monotonic() - began:.0f}",
        "command": shlex.join(["python", *arguments[1:]]),
        "last_lines": "\n".join(lines),
    }


def run_steps(args: argparse.Namespace, plan: list[Step], processor: str) -> dict[tuple[str, str], dict]:
    """Runs those that are to run, and notes each in the file of steps; all of its rows, by part and name."""
    deadline = time.monotonic() + 60 * args.minutes
    path = args.output_dir / STEPS_FILE
    rows = {(row["part"], row["step"]): row for row in read_rows(path, STEP_COLUMNS)}

    def has_finished(step):
        row = rows.get((step.part, step.name), {})
        return (row.get("status"), row.get("processor"), row.get("device")) == (FINISHED, processor, args.device)

    chosen = [step for step in plan if not args.parts or step.part in args.parts]
    named = bool(args.parts) or args.again
    steps = [step for step in chosen if named or not has_finished(step) or step.part == "report"]
    for step in plan:
        if step.restores and step not in steps and has_finished(step):
            print(f"{step.part}: {step.name}: as it was measured before", flush=True)
            if call([sys.executable, *shlex.split(step.restores)], args.output_dir / "logs" / "restored.txt", 120):
                print("    failed: see logs/restored.txt", flush=True)
    for index, step in enumerate(steps):
        left = deadline - time.monotonic()
        share = left * step.minutes / max(step.minutes, sum(o.minutes for o in steps[index:] if not o.missing))
        seconds = min(left, max(share, 60 * step.minutes))
        print(f"{step.part}: {step.name}: at most {max(0, seconds):.0f} s", flush=True)
        row = dict.fromkeys(STEP_COLUMNS, "") | {"part": step.part, "step": step.name, "device": args.device}
        row |= {"processor": processor, "date": date.today().isoformat(), **run_step(step, args.output_dir, seconds)}
        rows.pop((step.part, step.name), None)
        rows[step.part, step.name] = row  # the last is that which ran last
        write_rows(path, STEP_COLUMNS, list(rows.values()))
        print(f"    {row['status']} {row['seconds'] and row['seconds'] + ' s'}", flush=True)
        if row["status"] not in (FINISHED, NO_TIME):
            print("".join(f"    | {line}\n" for line in row["last_lines"].splitlines()), end="", flush=True)
    return {(step.part, step.name): rows[step.part, step.name] for step in chosen}


def find_processor(device: str) -> str:
    """Its name, from a process of its own, which then holds nothing of its memory."""
    program = f"from aft.machine import processor_name; print(processor_name({device!r}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        reason = " ".join(done.stderr.strip().splitlines()[-1:])
        raise ValueError(f"gpu.py: --device must be cpu, or cuda where there is a GPU, got {device}: {reason}")
    return done.stdout.strip().splitlines()[-1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=PLANNED_MINUTES, help="of all together (default: 25)")
    parser.add_argument("--again", action="store_true", help="run what has finished again")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run at tiny sizes")
    parser.add_argument("--output_dir", default="benchmarks/gpu", help="folder of everything that is written")
    args = parser.parse_args(argv)
    problems = []
    if unknown := [part for part in args.parts if part not in PARTS]:
        problems.append(f"PART must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not 0 < args.minutes <= 24 * 60:
        problems.append(f"--minutes must be in (0, 1440], got {args.minutes}")
    if not args.output_dir:
        problems.append("--output_dir must be a path, got ''")
    if problems:
        raise ValueError("gpu.py: " + "; ".join(problems))
    args.output_dir = Path(args.output_dir).resolve()
    return args


@any_text()
def main(argv: list[str] | None = None) -> Path:
    """
    Runs the parts; returns the path of the page.

    Raises:
        ValueError: a flag is wrong, or there is no GPU.
        SystemExit: with status 1, after all is done, if a step has not finished or cannot run here.
    """
    args = parse_arguments(argv)
    processor = find_processor(args.device)
    print(f"on {processor}, to {args.output_dir}", flush=True)
    plan = make_plan(args.device, args.output_dir)
    with locked(args.output_dir):
        rows = run_steps(args, plan, processor)
        command = shlex.join(["python", "scripts/gpu.py", *(sys.argv[1:] if argv is None else argv)])
        page = write_page(args.output_dir, args.device, plan, command)
    print(f"wrote {page}")
    unfinished = {f"{part}: {name}": row["status"] for (part, name), row in rows.items() if row["status"] != FINISHED}
    for name, status in unfinished.items():
        print(f"{status}: {name}")
    if any(status in (FAILED, OVER, NO_TIME) for status in unfinished.values()):
        raise SystemExit(1)
    return page


if __name__ == "__main__":
    run_program(main)
