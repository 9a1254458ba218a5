# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The windows of text that a training step reads, as a pure function of the seed and the step."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np


class TrainingWindows:
    """
    The windows of the train split in training order. Each epoch cuts the split at a new offset into streams of
    `stream_length` inputs and as many labels (the next tokens), and visits them in a new order. A row of the batch
    reads one stream, a window of `length` at each step, and then the next: all rows begin one at the same steps.
    Everything is a pure function of the seed and the step, so there is no state to save, and any number of processes
    sees the same batch.

    Args:
        read (`Callable`): `read(start, stop)` returns the ids of tokens of the split.
        num_tokens (`int`): the size of the split.
        length (`int`): inputs per window.
        batch_size (`int`): windows per step, over all processes and micro-batches.
        seed (`int`): decides offsets and orders.
        stream_length (`int`, *optional*): inputs per stream, a multiple of `length`; a window is one by default.
        read_sizes (`Callable`, *optional*): the same for the bytes of text that each token stands for; 1 by default.

    Raises:
        ValueError: the train split is shorter than two streams.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        num_tokens: int,
        length: int,
        batch_size: int,
        seed: int,
        stream_length: int | None = None,
        read_sizes: Callable[[int, int], np.ndarray] | None = None,
    ):
        self.read, self.length, self.batch_size, self.seed = read, length, batch_size, seed
        self.read_sizes = read_sizes
        self.stream_length = stream_length or length
        self.steps_per_stream = self.stream_length // length
        # One stream less than fits, so that every offset below its length leaves the same number.
        self.streams_per_epoch = (num_tokens - 1) // self.stream_length - 1
        if self.streams_per_epoch < 1:
            name = "sequence_length" if stream_length is None else "stream_length"
            raise ValueError(
                f"--{name} must be at most {(num_tokens - 1) // 2}, as a train split of {num_tokens} tokens must hold "
                f"two and one more, got {self.stream_length}"
            )
        self.windows_per_epoch = self.streams_per_epoch * self.steps_per_stream
        self.labels_per_window = length
        # A batch touches two epochs at most, unless it is larger than an epoch.
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Where the streams of an epoch start, in the order of training: int64 [streams_per_epoch]."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        offset = generator.integers(self.stream_length)
        return offset + generator.permutation(self.streams_per_epoch) * self.stream_length

    def start(self, step: int, row: int) -> int:
        """Where the window of a row of the global batch of `step` starts."""
        stream, window = divmod(step, self.steps_per_stream)
        epoch, index = divmod(stream * self.batch_size + row, self.streams_per_epoch)
        return int(self.epoch_order(epoch)[index]) + window * self.length

    def begins(self, step: int) -> bool:
        """Whether the rows begin streams at this step, instead of going on in theirs."""
        return step % self.steps_per_stream == 0

    def batch(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step` (from 0).

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), length]; a label is the token after its input.
        """
        starts = [self.start(step, row) for row in rows]
        windows = np.stack([self.read(start, start + self.length + 1) for start in starts]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def sizes(self, step: int, rows: range) -> np.ndarray:
        """How many bytes of text the labels of these rows stand for, int64 [len(rows), length]."""
        if self.read_sizes is None:
            return np.ones((len(rows), self.length), dtype=np.int64)
        starts = [self.start(step, row) + 1 for row in rows]
        return np.stack([self.read_sizes(start, start + self.length) for start in starts]).astype(np.int64)
