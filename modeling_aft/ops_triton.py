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

Where batch x channels cannot fill the chip, time is cut into chunks: one kernel sums up each chunk, a second adds the
sums up, and the main kernel runs all chunks at once.

Names of the kernels' sizes: K key channels, D = K x SHARED value channels (SHARED of them share a key channel), n taps
(0 for simple). Channels are cut into blocks of BLOCK_K x BLOCK_R, BLOCK_R value channels for each of BLOCK_K keys.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from .ops_operators import flops_of, operator_namespace
from .ops_state import compute_dtype, spread
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
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def triton_can_run(device: torch.device) -> bool:
    """Whether triton is there, and the device one that it has code for, as the CPU is for its interpreter."""
    return triton is not None and (device.type == "cuda" or _INTERPRETED)


def _jit(function):
    return function if triton is None else triton.jit(function)


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
def _channels(block, head_keys, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Head of the bias; then for each column of a block its key channel, value channel, and whether they exist."""
    share_blocks: tl.constexpr = (SHARED + BLOCK_R - 1) // BLOCK_R
    key_blocks = (head_keys + BLOCK_K - 1) // BLOCK_K
    head = block // (key_blocks * share_blocks)
    # 4 channels per thread, not the 8 of the widest load: each thread holds a copy of the sums of its channels.
    column = tl.max_contiguous(tl.arange(0, BLOCK_K * BLOCK_R), [4])
    key = (block // share_blocks) % key_blocks * BLOCK_K + column // BLOCK_R
    share = block % share_blocks * BLOCK_R + column % BLOCK_R
    inside = (key < head_keys) & (share < SHARED)
    key += head * head_keys
    return head, key, key * SHARED + share, inside


@_jit
def _load(pointer, stride, start, stop, columns, inside, other, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Rows start to start + SIZE - 1 of a matrix [stop, .], `other` where they do not exist: [SIZE, columns]."""
    row = tl.arange(0, SIZE)
    mask = (start + row >= 0) & (start + row < stop)
    pointers = pointer + start.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    return tl.load(pointers, mask=mask[:, None] & inside[None, :], other=other).to(DTYPE)


@_jit
def _store(pointer, stride, start, stop, columns, inside, tile, SIZE: tl.constexpr):
    """Writes what `_load` would read."""
    row = tl.arange(0, SIZE)
    mask = (start + row >= 0) & (start + row < stop)
    pointers = pointer + start.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask[:, None] & inside[None, :])


@_jit
def _load_sum(pointer, index, width, columns, inside, DTYPE: tl.constexpr):
    """Triple `index` of a buffer [., 3, width]."""
    pointers = pointer + index.to(tl.int64) * (3 * width) + columns
    maximum = tl.load(pointers, mask=inside, other=float("-inf")).to(DTYPE)
    normalizer = tl.load(pointers + width, mask=inside, other=0.0).to(DTYPE)
    return maximum, normalizer, tl.load(pointers + 2 * width, mask=inside, other=0.0).to(DTYPE)


@_jit
def _store_sum(pointer, index, width, columns, inside, maximum, normalizer, total):
    pointers = pointer + index.to(tl.int64) * (3 * width) + columns
    tl.store(pointers, maximum, mask=inside)
    tl.store(pointers + width, normalizer, mask=inside)
    tl.store(pointers + 2 * width, total, mask=inside)


@_jit
def _merge(maximum, normalizer, total, more_maximum, more_normalizer, more_total):
    """Adds up two sums over disjoint keys."""
    new = tl.maximum(maximum, more_maximum)
    scale, more_scale = tl.exp(maximum - _finite(new)), tl.exp(more_maximum - _finite(new))
    return new, normalizer * scale + more_normalizer * more_scale, total * scale + more_total * more_scale


@_jit
def _log_weights(
    rows, row_stride, taps, t0, shift, length,
    SIZE: tl.constexpr, KEYS: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """w [SIZE, KEYS] of queries t0, ... and keys t0 - shift, ...: minus infinity for keys that come later."""
    query = tl.arange(0, SIZE)[:, None]
    tap = query + shift - tl.arange(0, KEYS)[None, :]
    weights = tl.where(tap >= 0, 0.0, float("-inf")).to(DTYPE)
    if PAST > 0:
        inside = (tap >= 0) & (tap < taps) & (t0 + query >= 0) & (t0 + query < length)
        pointers = rows + t0.to(tl.int64) * row_stride + (query * row_stride + tap)
        weights += tl.load(pointers, mask=inside, other=0.0).to(DTYPE)
    return weights


@_jit
def _panel(
    key, key_row, value, value_row, rows, row_stride, taps, t0, length, left, keys, channels, inside,
    maximum, normalizer, total,
    BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Denominators and numerators [BLOCK_T, columns] of the queries t0, ..., given the sum of all older keys.

    They are relative to exp(row maximum + column maximum), returned before them; after them comes the sum of all keys
    older than the next panel.
    """
    denominator = tl.zeros((BLOCK_T, normalizer.shape[0]), DTYPE) + normalizer[None, :]
    numerator = tl.zeros((BLOCK_T, total.shape[0]), DTYPE) + total[None, :]
    row_maximum = tl.zeros((BLOCK_T,), DTYPE)  # older keys have bias 0
    column_maximum = maximum
    for block in range(PAST // BLOCK_T + 1):
        start = t0 - PAST + block * BLOCK_T
        k = _load(key, key_row, start + left, length + left, keys, inside, float("-inf"), BLOCK_T, DTYPE)
        v = _load(value, value_row, start + left, length + left, channels, inside, 0.0, BLOCK_T, DTYPE)
        block_maximum = tl.max(k, 0)
        e = tl.exp(k - _finite(block_maximum)[None, :])
        # The first block of this panel is older than the next. The sum of those has a maximum of its own: a later key
        # that is far larger must not wipe them out, for its bias may be as far below 0.
        leaving = tl.where(block == 0, block_maximum, float("-inf"))
        maximum, normalizer, total = _merge(
            maximum, normalizer, total, leaving, tl.sum(e, 0), tl.sum(e * v, 0)
        )  # fmt: skip

        new_column_maximum = tl.maximum(column_maximum, block_maximum)
        e *= tl.exp(block_maximum - _finite(new_column_maximum))[None, :]
        scale = tl.exp(column_maximum - _finite(new_column_maximum))[None, :]
        column_maximum = new_column_maximum
        if PAST > 0:
            w = _log_weights(rows, row_stride, taps, t0, t0 - start, length, BLOCK_T, BLOCK_T, PAST, DTYPE)
            new_row_maximum = tl.maximum(row_maximum, tl.max(w, 1))
            scale = scale * tl.exp(row_maximum - new_row_maximum)[:, None]
            row_maximum = new_row_maximum
            w = tl.exp(w - row_maximum[:, None])
            denominator = denominator * scale + tl.dot(w, e, input_precision=PRECISION, out_dtype=DTYPE)
            numerator = numerator * scale + tl.dot(w, e * v, input_precision=PRECISION, out_dtype=DTYPE)
        else:
            denominator = denominator * scale + tl.cumsum(e, 0)
            numerator = numerator * scale + tl.cumsum(e * v, 0)
    return row_maximum, column_maximum, denominator, numerator, maximum, normalizer, total


@_jit
def _exact_panel(
    key, key_row, value, value_row, rows, row_stride, taps, t0, length, left, keys, channels, inside,
    maximum, normalizer, total,
    BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same in log space, key by key: largest k + w, denominator and numerator, all [BLOCK_T, columns]."""
    denominator = tl.zeros((BLOCK_T, normalizer.shape[0]), DTYPE) + normalizer[None, :]
    numerator = tl.zeros((BLOCK_T, total.shape[0]), DTYPE) + total[None, :]
    reference = tl.zeros((BLOCK_T, maximum.shape[0]), DTYPE) + maximum[None, :]
    for index in range(PAST + BLOCK_T):
        start = t0 - PAST + index
        k = _load(key, key_row, start + left, length + left, keys, inside, float("-inf"), 1, DTYPE)
        v = _load(value, value_row, start + left, length + left, channels, inside, 0.0, 1, DTYPE)
        logits = k + _log_weights(rows, row_stride, taps, t0, t0 - start, length, BLOCK_T, 1, PAST, DTYPE)
        e = tl.zeros((BLOCK_T, maximum.shape[0]), DTYPE) + 1.0
        reference, denominator, numerator = _merge(reference, denominator, numerator, logits, e, e * v)
    return reference, denominator, numerator


@_jit
def _underflows(denominator, column_maximum, t0, length, TINY: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether some query of the tile needs log space. Columns without any key, or beyond the channels, do not."""
    query = t0 + tl.arange(0, BLOCK_T)
    counts = ((query >= 0) & (query < length))[:, None] & (column_maximum > float("-inf"))[None, :]
    return tl.max(tl.max((counts & (denominator < TINY)).to(tl.int32), 1), 0) > 0


@_jit
def _gate(query, ACTIVATION: tl.constexpr):
    """The activation of the query and its derivative."""
    if ACTIVATION == "sigmoid":
        gate = 1 / (1 + tl.exp(-query))
        slope = gate * (1 - gate)
    elif ACTIVATION == "tanh":
        gate = 2 / (1 + tl.exp(-2 * query)) - 1
        slope = 1 - gate * gate
    elif ACTIVATION == "relu":
        gate = tl.maximum(query, 0.0)
        slope = tl.where(query > 0, 1.0, 0.0).to(query.dtype)
    else:
        gate = query
        slope = tl.zeros_like(query) + 1.0
    return gate, slope


@_jit
def _query_gradients(
    grad, query, query_row, key, key_row, value, value_row, rows, row_stride, taps, states, t0, tile, length, left,
    width, keys, channels, inside,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """What a tile of queries sends back: its own gradient, and to its keys.

    With weights e_tj = exp(k_j + w_tj) relative to the maxima returned, the gradient of v_j is sum_t e_tj g_t and that
    of k_j is sum_t e_tj (g_t v_j - c_t), with g = d(average) / denominator and c = g x average. For the older keys
    these two sums are the last two returned, relative to the maximum of those keys.
    """
    maximum, normalizer, total = _load_sum(states, tl.maximum(tile, 0), width, channels, inside, DTYPE)
    row_maximum, column_maximum, denominator, numerator, _, _, _ = _panel(
        key, key_row, value, value_row, rows, row_stride, taps, t0, length, left, keys, channels, inside,
        maximum, normalizer, total, BLOCK_T, PAST, DTYPE, PRECISION,
    )  # fmt: skip
    older = tl.exp(maximum - _finite(column_maximum))[None, :] * tl.exp(-row_maximum)[:, None]
    q = _load(query, query_row, t0, length, channels, inside, 0.0, BLOCK_T, DTYPE)
    dy = _load(grad, width, t0, length, channels, inside, 0.0, BLOCK_T, DTYPE)
    gate, slope = _gate(q, ACTIVATION)
    inverse = tl.where(denominator < TINY, 0.0, 1 / denominator)
    average = numerator * inverse
    g = dy * gate * inverse
    c = g * average
    # Weights in log space are at most 1: there no sum is larger than what it is a gradient of.
    size = tl.max(tl.max(tl.maximum(tl.abs(g), tl.abs(c)), 1), 0)
    underflow = _underflows(denominator, column_maximum, t0, length, TINY, BLOCK_T) | (size > LARGEST)
    if underflow:
        reference, denominator, numerator = _exact_panel(
            key, key_row, value, value_row, rows, row_stride, taps, t0, length, left, keys, channels, inside,
            maximum, normalizer, total, BLOCK_T, PAST, DTYPE,
        )  # fmt: skip
        older = tl.exp(maximum[None, :] - _finite(reference))
        inverse = tl.where(denominator < TINY, 0.0, 1 / denominator)
        average = numerator * inverse
        g = dy * gate * inverse
        c = g * average
    d_query = dy * slope * average
    return maximum, row_maximum, column_maximum, underflow, d_query, g, c, tl.sum(older * g, 0), tl.sum(older * c, 0)


# ---------------------------------------------------------------------------------------------------------- kernels


@_jit
def _forward_sums(
    key, value, carry, length, left, tiles, chunk_tiles, chunks, blocks, head_keys, width,
    key_batch, key_row, value_batch, value_row,
    SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, PAST: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Sum of the keys that leave the window during each chunk, into carry [B, chunks, 3, D]. Reads key and value."""
    block, chunk, batch = _program(blocks, chunks)
    _, keys, channels, inside = _channels(block, head_keys, SHARED, BLOCK_K, BLOCK_R)
    key += batch * key_batch
    value += batch * value_batch
    total = tl.zeros((BLOCK_K * BLOCK_R,), DTYPE)
    normalizer, maximum = total, total + float("-inf")
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tiles)):
        start = tile * BLOCK_T - PAST + left
        k = _load(key, key_row, start, length + left, keys, inside, float("-inf"), BLOCK_T, DTYPE)
        v = _load(value, value_row, start, length + left, channels, inside, 0.0, BLOCK_T, DTYPE)
        block_maximum = tl.max(k, 0)
        e = tl.exp(k - _finite(block_maximum)[None, :])
        maximum, normalizer, total = _merge(
            maximum, normalizer, total, block_maximum, tl.sum(e, 0), tl.sum(e * v, 0)
        )  # fmt: skip
    _store_sum(carry, batch * chunks + chunk, width, channels, inside, maximum, normalizer, total)


@_jit
def _forward_scan(
    carry, initial, chunks, width, blocks, HAS_INITIAL: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr
):
    """Replaces the sum of each chunk in carry [B, chunks, 3, D] by that of everything before; initial [B, 3, D]."""
    block, _, batch = _program(blocks, 1)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < width
    total = tl.zeros((BLOCK_D,), DTYPE)
    normalizer, maximum = total, total + float("-inf")
    if HAS_INITIAL:
        maximum, normalizer, total = _load_sum(initial, batch, width, channels, inside, DTYPE)
    for chunk in range(chunks):
        index = batch * chunks + chunk
        more_maximum, more_normalizer, more_total = _load_sum(carry, index, width, channels, inside, DTYPE)
        _store_sum(carry, index, width, channels, inside, maximum, normalizer, total)
        maximum, normalizer, total = _merge(
            maximum, normalizer, total, more_maximum, more_normalizer, more_total
        )  # fmt: skip


@_jit
def _forward(
    query, key, value, rows, carry, out, states,
    length, left, taps, tiles, chunk_tiles, chunks, blocks, head_keys, width,
    query_batch, query_row, key_batch, key_row, value_batch, value_row, rows_head, rows_batch, rows_row,
    HAS_CARRY: tl.constexpr, ACTIVATION: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, TINY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads query, key, value, rows, carry [B, chunks, 3, D]; writes out [B, T, D] and states [B, tiles, 3, D].

    The states are the sums of the keys older than each panel. Half precision and SHARED = 1: 8 bytes per element of
    the output, and 0.2 for the states; the keys of the window before a tile come from the cache.
    """
    block, chunk, batch = _program(blocks, chunks)
    head, keys, channels, inside = _channels(block, head_keys, SHARED, BLOCK_K, BLOCK_R)
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    rows += head.to(tl.int64) * rows_head + batch * rows_batch
    out += batch * length * width
    total = tl.zeros((BLOCK_K * BLOCK_R,), DTYPE)
    normalizer, maximum = total, total + float("-inf")
    if HAS_CARRY:
        maximum, normalizer, total = _load_sum(carry, batch * chunks + chunk, width, channels, inside, DTYPE)
    first = chunk * chunk_tiles
    for tile in tl.range(first, tl.minimum(first + chunk_tiles, tiles), num_stages=STAGES):
        t0 = tile * BLOCK_T
        _store_sum(states, batch * tiles + tile, width, channels, inside, maximum, normalizer, total)
        q = _load(query, query_row, t0, length, channels, inside, 0.0, BLOCK_T, DTYPE)
        _, column_maximum, denominator, numerator, new_maximum, new_normalizer, new_total = _panel(
            key, key_row, value, value_row, rows, rows_row, taps, t0, length, left, keys, channels, inside,
            maximum, normalizer, total, BLOCK_T, PAST, DTYPE, PRECISION,
        )  # fmt: skip
        if _underflows(denominator, column_maximum, t0, length, TINY, BLOCK_T):
            reference, denominator, numerator = _exact_panel(
                key, key_row, value, value_row, rows, rows_row, taps, t0, length, left, keys, channels, inside,
                maximum, normalizer, total, BLOCK_T, PAST, DTYPE,
            )  # fmt: skip
        maximum, normalizer, total = new_maximum, new_normalizer, new_total
        gate, _ = _gate(q, ACTIVATION)
        y = gate * tl.where(denominator < TINY, 0.0, numerator / denominator)
        _store(out, width, t0, length, channels, inside, y, BLOCK_T)


@_jit
def _backward_sums(
    grad, query, key, value, rows, states, carry,
    length, left, taps, tiles, chunk_tiles, chunks, blocks, head_keys, width,
    query_batch, query_row, key_batch, key_row, value_batch, value_row, rows_head, rows_batch, rows_row,
    ACTIVATION: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TINY: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """What the queries of each chunk send back to the keys older than its first panel, into carry [B, chunks, 3, D].

    A chunk of queries starts later than the chunk of keys by the tiles that a window reaches into. Reads all inputs.
    """
    block, chunk, batch = _program(blocks, chunks)
    head, keys, channels, inside = _channels(block, head_keys, SHARED, BLOCK_K, BLOCK_R)
    grad += batch * length * width
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    rows += head.to(tl.int64) * rows_head + batch * rows_batch
    states += batch * tiles * 3 * width
    reach: tl.constexpr = PAST // BLOCK_T
    older_g = tl.zeros((BLOCK_K * BLOCK_R,), DTYPE)
    older_c, maximum = older_g, older_g + float("inf")
    first = chunk * chunk_tiles + reach
    stop = tl.minimum(first + chunk_tiles, tiles)
    for step in range(stop - first):
        tile = stop - 1 - step
        new_maximum, _, _, _, _, _, _, more_g, more_c = _query_gradients(
            grad, query, query_row, key, key_row, value, value_row, rows, rows_row, taps, states, tile * BLOCK_T, tile,
            length, left, width, keys, channels, inside,
            ACTIVATION, BLOCK_T, PAST, DTYPE, PRECISION, TINY, LARGEST,
        )  # fmt: skip
        scale = tl.exp(new_maximum - _finite(maximum))
        older_g, older_c, maximum = older_g * scale + more_g, older_c * scale + more_c, new_maximum
    _store_sum(carry, batch * chunks + chunk, width, channels, inside, maximum, older_g, older_c)


@_jit
def _backward_scan(carry, chunks, width, blocks, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Replaces the sum of each chunk in carry [B, chunks, 3, D] by that of everything after."""
    block, _, batch = _program(blocks, 1)
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < width
    older_g = tl.zeros((BLOCK_D,), DTYPE)
    older_c, maximum = older_g, older_g + float("inf")
    for step in range(chunks):
        index = batch * chunks + chunks - 1 - step
        new_maximum, more_g, more_c = _load_sum(carry, index, width, channels, inside, DTYPE)
        _store_sum(carry, index, width, channels, inside, maximum, older_g, older_c)
        # Without later queries the maximum is plus infinity, and there is nothing to scale.
        scale = tl.where(maximum == float("inf"), 0.0, tl.exp(new_maximum - _finite(maximum)))
        older_g, older_c, maximum = older_g * scale + more_g, older_c * scale + more_c, new_maximum


@_jit
def _backward(
    grad, query, key, value, rows, states, carry, scratch, d_query, d_key, d_value, d_rows, d_older,
    length, left, taps, tiles, chunk_tiles, chunks, blocks, head_keys, width, batches,
    query_batch, query_row, key_batch, key_row, value_batch, value_row, rows_head, rows_batch, rows_row,
    HAS_CARRY: tl.constexpr, NEEDS_ROWS: tl.constexpr, ROW_PER_QUERY: tl.constexpr, NEEDS_OLDER: tl.constexpr,
    ACTIVATION: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, PAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TINY: tl.constexpr, LARGEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads grad [B, T, D] and what `_forward` reads and its states; writes the gradients.

    d_query [B, T, D], d_value [B, L+T, D], d_key [share blocks, B, L+T, K] (each block of value channels adds its
    part), d_older [B, 2, D] (what all queries send back to the sum of keys before the first one), and d_rows: with a
    row per query [blocks, B, T, n], else [blocks, B, chunks x BLOCK_T, n], added up over the tiles of the chunk.
    scratch [programs, 2, PAST, columns] is the program's own. Half precision and SHARED = 1: 14 bytes per element.
    """
    block, chunk, batch = _program(blocks, chunks)
    head, keys, channels, inside = _channels(block, head_keys, SHARED, BLOCK_K, BLOCK_R)
    share_blocks: tl.constexpr = (SHARED + BLOCK_R - 1) // BLOCK_R
    head_block = (block // share_blocks) % ((head_keys + BLOCK_K - 1) // BLOCK_K)
    block_keys = head_block * BLOCK_K + tl.arange(0, BLOCK_K)  # the key channel of each group of columns
    block_keys_inside = block_keys < head_keys
    block_keys += head * head_keys
    key_width = width // SHARED
    COLUMNS: tl.constexpr = BLOCK_K * BLOCK_R
    PAST_BLOCKS: tl.constexpr = PAST // BLOCK_T
    grad += batch * length * width
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    rows += head.to(tl.int64) * rows_head + batch * rows_batch
    states += batch * tiles * 3 * width
    d_query += batch * length * width
    d_value += batch * (left + length) * width
    d_key += ((block % share_blocks) * batches + batch) * (left + length) * key_width
    if ROW_PER_QUERY:
        d_rows += (block * batches + batch) * length * taps
    else:
        d_rows += ((block * batches + batch) * chunks + chunk) * BLOCK_T * taps
    scratch += tl.program_id(0).to(tl.int64) * (2 * PAST * COLUMNS)

    older_g = tl.zeros((COLUMNS,), DTYPE)
    older_c, older_maximum = older_g, older_g + float("inf")
    if HAS_CARRY:
        older_maximum, older_g, older_c = _load_sum(carry, batch * chunks + chunk, width, channels, inside, DTYPE)
    # The keys of a chunk are also seen by the first queries after it; the keys of the first chunk begin before it.
    stop = tl.minimum((chunk + 1) * chunk_tiles, tiles)
    last = tl.minimum(stop + PAST_BLOCKS, tiles) - 1
    first = tl.where(chunk == 0, -((left + BLOCK_T - 1) // BLOCK_T), chunk * chunk_tiles)
    for step in tl.range(0, last - first + 1, num_stages=STAGES):
        tile = last - step
        t0 = tile * BLOCK_T
        own = tile < stop
        maximum, row_maximum, column_maximum, underflow, dq, g, c, more_g, more_c = _query_gradients(
            grad, query, query_row, key, key_row, value, value_row, rows, rows_row, taps, states, t0, tile, length,
            left, width, keys, channels, inside, ACTIVATION, BLOCK_T, PAST, DTYPE, PRECISION, TINY, LARGEST,
        )  # fmt: skip
        _store(d_query, width, t0, tl.where(own, length, 0), channels, inside, dq, BLOCK_T)
        for back in range(PAST_BLOCKS + 1):
            index = PAST_BLOCKS - back
            start = t0 - PAST + index * BLOCK_T
            k = _load(key, key_row, start + left, length + left, keys, inside, float("-inf"), BLOCK_T, DTYPE)
            v = _load(value, value_row, start + left, length + left, channels, inside, 0.0, BLOCK_T, DTYPE)
            if underflow:
                dk = tl.zeros((BLOCK_T, COLUMNS), DTYPE)
                dv = tl.zeros((BLOCK_T, COLUMNS), DTYPE)
                dw = tl.zeros((BLOCK_T, BLOCK_T), DTYPE)
                _, normalizer, total = _load_sum(states, tl.maximum(tile, 0), width, channels, inside, DTYPE)
                reference, _, _ = _exact_panel(
                    key, key_row, value, value_row, rows, rows_row, taps, t0, length, left, keys, channels, inside,
                    maximum, normalizer, total, BLOCK_T, PAST, DTYPE,
                )  # fmt: skip
                reference = _finite(reference)
                for j in range(BLOCK_T):
                    this = tl.arange(0, BLOCK_T) == j
                    row = start + left + j
                    k_j = _load(key, key_row, row, length + left, keys, inside, float("-inf"), 1, DTYPE)
                    v_j = _load(value, value_row, row, length + left, channels, inside, 0.0, 1, DTYPE)
                    w_j = _log_weights(rows, rows_row, taps, t0, t0 - start - j, length, BLOCK_T, 1, PAST, DTYPE)
                    e = tl.exp(k_j + w_j - reference)
                    d_logits = e * (g * v_j - c)
                    dv += tl.where(this[:, None], tl.sum(e * g, 0)[None, :], 0.0)
                    dk += tl.where(this[:, None], tl.sum(d_logits, 0)[None, :], 0.0)
                    dw += tl.where(this[None, :], tl.sum(d_logits, 1)[:, None], 0.0)
            else:
                e = tl.exp(k - _finite(column_maximum)[None, :])
                dw = tl.zeros((BLOCK_T, BLOCK_T), DTYPE)
                if PAST > 0:
                    w = _log_weights(rows, rows_row, taps, t0, t0 - start, length, BLOCK_T, BLOCK_T, PAST, DTYPE)
                    w = tl.exp(w - row_maximum[:, None])
                    dv = e * tl.dot(tl.trans(w), g, input_precision=PRECISION, out_dtype=DTYPE)
                    dk = dv * v - e * tl.dot(tl.trans(w), c, input_precision=PRECISION, out_dtype=DTYPE)
                else:
                    dv = e * tl.cumsum(g, 0, reverse=True)
                    dk = dv * v - e * tl.cumsum(c, 0, reverse=True)
                if NEEDS_ROWS:
                    dw = tl.dot(g, tl.trans(e * v), input_precision=PRECISION, out_dtype=DTYPE)
                    dw = w * (dw - tl.dot(c, tl.trans(e), input_precision=PRECISION, out_dtype=DTYPE))
            if NEEDS_ROWS:
                tap = tl.arange(0, BLOCK_T)[:, None] + (t0 - start) - tl.arange(0, BLOCK_T)[None, :]
                query_index = tl.arange(0, BLOCK_T)
                exists = (t0 + query_index >= 0) & (t0 + query_index < tl.where(own, length, 0))
                exists = exists[:, None] & (tap >= 0) & (tap < taps)
                pointers = d_rows + (query_index[:, None] * taps + tap)
                if ROW_PER_QUERY:
                    tl.store(pointers + t0.to(tl.int64) * taps, dw, mask=exists)
                else:
                    tl.store(pointers, dw + tl.load(pointers, mask=exists, other=0.0), mask=exists)
            # Keys that enter: what the later queries, which see them with bias 0, send back.
            older = tl.exp(tl.where(index == 0, k - _finite(older_maximum)[None, :], float("-inf")))
            dv += older * older_g[None, :]
            dk += older * (v * older_g[None, :] - older_c[None, :])
            if PAST > 0:
                # Keys that entered before come from the scratch buffer, those that stay in the window go back.
                slot = ((tile - first + index) % PAST_BLOCKS) * BLOCK_T + tl.arange(0, BLOCK_T)
                slot = scratch + slot[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                place = tl.zeros((BLOCK_T, COLUMNS), tl.int32) + index
                waited = place > tl.where(tile < last, 0, PAST_BLOCKS)
                waits = place < PAST_BLOCKS
                dv += tl.load(slot, mask=waited, other=0.0)
                dk += tl.load(slot + PAST * COLUMNS, mask=waited, other=0.0)
                tl.store(slot, dv, mask=waits)
                tl.store(slot + PAST * COLUMNS, dk, mask=waits)
            end = tl.where(own & (index == PAST_BLOCKS), length + left, 0)
            _store(d_value, width, start + left, end, channels, inside, dv, BLOCK_T)
            if BLOCK_R > 1:
                dk = tl.sum(tl.reshape(dk, (BLOCK_T, BLOCK_K, BLOCK_R)), 2)
            _store(d_key, key_width, start + left, end, block_keys, block_keys_inside, dk, BLOCK_T)
        scale = tl.exp(maximum - _finite(older_maximum))
        older_g, older_c, older_maximum = older_g * scale + more_g, older_c * scale + more_c, maximum
        if PAST > 0:
            tl.debug_barrier()  # what a thread left in a buffer, another may read for the next tile
    if NEEDS_OLDER and chunk == 0:
        d_older += batch * 2 * width
        tl.store(d_older + channels, older_g, mask=inside)
        tl.store(d_older + width + channels, older_c, mask=inside)


# -------------------------------------------------------------------------------------------------------- operators


def _plan(query, key, value, rows, layouts) -> dict:
    """The arguments that all kernels of one direction share: sizes, strides, and how the work is cut."""
    batch, length, width = query.shape
    heads, taps = (1, 0) if rows is None else (rows.shape[0], rows.shape[3])
    head_keys, shared = key.shape[2] // heads, width // key.shape[2]
    layout = layouts[rows is not None]
    channels = layout["channels"]
    block_r = min(triton.next_power_of_2(shared), channels)
    block_k = min(triton.next_power_of_2(head_keys), channels // block_r)
    block_k = max(block_k, 16 // block_r)  # the smallest matrix product
    dtype = compute_dtype(query, key, value)
    half = all(t.dtype in (torch.float16, torch.bfloat16) for t in (query, key, value))
    blocks = heads * triton.cdiv(head_keys, block_k) * triton.cdiv(shared, block_r)
    tiles = triton.cdiv(length, _BLOCK_T)
    chunk_tiles = triton.cdiv(tiles, _chunks(blocks * batch, tiles, query.device))
    strides = {}
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        strides |= {f"{name}_batch": tensor.stride(0), f"{name}_row": tensor.stride(1)}
    for dim, name in enumerate(("rows_head", "rows_batch", "rows_row")):
        strides[name] = 0 if rows is None or rows.shape[dim] == 1 else rows.stride(dim)
    return {
        **{"length": length, "left": key.shape[1] - length, "taps": taps, "tiles": tiles, "width": width},
        **{"chunk_tiles": chunk_tiles, "chunks": triton.cdiv(tiles, chunk_tiles), "blocks": blocks},
        **{"head_keys": head_keys, "SHARED": shared, "BLOCK_K": block_k, "BLOCK_R": block_r, "BLOCK_T": _BLOCK_T},
        "PAST": triton.cdiv(max(taps - 1, 1), _BLOCK_T) * _BLOCK_T if taps else 0,
        **{"DTYPE": tl.float64 if dtype == torch.float64 else tl.float32, "TINY": _TINY[dtype]},
        "LARGEST": _LARGEST[dtype],
        **{"PRECISION": "tf32" if half else "ieee" if dtype == torch.float64 else "tf32x3"},
        **strides,
        **{"num_warps": layout["num_warps"], "maxnreg": layout["maxnreg"]},
    }


def _chunks(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many chunks of time to cut the work of `programs` programs: 1 where they fill the chip without."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if programs >= processors:
        return 1
    return min(triton.cdiv(4 * processors, programs), triton.cdiv(tiles, 4))


def _launch(kernel, programs: int, plan: dict, *tensors, **options):
    """Starts a kernel with those arguments of the plan that it takes."""
    plan = {name: value for name, value in plan.items() if name in (*kernel.arg_names, *_OPTIONS)}
    kernel[(programs,)](*tensors, **plan, **options)


def _states_like(query, key, value, count):
    dtype = compute_dtype(query, key, value)
    return query.new_empty(query.shape[0], count, 3, query.shape[2], dtype=dtype)


def _scan_options(width: int) -> dict:
    block = min(triton.next_power_of_2(width), 128)
    return {"blocks": triton.cdiv(width, block), "BLOCK_D": block}


@torch.library.custom_op(f"{_NAMESPACE}::windowed_triton", mutates_args=())
def _windowed(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, initial: Tensor | None, query_activation: str
) -> tuple[Tensor, Tensor]:
    """Result [B, T, D] and the sums of the keys older than each panel [B, tiles, 3, D].

    query [B, T, D], key [B, L+T, K], value [B, L+T, D], rows [heads, 1 or B, 1 or T, n], initial [B, 3, D].
    """
    plan = _plan(query, key, value, rows, _FORWARD)
    programs = plan["blocks"] * plan["chunks"] * query.shape[0]
    out = query.new_empty(query.shape)
    states = _states_like(query, key, value, plan["tiles"])
    carry = initial
    if plan["chunks"] > 1:
        carry = _states_like(query, key, value, plan["chunks"])
        _launch(_forward_sums, programs, plan, key, value, carry)
        scan = {**plan, **_scan_options(plan["width"])}
        has_initial = {"HAS_INITIAL": initial is not None}
        _launch(
            _forward_scan,
            scan["blocks"] * query.shape[0],
            scan,
            carry,
            carry if initial is None else initial,
            **has_initial,
        )
    options = {"HAS_CARRY": carry is not None, "ACTIVATION": query_activation, "STAGES": 1 if plan["PAST"] else 3}
    tensors = (query, key, value, query if rows is None else rows, states if carry is None else carry, out, states)
    _launch(_forward, programs, plan, *tensors, **options)
    return out, states


@_windowed.register_fake
def _(query, key, value, rows, initial, query_activation):
    return query.new_empty(query.shape), _states_like(query, key, value, -(-query.shape[1] // _BLOCK_T))


@flops_of(_windowed)
def _windowed_flops(query, key, value, rows, initial, query_activation):
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
    initial: Tensor | None,
    states: Tensor,
    query_activation: str,
    needs_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, rows (empty unless `needs_rows`) and initial (empty if it is None)."""
    plan = _plan(query, key, value, rows, _BACKWARD)
    batch, length, width = query.shape
    programs = plan["blocks"] * plan["chunks"] * batch
    share_blocks = triton.cdiv(plan["SHARED"], plan["BLOCK_R"])
    d_query, d_value = query.new_empty(query.shape), value.new_empty(value.shape)
    d_key = key.new_empty(share_blocks, *key.shape, dtype=key.dtype if share_blocks == 1 else states.dtype)
    d_older = states.new_empty(0 if initial is None else batch, 2, width)
    columns = plan["BLOCK_K"] * plan["BLOCK_R"]
    scratch = states.new_empty(programs, 2, plan["PAST"], columns)
    d_rows = states.new_empty(0)
    row_per_query = rows is not None and rows.shape[2] > 1
    if needs_rows and row_per_query:
        d_rows = states.new_empty(plan["blocks"], batch, length, plan["taps"])
    elif needs_rows:
        d_rows = states.new_zeros(plan["blocks"], batch, plan["chunks"] * _BLOCK_T, plan["taps"])
    bias, carry = query if rows is None else rows, states
    inputs = (grad, query, key, value, bias, states)
    if plan["chunks"] > 1:
        carry = _states_like(query, key, value, plan["chunks"])
        _launch(_backward_sums, programs, plan, *inputs, carry, ACTIVATION=query_activation)
        scan = {**plan, **_scan_options(width)}
        _launch(_backward_scan, scan["blocks"] * batch, scan, carry)
    options = {"HAS_CARRY": plan["chunks"] > 1, "NEEDS_ROWS": needs_rows, "ROW_PER_QUERY": row_per_query}
    options |= {
        "NEEDS_OLDER": initial is not None,
        "ACTIVATION": query_activation,
        "batches": batch,
        "STAGES": 1 if plan["PAST"] else 2,
    }
    options["num_stages"] = 1  # the scratch buffer must not be read ahead
    outputs = (d_query, d_key, d_value, d_rows, d_older)
    _launch(_backward, programs, plan, *inputs, carry, scratch, *outputs, **options)

    d_key = d_key[0] if share_blocks == 1 else d_key.sum(0).to(key.dtype)
    if needs_rows:
        d_rows = d_rows.unflatten(0, (rows.shape[0], -1))
        dims = [1] + [dim + 1 for dim in (1, 2) if rows.shape[dim] == 1]
        d_rows = d_rows.sum(dims).reshape(rows.shape).to(rows.dtype)
    d_initial = states.new_empty(0)
    if initial is not None:
        d_total, d_normalizer = d_older[:, 0], -d_older[:, 1]
        d_maximum = initial[:, 1] * d_normalizer + initial[:, 2] * d_total
        d_initial = torch.stack([d_maximum, d_normalizer, d_total], 1)
    return d_query, d_key, d_value, d_rows, d_initial


@_windowed_backward.register_fake
def _(grad, query, key, value, rows, initial, states, query_activation, needs_rows):
    like = [t.new_empty(t.shape) for t in (query, key, value)]
    d_rows = rows.new_empty(rows.shape) if needs_rows else states.new_empty(0)
    return *like, d_rows, states.new_empty(0 if initial is None else initial.shape)


@flops_of(_windowed_backward)
def _(grad, query, key, value, rows, initial, states, query_activation, needs_rows):
    # The products of the forward pass, again, and the two gradients of each.
    return (2 + needs_rows) * _windowed_flops(query, key, value, rows, initial, query_activation)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.query_activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    initial = ctx.saved_tensors[4]
    needs_rows = ctx.needs_input_grad[3]
    grads = _windowed_backward(grad.contiguous(), *ctx.saved_tensors, ctx.query_activation, needs_rows)
    return (*grads[:3], grads[3] if needs_rows else None, None if initial is None else grads[4], None)


_windowed.register_autograd(_differentiate, setup_context=_save_for_backward)


def windowed_triton(window: Window) -> Tensor:
    """
    See [`Window`], causal. A query that sees no key gives 0, with zero gradients. The sums are taken in float32, or in
    float64 if an input is. Half-precision inputs go through the tensor cores in tf32.
    """
    query, key, value, rows, past, (maximum, normalizer, average), _, activation = window
    if past is not None:
        key, value = torch.cat([past[0].to(key.dtype), key], 1), torch.cat([past[1].to(value.dtype), value], 1)
    dtype = compute_dtype(query, key, value)
    maximum, normalizer = (spread(tensor.to(dtype), average) for tensor in (maximum, normalizer))
    initial = torch.stack([maximum, normalizer, normalizer * average.to(dtype)], 1)
    query, key, value, rows = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, rows)
    )
    return _windowed(query, key, value, rows, initial, activation)[0]
