# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The causal windowed forms of AFT (simple, local, conv) as Triton kernels for NVIDIA GPUs.

A program owns a block of channels and walks over time in tiles of BLOCK_T queries. The panel of a tile has its own
keys and the PAST >= n - 1 keys before them, in blocks of BLOCK_T; everything older is one sum, of exp(k) and of exp(k)
v, carried from tile to tile in registers. A panel is computed as exp(w - row max) @ exp(k - reference) on the tensor
cores. The first factor, the weights, is the same for all channels of a head, so a kernel of its own lays it out once;
simple has ones at and below the diagonal, PAST = 0. The reference of a channel is its largest key.

That is exact wherever the denominator does not underflow. A program that meets a row where it does, as where keys jump
up by 60, raises a flag. The kernels in log space run last and do nothing where there is no flag; else they compute
these channels again, key by key, with sums that are relative to the largest key so far.

The backward pass walks the tiles in reverse. It computes each panel again from the sums that the forward pass left at
each tile, so both directions read every input from memory once. The gradient of a key is complete once the first
panel that sees it is done: until then it waits in registers, or, with more than one block of older keys, in a scratch
buffer; what all queries beyond the window add to it comes from one more carried sum. No float atomics: results are the
same in every run.

With a decay the keys of a panel, and the sum of the older ones, count as they are at the last query of the tile: what
remains to each query is a factor that all its keys share. From tile to tile they fall by the decay of BLOCK_T tokens.

Where blocks of channels cannot fill the chip, time is cut into chunks: one kernel sums up each chunk, a second adds
the sums up, and the main kernel runs all chunks at once.

Kernels take records: the `inputs`, the `sizes`, and C, what the code is compiled for. Names of sizes: K key channels,
D = K x SHARED value channels (SHARED of them share a key channel), n taps (0 for simple). The columns of a program's
tiles are BLOCK_B rows of the batch x BLOCK_K key channels of one head x BLOCK_R of the value channels of each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_operators import flops_of, operator_namespace
from .ops_state import compute_dtype, decayed, moment, spread
from .ops_windows import Window
from .triton_language import (
    Columns,
    Matrix,
    ceil_divide,
    contiguous,
    exp,
    factor_dtype,
    finite,
    inverse,
    is_half,
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
_BLOCK_T = 32  # queries of a tile, and keys of a block


# ---------------------------------------------------------------------------------------------------------- records


class _Bias(NamedTuple):
    """
    The bias of the window, by query or one row for all.

    Attributes:
        rows: [heads, 1 or B, 1 or T, n].
        weights: [heads, 1 or B, 1 or tiles, BLOCK_T, PAST + BLOCK_T], exp(w - maximum) of each query of a tile and key
            of its panel, 0 for keys that come later.
        maxima: [heads, 1 or B, 1 or tiles, BLOCK_T], the largest w of each query, at least the 0 of the older keys.
        row_head, row_batch, row: how many elements of `rows` lie between two heads, batches and queries.
        tile_head, tile_batch, tile: how many of `maxima` between two heads, batches and tiles.
    """

    rows: Any
    weights: Any
    maxima: Any
    row_head: int
    row_batch: int
    row: int
    tile_head: int
    tile_batch: int
    tile: int


class _Inputs(NamedTuple):
    """query [B, T, D], key [B, L+T, K], value [B, L+T, D], the largest of each channel's keys [B, K], and the bias and
    the decay [K], both unread without."""

    query: Matrix
    key: Matrix
    value: Matrix
    reference: Any
    bias: _Bias
    decay: Any


class _Sums(NamedTuple):
    """
    Sums over keys are triples of a maximum, the sum of exp(k - maximum), and the same weighted with the values.

    Attributes:
        initial: [B, 3, D], of the keys before the first, as they are at the end of the first tile.
        states: [B, tiles, 3, D], of the keys older than the panel of each tile.
        carry: [B, chunks, 3, D], of those older than the first panel of each chunk, relative to the reference; in the
            backward pass what the queries after each chunk send back.
        flags: [groups x chunks x blocks], whether log space is needed.
    """

    initial: Any
    states: Any
    carry: Any
    flags: Any


class _Gradients(NamedTuple):
    """
    Where they go: contiguous tensors.

    Attributes:
        query, value: [B, T, D] and [B, L+T, D].
        key: [share blocks, B, L+T, K]. Each block of value channels adds its part.
        logits: of w, for each query of a tile and key of its panel [blocks, groups, tiles, BLOCK_T, PAST + BLOCK_T],
            or with one row for all queries [blocks, groups, chunks, ...], added up over the tiles of the chunk.
        older: [B, 2, D], what all queries send back to the sum of the keys before the first one.
    """

    query: Any
    key: Any
    value: Any
    logits: Any
    older: Any


class _Sizes(NamedTuple):
    """
    Numbers that the code is not compiled for.

    Attributes:
        batches, length, left, taps: B, T, L and n.
        width, head_keys: D, and the key channels of a head of the bias.
        blocks, groups: of channels, and of rows of the batch.
        tiles, chunk_tiles, chunks: of time: in a sequence, in a chunk, and chunks of a sequence.
    """

    batches: int
    length: int
    left: int
    taps: int
    width: int
    head_keys: int
    blocks: int
    groups: int
    tiles: int
    chunk_tiles: int
    chunks: int


class _Constants(NamedTuple):
    """
    What a kernel is compiled for. Triton 3.6 takes no field of it in a shape, and no string as an argument of another
    function: hence constants BLOCK_T and COLUMNS of functions, and C whole as an argument.

    Attributes:
        SHARED, BLOCK_B, BLOCK_K, BLOCK_R, BLOCK_T: see above; the last is the number of queries of a tile.
        PAST: the keys of a panel before its own, 0 without a window.
        DTYPE, TINY, LARGEST, FACTOR, PRECISION, FAST: see [`numerics`].
        CHUNKED: whether there are several chunks.
        EVEN: whether all columns of all programs exist.
        DECAY: whether there is one.
        LOGITS: the gradient of the bias: "none", "each" (of each tile) or "sum" (of a chunk).
    """

    SHARED: int
    BLOCK_B: int
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_T: int
    PAST: int
    DTYPE: Any
    TINY: float
    LARGEST: float
    FACTOR: Any
    PRECISION: str
    ACTIVATION: str
    CHUNKED: bool
    EVEN: bool
    FAST: bool
    DECAY: bool
    LOGITS: str


# Records that kernels make.


class _Part(NamedTuple):
    """What a program works on: the inputs, its columns of them, and the bias of its head; and of each column the
    reference, the least denominator that does without log space, and the decay.

    (A field must not be called `values` or `type`: Triton's tuples have these.)
    """

    query: Matrix
    key: Matrix
    value: Matrix
    bias: _Bias
    key_columns: Columns
    value_columns: Columns
    reference: Any
    least: Any
    decay: Any


class _Sum(NamedTuple):
    """Of keys: their maximum, the sum of exp(k - maximum), the same weighted with the values."""

    maximum: Any
    normalizer: Any
    total: Any


class _Panel(NamedTuple):
    """Denominators and numerators [BLOCK_T, columns] relative to exp(maximum): that of the row [BLOCK_T] beside the
    reference or, in log space, of each number [BLOCK_T, columns]."""

    maximum: Any
    denominator: Any
    numerator: Any


class _Sent(NamedTuple):
    """What queries send back to the older keys, whose gradients it gives if multiplied with exp(k - maximum)."""

    maximum: Any
    g: Any
    c: Any


# ---------------------------------------------------------------------------------------------------------- helpers


@jit
def _program(blocks, chunks):
    """Channel block, chunk and group of this program; neighbours in memory run side by side."""
    index = tl.program_id(0)
    return index % blocks, (index // blocks) % chunks, (index // (blocks * chunks)).to(tl.int64)


@jit
def _block(block, sizes, C: tl.constexpr):
    """Head of the bias, first key channel in it, and which block of the value channels of each key."""
    share_blocks: tl.constexpr = (C.SHARED + C.BLOCK_R - 1) // C.BLOCK_R
    key_blocks = (sizes.head_keys + C.BLOCK_K - 1) // C.BLOCK_K
    head = block // (key_blocks * share_blocks)
    return head, (block // share_blocks) % key_blocks * C.BLOCK_K, block % share_blocks


@jit
def _batch(group, index, C: tl.constexpr):
    """The row of the batch with this index in its group: one number where it is one for all, which loads fast."""
    if C.BLOCK_B == 1:
        return group
    else:
        return group * C.BLOCK_B + index


@jit
def _key_columns(block, group, column, EACH: tl.constexpr, sizes, C: tl.constexpr):
    """The key channels of the columns of a block, of which EACH side by side share one."""
    head, first, _ = _block(block, sizes, C)
    key = column // EACH
    if C.BLOCK_B > 1:  # else the compiler would not see that neighbours are neighbours
        key = key % C.BLOCK_K
    key += first
    batch = _batch(group, column // (C.BLOCK_K * EACH), C)
    exists = key < sizes.head_keys
    if C.BLOCK_B > 1:
        exists &= batch < sizes.batches
    return Columns(batch, key + head * sizes.head_keys, exists)


@jit
def _columns(block, group, sizes, C: tl.constexpr):
    """The key and the value channels of a block, as many of each."""
    _, _, share_block = _block(block, sizes, C)
    # 4 channels per thread, not the 8 of the widest load: each thread holds a copy of the sums of its channels.
    column = tl.max_contiguous(tl.arange(0, C.BLOCK_B * C.BLOCK_K * C.BLOCK_R), [4])
    batch, key, exists = _key_columns(block, group, column, C.BLOCK_R, sizes, C)
    share = share_block * C.BLOCK_R + column % C.BLOCK_R
    exists &= share < C.SHARED
    return Columns(batch, key, exists), Columns(batch, key * C.SHARED + share, exists)


@jit
def _load_decay(pointer, columns, C: tl.constexpr):
    """The decay of each key channel of some columns."""
    decay = tl.zeros((C.BLOCK_B * C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    if C.DECAY:
        decay = tl.load(pointer + columns.channel, mask=columns.exists, other=0.0).to(C.DTYPE)
    return decay


@jit
def _of_head(bias, head, batch):
    """The bias from this head and row of the batch on."""
    rows = bias.rows + head.to(tl.int64) * bias.row_head + batch * bias.row_batch
    maxima = head.to(tl.int64) * bias.tile_head + batch * bias.tile_batch
    return _Bias(rows, bias.weights, bias.maxima, 0, 0, bias.row, maxima, 0, bias.tile)


@jit
def _part(inputs, sizes, block, group, C: tl.constexpr):
    """What the program of this block and group works on."""
    keys, values = _columns(block, group, sizes, C)
    head, _, _ = _block(block, sizes, C)
    bias = _of_head(inputs.bias, head, group * C.BLOCK_B)
    decay = _load_decay(inputs.decay, keys, C)
    reference = inputs.reference + (keys.batch * (sizes.width // C.SHARED) + keys.channel)
    reference = tl.load(reference, mask=keys.exists, other=float("-inf")).to(C.DTYPE)
    least = least_denominator(reference, C)
    return _Part(inputs.query, inputs.key, inputs.value, bias, keys, values, finite(reference), least, decay)


@jit
def _addresses(matrix, columns, start, SIZE: tl.constexpr):
    """Those of rows start to start + SIZE - 1: [SIZE, columns]."""
    base = matrix.start + (columns.batch.to(tl.int64) * matrix.batch + start * tl.cast(matrix.row, tl.int64))
    return (base + columns.channel)[None, :] + tl.arange(0, SIZE)[:, None] * matrix.row


@jit
def _mask(columns, row, stop, C: tl.constexpr):
    """Which rows before `stop` exist, of the columns that do."""
    mask = ((row >= 0) & (row < stop))[:, None]
    if not C.EVEN:
        mask = mask & columns.exists[None, :]
    return mask


@jit
def _load(matrix, columns, start, stop, other, SIZE: tl.constexpr, C: tl.constexpr):
    """Rows start to start + SIZE - 1 of those before `stop`, `other` where they do not exist: [SIZE, columns]."""
    mask = _mask(columns, start + tl.arange(0, SIZE), stop, C)
    return tl.load(_addresses(matrix, columns, start, SIZE), mask=mask, other=other).to(C.DTYPE)


@jit
def _store(matrix, columns, start, stop, tile, SIZE: tl.constexpr, C: tl.constexpr):
    """Writes what `_load` would read."""
    mask = _mask(columns, start + tl.arange(0, SIZE), stop, C)
    tl.store(_addresses(matrix, columns, start, SIZE), tile.to(matrix.start.dtype.element_ty), mask=mask)


@jit
def _load_keys(part, sizes, start, t0, SIZE: tl.constexpr, C: tl.constexpr):
    """The keys and values of the queries start to start + SIZE - 1, as they are at the end of the tile at t0."""
    row, stop = start + sizes.left, sizes.length + sizes.left
    k = _load(part.key, part.key_columns, row, stop, float("-inf"), SIZE, C)
    if C.DECAY:
        distance = t0 + C.BLOCK_T - 1 - start - tl.arange(0, SIZE)
        k -= distance[:, None].to(C.DTYPE) * part.decay[None, :]
    return k, _load(part.value, part.value_columns, row, stop, 0.0, SIZE, C)


@jit
def _load_exp(part, sizes, start, t0, C: tl.constexpr):
    """exp(k - reference) of a block of keys as they are at the end of the tile at t0, and their values."""
    k, v = _load_keys(part, sizes, start, t0, C.BLOCK_T, C)
    return exp(k - part.reference[None, :], C), v


@jit
def _triples(pointer, count, index, width, columns):
    """Addresses of the first numbers of triple `index` of a buffer [B, count, 3, width]."""
    return pointer + ((columns.batch.to(tl.int64) * count + index) * (3 * width) + columns.channel)


@jit
def _load_sum(pointer, count, index, width, columns, DTYPE: tl.constexpr):
    """Triple `index` of a buffer [B, count, 3, width]."""
    pointers = _triples(pointer, count, index, width, columns)
    maximum = tl.load(pointers, mask=columns.exists, other=float("-inf")).to(DTYPE)
    normalizer = tl.load(pointers + width, mask=columns.exists, other=0.0).to(DTYPE)
    return _Sum(maximum, normalizer, tl.load(pointers + 2 * width, mask=columns.exists, other=0.0).to(DTYPE))


@jit
def _store_sum(pointer, count, index, width, columns, triple):
    first, second, third = triple
    pointers = _triples(pointer, count, index, width, columns)
    tl.store(pointers, first, mask=columns.exists)
    tl.store(pointers + width, second, mask=columns.exists)
    tl.store(pointers + 2 * width, third, mask=columns.exists)


@jit
def _merge(one, other, C: tl.constexpr):
    """Adds up two sums over disjoint keys."""
    maximum = tl.maximum(one.maximum, other.maximum)
    scale, other_scale = exp(one.maximum - finite(maximum), C), exp(other.maximum - finite(maximum), C)
    normalizer = one.normalizer * scale + other.normalizer * other_scale
    return _Sum(maximum, normalizer, one.total * scale + other.total * other_scale)


@jit
def _fall(decay, tiles, C: tl.constexpr):
    """What remains of a sum over keys some tiles later."""
    return exp(-decay * (tiles * C.BLOCK_T), C)


@jit
def _fallen(sum, decay, tiles, EXACT: tl.constexpr, C: tl.constexpr):
    """A sum over keys as it is some tiles later."""
    if not C.DECAY:
        return sum
    elif EXACT:
        return _Sum(sum.maximum - decay * (tiles * C.BLOCK_T), sum.normalizer, sum.total)
    else:
        fall = _fall(decay, tiles, C)
        return _Sum(sum.maximum, sum.normalizer * fall, sum.total * fall)


@jit
def _with(older, k, v, EXACT: tl.constexpr, C: tl.constexpr):
    """A sum with a block of keys more; outside of log space, given exp(k - reference)."""
    if EXACT:
        maximum = tl.max(k, 0)
        e = exp(k - finite(maximum)[None, :], C)
        return _merge(older, _Sum(maximum, tl.sum(e, 0), tl.sum(e * v, 0)), C)
    else:
        return _Sum(older.maximum, older.normalizer + tl.sum(k, 0), older.total + tl.sum(k * v, 0))


@jit
def _relative(sum, reference, C: tl.constexpr):
    """A sum relative to the reference."""
    scale = exp(sum.maximum - reference, C)
    return _Sum(reference, sum.normalizer * scale, sum.total * scale)


@jit
def _nothing_sent(C: tl.constexpr):
    zero = tl.zeros((C.BLOCK_B * C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    return _Sent(zero + float("inf"), zero, zero)


@jit
def _sent_on(sent, more, EXACT: tl.constexpr, C: tl.constexpr):
    """Adds what the queries of a tile send back to `sent`, what all later ones do; both as of that tile."""
    if EXACT:
        # Without later queries the maximum is plus infinity, and there is nothing to scale.
        scale = exp(more.maximum - finite(sent.maximum), C)
        scale = tl.where(sent.maximum == float("inf"), 0.0, scale)
        return _Sent(more.maximum, sent.g * scale + more.g, sent.c * scale + more.c)
    else:
        return _Sent(more.maximum, sent.g + more.g, sent.c + more.c)


@jit
def _risen(sent, decay, tiles, EXACT: tl.constexpr, C: tl.constexpr):
    """What queries send back, for keys as they were some tiles earlier."""
    if not C.DECAY:
        return sent
    elif EXACT:
        return _Sent(sent.maximum + decay * (tiles * C.BLOCK_T), sent.g, sent.c)
    else:
        fall = _fall(decay, tiles, C)
        return _Sent(sent.maximum, sent.g * fall, sent.c * fall)


@jit
def _log_weights(bias, sizes, t0, shift, KEYS: tl.constexpr, C: tl.constexpr):
    """w [BLOCK_T, KEYS] of queries t0, ... and keys t0 - shift, ...: minus infinity for keys that come later."""
    query = tl.arange(0, C.BLOCK_T)[:, None]
    tap = query + shift - tl.arange(0, KEYS)[None, :]
    weights = tl.where(tap >= 0, 0.0, float("-inf")).to(C.DTYPE)
    if C.PAST > 0:
        inside = (tap >= 0) & (tap < sizes.taps) & (t0 + query >= 0) & (t0 + query < sizes.length)
        pointers = bias.rows + t0.to(tl.int64) * bias.row + (query * bias.row + tap)
        weights += tl.load(pointers, mask=inside, other=0.0).to(C.DTYPE)
    return weights


@jit
def _maxima_addresses(bias, tile, C: tl.constexpr):
    """Those of the maxima [BLOCK_T] of a tile; what lies before the first tile reads those of the first."""
    start = bias.tile_head + tl.maximum(tile, 0).to(tl.int64) * bias.tile
    return bias.maxima + start + tl.arange(0, C.BLOCK_T)


@jit
def _weights_addresses(bias, tile, block, C: tl.constexpr):
    """Those of the weights [BLOCK_T, BLOCK_T] of a tile and a block of its panel, in the same way."""
    panel: tl.constexpr = C.PAST + C.BLOCK_T
    query, key = tl.arange(0, C.BLOCK_T)[:, None], tl.arange(0, C.BLOCK_T)[None, :]
    start = bias.tile_head + tl.maximum(tile, 0).to(tl.int64) * bias.tile
    return bias.weights + start * panel + (query * panel + block * C.BLOCK_T + key)


@jit
def _weights(part, tile, block, C: tl.constexpr):
    """The weights [BLOCK_T, BLOCK_T] of the queries of a tile and the keys of a block of its panel."""
    if C.PAST == 0:
        query, key = tl.arange(0, C.BLOCK_T)[:, None], tl.arange(0, C.BLOCK_T)[None, :]
        return tl.where(query >= key, 1.0, 0.0).to(C.FACTOR)
    else:
        return tl.load(_weights_addresses(part.bias, tile, block, C))


@jit
def _row_maximum(part, tile, C: tl.constexpr):
    """The maximum [BLOCK_T] that the weights of the queries of a tile are relative to."""
    BLOCK_T: tl.constexpr = C.BLOCK_T
    if C.PAST == 0:
        return tl.zeros((BLOCK_T,), C.DTYPE)
    else:
        return tl.load(_maxima_addresses(part.bias, tile, C))


@jit
def _dot(a, b, C: tl.constexpr):
    return tl.dot(a.to(C.FACTOR), b.to(C.FACTOR), input_precision=C.PRECISION, out_dtype=C.DTYPE)


@jit
def _panel(part, sizes, older, tile, C: tl.constexpr):
    """The panel of the queries of a tile, given the sum of all older keys; and that of all older than the next one, as
    of this tile."""
    t0 = tile * C.BLOCK_T
    row_maximum = _row_maximum(part, tile, C)
    scale = exp(-row_maximum, C)[:, None]
    e, v = _load_exp(part, sizes, t0 - C.PAST, t0, C)
    w = _weights(part, tile, 0, C)
    denominator = older.normalizer[None, :] * scale + _dot(w, e, C)
    numerator = older.total[None, :] * scale + _dot(w, e * v, C)
    next_older = _with(older, e, v, False, C)  # the first block of this panel is older than the next
    for block in range(1, C.PAST // C.BLOCK_T + 1):
        e, v = _load_exp(part, sizes, t0 - C.PAST + block * C.BLOCK_T, t0, C)
        w = _weights(part, tile, block, C)
        denominator += _dot(w, e, C)
        numerator += _dot(w, e * v, C)
    return _Panel(row_maximum, denominator, numerator), next_older


@jit
def _exact_panel(part, sizes, older, tile, C: tl.constexpr):
    """The same in log space, key by key."""
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_B * C.BLOCK_K * C.BLOCK_R
    t0 = tile * BLOCK_T
    zero = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
    total = _Sum(zero + older.maximum[None, :], zero + older.normalizer[None, :], zero + older.total[None, :])
    for index in range(C.PAST + BLOCK_T):
        start = t0 - C.PAST + index
        k, v = _load_keys(part, sizes, start, t0, 1, C)
        logits = k + _log_weights(part.bias, sizes, t0, t0 - start, 1, C)
        e = zero + 1.0
        total = _merge(total, _Sum(logits, e, e * v), C)
    k, v = _load_keys(part, sizes, t0 - C.PAST, t0, BLOCK_T, C)
    return _Panel(total.maximum, total.normalizer, total.total), _with(older, k, v, True, C)


@jit
def _underflows(panel, part, sizes, tile, C: tl.constexpr):
    """Which denominators need log space, as integers."""
    query = tile * C.BLOCK_T + tl.arange(0, C.BLOCK_T)
    counts = ((query >= 0) & (query < sizes.length))[:, None]
    return (counts & (panel.denominator < part.least[None, :])).to(tl.int32)


@jit
def _raise_flag(sums, found):
    """Says whether this program has found what needs log space."""
    tl.store(sums.flags + tl.program_id(0), tl.max(found))


@jit
def _flagged(sums, sizes, block, group):
    """Whether any chunk of this block and group needs log space."""
    found = tl.load(sums.flags + (group * sizes.chunks * sizes.blocks + block))
    for chunk in range(1, sizes.chunks):
        found = tl.maximum(found, tl.load(sums.flags + ((group * sizes.chunks + chunk) * sizes.blocks + block)))
    return found > 0


@jit
def _gate(query, C: tl.constexpr):
    """The activation of the query and its derivative."""
    if C.ACTIVATION == "sigmoid":
        gate = inverse(1 + exp(-query, C), C)
        slope = gate * (1 - gate)
    elif C.ACTIVATION == "tanh":
        gate = 2 * inverse(1 + exp(-2 * query, C), C) - 1
        slope = 1 - gate * gate
    elif C.ACTIVATION == "relu":
        gate = tl.maximum(query, 0.0)
        slope = tl.where(query > 0, 1.0, 0.0).to(query.dtype)
    else:
        gate = query
        slope = tl.zeros_like(query) + 1.0
    return gate, slope


@jit
def _query_gradients(grad, part, sizes, older, tile, EXACT: tl.constexpr, C: tl.constexpr):
    """What the queries of a tile send back: to themselves, to the keys of their panel, and to the older ones.

    With weights e_tj = exp(k_j + w_tj) relative to the maxima of the panel, the gradient of v_j is sum_t e_tj g_t and
    that of k_j is sum_t e_tj (g_t v_j - c_t), with g = d(average) / denominator and c = g x average. Returned are the
    maximum of the panel, which numbers need log space, the gradient of the queries, g, c, and their sums for the older
    keys.
    """
    t0 = tile * C.BLOCK_T
    if EXACT:
        panel, _ = _exact_panel(part, sizes, older, tile, C)
        maximum = finite(panel.maximum)
        weight = exp(older.maximum[None, :] - maximum, C)
    else:
        panel, _ = _panel(part, sizes, older, tile, C)
        maximum = panel.maximum
        weight = exp(-maximum, C)[:, None]
    q = _load(part.query, part.value_columns, t0, sizes.length, 0.0, C.BLOCK_T, C)
    dy = _load(grad, part.value_columns, t0, sizes.length, 0.0, C.BLOCK_T, C)
    gate, slope = _gate(q, C)
    reciprocal = tl.where(panel.denominator < C.TINY, 0.0, inverse(panel.denominator, C))
    average = panel.numerator * reciprocal
    g = dy * gate * reciprocal
    c = g * average
    # Weights in log space are at most 1: there no sum is larger than what it is a gradient of.
    large = tl.maximum(tl.abs(g), tl.abs(c)) > C.LARGEST
    # Sums that are relative to something else are those of log space.
    other = (older.maximum != part.reference) & part.value_columns.exists
    found = _underflows(panel, part, sizes, tile, C) | (large | other[None, :]).to(tl.int32)
    more = _Sent(older.maximum, tl.sum(weight * g, 0), tl.sum(weight * c, 0))
    return maximum, found, dy * slope * average, g, c, more


# ---------------------------------------------------------------------------------------------------------- kernels


@jit
def _lay_out_weights(bias, heads, batches, sizes, C: tl.constexpr):
    """The weights and their maxima of one tile, head and row of the batch."""
    index = tl.program_id(0)
    tile = index // (heads * batches)
    head, batch = index // batches % heads, index % batches
    BLOCK_T: tl.constexpr = C.BLOCK_T
    panel: tl.constexpr = C.PAST + BLOCK_T
    t0 = tile * BLOCK_T
    bias = _of_head(bias, head, batch.to(tl.int64))
    maximum = tl.zeros((BLOCK_T,), C.DTYPE)  # older keys have bias 0
    for block in range(panel // BLOCK_T):
        w = _log_weights(bias, sizes, t0, C.PAST - block * BLOCK_T, BLOCK_T, C)
        maximum = tl.maximum(maximum, tl.max(w, 1))
    tl.store(_maxima_addresses(bias, tile, C), maximum)
    for block in range(panel // BLOCK_T):
        w = _log_weights(bias, sizes, t0, C.PAST - block * BLOCK_T, BLOCK_T, C)
        tl.store(_weights_addresses(bias, tile, block, C), exp(w - maximum[:, None], C).to(C.FACTOR))


@jit
def _forward_sums(inputs, carry, sizes, C: tl.constexpr):
    """Sum of the keys that leave the window during each chunk, into carry [B, chunks, 3, D]. Reads key and value."""
    block, chunk, group = _program(sizes.blocks, sizes.chunks)
    part = _part(inputs, sizes, block, group, C)
    zero = tl.zeros((C.BLOCK_B * C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    older = _Sum(part.reference, zero, zero)
    for tile in range(chunk * sizes.chunk_tiles, tl.minimum((chunk + 1) * sizes.chunk_tiles, sizes.tiles)):
        t0 = tile * C.BLOCK_T
        e, v = _load_exp(part, sizes, t0 - C.PAST, t0, C)
        older = _fallen(_with(older, e, v, False, C), part.decay, 1, False, C)
    _store_sum(carry, sizes.chunks, chunk, sizes.width, part.value_columns, older)


@jit
def _forward_scan(inputs, sums, sizes, C: tl.constexpr):
    """Replaces the sum of each chunk in carry by that of everything before."""
    block, _, group = _program(sizes.blocks, 1)
    part = _part(inputs, sizes, block, group, C)
    columns = part.value_columns
    older = _relative(_load_sum(sums.initial, 1, 0, sizes.width, columns, C.DTYPE), part.reference, C)
    for chunk in range(sizes.chunks):
        leaving = _load_sum(sums.carry, sizes.chunks, chunk, sizes.width, columns, C.DTYPE)
        _store_sum(sums.carry, sizes.chunks, chunk, sizes.width, columns, older)
        older = _fallen(older, part.decay, sizes.chunk_tiles, False, C)
        older = _Sum(older.maximum, older.normalizer + leaving.normalizer, older.total + leaving.total)


@jit
def _average(part, sizes, panel, tile, C: tl.constexpr):
    """The output of the queries of a tile."""
    q = _load(part.query, part.value_columns, tile * C.BLOCK_T, sizes.length, 0.0, C.BLOCK_T, C)
    gate, _ = _gate(q, C)
    return gate * tl.where(panel.denominator < C.TINY, 0.0, panel.numerator * inverse(panel.denominator, C))


@jit
def _forward(inputs, sums, out, sizes, C: tl.constexpr):
    """Reads the inputs and carry; writes out [B, T, D], the states and the flags.

    Half precision and SHARED = 1: 8 bytes per element of the output, and 0.4 for the states; the keys of the window
    before a tile come from the cache.
    """
    block, chunk, group = _program(sizes.blocks, sizes.chunks)
    part, out = _part(inputs, sizes, block, group, C), contiguous(out, sizes.length, sizes.width)
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_B * C.BLOCK_K * C.BLOCK_R
    columns = part.value_columns
    if C.CHUNKED:
        older = _load_sum(sums.carry, sizes.chunks, chunk, sizes.width, columns, C.DTYPE)
        older = _Sum(part.reference, older.normalizer, older.total)
    else:
        older = _relative(_load_sum(sums.initial, 1, 0, sizes.width, columns, C.DTYPE), part.reference, C)
    found = tl.zeros((BLOCK_T, COLUMNS), tl.int32)
    first = chunk * sizes.chunk_tiles
    for tile in tl.range(first, tl.minimum(first + sizes.chunk_tiles, sizes.tiles), num_stages=2):
        _store_sum(sums.states, sizes.tiles, tile, sizes.width, columns, older)
        panel, older = _panel(part, sizes, older, tile, C)
        older = _fallen(older, part.decay, 1, False, C)
        found |= _underflows(panel, part, sizes, tile, C)
        _store(out, columns, tile * BLOCK_T, sizes.length, _average(part, sizes, panel, tile, C), BLOCK_T, C)
    _raise_flag(sums, found)


@jit
def _forward_in_log_space(inputs, sums, out, sizes, C: tl.constexpr):
    """Writes out and the states again, for the whole sequence, where there is a flag."""
    block, _, group = _program(sizes.blocks, 1)
    if _flagged(sums, sizes, block, group):
        part = _part(inputs, sizes, block, group, C)
        columns, rows = part.value_columns, contiguous(out, sizes.length, sizes.width)
        older = _load_sum(sums.initial, 1, 0, sizes.width, columns, C.DTYPE)
        for tile in range(sizes.tiles):
            _store_sum(sums.states, sizes.tiles, tile, sizes.width, columns, older)
            panel, older = _exact_panel(part, sizes, older, tile, C)
            older = _fallen(older, part.decay, 1, True, C)
            y = _average(part, sizes, panel, tile, C)
            _store(rows, columns, tile * C.BLOCK_T, sizes.length, y, C.BLOCK_T, C)


@jit
def _backward_sums(grad, inputs, sums, sizes, C: tl.constexpr):
    """What the queries of each chunk send back to the keys older than its first panel, into carry.

    A chunk of queries starts later than the chunk of keys by the tiles that a window reaches into. Reads grad
    [B, T, D], all inputs and the states.
    """
    block, chunk, group = _program(sizes.blocks, sizes.chunks)
    part, grad = _part(inputs, sizes, block, group, C), contiguous(grad, sizes.length, sizes.width)
    sent = _nothing_sent(C)
    first = chunk * sizes.chunk_tiles + C.PAST // C.BLOCK_T
    stop = tl.minimum(first + sizes.chunk_tiles, sizes.tiles)
    for step in range(stop - first):
        tile = stop - 1 - step
        older = _load_sum(sums.states, sizes.tiles, tile, sizes.width, part.value_columns, C.DTYPE)
        _, _, _, _, _, more = _query_gradients(grad, part, sizes, older, tile, False, C)
        sent = _sent_on(_risen(sent, part.decay, 1, False, C), more, False, C)
    _store_sum(sums.carry, sizes.chunks, chunk, sizes.width, part.value_columns, sent)


@jit
def _backward_scan(inputs, sums, sizes, C: tl.constexpr):
    """Replaces what each chunk sends back, in carry, by what everything after it does."""
    block, _, group = _program(sizes.blocks, 1)
    part = _part(inputs, sizes, block, group, C)
    columns = part.value_columns
    sent = _nothing_sent(C)
    for step in range(sizes.chunks):
        chunk = sizes.chunks - 1 - step
        more = _Sent(*_load_sum(sums.carry, sizes.chunks, chunk, sizes.width, columns, C.DTYPE))
        _store_sum(sums.carry, sizes.chunks, chunk, sizes.width, columns, sent)
        sent = _sent_on(_risen(sent, part.decay, sizes.chunk_tiles, False, C), more, False, C)


@jit
def _block_gradients(
    part, sizes, maximum, sent, g, c, logits, tile, stop, block, EXACT: tl.constexpr, C: tl.constexpr
):
    """Gradients of the keys and values of one block of a panel [BLOCK_T, columns], and, into `logits`, of its w.

    Keys of the first block enter the sum of the older ones: they also get what the later queries, which see them with
    bias 0, send back. The queries belong to the chunk if there are any, before the tile `stop`.
    """
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_B * C.BLOCK_K * C.BLOCK_R
    t0 = tile * BLOCK_T
    start = t0 - C.PAST + block * BLOCK_T
    dw = tl.zeros((BLOCK_T, BLOCK_T), C.DTYPE)
    if EXACT:
        dk = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
        dv = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
        for j in range(BLOCK_T):
            this = tl.arange(0, BLOCK_T) == j
            k_j, v_j = _load_keys(part, sizes, start + j, t0, 1, C)
            w_j = _log_weights(part.bias, sizes, t0, t0 - start - j, 1, C)
            e = exp(k_j + w_j - maximum, C)
            d_logits = e * (g * v_j - c)
            dv += tl.where(this[:, None], tl.sum(e * g, 0)[None, :], 0.0)
            dk += tl.where(this[:, None], tl.sum(d_logits, 0)[None, :], 0.0)
            dw += tl.where(this[None, :], tl.sum(d_logits, 1)[:, None], 0.0)
        if block == 0:
            k, v = _load_keys(part, sizes, start, t0, BLOCK_T, C)
            entering = exp(k - finite(sent.maximum)[None, :], C)
            dv += entering * sent.g[None, :]
            dk += entering * (v * sent.g[None, :] - sent.c[None, :])
    else:
        e, v = _load_exp(part, sizes, start, t0, C)
        w = _weights(part, tile, block, C)
        sum_g, sum_c = _dot(tl.trans(w), g, C), _dot(tl.trans(w), c, C)
        if block == 0:
            sum_g += sent.g[None, :]
            sum_c += sent.c[None, :]
        dv = e * sum_g
        dk = dv * v - e * sum_c
        if C.LOGITS != "none":
            dw = _dot(g, tl.trans(e * v), C) - _dot(c, tl.trans(e), C)
            dw *= w.to(C.DTYPE)
    if C.LOGITS != "none":
        pointers = tl.arange(0, BLOCK_T)[:, None] * (C.PAST + BLOCK_T) + tl.arange(0, BLOCK_T)[None, :]
        pointers += logits + block * BLOCK_T
        if C.LOGITS == "each":
            pointers += tl.maximum(tile, 0).to(tl.int64) * (BLOCK_T * (C.PAST + BLOCK_T))
        place = tl.zeros((BLOCK_T, BLOCK_T), tl.int32) + tile
        exists = (place >= 0) & (place < stop)
        if C.LOGITS == "sum":
            dw += tl.load(pointers, mask=exists & (place < stop - 1), other=0.0)
        tl.store(pointers, dw, mask=exists)
    return dk, dv


@jit
def _slot(scratch, index, C: tl.constexpr):
    """Addresses [BLOCK_T, columns] of a block of the ring, for gradients of keys; those of values are PAST rows on."""
    COLUMNS: tl.constexpr = C.BLOCK_B * C.BLOCK_K * C.BLOCK_R
    row = index % (C.PAST // C.BLOCK_T) * C.BLOCK_T + tl.arange(0, C.BLOCK_T)
    return scratch + (row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@jit
def _logits_of(gradients, sizes, block, group, chunk, C: tl.constexpr):
    """Where the gradients of the panels of a chunk begin."""
    index, size = block * sizes.groups + group, C.BLOCK_T * (C.PAST + C.BLOCK_T)
    if C.LOGITS == "each":
        return gradients.logits + index * sizes.tiles * size
    else:
        return gradients.logits + (index * sizes.chunks + chunk) * size


@jit
def _backward_tiles(
    grad, part, sums, sent, scratch, gradients, sizes, block, chunk, group, stop,
    EXACT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of the queries and keys from those of a chunk on to before the tile `stop`, given what all queries
    send back that are later than the panels with these keys. Returned are what the queries from the first tile on
    send back, as of that tile, and which numbers need log space."""
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_B * C.BLOCK_K * C.BLOCK_R
    PAST_BLOCKS: tl.constexpr = C.PAST // BLOCK_T
    columns = part.value_columns
    _, _, share_block = _block(block, sizes, C)
    batch, key, exists = _key_columns(block, group, tl.arange(0, C.BLOCK_B * C.BLOCK_K), 1, sizes, C)
    block_keys = Columns(batch + share_block * sizes.batches, key, exists)
    keys = sizes.left + sizes.length
    d_query = contiguous(gradients.query, sizes.length, sizes.width)
    d_value = contiguous(gradients.value, keys, sizes.width)
    d_key = contiguous(gradients.key, keys, sizes.width // C.SHARED)
    logits = _logits_of(gradients, sizes, block, group, chunk, C)
    grad = contiguous(grad, sizes.length, sizes.width)
    scratch += tl.program_id(0).to(tl.int64) * (2 * C.PAST * COLUMNS)

    zeros = tl.zeros((BLOCK_T, COLUMNS), tl.int32)
    found, to_older = zeros, sent
    # What the later tiles have sent to the keys of this one.
    waiting_dk = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
    waiting_dv = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
    # The keys of a chunk are also seen by the first queries after it; the keys of the first chunk begin before it.
    first = tl.where(chunk == 0, -((sizes.left + BLOCK_T - 1) // BLOCK_T), chunk * sizes.chunk_tiles)
    last = tl.minimum(stop + PAST_BLOCKS, sizes.tiles) - 1
    for step in tl.range(0, last - first + 1, num_stages=1):  # scratch must not be read ahead
        tile = last - step
        own = tile < stop
        older = _load_sum(sums.states, sizes.tiles, tl.maximum(tile, 0), sizes.width, columns, C.DTYPE)
        if EXACT:
            older = _fallen(older, part.decay, tl.minimum(tile, 0), EXACT, C)  # before the first tile it has not yet
        maximum, more_found, dq, g, c, more = _query_gradients(grad, part, sizes, older, tile, EXACT, C)
        found |= more_found
        _store(d_query, columns, tile * BLOCK_T, tl.where(own, sizes.length, 0), dq, BLOCK_T, C)
        sent = _risen(sent, part.decay, 1, EXACT, C)
        dk, dv = _block_gradients(part, sizes, maximum, sent, g, c, logits, tile, stop, PAST_BLOCKS, EXACT, C)
        dk += waiting_dk
        dv += waiting_dv
        row, end = tile * BLOCK_T + sizes.left, tl.where(own, sizes.length + sizes.left, 0)
        _store(d_value, columns, row, end, dv, BLOCK_T, C)
        if C.BLOCK_R > 1:
            dk = tl.sum(tl.reshape(dk, (BLOCK_T, C.BLOCK_B * C.BLOCK_K, C.BLOCK_R)), 2)
        _store(d_key, block_keys, row, end, dk, BLOCK_T, C)
        if C.PAST > 0:
            waiting_dk, waiting_dv = _block_gradients(
                part, sizes, maximum, sent, g, c, logits, tile, stop, PAST_BLOCKS - 1, EXACT, C
            )
        if PAST_BLOCKS > 1:
            # Those of the blocks before wait in a ring, the newest of which comes out.
            slot, later = _slot(scratch, step, C), zeros + step > 0
            waiting_dk += tl.load(slot, mask=later, other=0.0)
            waiting_dv += tl.load(slot + C.PAST * COLUMNS, mask=later, other=0.0)
            for back in range(1, PAST_BLOCKS):
                more_dk, more_dv = _block_gradients(
                    part, sizes, maximum, sent, g, c, logits, tile, stop, PAST_BLOCKS - 1 - back, EXACT, C
                )
                slot = _slot(scratch, step + back, C)
                waits = later & (zeros + back < PAST_BLOCKS - 1)
                tl.store(slot, more_dk + tl.load(slot, mask=waits, other=0.0))
                slot += C.PAST * COLUMNS
                tl.store(slot, more_dv + tl.load(slot, mask=waits, other=0.0))
            tl.debug_barrier()  # what a thread left in a buffer, another may read for the next tile
        sent = _sent_on(sent, more, EXACT, C)
        to_older = _Sent(
            tl.where(tile == 0, sent.maximum, to_older.maximum),
            tl.where(tile == 0, sent.g, to_older.g),
            tl.where(tile == 0, sent.c, to_older.c),
        )
    return to_older, found


@jit
def _store_older(gradients, part, sizes, sent, scale):
    """The gradients of the initial sum."""
    columns = part.value_columns
    pointers = gradients.older + (columns.batch.to(tl.int64) * (2 * sizes.width) + columns.channel)
    tl.store(pointers, sent.g * scale, mask=columns.exists)
    tl.store(pointers + sizes.width, sent.c * scale, mask=columns.exists)


@jit
def _backward(grad, inputs, sums, scratch, gradients, sizes, C: tl.constexpr):
    """Reads grad [B, T, D], the inputs, the states and, of several chunks, carry; writes the gradients and the flags.

    scratch [programs, 2, PAST, columns] is the program's own. Half precision and SHARED = 1: 14 bytes per element.
    """
    block, chunk, group = _program(sizes.blocks, sizes.chunks)
    part = _part(inputs, sizes, block, group, C)
    sent = _nothing_sent(C)
    if C.CHUNKED:
        sent = _Sent(*_load_sum(sums.carry, sizes.chunks, chunk, sizes.width, part.value_columns, C.DTYPE))
    stop = tl.minimum((chunk + 1) * sizes.chunk_tiles, sizes.tiles)
    to_older, found = _backward_tiles(
        grad, part, sums, sent, scratch, gradients, sizes, block, chunk, group, stop, False, C
    )
    if chunk == 0:
        initial = _load_sum(sums.initial, 1, 0, sizes.width, part.value_columns, C.DTYPE)
        _store_older(gradients, part, sizes, to_older, exp(initial.maximum - part.reference, C))
    _raise_flag(sums, found)


@jit
def _backward_in_log_space(grad, inputs, sums, scratch, gradients, sizes, C: tl.constexpr):
    """Writes the gradients again, for the whole sequence, where there is a flag."""
    block, _, group = _program(sizes.blocks, 1)
    if _flagged(sums, sizes, block, group):
        part = _part(inputs, sizes, block, group, C)
        if C.LOGITS == "sum":  # all of it goes to the first chunk
            logits = _logits_of(gradients, sizes, block, group, 0, C)
            place = tl.arange(0, C.BLOCK_T)
            for row in range(C.PAST + C.BLOCK_T, sizes.chunks * (C.PAST + C.BLOCK_T)):
                tl.store(logits + row * C.BLOCK_T + place, tl.zeros_like(place).to(C.DTYPE))
        to_older, _found = _backward_tiles(
            grad, part, sums, _nothing_sent(C), scratch, gradients, sizes, block, 0, group, sizes.tiles, True, C
        )
        _store_older(gradients, part, sizes, to_older, 1.0)


# -------------------------------------------------------------------------------------------------------- operators


def _inputs(query, key, value, rows, reference, weights, maxima, decay) -> _Inputs:
    bias = _Bias(query, query, query, 0, 0, 0, 0, 0, 0)  # some addresses: they are not read
    if rows is not None:
        (row_head, row_batch, row, _), (tile_head, tile_batch, tile, _) = (
            tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            for tensor in (rows, maxima)
        )
        bias = _Bias(rows, weights, maxima, row_head, row_batch, row, tile_head, tile_batch, tile)
    decay = query if decay is None else decay
    return _Inputs(matrix(query), matrix(key), matrix(value), reference, bias, decay)


def _past(rows: Tensor | None) -> int:
    """The keys of a panel before its own."""
    return 0 if rows is None else ceil_divide(max(rows.shape[3] - 1, 1), _BLOCK_T) * _BLOCK_T


def _plan(query, key, value, rows, decay, activation, direction) -> tuple[_Sizes, _Constants, dict]:
    """How the work is cut: what all kernels of one direction share, and the options that they are compiled with."""
    batch, length, width = query.shape
    heads = 1 if rows is None else rows.shape[0]
    head_keys, shared = key.shape[2] // heads, width // key.shape[2]
    layout = layout_of("simple" if rows is None else "windowed", direction, query.device)
    columns = layout["columns"] // (1 if is_half(query, key, value) else 2)
    block_r = min(power_of_two(shared), columns)
    block_k = min(power_of_two(head_keys), columns // block_r)
    block_b = 1
    if rows is None or rows.shape[1] == 1:  # rows of the batch that share their weights
        block_b = min(power_of_two(batch), columns // (block_r * block_k))
    block_k = max(block_k, 16 // (block_r * block_b))  # the smallest matrix product
    blocks = heads * ceil_divide(head_keys, block_k) * ceil_divide(shared, block_r)
    groups, tiles = ceil_divide(batch, block_b), ceil_divide(length, _BLOCK_T)
    chunk_tiles = ceil_divide(tiles, _chunks(blocks * groups, tiles, layout, query.device))
    chunks = ceil_divide(tiles, chunk_tiles)
    sizes = _Sizes(
        batches=batch,
        length=length,
        left=key.shape[1] - length,
        taps=0 if rows is None else rows.shape[3],
        width=width,
        head_keys=head_keys,
        blocks=blocks,
        groups=groups,
        tiles=tiles,
        chunk_tiles=chunk_tiles,
        chunks=chunks,
    )
    constants = _Constants(
        SHARED=shared,
        BLOCK_B=block_b,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        BLOCK_T=_BLOCK_T,
        PAST=_past(rows),
        ACTIVATION=activation,
        CHUNKED=chunks > 1,
        EVEN=batch % block_b == head_keys % block_k == shared % block_r == 0,
        **numerics(query, key, value),
        DECAY=decay is not None,
        LOGITS="none",
    )
    return sizes, constants, {"num_warps": layout["num_warps"]}


def _chunks(programs: int, tiles: int, layout: dict[str, int], device: torch.device) -> int:
    """Into how many chunks of time to cut the work of so many programs: 1 where they fill the chip without."""
    wanted = layout["processor_warps"] * processor(device)[1]
    return max(1, min(ceil_divide(wanted, programs * layout["num_warps"]), tiles // 8))


def _sums_like(query, key, value, count):
    dtype = compute_dtype(query, key, value)
    return query.new_empty(query.shape[0], count, 3, query.shape[2], dtype=dtype)


def _weights_like(query, key, value, rows) -> tuple[Tensor, Tensor]:
    """Buffers for the weights and their maxima, empty without a bias."""
    dtype, factor = compute_dtype(query, key, value), factor_dtype(query, key, value)
    if rows is None:
        return query.new_empty(0, dtype=factor), query.new_empty(0, dtype=dtype)
    heads, batch, length, _ = rows.shape
    size = (heads, batch, 1 if length == 1 else ceil_divide(length, _BLOCK_T), _BLOCK_T)
    return query.new_empty(*size, _past(rows) + _BLOCK_T, dtype=factor), query.new_empty(size, dtype=dtype)


@torch.library.custom_op(f"{_NAMESPACE}::windowed_triton", mutates_args=())
@on_its_device
def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    initial: Tensor,
    decay: Tensor | None,
    query_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Result [B, T, D], the states of [`_Sums`], the reference of [`_Inputs`], the weights and maxima of [`_Bias`].

    query [B, T, D], key [B, L+T, K], value [B, L+T, D], rows [heads, 1 or B, 1 or T, n], initial [B, 3, D] as it is
    at the end of the first tile, decay [K].
    """
    weights, maxima = _weights_like(query, key, value, rows)
    sizes, constants, options = _plan(query, key, value, rows, decay, query_activation, "forward")
    reference = torch.maximum(key.amax(1).to(initial.dtype), initial[:, 0, :: constants.SHARED])
    inputs = _inputs(query, key, value, rows, reference, weights, maxima, decay)
    sequences = (sizes.blocks * sizes.groups,)
    programs = (sizes.blocks * sizes.groups * sizes.chunks,)
    out = query.new_empty(query.shape)
    states = _sums_like(query, key, value, sizes.tiles)
    sums = _Sums(initial, states, states, query.new_empty(programs, dtype=torch.int32))
    if rows is not None:
        heads, batches, tiles, _ = maxima.shape
        _lay_out_weights[(heads * batches * tiles,)](inputs.bias, heads, batches, sizes, constants, num_warps=1)
    if sizes.chunks > 1:
        sums = sums._replace(carry=_sums_like(query, key, value, sizes.chunks))
        _forward_sums[programs](inputs, sums.carry, sizes, constants, **options)
        _forward_scan[sequences](inputs, sums, sizes, constants, num_warps=1)
    _forward[programs](inputs, sums, out, sizes, constants, **options)
    _forward_in_log_space[sequences](inputs, sums, out, sizes, constants, num_warps=4)
    return out, states, reference, weights, maxima


@_windowed.register_fake
def _(query, key, value, rows, initial, decay, query_activation):
    states = _sums_like(query, key, value, ceil_divide(query.shape[1], _BLOCK_T))
    reference = states.new_empty(key.shape[0], key.shape[2])
    return query.new_empty(query.shape), states, reference, *_weights_like(query, key, value, rows)


@flops_of(_windowed)
def _windowed_flops(query, key, value, rows, *_):
    batch, length, width = query.shape
    tiles = ceil_divide(length, _BLOCK_T)
    return 2 * batch * tiles * _BLOCK_T * (_past(rows) + _BLOCK_T) * 2 * width  # a denominator for each channel


@torch.library.custom_op(f"{_NAMESPACE}::windowed_triton_backward", mutates_args=())
@on_its_device
def _windowed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    initial: Tensor,
    decay: Tensor | None,
    states: Tensor,
    reference: Tensor,
    weights: Tensor,
    maxima: Tensor,
    query_activation: str,
    needs_rows: bool,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, rows (empty unless `needs_rows`), initial and decay (empty unless
    `needs_decay`)."""
    inputs = _inputs(query, key, value, rows, reference, weights, maxima, decay)
    sizes, constants, options = _plan(query, key, value, rows, decay, query_activation, "backward")
    batch, blocks, groups, chunks = sizes.batches, sizes.blocks, sizes.groups, sizes.chunks
    programs = blocks * groups * chunks
    sums = _Sums(initial, states, states, query.new_empty(programs, dtype=torch.int32))
    if chunks > 1:
        sums = sums._replace(carry=_sums_like(query, key, value, chunks))
        _backward_sums[(programs,)](grad, inputs, sums, sizes, constants, **options)
        _backward_scan[(blocks * groups,)](inputs, sums, sizes, constants, num_warps=1)

    share_blocks = ceil_divide(constants.SHARED, constants.BLOCK_R)
    d_query, d_value = query.new_empty(query.shape), value.new_empty(value.shape)
    in_parts = share_blocks > 1 or needs_decay  # to be added up before they are rounded
    d_key = key.new_empty(share_blocks, *key.shape, dtype=states.dtype if in_parts else key.dtype)
    d_older = states.new_empty(batch, 2, sizes.width)
    d_logits, kind = states.new_empty(0), "none"
    if needs_rows:
        kind = "each" if rows.shape[2] > 1 else "sum"
        count = sizes.tiles if kind == "each" else chunks
        d_logits = states.new_empty(blocks, groups, count, _BLOCK_T, constants.PAST + _BLOCK_T)
    gradients = _Gradients(d_query, d_key, d_value, d_logits, d_older)
    waiting = constants.PAST if constants.PAST > _BLOCK_T else 0
    scratch = states.new_empty(programs, 2, waiting, constants.BLOCK_B * constants.BLOCK_K * constants.BLOCK_R)
    arguments = grad, inputs, sums, scratch, gradients, sizes, constants._replace(LOGITS=kind)
    # Loops inside of these must not read the scratch buffer ahead either: hence one stage.
    _backward[(programs,)](*arguments, **options, num_stages=1)
    _backward_in_log_space[(blocks * groups,)](*arguments, num_warps=4, num_stages=1)

    d_key = d_key[0] if share_blocks == 1 else d_key.sum(0)
    d_rows = _gradient_of_rows(d_logits, rows) if needs_rows else states.new_empty(0)
    d_total, d_normalizer = d_older[:, 0], -d_older[:, 1]
    d_maximum = initial[:, 1] * d_normalizer + initial[:, 2] * d_total
    d_initial = torch.stack([d_maximum, d_normalizer, d_total], 1)
    d_decay = states.new_empty(0)
    if needs_decay:
        middle = key.shape[1] / 2
        d_initial_key = d_maximum.double().unflatten(1, (-1, constants.SHARED)).sum((0, 2))
        d_decay = moment(d_key.sum(0), -middle)
        d_decay += moment(d_initial_key[None], sizes.left + _BLOCK_T - 1 - middle)
        d_decay = d_decay.to(decay.dtype)
    return d_query, d_key.to(key.dtype), d_value, d_rows, d_initial, d_decay


def _gradient_of_rows(d_logits: Tensor, rows: Tensor) -> Tensor:
    """The gradient of rows [heads, 1 or B, 1 or T, n] from that of the panels, see [`_Gradients`]."""
    heads, batch, length, taps = rows.shape
    d_logits = d_logits.unflatten(0, (heads, -1)).sum(1)  # over the blocks of each head
    if batch == 1:
        d_logits = d_logits.sum(1, keepdim=True)
    if length == 1:
        d_logits = d_logits.sum(2, keepdim=True)
    past = d_logits.shape[4] - _BLOCK_T
    d_logits = d_logits.contiguous()
    # Query q of a tile has tap j at the key PAST + q - j of its panel.
    *steps, row, _ = d_logits.stride()
    size = (*d_logits.shape[:4], taps)
    band = d_logits.as_strided(size, (*steps, row + 1, 1), past - taps + 1).flip(4)
    if length == 1:
        return band.sum(3).to(rows.dtype)
    return band.flatten(2, 3)[:, :, :length].to(rows.dtype)


@_windowed_backward.register_fake
def _(grad, query, key, value, rows, initial, decay, states, *others):
    *_, needs_rows, needs_decay = others
    like = [t.new_empty(t.shape) for t in (query, key, value)]
    d_rows = rows.new_empty(rows.shape) if needs_rows else states.new_empty(0)
    d_decay = decay.new_empty(decay.shape) if needs_decay else states.new_empty(0)
    return *like, d_rows, states.new_empty(initial.shape), d_decay


@flops_of(_windowed_backward)
def _(grad, query, key, value, rows, *others):
    *_, needs_rows, _ = others
    # The products of the forward pass, again, and the two gradients of each.
    return (2 + needs_rows) * _windowed_flops(query, key, value, rows)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.query_activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    needs_rows, needs_decay = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    grads = _windowed_backward(grad.contiguous(), *ctx.saved_tensors, ctx.query_activation, needs_rows, needs_decay)
    *grads, d_rows, d_initial, d_decay = grads
    return (*grads, d_rows if needs_rows else None, d_initial, d_decay if needs_decay else None, None)


_windowed.register_autograd(_differentiate, setup_context=_save_for_backward)


def windowed_triton(window: Window) -> Tensor:
    """
    See [`Window`], causal. A query that sees no key gives 0, with zero gradients. The sums are taken in float32, or in
    float64 if an input is. Products of bfloat16 inputs are taken in bfloat16, those of float16 in tf32, and added up
    in float32.
    """
    query, key, value, rows, past, (maximum, normalizer, average), _, activation, decay = window
    if past is not None:
        key, value = torch.cat([past[0].to(key.dtype), key], 1), torch.cat([past[1].to(value.dtype), value], 1)
    dtype = compute_dtype(query, key, value)
    maximum = decayed(maximum, decay, window.left + _BLOCK_T)  # from before the past to the end of the first tile
    maximum, normalizer = (spread(tensor.to(dtype), average) for tensor in (maximum, normalizer))
    initial = torch.stack([maximum, normalizer, normalizer * average.to(dtype)], 1)
    query, key, value, rows = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, rows)
    )
    return _windowed(query, key, value, rows, initial, decay, activation)[0]
