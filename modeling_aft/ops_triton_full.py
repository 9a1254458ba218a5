# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-full as Triton kernels for NVIDIA GPUs, where all rows of the batch share the biases of one table.

The average is that of ops_panel.py: matrix products of exp(w - row max), the pairs, with exp(k - column max) and with
the same times v. The columns are the channels of all rows of the batch side by side. Both factors are computed and
rounded once, in kernels of their own: what is left is a matrix product with two accumulators, on tensor cores, that
leaves out the pairs of a query and later keys. The backward pass has two more: over the queries for the gradients of
keys and values, and over the columns for that of the bias.

That is exact wherever the denominator does not underflow. A program that meets one that does raises the flag of its
tile of queries and block of columns. The kernels in log space run last, and compute what has a flag again, key by key.
No float atomics: results are the same in every run.

T is padded to whole blocks in all buffers, with pairs and factors of 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_full import shared_average
from .ops_operators import differentiable_gradients, flops_of, operator_namespace
from .ops_panel import panel_composed
from .ops_state import compute_dtype
from .ops_tokens import refused
from .triton_language import (
    INTERPRETED,
    Columns,
    Matrix,
    ceil_divide,
    contiguous,
    exp,
    factor_dtype,
    finite,
    inverse,
    jit,
    layout_of,
    least_denominator,
    matrix,
    numerics,
    on_its_device,
    power_of_two,
    processor,
    tl,
)


_NAMESPACE = operator_namespace(__name__)
_SIDE = 16 if INTERPRETED else 128  # what T is padded to a multiple of, and the largest tile
_EXACT_ROWS = 16  # that log space works on at once


class _Inputs(NamedTuple):
    """
    What kernels read.

    Attributes:
        key, value: [B, T, D].
        bias: [h, T, T]; `bias_head`, `bias_row`: how many elements lie between two heads, and between two queries.
        pairs: [h, padded, padded], exp(w - row maximum), 0 for later keys.
        maxima: [h, padded], the row maxima.
        bounds: [2, B, D], the largest key of each column, the reference, and the largest magnitude of its values.
        factors: [B, 2, padded, D], exp(k - reference) and the same times v.
    """

    key: Matrix
    value: Matrix
    bias: Any
    bias_head: int
    bias_row: int
    pairs: Any
    maxima: Any
    bounds: Any
    factors: Any


class _Results(NamedTuple):
    """average [B, T, D], the logs [B, T, D] of its denominators, relative to the maxima of bias and keys, and flags
    [tiles, blocks]."""

    average: Any
    logs: Any
    flags: Any


class _Gradients(NamedTuple):
    """
    What the backward pass goes through.

    Attributes:
        average: [B, T, D], where it begins.
        factors: [B, 2, padded, D], g = d(average) / denominator and c = g x average, 0 where there is a flag.
        key, value: [B, T, D].
        bias: [splits, h, T, T], zeros to begin with, and to be added up.
    """

    average: Any
    factors: Any
    key: Any
    value: Any
    bias: Any


class _Sizes(NamedTuple):
    """
    Attributes:
        batches, length, width: B, T and D.
        padded: T and what it is padded with.
        tiles: how many there are of ROWS.
        heads, head_width: h and D / h.
        head_blocks: blocks of the columns of a head.
        splits: into which the columns are cut where the gradient of the bias is summed up over them.
    """

    batches: int
    length: int
    width: int
    padded: int
    tiles: int
    heads: int
    head_width: int
    head_blocks: int
    splits: int


class _Constants(NamedTuple):
    """
    What a kernel is compiled for.

    Attributes:
        SIDE: what the pairs are laid out in blocks of, a multiple of ROWS.
        ROWS, COLUMNS: of an accumulator. That of the gradient of the bias has ROWS in both dimensions.
        DEPTH: how much of the other dimension is multiplied at once.
        DTYPE, TINY, LARGEST, FACTOR, PRECISION, FAST: see [`numerics`].
        CAUSAL: whether a query sees no later keys.
        EVEN: whether all columns of all blocks exist.
    """

    SIDE: int
    ROWS: int
    COLUMNS: int
    DEPTH: int
    DTYPE: Any
    TINY: float
    LARGEST: float
    FACTOR: Any
    PRECISION: str
    CAUSAL: bool
    EVEN: bool
    FAST: bool


# ---------------------------------------------------------------------------------------------------------- helpers


@jit
def _columns(head, first, sizes, COUNT: tl.constexpr):
    """The columns `first` and after of a head: its channels of the first row of the batch, those of the second, ..."""
    index = first + tl.arange(0, COUNT)
    batch = (index // sizes.head_width).to(tl.int64)
    return Columns(batch, head * sizes.head_width + index % sizes.head_width, index < sizes.batches * sizes.head_width)


@jit
def _tile_and_columns(sizes, LAST_FIRST: tl.constexpr, C: tl.constexpr):
    """The tile, head and columns of this program, and where its flag is. Those of a tile run side by side, and tiles
    that take longest first."""
    COLUMNS: tl.constexpr = C.COLUMNS
    blocks = sizes.heads * sizes.head_blocks
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if LAST_FIRST:
        tile = sizes.tiles - 1 - tile
    head = block // sizes.head_blocks
    return tile, head, _columns(head, block % sizes.head_blocks * COLUMNS, sizes, COLUMNS), tile * blocks + block


@jit
def _addresses(matrix, columns, rows):
    """Those of [rows, columns] of a matrix [B, T, D]."""
    start = matrix.start + columns.batch * matrix.batch + columns.channel
    return start[None, :] + rows.to(tl.int64)[:, None] * matrix.row


@jit
def _exist(columns, rows, sizes):
    """Which of [rows, columns] there are."""
    return (rows < sizes.length)[:, None] & columns.exists[None, :]


@jit
def _load_matrix(matrix, columns, rows, other, sizes, C: tl.constexpr):
    """[rows, columns] of a matrix, `other` where there is none."""
    mask = _exist(columns, rows, sizes)
    return tl.load(_addresses(matrix, columns, rows), mask=mask, other=other).to(C.DTYPE)


@jit
def _load(start, columns, rows, other, sizes, C: tl.constexpr):
    """The same of a tensor [B, T, D] without gaps."""
    return _load_matrix(contiguous(start, sizes.length, sizes.width), columns, rows, other, sizes, C)


@jit
def _store(start, columns, rows, sizes, tile, C: tl.constexpr):
    """Writes what `_load` would read."""
    address = _addresses(contiguous(start, sizes.length, sizes.width), columns, rows)
    tl.store(address, tile.to(start.dtype.element_ty), mask=_exist(columns, rows, sizes))


@jit
def _load_keys(inputs, columns, rows, reference, sizes, C: tl.constexpr):
    """The keys relative to the reference, and the values."""
    k = _load_matrix(inputs.key, columns, rows, float("-inf"), sizes, C) - reference[None, :]
    return k, _load_matrix(inputs.value, columns, rows, 0.0, sizes, C)


@jit
def _factor_addresses(factors, which, columns, rows, sizes):
    """Those of the first or the second of the factors: [rows, columns]."""
    start = factors + (2 * columns.batch + which) * sizes.padded * sizes.width + columns.channel
    return start[None, :] + (rows * sizes.width)[:, None]


@jit
def _load_factor(factors, which, columns, rows, sizes, C: tl.constexpr):
    address = _factor_addresses(factors, which, columns, rows, sizes)
    if C.EVEN:
        return tl.load(address)
    else:
        return tl.load(address, mask=columns.exists[None, :], other=0.0)


@jit
def _store_factor(factors, which, columns, rows, sizes, tile, C: tl.constexpr):
    address = _factor_addresses(factors, which, columns, rows, sizes)
    tl.store(address, tile.to(C.FACTOR), mask=columns.exists[None, :])


@jit
def _load_pairs(inputs, head, rows, keys, sizes):
    """[rows, keys] of the pairs of a head."""
    start = inputs.pairs + head.to(tl.int64) * sizes.padded * sizes.padded
    return tl.load(start + rows.to(tl.int64)[:, None] * sizes.padded + keys[None, :])


@jit
def _load_bias(inputs, head, rows, keys, sizes, C: tl.constexpr):
    """[rows, keys] of the bias of a head, minus infinity for what a query does not see."""
    rows, keys = rows[:, None], keys[None, :]
    seen = (rows < sizes.length) & (keys < sizes.length)
    if C.CAUSAL:
        seen = seen & (keys <= rows)
    start = inputs.bias + head.to(tl.int64) * inputs.bias_head
    return tl.load(start + rows.to(tl.int64) * inputs.bias_row + keys, mask=seen, other=float("-inf")).to(C.DTYPE)


@jit
def _load_bounds(inputs, columns, sizes):
    """The largest key of each column, minus infinity if it has none, and the largest magnitude of its values."""
    start = inputs.bounds + columns.batch * sizes.width + columns.channel
    reference = tl.load(start, mask=columns.exists, other=float("-inf"))
    size = tl.load(start + tl.cast(sizes.batches, tl.int64) * sizes.width, mask=columns.exists, other=0.0)
    return reference, size


@jit
def _load_maxima(inputs, head, rows, sizes):
    return tl.load(inputs.maxima + head * sizes.padded + rows)


@jit
def _found_any(found):
    return tl.max(found.to(tl.int32))


@jit
def _dot(a, b, total, C: tl.constexpr):
    return tl.dot(a, b, total, input_precision=C.PRECISION, out_dtype=C.DTYPE)


@jit
def _keys_seen(tile, sizes, C: tl.constexpr):
    """How many keys, with padding, the last query of a tile may see."""
    if C.CAUSAL:
        return (tile + 1) * C.ROWS
    else:
        return sizes.padded


@jit
def _load_relative_bias(inputs, head, rows, keys, sizes, C: tl.constexpr):
    """[rows, keys] of the bias, relative to the row maxima."""
    return _load_bias(inputs, head, rows, keys, sizes, C) - _load_maxima(inputs, head, rows, sizes)[:, None]


@jit
def _exact_weights(logits, logs, C: tl.constexpr):
    """exp(k + w) / denominator, 0 for a query that sees nothing."""
    return tl.where(logs == float("-inf"), 0.0, exp(logits - finite(logs), C))


# ---------------------------------------------------------------------------------------------------------- kernels


@jit
def _lay_out_pairs(inputs, sizes, C: tl.constexpr):
    """Pairs and maxima of one query of one head, as far as any tile may read them."""
    SIDE: tl.constexpr = C.SIDE
    head, row = tl.program_id(0) // sizes.padded, tl.program_id(0) % sizes.padded
    rows, keys = row + tl.arange(0, 1), tl.arange(0, SIDE)
    stop = sizes.padded
    if C.CAUSAL:
        stop = (row // SIDE + 1) * SIDE
    maximum = tl.full((1, SIDE), float("-inf"), C.DTYPE)
    for start in range(0, stop, SIDE):
        maximum = tl.maximum(maximum, _load_bias(inputs, head, rows, start + keys, sizes, C))
    maximum = finite(tl.max(maximum, 1))
    tl.store(inputs.maxima + head * sizes.padded + rows, maximum)
    place = inputs.pairs + (head.to(tl.int64) * sizes.padded + row) * sizes.padded
    for start in range(0, stop, SIDE):
        w = _load_bias(inputs, head, rows, start + keys, sizes, C)
        tl.store(place + (start + keys)[None, :], exp(w - maximum[:, None], C).to(C.FACTOR))


@jit
def _lay_out_factors(inputs, sizes, C: tl.constexpr):
    """A tile of the factors."""
    ROWS: tl.constexpr = C.ROWS
    tile, _, columns, _ = _tile_and_columns(sizes, False, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    reference = finite(_load_bounds(inputs, columns, sizes)[0])
    k, v = _load_keys(inputs, columns, rows, reference, sizes, C)
    e = exp(k, C)
    _store_factor(inputs.factors, 0, columns, rows, sizes, e, C)
    _store_factor(inputs.factors, 1, columns, rows, sizes, e * v, C)


@jit
def _forward(inputs, results, sizes, C: tl.constexpr):
    """A tile of the average and the logs, and its flag."""
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    DEPTH: tl.constexpr = C.DEPTH
    tile, head, columns, flag = _tile_and_columns(sizes, True, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    denominator = tl.zeros((ROWS, COLUMNS), C.DTYPE)
    numerator = tl.zeros((ROWS, COLUMNS), C.DTYPE)
    for start in range(0, _keys_seen(tile, sizes, C), DEPTH):
        keys = start + tl.arange(0, DEPTH)
        w = _load_pairs(inputs, head, rows, keys, sizes)
        denominator = _dot(w, _load_factor(inputs.factors, 0, columns, keys, sizes, C), denominator, C)
        numerator = _dot(w, _load_factor(inputs.factors, 1, columns, keys, sizes, C), numerator, C)
    reference, size = _load_bounds(inputs, columns, sizes)
    found = (denominator < least_denominator(reference, C)[None, :]) | (size > C.LARGEST)[None, :]
    tl.store(results.flags + flag, _found_any(_exist(columns, rows, sizes) & found))
    underflows = denominator < C.TINY
    average = tl.where(underflows, 0.0, numerator * inverse(denominator, C))
    logs = tl.where(underflows, float("-inf"), tl.log(tl.where(underflows, 1.0, denominator)))
    _store(results.average, columns, rows, sizes, average, C)
    _store(results.logs, columns, rows, sizes, logs, C)


@jit
def _forward_in_log_space(inputs, results, sizes, EXACT_ROWS: tl.constexpr, C: tl.constexpr):
    """Writes a tile that has a flag again."""
    COLUMNS: tl.constexpr = C.COLUMNS
    tile, head, columns, flag = _tile_and_columns(sizes, True, C)
    if tl.load(results.flags + flag) > 0:
        reference = finite(_load_bounds(inputs, columns, sizes)[0])
        for first in range(tile * C.ROWS, tl.minimum((tile + 1) * C.ROWS, sizes.length), EXACT_ROWS):
            rows = first + tl.arange(0, EXACT_ROWS)
            maximum = tl.full((EXACT_ROWS, COLUMNS), float("-inf"), C.DTYPE)
            denominator = tl.zeros((EXACT_ROWS, COLUMNS), C.DTYPE)
            average = tl.zeros((EXACT_ROWS, COLUMNS), C.DTYPE)
            for start in range(0, tl.minimum(_keys_seen(tile, sizes, C), sizes.length)):
                key = start + tl.arange(0, 1)
                k, v = _load_keys(inputs, columns, key, reference, sizes, C)
                logits = k + _load_relative_bias(inputs, head, rows, key, sizes, C)
                larger = tl.maximum(maximum, logits)
                new = exp(logits - finite(larger), C)
                denominator = denominator * exp(maximum - finite(larger), C) + new
                share = new / tl.where(denominator == 0, 1.0, denominator)
                average = average * (1 - share) + v * share  # no larger than the largest value
                maximum = larger
            empty = denominator == 0
            logs = tl.where(empty, float("-inf"), tl.log(tl.where(empty, 1.0, denominator)) + finite(maximum))
            _store(results.average, columns, rows, sizes, average, C)
            _store(results.logs, columns, rows, sizes, logs, C)


@jit
def _lay_out_gradients(inputs, results, gradients, sizes, C: tl.constexpr):
    """A tile of the factors of the backward pass, and its flag."""
    ROWS: tl.constexpr = C.ROWS
    tile, head, columns, flag = _tile_and_columns(sizes, False, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    reference, size = _load_bounds(inputs, columns, sizes)
    denominator = exp(_load(results.logs, columns, rows, float("-inf"), sizes, C), C)
    underflows = denominator < C.TINY
    g = _load(gradients.average, columns, rows, 0.0, sizes, C)
    g = tl.where(underflows, 0.0, g * inverse(denominator, C))
    c = g * _load(results.average, columns, rows, 0.0, sizes, C)
    # Weights in log space are at most 1: there no sum is larger than what it is a gradient of.
    large = tl.maximum(tl.abs(g), tl.abs(c)) * tl.maximum(size, 1.0)[None, :] > C.LARGEST
    small = denominator < least_denominator(reference, C)[None, :]
    found = _found_any(_exist(columns, rows, sizes) & (large | small))
    tl.store(results.flags + flag, found)
    _store_factor(gradients.factors, 0, columns, rows, sizes, tl.where(found > 0, 0.0, g), C)
    _store_factor(gradients.factors, 1, columns, rows, sizes, tl.where(found > 0, 0.0, c), C)


@jit
def _backward_keys(inputs, gradients, sizes, C: tl.constexpr):
    """A tile of the gradients of keys and values.

    With weights e_tj = exp(k_j + w_tj) relative to the maxima the gradient of v_j is sum_t e_tj g_t, and that of k_j
    is sum_t e_tj (g_t v_j - c_t).
    """
    ROWS: tl.constexpr = C.ROWS
    COLUMNS: tl.constexpr = C.COLUMNS
    DEPTH: tl.constexpr = C.DEPTH
    tile, head, columns, _ = _tile_and_columns(sizes, False, C)
    keys = tile * ROWS + tl.arange(0, ROWS)
    sum_g = tl.zeros((ROWS, COLUMNS), C.DTYPE)
    sum_c = tl.zeros((ROWS, COLUMNS), C.DTYPE)
    for start in range(tile * ROWS if C.CAUSAL else 0, sizes.padded, DEPTH):
        queries = start + tl.arange(0, DEPTH)
        w = tl.trans(_load_pairs(inputs, head, queries, keys, sizes))
        sum_g = _dot(w, _load_factor(gradients.factors, 0, columns, queries, sizes, C), sum_g, C)
        sum_c = _dot(w, _load_factor(gradients.factors, 1, columns, queries, sizes, C), sum_c, C)
    reference = finite(_load_bounds(inputs, columns, sizes)[0])
    k, v = _load_keys(inputs, columns, keys, reference, sizes, C)
    e = exp(k, C)
    _store(gradients.value, columns, keys, sizes, e * sum_g, C)
    _store(gradients.key, columns, keys, sizes, e * (sum_g * v - sum_c), C)


@jit
def _backward_keys_in_log_space(inputs, results, gradients, sizes, EXACT_ROWS: tl.constexpr, C: tl.constexpr):
    """Adds what queries with a flag send to a tile of keys."""
    tile, head, columns, flag = _tile_and_columns(sizes, False, C)
    blocks = sizes.heads * sizes.head_blocks
    first_tile = 0
    if C.CAUSAL:
        first_tile = tile
    flags = results.flags + flag % blocks
    found = 0
    for other in range(first_tile, sizes.tiles):
        found = tl.maximum(found, tl.load(flags + other * blocks))
    if found > 0:
        reference = finite(_load_bounds(inputs, columns, sizes)[0])
        for first in range(tile * C.ROWS, tl.minimum((tile + 1) * C.ROWS, sizes.length), EXACT_ROWS):
            keys = first + tl.arange(0, EXACT_ROWS)
            k, v = _load_keys(inputs, columns, keys, reference, sizes, C)
            d_key = _load(gradients.key, columns, keys, 0.0, sizes, C)
            d_value = _load(gradients.value, columns, keys, 0.0, sizes, C)
            for other in range(first_tile, sizes.tiles):
                if tl.load(flags + other * blocks) > 0:
                    for row in range(other * C.ROWS, tl.minimum((other + 1) * C.ROWS, sizes.length)):
                        query = row + tl.arange(0, 1)
                        logs = _load(results.logs, columns, query, 0.0, sizes, C)
                        average = _load(results.average, columns, query, 0.0, sizes, C)
                        grad = _load(gradients.average, columns, query, 0.0, sizes, C)
                        w = tl.trans(_load_relative_bias(inputs, head, query, keys, sizes, C))
                        sent = _exact_weights(k + w, logs, C) * grad
                        d_value += sent
                        d_key += sent * (v - average)
            _store(gradients.value, columns, keys, sizes, d_value, C)
            _store(gradients.key, columns, keys, sizes, d_key, C)


@jit
def _bias_tile(sizes):
    """The tiles of queries and of keys of this program, its head, and its split."""
    index = tl.program_id(0)
    tile, index = index % sizes.tiles, index // sizes.tiles
    keys_tile, index = index % sizes.tiles, index // sizes.tiles
    return tile, keys_tile, index % sizes.heads, index // sizes.heads


@jit
def _bias_addresses(gradients, split, head, rows, keys, sizes):
    start = gradients.bias + (split * sizes.heads + head).to(tl.int64) * sizes.length * sizes.length
    return start + rows.to(tl.int64)[:, None] * sizes.length + keys[None, :]


@jit
def _backward_bias(inputs, gradients, sizes, C: tl.constexpr):
    """A tile of the gradient of the bias, over one split of the columns: e_tj (g_t v_j - c_t), summed up."""
    ROWS: tl.constexpr = C.ROWS
    DEPTH: tl.constexpr = C.DEPTH
    tile, keys_tile, head, split = _bias_tile(sizes)
    if (not C.CAUSAL) or keys_tile <= tile:
        rows, keys = tile * ROWS + tl.arange(0, ROWS), keys_tile * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, ROWS), C.DTYPE)
        count = tl.cdiv(sizes.batches * sizes.head_width, sizes.splits * DEPTH) * DEPTH
        for first in range(split * count, tl.minimum((split + 1) * count, sizes.batches * sizes.head_width), DEPTH):
            columns = _columns(head, first, sizes, DEPTH)
            g = _load_factor(gradients.factors, 0, columns, rows, sizes, C)
            ev = _load_factor(inputs.factors, 1, columns, keys, sizes, C)
            total = _dot(g, tl.trans(ev), total, C)
            c = _load_factor(gradients.factors, 1, columns, rows, sizes, C)
            e = _load_factor(inputs.factors, 0, columns, keys, sizes, C)
            total = _dot(-c, tl.trans(e), total, C)
        total *= _load_pairs(inputs, head, rows, keys, sizes).to(C.DTYPE)
        exists = (rows < sizes.length)[:, None] & (keys < sizes.length)[None, :]
        tl.store(_bias_addresses(gradients, split, head, rows, keys, sizes), total, mask=exists)


@jit
def _backward_bias_in_log_space(inputs, results, gradients, sizes, EXACT_ROWS: tl.constexpr, C: tl.constexpr):
    """Adds what columns with a flag send to a tile of the gradient of the bias."""
    ROWS: tl.constexpr = C.ROWS
    tile, keys_tile, head, _ = _bias_tile(sizes)
    flags = results.flags + (tile * sizes.heads + head) * sizes.head_blocks
    found = 0
    if (not C.CAUSAL) or keys_tile <= tile:
        for block in range(sizes.head_blocks):
            found = tl.maximum(found, tl.load(flags + block))
    if found > 0:
        keys = keys_tile * ROWS + tl.arange(0, ROWS)
        for first in range(tile * ROWS, tl.minimum((tile + 1) * ROWS, sizes.length), EXACT_ROWS):
            rows = first + tl.arange(0, EXACT_ROWS)
            w = _load_relative_bias(inputs, head, rows, keys, sizes, C)
            exists = (rows < sizes.length)[:, None] & (keys < sizes.length)[None, :]
            address = _bias_addresses(gradients, 0, head, rows, keys, sizes)
            total = tl.load(address, mask=exists, other=0.0)
            for block in range(sizes.head_blocks):
                if tl.load(flags + block) > 0:
                    for index in range(C.COLUMNS):
                        column = _columns(head, block * C.COLUMNS + index, sizes, 1)
                        reference = finite(_load_bounds(inputs, column, sizes)[0])
                        k, v = _load_keys(inputs, column, keys, reference, sizes, C)
                        logs = _load(results.logs, column, rows, float("-inf"), sizes, C)
                        average = _load(results.average, column, rows, 0.0, sizes, C)
                        grad = _load(gradients.average, column, rows, 0.0, sizes, C)
                        total += _exact_weights(tl.trans(k) + w, logs, C) * grad * (tl.trans(v) - average)
            tl.store(address, total, mask=exists)


# -------------------------------------------------------------------------------------------------------- operators


def _side(length: int) -> int:
    side = 16
    while side < _SIDE and side < length:  # which says no more of a length that torch.compile leaves open
        side *= 2
    return side


def _padded(length: int) -> int:
    return ceil_divide(length, _side(length)) * _side(length)


def _plan(key, value, bias, causal: bool, direction: str) -> tuple[_Sizes, _Constants, dict[str, int]]:
    """How the work is cut: what the kernels of a direction share, and the options of those that multiply matrices."""
    batch, length, width = key.shape
    heads = bias.shape[0]
    count = batch * width // heads  # columns of a head
    layout = layout_of("full", direction, key.device)
    share = 1 if factor_dtype(key, value) == torch.bfloat16 else 2
    rows = min(layout["rows"] // share, _side(length))
    columns = min(layout["columns"] // share, max(16, power_of_two(count)))
    depth = min(layout["depth"] // share, rows)
    padded = _padded(length)
    tiles = padded // rows
    wanted = ceil_divide(2 * processor(key.device)[1], heads * _pairs_of_tiles(tiles, causal))
    sizes = _Sizes(
        batches=batch,
        length=length,
        width=width,
        padded=padded,
        tiles=tiles,
        heads=heads,
        head_width=width // heads,
        head_blocks=ceil_divide(count, columns),
        splits=max(1, min(wanted, count // (4 * depth))),
    )
    constants = _Constants(
        SIDE=_side(length),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        CAUSAL=causal,
        EVEN=count % max(columns, depth) == 0,
        **numerics(key, value),
    )
    return sizes, constants, {name: layout[name] for name in ("num_warps", "num_stages")}


def _pairs_of_tiles(tiles: int, causal: bool) -> int:
    return tiles * (tiles + 1) // 2 if causal else tiles**2


def _inputs(key, value, bias, pairs, maxima, bounds, factors) -> _Inputs:
    return _Inputs(matrix(key), matrix(value), bias, *bias.stride()[:2], pairs, maxima, bounds, factors)


def _factors_like(tensor: Tensor, sizes: _Sizes, dtype: torch.dtype) -> Tensor:
    return tensor.new_empty(sizes.batches, 2, sizes.padded, sizes.width, dtype=dtype)


def _outputs_like(key, value, bias) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator gives, not yet computed."""
    batch, length, width = value.shape
    heads, padded, dtype = bias.shape[0], _padded(length), compute_dtype(key, value)
    return (
        value.new_empty(value.shape),
        value.new_empty(value.shape, dtype=dtype),
        value.new_empty(heads, padded, padded, dtype=factor_dtype(key, value)),
        value.new_empty(heads, padded, dtype=dtype),
        value.new_empty(2, batch, width, dtype=dtype),
    )


@torch.library.custom_op(f"{_NAMESPACE}::full_triton", mutates_args=())
@on_its_device
def _full(key: Tensor, value: Tensor, bias: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The average of [`_Results`] in the dtype of the values, its logs, and pairs, maxima and bounds of [`_Inputs`].
    key, value [B, T, D], bias [h, T, T]."""
    sizes, constants, options = _plan(key, value, bias, causal, "forward")
    average, logs, pairs, maxima, bounds = _outputs_like(key, value, bias)
    bounds[0].copy_(key.amax(1))
    low, high = value.aminmax(dim=1)
    bounds[1].copy_(torch.maximum(-low, high))
    factors = _factors_like(key, sizes, pairs.dtype)
    inputs = _inputs(key, value, bias, pairs, maxima, bounds, factors)
    programs = (sizes.tiles * sizes.heads * sizes.head_blocks,)
    results = _Results(average, logs, key.new_empty(programs, dtype=torch.int32))
    _lay_out_pairs[(sizes.heads * sizes.padded,)](inputs, sizes, constants, num_warps=1)
    _lay_out_factors[programs](inputs, sizes, constants, num_warps=8)
    _forward[programs](inputs, results, sizes, constants, **options)
    _forward_in_log_space[programs](inputs, results, sizes, _EXACT_ROWS, constants, num_warps=4)
    return average, logs, pairs, maxima, bounds


@_full.register_fake
def _(key, value, bias, causal):
    return _outputs_like(key, value, bias)


@flops_of(_full)
def _full_flops(key, value, bias, causal):
    sizes, constants, _ = _plan(key, value, bias, causal, "forward")
    pairs = _pairs_of_tiles(sizes.tiles, causal) * constants.ROWS**2
    return 2 * pairs * sizes.batches * sizes.width * 2


@torch.library.custom_op(f"{_NAMESPACE}::full_triton_backward", mutates_args=())
@on_its_device
def _full_backward(
    grad: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    average: Tensor,
    logs: Tensor,
    pairs: Tensor,
    maxima: Tensor,
    bounds: Tensor,
    causal: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of key, value and bias (empty unless `needs_bias`)."""
    sizes, constants, options = _plan(key, value, bias, causal, "backward")
    sent = _factors_like(key, sizes, pairs.dtype)
    factors = torch.empty_like(sent) if needs_bias else sent  # which are read for that alone
    inputs = _inputs(key, value, bias, pairs, maxima, bounds, factors)
    programs = (sizes.tiles * sizes.heads * sizes.head_blocks,)
    results = _Results(average, logs, key.new_empty(programs, dtype=torch.int32))
    d_key, d_value, d_bias = key.new_empty(key.shape), value.new_empty(value.shape), logs.new_empty(0)
    if needs_bias:
        d_bias = logs.new_zeros(sizes.splits, *bias.shape)
    gradients = _Gradients(grad, sent, d_key, d_value, d_bias)
    _lay_out_gradients[programs](inputs, results, gradients, sizes, constants, num_warps=8)
    _backward_keys[programs](inputs, gradients, sizes, constants, **options)
    exact = inputs, results, gradients, sizes, _EXACT_ROWS, constants
    _backward_keys_in_log_space[programs](*exact, num_warps=4)
    if needs_bias:
        _lay_out_factors[programs](inputs, sizes, constants, num_warps=8)
        tiles = sizes.heads * sizes.tiles**2
        _backward_bias[(sizes.splits * tiles,)](inputs, gradients, sizes, constants, **options)
        _backward_bias_in_log_space[(tiles,)](*exact, num_warps=4)
        d_bias = d_bias[0] if sizes.splits == 1 else d_bias.sum(0)
    return d_key, d_value, d_bias.to(bias.dtype)


@_full_backward.register_fake
def _(grad, key, value, bias, *others):
    *_, needs_bias = others
    return key.new_empty(key.shape), value.new_empty(value.shape), bias.new_empty(bias.shape if needs_bias else 0)


@flops_of(_full_backward)
def _(grad, key, value, bias, *others):
    *_, causal, needs_bias = others
    return (1 + needs_bias) * _full_flops(key, value, bias, causal)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 4
    if torch.is_grad_enabled():  # a derivative of this one is wanted
        return (*differentiable_gradients(_composed, ctx.saved_tensors[:3], (ctx.causal,), grad), None)
    needs_bias = ctx.needs_input_grad[2]
    *grads, d_bias = _full_backward(grad.contiguous(), *ctx.saved_tensors, ctx.causal, needs_bias)
    return (*grads, d_bias if needs_bias else None, None)


def _composed(key, value, bias, causal):
    return shared_average(panel_composed, key, value, bias, causal).to(value.dtype)


_full.register_autograd(_differentiate, setup_context=_save_for_backward)


def full_triton(key: Tensor, value: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """
    The average [B, T, V], in the dtype of the values, of keys [B, T, K] and values [B, T, V] under biases [h, T, T]
    that all rows of the batch share. A query that sees no key gives 0, with zero gradients. The sums are taken in
    float32, or in float64 if keys or values are. Products of bfloat16 inputs are taken in bfloat16, those of float16
    in tf32, and added up in float32.

    Raises:
        ValueError: the biases are not those of T positions.
    """
    length = value.shape[1]
    if bias.shape[1] != length or bias.shape[2] != length:
        raise refused("bias", f"[h, {length}, {length}], for {length} tokens", tuple(bias.shape))
    if key.shape[2] < value.shape[2]:
        key = key.repeat_interleave(value.shape[2] // key.shape[2], 2)
    key, value, bias = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value, bias))
    return _full(key, value, bias, causal)[0]
