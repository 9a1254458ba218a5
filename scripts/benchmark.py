# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Measures side by side, and writes a row per contestant and length to benchmarks/.

    python scripts/benchmark.py operator     # forward and backward pass of AFT's operators, and of attention
    python scripts/benchmark.py dense        # the same of the dense Synthesizer, ours and with [T, T] logits
    python scripts/benchmark.py train        # training steps of whole models

Every length is one round-robin: each contestant takes its turn in each repeat, so that what else the machine does
meets all of them alike. A row has p20, p50 and p80 of the seconds of a turn, the most memory that a turn held beyond
what was there before it, and what they were measured on.
"""

import argparse
import csv
import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_aft
from modeling_aft import SynthesizerConfig, SynthesizerModel
from modeling_aft.ops import aft_attention


def plain_aft(query, key, value, position_bias):
    """AFT-full as it is usually written: exp of a masked [T, T] bias times exp(key), with a maximum over all keys."""
    length = key.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
    weight = (position_bias.masked_fill(future, -torch.inf) - position_bias.amax(-1, keepdim=True)).exp()
    exp_key = (key - key.amax(1, keepdim=True)).exp()
    numerator = torch.einsum("ts,bsd->btd", weight, exp_key * value)
    return torch.sigmoid(query) * numerator / torch.einsum("ts,bsd->btd", weight, exp_key)


def operator_contestants(args, length: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Name and one forward and backward pass of each operator, on tensors of its own."""
    batch, width, heads, window = args.batch_size, args.width, args.heads, args.window

    def leaf(*shape):
        return torch.randn(*shape, device=args.device, dtype=dtype).requires_grad_()

    query, key, value = (leaf(batch, length, width) for _ in range(3))
    head_key = leaf(batch, length, heads)
    row_bias, head_bias = leaf(1, length, window), leaf(heads, 1, window)
    seed = torch.randn(batch, length, width, device=args.device, dtype=dtype)

    def attention():
        split = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).reshape(batch, length, width)

    forwards = {
        f"sdpa-h{heads}": attention,
        "aft-simple": lambda: aft_attention(query, key, value),
        f"aft-local-{window}": lambda: aft_attention(query, key, value, window_bias=row_bias),
        f"aft-conv-{heads}-{window}": lambda: aft_attention(query, head_key, value, window_bias=head_bias),
    }
    if length <= args.longest_table:
        position_bias = leaf(length, length)
        forwards["aft-full"] = lambda: aft_attention(query, key, value, position_bias)
        forwards["plain-aft-full"] = lambda: plain_aft(query, key, value, position_bias)
    inputs = [query, key, value, head_key, row_bias, head_bias]

    def forward_backward(forward):
        forward().backward(seed)
        for tensor in inputs:
            tensor.grad = None
        if length <= args.longest_table:
            position_bias.grad = None
        if args.device == "cuda":
            torch.cuda.synchronize()

    return {name: lambda forward=forward: forward_backward(forward) for name, forward in forwards.items()}


def measure(contestants: dict[str, Callable[[], None]], seconds: float, repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn; at least one each, at most `repeats`."""
    times = {name: [] for name in contestants}
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat > 0 and time.perf_counter() - started > seconds:
            break
        for name, turn in contestants.items():
            begin = time.perf_counter()
            turn()
            times[name].append(time.perf_counter() - begin)
    return times


def peak_bytes(turn: Callable[[], None], device: str) -> int | None:
    """The most memory that a turn holds beyond what is there before it; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        turn()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a turn would find memory that an earlier one left
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before = resident_kib("VmHWM")
    turn()
    return (resident_kib("VmHWM") - before) * 1024


def resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replaces the file when all rows are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def dense_contestants(args, length: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One forward and backward pass of a dense Synthesizer mixer, by factors and with its [T, T] logits."""
    config = SynthesizerConfig(
        synthesizer_type="dense",
        hidden_size=args.width,
        num_attention_heads=args.heads,
        max_position_embeddings=length,
    )
    mixer = SynthesizerModel(config).layers[0].mixer.to(args.device, dtype)
    hidden = torch.randn(args.batch_size, length, args.width, device=args.device, dtype=dtype, requires_grad=True)

    def turn(plain):
        mixer(hidden, output_attentions=plain)[0].sum().backward()
        mixer.zero_grad()
        hidden.grad = None
        if args.device == "cuda":
            torch.cuda.synchronize()

    return {"dense-plain": lambda: turn(True), "dense": lambda: turn(False)}


def train_contestants(args, length: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Name and one training step (forward, loss, backward, AdamW) of the model of each preset."""
    contestants = {}
    for preset in args.models:
        config = AutoConfig.from_pretrained(preset)
        config.max_position_embeddings = max(config.max_position_embeddings, length)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(args.device).train()
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(config.vocab_size, (args.batch_size, length), device=args.device)

        def step(model=model, optimizer=optimizer, ids=ids):
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if args.device == "cuda":
                torch.cuda.synchronize()

        contestants[Path(preset).stem] = step
    return contestants


SUITES = {"operator": operator_contestants, "dense": dense_contestants, "train": train_contestants}


def run_suite(args) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    conditions = {
        "device": args.device,
        "processor": processor_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "modeling_aft": modeling_aft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    rows = []
    for length in args.lengths:
        contestants = SUITES[args.suite](args, length, dtype)
        for turn in contestants.values():  # compile, allocate, warm up
            turn()
        peaks = {name: peak_bytes(turn, args.device) for name, turn in contestants.items()}
        times = measure(contestants, args.seconds, args.repeats)
        first = np.median(next(iter(times.values())))
        for name, values in times.items():
            figures = dict(zip(("p20", "p50", "p80"), np.percentile(values, [20, 50, 80]), strict=True))
            seconds = {percentile: f"{value:.6f}" for percentile, value in figures.items()}
            row = {"contestant": name, "length": length, "turns": len(values), **seconds, "peak_bytes": peaks[name]}
            rows.append({**row, **conditions})
            median, speed = figures["p50"], args.batch_size * length / figures["p50"]
            speeds = f"{median * 1e3:10.2f} ms {speed:11,.0f} tokens/s {first / median:6.2f} x"
            print(f"T={length:6d}  {name:36s} {speeds} {(peaks[name] or 0) / 2**20:9.1f} MiB")
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES), help="what to measure")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="values of T")
    presets = sorted(map(str, Path(__file__).parent.parent.glob("configuration/models/*-small.json")))
    parser.add_argument("--models", nargs="+", default=presets, help="model presets of the suite train")
    parser.add_argument("--longest_table", type=int, default=16384, help="longest T for the forms with a [T, T] bias")
    parser.add_argument("--batch_size", type=int, default=2, help="sequences")
    parser.add_argument("--width", type=int, default=256, help="channels D")
    parser.add_argument("--heads", type=int, default=8, help="heads of SDPA and of AFT-conv")
    parser.add_argument("--window", type=int, default=32, help="window size s of AFT-local and AFT-conv")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all tensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per length, if repeats do not end it before")
    parser.add_argument("--repeats", type=int, default=50, help="most turns of each contestant at a length")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"), help="folder of the csv file")
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least 1, got {value}"
        for name in ("batch_size", "width", "heads", "window", "repeats")
        if (value := getattr(args, name)) < 1
    ]
    problems += [f"--lengths must be at least 1, got {length}" for length in args.lengths if length < 1]
    if args.width % max(args.heads, 1):
        problems.append(f"--heads must divide --width {args.width}, got {args.heads}")
    if problems:
        raise ValueError("; ".join(problems))
    return args


def main(argv: list[str] | None = None) -> Path:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    path = args.output_dir / f"{args.suite}-{args.device}.csv"
    write_rows(path, run_suite(args))
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
