# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-full: a single panel (ops_panel.py) for each head and row of the batch, or for all rows that share biases."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_state import (
    AFTState,
    Call,
    completed,
    compute_dtype,
    full_state,
    gated,
    position_rows,
    position_tables,
)
from .ops_tokens import compact, expand


def has_table(call: Call) -> bool:
    """Whether all rows of the batch have the positions 0, 1, ... of a table, and so the same biases."""
    return call.state is None and call.tokens.position_ids is None and position_tables(call.position_bias) is not None


def full(panel: Callable[..., Tensor]) -> Callable[[Call], tuple[Tensor, AFTState | None]]:
    """The answer to a call, by a function that gives the average of a panel: the output, and the state if one is
    wanted."""

    of_table = on_table(partial(shared_average, panel))

    def run(call: Call) -> tuple[Tensor, AFTState | None]:
        if has_table(call):
            return of_table(call)
        key, value, bias, tokens = call.key, call.value, call.position_bias, call.tokens
        dtype = compute_dtype(key, value)
        # The queries of a state see what the next one holds: one copy of it serves both.
        new_state = full_state(key.to(dtype), value.to(dtype), tokens, call.state)
        average = _by_rows(panel, new_state, bias.to(dtype), call.causal, tokens.keep, key.shape[1])
        return _answer(call, average, new_state)

    return run


def on_table(shared: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Callable[[Call], tuple]:
    """The same for a call that has a table, by a function of keys [B, T, K], values [B, T, V], biases [h, T, T] and
    `causal` that gives the average [B, T, V]."""

    def run(call: Call) -> tuple[Tensor, AFTState | None]:
        key, value, slot = call.key, call.value, call.tokens.slot
        new_state = full_state(key, value, call.tokens, None) if call.return_state else None
        length = key.shape[1]
        bias = position_tables(call.position_bias)[:, :length, :length]
        if slot is not None:
            key, value = compact(key, slot, -torch.inf), compact(value, slot)
            beyond = length - bias.shape[1]  # only padding can lie beyond the table
            bias = F.pad(bias, (0, beyond, 0, beyond))
        average = shared(key, value, bias, call.causal)
        return _answer(call, average if slot is None else expand(average, slot), new_state)

    return run


def _answer(call: Call, average: Tensor, new_state: AFTState | None) -> tuple[Tensor, AFTState | None]:
    out = gated(call.query, average, call.query_activation)
    return out, completed(new_state, call.key, call.value, call.tokens) if call.return_state else None


def shared_average(panel: Callable[..., Tensor], key: Tensor, value: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """Average [B, T, V] of keys [B, T, K] and values [B, T, V] under biases [h, T, T] that all rows of the batch
    share, in the dtype that sums are taken in."""
    dtype = compute_dtype(key, value)
    key, value, bias = key.to(dtype), value.to(dtype), bias.to(dtype)
    key, value = (t.unflatten(-1, (bias.shape[0], -1)).permute(2, 1, 0, 3) for t in (key, value))  # [h, T, B, .]
    return _average(panel, key, value, bias, causal, 0).permute(2, 1, 0, 3).flatten(2)


def _by_rows(panel, state, position_bias, causal, keep, length):
    """Average [B, T, V] of the last T = `length` tokens of a state, at positions of any kind: a bias [h, B, T, S]."""
    rows = position_rows(position_bias, state.key_position[:, -length:])
    heads = rows.shape[0]
    bias = rows.gather(3, state.key_position[:, None].expand(heads, -1, length, -1))
    if keep is not None:
        bias = bias.masked_fill(~keep[..., None], -torch.inf)
    of_heads = (t.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3) for t in (state.key, state.value))
    key, value = (t.flatten(0, 1).unsqueeze(2) for t in of_heads)  # [h x B, S, 1, .]
    out = _average(panel, key, value, bias.flatten(0, 1), causal, key.shape[1] - length)
    return out.squeeze(2).unflatten(0, (heads, -1)).permute(1, 2, 0, 3).flatten(2)


def _average(panel, key, value, bias, causal, past):
    no_key, no_value = (t.new_empty(t.shape[0], 0, *t.shape[2:]) for t in (key, value))
    visible = past + 1 if causal else 0
    return panel(key.contiguous(), value.contiguous(), no_key, no_key, no_value, bias.contiguous(), visible)[0]
