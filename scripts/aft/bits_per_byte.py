# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Bits per byte of a language model on a range of tokens, by one of the protocols of `aft evaluate`."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from aft.masking import Masking
from aft.protocols import Protocol, Window
from aft.token_data import TokenData


METRIC = Path(__file__).resolve().parent / "metrics" / "bits_per_byte" / "bits_per_byte.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # by the name that accelerate uses
BUCKETS = 63  # of positions, one for each power of two


@cache
def load_metric(path: Path = METRIC, cache_dir: str | None = None) -> evaluate.Metric:
    """A metric in a file. `evaluate` copies it to its own folder, and so may fail: load it before any training."""
    return evaluate.load(str(path), keep_in_memory=True, cache_dir=cache_dir)


def batches(
    protocol: Protocol, start: int, stop: int, rows: int, process: int, num_processes: int
) -> Iterator[tuple[list[Window], int]]:
    """
    The batches of one process, each of `rows` windows, and the tokens of the longest that any process reads meanwhile:
    all of them must call a sharded model equally often. What is missing is filled up with empty windows.
    """
    windows, count = list(protocol.windows(start, stop)), rows * num_processes
    windows += [Window(start, start, start, start)] * (-len(windows) % count)
    for index in range(0, len(windows), count):
        group = windows[index : index + count]
        yield group[process * rows : (process + 1) * rows], max(window.end - window.first for window in group)


def load_batch(data: TokenData, batch: list[Window], offset: int, length: int):
    """
    The part of `length` tokens of each window that begins `offset` tokens after its first. What a window does not have
    is filled up at its right, where a causal model cannot see it.

    Returns:
        Inputs, labels, the positions of the labels (0 where one is not scored), and how many bytes each label stands
        for, int64 [rows, length].
    """
    text = np.zeros((len(batch), length + 1), dtype=np.int64)
    positions, sizes = np.zeros((2, len(batch), length), dtype=np.int64)
    for row, window in enumerate(batch):
        first, end = window.first + offset, min(window.first + offset + length, window.end)
        if end > first:
            text[row, : end - first + 1] = data.read(first - 1, end)
            sizes[row, : end - first] = data.read_sizes(first, end)
            labels = np.arange(first, end)
            positions[row, : end - first] = np.where(labels < window.scored, 0, labels - window.origin + 1)
    return tuple(map(torch.from_numpy, (text[:, :-1], text[:, 1:], positions, sizes)))


def hide_batch(batch: list[Window], labels: torch.Tensor, positions: torch.Tensor, masking: Masking):
    """
    What a masked language model reads of windows, and which of their labels are scored: what is hidden, which is
    always the same.

    Args:
        labels, positions (`LongTensor` [rows, length]): as `load_batch` returns them.

    Returns:
        Inputs, positions (0 where nothing is hidden) and attention mask, int64 [rows, length].
    """
    inputs, positions, keep = labels.clone(), positions.clone(), torch.zeros_like(labels)
    for row, window in enumerate(batch):
        count = window.end - window.first
        ids = labels[row, :count].numpy()
        chosen = masking.choose(ids, np.random.default_rng([window.first, count]))
        inputs[row, :count] = torch.from_numpy(masking.hide(ids, chosen))
        positions[row, :count] *= torch.from_numpy(chosen)
        keep[row, : max(count, 1)] = 1  # an empty window, too, has something to see
    return inputs, positions, keep


@torch.no_grad()
def evaluate_bits_per_byte(
    model,
    data: TokenData,
    accelerator,
    start: int,
    stop: int,
    protocol: Protocol,
    batch_size: int,
    masking: Masking | None = None,
) -> dict:
    """
    Scores the tokens [start, stop); every process of `accelerator` scores its part and gets the whole result, which
    does not depend on their number, nor on `batch_size`.

    Args:
        model: a language model, prepared by `accelerator`. Its logits at an input predict the next token, or by the
            protocol `masked` the token there.
        data (`TokenData`): the text.
        start, stop (`int`): the tokens to score; `start` must be at least 1, because the one before is the context.
        protocol (`Protocol`): which windows are read.
        batch_size (`int`): windows per process that are read at once; if there are fewer, all.
        masking (`Masking`, *optional*): of the protocol `masked`: what is hidden, and so scored.

    Returns:
        `dict`: `bits_per_byte`, `bytes_scored`, `tokens_scored` and `perplexity` (of a token) unless tokens are bytes,
        what names the protocol, `dtype`, and `by_position`: a `dict` with `first`, `last`, `bits_per_byte` and
        `bytes_scored` for each range of positions from one power of two to the next, if it has bytes. The position of
        a token is its number in its window, or of `refreshed` in the stream, from 1 on.

    Raises:
        ValueError: the range is empty or begins at token 0.
        FloatingPointError: the score is NaN or infinite.
    """
    if not 1 <= start < stop:
        raise ValueError(f"the tokens to score must be a range that begins at 1 or later, got [{start}, {stop})")
    with accelerator.local_main_process_first():
        metric = load_metric()
    count = sum(1 for _ in protocol.windows(start, stop))
    rows = min(batch_size, -(-count // accelerator.num_processes))
    was_training = model.training
    model.eval()
    nats, counts, tokens = torch.zeros(3, BUCKETS, dtype=torch.float64)
    for batch, longest in batches(protocol, start, stop, rows, accelerator.process_index, accelerator.num_processes):
        state = {}
        for offset in range(0, longest, protocol.length):
            part = load_batch(data, batch, offset, min(protocol.length, longest - offset))
            inputs, labels, positions, sizes = part
            options = {"use_cache": longest > protocol.length, **state}
            if masking is not None:
                inputs, positions, keep = hide_batch(batch, labels, positions, masking)
                options = {"attention_mask": keep.to(accelerator.device)}
            inputs, labels, positions = (tensor.to(accelerator.device) for tensor in (inputs, labels, positions))
            outputs = model(input_ids=inputs, **options)
            if longest > protocol.length:  # by the name that this release of transformers gives it
                name = "cache" if hasattr(outputs, "cache") else "past_key_values"
                state = {name: getattr(outputs, name)}
            losses = F.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            is_scored = positions.flatten() > 0
            losses, positions = losses[is_scored].cpu().double(), positions.flatten()[is_scored].cpu()
            buckets = torch.frexp(positions.double()).exponent - 1  # position p is in bucket floor(log2(p))
            nats.index_add_(0, buckets, losses)
            counts.index_add_(0, buckets, sizes.flatten()[is_scored].cpu().double())
            tokens.index_add_(0, buckets, torch.ones_like(losses))
    model.train(was_training)
    sums = gather_object([torch.stack([nats, counts, tokens]).tolist()])  # of each process
    nats, counts, tokens = torch.tensor(sums, dtype=torch.float64).sum(0).tolist()
    if protocol.first_bits is not None:
        nats[0], counts[0] = nats[0] + count * protocol.first_bits * math.log(2), counts[0] + count
    result = metric.compute(nats=nats, byte_counts=[int(number) for number in counts])
    if not math.isfinite(result["bits_per_byte"]):
        raise FloatingPointError(f"the score is {result['bits_per_byte']} bits per byte")
    if data.sizes is not None:
        result |= {"tokens_scored": int(sum(tokens)), "perplexity": math.exp(min(math.fsum(nats) / sum(tokens), 700))}
    dtype = DTYPES.get(accelerator.mixed_precision, str(next(model.parameters()).dtype).removeprefix("torch."))
    by_position = [
        {
            "first": 2**bucket,
            "last": 2 ** (bucket + 1) - 1,
            "bits_per_byte": total / math.log(2) / number,
            "bytes_scored": int(number),
        }
        for bucket, (total, number) in enumerate(zip(nats, counts, strict=True))
        if number
    ]
    return {**result, **protocol.describe(start, stop), "dtype": dtype, "by_position": by_position}


def evaluate_split(
    model,
    data: TokenData,
    split: str,
    accelerator,
    protocol: Protocol,
    batch_size: int,
    max_bytes: int = 0,
    masking: Masking | None = None,
) -> dict:
    """
    Scores a split, or if it is longer its first `max_bytes` bytes, 0 for all; the other arguments and the result as
    in `evaluate_bits_per_byte`.
    """
    start, stop = data.first_bytes(split, max_bytes)
    start = max(start, 1)  # nothing stands before the first token
    return evaluate_bits_per_byte(model, data, accelerator, start, stop, protocol, batch_size, masking)
