# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Times the Triton kernels in many layouts, on a GPU: how wide a program is, how many warps it has, and how many warps a
multiprocessor should get before time is cut into chunks; of AFT-full those of a list. The best go into
modeling_aft/triton_layouts.py, where the kernels read them, as those of GPUs of the same compute capability.

    python scripts/tune_triton.py
    python scripts/tune_triton.py --chosen_from benchmarks/gpu/triton-layouts.csv     # measured before: needs no GPU

Times are those of the kernels alone: each pass is captured as a CUDA graph, without what Python needs to launch it,
which stands in a column of its own. Layouts are compiled in processes side by side before they are timed; those
nearest to the default come first, and those for which --seconds leave no time have rows without times. Of the main
kernel of each pass the rows have the registers of a thread, and the 4-byte words that it keeps in memory instead.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch

from aft.atomic_files import check_file, write_rows
from aft.benchmark_rows import LAYOUT_COLUMNS, read_rows
from aft.console import any_text, run_program
from aft.machine import processor_name
from aft.triton_kernels import (
    FORMS,
    Sizes,
    add_layouts,
    best_layouts,
    laid_out,
    make_passes,
    noting_kernels,
)
from modeling_aft import ops_triton, triton_layouts


COMPILING = 0.6  # of --seconds, at most
DEFAULT = triton_layouts.LAYOUTS["default"]["simple"]["forward"]  # where the search begins
FULL = tuple(triton_layouts.LAYOUTS["default"]["full"]["forward"])  # rows, columns, depth, num_warps, num_stages
FULL_LAYOUTS = (
    *((128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3)),
    *((128, 128, 64, 8, 2), (64, 64, 64, 4, 4), (128, 64, 32, 4, 4), (64, 256, 64, 8, 3), (128, 64, 32, 8, 3)),
)


def passes_in(args: argparse.Namespace, form: str, sizes: Sizes) -> dict[str, Callable]:
    forward, backward = make_passes(form, sizes, getattr(torch, args.dtype), "cuda")
    return {"forward": forward, "backward": backward}


def compile_layouts(args: argparse.Namespace, form: str, layouts: list[dict]) -> None:
    """Leaves the kernels of layouts in Triton's cache on the disk, without running them."""
    for layout, sizes in itertools.product(layouts, args.sizes):
        with laid_out(layout), noting_kernels(runs=False):
            passes_in(args, form, sizes)["backward"]()


def launch_milliseconds(function: Callable) -> float:
    """What a call costs the CPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        function()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / 20 * 1e3


def measure(args: argparse.Namespace, form: str, layout: dict, sizes: Sizes) -> dict:
    """Times, registers and spills in one layout; empty where the GPU has not the memory that a program needs."""
    import triton

    figures = {}
    with laid_out(layout):
        try:
            with noting_kernels(runs=True) as kernels:
                passes = passes_in(args, form, sizes)
                passes["backward"]()
            for direction, function in passes.items():
                milliseconds = triton.testing.do_bench_cudagraph(function, rep=args.milliseconds, return_mode="median")
                kernel = kernels.get(f"_{direction}") or kernels["_backward_keys"]
                figures[f"{direction}_ms"] = f"{milliseconds:.4g}"
                figures[f"{direction}_launch_ms"] = f"{launch_milliseconds(function):.4g}"
                figures |= {f"{direction}_registers": kernel.n_regs, f"{direction}_spills": kernel.n_spills}
        except triton.runtime.errors.OutOfResources as error:
            print(f"cannot run: {form} {layout}: {error}")
            return {}
    return figures


def layouts_of(form: str, args: argparse.Namespace) -> list[dict]:
    """Those to try of a form, the ones first that are expected to be the best."""
    if FORMS[form] == "full":
        return [dict(zip(FULL, numbers, strict=True)) for numbers in FULL_LAYOUTS]
    names = tuple(DEFAULT)
    values = itertools.product(args.columns, args.warps, args.processor_warps)
    layouts = [dict(zip(names, chosen, strict=True)) for chosen in values]
    # The fewest doublings away from the default.
    return sorted(layouts, key=lambda layout: sum(abs(math.log2(layout[name] / DEFAULT[name])) for name in names))


def in_order(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """All forms and layouts, the first of each form before the second of any."""
    columns = itertools.zip_longest(*([(form, layout) for layout in layouts_of(form, args)] for form in args.forms))
    return [case for row in columns for case in row if case is not None]


def compile_in_time(args: argparse.Namespace, cases: list[tuple[str, dict]], deadline: float) -> list:
    """The forms and layouts that were compiled before the deadline."""
    units = {}  # one for all layouts that differ in the number of chunks alone: kernels know one or several
    for form, layout in cases:
        unit = [(name, number) for name, number in layout.items() if name != "processor_warps"]
        units.setdefault((form, *unit), []).append(layout)
    compiled = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        results = [pool.apply_async(compile_layouts, (args, unit[0], layouts)) for unit, layouts in units.items()]
        for (unit, layouts), result in zip(units.items(), results, strict=True):
            with contextlib.suppress(multiprocessing.TimeoutError):
                result.get(max(0.0, deadline - time.perf_counter()))
                compiled += [(unit[0], layout) for layout in layouts]
    return compiled


def measure_layouts(args: argparse.Namespace) -> list[dict]:
    """A row for each form, layout and size."""
    import triton

    started = time.perf_counter()
    architecture, _ = ops_triton.processor(torch.device("cuda", torch.cuda.current_device()))
    about = {"dtype": args.dtype, "architecture": architecture, "processor": processor_name("cuda")}
    about |= {"torch": torch.__version__, "triton": triton.__version__, "date": date.today().isoformat()}
    cases = in_order(args)
    compiled = compile_in_time(args, cases, started + COMPILING * args.seconds)
    rows = []
    for (form, layout), sizes in itertools.product(cases, args.sizes):
        row = {"form": form, **layout, **sizes._asdict(), **about}
        if (form, layout) in compiled and time.perf_counter() < started + args.seconds:
            row |= measure(args, form, layout, sizes)
            print("  ".join(str(row.get(name, "")) for name in LAYOUT_COLUMNS[:15]), flush=True)
        rows.append(row)
    return rows


def sizes_of_text(text: str) -> tuple[int, int]:
    """BATCHxLENGTH, a value of --sizes."""
    batch, _, length = text.partition("x")
    if not batch.isdecimal() or not length.isdecimal():
        raise argparse.ArgumentTypeError(f"must be BATCHxLENGTH, got {text}")
    return int(batch), int(length)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of AFT")
    parser.add_argument("--columns", type=int, nargs="+", default=[16, 32, 64], help="of a program; not of full")
    parser.add_argument("--warps", type=int, nargs="+", default=[1, 2, 4], help="of a program; not of full")
    parser.add_argument(
        "--processor_warps", type=int, nargs="+", default=[4, 8, 16], help="warps that a multiprocessor should get"
    )
    parser.add_argument(
        "--sizes",
        type=sizes_of_text,
        nargs="+",
        default=[(8, 2048), (1, 16384)],
        metavar="BATCHxLENGTH",
        help="sequences, and tokens of each; all count alike (default: 8x2048 1x16384)",
    )
    parser.add_argument("--width", type=int, default=1024, help="channels D")
    parser.add_argument("--heads", type=int, default=32, help="heads of AFT-conv")
    parser.add_argument("--window", type=int, default=32, help="window size of AFT-local and AFT-conv")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the inputs"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of compiling and measuring (default: 300)")
    parser.add_argument("--milliseconds", type=int, default=20, help="of measuring, for each pass of each layout")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--csv", default="benchmarks/gpu/triton-layouts.csv", help="the file to write")
    parser.add_argument("--chosen_from", metavar="CSV", help="such a file, from which to choose without measuring")
    args = parser.parse_args(argv)
    problems = []
    numbers = ("width", "heads", "window", "milliseconds", "jobs")
    for name in ("columns", "warps", "processor_warps", *numbers):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                problems.append(f"--{name} must be at least 1, got {value}")
            elif name in ("columns", "warps") and value & (value - 1):
                problems.append(f"--{name} must be powers of 2, got {value}")
    problems += [f"--sizes must be at least 1, got {b}x{t}" for b, t in args.sizes if min(b, t) < 1]
    if args.heads > 0 and args.width % args.heads:
        problems.append(f"--heads must divide --width {args.width}, got {args.heads}")
    if args.dtype == "float32" and min(args.columns) < 2:
        problems.append(f"--columns must be at least 2 with --dtype float32, got {min(args.columns)}: it takes half")
    if not args.seconds > 0:
        problems.append(f"--seconds must be positive, got {args.seconds}")
    if Path(args.csv).suffix != ".csv":
        problems.append(f"--csv must be a .csv file, got {args.csv}")
    if problems:
        raise ValueError("tune_triton.py: " + "; ".join(problems))
    if args.chosen_from is not None:
        check_file(Path(args.chosen_from), "tune_triton.py: --chosen_from")
    elif not torch.cuda.is_available() or find_spec("triton") is None:
        raise ValueError("tune_triton.py needs a CUDA device and the package triton, and there is none here")
    args.sizes = [Sizes(batch, length, args.width, args.heads, args.window) for batch, length in args.sizes]
    return args


@any_text()
def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Times the layouts, or reads their times; returns the entries that the table has got."""
    args = parse_arguments(argv)
    table = Path(triton_layouts.__file__)
    if not (os.access(table, os.W_OK) and os.access(table.parent, os.W_OK)):
        raise ValueError(f"tune_triton.py must be able to write {table}, and may not: install the package elsewhere")
    if args.chosen_from is not None:
        rows = read_rows(Path(args.chosen_from), LAYOUT_COLUMNS)
    else:
        rows = measure_layouts(args)
        write_rows(Path(args.csv), LAYOUT_COLUMNS, rows)
        print(f"wrote {args.csv}")
    missing = sum(not row.get("forward_ms") for row in rows)
    print(f"{missing} of {len(rows)} forms and layouts at a size have no time")
    layouts = best_layouts(rows)
    if layouts:
        add_layouts(table, layouts)
        print(f"wrote {table}: {layouts}")
    else:
        print(f"{table} stays as it is: no layout was timed at all sizes")
    return layouts


if __name__ == "__main__":
    run_program(main)
