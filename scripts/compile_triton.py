# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Compiles the Triton kernels for a GPU that need not be there, and notes what each takes of a multiprocessor.

    python scripts/compile_triton.py                            # for an H100, as the kernels are laid out for it
    python scripts/compile_triton.py --columns 16 32 --warps 1 2     # in these layouts

The columns: registers of a thread; spill_stores and spill_loads, bytes that a thread writes and reads because it has
too few registers; bytes of shared memory. They are what the assembler says that comes with the package triton. The
kernels that scan chunks, lay out weights or work in log space have a layout of their own.
"""

import argparse
import contextlib
import itertools
from datetime import date
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch

from aft.atomic_files import write_rows
from aft.benchmark_rows import REGISTER_COLUMNS
from aft.console import any_text, run_program
from aft.triton_kernels import DIRECTIONS, FORMS, H100, Sizes, compiling_for, laid_out, make_passes, resources
from modeling_aft import ops_triton, triton_layouts


DTYPES = ("bfloat16", "float16", "float32")
# Of inputs whose time is cut into chunks, with the heads of AFT-conv that give each program channels of one.
SIZES = Sizes(batch_size=1, length=1024, width=64, heads=2, window=32)
WIDE = SIZES._replace(width=1024)  # of AFT-full, so that its tiles are as wide as they may be


def compile_kernels(case: tuple[str, str, str, tuple]) -> list[dict]:
    """
    A row for each kernel of both directions.

    Args:
        case: architecture, form, dtype, and the layout as columns and warps, None for that of the architecture.
    """
    import triton

    architecture, form, dtype, (columns, warps) = case
    about = {"architecture": architecture, "triton": triton.__version__, "date": date.today().isoformat()}
    with compiling_for(architecture, H100[1]) as kernels, contextlib.ExitStack() as stack:
        if columns is not None:
            default = triton_layouts.LAYOUTS["default"][FORMS[form]]["forward"]
            stack.enter_context(laid_out({**default, "columns": columns, "num_warps": warps}))
        _, backward = make_passes(form, WIDE if form == "full" else SIZES, getattr(torch, dtype), "cpu")
        backward()
        layouts = {name: ops_triton.layout_of(FORMS[form], name, torch.device("cpu")) for name in DIRECTIONS}
    rows = []
    for name, kernel in kernels.items():
        own = layouts["backward" if "backward" in name else "forward"]["columns"]
        row = {"form": form, "dtype": dtype, "columns": own, "kernel": name, "num_warps": kernel.metadata.num_warps}
        rows.append({**row, **resources(kernel), **about})
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of AFT")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"], help="of the inputs")
    parser.add_argument("--columns", type=int, nargs="+", help="of a program in half precision")
    parser.add_argument("--warps", type=int, nargs="+", help="of a program")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    parser.add_argument("--architecture", default=H100[0], help="sm_ and the compute capability")
    parser.add_argument("--csv", default="benchmarks/gpu/triton-registers.csv", help="the file to write")
    args = parser.parse_args(argv)
    problems = []
    if not args.architecture.removeprefix("sm_").isdecimal() or not args.architecture.startswith("sm_"):
        problems.append(f"--architecture must be sm_ and a number, as sm_90, got {args.architecture}")
    if (args.columns is None) != (args.warps is None):
        problems.append(f"--columns and --warps must be given together, got {args.columns} and {args.warps}")
    for name in ("columns", "warps"):
        for value in getattr(args, name) or ():
            if value < 2 * (name == "columns") or value & (value - 1) or value == 0:
                problems.append(f"--{name} must be powers of 2, of columns at least 2, got {value}")
    if args.jobs < 1:
        problems.append(f"--jobs must be at least 1, got {args.jobs}")
    if Path(args.csv).suffix != ".csv":
        problems.append(f"--csv must be a .csv file, got {args.csv}")
    if problems:
        raise ValueError("compile_triton.py: " + "; ".join(problems))
    if find_spec("triton") is None:
        raise ValueError("compile_triton.py needs the package triton, and there is none here")
    return args


@any_text()
def main(argv: list[str] | None = None) -> list[dict]:
    """Compiles the kernels; returns the rows that were written."""
    args = parse_arguments(argv)
    layouts = itertools.product(args.columns or [None], args.warps or [None])
    cases = list(itertools.product([args.architecture], args.forms, args.dtypes, layouts))
    rows = []
    with get_context("spawn").Pool(min(args.jobs, len(cases))) if args.jobs > 1 else contextlib.nullcontext() as pool:
        for found in (pool.imap if pool else map)(compile_kernels, cases):
            rows += found
            for row in found:
                print("  ".join(str(value) for value in list(row.values())[:9]), flush=True)
    write_rows(Path(args.csv), REGISTER_COLUMNS, rows)
    print(f"wrote {args.csv}")
    return rows


if __name__ == "__main__":
    run_program(main)
