# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The AFT operator as matrix products over chunks of time: exact, and linear in T for simple, local and conv.

All forms come down to panels (ops_panel.py). Full is a single panel. The windowed forms cut time into chunks; the
panel of a chunk has its own keys, those of the window, and one extra key that stands for everything older (its weight
and its average are carried from chunk to chunk by an associative scan). AFT-simple is the case without a window.
Padding is dealt with at the door: kept tokens are moved to the front, so that it only ever stands at the end.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_export import is_exporting, panel_for_export
from .ops_padding import compact, expand, kept_rank
from .ops_panel import finite, panel, spread
from .ops_reference import AFTState, compute_dtype


_CHUNK = 64  # queries per panel of the windowed forms, where the window is not longer


def _summarize(key: Tensor, value: Tensor, dim: int):
    """Sums up the keys along `dim`. Keys of minus infinity count as absent.

    The maximum is a constant for autograd, here and in `_merge`: only normalizer * exp(maximum) has a meaning, and its
    gradient is whole without it.
    """
    maximum = key.detach().amax(dim, keepdim=True)
    weight = (key - finite(maximum)).exp()
    normalizer = weight.sum(dim)
    total = (spread(weight, value) * value).sum(dim)
    return maximum.squeeze(dim), normalizer, total / spread(_nonzero(normalizer), total)


def _nonzero(normalizer: Tensor) -> Tensor:
    return torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)


def _merge(first, second):
    """Sums up two sums over disjoint keys. Exact, associative; (-inf, 0, 0) changes nothing."""
    maximum = torch.maximum(first[0], second[0]).detach()
    reference = finite(maximum)
    weight_1 = (first[0] - reference).exp() * first[1]
    weight_2 = (second[0] - reference).exp() * second[1]
    normalizer = weight_1 + weight_2
    total = spread(weight_1, first[2]) * first[2] + spread(weight_2, second[2]) * second[2]
    return maximum, normalizer, total / spread(_nonzero(normalizer), total)


def _shift(sums, steps: int):
    """Moves the sums [B, N, ...] up by `steps` places along dim 1, filling with the sum of nothing."""
    fill = (-torch.inf, 0.0, 0.0)
    return tuple(F.pad(t[:, :-steps], (0, 0, steps, 0), value=v) for t, v in zip(sums, fill, strict=True))


def _exclusive_scan(sums, initial):
    """Sum of `initial` and of all earlier places, for each of the N places: log2(N) merges."""
    sums = tuple(torch.cat([i[:, None], t[:, :-1]], 1) for i, t in zip(initial, sums, strict=True))
    step = 1
    while step < sums[0].shape[1]:
        sums = _merge(_shift(sums, step), sums)
        step *= 2
    return sums


def _nothing(key: Tensor, value: Tensor):
    """The sum of no keys: [B, K], [B, K], [B, V]."""
    size = (key.shape[0], key.shape[2])
    return key.new_full(size, -torch.inf), key.new_zeros(size), value.new_zeros(value.shape[0], value.shape[2])


def _average(*arguments) -> Tensor:
    """The average that a panel gives; an exported program must not depend on this package's operators."""
    return panel_for_export(*arguments) if is_exporting() else panel(*arguments)[0]


def _full_shared(key, value, position_bias, causal, rank):
    """Average [B, T, V] of the full form where all rows of the batch have the positions 0, 1, ...: one bias."""
    length = key.shape[1]
    if rank is not None:
        key, value = compact(key, rank, -torch.inf), compact(value, rank)
    beyond = max(length - position_bias.shape[0], 0)  # only padding can lie beyond the table
    bias = F.pad(position_bias[:length, :length], (0, beyond, 0, beyond))[None]
    out = _full_panel(key.transpose(0, 1)[None], value.transpose(0, 1)[None], bias, causal, 0)  # [1, T, B, V]
    out = out[0].transpose(0, 1)
    return out if rank is None else expand(out, rank)


def _full_rows(key, value, position_bias, causal, keep, positions, key_positions):
    """The same for positions [B, T] and key_positions [B, S] of any kind: a bias [B, T, S]."""
    length = positions.shape[1]
    if position_bias.dim() == 2:
        position_bias = position_bias[positions]
    bias = position_bias.gather(2, key_positions[:, None].expand(-1, length, -1))
    if keep is not None:
        bias = bias.masked_fill(~keep[..., None], -torch.inf)
    return _full_panel(key.unsqueeze(2), value.unsqueeze(2), bias, causal, key.shape[1] - length).squeeze(2)


def _full_panel(key, value, bias, causal, past):
    if causal:
        query_index = torch.arange(bias.shape[1], device=key.device)[:, None] + past
        bias = bias.masked_fill(torch.arange(bias.shape[2], device=key.device) > query_index, -torch.inf)
    no_key, no_value = (t.new_empty(t.shape[0], 0, *t.shape[2:]) for t in (key, value))
    visible = past + 1 if causal else 0
    return _average(key.contiguous(), value.contiguous(), no_key, no_key, no_value, bias.contiguous(), visible)


def _windowed(key, value, rows, causal, initial):
    """Average [B, T, V] of the windowed forms.

    key [B, L+T, K], value [B, L+T, V]: the L keys before the first query that can lie in its window (minus infinity
    where there is none), then those of the T queries. rows [heads, 1 or B, 1 or T, n]: the window bias of each query.
    initial: the sum of all keys before those.
    """
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
    sums = [_exclusive_scan(_summarize(key[:, :-1], value[:, :-1], dim=2), initial)]
    if not causal:
        sums.append(_later_sums(key, value, left + right))
    sums = [torch.stack(t, 2) for t in zip(*sums, strict=True)]  # [B, chunks, Z, .]
    key, value = (torch.cat([t[:, :-1], t[:, 1:, : left + right]], 2) for t in (key, value))  # [B, chunks, S, .]

    bias = _panel_bias(rows, length, chunk, chunks, left, right, causal)  # [heads, 1 or B, 1 or chunks, C, Z + S]
    layout = _panel_layout(bias)
    average = _average(*(_to_panel(t, heads, layout) for t in (key, value, *sums)), bias.flatten(0, 2), 0)
    return _from_panel(average, heads, batch, chunks, layout)[:, :length]


def _later_sums(key, value, reach):
    """Sums of all keys that come after the panel of each chunk (bidirectional forms)."""
    tail_key = F.pad(key.flatten(1, 2)[:, reach:], (0, 0, 0, reach), value=-torch.inf).unflatten(1, key.shape[1:3])
    tail_value = F.pad(value.flatten(1, 2)[:, reach:], (0, 0, 0, reach)).unflatten(1, value.shape[1:3])
    chunk_sums = _summarize(tail_key[:, 1:], tail_value[:, 1:], dim=2)  # of the chunks that follow each panel
    nothing = _nothing(key[:, :, 0], value[:, :, 0])
    # Chunk i of `tail` begins where panel i ends, less one chunk: panel i is followed by chunks i + 1, i + 2, ...
    backwards = tuple(t.flip(1) for t in chunk_sums)
    return tuple(t.flip(1) for t in _merge(_exclusive_scan(backwards, nothing), backwards))


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


def _step(key, value, rows, initial):
    """`_windowed` for a single query: key [B, L+1, K], value [B, L+1, V], rows [heads, 1 or B, 1, L+1]."""
    bias = rows[:, :, 0].flip(-1).permute(1, 2, 0)  # [1 or B, L+1, heads], oldest key first
    logits = key + spread(bias, key)
    maximum, normalizer, average = initial
    reference = finite(torch.maximum(logits.detach().amax(1), maximum.detach()))
    weight = (logits - reference[:, None]).exp()
    older = (maximum - reference).exp() * normalizer
    total = (spread(weight, value) * value).sum(1) + spread(older, average) * average
    return (total / spread(_nonzero(weight.sum(1) + older), total))[:, None]


def _bias_rows(window_bias, length, position, rank, position_ids, continued):
    """The window bias of each query, [heads, 1 or B, 1 or T, n], in the order of the compacted tokens."""
    if window_bias.dim() == 4:
        if rank is None:
            return window_bias
        return torch.stack([compact(row, rank) for row in window_bias])
    table = window_bias.shape[1]
    if table == 1:
        return window_bias[:, None]
    if position_ids is None and not continued:
        # Kept tokens stand in front, at positions 0, 1, ...; only padding can lie beyond the table.
        return F.pad(window_bias[:, :length], (0, 0, 0, max(length - table, 0)))[:, None]
    if position_ids is None:
        position_ids = position[:, None] + torch.arange(length, device=position.device)
    elif rank is not None:
        position_ids = compact(position_ids[..., None], rank).squeeze(-1)
    if rank is not None:
        position_ids = position_ids.clamp_max(table - 1)  # of padding: no key and no query that counts
    return window_bias[:, position_ids]


def _window_state(key, value, left, count, initial):
    """The state after the last token; key and value as for `_windowed`, count [B] of kept tokens or None for all."""
    length = key.shape[1] - left
    older_key, older_value = key[:, :length], value[:, :length]
    window_key, window_value = key[:, length:], value[:, length:]
    if count is not None:
        beyond = torch.arange(length, device=key.device) >= count[:, None]
        older_key = older_key.masked_fill(beyond[..., None], -torch.inf)
        index = (count[:, None] + torch.arange(left, device=key.device))[..., None]
        window_key = key.gather(1, index.expand(-1, -1, key.shape[2]))
        window_value = value.gather(1, index.expand(-1, -1, value.shape[2]))
    constant, normalizer, average = _merge(initial, _summarize(older_key, older_value, dim=1))
    maximum = torch.maximum(initial[0], older_key.amax(1))
    normalizer = normalizer * (finite(constant) - finite(maximum)).exp()  # a factor of 1, with its gradient
    # Copies, because slices would keep the tensors of the whole text alive.
    return AFTState(None, window_key.clone(), window_value.clone(), None, maximum, normalizer, average)


def aft_attention_torch(
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    window_bias: Tensor | None,
    causal: bool,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    state: AFTState | None,
    return_state: bool,
) -> tuple[Tensor, AFTState | None]:
    """The average of eq. 2, 4, 5 or 6 without the query gate, [B, T, D], and the state after the last token.

    Same arguments as [`~modeling_aft.ops.aft_attention`], already validated.
    """
    dtype = torch.promote_types(compute_dtype(key), compute_dtype(value))
    storage = (key.dtype, value.dtype)
    key, value = key.to(dtype), value.to(dtype)
    position = key.new_zeros(key.shape[0], dtype=torch.long) if state is None else state.position
    keep = None
    steps = torch.arange(key.shape[1], device=key.device)[None]
    if attention_mask is not None:
        keep = attention_mask.bool()
        key = key.masked_fill(~keep[..., None], -torch.inf)
        value = value.masked_fill(~keep[..., None], 0)
        steps = (keep.long().cumsum(1) - 1).clamp_min(0)
    form = _full_form if position_bias is not None else _window_form
    bias = position_bias if position_bias is not None else window_bias
    bias = key.new_zeros(1, 1, 1) if bias is None else bias.to(dtype)
    average, new_state = form(key, value, bias, causal, keep, position, steps, position_ids, state, return_state)
    if return_state:
        if position_ids is None:
            next_position = position + (key.shape[1] if keep is None else keep.sum(1))
        else:
            last = position_ids if keep is None else position_ids.masked_fill(~keep, -1)
            next_position = torch.maximum(position, last.amax(1) + 1)
        stored = {"key": new_state.key.to(storage[0]), "value": new_state.value.to(storage[1])}
        new_state = new_state._replace(position=next_position, **stored)
    return average, new_state


def _full_form(key, value, bias, causal, keep, position, steps, position_ids, state, return_state):
    """AFT-full: average and state; `steps` counts the kept tokens before each."""
    shared = state is None and position_ids is None and bias.dim() == 2
    if shared:
        average = _full_shared(key, value, bias, causal, None if keep is None else kept_rank(keep))
    key_positions = positions = position[:, None] + steps if position_ids is None else position_ids
    if state is not None:
        key, value = torch.cat([state.key.to(key.dtype), key], 1), torch.cat([state.value.to(key.dtype), value], 1)
        key_positions = torch.cat([state.key_position, positions], 1)
    if not shared:
        average = _full_rows(key, value, bias, causal, keep, positions, key_positions)
    return average, AFTState(position, key, value, key_positions) if return_state else None


def _window_form(key, value, bias, causal, keep, position, steps, position_ids, state, return_state):
    """AFT-local, AFT-conv, AFT-simple: average and state."""
    left = bias.shape[-1] - 1 if causal else (bias.shape[-1] - 1) // 2
    rank = None if keep is None else kept_rank(keep)
    if rank is not None:
        key, value = compact(key, rank, -torch.inf), compact(value, rank)
    if state is None:
        initial = _nothing(key, value)
        key, value = F.pad(key, (0, 0, left, 0), value=-torch.inf), F.pad(value, (0, 0, left, 0))
    else:
        initial = tuple(t.to(key.dtype) for t in (state.maximum, state.normalizer, state.average))
        key, value = torch.cat([state.key.to(key.dtype), key], 1), torch.cat([state.value.to(key.dtype), value], 1)
    rows = _bias_rows(bias, key.shape[1] - left, position, rank, position_ids, state is not None)
    if causal and key.shape[1] - left == 1:
        average = _step(key, value, rows, initial)
    else:
        average = _windowed(key, value, rows, causal, initial)
    new_state = None
    if return_state:
        new_state = _window_state(key, value, left, None if keep is None else keep.sum(1), initial)
    return (average if rank is None else expand(average, rank)), new_state
