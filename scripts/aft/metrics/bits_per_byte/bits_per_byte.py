# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Bits per byte, as a metric of the `evaluate` library."""

import math

import datasets
import evaluate


_DESCRIPTION = """\
Bits per byte: how many bits a language model needs on average to encode one byte, where every byte is scored once.
It is the sum of the negative log-likelihoods in nats, divided by ln 2 times the number of bytes scored.
"""

_KWARGS_DESCRIPTION = """
Args:
    nats (`list` of `float`): per segment, the sum of the negative log-likelihoods of its scored bytes, in nats.
    byte_counts (`list` of `int`): per segment, how many bytes were scored.
Returns:
    `dict` with `bits_per_byte` (`float`) and `bytes_scored` (`int`).
Raises:
    ValueError: a count is negative or no byte was scored.
Examples:
    >>> metric = evaluate.load("scripts/aft/metrics/bits_per_byte/bits_per_byte.py")
    >>> metric.compute(nats=[math.log(2), 3 * math.log(2)], byte_counts=[1, 1])
    {'bits_per_byte': 2.0, 'bytes_scored': 2}
"""


def bits_each(nats: list[float], counts: list[int], name: str) -> tuple[float, int]:
    """
    The bits of each of what was scored, and how many those are, in float64.

    Raises:
        ValueError: a count is negative or nothing was scored; begins with `name`, that of the counts.
    """
    total = sum(counts)
    if total == 0 or min(counts) < 0:
        raise ValueError(f"{name} must be counts with a positive sum, got a sum of {total}")
    return math.fsum(nats) / (math.log(2) * total), total


class BitsPerByte(evaluate.Metric):
    """Sums of nats and counts of bytes per segment, divided once at the end, in float64."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nats": datasets.Value("float64"), "byte_counts": datasets.Value("int64")}),
        )

    def _compute(self, nats, byte_counts):
        bits, total = bits_each(nats, byte_counts, "byte_counts")
        return {"bits_per_byte": bits, "bytes_scored": total}
