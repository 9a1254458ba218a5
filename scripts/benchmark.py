# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Measures side by side, and writes a row per contestant and length to benchmarks/<suite>-<device>.csv.

    python scripts/benchmark.py operator     # forward and backward pass of AFT's operators, and of attention
    python scripts/benchmark.py forward      # their forward pass alone
    python scripts/benchmark.py dense        # the same of the dense Synthesizer, ours and with [T, T] logits
    python scripts/benchmark.py train        # training steps of whole models, ours and those of transformers
    python scripts/benchmark.py decode       # decoding steps of whole models after a context of T tokens
    python scripts/benchmark.py serving      # many prompts of up to T bytes, whose texts end at different times
    python scripts/benchmark.py memory       # the most memory that two training steps hold, weights included
    python scripts/benchmark.py images       # classifiers of images beside ViT; T is the side of an image in pixels
    python scripts/benchmark.py seq2seq      # encoder-decoders beside T5 and BART: training steps, and `generate`
    python scripts/benchmark.py ceiling      # what the processor can do: copies, exp, matrix products
    python scripts/benchmark.py pictures     # draws what the others have written

Every length is one round-robin: each contestant takes its turn in each repeat, so that what else the machine does
meets all of them alike. A row has p20, p50 and p80 of the seconds of a call, the speed at p50, the most memory that a
call held beyond what was there before it, and what they were measured on. In the suite memory, each contestant trains
in a process of its own, and has no times.

The file is written after each length. A row replaces the one of the same contestant, length, batch, dtype, layers and
width; the others stay.
"""

import argparse
import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers

import modeling_aft
from aft.benchmark_contestants import (
    DECODED,
    IMAGE_MODELS,
    WARM_UPS,
    Contestant,
    ceiling_contestants,
    decode_contestants,
    dense_contestants,
    forward_contestants,
    image_contestants,
    model_configs,
    operator_contestants,
    train_contestants,
)
from aft.benchmark_rows import add_rows, read_rows
from aft.benchmark_seq2seq import seq2seq_configs, seq2seq_contestants
from aft.benchmark_serving import serving_contestants
from aft.console import any_text, is_out_of_memory, run_program
from aft.machine import peak_bytes, processor_name, settle_allocator


SUITES = {
    "operator": operator_contestants,
    "forward": forward_contestants,
    "dense": dense_contestants,
    "train": train_contestants,
    "decode": decode_contestants,
    "serving": serving_contestants,
    "memory": train_contestants,
    "images": image_contestants,
    "seq2seq": seq2seq_contestants,
    "ceiling": ceiling_contestants,
}
COMPILED = ("train", "decode", "memory")
OF_MODELS = (*COMPILED, "serving", "images", "seq2seq")
BATCHES = {"decode": 1, "serving": 32, "memory": 1, "ceiling": 1, "images": 4, "seq2seq": 4}  # else by --tokens
LENGTHS = {
    "decode": [64, 256, 1024, 4096, 16384, 65536],
    "serving": [256],
    "images": [224, 384],
    "seq2seq": [128],
    "ceiling": [2**26],
}
# The longest T of those with [T, T] tables, and of those that are a Python loop over the tokens without their kernels.
# Compiled, RWKV's loop is unrolled.
LONGEST = {
    "aft-full": 16384,
    "plain-aft-full": 16384,
    "dense-plain": 4096,
    "synthesizer-dense": 16384,
    "mamba": 1024,
    "rwkv": 1024,
    "rwkv-compiled": 64,
}


def take_turn(contestant: Contestant, device: str) -> float:
    """Seconds of one call, the mean over those of a turn."""
    begin = time.perf_counter()
    for _ in range(contestant.calls):
        contestant.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / contestant.calls


def measure(contestants: dict[str, Contestant], seconds: float, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of a call in each turn; at least one turn each, at most `repeats`."""
    times = {name: [] for name in contestants}
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat > 0 and time.perf_counter() - started > seconds:
            break
        for name, contestant in contestants.items():
            times[name].append(take_turn(contestant, device))
    return times


def training_peak(args, name: str, batch: int, length: int) -> tuple[int | None, dict]:
    """The most memory that a model, its optimizer and two training steps hold, and the columns about the model."""

    def train(length):
        contestant = SUITES["memory"](args, batch, length)[name]()
        contestant.run()
        contestant.run()
        return contestant.about

    torch.manual_seed(0)
    train(min(length, max(64, args.window)))  # libraries load, and workspaces are made
    about = {}
    return peak_bytes(lambda: about.update(train(length)), args.device), about


def in_own_process(function: Callable, *inputs):
    """Its result, from a process that does nothing else, so that nothing is left there by others."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


def measure_memory(args, names: list[str], batch: int, length: int) -> list[dict]:
    """A row per contestant, without times."""
    rows = []
    for name in names:
        measured = those_that_fit({name: partial(in_own_process, training_peak, args, name, batch, length)}, length)
        for peak, about in measured.values():
            rows.append({"contestant": name, "turns": 1, "peak_bytes": peak, **about})
    return rows


def those_that_fit(functions: dict[str, Callable], length: int) -> dict:
    """The result of each function that neither runs out of memory nor is ended by the system for want of it."""
    results = {}
    for name, function in functions.items():
        try:
            results[name] = function()
        except Exception as error:
            overflow = isinstance(error, RuntimeError) and "overflow" in str(error)  # more than can be counted
            if not (overflow or is_out_of_memory(error) or isinstance(error, BrokenProcessPool)):
                raise
            print(f"T={length:6d}  left out for want of memory: {name}")
        else:
            continue
        release_memory()
    return results


def release_memory() -> None:
    """What nothing refers to any more, others may need."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure_time(args, makers: dict[str, Callable], batch: int, length: int) -> list[dict]:
    """A row per contestant."""
    torch._dynamo.reset()
    contestants = those_that_fit(makers, length)
    # To compile, allocate and warm up; what is compiled may be compiled again once others have loaded their code.
    for _ in range(WARM_UPS):
        turns = {name: partial(take_turn, contestant, args.device) for name, contestant in contestants.items()}
        contestants = {name: contestants[name] for name in those_that_fit(turns, length)}
    peaks = {name: peak_bytes(contestant.run, args.device) for name, contestant in contestants.items()}
    rows = []
    for name, values in measure(contestants, args.seconds, args.repeats, args.device).items():
        contestant, figures = contestants[name], np.percentile(values, [20, 50, 80])
        seconds = {column: f"{value:.4g}" for column, value in zip(("p20", "p50", "p80"), figures, strict=True)}
        rate = {"rate": f"{contestant.work / figures[1]:.4g}", "unit": contestant.unit}
        row = {"contestant": name, "turns": len(values), **seconds, **rate, "peak_bytes": peaks[name]}
        rows.append({**row, "width": args.width, **contestant.about})
    return rows


def largest_batch(args, name: str, length: int) -> int:
    """The largest power of two, up to --largest_batch, that a contestant has the memory for; 0 if there is none."""

    def take_turn_with(batch):
        release_memory()
        return take_turn(SUITES[args.suite](args, batch, length)[name](), args.device)

    def fits(batch):
        turn = {f"{name}, batch {batch}": partial(take_turn_with, batch)}
        return batch <= args.largest_batch and bool(those_that_fit(turn, length))

    batch = 1
    while fits(4 * batch):
        batch *= 4
    if fits(2 * batch):
        batch *= 2
    return batch if batch > 1 or fits(1) else 0


def measure_largest(args, names: list[str], length: int) -> list[dict]:
    """A row per contestant, each alone, with the largest batch that it has the memory for."""
    rows = []
    for name in names:
        batch, measured = largest_batch(args, name, length), []
        while batch and not measured:  # more turns can take more memory than one
            release_memory()
            maker = {name: SUITES[args.suite](args, batch, length)[name]}
            found = those_that_fit(
                {f"{name}, batch {batch}": partial(measure_time, args, maker, batch, length)}, length
            )
            measured = [{**row, "batch_size": batch} for part in found.values() for row in part]
            batch //= 2
        rows += measured
    return rows


def measure_length(args, length: int) -> list[dict]:
    """The rows of one length."""
    batch = args.batch_size or BATCHES.get(args.suite) or max(1, args.tokens // length)
    makers = SUITES[args.suite](args, batch, length)
    if unknown := args.longest.keys() - makers.keys():
        allowed = ", ".join(makers)
        raise ValueError(f"--longest must name contestants of {args.suite} ({allowed}), got {', '.join(unknown)}")
    too_long = [name for name in makers if length > longest(args, name)]
    if too_long:
        print(f"T={length:6d}  left out by --longest: {', '.join(too_long)}")
    makers = {name: make for name, make in makers.items() if name not in too_long}
    conditions = {
        "suite": args.suite,
        "length": length,
        "device": args.device,
        "processor": processor_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch_size": batch,
        "modeling_aft": modeling_aft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    if args.suite == "memory":
        rows = measure_memory(args, list(makers), batch, length)
    elif args.largest_batch is not None:
        rows = measure_largest(args, list(makers), length)
    else:
        rows = measure_time(args, makers, batch, length)
    return [{**conditions, **row} for row in rows]


def longest(args, name: str) -> float:
    """The longest T at which a contestant takes part; a compiled one without a limit has that of the other."""
    limits = {**LONGEST, **args.longest}
    return limits.get(name, limits.get(name.removesuffix("-compiled"), float("inf")))


def print_row(row: dict) -> None:
    time = f"{float(row['p50']) * 1e3:10.3f} ms {float(row['rate']):12,.1f} {row['unit']}" if row.get("p50") else ""
    print(f"T={row['length']:6d}  {row['contestant']:28s} {time:36s} {(row['peak_bytes'] or 0) / 2**20:9.1f} MiB")


def model_names(args) -> list[str]:
    """The models that a suite measures by default."""
    if args.suite == "images":
        return IMAGE_MODELS
    if args.suite == "seq2seq":
        return list(seq2seq_configs(args, 1))
    names = list(model_configs(args, 1, "none"))
    if args.suite in ("decode", "serving"):
        names = [name for name in names if name.startswith(DECODED)]
    return [name for name in names if args.suite != "serving" or name != "aft-full"]  # whose state grows


def length_of_name(text: str) -> tuple[str, int]:
    """NAME=LENGTH, the value of --longest."""
    name, _, length = text.rpartition("=")
    if not name or not length.isdecimal():
        raise argparse.ArgumentTypeError(f"must be NAME=LENGTH, got {text}")
    return name, int(length)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "pictures"], help="what to measure")
    parser.add_argument("--lengths", type=int, nargs="+", help="values of T; of ceiling: elements of the large copy")
    parser.add_argument("--models", nargs="+", help=f"models of {', '.join(OF_MODELS)}: names, or files")
    defaults = ", ".join(f"{name}={length}" for name, length in LONGEST.items())
    parser.add_argument(
        "--longest",
        type=length_of_name,
        nargs="+",
        default=[],
        metavar="NAME=LENGTH",
        help=f"contestants that are left out beyond a length; unless given here, {defaults}",
    )
    parser.add_argument(
        "--batch_size", type=int, help="sequences; else by --tokens, or as the suite has it (1, 4, serving 32)"
    )
    parser.add_argument(
        "--largest_batch",
        type=int,
        metavar="N",
        help="decode: the largest batch that fits, of powers of two up to N, of each contestant by itself",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch, at least one sequence")
    parser.add_argument("--layers", type=int, default=6, help="blocks of a model")
    parser.add_argument("--width", type=int, default=256, help="channels D")
    parser.add_argument("--heads", type=int, default=8, help="heads of attention and of the Synthesizer")
    parser.add_argument("--conv_heads", type=int, default=32, help="heads of AFT-conv")
    parser.add_argument("--window", type=int, default=32, help="window size s of AFT-local and AFT-conv")
    parser.add_argument("--rank", type=int, default=64, help="rank of the position biases of AFT-local and AFT-full")
    parser.add_argument("--dropout", type=float, help="seq2seq: where each model has it (default: 0.1)")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps in a turn")
    parser.add_argument("--prompts", type=int, default=256, help="serving: how many")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all tensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--compile", action="store_true", help="train and memory: compiled models; decode: compiled ones as well"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time per length, if repeats do not end it before")
    parser.add_argument("--repeats", type=int, default=50, help="most turns of each contestant at a length")
    parser.add_argument("--output_dir", default="benchmarks", help="folder of csv files and pictures")
    args = parser.parse_args(argv)
    args.lengths = args.lengths or LENGTHS.get(args.suite, [256, 1024, 4096, 16384])
    args.longest = dict(args.longest)
    sizes = ("tokens", "layers", "width", "heads", "conv_heads", "window", "rank", "steps", "prompts", "repeats")
    problems = [f"--{name} must be at least 1, got {getattr(args, name)}" for name in sizes if getattr(args, name) < 1]
    if not args.seconds > 0:
        problems.append(f"--seconds must be positive, got {args.seconds}")
    if args.device != "cpu" and not (args.device == "cuda" and torch.cuda.is_available()):
        problems.append(f"--device must be cpu, or cuda where there is a GPU, got {args.device}")
    if not args.output_dir:
        problems.append("--output_dir must be a path, got ''")
    if args.batch_size is not None and args.batch_size < 1:
        problems.append(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.largest_batch is not None:
        if args.largest_batch < 1:
            problems.append(f"--largest_batch must be at least 1, got {args.largest_batch}")
        if args.suite != "decode" or args.batch_size is not None or args.compile:
            problems.append("--largest_batch must go with decode, without --batch_size and --compile")
    problems += [f"--lengths must be at least 1, got {length}" for length in args.lengths if length < 1]
    for name in ("heads", "conv_heads"):
        if args.width % max(getattr(args, name), 1):
            problems.append(f"--{name} must divide --width {args.width}, got {getattr(args, name)}")
    if args.dropout is not None and not (args.suite == "seq2seq" and 0 <= args.dropout < 1):
        problems.append(f"--dropout must be in [0, 1), and go with seq2seq, got {args.dropout} with {args.suite}")
    args.dropout = 0.1 if args.dropout is None else args.dropout
    if args.compile and (args.suite not in COMPILED or (args.suite, args.device) == ("memory", "cpu")):
        # On a CPU, the memory of the compiler cannot be told from that of the model.
        problems.append(f"--compile must go with train, decode, or memory on cuda, got {args.suite} on {args.device}")
    if args.models and args.suite not in OF_MODELS:
        problems.append(f"--models must go with {', '.join(OF_MODELS)}, got {args.suite}")
    if not problems:
        names = model_names(args)
        args.models = args.models or names
        unknown = [name for name in args.models if name not in names and not Path(name).is_file()]
        if unknown:
            problems.append(f"--models must be files or of {', '.join(names)}, got {', '.join(unknown)}")
    if problems:
        raise ValueError("benchmark.py: " + "; ".join(problems))
    args.output_dir = Path(args.output_dir)
    return args


@any_text()
def main(argv: list[str] | None = None) -> list[Path]:
    """Runs a suite, or draws; returns the files that were written."""
    args = parse_arguments(argv)
    if args.suite == "pictures":
        from aft.benchmark_pictures import draw_pictures  # matplotlib comes with the extra `train`

        return draw_pictures(args.output_dir)
    path = args.output_dir / f"{args.suite}-{args.device}.csv"
    read_rows(path)  # refused before the work
    torch._dynamo.config.recompile_limit = 64  # one per contestant: those of a class share their code
    torch.manual_seed(0)
    settle_allocator()
    for length in args.lengths:
        rows = measure_length(args, length)
        for row in rows:
            print_row(row)
        add_rows(path, rows)
    print(f"wrote {path}")
    return [path]


if __name__ == "__main__":
    run_program(main)
