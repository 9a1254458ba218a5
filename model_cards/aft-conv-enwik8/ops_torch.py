# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The AFT operator as matrix products: what all fast ways have in common, and the choice between them.

Full is a single panel (ops_panel.py). The windowed forms are linear in time: ops_cpu.py and ops_triton.py are single
operators for causal training and prefill, ops_chunks.py is for everything else, and a decoding step stands here.
Padding is dealt with at the door: kept tokens are moved to the front, so that it only ever stands at the end.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_chunks import bidirectional, merge, nothing, summarize, weighted_average, windowed_average, with_past
from .ops_export import is_exporting
from .ops_padding import compact, expand, kept_rank
from .ops_panel import finite, spread
from .ops_reference import AFTState, compute_dtype, gated


_NOTHING = 1e-30  # in place of a sum over nothing, which is 0


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
    return weighted_average(key.contiguous(), value.contiguous(), no_key, no_key, no_value, bias.contiguous(), visible)


def _step(query, key, value, rows, state, keep, activation):
    """A single query of the windowed forms, with as few operations as there can be: output and state.

    query, value [B, 1, D], key [B, 1, K], rows [heads, 1 or B, 1, n] (None: simple), keep [B, 1] or None for all.
    """
    split = (key.shape[2], -1)  # of value channels: [K, r], r of them share a key channel
    maximum, normalizer, average = state.maximum, state.normalizer, state.average
    if rows is None:
        keys, values = key, value
    else:
        # The sum of the older keys is one more key in front of those of the window.
        keys, values = torch.cat([state.key, key], 1), torch.cat([average[:, None], state.value, value], 1)
        bias = rows[:, :, 0].flip(-1).permute(1, 2, 0)  # [1 or B, n, heads], oldest key first
        bias = bias if bias.shape[2] == 1 else spread(bias, keys)
        # Rounded as keys + bias are; the state itself never is.
        older = (maximum + normalizer.clamp_min(_NOTHING).log())[:, None]
        logits = torch.cat([older, keys + bias], 1).clamp_min(torch.finfo(older.dtype).min)
        out = (logits.softmax(1)[..., None] * values.unflatten(-1, split)).sum(1).flatten(-2)
        values = values[:, 1:]
    # The key that leaves the window joins the older ones.
    oldest = keys[:, 0].to(maximum.dtype)
    largest = torch.maximum(maximum, oldest)
    reference = largest.clamp_min(torch.finfo(largest.dtype).min)
    weight = (oldest - reference).exp()
    normalizer = (maximum - reference).exp() * normalizer + weight
    share = (weight / normalizer.clamp_min(_NOTHING))[..., None]
    oldest = values[:, 0].to(average.dtype).unflatten(-1, split)
    average = torch.lerp(average.unflatten(-1, split), oldest, share).flatten(-2)
    if rows is None:
        out = average
    window = keys[:, 1:], values[:, 1:]
    if torch.is_grad_enabled():  # else a cache copies them into its own tensors
        window = tuple(t.clone() for t in window)
    new = AFTState(state.position, *window, None, largest, normalizer, average)
    if keep is not None:
        changes = zip(new, state, strict=True)
        new = AFTState(
            *(n if n is o else torch.where(keep[..., None] if n.dim() == 3 else keep, n, o) for n, o in changes)
        )
    return gated(query, out[:, None], activation), new


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
    """The state after the last token; key and value as for `windowed_average`, count [B] of kept tokens or None."""
    length = key.shape[1] - left
    older_key, older_value = key[:, :length], value[:, :length]
    window_key, window_value = key[:, length:], value[:, length:]
    if count is not None:
        beyond = torch.arange(length, device=key.device) >= count[:, None]
        older_key = older_key.masked_fill(beyond[..., None], -torch.inf)
        index = (count[:, None] + torch.arange(left, device=key.device))[..., None]
        window_key = key.gather(1, index.expand(-1, -1, key.shape[2]))
        window_value = value.gather(1, index.expand(-1, -1, value.shape[2]))
    constant, normalizer, average = merge(initial, summarize(older_key, older_value, dim=1))
    maximum = torch.maximum(initial[0], older_key.amax(1))
    normalizer = normalizer * (finite(constant) - finite(maximum)).exp()  # a factor of 1, with its gradient
    # Copies, because slices would keep the tensors of the whole text alive.
    return AFTState(None, window_key.clone(), window_value.clone(), None, maximum, normalizer, average)


def advance(before: AFTState | None, new, like: AFTState) -> AFTState:
    """
    The state after new tokens.

    Args:
        before: that before them, None at the start.
        new: has `key` [B, T, K], `value` [B, T, D], `attention_mask` [B, T] or None (all kept), and `position_ids`
            [B, T] or None (counted).
        like: any state of the same form.
    """
    key, value, keep = new.key, new.value, None
    position = key.new_zeros(key.shape[0], dtype=torch.long) if before is None else before.position
    if new.attention_mask is not None:
        keep = new.attention_mask.bool()
        key, value = key.masked_fill(~keep[..., None], -torch.inf), value.masked_fill(~keep[..., None], 0)
    if like.key_position is not None:
        state = _full_state(key, value, keep, position, new.position_ids, before)
    else:
        slot = None if keep is None else kept_rank(keep)
        if slot is not None:
            key, value = compact(key, slot, -torch.inf), compact(value, slot)
        dtype, left = compute_dtype(key, value), like.key.shape[1]
        past, initial = _past(before, key, value, dtype)
        count = None if keep is None else keep.sum(1)
        state = _window_state(*with_past(key, value, past, left, dtype), left, count, initial)
    return _completed(state, key, value, keep, position, new.position_ids)


def _past(state: AFTState | None, key: Tensor, value: Tensor, dtype: torch.dtype):
    """The keys and values of the window before the first query, or None, and the sum of those before."""
    if state is None:
        return None, nothing(key, value, dtype)
    return (state.key, state.value), tuple(t.to(dtype) for t in (state.maximum, state.normalizer, state.average))


def _completed(state: AFTState, key, value, keep, position, position_ids) -> AFTState:
    """With the next position, and keys and values in the dtypes that they came in."""
    if position_ids is None:
        next_position = position + (key.shape[1] if keep is None else keep.sum(1))
    else:
        last = position_ids if keep is None else position_ids.masked_fill(~keep, -1)
        next_position = torch.maximum(position, last.amax(1) + 1)
    return state._replace(position=next_position, key=state.key.to(key.dtype), value=state.value.to(value.dtype))


def _full_state(key, value, keep, position, position_ids, before) -> AFTState:
    """All keys and values so far, with the positions of each."""
    if position_ids is None:
        position_ids = position[:, None] + _counted(keep, key)
    if before is None:
        return AFTState(position, key, value, position_ids)
    key, value = torch.cat([before.key.to(key.dtype), key], 1), torch.cat([before.value.to(value.dtype), value], 1)
    return AFTState(position, key, value, torch.cat([before.key_position, position_ids], 1))


def _counted(keep: Tensor | None, key: Tensor) -> Tensor:
    """[1 or B, T]: the number of kept tokens before each."""
    if keep is None:
        return torch.arange(key.shape[1], device=key.device)[None]
    return (keep.long().cumsum(1) - 1).clamp_min(0)


def aft_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    window_bias: Tensor | None,
    causal: bool,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    state: AFTState | None,
    return_state: bool,
    activation: str,
    windowed: Callable,
) -> tuple[Tensor, AFTState | None]:
    """[B, T, D] of eq. 2, 4, 5 or 6 in the dtype of the query, and the state after the last token.

    Same arguments as [`~modeling_aft.ops.aft_attention`], already validated, and the operator for more than one query
    of the causal windowed forms.
    """
    position = key.new_zeros(key.shape[0], dtype=torch.long) if state is None else state.position
    keep = None
    if attention_mask is not None:
        keep = attention_mask.bool()
        key = key.masked_fill(~keep[..., None], -torch.inf)
        value = value.masked_fill(~keep[..., None], 0)
    places = (keep, position, position_ids)
    if position_bias is not None:
        average, new_state = _full_form(key, value, position_bias, causal, *places, state, return_state)
        out = gated(query, average, activation)
    else:
        mix = (activation, windowed)
        out, new_state = _window_form(query, key, value, window_bias, causal, *places, state, return_state, *mix)
    return out, _completed(new_state, key, value, *places) if return_state else None


def _full_form(key, value, bias, causal, keep, position, position_ids, state, return_state):
    """AFT-full: average and state."""
    dtype = compute_dtype(key, value)
    if state is None and position_ids is None and bias.dim() == 2:
        new_state = _full_state(key, value, keep, position, None, None) if return_state else None
        rank = None if keep is None else kept_rank(keep)
        return _full_shared(key.to(dtype), value.to(dtype), bias.to(dtype), causal, rank), new_state
    # The queries of a state see what the next one holds: one copy of it serves both.
    new_state = _full_state(key.to(dtype), value.to(dtype), keep, position, position_ids, state)
    positions = new_state.key_position[:, -key.shape[1] :]
    keys = new_state.key, new_state.value
    return _full_rows(*keys, bias.to(dtype), causal, keep, positions, new_state.key_position), new_state


def _window_form(
    query, key, value, bias, causal, keep, position, position_ids, state, return_state, activation, windowed
):
    """AFT-local, AFT-conv, AFT-simple: output and state."""
    if causal and state is not None and key.shape[1] == 1:
        rows = None
        if bias is not None:
            position = position if keep is None else position.masked_fill(~keep[:, 0], 0)
            rows = _bias_rows(bias.to(compute_dtype(key, value)), 1, position, None, position_ids, True)
        return _step(query, key, value, rows, state, keep, activation)
    rank = None if keep is None else kept_rank(keep)
    if rank is not None:
        query, key, value = compact(query, rank), compact(key, rank, -torch.inf), compact(value, rank)
    dtype = compute_dtype(key, value)
    rows, left = None, 0
    if bias is not None:
        rows = _bias_rows(bias.to(dtype), key.shape[1], position, rank, position_ids, state is not None)
        left = rows.shape[-1] - 1 if causal else (rows.shape[-1] - 1) // 2
    past, initial = _past(state, key, value, dtype)
    if not causal and torch.compiler.is_compiling() and not is_exporting():
        rows = initial[0].new_zeros(1, 1, 1, 1) if rows is None else rows
        out = gated(query, bidirectional(key.to(dtype), value.to(dtype), rows), activation)
    elif not causal:
        average = windowed_average(*with_past(key, value, past, left, dtype), rows, False, initial)
        out = gated(query, average, activation)
    else:
        out = windowed(query, key, value, rows, past, initial, activation)
    new_state = None
    if return_state:
        count = None if keep is None else keep.sum(1)
        new_state = _window_state(*with_past(key, value, past, left, dtype), left, count, initial)
    return (out if rank is None else expand(out, rank)), new_state
