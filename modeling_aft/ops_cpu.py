# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-simple, -local and -conv on the CPU: one operator that goes over time in blocks small enough for the cache.

The work of a block is a few passes over its keys and values and one product of matrices per chunk of queries: the
weights exp(w) of the keys in reach times [exp(k), exp(k) v], added to the sum of all older keys, which is carried from
block to block. The gradient is the same product with time reversed: each key sums up over the queries that see it.
Nothing but the results is longer than a block.

With a decay the columns of a chunk count as they are at its middle, so that none is far from 1: what remains to each
query is a factor that all its keys share, and no mean depends on it. From a chunk to the next they fall by `fall`.

Exponentials are taken as they are; where keys or biases are large, relative to references that change no mean: one for
each sequence and key channel, and one for each query (`_Plan.refer`). `_Bounds` tells where that loses nothing, which
is everywhere but for inputs of extreme size, as where the keys of a sequence jump up by 80; those go the way of
ops_chunks.py, which is exact for all.

Shapes: h heads of the bias, each of k = K / h key channels and k x r value channels, w = k + k r columns of a product.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_chunks import windowed_chunks
from .ops_operators import differentiable_gradients, flops_of, gradients_inside_operator, operator
from .ops_state import DERIVATIVES, QUERY_ACTIVATIONS, decayed, largest, moment
from .ops_windows import Window


_CHUNK = 32  # queries per product of matrices, where the window is not longer
_ROWS = 1024  # queries per block
_LARGEST_EXPONENT = 15.0  # of a key, and of a bias, without references or relative to them
_LARGEST_SUM = 80.0  # log of the largest sum that a product of matrices may come to, in float32
_SMALLEST_TOTAL = 1e-20  # exact to rounding: of each factor what is below 1e-38 is lost, times at most exp(15)


class _Plan:
    """
    Sizes, the blocks, and the layout of the products of matrices.

    Attributes, each None without a decay:
        shift: [rows of a block + reach, h, k], what is added to the keys of a block, those of the `reach` tokens
            before it in front: they are as in the middle of the queries of their panel. A row that is in two panels is
            as in the first, and falls in the second.
        first_shift: [h, k], the same of the sum of the keys before the first, which is that right before it.
        fall: [h, 1, w], the factor of columns from a chunk to the next; None for a single one.

    With a decay, `overlap` says whether there are rows in two panels.

    Set by `refer`, and None without references:
        key_reference: [B, h, k], what is subtracted from the keys.
        older: [h, 1 or B, 1 or T], the weight of the keys older than the window, else 1.
    """

    def __init__(self, key: Tensor, value: Tensor, rows: Tensor, decay: Tensor | None):
        self.batch, self.length = value.shape[:2]
        self.heads, row_batch, steps, self.taps = rows.shape
        self.reach = self.taps - 1
        self.key_width = key.shape[2] // self.heads
        self.ratio = value.shape[2] // key.shape[2]
        self.width = self.key_width * (1 + self.ratio)
        self.chunk = min(max(_CHUNK, self.taps), self.length)
        self.padded_length = -(-self.length // self.chunk) * self.chunk
        self.shared = row_batch == 1 and steps == 1  # one matrix of weights for all chunks
        self.per_row = row_batch > 1  # matrices for each row of the batch
        self.by_head = self.shared and self.heads > 1
        self.shift = self.first_shift = self.fall = None
        self.key_reference = self.older = None
        self.overlap = False
        if decay is not None:
            self.add_decay(self.keys(decay))

    def add_decay(self, decay: Tensor) -> None:
        """decay [h, k]"""
        row = torch.arange(min(max(_ROWS, self.chunk), self.padded_length) + self.reach)
        origin = self.reach + self.chunk / 2
        if self.padded_length > self.chunk:
            row = row % self.chunk
            columns = torch.cat([decay, decay.repeat_interleave(self.ratio, 1)], 1)
            self.fall = columns.mul(-self.chunk).exp()[:, None]
            self.overlap = self.reach > 0
        if self.overlap:
            origin -= self.chunk
        self.shift = (row - origin)[:, None, None] * decay
        self.first_shift = (self.reach - 1 - origin) * decay

    def refer(self, key: Tensor, rows: Tensor, maximum: Tensor) -> Tensor:
        """The rows of the bias relative to the references of the queries, -inf where there is no key. The references
        make exp(15) of the largest key of each sequence and channel, and of the largest weight of a query, unless that
        is between exp(-15) and exp(15) already."""
        self.key_reference = self.keys(_without_infinity(_largest_keys(key, maximum)) - _LARGEST_EXPONENT)
        rows = rows.clone()
        rows[..., self.length :] = -math.inf
        if not self.shared:
            first = rows[:, :, : self.reach]
            step, tap = torch.arange(first.shape[2])[:, None], torch.arange(self.taps)
            first.masked_fill_(tap > step, -math.inf)
        heaviest = _without_infinity(rows.amax(-1))
        reference = (heaviest - _LARGEST_EXPONENT).clamp(min=0)
        self.older = reference.neg().exp()
        if not self.shared and maximum.isneginf().all():  # nothing is older than the window of the first queries
            reference[..., : self.taps] += (heaviest + _LARGEST_EXPONENT).clamp(max=0)[..., : self.taps]
        return rows.sub_(reference[..., None])

    def older_of(self, start: int, count: int, batch: slice) -> Tensor:
        """`older` of the queries from `start` on as a factor of columns, [1 or b, 1 or count, h, 1]."""
        older = self.older if self.shared else self.older[:, :, start : start + count]
        if not self.shared:
            older = F.pad(older, (0, count - older.shape[2]), value=1.0)
        return (older[:, batch] if self.per_row else older).permute(1, 2, 0)[..., None]

    def blocks(self):
        """Slices of time (of whole chunks: the last may end beyond the text), each with slices of the batch."""
        chunks = self.padded_length // self.chunk
        per_block = max(1, min(chunks, _ROWS // self.chunk))
        group = max(1, _ROWS // (per_block * self.chunk))
        for first in range(0, chunks, per_block):
            time = slice(first * self.chunk, min(first + per_block, chunks) * self.chunk)
            yield time, [slice(b, min(b + group, self.batch)) for b in range(0, self.batch, group)]

    def keys(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, self.key_width))

    def values(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, self.key_width, self.ratio))

    def means(self, sums: Tensor) -> Tensor:
        """[.., D] from the sums [.., h, w] of the weights and of the weighted values."""
        denominator, numerator = self.parts(sums)
        return (numerator / denominator[..., None]).flatten(-3)

    def parts(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The columns [.., h, w] that belong to keys, [.., h, k], and to values, [.., h, k, r]."""
        own, rest = columns[..., : self.key_width], columns[..., self.key_width :]
        return own, rest.unflatten(-1, (self.key_width, self.ratio))

    def weights(self, factors: Tensor, time: slice, batch: slice, of_keys: bool) -> Tensor:
        """Left sides of the products, [h, 1 or b, 1 or chunks, C, C + reach], from factors = exp(w), laid out as the
        rows of the bias.

        For each query of a chunk: the `reach` keys before the chunk, and those of the chunk; or, `of_keys`, for each
        key of a chunk: the queries of the chunk, and the `reach` after it. Keys older than the window have weight 1,
        or that of `older`, keys that come after the query 0.
        """
        chunk, reach = self.chunk, self.reach
        chunks = 1 if self.shared else (time.stop - time.start) // chunk
        length = chunks * chunk + reach
        if self.shared:
            factors = factors.expand(-1, -1, length, -1)
        else:
            factors = factors[:, batch if self.per_row else slice(None), time.start : time.start + length]
            factors = F.pad(factors, (0, 0, 0, length - factors.shape[2]), value=1.0)
        factors = factors.contiguous()
        row, column = torch.arange(chunk)[:, None], torch.arange(chunk + reach)
        beyond = column > row + reach if of_keys else column < row
        weights = beyond.to(factors.dtype).expand(*factors.shape[:2], chunks, -1, -1).contiguous()
        if self.older is not None:
            older = self.older_of(time.start, length, batch)[..., 0].permute(2, 0, 1)  # [h, 1 or b, 1 or length]
            older = older.expand(-1, -1, length).unfold(2, chunk + reach, chunk)  # [h, 1 or b, chunks, C + reach]
            weights *= older[..., None, :] if of_keys else older[..., :chunk, None]
        band = self.band(weights)
        if of_keys:  # key r and query r + j are j apart
            strides = (*factors.stride()[:2], chunk * self.taps, self.taps, self.taps + 1)
            band.copy_(factors.as_strided(band.shape, strides))
        else:
            band.copy_(factors[:, :, : chunks * chunk].unflatten(2, (chunks, chunk)).flip(-1))
        return weights

    def band(self, pairs: Tensor) -> Tensor:
        """Of [.., C, C + reach] the entries inside the window, [.., C, n]: a view."""
        strides = (*pairs.stride()[:-2], pairs.shape[-1] + 1, 1)
        return pairs.as_strided((*pairs.shape[:-1], self.taps), strides, pairs.storage_offset())

    def panels(self, columns: Tensor, chunks: int) -> Tensor:
        """Right sides, a view [b, chunks, C + reach, h, w] of columns [b, chunks C + reach, h, w]: C rows and the
        `reach` that overlap with the next."""
        batch, rows, *inner = columns.stride()
        size = (columns.shape[0], chunks, self.chunk + self.reach, self.heads, self.width)
        return columns.as_strided(size, (batch, self.chunk * rows, rows, *inner))

    def parts_of_panel(self, of_keys: bool) -> list[tuple[slice, bool]]:
        """The rows of a panel, in the order in which they are added to what lies beyond, and whether the sum then
        falls by a chunk: the first rows of keys lie a chunk before their queries, the last ones of queries a chunk
        behind their keys."""
        if not self.overlap:
            return [(slice(None), False)]
        own, next_ = slice(self.chunk), slice(self.chunk, None)
        return [(next_, True), (own, False)] if of_keys else [(own, True), (next_, False)]

    def side_by_side(self, panels: Tensor, of_keys: bool) -> Tensor:
        """Panels of small matrices, those of all chunks and of the batch in one: [h, C + reach, b chunks w]."""
        panels = panels.permute(3, 2, 0, 1, 4)
        parts = self.parts_of_panel(of_keys)
        if len(parts) == 1:
            return panels.flatten(2)
        out = panels.new_empty(panels.shape)
        for part, falls in parts:
            if falls:
                torch.mul(panels[:, part], self.fall[:, None, None], out=out[:, part])
            else:
                out[:, part] = panels[:, part]
        return out.flatten(2)

    def multiply(
        self, weights: Tensor, columns: Tensor, beyond: Tensor, out: Tensor, of_keys: bool, older: Tensor | None = None
    ) -> None:
        """out [b, time, h, w] = weights times the panels of columns, plus beyond [b, chunks, h, w] times older
        [1 or b, 1 or time, h, 1]."""
        chunks = beyond.shape[1]
        panels = self.panels(columns, chunks)
        out = out.unflatten(1, (chunks, self.chunk))
        if self.by_head:
            columns = self.side_by_side(panels, of_keys)
            if self.overlap:
                beyond = beyond * self.fall[:, 0]
            if older is not None:
                beyond = beyond * older
            first = beyond.permute(2, 0, 1, 3).flatten(1)[:, None].expand(-1, self.chunk, -1)
            product = torch.baddbmm(first, weights[:, 0, 0], columns)
            out.copy_(product.unflatten(2, (*beyond.shape[:2], -1)).permute(2, 3, 1, 0, 4))
            return
        weights = weights.expand(-1, len(out), chunks, -1, -1)
        beyond = beyond.unsqueeze(2).expand(-1, -1, self.chunk, -1, -1)
        if older is not None:
            older = older.expand(len(out), chunks * self.chunk, -1, -1).unflatten(1, (chunks, self.chunk))
            beyond = torch.mul(beyond, older, out=out)
        for row in range(len(out)):
            for head in range(self.heads):
                where, product = (row, ..., head, slice(None)), beyond[row, ..., head, :]
                for part, falls in self.parts_of_panel(of_keys):
                    torch.baddbmm(product, weights[head, row, ..., part], panels[where][:, part], out=out[where])
                    product = out[where]
                    if falls:
                        product.mul_(self.fall[head])

    def pairs(self, queries: Tensor, keys: Tensor, chunks: int) -> Tensor:
        """Products of the rows of the queries of each chunk with those of the keys in reach, [h, 1 or b, chunks or 1,
        C, C + reach], both given as columns."""
        queries, keys = self.panels(queries, chunks)[:, :, : self.chunk], self.panels(keys, chunks)
        if self.by_head:
            queries = queries.permute(3, 2, 0, 1, 4).flatten(2)
            return torch.bmm(queries, self.side_by_side(keys, of_keys=False).transpose(1, 2))[:, None, None]
        size = (self.heads, len(keys) if self.per_row else 1, chunks, self.chunk, self.chunk + self.reach)
        out = keys.new_zeros(size)
        for row in range(len(keys)):
            for head in range(self.heads):
                where = (row, ..., head, slice(None))
                for part, falls in self.parts_of_panel(of_keys=False):
                    left = queries[where] * self.fall[head] if falls else queries[where]
                    product = out[head, row if self.per_row else 0, ..., part]
                    torch.baddbmm(product, left, keys[where][:, part].transpose(1, 2), out=product)
        return out


class _Bounds(NamedTuple):
    """How large the inputs and the results of a forward pass are: whether plain exponentials can be used.

    Attributes:
        weight: log of the largest sum of weights, those of the window with their biases.
        value: the largest magnitude of a value, at least 1.
        referred: 1 if they are relative to references, else 0.
        total: the smallest denominator; 0 if there is none, because the exact way was taken.
    """

    weight: float
    value: float
    referred: float = 0.0
    total: float = 0.0

    @classmethod
    def of(cls, plan, key, value, rows, maximum, normalizer, average) -> "_Bounds | None":
        """None where plain exponentials cannot be used. A NaN is not within any bounds."""
        lowest, highest = (float(bound) for bound in rows.aminmax())
        low_keys, high_keys = (float(bound) for bound in _without_infinity(_largest_keys(key, maximum)).aminmax())
        if not highest + high_keys < math.inf:
            return None
        limit = _LARGEST_EXPONENT
        referred = not (-limit <= min(lowest, low_keys) and max(highest, high_keys) <= limit)
        if referred:
            highest = high_keys = limit
        highest = max(highest, 0.0)
        count = key.shape[1] + float(normalizer.amax())
        if plan.shift is not None:
            high_keys += max(float(plan.shift[: plan.chunk + plan.reach].amax()), float(plan.first_shift.amax()))
        weight = max(high_keys + math.log(count), high_keys + highest + math.log(rows.shape[3]))
        bounds = cls(weight, max(largest(value, average), 1.0), float(referred))
        return bounds if bounds.weight + math.log(bounds.value) < _LARGEST_SUM else None

    def with_total(self, plan, sums) -> "_Bounds | None":
        """With the smallest denominator; None if that is too small."""
        total = float(plan.parts(sums[:, : plan.length])[0].amin())
        return self._replace(total=total) if total >= _SMALLEST_TOTAL else None

    def hold_for(self, grad, query, activation) -> bool:
        """Whether the sums of the backward pass cannot leave float32 either, nor lose anything."""
        if self.total == 0:
            return False
        gate = 1.0 if activation in ("sigmoid", "tanh") else max(largest(query), 1.0)
        size = largest(grad) * gate * self.value
        return size == 0 or math.log(size) - math.log(self.total) + max(self.weight, 0.0) < _LARGEST_SUM


def _largest_keys(key: Tensor, maximum: Tensor) -> Tensor:
    """Of each sequence and channel, [B, K]; `maximum` is that of the keys before the first."""
    return torch.maximum(key.amax(1).to(maximum.dtype), maximum)


def _without_infinity(largest: Tensor) -> Tensor:
    """With 0 for what is the largest of nothing."""
    return torch.where(largest == -math.inf, 0.0, largest)


def _fill(plan, columns, key, value, start, batch) -> None:
    """columns [b, rows, h, w]: exp(k) and exp(k) v of the tokens from `start` on, 0 where there is none."""
    key, value = key[batch], value[batch]
    first, last = max(start, 0), min(start + columns.shape[1], plan.length)
    columns[:, : first - start].zero_()
    columns[:, last - start :].zero_()
    weight, term = plan.parts(columns[:, first - start : last - start])
    key = plan.keys(key[:, first:last])
    if plan.key_reference is not None:
        key = torch.sub(key, plan.key_reference[batch, None], out=weight)
    if plan.shift is not None:
        key = torch.add(key, plan.shift[first - start : last - start], out=weight)
    torch.exp(key, out=weight) if key.dtype == weight.dtype else weight.copy_(key).exp_()
    torch.mul(weight[..., None], plan.values(value[:, first:last]), out=term)


def _running_sum(sums, fall):
    """The sum of all places up to each, [b, chunks, h, w], from one to the next of which it falls."""
    if fall is None:
        return sums.cumsum(1)
    step, fall = 1, fall[:, 0]  # [h, w]
    while step < sums.shape[1]:
        sums = torch.cat([sums[:, :step], sums[:, step:].addcmul(sums[:, :-step], fall)], 1)
        step, fall = 2 * step, fall * fall
    return sums


def _older(plan, columns, carry, chunks):
    """For each chunk the sum of what comes before its panel, [b, chunks, h, w], and that for the chunk to come, of
    columns [b, chunks C + reach, h, w]."""
    sums = columns[:, : chunks * plan.chunk].unflatten(1, (chunks, -1)).sum(2)
    if plan.fall is not None:
        sums *= plan.fall[:, 0]
    sums = _running_sum(torch.cat([carry[:, None], sums], 1), plan.fall)
    return sums[:, :-1], sums[:, -1]


def _newer(plan, columns, carry, chunks):
    """For each chunk the sum of what comes after its panel, and that for the chunk before."""
    if plan.fall is None:
        sums = columns[:, plan.reach :].unflatten(1, (chunks, -1)).sum(2)
    else:  # the last rows of a panel are of the chunk behind it
        panels = plan.panels(columns, chunks)
        sums = panels[:, :, plan.reach : plan.chunk].sum(2)
        sums.addcmul_(panels[:, :, plan.chunk :].sum(2), plan.fall[:, 0])
    sums = _running_sum(torch.cat([sums, carry[:, None]], 1).flip(1), plan.fall).flip(1)
    newer, carry = sums[:, 1:], sums[:, 0]
    if plan.fall is not None and not plan.overlap:
        newer = newer * plan.fall[:, 0]  # else it falls with the rows of the chunk behind
    return newer, carry


def _product(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum over the value channels that share a key channel, [.., k, r] twice to [.., k]."""
    if first.shape[-1] == 1:
        return torch.mul(first[..., 0], second[..., 0], out=out)
    return torch.sum(first * second, -1, out=out)


def _initial_scale(plan, maximum) -> Tensor:
    """What the sum of the keys before the first, relative to their maximum, is multiplied with, [B, h, k]."""
    log_scale = plan.keys(maximum)
    if plan.key_reference is not None:
        log_scale = log_scale - plan.key_reference
    if plan.shift is not None:
        log_scale = log_scale + plan.first_shift
    return log_scale.exp()


def _initial(plan, maximum, normalizer, average) -> Tensor:
    """The sum of the keys before the first, as columns [B, h, w]."""
    weight = _initial_scale(plan, maximum) * plan.keys(normalizer)
    return torch.cat([weight, (weight[..., None] * plan.values(average)).flatten(-2)], -1)


def _forward(plan, query, key, value, rows, carry, activation):
    out = query.new_empty(value.shape)
    sums = carry.new_empty(plan.batch, plan.padded_length, plan.heads, plan.width)
    factors, faded = rows.exp(), None
    for time, batches in plan.blocks():
        chunks, steps = (time.stop - time.start) // plan.chunk, slice(time.start, min(time.stop, plan.length))
        weights = None
        for batch in batches:
            if weights is None or plan.per_row:
                weights = plan.weights(factors, time, batch, of_keys=False)
            columns = carry.new_empty(len(carry[batch]), plan.reach + chunks * plan.chunk, plan.heads, plan.width)
            _fill(plan, columns, key, value, time.start - plan.reach, batch)
            older, carry[batch] = _older(plan, columns, carry[batch], chunks)
            if plan.older is not None:
                faded = plan.older_of(time.start, time.stop - time.start, batch)
            plan.multiply(weights, columns, older, sums[batch, time], of_keys=False, older=faded)
            gate = QUERY_ACTIVATIONS[activation](query[batch, steps].to(carry.dtype))
            torch.mul(gate, plan.means(sums[batch, steps]), out=out[batch, steps])
    return out, sums


def _exact(query, key, value, rows, maximum, normalizer, average, decay, activation):
    # Right before the first key, instead of before those of the window.
    initial = (decayed(maximum, decay, 1 - rows.shape[3]), normalizer, average)
    return windowed_chunks(Window(query, key, value, rows, None, initial, True, activation, decay))


@operator("windowed")
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    average: Tensor,
    decay: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(query) times the mean of the values [B, T, D], and for the backward pass the sums of the weights and
    of the weighted values [B, T or more, h, w], and the bounds of both [3] (a total of 0: the exact way was taken).

    Arguments as in [`Window`], without keys before the first query: the initial sum is that right before it.
    """
    plan = _Plan(key, value, rows, decay)
    bounds = _Bounds.of(plan, key, value, rows, maximum, normalizer, average)
    if bounds is not None:
        logits = plan.refer(key, rows, maximum) if bounds.referred else rows
        out, sums = _forward(plan, query, key, value, logits, _initial(plan, maximum, normalizer, average), activation)
        bounds = bounds.with_total(plan, sums)
    if bounds is None:
        bounds = _Bounds(0.0, 1.0)
        out = _exact(query, key, value, rows, maximum, normalizer, average, decay, activation)
        sums = average.new_zeros(plan.batch, plan.padded_length, plan.heads, plan.width)
    return out, sums, torch.tensor(bounds, dtype=torch.float64)


@windowed.register_fake
def _(query, key, value, rows, maximum, normalizer, average, decay, activation):
    plan = _Plan(key, value, rows, None)
    sums = average.new_empty(plan.batch, plan.padded_length, plan.heads, plan.width)
    return query.new_empty(value.shape), sums, average.new_empty(len(_Bounds._fields), dtype=torch.float64)


@flops_of(windowed)
def _windowed_flops(query, key, value, rows, maximum, normalizer, average, *_):
    plan = _Plan(key, value, rows, None)
    pairs = plan.padded_length * (plan.chunk + plan.reach)
    return 2 * plan.batch * pairs * plan.heads * plan.width


def _backward(plan, grad, sums, query, key, value, rows, activation, needs_rows, needs_decay):
    d_query, d_key, d_value = (torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
    d_rows = torch.zeros(rows.shape, dtype=rows.dtype)
    d_decay = torch.zeros(key.shape[2] if needs_decay else 0, dtype=torch.float64)
    factors = rows.exp()
    carry = sums.new_zeros(plan.batch, plan.heads, plan.width)
    for time, batches in reversed(list(plan.blocks())):
        chunks, steps = (time.stop - time.start) // plan.chunk, slice(time.start, min(time.stop, plan.length))
        own = steps.stop - steps.start
        seeing = slice(time.start, min(time.stop + plan.reach, plan.length))
        weights = None
        for batch in batches:
            if weights is None or plan.per_row:
                weights = plan.weights(factors, time, batch, of_keys=True)
            columns = carry.new_empty(len(carry[batch]), chunks * plan.chunk + plan.reach, plan.heads, plan.width)
            key_columns, d_sums = torch.empty_like(columns), torch.empty_like(columns[:, plan.reach :])
            upstream, mean = grad[batch, seeing].to(carry.dtype), plan.means(sums[batch, seeing])
            gate = QUERY_ACTIVATIONS[activation](query[batch, seeing].to(carry.dtype))
            d_query[batch, steps] = DERIVATIVES[activation](upstream[:, :own] * mean[:, :own], gate[:, :own])
            # With respect to the sums of each query: the columns of the denominator, and of the numerator.
            columns[:, gate.shape[1] :].zero_()
            d_denominator, d_numerator = plan.parts(columns[:, : gate.shape[1]])
            denominator, _ = plan.parts(sums[batch, seeing])
            # A product of its own: the gate may be the query.
            torch.div(plan.values(gate * upstream), denominator[..., None], out=d_numerator)
            _product(d_numerator, plan.values(mean.neg_()), out=d_denominator)
            faded = columns
            if plan.older is not None:
                faded = columns * plan.older_of(time.start, columns.shape[1], batch)
            newer, carry[batch] = _newer(plan, faded, carry[batch], chunks)
            # With respect to exp(k), and to exp(k) v.
            plan.multiply(weights, columns, newer, d_sums, of_keys=True)
            if plan.overlap:  # those that are in one panel alone fell there
                d_sums.unflatten(1, (chunks, -1))[:, :, : plan.chunk - plan.reach].mul_(plan.fall[:, 0])
            d_weight, d_term = plan.parts(d_sums[:, :own])
            _fill(plan, key_columns, key, value, time.start - plan.reach, batch)
            weight, _ = plan.parts(key_columns[:, plan.reach : plan.reach + own])
            torch.mul(d_term, weight[..., None], out=plan.values(d_value[batch, steps]))
            d_weight = _product(d_term, plan.values(value[batch, steps])).add_(d_weight)
            if needs_decay:  # before it is rounded
                d_weight.mul_(weight)
                d_key[batch, steps] = d_weight.flatten(-2)
                d_decay += moment(d_weight.sum(0).flatten(-2), time.start - plan.length / 2)
            else:
                torch.mul(d_weight, weight, out=plan.keys(d_key[batch, steps]))
            if needs_rows:
                band = plan.band(plan.pairs(columns, key_columns, chunks)).flip(-1).flatten(2, 3)
                if plan.shared:
                    d_rows += band.sum(2, keepdim=True)
                else:
                    d_rows[:, batch if plan.per_row else slice(None), steps] += band[:, :, :own]
            if time.start == 0:
                carry[batch] += faded[:, : plan.reach].sum(1)
    return d_query, d_key, d_value, d_rows.mul_(factors), d_decay, carry


@operator("windowed_backward")
def windowed_backward(
    grad: Tensor,
    sums: Tensor,
    bounds: Tensor,
    inputs: list[Tensor],
    decay: Tensor | None,
    activation: str,
    needs_rows: bool,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `windowed` with respect to its first seven arguments, `inputs` (rows: 0 unless `needs_rows`), and
    to the decay (empty unless `needs_decay`)."""
    query, key, value, rows, maximum, normalizer, average = inputs
    plan = _Plan(key, value, rows, decay)
    bounds = _Bounds(*bounds.tolist())
    if not bounds.hold_for(grad, query, activation):
        if needs_decay:
            return gradients_inside_operator(lambda *inputs: _exact(*inputs, activation), [*inputs, decay], grad)
        grads = gradients_inside_operator(lambda *inputs: _exact(*inputs, decay, activation), inputs, grad)
        return *grads, sums.new_empty(0)
    rows = plan.refer(key, rows, maximum) if bounds.referred else rows
    *grads, d_decay, carry = _backward(plan, grad, sums, query, key, value, rows, activation, needs_rows, needs_decay)
    # The sum of the keys before the first is exp(maximum) normalizer, and that times the average.
    d_weight, d_term = plan.parts(carry)
    scale = _initial_scale(plan, maximum)
    if plan.overlap:
        scale = scale * plan.fall[:, 0, : plan.key_width]
    d_average = (d_term * (scale * plan.keys(normalizer))[..., None]).flatten(-3)
    d_normalizer = ((d_weight + _product(d_term, plan.values(average))) * scale).flatten(-2)
    d_maximum = d_normalizer * normalizer
    if needs_decay:
        d_decay += moment(d_maximum.sum(0, keepdim=True), -1 - plan.length / 2)
    return *grads, d_maximum, d_normalizer, d_average, d_decay.to(sums.dtype)


@windowed_backward.register_fake
def _(grad, sums, bounds, inputs, decay, activation, needs_rows, needs_decay):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
    return *grads, torch.empty_like(decay) if needs_decay else sums.new_empty(0)


@flops_of(windowed_backward)
def _(grad, sums, bounds, inputs, decay, activation, needs_rows, needs_decay):
    return (1 + needs_rows) * _windowed_flops(*inputs)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*output[1:], *tensors)  # the last is None without a decay
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    sums, bounds, *inputs, decay = ctx.saved_tensors
    if torch.is_grad_enabled():  # a derivative of this one is wanted
        return (*differentiable_gradients(_exact, [*inputs, decay], (ctx.activation,), grad), None)
    needs_rows, needs_decay = ctx.needs_input_grad[3], ctx.needs_input_grad[7]
    grads = windowed_backward(grad, sums, bounds, inputs, decay, ctx.activation, needs_rows, needs_decay)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


windowed.register_autograd(_differentiate, setup_context=_save_for_backward)


def windowed_cpu(window: Window) -> Tensor:
    """See [`Window`]."""
    query, key, value, rows, past, initial, _, activation, decay = window
    if rows is None:
        rows = initial[0].new_zeros(1, 1, 1, 1)
    left = 0 if past is None else past[0].shape[1]
    if left > 0:  # queries whose results nobody reads stand before those keys
        query = F.pad(query, (0, 0, left, 0))
        key, value = torch.cat([past[0].to(key.dtype), key], 1), torch.cat([past[1].to(value.dtype), value], 1)
        if rows.shape[1] > 1 or rows.shape[2] > 1:  # a row for each query
            rows = F.pad(rows, (0, 0, left, 0))
    return windowed(query, key, value, rows, *initial, decay, activation)[0][:, left:]
