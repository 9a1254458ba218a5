# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Bits per byte of a causal language model on a range of bytes, by one of the protocols that `score.py` names."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F

from shared.byte_data import split_ranges


METRIC = Path(__file__).resolve().parent / "metrics" / "bits_per_byte" / "bits_per_byte.py"
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
