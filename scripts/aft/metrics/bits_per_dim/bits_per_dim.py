# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Bits per dimension, as a metric of the `evaluate` library."""

import datasets
import evaluate

from aft.metrics.bits_per_byte import bits_per_byte


_DESCRIPTION = """\
Bits per dimension: how many bits a model of pictures needs on average to encode one sub-pixel, where every sub-pixel
is scored once, the first too. It is the sum of the negative log-likelihoods in nats, divided by ln 2 times the number
of sub-pixels scored: of pictures of one size, the mean over the pictures.
"""

_KWARGS_DESCRIPTION = """
Args:
    nats (`list` of `float`): per picture, the sum of the negative log-likelihoods of its sub-pixels, in nats.
    subpixel_counts (`list` of `int`): per picture, how many sub-pixels were scored.
Returns:
    `dict` with `bits_per_dim` (`float`) and `subpixels_scored` (`int`).
Raises:
    ValueError: a count is negative or no sub-pixel was scored.
Examples:
    >>> metric = evaluate.load("scripts/aft/metrics/bits_per_dim/bits_per_dim.py")
    >>> metric.compute(nats=[math.log(2), 3 * math.log(2)], subpixel_counts=[1, 1])
    {'bits_per_dim': 2.0, 'subpixels_scored': 2}
"""


class BitsPerDim(evaluate.Metric):
    """Sums of nats and counts of sub-pixels per picture, divided once at the end, in float64."""

    def _info(self):
        features = {"nats": datasets.Value("float64"), "subpixel_counts": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(self, nats, subpixel_counts):
        bits, total = bits_per_byte.bits_each(nats, subpixel_counts, "subpixel_counts")
        return {"bits_per_dim": bits, "subpixels_scored": total}
