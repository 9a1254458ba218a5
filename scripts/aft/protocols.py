# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The protocols of `aft evaluate`: which windows of a text are read, and which tokens of each are scored."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple


CAUSAL = ("segments", "sliding", "carried", "refreshed")  # of a model that predicts the next token
PROTOCOLS = (*CAUSAL, "masked", "pictures")
# Of the file for the scores by position, a row for each range from `first` to `last`.
POSITION_COLUMNS = ("model", "split", "protocol", "first", "last", "bits_per_byte", "bytes_scored")
FIELDS_OF = {  # what belongs to one protocol alone
    "stride": "sliding",
    "stream_length": "carried",
    "refresh_every": "refreshed",
    "refresh_overlap": "refreshed",
    "first_bits": "pictures",
}
OPTIONAL = ("stream_length", "first_bits")  # those that their protocol may leave out


def unit_of(protocol: str) -> tuple[str, str]:
    """What the scores of a protocol are called, and what they are of."""
    return ("bits per dimension", "sub-pixels") if protocol == "pictures" else ("bits per byte", "bytes")


class Window(NamedTuple):
    """
    Tokens that a model reads from an empty state; one that is predicted is a label.

    Attributes:
        first: first label. The inputs are one token earlier.
        scored: first label that is scored; those before it are context.
        end: end of the labels.
        origin: where the positions of the labels are counted from: the first label of the window or of its stream.
    """

    first: int
    scored: int
    end: int
    origin: int


@dataclass(frozen=True)
class Protocol:
    """
    How tokens are scored, which may be bytes. What belongs to another protocol is None.

    Attributes:
        protocol (`str`): one of PROTOCOLS.
        length (`int`): T, tokens of a window of `segments`, `sliding` and `masked`, and sub-pixels of a picture of
            `pictures`. Of the others, how many are read at once, which changes no score.
        stride (`int`, *optional*): S of `sliding`, in tokens.
        stream_length (`int`, *optional*): L of `carried`, tokens of a stream; None for the whole range.
        refresh_every, refresh_overlap (`int`, *optional*): R and O of `refreshed`: how many are read between one
            start and the next, and how many of them had been read before.
        first_bits (`float`, *optional*): of `pictures`: what is charged for the first sub-pixel of a picture, where no
            start token stands before it from which it could be predicted.
        mlm_probability, mask_unit, mean_span_length (*optional*): of `masked`, as `Masking` has them.
    """

    protocol: str
    length: int
    stride: int | None = None
    stream_length: int | None = None
    refresh_every: int | None = None
    refresh_overlap: int | None = None
    first_bits: float | None = None
    mlm_probability: float | None = None
    mask_unit: str | None = None
    mean_span_length: float | None = None

    def problems(self, limit: int | None, prefix: str = "--") -> list[str]:
        """
        What is wrong with it, in the names of flags that begin with `prefix`; `masking_problems` has those of what is
        hidden.

        Args:
            limit: where the position tables of the model end, in tokens; None if it has none.
        """
        found = []

        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                found.append(f"{prefix}{name} must be {allowed}, got {getattr(self, name)}")

        for name, protocol in FIELDS_OF.items():
            value = getattr(self, name)
            if protocol != self.protocol:
                check(value is None, name, f"left out without {prefix}protocol {protocol}")
            elif name not in OPTIONAL:
                check(value is not None, name, f"given with {prefix}protocol {protocol}")
            check(value is None or value >= 1, name, "at least 1")
        if found:
            return found
        within = f"at most max_position_embeddings ({limit}), where the position tables of the model end"
        if self.protocol == "sliding":
            check(self.stride <= self.length, "stride", f"at most T ({self.length})")
        elif self.protocol == "carried" and limit is not None:
            check(self.stream_length is not None and self.stream_length <= limit, "stream_length", within)
        elif self.protocol == "refreshed":
            check(self.refresh_overlap < self.refresh_every, "refresh_overlap", f"less than R ({self.refresh_every})")
            check(limit is None or self.refresh_every <= limit, "refresh_every", within)
        return found

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """
        The windows over the labels [start, stop), in order; each label is scored in one of them. Between two pictures
        stands a token that is none: the start token, or a first sub-pixel without one.
        """
        if self.protocol == "pictures":
            size, first_position = (self.length, 0) if self.first_bits is None else (self.length - 1, 1)
            for first in range(start, stop, size + 1):
                yield Window(first, first, first + size, first - first_position)
            return
        whole = stop - start
        size = {"carried": self.stream_length or whole, "refreshed": self.refresh_every}.get(
            self.protocol, self.length
        )
        overlap = {"sliding": self.length - (self.stride or 0), "refreshed": self.refresh_overlap}.get(
            self.protocol, 0
        )
        scored = start
        while scored < stop:
            first = max(scored - overlap, start)
            end = min(first + size, stop)
            if self.protocol == "sliding":
                first = max(end - size, start)  # the last window, too, is whole
            yield Window(first, scored, end, start if self.protocol == "refreshed" else first)
            scored = end

    def describe(self, start: int, stop: int) -> dict:
        """What names it beside a score of the labels [start, stop); a stream is no longer than they are."""
        name = {key: value for key, value in asdict(self).items() if value is not None}
        if self.protocol == "carried":
            name["stream_length"] = min(self.stream_length or stop - start, stop - start)
        return name
