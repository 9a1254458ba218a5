# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The windowed forms (simple, local, conv) on any device: exact for any input, linear in T, in torch's operators.

Time is cut into chunks. The panel (ops_panel.py) of a chunk has its own keys, those of the window, and one extra key
that stands for everything older, or two, bidirectionally; their weight and their average are carried from chunk to
chunk by an associative scan. AFT-simple is the case without a window.

A decay is put into the keys of a panel, as they are where its last query stands: what remains to each query is a
factor that all its keys share, and no average depends on it. Bidirectionally there are two such averages, of what
comes before a query and of what comes after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_modes import widest_dtype
from .ops_operators import flops_of, gradients_inside_operator, operator
from .ops_panel import panel_average, panel_for_export
from .ops_state import decayed, finite, gated, merge, nothing, summarize, with_past
from .ops_windows import Window


_CHUNK = 64  # queries per panel, where the window is not longer


def _shift(sums, steps: int):
    """Moves the sums [B, N, ...] up by `steps` places along dim 1, filling with the sum of nothing."""
    fill = (-torch.inf, 0.0, 0.0)
    return tuple(F.pad(t[:, :-steps], (0, 0, steps, 0), value=v) for t, v in zip(sums, fill, strict=True))


def _exclusive_scan(sums, initial, decay=None):
    """Sum of `initial` and of all earlier places, for each of the N places, from one to the next of which it falls by
    the decay: log2(N) merges."""
    sums = tuple(torch.cat([i[:, None], t[:, :-1]], 1) for i, t in zip(initial, sums, strict=True))
    step = 1
    while step < sums[0].shape[1]:
        maximum, *others = _shift(sums, step)
        sums = merge((decayed(maximum, decay, step), *others), sums)
        step *= 2
    return sums


def windowed_chunks(window: Window, panel: Callable[..., tuple] = panel_average) -> Tensor:
    """See [`Window`]; `panel` gives the average of a panel and the log of its denominator."""
    if not window.causal:
        average = _both_sides(window.key, window.value, window.rows, window.decay, window.dtype, panel)
    else:
        key, value = with_past(window.key, window.value, window.past, window.left, window.dtype)
        average, _ = _average(key, value, window.rows, True, window.initial, window.decay, panel)
    return gated(window.query, average, window.activation)


def windowed_export(window: Window) -> Tensor:
    """See [`Window`]: one panel for a text of any length, as the example must not fix the number of chunks."""
    key, value, rows, decay = window.key, window.value, window.rows, window.decay
    initial, dtype = window.initial, window.dtype
    if decay is not None:  # over a whole text it leaves the range of float32
        dtype = widest_dtype(key.device)
        rows, decay = (None if tensor is None else tensor.to(dtype) for tensor in (rows, decay))
        initial = tuple(tensor.to(dtype) for tensor in initial)
    if window.causal:
        key, value = with_past(key, value, window.past, window.left, dtype)
        average, _ = _average(key, value, rows, True, initial, decay, panel_for_export, in_one=True)
    elif rows is None and decay is None:  # all see the same; a panel would ask for strides
        average = summarize(key.to(dtype), value.to(dtype), dim=1)[2][:, None].expand(-1, value.shape[1], -1)
    else:
        average = _both_sides(key, value, rows, decay, dtype, panel_for_export, in_one=True)
    return gated(window.query, average.to(window.dtype), window.activation)


def windowed_bidirectional(window: Window) -> Tensor:
    """See [`Window`]: not causal, as one operator."""
    rows = window.initial[0].new_zeros(1, 1, 1, 1) if window.rows is None else window.rows
    decay = rows.new_empty(0) if window.decay is None else window.decay
    average = bidirectional(window.key.to(window.dtype), window.value.to(window.dtype), rows, decay)
    return gated(window.query, average, window.activation)


@operator("bidirectional")
def bidirectional(key: Tensor, value: Tensor, rows: Tensor, decay: Tensor) -> Tensor:
    """The average without a past, for queries that see both sides; decay [K] or empty. A compiled model has one graph
    for all lengths, of which the number of chunks would make a graph each. It computes all again in its backward
    pass."""
    return _both_sides(key, value, rows, decay if len(decay) else None, key.dtype, panel_average).contiguous()


@bidirectional.register_fake
def _(key, value, rows, decay):
    return value.new_empty(value.shape)


@flops_of(bidirectional)
def _bidirectional_flops(key, value, rows, decay):
    batch, length = value.shape[:2]
    reach = rows.shape[3] - 1
    if len(decay):  # two causal panels of half of the window
        reach //= 2
    chunk = max(reach, min(_CHUNK, length))
    pairs = -(-length // chunk) * chunk * (2 * (1 + chunk + reach) if len(decay) else 2 + chunk + reach)
    return 2 * batch * pairs * (key.shape[2] + value.shape[2])


@operator("bidirectional_backward")
def bidirectional_backward(
    grad: Tensor, key: Tensor, value: Tensor, rows: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `bidirectional` with respect to its arguments."""
    return gradients_inside_operator(bidirectional.plain, [key, value, rows, decay], grad)


@bidirectional_backward.register_fake
def _(grad, key, value, rows, decay):
    return tuple(t.new_empty(t.shape) for t in (key, value, rows, decay))


@flops_of(bidirectional_backward)
def _(grad, *inputs):
    return 3 * _bidirectional_flops(*inputs)  # the products, again, and the two gradients of each


bidirectional.register_autograd(
    lambda ctx, grad: bidirectional_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _both_sides(key, value, rows, decay, dtype, panel, in_one=False):
    """Average [B, T, V] of queries that see both sides; arguments as in [`Window`]."""
    left = 0 if rows is None else (rows.shape[-1] - 1) // 2
    initial = nothing(key, value, dtype)
    if decay is None:
        return _average(*with_past(key, value, None, left, dtype), rows, False, initial, None, panel, in_one)[0]
    if rows is None:
        rows = decay.new_zeros(1, 1, 1, 1)
    # That of earlier keys and its own, and with time reversed that of later ones: its own is at the offset 0.
    later = F.pad(rows[..., :left].flip(-1, 2), (1, 0), value=-torch.inf)
    sides = []
    for tensors, bias in (((key, value), rows[..., left:]), ((key.flip(1), value.flip(1)), later)):
        tensors = with_past(*tensors, None, left, dtype)
        average, logs = _average(*tensors, bias, True, initial, decay, panel, in_one, with_log=True)
        sides.append((logs, torch.ones_like(logs), average))
    return merge(sides[0], tuple(tensor.flip(1) for tensor in sides[1]))[2]


def _average(key, value, rows, causal, initial, decay, panel, in_one=False, with_log=False):
    """Average [B, T, V] of the windowed forms, in chunks or in one panel; `with_log`, which needs a decay, also the
    log [B, T, K] of its denominator, else None.

    key [B, L+T, K], value [B, L+T, V]: the L keys before the first query that can lie in its window (minus infinity
    where there is none), then those of the T queries. rows [heads, 1 or B, 1 or T, n]: the window bias of each query.
    initial: the sum of all keys before those. decay: [K], causal only, or None.
    """
    if rows is None:
        rows = key.new_zeros(1, 1, 1, 1)
    heads, _, _, taps = rows.shape
    left = taps - 1 if causal else (taps - 1) // 2
    right = 0 if causal else left
    batch, length = key.shape[0], key.shape[1] - left
    if in_one:
        chunk, chunks = length + left + right, 1
    else:
        chunk = max(left + right, min(_CHUNK, length))
        chunks = -(-length // chunk)

    # Chunks of keys [B, chunks + 1, C, .]; the panel of chunk i has keys i C to i C + left + C + right.
    pad = (chunks + 1) * chunk - left - length
    key = F.pad(key, (0, 0, 0, pad), value=-torch.inf).unflatten(1, (chunks + 1, chunk))
    value = F.pad(value, (0, 0, 0, pad)).unflatten(1, (chunks + 1, chunk))
    if decay is None:
        sums = [_exclusive_scan(summarize(key[:, :-1], value[:, :-1], dim=2), initial)]
    else:
        sums = [_fading_sums(key[:, :-1], value[:, :-1], initial, decay)]
    if not causal:
        sums.append(_later_sums(key, value, left + right))
    sums = [torch.stack(t, 2) for t in zip(*sums, strict=True)]  # [B, chunks, Z, .]
    key, value = (torch.cat([t[:, :-1], t[:, 1:, : left + right]], 2) for t in (key, value))  # [B, chunks, S, .]
    if decay is not None:
        maximum = decayed(sums[0], decay, left + chunk)  # at the end of the panel
        reference = finite(torch.maximum(key.amax(2), maximum.amax(2).to(key.dtype)).detach())[:, :, None]
        distance = torch.arange(left + chunk - 1, -1, -1, device=key.device)[:, None]
        key, sums[0] = decayed(key - reference, decay, distance), (maximum - reference).to(key.dtype)

    bias = _panel_bias(rows, length, chunk, chunks, left, right, causal)  # [heads, 1 or B, 1 or chunks, C, Z + S]
    layout = _panel_layout(bias)
    tensors = (_to_panel(t, heads, layout) for t in (key, value, *sums))
    average, logs = panel(*tensors, bias.flatten(0, 2), 0, with_log)
    average = _from_panel(average, heads, batch, chunks, layout)[:, :length]
    if not with_log:
        return average, None
    logs = _from_panel(logs, heads, batch, chunks, layout).unflatten(1, (chunks, chunk)) + reference
    # Its keys are those at the end of the panel.
    logs = decayed(logs, decay, torch.arange(1 - chunk, 1, device=key.device)[:, None])
    return average, logs.flatten(1, 2)[:, :length]


def _fading_sums(key, value, initial, decay):
    """Sums of all keys before each chunk of [B, chunks, C, .], as they are where the last of those stands. What falls
    is in the widest dtype, and each chunk near 0 while it is added up: nothing taken off a large key is lost."""
    chunk, dtype = key.shape[2], key.dtype
    reference = finite(key.detach().amax(2))
    distance = torch.arange(chunk - 1, -1, -1, device=key.device)[:, None]
    maximum, *others = summarize(decayed(key - reference[:, :, None], decay, distance), value, dim=2)
    wide = widest_dtype(key.device)
    sums, initial = (maximum.to(wide) + reference, *others), (initial[0].to(wide), *initial[1:])
    maximum, *others = _exclusive_scan(sums, initial, decay * chunk)
    return maximum, *(tensor.to(dtype) for tensor in others)


def _later_sums(key, value, reach):
    """Sums of all keys that come after the panel of each chunk (bidirectional forms)."""
    tail_key = F.pad(key.flatten(1, 2)[:, reach:], (0, 0, 0, reach), value=-torch.inf).unflatten(1, key.shape[1:3])
    tail_value = F.pad(value.flatten(1, 2)[:, reach:], (0, 0, 0, reach)).unflatten(1, value.shape[1:3])
    chunk_sums = summarize(tail_key[:, 1:], tail_value[:, 1:], dim=2)  # of the chunks that follow each panel
    initial = nothing(key[:, :, 0], value[:, :, 0], key.dtype)
    # Chunk i of `tail` begins where panel i ends, less one chunk: panel i is followed by chunks i + 1, i + 2, ...
    backwards = tuple(t.flip(1) for t in chunk_sums)
    return tuple(t.flip(1) for t in merge(_exclusive_scan(backwards, initial), backwards))


def _panel_bias(rows, length, chunk, chunks, left, right, causal):
    """Log weights [heads, 1 or B, 1 or chunks, C, Z + S] from the window bias of each query."""
    steps, taps = rows.shape[2:]
    if steps > 1:
        rows = F.pad(rows, (0, 0, 0, chunks * chunk - length)).unflatten(2, (chunks, chunk))
    else:
        rows = rows.unsqueeze(2).expand(-1, -1, -1, chunk, -1)
    query = torch.arange(chunk, device=rows.device)[:, None]
    tap = query + left + right - torch.arange(left + chunk + right, device=rows.device)[None]  # offset + right
    inside = (tap >= 0) & (tap < taps)
    index = torch.where(inside, tap, taps).expand(*rows.shape[:3], -1, -1)  # the last tap is added: bias 0
    bias = F.pad(rows, (0, 1)).gather(-1, index)
    if causal:
        bias = bias.masked_fill(tap < 0, -torch.inf)
    return F.pad(bias, (1 if causal else 2, 0))


def _panel_layout(bias):
    """Which of (batch, chunks) share a bias and so become columns of one matrix product: 'both', 'batch' or 'none'."""
    if bias.shape[1] > 1:
        return "none"
    return "batch" if bias.shape[2] > 1 else "both"


_PANEL_DIMS = {"both": (3, 2, 1, 0, 4), "batch": (3, 1, 2, 0, 4), "none": (3, 0, 1, 2, 4)}


def _to_panel(tensor, heads, layout):
    """[B, chunks, S, heads x K] to [G, S, P, K]."""
    tensor = tensor.unflatten(-1, (heads, -1)).permute(_PANEL_DIMS[layout])
    if layout == "both":  # [heads, S, chunks, B, K]
        tensor = tensor.flatten(2, 3)
    elif layout == "batch":  # [heads, chunks, S, B, K]
        tensor = tensor.flatten(0, 1)
    else:  # [heads, B, chunks, S, K]
        tensor = tensor.flatten(0, 2).unsqueeze(2)
    return tensor.contiguous()


def _from_panel(average, heads, batch, chunks, layout):
    """[G, C, P, V] to [B, T, heads x V]."""
    if layout == "both":
        average = average.unflatten(2, (chunks, batch)).permute(3, 2, 1, 0, 4)
    elif layout == "batch":
        average = average.unflatten(0, (heads, chunks)).permute(3, 1, 2, 0, 4)
    else:
        average = average.squeeze(2).unflatten(0, (heads, batch, chunks)).permute(1, 2, 3, 0, 4)
    return average.flatten(3).flatten(1, 2)
