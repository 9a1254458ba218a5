# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which tokens of a text are hidden from a masked language model, and what stands in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


IGNORED = -100  # the label of a token that is not to be predicted
REPLACED_BY_MASK, REPLACED_BY_RANDOM = 0.8, 0.1  # shares of the hidden tokens in training (BERT); the others stay


@dataclass(frozen=True)
class Masking:
    """
    How the tokens of a window are hidden.

    Attributes:
        probability (`float`): which share of the tokens of a window is hidden, in (0, 1).
        unit (`str`): `token`, `word` for whole words, or `span` for spans whose lengths vary about a mean.
        mean_span_length (`float`, *optional*): the mean number of tokens of a span.
        mask (`int`): the id of the mask token.
        text_ids (`np.ndarray`): the ids that a hidden token is replaced by at random, int64 [N].
        word_starts (`Callable`): for ids [T], which of them begin a word, bool [T].
        never (`int`, *optional*): an id that is never hidden: that of the token between two documents.
    """

    probability: float
    unit: str
    mean_span_length: float | None
    mask: int
    text_ids: np.ndarray
    word_starts: Callable[[np.ndarray], np.ndarray]
    never: int | None = None

    def count(self, length: int) -> int:
        """How many of so many tokens are hidden: at least one."""
        return max(1, round(self.probability * length))

    def choose(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """
        Which tokens of a window are hidden, bool [T]: `count(T)` of them, or all that may be if they are fewer. Words
        come in random order, and the last that is chosen may be cut.
        """
        allowed = np.flatnonzero(ids != self.never) if self.never is not None else np.arange(len(ids))
        count = min(self.count(len(ids)), len(allowed))
        chosen = np.zeros(len(ids), dtype=bool)
        if self.unit == "span":
            chosen[allowed[spans(len(allowed), count, self.mean_span_length, generator)]] = True
            return chosen
        word = np.arange(len(ids)) if self.unit == "token" else np.cumsum(self.word_starts(ids))  # a number for each
        word = word[allowed]
        rank = generator.permutation(int(word.max(initial=0)) + 1)[word]
        chosen[allowed[np.argsort(rank, kind="stable")[:count]]] = True
        return chosen

    def hide(self, ids: np.ndarray, chosen: np.ndarray, generator: np.random.Generator | None = None) -> np.ndarray:
        """
        What the model reads of a window.

        Args:
            generator: decides which of the chosen tokens are replaced by the mask, by another token, or stay, as in
                training; without one, all are replaced by the mask.
        """
        hidden = ids.copy()
        if generator is None:
            hidden[chosen] = self.mask
            return hidden
        drawn = generator.random(len(ids))
        hidden[chosen & (drawn < REPLACED_BY_MASK)] = self.mask
        random = chosen & (drawn >= REPLACED_BY_MASK) & (drawn < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
        hidden[random] = generator.choice(self.text_ids, random.sum())
        return hidden


def number_of_spans(length: int, count: int, mean: float) -> int:
    """Into how many spans `count` of `length` tokens are put, with at least one token between two."""
    return min(max(round(count / mean), 1), count, length - count + 1)


def spans(length: int, count: int, mean: float, generator: np.random.Generator) -> np.ndarray:
    """
    Which of `length` tokens are in spans, bool [length]: `count` of them, in `number_of_spans` spans, each of a random
    length and at a random place, with at least one token between two.
    """
    if count == 0:
        return np.zeros(length, dtype=bool)
    left, number = length - count, number_of_spans(length, count, mean)
    cuts = np.sort(generator.permutation(count - 1)[: number - 1]) + 1
    sizes = np.diff(cuts, prepend=0, append=count)  # of the spans, at least 1
    # Of the tokens outside, one stands between two spans; the others are shared out among the places around them.
    free = left - (number - 1)
    bars = np.sort(generator.permutation(free + number)[:number])
    gaps = np.diff(bars, prepend=-1, append=free + number) - 1
    gaps[1:-1] += 1
    pattern = np.empty(2 * number + 1, dtype=np.int64)
    pattern[0::2], pattern[1::2] = gaps, sizes
    return np.repeat(np.arange(len(pattern)) % 2 == 1, pattern)


def make_masking(settings, vocabulary, separated: bool) -> Masking:
    """
    The masking for the tokens of a vocabulary.

    Args:
        settings: the flags, or a `Protocol`, with `mlm_probability`, `mask_unit` and `mean_span_length`.
        separated: whether the text has the token that ends a text between its documents.

    Raises:
        ValueError: the vocabulary has no mask token.
    """
    if vocabulary.mask is None:
        raise ValueError(f"{vocabulary.name}: must have a mask token for a masked language model")
    return Masking(
        settings.mlm_probability,
        settings.mask_unit,
        settings.mean_span_length,
        vocabulary.mask,
        vocabulary.text_ids,
        vocabulary.word_starts,
        vocabulary.end if separated else None,
    )


class MaskedWindows:
    """
    The windows of a masked language model: those of `windows`, of which a step hides other tokens each time it reads
    them. What is hidden is a pure function of the seed, the step and the row.

    Args:
        windows (`TrainingWindows` or `StreamedWindows`): the text.
        masking (`Masking`): what is hidden.
        seed (`int`): decides it.
    """

    def __init__(self, windows, masking: Masking, seed: int):
        self.windows, self.masking, self.seed = windows, masking, seed
        self.length, self.windows_per_epoch = windows.length, windows.windows_per_epoch
        self.labels_per_window = masking.count(windows.length)
        # A step asks for its batch and for the sizes of its labels: it is hidden once.
        self.batch = lru_cache(maxsize=1)(self.batch)

    def batch(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step` (from 0).

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), length]; a label is what stood at its place, if that is
            hidden, else -100.
        """
        _, text = self.windows.batch(step, rows)  # the labels, as it is their bytes that the windows count
        inputs, labels = text.copy(), np.full_like(text, IGNORED)
        for row, ids, hidden, label in zip(rows, text, inputs, labels, strict=True):
            generator = np.random.default_rng([self.seed, step, row])
            chosen = self.masking.choose(ids, generator)
            label[chosen] = ids[chosen]
            hidden[:] = self.masking.hide(ids, chosen, generator)
        return inputs, labels

    def sizes(self, step: int, rows: range) -> np.ndarray:
        """How many bytes of text the labels of these rows stand for, int64 [len(rows), length]; 0 for none."""
        _, labels = self.batch(step, rows)
        return np.where(labels == IGNORED, 0, self.windows.sizes(step, rows))
