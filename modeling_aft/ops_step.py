# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-simple, -local and -conv for a single query that goes on from a state, as in decoding: as few operations as
there can be."""

import torch
from torch import Tensor

from .ops_state import AFTState, Call, completed, compute_dtype, falling, gated, spread, without_padding
from .ops_windows import bias_rows


_NOTHING = 1e-30  # in place of a sum over nothing, which is 0


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
        out = (logits.softmax(1)[..., None] * values.unflatten(-1, split)).sum(1).flatten(-2)
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
