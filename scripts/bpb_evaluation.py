# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Bits per byte of a causal language model on a range of bytes, by a named protocol. Every byte is scored once.

    python scripts/bpb_evaluation.py runs/tiny --split test --protocol segments --length 256
    python scripts/bpb_evaluation.py runs/tiny --dataset_path FILE --protocol sliding --length 256 --stride 64

- `segments`: independent windows of T bytes, side by side. The first byte of a window is predicted from the one byte
  before it, the last from T bytes.
- `sliding`: windows of T bytes at stride S. The first is scored whole, of the others only the last S bytes, so that
  each of them is predicted from T - S + 1 bytes or more.
- `carried`: the range is cut into one contiguous stream per row of the batch and process; a stream is read in segments
  of T bytes, and the recurrent state is carried from one to the next. So --batch_size sets how long a stream is, and
  changes the score: the fewer streams, the more context. With --batch_size 1 on one process there is a single one.

The byte before the range is context and is not scored, so only the very first byte of a file is never scored.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from shared.byte_data import file_bytes, pydoc_bytes, split_ranges
from shared.console import any_text, run_program
from shared.pretraining_arguments import CHOICES, has_length_limit
from shared.run_log import describe_protocol
from shared.saved_models import TRUST_HELP, load_config, load_model


METRIC = Path(__file__).resolve().parent / "shared" / "metrics" / "bits_per_byte" / "bits_per_byte.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # by the name that accelerate uses


@cache
def load_metric(path: Path = METRIC, cache_dir: str | None = None) -> evaluate.Metric:
    """A metric in a file. `evaluate` copies it to its own folder, and so may fail: load it before any training."""
    return evaluate.load(str(path), keep_in_memory=True, cache_dir=cache_dir)


def windows(protocol: str, start: int, stop: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """
    The windows of the protocols `segments` and `sliding` over the labels [start, stop).

    Yields:
        `tuple`: first label, first scored label, and end of the labels of a window; the inputs are one byte earlier.
    """
    if protocol == "segments":
        for first in range(start, stop, length):
            yield first, first, min(first + length, stop)
        return
    end = min(start + length, stop)
    yield start, start, end
    while end < stop:
        scored, end = end, min(end + stride, stop)
        yield end - length, scored, end


def streams(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """`count` contiguous ranges that cover [start, stop), of sizes that differ by one at most."""
    borders = [start + (stop - start) * i // count for i in range(count + 1)]
    return list(zip(borders, borders[1:], strict=False))


def batches(
    protocol: str, start: int, stop: int, length: int, stride: int, rows: int, process: int, num_processes: int
) -> Iterator[list[tuple[int, int, int]]]:
    """
    The batches of one process, each with `rows` windows. All processes get the same number of batches, as a sharded
    model needs; what is missing is filled up with empty windows. For `carried`, batch i + 1 continues batch i.
    """
    if protocol == "carried":
        ranges = streams(start, stop, rows * num_processes)[process * rows : (process + 1) * rows]
        longest = -(-(stop - start) // (rows * num_processes))
        for offset in range(0, longest, length):
            firsts = [(min(first + offset, end), min(first + offset + length, end)) for first, end in ranges]
            yield [(first, first, end) for first, end in firsts]
        return
    everything = list(windows(protocol, start, stop, length, stride))
    everything += [(start, start, start)] * (-len(everything) % (rows * num_processes))
    for index in range(process * rows, len(everything), rows * num_processes):
        yield everything[index : index + rows]


def load_batch(read: Callable[[int, int], np.ndarray], batch: list[tuple[int, int, int]], length: int):
    """
    Inputs and labels, int64 [rows, length], and which labels are scored, bool [rows, length]. A window that is
    shorter than `length` is filled up at its right, where a causal model cannot see it.
    """
    text = np.zeros((len(batch), length + 1), dtype=np.int64)
    scored = np.zeros((len(batch), length), dtype=bool)
    for row, (first, first_scored, end) in enumerate(batch):
        if end > first:
            text[row, : end - first + 1] = read(first - 1, end)
        scored[row, first_scored - first : end - first] = True
    return torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:]), torch.from_numpy(scored)


@torch.no_grad()
def evaluate_bits_per_byte(
    model, read, accelerator, start: int, stop: int, *, protocol: str, length: int, stride: int, batch_size: int
) -> dict:
    """
    Scores the bytes [start, stop); every process of `accelerator` scores its part and gets the whole result.

    Args:
        model: a causal language model whose logits at an input predict the next byte; prepared by `accelerator`.
        read (`Callable`): `read(start, stop)` returns bytes of the file as uint8.
        start, stop (`int`): the bytes to score; `start` must be at least 1, because the byte before is the context.
        protocol (`str`): `segments`, `sliding` or `carried`.
        length, stride (`int`): T and S in bytes; only `sliding` reads the stride.
        batch_size (`int`): windows per process in one forward, or streams of `carried`; if there are fewer, all.

    Returns:
        `dict`: `bits_per_byte`, `bytes_scored`, and what names the protocol; of `carried`, also the number of streams
        and the bytes in each (of the longest: they differ by one).

    Raises:
        ValueError: the range is empty or begins at byte 0.
        FloatingPointError: the score is NaN or infinite.
    """
    if not 1 <= start < stop:
        raise ValueError(f"the bytes to score must be a range that begins at 1 or later, got [{start}, {stop})")
    with accelerator.local_main_process_first():
        metric = load_metric()
    carried, processes = protocol == "carried", accelerator.num_processes
    count = stop - start if carried else sum(1 for _ in windows(protocol, start, stop, length, stride))
    rows = min(batch_size, -(-count // processes))
    stream = -(-(stop - start) // (rows * processes))  # bytes of the longest one
    width = min(length, stream if carried else stop - start)  # of the tensors: no window is longer
    was_training = model.training
    model.eval()
    nats, counts, state = [], [], {}
    for batch in batches(protocol, start, stop, length, stride, rows, accelerator.process_index, processes):
        inputs, labels, scored = (tensor.to(accelerator.device) for tensor in load_batch(read, batch, width))
        if carried:
            outputs = model(input_ids=inputs, use_cache=True, **state)
            # By the name that this release of transformers gives it.
            name = "cache" if hasattr(outputs, "cache") else "past_key_values"
            state = {name: getattr(outputs, name)}
        else:
            outputs = model(input_ids=inputs, use_cache=False)
        losses = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        nats.append(losses.view_as(labels).masked_fill(~scored, 0.0).sum(dim=1))  # [rows]
        counts.append(scored.sum(dim=1))
    model.train(was_training)
    nats, counts = accelerator.gather((torch.cat(nats), torch.cat(counts)))
    result = metric.compute(nats=nats.tolist(), byte_counts=counts.tolist())
    if not math.isfinite(result["bits_per_byte"]):
        raise FloatingPointError(f"the score is {result['bits_per_byte']} bits per byte")
    name = {"protocol": protocol, "length": length}
    if protocol == "sliding":
        name["stride"] = stride
    if carried:
        name |= {"streams": rows * processes, "bytes_per_stream": stream}
    dtype = DTYPES.get(accelerator.mixed_precision, str(next(model.parameters()).dtype).removeprefix("torch."))
    return {**result, **name, "dtype": dtype}


def evaluate_split(model, content: bytes, split: str, accelerator, **protocol) -> dict:
    """Scores a split of a file's content; `protocol` and the result are those of `evaluate_bits_per_byte`."""
    text = np.frombuffer(content, np.uint8)
    start, stop = split_ranges(len(content))[split]
    start = max(start, 1)  # nothing stands before the first byte of a file
    return evaluate_bits_per_byte(model, lambda first, end: text[first:end], accelerator, start, stop, **protocol)


def check_protocol(config, protocol: str, length: int | None, stride: int | None) -> tuple[int, int]:
    """
    T and S of a protocol for a model: `max_position_embeddings` and half of T where they are None.

    Raises:
        ValueError: the model has no such length, its position tables end before the protocol does, or the protocol
            has no stride.
    """
    limit = getattr(config, "max_position_embeddings", None)
    length = length or limit
    if length is None:
        raise ValueError("--length must be given: the model has no max_position_embeddings")
    if has_length_limit(config):
        if length > limit:
            raise ValueError(f"--length must be at most max_position_embeddings ({limit}), got {length}")
        if protocol == "carried":
            raise ValueError("--protocol must be segments or sliding, got 'carried': the model's position tables end")
    if stride is not None and protocol != "sliding":
        raise ValueError(f"--stride must be left out without --protocol sliding, got {stride}")
    stride = stride or max(length // 2, 1)
    if stride > length:
        raise ValueError(f"--stride must be at most --length ({length}), got {stride}")
    return length, stride


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or a name on the Hub")
    parser.add_argument("--dataset_path", type=Path, help="file of bytes; Python's documentation when left out")
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument("--protocol", default="segments", help="segments (default), sliding or carried")
    parser.add_argument("--length", type=int, help="T in bytes (default: max_position_embeddings)")
    parser.add_argument("--stride", type=int, help="S of the sliding protocol (default: half of T)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="windows at once; of carried, streams of each process, which changes the score (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", help="auto (what config.json says; default) or one like float32")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least 1, got {getattr(args, name)}"
        for name in ("length", "stride", "batch_size")
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    problems += [
        f"--{name} must be one of {', '.join(choices)}, got {getattr(args, name)!r}"
        for name, choices in (
            ("split", ("train", "valid", "test")),
            ("protocol", CHOICES["eval_protocol"]),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        )
        if getattr(args, name) not in choices
    ]
    if problems:
        raise ValueError("bpb_evaluation.py: " + "; ".join(problems))
    return args


@any_text()
def main(argv: list[str] | None = None) -> dict:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the result.

    Raises:
        ValueError: a flag is wrong, or does not fit the model, or the model is not one of bytes, whole and finite.
        FloatingPointError: the score is NaN or infinite.
    """
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    content = pydoc_bytes() if args.dataset_path is None else file_bytes(args.dataset_path)
    trust = {"trust_remote_code": args.trust_remote_code}
    length, stride = check_protocol(load_config(args.model, **trust), args.protocol, args.length, args.stride)
    accelerator = Accelerator()
    model, _ = load_model(AutoModelForCausalLM, args.model, dtype=args.dtype, **trust)
    result = evaluate_split(
        accelerator.prepare(model),
        content,
        args.split,
        accelerator,
        protocol=args.protocol,
        length=length,
        stride=stride,
        batch_size=args.batch_size,
    )
    streams = f"; {result['bytes_per_stream']} bytes per stream" if "streams" in result else ""
    score = f"{result['bits_per_byte']:.4f} bits per byte"
    accelerator.print(f"{args.split}: {score} ({describe_protocol(result)}){streams}")
    return result


if __name__ == "__main__":
    run_program(main)
