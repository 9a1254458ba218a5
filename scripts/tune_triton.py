# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Times the Triton kernels in every layout, on a GPU: how wide a program is, how many warps it has, and into how many
chunks time is cut. The first values of `_FORWARD` and `_BACKWARD` in modeling_aft/ops_triton.py are chosen by it.

    python scripts/tune_triton.py

Times are those of the kernels alone: each pass is captured as a CUDA graph, without what Python needs to launch it,
which stands in a column of its own. Layouts are compiled in processes side by side before they are timed.
"""

import argparse
import itertools
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from aft.atomic_files import write_rows
from aft.console import any_text, run_program
from aft.machine import processor_name
from modeling_aft import ops_triton
from modeling_aft.ops_state import nothing


FORMS = ("simple", "local", "conv")
COLUMNS = (
    *("form", "columns", "warps", "chunks", "forward_ms", "backward_ms", "forward_launch_ms", "backward_launch_ms"),
    *("batch_size", "length", "width", "heads", "window", "dtype", "processor", "torch", "triton", "date"),
)


def make_passes(args, form: str, columns: int, warps: int, chunks: int):
    """The forward and the backward pass of the operator in one layout, as functions without arguments."""
    layout = {"columns": columns, "num_warps": warps}
    ops_triton._FORWARD = ops_triton._BACKWARD = (layout, layout)
    ops_triton._chunks = lambda warps, tiles, device: chunks
    torch.manual_seed(0)
    size, dtype = (args.batch_size, args.length), getattr(torch, args.dtype)
    keys = args.heads if form == "conv" else args.width
    query, value, grad = (torch.randn(*size, args.width, device="cuda", dtype=dtype) for _ in range(3))
    key = torch.randn(*size, keys, device="cuda", dtype=dtype)
    shape = {"simple": None, "local": (1, 1, args.length, args.window), "conv": (args.heads, 1, 1, args.window)}[form]
    rows = None if shape is None else torch.randn(*shape, device="cuda")
    initial = torch.stack([sums.expand_as(value[:, 0]) for sums in nothing(value, value, torch.float32)], 1)
    inputs = query, key, value, rows, initial, None

    def forward():
        return ops_triton._windowed(*inputs, "sigmoid")

    _, *saved = forward()

    def backward():
        return ops_triton._windowed_backward(grad, *inputs, *saved, "sigmoid", rows is not None, False)

    backward()
    torch.cuda.synchronize()
    return forward, backward


def compile_layout(args, layout: tuple) -> None:
    """Leaves the kernels in Triton's cache on the disk."""
    make_passes(args, *layout)


def launch_milliseconds(function) -> float:
    """What a call costs the CPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        function()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / 20 * 1e3


def measure(args, form: str, columns: int, warps: int, chunks: int) -> dict:
    """The row of one layout."""
    import triton

    row = {"form": form, "columns": columns, "warps": warps, "chunks": chunks}
    for name, function in zip(("forward", "backward"), make_passes(args, *row.values()), strict=True):
        milliseconds = triton.testing.do_bench_cudagraph(function, rep=args.milliseconds, return_mode="median")
        row |= {f"{name}_ms": f"{milliseconds:.4g}", f"{name}_launch_ms": f"{launch_milliseconds(function):.4g}"}
    sizes = {name: getattr(args, name) for name in ("batch_size", "length", "width", "heads", "window", "dtype")}
    about = {"processor": processor_name("cuda"), "torch": torch.__version__, "triton": triton.__version__}
    return {**row, **sizes, **about, "date": date.today().isoformat()}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="forms of AFT")
    parser.add_argument("--columns", type=int, nargs="+", default=[16, 32, 64], help="columns of a program")
    parser.add_argument("--warps", type=int, nargs="+", default=[1, 2, 4], help="warps of a program")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16], help="chunks of time")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens T of each")
    parser.add_argument("--width", type=int, default=1024, help="channels D")
    parser.add_argument("--heads", type=int, default=32, help="heads of AFT-conv")
    parser.add_argument("--window", type=int, default=32, help="window size of AFT-local and AFT-conv")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the inputs"
    )
    parser.add_argument("--milliseconds", type=int, default=20, help="of measuring, for each pass of each layout")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--csv", default="benchmarks/triton-layouts.csv", help="the file to write")
    args = parser.parse_args(argv)
    problems = []
    numbers = ("batch_size", "length", "width", "heads", "window", "milliseconds", "jobs")
    for name in ("columns", "warps", "chunks", *numbers):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                problems.append(f"--{name} must be at least 1, got {value}")
            elif name in ("columns", "warps") and value & (value - 1):
                problems.append(f"--{name} must be powers of 2, got {value}")
    if args.heads > 0 and args.width % args.heads:
        problems.append(f"--heads must divide --width {args.width}, got {args.heads}")
    if args.dtype == "float32" and min(args.columns) < 2:
        problems.append(f"--columns must be at least 2 with --dtype float32, got {min(args.columns)}: it takes half")
    if Path(args.csv).suffix != ".csv":
        problems.append(f"--csv must be a .csv file, got {args.csv}")
    if problems:
        raise ValueError("tune_triton.py: " + "; ".join(problems))
    if not torch.cuda.is_available() or ops_triton.triton is None:
        raise ValueError("tune_triton.py needs a CUDA device and the package triton, and there is none here")
    return args


@any_text()
def main(argv: list[str] | None = None) -> list[dict]:
    """Times the layouts; returns the rows that were written."""
    args = parse_arguments(argv)
    layouts = list(itertools.product(args.forms, args.columns, args.warps, args.chunks))
    with get_context("spawn").Pool(args.jobs) as pool:
        pool.starmap(compile_layout, [(args, layout) for layout in layouts], chunksize=1)
    rows = []
    for layout in layouts:
        rows.append(measure(args, *layout))
        print("  ".join(str(value) for value in list(rows[-1].values())[:8]))
        write_rows(Path(args.csv), COLUMNS, rows)
    print(f"wrote {args.csv}")
    return rows


if __name__ == "__main__":
    run_program(main)
