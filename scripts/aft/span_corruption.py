# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Span corruption, the objective that T5 is pre-trained by (arXiv 1910.10683): the decoder says what was taken out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from aft.masking import number_of_spans, spans


SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))  # the names and the number that T5 has


@dataclass(frozen=True)
class SpanCorruption:
    """
    How a window of tokens becomes a source and a target. In the source a sentinel takes the place of each span; the
    target has each sentinel, followed by the tokens of its span. Both end with the token that ends texts.

    Attributes:
        noise_density (`float`): which share of the tokens is in spans, in (0, 1).
        mean_span_length (`float`): the mean number of tokens of a span, at least 1.
        sentinels (`Sequence[int]`): the ids of the sentinels, in the order of their use.
        end (`int`): the id of the token that ends texts.
    """

    noise_density: float
    mean_span_length: float
    sentinels: Sequence[int]
    end: int

    def count(self, length: int) -> int:
        """How many of so many tokens are in spans: at least one."""
        return max(1, round(self.noise_density * length))

    def number(self, length: int) -> int:
        """How many spans so many tokens have."""
        return number_of_spans(length, self.count(length), self.mean_span_length)

    def sizes(self, length: int) -> tuple[int, int]:
        """How many tokens source and target of so many tokens have, which is the same for all texts."""
        count, number = self.count(length), self.number(length)
        return length - count + number + 1, count + number + 1

    def raw_length(self, limit: int) -> int:
        """The largest number of tokens whose source has at most `limit`: exactly so, unless nearly all are noise."""
        length = 1
        while self.sizes(length + 1)[0] <= limit:
            length += 1
        return length

    def corrupt(self, ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Source and target of tokens.

        Args:
            ids: int64 [T].
            generator: decides which are in spans.
        """
        inside = spans(len(ids), self.count(len(ids)), self.mean_span_length, generator)
        first = inside & ~np.concatenate([[False], inside[:-1]])
        sentinels = np.asarray(self.sentinels[: first.sum()], dtype=np.int64)
        source = ids.copy()
        source[first] = sentinels
        target = np.insert(ids[inside], np.flatnonzero(first[inside]), sentinels)
        return np.append(source[first | ~inside], self.end), np.append(target, self.end)


class CorruptedText(Dataset):
    """
    A text, cut into windows that do not overlap, each corrupted as a function of seed, epoch and its number.

    Args:
        ids (`np.ndarray`): of the tokens, integers [N].
        length (`int`): of a window; the last may be shorter.
        seed (`int`): of all spans.

    Attributes:
        num_tokens (`int`): of all sources and targets.

    Raises:
        ValueError: there are not as many sentinels as spans.
    """

    def __init__(self, ids: np.ndarray, corruption: SpanCorruption, length: int, seed: int):
        if corruption.number(length) > len(corruption.sentinels):
            raise ValueError(
                f"--mean_span_length must be so long that {length} tokens have at most {len(corruption.sentinels)} "
                f"spans, one for each sentinel, got {corruption.mean_span_length}: {corruption.number(length)} spans"
            )
        self.ids, self.corruption, self.length, self.seed = ids, corruption, length, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with workers that outlive an epoch
        whole, rest = divmod(len(ids), length)
        self.num_tokens = whole * sum(corruption.sizes(length)) + (sum(corruption.sizes(rest)) if rest else 0)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.length)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.ids[index * self.length : (index + 1) * self.length].astype(np.int64)
        generator = np.random.default_rng((self.seed, int(self.epoch), index))
        source, target = self.corruption.corrupt(window, generator)
        return {"input_ids": source.tolist(), "attention_mask": [1] * len(source), "labels": target.tolist()}
