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
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_export import is_exporting, is_transformed, panel_for_export
from .ops_panel import finite, flops_of, gradients_inside_operator, operator, panel, panel_composed, spread
from .ops_reference import gated


_CHUNK = 64  # queries per panel, where the window is not longer


def summarize(key: Tensor, value: Tensor, dim: int):
    """Sums up the keys along `dim`. Keys of minus infinity count as absent.

    The maximum is a constant for autograd, here and in `merge`: only normalizer * exp(maximum) has a meaning, and its
    gradient is whole without it.
    """
    maximum = key.detach().amax(dim, keepdim=True)
    weight = (key - finite(maximum)).exp()
    normalizer = weight.sum(dim)
    share = weight / nonzero(normalizer).unsqueeze(dim)  # first, so that no sum is larger than its largest value
    return maximum.squeeze(dim), normalizer, (spread(share, value) * value).sum(dim)


def nonzero(normalizer: Tensor) -> Tensor:
    return torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)


def merge(first, second):
    """Sums up two sums over disjoint keys. Exact, associative; (-inf, 0, 0) changes nothing."""
    maximum = torch.maximum(first[0], second[0]).detach()
    reference = finite(maximum)
    weight_1 = (first[0] - reference).exp() * first[1]
    weight_2 = (second[0] - reference).exp() * second[1]
    normalizer = weight_1 + weight_2
    whole = nonzero(normalizer)
    average = spread(weight_1 / whole, first[2]) * first[2] + spread(weight_2 / whole, second[2]) * second[2]
    return maximum, normalizer, average


def _shift(sums, steps: int):
    """Moves the sums [B, N, ...] up by `steps` places along dim 1, filling with the sum of nothing."""
    fill = (-torch.inf, 0.0, 0.0)
    return tuple(F.pad(t[:, :-steps], (0, 0, steps, 0), value=v) for t, v in zip(sums, fill, strict=True))


def _exclusive_scan(sums, initial):
    """Sum of `initial` and of all earlier places, for each of the N places: log2(N) merges."""
    sums = tuple(torch.cat([i[:, None], t[:, :-1]], 1) for i, t in zip(initial, sums, strict=True))
    step = 1
    while step < sums[0].shape[1]:
        sums = merge(_shift(sums, step), sums)
        step *= 2
    return sums


def nothing(key: Tensor, value: Tensor, dtype: torch.dtype):
    """The sum of no keys: [B, K], [B, K], [B, V]."""
    size, like = (key.shape[0], key.shape[2]), {"dtype": dtype, "device": key.device}
    average = torch.zeros(value.shape[0], value.shape[2], **like)
    return torch.full(size, -torch.inf, **like), torch.zeros(size, **like), average


def with_past(key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, left: int, dtype: torch.dtype):
    """Keys and values with the `left` before them in front, minus infinity and 0 where there is none."""
    key, value = key.to(dtype), value.to(dtype)
    if past is None:
        return F.pad(key, (0, 0, left, 0), value=-torch.inf), F.pad(value, (0, 0, left, 0))
    return torch.cat([past[0].to(dtype), key], 1), torch.cat([past[1].to(dtype), value], 1)


def weighted_average(*arguments) -> Tensor:
    """The average that a panel gives; neither an exported program nor a transform can do with its operator."""
    if is_exporting():
        return panel_for_export(*arguments)
    return panel_composed(*arguments) if is_transformed() else panel(*arguments)[0]


def windowed_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    initial: tuple[Tensor, Tensor, Tensor],
    activation: str,
) -> Tensor:
    """The causal forms, the signature that all operators for them share: [B, T, D] in the dtype of the query.

    query, value [B, T, D], key [B, T, K], minus infinity where there is none; rows [heads, 1 or B, 1 or T, n], the
    window bias of each query, or None; past: the n - 1 keys and values before the first query, or None; initial: the
    sum of all keys before those, as maximum and normalizer [B, K] and average [B, D], in the dtype of the computation.
    """
    left = 0 if rows is None else rows.shape[-1] - 1
    key, value = with_past(key, value, past, left, initial[0].dtype)
    return gated(query, windowed_average(key, value, rows, True, initial), activation)


@operator("bidirectional")
def bidirectional(key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """`windowed_average` without a past, for queries that see both sides, as one operator: a compiled model has one
    graph for all lengths, of which the number of chunks would make a graph each. It computes all again in its backward
    pass."""
    left = (rows.shape[-1] - 1) // 2
    initial = nothing(key, value, key.dtype)
    return windowed_average(*with_past(key, value, None, left, key.dtype), rows, False, initial).contiguous()


@bidirectional.register_fake
def _(key, value, rows):
    return value.new_empty(value.shape)


@flops_of(bidirectional)
def _bidirectional_flops(key, value, rows):
    batch, length = value.shape[:2]
    reach = rows.shape[3] - 1
    chunk = max(reach, min(_CHUNK, length))
    pairs = -(-length // chunk) * chunk * (2 + chunk + reach)
    return 2 * batch * pairs * (key.shape[2] + value.shape[2])


@operator("bidirectional_backward")
def bidirectional_backward(grad: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `bidirectional` with respect to its arguments."""
    return gradients_inside_operator(bidirectional.plain, [key, value, rows], grad)


@bidirectional_backward.register_fake
def _(grad, key, value, rows):
    return tuple(t.new_empty(t.shape) for t in (key, value, rows))


@flops_of(bidirectional_backward)
def _(grad, *inputs):
    return 3 * _bidirectional_flops(*inputs)  # the products, again, and the two gradients of each


bidirectional.register_autograd(
    lambda ctx, grad: bidirectional_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def windowed_average(key, value, rows, causal, initial):
    """Average [B, T, V] of the windowed forms.

    key [B, L+T, K], value [B, L+T, V]: the L keys before the first query that can lie in its window (minus infinity
    where there is none), then those of the T queries. rows [heads, 1 or B, 1 or T, n]: the window bias of each query.
    initial: the sum of all keys before those.
    """
    if rows is None and not causal and is_exporting():  # all see the same; what is below would ask for strides
        return summarize(key, value, dim=1)[2][:, None].expand(-1, value.shape[1], -1)
    if rows is None:
        rows = key.new_zeros(1, 1, 1, 1)
    heads, _, _, taps = rows.shape
    left = taps - 1 if causal else (taps - 1) // 2
    right = 0 if causal else left
    batch, length = key.shape[0], key.shape[1] - left
    if is_exporting():  # one panel for a text of any length: the example must not fix their number
        chunk, chunks = length + left + right, 1
    else:
        chunk = max(left + right, min(_CHUNK, length))
        chunks = -(-length // chunk)

    # Chunks of keys [B, chunks + 1, C, .]; the panel of chunk i has keys i C to i C + left + C + right.
    pad = (chunks + 1) * chunk - left - length
    key = F.pad(key, (0, 0, 0, pad), value=-torch.inf).unflatten(1, (chunks + 1, chunk))
    value = F.pad(value, (0, 0, 0, pad)).unflatten(1, (chunks + 1, chunk))
    sums = [_exclusive_scan(summarize(key[:, :-1], value[:, :-1], dim=2), initial)]
    if not causal:
        sums.append(_later_sums(key, value, left + right))
    sums = [torch.stack(t, 2) for t in zip(*sums, strict=True)]  # [B, chunks, Z, .]
    key, value = (torch.cat([t[:, :-1], t[:, 1:, : left + right]], 2) for t in (key, value))  # [B, chunks, S, .]

    bias = _panel_bias(rows, length, chunk, chunks, left, right, causal)  # [heads, 1 or B, 1 or chunks, C, Z + S]
    layout = _panel_layout(bias)
    average = weighted_average(*(_to_panel(t, heads, layout) for t in (key, value, *sums)), bias.flatten(0, 2), 0)
    return _from_panel(average, heads, batch, chunks, layout)[:, :length]


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
