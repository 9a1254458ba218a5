# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The causal windowed forms of AFT (simple, local, conv) as Triton kernels for NVIDIA GPUs.

A program owns a block of channels of one sequence and walks over time in tiles of BLOCK_T queries. The panel of a tile
has its own keys and the PAST >= n - 1 keys before them, in blocks of BLOCK_T; everything older is one sum, a triple
(maximum, sum of exp(k - maximum), the same sum weighted with the values), carried from tile to tile in registers. A
panel is computed as exp(w - row max) @ exp(k - column max) on the tensor cores, which is exact wherever the
denominator does not underflow; a tile with a row where it does is computed again in log space, key by key. Simple is
the case w = 0, PAST = 0, where the product is a cumulative sum.

The backward pass walks the tiles in reverse. It computes each panel again from the sums that the forward pass left at
each tile, so both directions read every input from memory once. The gradient of a key is complete once the first
panel that sees it is done: until then it waits in a scratch buffer, and what all queries beyond the window add to it
comes from one more carried sum. No float atomics: results are the same in every run.

With a decay the keys of a panel, and the sum of the older ones, count as they are at the last query of the tile: what
remains to each query is a factor that all its keys share. From tile to tile they fall by the decay of BLOCK_T tokens.

Where batch x channels cannot fill the chip, time is cut into chunks: one kernel sums up each chunk, a second adds the
sums up, and the main kernel runs all chunks at once.

Kernels take records: the `inputs`, the `sizes`, and C, what the code is compiled for. Names of sizes: K key channels,
D = K x SHARED value channels (SHARED of them share a key channel), n taps (0 for simple). Channels are cut into blocks
of BLOCK_K x BLOCK_R, BLOCK_R value channels for each of BLOCK_K keys: the columns of a program's tiles.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_operators import flops_of, operator_namespace
from .ops_state import compute_dtype, decayed, moment, spread
from .ops_windows import Window


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)


_NAMESPACE = operator_namespace(__name__)
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # decided when triton is imported
_TINY = {torch.float32: 1e-25, torch.float64: 1e-250}  # denominators below are computed again in log space
_LARGEST = {torch.float32: 1e30, torch.float64: 1e250}  # of the gradients of a row outside of log space
_BLOCK_T = 64  # queries of a tile, and keys of a block
# How a program is laid out without and with a window: channels, warps, and registers per thread (more would spill
# less, and leave too few programs on a processor to hide the latency of memory).
_FORWARD = ({"channels": 32, "num_warps": 4, "maxnreg": 128}, {"channels": 32, "num_warps": 8, "maxnreg": 128})
_BACKWARD = ({"channels": 32, "num_warps": 8, "maxnreg": 128}, {"channels": 32, "num_warps": 8, "maxnreg": 255})


def triton_can_run(device: torch.device) -> bool:
    """Whether triton is there, and the device one that it has code for, as the CPU is for its interpreter."""
    return triton is not None and (device.type == "cuda" or _INTERPRETED)


def _jit(function):
    return function if triton is None else triton.jit(function)


# ---------------------------------------------------------------------------------------------------------- records


class _Matrix(NamedTuple):
    """
    A tensor [batches, rows, channels], its channels side by side: what a kernel needs to know of it.

    Attributes:
        start: the tensor; in a kernel, the address of its first element.
        batch, row: how many elements lie between two batches, and between two rows.
    """

    start: Any
    batch: int
    row: int


class _Inputs(NamedTuple):
    """query [B, T, D], key [B, L+T, K], value [B, L+T, D], bias of the window [heads x B, T, n] and decay [K] (unread
    without)."""

    query: _Matrix
    key: _Matrix
    value: _Matrix
    rows: _Matrix
    head: int  # how many elements lie between two heads of the bias
    decay: Any


class _Sums(NamedTuple):
    """Buffers of triples: states [B, tiles, 3, D] at the tiles, and carry [B, chunks, 3, D] at the chunks."""

    states: Any
    carry: Any


class _Gradients(NamedTuple):
    """
    Where they go: contiguous tensors.

    Attributes:
        query, value: [B, T, D] and [B, L+T, D].
        key: [share blocks, B, L+T, K]. Each block of value channels adds its part.
        rows: with a row per query [blocks, B, T, n], else [blocks, B, chunks, BLOCK_T, n], added up over the tiles of
            the chunk.
        older: [B, 2, D], what all queries send back to the sum of the keys before the first one.
    """

    query: Any
    key: Any
    value: Any
    rows: Any
    older: Any


class _Sizes(NamedTuple):
    """
    Numbers that the code is not compiled for.

    Attributes:
        batches, length, left, taps: B, T, L and n.
        width, head_keys: D, and the key channels of a head of the bias.
        blocks: of channels, in a sequence.
        tiles, chunk_tiles, chunks: of time: in a sequence, in a chunk, and chunks of a sequence.
    """

    batches: int
    length: int
    left: int
    taps: int
    width: int
    head_keys: int
    blocks: int
    tiles: int
    chunk_tiles: int
    chunks: int


class _Constants(NamedTuple):
    """
    What a kernel is compiled for. Triton 3.6 takes no field of it in a shape, and no string as an argument of another
    function: hence constants BLOCK_T and COLUMNS of functions, and C whole as an argument.

    Attributes:
        SHARED, BLOCK_K, BLOCK_R, BLOCK_T: see above; the last is the number of queries of a tile.
        PAST: the keys of a panel before its own, 0 without a window.
        DTYPE, TINY, LARGEST: of the computation, and the bounds beyond which it is done in log space.
        PRECISION: of matrix products.
        STAGES: how many tiles are in flight in the main kernels.
        CHUNKED: whether there are several chunks.
        DECAY: whether there is one.
        ROWS: the gradient of the bias: "none", "each" (a row per query) or "sum" (one row for all).
    """

    SHARED: int
    BLOCK_K: int
    BLOCK_R: int
    BLOCK_T: int
    PAST: int
    DTYPE: Any
    TINY: float
    LARGEST: float
    PRECISION: str
    ACTIVATION: str
    STAGES: int
    CHUNKED: bool
    DECAY: bool
    ROWS: str


# Records that kernels make.


class _Columns(NamedTuple):
    """The channel of each column of a tile, and whether there is one."""

    channel: Any
    exists: Any


class _Part(NamedTuple):
    """What a program works on: the inputs from its sequence and head on, its columns of them, and the decay of each.

    (A field must not be called `values` or `type`: Triton's tuples have these.)
    """

    query: _Matrix
    key: _Matrix
    value: _Matrix
    rows: _Matrix
    key_columns: _Columns
    value_columns: _Columns
    decay: Any


class _Sum(NamedTuple):
    """Of keys: their maximum, the sum of exp(k - maximum), the same weighted with the values."""

    maximum: Any
    normalizer: Any
    total: Any


class _Panel(NamedTuple):
    """Denominators and numerators relative to exp(row_maximum + column_maximum): [BLOCK_T, columns]."""

    row_maximum: Any
    column_maximum: Any
    denominator: Any
    numerator: Any


class _Sent(NamedTuple):
    """What queries send back to the older keys, whose gradients it gives if multiplied with exp(k - maximum)."""

    maximum: Any
    g: Any
    c: Any


# ---------------------------------------------------------------------------------------------------------- helpers


@_jit
def _finite(maximum):
    """Replaces the maximum of nothing (minus infinity), so that differences with it stay numbers."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@_jit
def _program(blocks, chunks):
    """Channel block, chunk and row of the batch of this program; neighbours in memory run side by side."""
    index = tl.program_id(0)
    return index % blocks, (index // blocks) % chunks, (index // (blocks * chunks)).to(tl.int64)


@_jit
def _block(block, sizes, C: tl.constexpr):
    """Head of the bias, first key channel in it, and which block of the value channels of each key."""
    share_blocks: tl.constexpr = (C.SHARED + C.BLOCK_R - 1) // C.BLOCK_R
    key_blocks = (sizes.head_keys + C.BLOCK_K - 1) // C.BLOCK_K
    head = block // (key_blocks * share_blocks)
    return head, (block // share_blocks) % key_blocks * C.BLOCK_K, block % share_blocks


@_jit
def _columns(block, sizes, C: tl.constexpr):
    """The key and the value channels of a block, as many of each."""
    head, first, share_block = _block(block, sizes, C)
    # 4 channels per thread, not the 8 of the widest load: each thread holds a copy of the sums of its channels.
    column = tl.max_contiguous(tl.arange(0, C.BLOCK_K * C.BLOCK_R), [4])
    key = first + column // C.BLOCK_R
    share = share_block * C.BLOCK_R + column % C.BLOCK_R
    exists = (key < sizes.head_keys) & (share < C.SHARED)
    key += head * sizes.head_keys
    return _Columns(key, exists), _Columns(key * C.SHARED + share, exists)


@_jit
def _at(matrix, batch):
    """The matrix from this batch on."""
    return _Matrix(matrix.start + batch * matrix.batch, matrix.batch, matrix.row)


@_jit
def _contiguous(pointer, batch, rows, width):
    """A contiguous tensor [., rows, width] from this batch on."""
    return _Matrix(pointer + batch * rows * width, rows * width, width)


@_jit
def _load_decay(pointer, columns, C: tl.constexpr):
    """The decay of each key channel of some columns."""
    decay = tl.zeros((C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    if C.DECAY:
        decay = tl.load(pointer + columns.channel, mask=columns.exists, other=0.0).to(C.DTYPE)
    return decay


@_jit
def _part(inputs, sizes, block, batch, C: tl.constexpr):
    """What the program of this block and row of the batch works on."""
    keys, values = _columns(block, sizes, C)
    head, _, _ = _block(block, sizes, C)
    rows = _at(inputs.rows, batch)
    rows = _Matrix(rows.start + head.to(tl.int64) * inputs.head, rows.batch, rows.row)
    query, key, value = _at(inputs.query, batch), _at(inputs.key, batch), _at(inputs.value, batch)
    return _Part(query, key, value, rows, keys, values, _load_decay(inputs.decay, keys, C))


@_jit
def _load(matrix, columns, start, stop, other, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Rows start to start + SIZE - 1 of those before `stop`, `other` where they do not exist: [SIZE, columns]."""
    row = tl.arange(0, SIZE)
    mask = (start + row >= 0) & (start + row < stop)
    offsets = row[:, None] * matrix.row + columns.channel[None, :]
    pointers = matrix.start + start.to(tl.int64) * matrix.row + offsets
    return tl.load(pointers, mask=mask[:, None] & columns.exists[None, :], other=other).to(DTYPE)


@_jit
def _store(matrix, columns, start, stop, tile, SIZE: tl.constexpr):
    """Writes what `_load` would read."""
    row = tl.arange(0, SIZE)
    mask = (start + row >= 0) & (start + row < stop)
    offsets = row[:, None] * matrix.row + columns.channel[None, :]
    pointers = matrix.start + start.to(tl.int64) * matrix.row + offsets
    tl.store(pointers, tile.to(matrix.start.dtype.element_ty), mask=mask[:, None] & columns.exists[None, :])


@_jit
def _load_keys(part, sizes, start, t0, SIZE: tl.constexpr, C: tl.constexpr):
    """The keys and values of the queries start to start + SIZE - 1, as they are at the end of the tile at t0."""
    row, stop = start + sizes.left, sizes.length + sizes.left
    k = _load(part.key, part.key_columns, row, stop, float("-inf"), SIZE, C.DTYPE)
    if C.DECAY:
        distance = t0 + C.BLOCK_T - 1 - start - tl.arange(0, SIZE)
        k -= distance[:, None].to(C.DTYPE) * part.decay[None, :]
    return k, _load(part.value, part.value_columns, row, stop, 0.0, SIZE, C.DTYPE)


@_jit
def _load_sum(pointer, index, width, columns, DTYPE: tl.constexpr):
    """Triple `index` of a buffer [., 3, width]."""
    pointers = pointer + index.to(tl.int64) * (3 * width) + columns.channel
    maximum = tl.load(pointers, mask=columns.exists, other=float("-inf")).to(DTYPE)
    normalizer = tl.load(pointers + width, mask=columns.exists, other=0.0).to(DTYPE)
    return _Sum(maximum, normalizer, tl.load(pointers + 2 * width, mask=columns.exists, other=0.0).to(DTYPE))


@_jit
def _store_sum(pointer, index, width, columns, triple):
    first, second, third = triple
    pointers = pointer + index.to(tl.int64) * (3 * width) + columns.channel
    tl.store(pointers, first, mask=columns.exists)
    tl.store(pointers + width, second, mask=columns.exists)
    tl.store(pointers + 2 * width, third, mask=columns.exists)


@_jit
def _merge(one, other):
    """Adds up two sums over disjoint keys."""
    maximum = tl.maximum(one.maximum, other.maximum)
    scale, other_scale = tl.exp(one.maximum - _finite(maximum)), tl.exp(other.maximum - _finite(maximum))
    normalizer = one.normalizer * scale + other.normalizer * other_scale
    return _Sum(maximum, normalizer, one.total * scale + other.total * other_scale)


@_jit
def _fallen(sum, decay, tiles, C: tl.constexpr):
    """A sum of keys as it is some tiles later."""
    return _Sum(sum.maximum - decay * (tiles * C.BLOCK_T), sum.normalizer, sum.total)


@_jit
def _risen(sent, decay, tiles, C: tl.constexpr):
    """What queries send back, for keys as they were some tiles earlier."""
    return _Sent(sent.maximum + decay * (tiles * C.BLOCK_T), sent.g, sent.c)


@_jit
def _merge_sent(later, sent):
    """Adds what the queries of a tile send back to what all later ones do."""
    # Without later queries the maximum is plus infinity, and there is nothing to scale.
    scale = tl.exp(sent.maximum - _finite(later.maximum))
    scale = tl.where(later.maximum == float("inf"), 0.0, scale)
    return _Sent(sent.maximum, later.g * scale + sent.g, later.c * scale + sent.c)


@_jit
def _log_weights(part, sizes, t0, shift, KEYS: tl.constexpr, C: tl.constexpr):
    """w [BLOCK_T, KEYS] of queries t0, ... and keys t0 - shift, ...: minus infinity for keys that come later."""
    query = tl.arange(0, C.BLOCK_T)[:, None]
    tap = query + shift - tl.arange(0, KEYS)[None, :]
    weights = tl.where(tap >= 0, 0.0, float("-inf")).to(C.DTYPE)
    if C.PAST > 0:
        inside = (tap >= 0) & (tap < sizes.taps) & (t0 + query >= 0) & (t0 + query < sizes.length)
        pointers = part.rows.start + t0.to(tl.int64) * part.rows.row + (query * part.rows.row + tap)
        weights += tl.load(pointers, mask=inside, other=0.0).to(C.DTYPE)
    return weights


@_jit
def _dot(a, b, C: tl.constexpr):
    return tl.dot(a, b, input_precision=C.PRECISION, out_dtype=C.DTYPE)


@_jit
def _panel(part, sizes, older, t0, C: tl.constexpr):
    """The panel of the queries t0, ..., given the sum of all older keys; and that of all older than the next panel."""
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_K * C.BLOCK_R
    denominator = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE) + older.normalizer[None, :]
    numerator = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE) + older.total[None, :]
    row_maximum = tl.zeros((BLOCK_T,), C.DTYPE)  # older keys have bias 0
    column_maximum = older.maximum
    for block in range(C.PAST // BLOCK_T + 1):
        start = t0 - C.PAST + block * BLOCK_T
        k, v = _load_keys(part, sizes, start, t0, BLOCK_T, C)
        block_maximum = tl.max(k, 0)
        e = tl.exp(k - _finite(block_maximum)[None, :])
        # The first block of this panel is older than the next. The sum of those has a maximum of its own: a later key
        # that is far larger must not wipe them out, for its bias may be as far below 0.
        leaving = tl.where(block == 0, block_maximum, float("-inf"))
        older = _merge(older, _Sum(leaving, tl.sum(e, 0), tl.sum(e * v, 0)))

        new_column_maximum = tl.maximum(column_maximum, block_maximum)
        e *= tl.exp(block_maximum - _finite(new_column_maximum))[None, :]
        scale = tl.exp(column_maximum - _finite(new_column_maximum))[None, :]
        column_maximum = new_column_maximum
        if C.PAST > 0:
            w = _log_weights(part, sizes, t0, t0 - start, BLOCK_T, C)
            new_row_maximum = tl.maximum(row_maximum, tl.max(w, 1))
            scale = scale * tl.exp(row_maximum - new_row_maximum)[:, None]
            row_maximum = new_row_maximum
            w = tl.exp(w - row_maximum[:, None])
            denominator = denominator * scale + _dot(w, e, C)
            numerator = numerator * scale + _dot(w, e * v, C)
        else:
            denominator = denominator * scale + tl.cumsum(e, 0)
            numerator = numerator * scale + tl.cumsum(e * v, 0)
    return _Panel(row_maximum, column_maximum, denominator, numerator), _fallen(older, part.decay, 1, C)


@_jit
def _exact_panel(part, sizes, older, t0, C: tl.constexpr):
    """The same in log space, key by key: largest k + w, denominator and numerator, all [BLOCK_T, columns]."""
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_K * C.BLOCK_R
    zero = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
    total = _Sum(zero + older.maximum[None, :], zero + older.normalizer[None, :], zero + older.total[None, :])
    for index in range(C.PAST + BLOCK_T):
        start = t0 - C.PAST + index
        k, v = _load_keys(part, sizes, start, t0, 1, C)
        logits = k + _log_weights(part, sizes, t0, t0 - start, 1, C)
        e = zero + 1.0
        total = _merge(total, _Sum(logits, e, e * v))
    return total


@_jit
def _underflows(panel, sizes, t0, C: tl.constexpr):
    """Whether some query of the tile needs log space. Columns without any key, or beyond the channels, do not."""
    query = t0 + tl.arange(0, C.BLOCK_T)
    counts = ((query >= 0) & (query < sizes.length))[:, None] & (panel.column_maximum > float("-inf"))[None, :]
    return tl.max(tl.max((counts & (panel.denominator < C.TINY)).to(tl.int32), 1), 0) > 0


@_jit
def _gate(query, C: tl.constexpr):
    """The activation of the query and its derivative."""
    if C.ACTIVATION == "sigmoid":
        gate = 1 / (1 + tl.exp(-query))
        slope = gate * (1 - gate)
    elif C.ACTIVATION == "tanh":
        gate = 2 / (1 + tl.exp(-2 * query)) - 1
        slope = 1 - gate * gate
    elif C.ACTIVATION == "relu":
        gate = tl.maximum(query, 0.0)
        slope = tl.where(query > 0, 1.0, 0.0).to(query.dtype)
    else:
        gate = query
        slope = tl.zeros_like(query) + 1.0
    return gate, slope


@_jit
def _query_gradients(grad, part, sizes, older, t0, C: tl.constexpr):
    """What the queries t0, ... send back: to themselves, to the keys of their panel, and to the older ones.

    With weights e_tj = exp(k_j + w_tj) relative to the maxima of the panel, or in log space, the gradient of v_j is
    sum_t e_tj g_t and that of k_j is sum_t e_tj (g_t v_j - c_t), with g = d(average) / denominator and c = g x
    average. Returned are the panel, whether log space is needed, the gradient of the queries, g, c, and their sums for
    the older keys.
    """
    panel, _ = _panel(part, sizes, older, t0, C)
    denominator, numerator = panel.denominator, panel.numerator
    weight = tl.exp(older.maximum - _finite(panel.column_maximum))[None, :] * tl.exp(-panel.row_maximum)[:, None]
    q = _load(part.query, part.value_columns, t0, sizes.length, 0.0, C.BLOCK_T, C.DTYPE)
    dy = _load(grad, part.value_columns, t0, sizes.length, 0.0, C.BLOCK_T, C.DTYPE)
    gate, slope = _gate(q, C)
    inverse = tl.where(denominator < C.TINY, 0.0, 1 / denominator)
    average = numerator * inverse
    g = dy * gate * inverse
    c = g * average
    # Weights in log space are at most 1: there no sum is larger than what it is a gradient of.
    size = tl.max(tl.max(tl.maximum(tl.abs(g), tl.abs(c)), 1), 0)
    underflow = _underflows(panel, sizes, t0, C) | (size > C.LARGEST)
    if underflow:
        reference, denominator, numerator = _exact_panel(part, sizes, older, t0, C)
        weight = tl.exp(older.maximum[None, :] - _finite(reference))
        inverse = tl.where(denominator < C.TINY, 0.0, 1 / denominator)
        average = numerator * inverse
        g = dy * gate * inverse
        c = g * average
    d_query = dy * slope * average
    return panel, underflow, d_query, g, c, _Sent(older.maximum, tl.sum(weight * g, 0), tl.sum(weight * c, 0))


# ---------------------------------------------------------------------------------------------------------- kernels


@_jit
def _forward_sums(inputs, carry, sizes, C: tl.constexpr):
    """Sum of the keys that leave the window during each chunk, into carry [B, chunks, 3, D]. Reads key and value."""
    block, chunk, batch = _program(sizes.blocks, sizes.chunks)
    part = _part(inputs, sizes, block, batch, C)
    zero = tl.zeros((C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    older = _Sum(zero + float("-inf"), zero, zero)
    for tile in range(chunk * sizes.chunk_tiles, tl.minimum((chunk + 1) * sizes.chunk_tiles, sizes.tiles)):
        t0 = tile * C.BLOCK_T
        k, v = _load_keys(part, sizes, t0 - C.PAST, t0, C.BLOCK_T, C)
        maximum = tl.max(k, 0)
        e = tl.exp(k - _finite(maximum)[None, :])
        older = _merge(older, _Sum(maximum, tl.sum(e, 0), tl.sum(e * v, 0)))
        older = _fallen(older, part.decay, 1, C)
    _store_sum(carry, batch * sizes.chunks + chunk, sizes.width, part.value_columns, older)


@_jit
def _forward_scan(carry, initial, decay, sizes, C: tl.constexpr):
    """Replaces the sum of each chunk in carry [B, chunks, 3, D] by that of everything before; initial [B, 3, D]."""
    block, _, batch = _program(sizes.blocks, 1)
    keys, columns = _columns(block, sizes, C)
    decay = _load_decay(decay, keys, C)
    older = _load_sum(initial, batch, sizes.width, columns, C.DTYPE)
    for chunk in range(sizes.chunks):
        index = batch * sizes.chunks + chunk
        leaving = _load_sum(carry, index, sizes.width, columns, C.DTYPE)
        _store_sum(carry, index, sizes.width, columns, older)
        older = _merge(_fallen(older, decay, sizes.chunk_tiles, C), leaving)


@_jit
def _forward(inputs, sums, out, sizes, C: tl.constexpr):
    """Reads the inputs and carry; writes out [B, T, D] and the states, the sums of the keys older than each panel.

    Half precision and SHARED = 1: 8 bytes per element of the output, and 0.2 for the states; the keys of the window
    before a tile come from the cache.
    """
    block, chunk, batch = _program(sizes.blocks, sizes.chunks)
    part, out = _part(inputs, sizes, block, batch, C), _contiguous(out, batch, sizes.length, sizes.width)
    older = _load_sum(sums.carry, batch * sizes.chunks + chunk, sizes.width, part.value_columns, C.DTYPE)
    first = chunk * sizes.chunk_tiles
    for tile in tl.range(first, tl.minimum(first + sizes.chunk_tiles, sizes.tiles), num_stages=C.STAGES):
        t0 = tile * C.BLOCK_T
        _store_sum(sums.states, batch * sizes.tiles + tile, sizes.width, part.value_columns, older)
        q = _load(part.query, part.value_columns, t0, sizes.length, 0.0, C.BLOCK_T, C.DTYPE)
        panel, next_older = _panel(part, sizes, older, t0, C)
        denominator, numerator = panel.denominator, panel.numerator
        if _underflows(panel, sizes, t0, C):
            _, denominator, numerator = _exact_panel(part, sizes, older, t0, C)
        older = next_older
        gate, _ = _gate(q, C)
        y = gate * tl.where(denominator < C.TINY, 0.0, numerator / denominator)
        _store(out, part.value_columns, t0, sizes.length, y, C.BLOCK_T)


@_jit
def _backward_sums(grad, inputs, sums, sizes, C: tl.constexpr):
    """What the queries of each chunk send back to the keys older than its first panel, into carry.

    A chunk of queries starts later than the chunk of keys by the tiles that a window reaches into. Reads grad
    [B, T, D], all inputs and the states.
    """
    block, chunk, batch = _program(sizes.blocks, sizes.chunks)
    part, grad = _part(inputs, sizes, block, batch, C), _contiguous(grad, batch, sizes.length, sizes.width)
    zero = tl.zeros((C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    sent = _Sent(zero + float("inf"), zero, zero)
    first = chunk * sizes.chunk_tiles + C.PAST // C.BLOCK_T
    stop = tl.minimum(first + sizes.chunk_tiles, sizes.tiles)
    for step in range(stop - first):
        tile = stop - 1 - step
        older = _load_sum(sums.states, batch * sizes.tiles + tile, sizes.width, part.value_columns, C.DTYPE)
        _, _, _, _, _, more = _query_gradients(grad, part, sizes, older, tile * C.BLOCK_T, C)
        sent = _merge_sent(_risen(sent, part.decay, 1, C), more)
    _store_sum(sums.carry, batch * sizes.chunks + chunk, sizes.width, part.value_columns, sent)


@_jit
def _backward_scan(carry, decay, sizes, C: tl.constexpr):
    """Replaces what each chunk sends back, in carry [B, chunks, 3, D], by what everything after it does."""
    block, _, batch = _program(sizes.blocks, 1)
    keys, columns = _columns(block, sizes, C)
    decay = _load_decay(decay, keys, C)
    zero = tl.zeros((C.BLOCK_K * C.BLOCK_R,), C.DTYPE)
    sent = _Sent(zero + float("inf"), zero, zero)
    for step in range(sizes.chunks):
        index = batch * sizes.chunks + sizes.chunks - 1 - step
        more = _Sent(*_load_sum(carry, index, sizes.width, columns, C.DTYPE))
        _store_sum(carry, index, sizes.width, columns, sent)
        sent = _merge_sent(_risen(sent, decay, sizes.chunk_tiles, C), more)


@_jit
def _backward(grad, inputs, sums, scratch, gradients, sizes, C: tl.constexpr):
    """Reads grad [B, T, D], the inputs, the states and, of several chunks, carry; writes the gradients.

    scratch [programs, 2, PAST, columns] is the program's own. Half precision and SHARED = 1: 14 bytes per element.
    """
    block, chunk, batch = _program(sizes.blocks, sizes.chunks)
    part, grad = _part(inputs, sizes, block, batch, C), _contiguous(grad, batch, sizes.length, sizes.width)
    BLOCK_T: tl.constexpr = C.BLOCK_T
    COLUMNS: tl.constexpr = C.BLOCK_K * C.BLOCK_R
    PAST_BLOCKS: tl.constexpr = C.PAST // BLOCK_T
    head, key, share_block = _block(block, sizes, C)
    key += tl.arange(0, C.BLOCK_K)  # the key channel of each group of columns
    block_keys = _Columns(head * sizes.head_keys + key, key < sizes.head_keys)
    keys = sizes.left + sizes.length
    d_query = _contiguous(gradients.query, batch, sizes.length, sizes.width)
    d_value = _contiguous(gradients.value, batch, keys, sizes.width)
    d_key = _contiguous(gradients.key, share_block * sizes.batches + batch, keys, sizes.width // C.SHARED)
    row_batch = block * sizes.batches + batch
    if C.ROWS == "each":
        d_rows = _contiguous(gradients.rows, row_batch, sizes.length, sizes.taps)
    else:
        d_rows = _contiguous(gradients.rows, row_batch * sizes.chunks + chunk, BLOCK_T, sizes.taps)
    scratch += tl.program_id(0).to(tl.int64) * (2 * C.PAST * COLUMNS)

    zero = tl.zeros((COLUMNS,), C.DTYPE)
    sent = _Sent(zero + float("inf"), zero, zero)
    if C.CHUNKED:
        sent = _Sent(*_load_sum(sums.carry, batch * sizes.chunks + chunk, sizes.width, part.value_columns, C.DTYPE))
    # The keys of a chunk are also seen by the first queries after it; the keys of the first chunk begin before it.
    stop = tl.minimum((chunk + 1) * sizes.chunk_tiles, sizes.tiles)
    last = tl.minimum(stop + PAST_BLOCKS, sizes.tiles) - 1
    first = tl.where(chunk == 0, -((sizes.left + BLOCK_T - 1) // BLOCK_T), chunk * sizes.chunk_tiles)
    for step in tl.range(0, last - first + 1, num_stages=C.STAGES):
        tile = last - step
        t0 = tile * BLOCK_T
        own = tile < stop
        state = batch * sizes.tiles + tl.maximum(tile, 0)
        older = _load_sum(sums.states, state, sizes.width, part.value_columns, C.DTYPE)
        older = _fallen(older, part.decay, tl.minimum(tile, 0), C)  # before the first tile it has not yet
        panel, underflow, dq, g, c, more = _query_gradients(grad, part, sizes, older, t0, C)
        _store(d_query, part.value_columns, t0, tl.where(own, sizes.length, 0), dq, BLOCK_T)
        sent = _risen(sent, part.decay, 1, C)
        for back in range(PAST_BLOCKS + 1):
            index = PAST_BLOCKS - back
            start = t0 - C.PAST + index * BLOCK_T
            k, v = _load_keys(part, sizes, start, t0, BLOCK_T, C)
            if underflow:
                dk = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
                dv = tl.zeros((BLOCK_T, COLUMNS), C.DTYPE)
                dw = tl.zeros((BLOCK_T, BLOCK_T), C.DTYPE)
                _, normalizer, total = _load_sum(sums.states, state, sizes.width, part.value_columns, C.DTYPE)
                again = _Sum(older.maximum, normalizer, total)
                reference, _, _ = _exact_panel(part, sizes, again, t0, C)
                reference = _finite(reference)
                for j in range(BLOCK_T):
                    this = tl.arange(0, BLOCK_T) == j
                    k_j, v_j = _load_keys(part, sizes, start + j, t0, 1, C)
                    w_j = _log_weights(part, sizes, t0, t0 - start - j, 1, C)
                    e = tl.exp(k_j + w_j - reference)
                    d_logits = e * (g * v_j - c)
                    dv += tl.where(this[:, None], tl.sum(e * g, 0)[None, :], 0.0)
                    dk += tl.where(this[:, None], tl.sum(d_logits, 0)[None, :], 0.0)
                    dw += tl.where(this[None, :], tl.sum(d_logits, 1)[:, None], 0.0)
            else:
                e = tl.exp(k - _finite(panel.column_maximum)[None, :])
                dw = tl.zeros((BLOCK_T, BLOCK_T), C.DTYPE)
                if C.PAST > 0:
                    w = _log_weights(part, sizes, t0, t0 - start, BLOCK_T, C)
                    w = tl.exp(w - panel.row_maximum[:, None])
                    dv = e * _dot(tl.trans(w), g, C)
                    dk = dv * v - e * _dot(tl.trans(w), c, C)
                else:
                    dv = e * tl.cumsum(g, 0, reverse=True)
                    dk = dv * v - e * tl.cumsum(c, 0, reverse=True)
                if C.ROWS != "none":
                    dw = _dot(g, tl.trans(e * v), C)
                    dw = w * (dw - _dot(c, tl.trans(e), C))
            if C.ROWS != "none":
                query = tl.arange(0, BLOCK_T)[:, None]
                tap = query + (t0 - start) - tl.arange(0, BLOCK_T)[None, :]
                exists = (t0 + query >= 0) & (t0 + query < tl.where(own, sizes.length, 0))
                exists = exists & (tap >= 0) & (tap < sizes.taps)
                pointers = d_rows.start + (query * d_rows.row + tap)
                if C.ROWS == "each":
                    tl.store(pointers + t0.to(tl.int64) * d_rows.row, dw, mask=exists)
                else:
                    tl.store(pointers, dw + tl.load(pointers, mask=exists, other=0.0), mask=exists)
            # Keys that enter: what the later queries, which see them with bias 0, send back.
            entering = tl.exp(tl.where(index == 0, k - _finite(sent.maximum)[None, :], float("-inf")))
            dv += entering * sent.g[None, :]
            dk += entering * (v * sent.g[None, :] - sent.c[None, :])
            if C.PAST > 0:
                # Keys that entered before come from the scratch buffer, those that stay in the window go back.
                slot = ((tile - first + index) % PAST_BLOCKS) * BLOCK_T + tl.arange(0, BLOCK_T)
                slot = scratch + slot[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                place = tl.zeros((BLOCK_T, COLUMNS), tl.int32) + index
                waited = place > tl.where(tile < last, 0, PAST_BLOCKS)
                waits = place < PAST_BLOCKS
                dv += tl.load(slot, mask=waited, other=0.0)
                dk += tl.load(slot + C.PAST * COLUMNS, mask=waited, other=0.0)
                tl.store(slot, dv, mask=waits)
                tl.store(slot + C.PAST * COLUMNS, dk, mask=waits)
            row, end = start + sizes.left, tl.where(own & (index == PAST_BLOCKS), sizes.length + sizes.left, 0)
            _store(d_value, part.value_columns, row, end, dv, BLOCK_T)
            if C.BLOCK_R > 1:
                dk = tl.sum(tl.reshape(dk, (BLOCK_T, C.BLOCK_K, C.BLOCK_R)), 2)
            _store(d_key, block_keys, row, end, dk, BLOCK_T)
        sent = _merge_sent(sent, more)
        if C.PAST > 0:
            tl.debug_barrier()  # what a thread left in a buffer, another may read for the next tile
    if chunk == 0:
        d_older = gradients.older + batch * 2 * sizes.width + part.value_columns.channel
        tl.store(d_older, sent.g, mask=part.value_columns.exists)
        tl.store(d_older + sizes.width, sent.c, mask=part.value_columns.exists)


# -------------------------------------------------------------------------------------------------------- operators


def _matrix(tensor: Tensor) -> _Matrix:
    return _Matrix(tensor, tensor.stride(0), tensor.stride(1))


def _inputs(query, key, value, rows, decay) -> _Inputs:
    bias, head = _Matrix(query, 0, 0), 0  # some address: it is not read
    if rows is not None:
        sizes = zip(rows.shape, rows.stride(), strict=True)
        head, batch, row, _ = (0 if size == 1 else step for size, step in sizes)
        bias = _Matrix(rows, batch, row)
    decay = query if decay is None else decay
    return _Inputs(_matrix(query), _matrix(key), _matrix(value), bias, head, decay)


def _plan(query, key, value, rows, decay, activation, layouts) -> tuple[_Sizes, _Constants, dict]:
    """How the work is cut: what all kernels of one direction share, and the options that they are compiled with."""
    batch, length, width = query.shape
    heads, taps = (1, 0) if rows is None else (rows.shape[0], rows.shape[3])
    head_keys, shared = key.shape[2] // heads, width // key.shape[2]
    options = dict(layouts[rows is not None])
    channels = options.pop("channels")
    block_r = min(triton.next_power_of_2(shared), channels)
    block_k = min(triton.next_power_of_2(head_keys), channels // block_r)
    block_k = max(block_k, 16 // block_r)  # the smallest matrix product
    blocks = heads * triton.cdiv(head_keys, block_k) * triton.cdiv(shared, block_r)
    tiles = triton.cdiv(length, _BLOCK_T)
    chunk_tiles = triton.cdiv(tiles, _chunks(blocks * batch, tiles, query.device))
    chunks = triton.cdiv(tiles, chunk_tiles)
    dtype = compute_dtype(query, key, value)
    half = all(t.dtype in (torch.float16, torch.bfloat16) for t in (query, key, value))
    sizes = _Sizes(
        batches=batch,
        length=length,
        left=key.shape[1] - length,
        taps=taps,
        width=width,
        head_keys=head_keys,
        blocks=blocks,
        tiles=tiles,
        chunk_tiles=chunk_tiles,
        chunks=chunks,
    )
    constants = _Constants(
        SHARED=shared,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        BLOCK_T=_BLOCK_T,
        PAST=triton.cdiv(max(taps - 1, 1), _BLOCK_T) * _BLOCK_T if taps else 0,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        TINY=_TINY[dtype],
        LARGEST=_LARGEST[dtype],
        PRECISION="tf32" if half else "ieee" if dtype == torch.float64 else "tf32x3",
        ACTIVATION=activation,
        STAGES=1,
        CHUNKED=chunks > 1,
        DECAY=decay is not None,
        ROWS="none",
    )
    return sizes, constants, options


def _chunks(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many chunks of time to cut the work of `programs` programs: 1 where they fill the chip without."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= processors:
        return 1
    return min(triton.cdiv(4 * processors, programs), triton.cdiv(tiles, 4))


def _sums_like(query, key, value, count):
    dtype = compute_dtype(query, key, value)
    return query.new_empty(query.shape[0], count, 3, query.shape[2], dtype=dtype)


@torch.library.custom_op(f"{_NAMESPACE}::windowed_triton", mutates_args=())
def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    initial: Tensor,
    decay: Tensor | None,
    query_activation: str,
) -> tuple[Tensor, Tensor]:
    """Result [B, T, D] and the sums of the keys older than each panel [B, tiles, 3, D].

    query [B, T, D], key [B, L+T, K], value [B, L+T, D], rows [heads, 1 or B, 1 or T, n], initial [B, 3, D] as it is
    at the end of the first tile, decay [K].
    """
    inputs = _inputs(query, key, value, rows, decay)
    sizes, constants, options = _plan(query, key, value, rows, decay, query_activation, _FORWARD)
    sequences = (sizes.blocks * sizes.batches,)
    programs = (sizes.blocks * sizes.batches * sizes.chunks,)
    out = query.new_empty(query.shape)
    sums = _Sums(_sums_like(query, key, value, sizes.tiles), initial)
    if sizes.chunks > 1:
        sums = sums._replace(carry=_sums_like(query, key, value, sizes.chunks))
        _forward_sums[programs](inputs, sums.carry, sizes, constants, **options)
        _forward_scan[sequences](sums.carry, initial, inputs.decay, sizes, constants, num_warps=1)
    constants = constants._replace(STAGES=1 if constants.PAST else 3)
    _forward[programs](inputs, sums, out, sizes, constants, **options)
    return out, sums.states


@_windowed.register_fake
def _(query, key, value, rows, initial, decay, query_activation):
    return query.new_empty(query.shape), _sums_like(query, key, value, -(-query.shape[1] // _BLOCK_T))


@flops_of(_windowed)
def _windowed_flops(query, key, value, rows, *_):
    if rows is None:  # sums alone
        return 0
    batch, length, width = query.shape
    tiles, past = -(-length // _BLOCK_T), -(-max(rows.shape[3] - 1, 1) // _BLOCK_T) * _BLOCK_T
    return 2 * batch * tiles * _BLOCK_T * (past + _BLOCK_T) * 2 * width  # a denominator for each channel


@torch.library.custom_op(f"{_NAMESPACE}::windowed_triton_backward", mutates_args=())
def _windowed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    initial: Tensor,
    decay: Tensor | None,
    states: Tensor,
    query_activation: str,
    needs_rows: bool,
    needs_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, rows (empty unless `needs_rows`), initial and decay (empty unless
    `needs_decay`)."""
    inputs = _inputs(query, key, value, rows, decay)
    sizes, constants, options = _plan(query, key, value, rows, decay, query_activation, _BACKWARD)
    batch, blocks, chunks = sizes.batches, sizes.blocks, sizes.chunks
    programs = blocks * batch * chunks
    sums = _Sums(states, states)
    if chunks > 1:
        sums = sums._replace(carry=_sums_like(query, key, value, chunks))
        _backward_sums[(programs,)](grad, inputs, sums, sizes, constants, **options)
        _backward_scan[(blocks * batch,)](sums.carry, inputs.decay, sizes, constants, num_warps=1)

    share_blocks = triton.cdiv(constants.SHARED, constants.BLOCK_R)
    d_query, d_value = query.new_empty(query.shape), value.new_empty(value.shape)
    in_parts = share_blocks > 1 or needs_decay  # to be added up before they are rounded
    d_key = key.new_empty(share_blocks, *key.shape, dtype=states.dtype if in_parts else key.dtype)
    d_older = states.new_empty(batch, 2, sizes.width)
    d_rows, kind = states.new_empty(0), "none"
    if needs_rows and rows.shape[2] > 1:
        d_rows, kind = states.new_empty(blocks, batch, sizes.length, sizes.taps), "each"
    elif needs_rows:
        d_rows, kind = states.new_zeros(blocks, batch, chunks * _BLOCK_T, sizes.taps), "sum"
    gradients = _Gradients(d_query, d_key, d_value, d_rows, d_older)
    scratch = states.new_empty(programs, 2, constants.PAST, constants.BLOCK_K * constants.BLOCK_R)
    constants = constants._replace(STAGES=1 if constants.PAST else 2, ROWS=kind)
    options["num_stages"] = 1  # the scratch buffer must not be read ahead
    _backward[(programs,)](grad, inputs, sums, scratch, gradients, sizes, constants, **options)

    d_key = d_key[0] if share_blocks == 1 else d_key.sum(0)
    if needs_rows:
        d_rows = d_rows.unflatten(0, (rows.shape[0], -1))
        dims = [1] + [dim + 1 for dim in (1, 2) if rows.shape[dim] == 1]
        d_rows = d_rows.sum(dims).reshape(rows.shape).to(rows.dtype)
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


@_windowed_backward.register_fake
def _(grad, query, key, value, rows, initial, decay, states, query_activation, needs_rows, needs_decay):
    like = [t.new_empty(t.shape) for t in (query, key, value)]
    d_rows = rows.new_empty(rows.shape) if needs_rows else states.new_empty(0)
    d_decay = decay.new_empty(decay.shape) if needs_decay else states.new_empty(0)
    return *like, d_rows, states.new_empty(initial.shape), d_decay


@flops_of(_windowed_backward)
def _(grad, query, key, value, rows, initial, decay, states, query_activation, needs_rows, needs_decay):
    # The products of the forward pass, again, and the two gradients of each.
    return (2 + needs_rows) * _windowed_flops(query, key, value, rows)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.query_activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
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
    float64 if an input is. Half-precision inputs go through the tensor cores in tf32.
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
