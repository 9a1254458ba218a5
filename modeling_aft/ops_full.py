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


def full(panel: Callable[..., Tensor]) -> Callable[[Call], tuple[Tensor, AFTState | None]]:
    """The answer to a call, by a function that gives the average of a panel: the output, and the state if one is
    wanted."""

    def run(call: Call) -> tuple[Tensor, AFTState | None]:
        key, value, bias, state, tokens = call.key, call.value, call.position_bias, call.state, call.tokens
        dtype, new_state = compute_dtype(key, value), None
        tables = position_tables(bias.to(dtype))
        if state is None and tokens.position_ids is None and tables is not None:
            if call.return_state:
                new_state = full_state(key, value, tokens, None)
            average = _shared(panel, key.to(dtype), value.to(dtype), tables, call.causal, tokens.slot)
        else:
            # The queries of a state see what the next one holds: one copy of it serves both.
            new_state = full_state(key.to(dtype), value.to(dtype), tokens, state)
            average = _by_rows(panel, new_state, bias.to(dtype), call.causal, tokens.keep, key.shape[1])
        out = gated(call.query, average, call.query_activation)
        return out, completed(new_state, key, value, tokens) if call.return_state else None

    return run


def _shared(panel, key, value, tables, causal, slot):
    """Average [B, T, V] where all rows of the batch have the positions 0, 1, ... of the tables [h, N, N]."""
    length = key.shape[1]
    if slot is not None:
        key, value = compact(key, slot, -torch.inf), compact(value, slot)
    beyond = max(length - tables.shape[1], 0)  # only padding can lie beyond the table
    bias = F.pad(tables[:, :length, :length], (0, beyond, 0, beyond))
    out = shared_average(panel, key, value, bias, causal)
    return out if slot is None else expand(out, slot)


def shared_average(panel: Callable[..., Tensor], key: Tensor, value: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """Average [B, T, V] of keys [B, T, K] and values [B, T, V] under biases [h, T, T] that all rows of the batch
    share."""
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
