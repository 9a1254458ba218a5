# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-simple, -local and -conv for a single query that goes on from a state, as in decoding: as few operations as
there can be. `step` gives the next state at once, `RecentTokens` after some steps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_state import (
    AFTState,
    Call,
    completed,
    compute_dtype,
    falling,
    gated,
    spread,
    window_state,
    with_past,
    without_padding,
)
from .ops_windows import bias_rows


_NOTHING = 1e-30  # in place of a sum over nothing, which is 0
ROOM = 16  # tokens that are taken up at once


class RecentTokens:
    """
    The tokens that were read, one at a time, since a state. Each is one more key behind those of the window. One that
    has left the window has a bias of 0, as it has in the sums of the state that takes it up later, with others.

    Keys [B, 1 + S + ROOM, K] and values stand in a buffer each: in front the sum of what was older as one key, then
    the S keys of the state's window, then the recent ones.

    Args:
        state (`AFTState`): that of a form with a window, not empty.
        bias (`Tensor` [H or 1, 1 or B, 1 or ROOM, S + 1], *optional*):
            The window bias of each of the next ROOM queries, or that of all.
        decay (`Tensor` [K], *optional*): by how much keys fade with each token.
        made_of (`list`): what tells whether the biases would still be the same.
    """

    def __init__(self, state: AFTState, bias: Tensor | None, decay: Tensor | None, made_of: list = ()):
        dtype, self.window = state.normalizer.dtype, state.key.shape[1]
        self.length, self.position, self.made_of = 0, state.position, made_of
        self.decay = None if decay is None else decay.to(dtype)
        (batch, keys), values = state.normalizer.shape, state.average.shape[1]
        self.split = None if keys == values else (keys, -1)  # of value channels: [K, r], r of them share a key channel
        self.first = 1 + self.window
        self.keys = state.normalizer.new_empty(batch, self.first + ROOM, keys)
        self.values = state.average.new_empty(batch, self.first + ROOM, values)
        self.keys[:, 0] = falling(state.maximum, decay) + state.normalizer.clamp_min(_NOTHING).log()
        self.keys[:, 1 : self.first] = state.key
        self.lowest = torch.finfo(dtype).min  # in place of what is absent, so that differences stay numbers
        self.keys[:, : self.first].clamp_min_(self.lowest)
        self.values[:, 0] = state.average
        self.values[:, 1 : self.first] = state.value
        # [1 or B, 1 or ROOM, S + 1 + ROOM, 1 or K], for the offsets S + ROOM, ..., 1, 0 of keys from a query.
        self.bias = None
        if bias is not None:
            bias = bias.to(dtype).flip(-1).permute(1, 2, 3, 0)
            bias = bias if bias.shape[3] == 1 else spread(bias, self.keys)
            self.bias = F.pad(bias, (0, 0, ROOM, 0))
        if decay is not None:
            distance = torch.arange(self.window + ROOM, -1, -1, dtype=dtype, device=decay.device)[:, None]
            self.bias = (0 if self.bias is None else self.bias) - (self.decay * distance)[None, None]

    @property
    def has_room(self) -> bool:
        """Whether one more token can be added."""
        return self.length < ROOM and (torch.is_inference_mode_enabled() or not self.keys.is_inference())

    def read(self, query: Tensor, key: Tensor, value: Tensor, activation: str, next_position: Tensor) -> Tensor:
        """The output [B, 1, V] of one more token, of query and value [B, 1, V] and key [B, 1, K], that is followed by
        one at `next_position` [B]."""
        place = self.first + self.length
        self.keys.select(1, place).copy_(key.select(1, 0))
        self.values.select(1, place).copy_(value.select(1, 0))
        self.length, self.position = self.length + 1, next_position
        logits, values = self.keys[:, : place + 1], self.values[:, : place + 1]
        if self.bias is not None:
            row = 0 if self.bias.shape[1] == 1 else self.length - 1
            logits = (logits + self.bias[:, row, ROOM - self.length :]).clamp_min_(self.lowest)
        weights = logits.softmax(1)
        if self.split is None:
            average = (weights * values).sum(1, keepdim=True)
        else:
            average = (weights[..., None] * values.unflatten(-1, self.split)).sum(1, keepdim=True).flatten(-2)
        return gated(query, average, activation)

    def taken_up(self, state: AFTState) -> AFTState:
        """The state after these tokens, from that before them."""
        recent = slice(self.first, self.first + self.length)
        key, value = self.keys[:, recent], self.values[:, recent]
        key, value = with_past(key, value, (state.key, state.value), self.window, self.keys.dtype)
        initial = (state.maximum, state.normalizer, state.average)
        new = window_state(key, value, self.window, None, initial, self.decay)
        dtypes = {"key": new.key.to(state.key.dtype), "value": new.value.to(state.value.dtype)}
        return new._replace(position=self.position.clone(), **dtypes)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.position = self.position.index_select(0, rows)
        if self.bias is not None and self.bias.shape[0] > 1:
            self.bias = self.bias.index_select(0, rows)


def can_step(call: Call) -> bool:
    return call.position_bias is None and call.causal and call.state is not None and call.key.shape[1] == 1


def step(call: Call) -> tuple[Tensor, AFTState | None]:
    """The output [B, 1, D], and the state, if one is wanted."""
    bias, state, tokens = call.window_bias, call.state, call.tokens
    key, value = without_padding(call.key, call.value, tokens)
    rows = None if bias is None else bias_rows(bias.to(compute_dtype(key, value)), 1, tokens._replace(slot=None))
    split = (key.shape[2], -1)  # of value channels: [K, r], r of them share a key channel
    maximum, normalizer, average = falling(state.maximum, call.decay), state.normalizer, state.average
    decay = None if call.decay is None else call.decay.to(normalizer.dtype)
    if rows is None:
        keys, values = key, value
    else:
        # The sum of the older keys is one more key in front of those of the window.
        keys, values = torch.cat([state.key, key], 1), torch.cat([average[:, None], state.value, value], 1)
        bias = rows[:, :, 0].flip(-1).permute(1, 2, 0)  # [1 or B, n, heads], oldest key first
        bias = bias if bias.shape[2] == 1 else spread(bias, keys)
        # Rounded as keys + bias are; the state itself never is.
        older = (maximum + normalizer.clamp_min(_NOTHING).log()).to(normalizer.dtype)[:, None]
        logits = torch.cat([older, keys + bias], 1)
        if decay is not None:
            distance = torch.arange(keys.shape[1], -1, -1, device=keys.device, dtype=logits.dtype)[:, None]
            logits = torch.addcmul(logits, decay, distance, value=-1)
        logits = logits.clamp_min(torch.finfo(older.dtype).min)
        out = (spread(logits.softmax(1), values) * values).sum(1)
        values = values[:, 1:]
    # The key that leaves the window joins the older ones.
    maximum, oldest = maximum if decay is None else maximum - decay, keys[:, 0]
    both = torch.stack([maximum, oldest])
    largest = torch.maximum(maximum, oldest)
    reference = largest.clamp_min(torch.finfo(largest.dtype).min)
    scale, weight = (both - reference).to(normalizer.dtype).exp().unbind()
    normalizer = scale * normalizer + weight
    share = (weight / normalizer.clamp_min(_NOTHING))[..., None]
    oldest = values[:, 0].to(average.dtype).unflatten(-1, split)
    average = torch.lerp(average.unflatten(-1, split), oldest, share).flatten(-2)
    if rows is None:
        out = average
    window = keys[:, 1:], values[:, 1:]
    if torch.is_grad_enabled():  # else a cache copies them into its own tensors
        window = tuple(t.clone() for t in window)
    new = AFTState(state.position, *window, None, largest, normalizer, average)
    if tokens.keep is not None:
        keep = tokens.keep
        changes = zip(new, state, strict=True)
        new = AFTState(
            *(n if n is o else torch.where(keep[..., None] if n.dim() == 3 else keep, n, o) for n, o in changes)
        )
    out = gated(call.query, out[:, None], call.query_activation)
    return out, completed(new, key, value, tokens) if call.return_state else None
