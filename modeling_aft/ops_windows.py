# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-simple, -local and -conv for several queries: what their kernels have in common."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_state import AFTState, Call, completed, compute_dtype, past_of, window_state, with_past
from .ops_tokens import Tokens, compact, expand


class Window(NamedTuple):
    """
    What a kernel of the windowed forms is asked: [B, T, D] in the dtype of the query. Padding stands at the end.

    Attributes:
        query, value: [B, T, D].
        key: [B, T, K], minus infinity where there is none.
        rows: [heads, 1 or B, 1 or T, n], the window bias of each query, or None.
        past: the n - 1 keys and values before the first query, or None.
        initial: the sum of all keys before those, as maximum and normalizer [B, K] and average [B, D], in the dtype of
            the computation.
        causal: whether a query sees only its own and earlier tokens; else there is no past.
        activation: that of the query.
        decay: [K] in the dtype of the computation, or None. The initial sum is that of keys as they are where the last
            of them stands, right before those of the past.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor | None
    past: tuple[Tensor, Tensor] | None
    initial: tuple[Tensor, Tensor, Tensor]
    causal: bool
    activation: str
    decay: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the computation."""
        return self.initial[0].dtype

    @property
    def left(self) -> int:
        """The number of keys before a query that can lie in its window."""
        taps = 1 if self.rows is None else self.rows.shape[-1]
        return taps - 1 if self.causal else (taps - 1) // 2


def several_queries(kernel: Callable[[Window], Tensor]) -> Callable[[Call], tuple[Tensor, AFTState | None]]:
    """The answer to a call, by a kernel of the windowed forms: the output, and the state if one is wanted."""

    def run(call: Call) -> tuple[Tensor, AFTState | None]:
        query, key, value, bias, slot = call.query, call.key, call.value, call.window_bias, call.tokens.slot
        if slot is not None:
            query, key, value = compact(query, slot), compact(key, slot, -torch.inf), compact(value, slot)
        dtype = compute_dtype(key, value)
        rows = None if bias is None else bias_rows(bias.to(dtype), key.shape[1], call.tokens)
        past, initial = past_of(call.state, key, value, dtype)
        in_dtype = (initial[0].to(dtype), *initial[1:])
        decay = None if call.decay is None else call.decay.to(dtype)
        window = Window(query, key, value, rows, past, in_dtype, call.causal, call.query_activation, decay)
        out, new_state = kernel(window), None
        if call.return_state:
            key, value = with_past(key, value, past, window.left, dtype)
            new_state = window_state(key, value, window.left, call.tokens.count, initial, decay)
            new_state = completed(new_state, call.key, call.value, call.tokens)
        return (out if slot is None else expand(out, slot)), new_state

    return run


def bias_rows(window_bias: Tensor, length: int, tokens: Tokens) -> Tensor:
    """The window bias of each query, [heads, 1 or B, 1 or T, n], in the order of the compacted tokens."""
    slot, position_ids = tokens.slot, tokens.position_ids
    if window_bias.dim() == 4:
        if slot is None:
            return window_bias
        return torch.stack([compact(row, slot) for row in window_bias])
    table = window_bias.shape[1]
    if table == 1:
        return window_bias[:, None]
    if position_ids is None:
        # Kept tokens stand in front, at positions 0, 1, ...; only padding can lie beyond the table.
        return F.pad(window_bias[:, :length], (0, 0, 0, max(length - table, 0)))[:, None]
    if slot is not None:
        # The positions of padding belong to no key and to no query that counts.
        position_ids = compact(position_ids[..., None], slot).squeeze(-1)
    return window_bias[:, position_ids]
