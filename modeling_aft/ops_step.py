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
    without_padding,
)
from .ops_windows import bias_rows


_NOTHING = 1e-30  # in place of a sum over nothing, which is 0
ROOM = 16  # tokens that are taken up at once
AHEAD = 64  # queries whose biases are computed at once, where these depend on the position


class RecentTokens:
    """
    The tokens that were read, one at a time, since a state. Each is one more key behind those of the window. One that
    has left the window has a bias of 0, as it has in the sums of what is older, which it joins later, with others.

    Keys and values stand side by side in `rows` [B, 1 + S + ROOM, K + V]: in front the sum of what is older as one
    key, then the S keys of the window, then room for those to come.

    Args:
        state (`AFTState`): that of a form with a window, not empty.
        bias (`Tensor` [H or 1, 1 or B, N, S + 1], *optional*):
            The window bias of each of the next N queries, or, with N = 1, that of all.
        decay (`Tensor` [K], *optional*): by how much keys fade with each token.
        made_of (`list`): what tells whether the biases, and the dtype of the sums, would still be the same.
    """

    def __init__(self, state: AFTState, bias: Tensor | None, decay: Tensor | None, made_of: list = ()):
        dtype, self.window = state.normalizer.dtype, state.key.shape[1]
        self.length, self.position, self.made_of = 0, state.position, made_of
        self.decay = None if decay is None else decay.to(dtype)
        keys, values = state.normalizer.shape[1], state.average.shape[1]
        self.widths = [keys, values]
        self.split = None if keys == values else (keys, -1)  # of value channels: [K, r], r of them share a key channel
        self.older = falling(state.maximum, decay), state.normalizer, state.average
        self._make_room(torch.cat([state.key, state.value], 2).to(dtype))
        self.take_biases(bias)

    def _make_room(self, window: Tensor) -> None:
        """Puts the window [B, S, K + V] behind the sum of what is older, and room behind it."""
        maximum, normalizer, average = self.older
        older = _as_one_key(maximum, normalizer)
        # Never minus infinity, as what is absent from the window is: there is a largest key.
        older = older.clamp_min(torch.finfo(average.dtype).min)
        first = torch.cat([older, average], 1)[:, None]
        room = first.new_empty(first.shape[0], ROOM, first.shape[2])
        self._take_rows(torch.cat([first, window, room], 1))
        self.used = 0

    def _take_rows(self, rows: Tensor) -> None:
        self.rows, self.places = rows, rows.narrow(1, 1 + self.window, ROOM).split(1, 1)

    def take_biases(self, bias: Tensor | None) -> None:
        """The biases of the next queries; see above."""
        # For each query, or for all: [1 or B, S + 1 + ROOM, 1 or K], for the offsets S + ROOM, ..., 1, 0 of its keys.
        self.biases, self.answered = None, 0
        # What a decay takes off the keys at these offsets, [1, S + 1 + ROOM, K], if it is not among the biases.
        self.fading = None
        if bias is not None:
            bias = bias.to(self.rows.dtype).flip(-1).permute(1, 2, 3, 0)
            bias = bias if bias.shape[3] == 1 else spread(bias, self.older[1])
            self.biases = F.pad(bias, (0, 0, ROOM, 0)).unbind(1)
        if self.decay is not None:
            distance = torch.arange(self.window + ROOM, -1, -1, dtype=self.decay.dtype, device=self.decay.device)
            self.fading = (self.decay * distance[:, None])[None]
            if self.biases is None or len(self.biases) == 1:
                self.biases, self.fading = [(0 if bias is None else self.biases[0]) - self.fading], None

    @property
    def needs_biases(self) -> bool:
        """Whether those that it has are all used up."""
        return self.biases is not None and 1 < len(self.biases) == self.answered

    @property
    def is_full(self) -> bool:
        return self.used == ROOM

    @property
    def may_write(self) -> bool:
        """Not, outside of inference mode, what was made inside."""
        return torch.is_inference_mode_enabled() or not self.rows.is_inference()

    def read(self, query: Tensor, key: Tensor, value: Tensor, activation: str, next_position: Tensor) -> Tensor:
        """The output [B, 1, V] of one more token, of query and value [B, 1, V] and key [B, 1, K], that is followed by
        one at `next_position` [B]."""
        torch.cat([key, value], 2, out=self.places[self.used])
        self.used, self.length, self.answered = self.used + 1, self.length + 1, self.answered + 1
        self.position = next_position
        seen = 1 + self.window + self.used
        logits, values = self.rows.narrow(1, 0, seen).split_with_sizes(self.widths, 2)
        if self.biases is not None:
            bias = self.biases[0 if len(self.biases) == 1 else self.answered - 1]
            logits = logits + bias.narrow(1, ROOM - self.used, seen)
        if self.fading is not None:
            logits = logits - self.fading.narrow(1, ROOM - self.used, seen)
        weights = logits.softmax(1)
        if self.split is None:
            average = (weights * values).sum(1, keepdim=True)
        else:
            average = (weights[..., None] * values.unflatten(-1, self.split)).sum(1, keepdim=True).flatten(-2)
        return gated(query, average, activation)

    def fold(self) -> None:
        """Sums up what has left the window with what is older, which makes room for ROOM tokens."""
        maximum, normalizer, average = self.older
        keys, values = self.rows.narrow(1, 1, self.used).split_with_sizes(self.widths, 2)
        keys = torch.cat([maximum[:, None], keys], 1)
        if self.decay is not None:
            keys = keys - self.decay * torch.arange(self.used, -1, -1, device=keys.device)[:, None]
        maximum = keys.amax(1)
        reference = maximum.clamp_min(torch.finfo(average.dtype).min)
        weights = (keys - reference[:, None]).to(average.dtype).exp()
        weights.select(1, 0).mul_(normalizer)
        normalizer = weights.sum(1)
        share = spread(weights / normalizer.clamp_min(_NOTHING)[:, None], average)
        average = (share * torch.cat([average[:, None], values], 1)).sum(1)
        self.older = maximum, normalizer, average
        self._make_room(self.rows.narrow(1, 1 + self.used, self.window))

    def taken_up(self, state: AFTState) -> AFTState:
        """The state after these tokens, in the dtypes of that before them."""
        self.fold()
        window = self.rows.narrow(1, 1, self.window).split_with_sizes(self.widths, 2)
        like = state.key.dtype, state.value.dtype
        layout = {"copy": True, "memory_format": torch.contiguous_format}
        key, value = (part.to(dtype, **layout) for part, dtype in zip(window, like, strict=True))
        return AFTState(self.position.clone(), key, value, None, *self.older)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was."""
        rows = rows.to(self.rows.device)
        self._take_rows(self.rows.index_select(0, rows))
        self.older = tuple(part.index_select(0, rows) for part in self.older)
        self.position = self.position.index_select(0, rows)
        if self.biases is not None and self.biases[0].shape[0] > 1:
            self.biases = [bias.index_select(0, rows) for bias in self.biases]


def _as_one_key(maximum: Tensor, normalizer: Tensor) -> Tensor:
    """The key [B, K] that weighs as much as all those of a sum; rounded as keys + bias are, which the sum never is."""
    return (maximum + normalizer.clamp_min(_NOTHING).log()).to(normalizer.dtype)


def can_step(call: Call) -> bool:
    return call.position_bias is None and call.causal and call.state is not None and call.key.shape[1] == 1


def step(call: Call) -> tuple[Tensor, AFTState | None]:
    """The output [B, 1, D], and the state, if one is wanted."""
    bias, state, tokens = call.window_bias, call.state, call.tokens
    key, value = without_padding(call.key, call.value, tokens)
    rows = None if bias is None else bias_rows(bias.to(compute_dtype(key, value)), 1, tokens._replace(slot=None))
    left, split = state.key.shape[1], (key.shape[2], -1)  # of value channels: [K, r], r of them share a key channel
    maximum, normalizer, average = falling(state.maximum, call.decay), state.normalizer, state.average
    decay = None if call.decay is None else call.decay.to(normalizer.dtype)
    if rows is not None:
        out = _average(state, maximum, key, value, rows[:, :, 0], decay)
    # The key that leaves the window joins the older ones.
    oldest_key, oldest_value = (state.key[:, 0], state.value[:, 0]) if left else (key[:, 0], value[:, 0])
    maximum = maximum if decay is None else maximum - decay
    largest = torch.maximum(maximum, oldest_key)
    reference = largest.clamp_min(torch.finfo(largest.dtype).min)
    scale, weight = ((each - reference).to(normalizer.dtype).exp() for each in (maximum, oldest_key))
    normalizer = scale * normalizer + weight
    share = (weight / normalizer.clamp_min(_NOTHING))[..., None]
    oldest_value = oldest_value.to(average.dtype).unflatten(-1, split)
    average = torch.lerp(average.unflatten(-1, split), oldest_value, share).flatten(-2)
    if rows is None:
        out = average
    window = (torch.cat([state.key[:, 1:], key[:, :left]], 1), torch.cat([state.value[:, 1:], value[:, :left]], 1))
    new = AFTState(state.position, *window, None, largest, normalizer, average)
    if tokens.keep is not None:
        keep = tokens.keep
        changes = zip(new, state, strict=True)
        new = AFTState(
            *(n if n is o else torch.where(keep[..., None] if n.dim() == 3 else keep, n, o) for n, o in changes)
        )
    out = gated(call.query, out[:, None], call.query_activation)
    return out, completed(new, key, value, tokens) if call.return_state else None


def _average(
    state: AFTState, maximum: Tensor, key: Tensor, value: Tensor, bias: Tensor, decay: Tensor | None
) -> Tensor:
    """The average [B, V] under the weights of one query, bias [heads, 1 or B, n]: of the older keys as one, those of
    the window, and its own. They are not put together, which in a compiled step would be a copy of the window."""
    dtype, left = state.normalizer.dtype, state.key.shape[1]
    bias = bias.flip(-1).permute(1, 2, 0)  # oldest key first
    bias = bias if bias.shape[2] == 1 else spread(bias, key)
    older = _as_one_key(maximum, state.normalizer)
    own, inside = key[:, 0] + bias[:, -1], state.key + bias[:, :-1]
    if decay is not None:
        older = older - decay * (left + 1)
        inside = inside - decay * torch.arange(left, 0, -1, device=key.device, dtype=dtype)[:, None]
    largest = torch.maximum(older, own)
    if left:
        largest = torch.maximum(largest, inside.amax(1))
    largest = largest.detach().clamp_min(torch.finfo(dtype).min)
    older, own, inside = (older - largest).exp(), (own - largest).exp(), (inside - largest[:, None]).exp()
    total = (older + own + inside.sum(1)).clamp_min(_NOTHING)
    outside = spread(older / total, value) * state.average + spread(own / total, value) * value[:, 0]
    return outside + (spread(inside / total[:, None], value) * state.value).sum(1)
