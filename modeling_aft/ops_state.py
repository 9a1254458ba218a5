# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT's state, the call that all its kernels answer, and the sums of weighted keys that both are made of.

A sum of keys is a triple (maximum, normalizer, average): see [`AFTState`].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_modes import is_static, is_transformed, widest_dtype
from .ops_tokens import Tokens, compact


class AFTState(NamedTuple):
    """What [`~modeling_aft.ops.aft_attention`] needs of the past to go on; opaque to callers. Tensors are [B, ...].

    The tokens that have left the window (all tokens, for AFT-simple) are summed up by three fp32 tensors: the largest
    key, the sum of `exp(key - largest)`, and the average of their values under those weights. Keeping the maximum
    apart from the sum, instead of their log-sum-exp, loses nothing to rounding, however large the keys or long the
    text. With a decay, each key counts as what is left of it where the last of them stands: the maximum falls by the
    decay with each token. It is fp64 then, where the device has that: what a token takes off may be less than the
    rounding of fp32, at every token in the same direction.

    Attributes:
        position: [B] int64, the position that the next kept token will have.
        key: [B, S, D or H] in the dtype of the keys: the last S = n - 1 kept tokens, oldest first, or, for the full
            form, all S past tokens. Minus infinity where there is no token.
        value: [B, S, D], 0 where there is no token.
        key_position: [B, S] int64, the position of each key (full form only, else None).
        maximum: [B, D or H] fp32 (fp64 with a decay), minus infinity if no token has left the window (None in the full
            form).
        normalizer: [B, D or H] fp32, 0 if no token has left the window, else at least 1 (None in the full form).
        average: [B, D] fp32 (None in the full form).
    """

    position: Tensor
    key: Tensor
    value: Tensor
    key_position: Tensor | None = None
    maximum: Tensor | None = None
    normalizer: Tensor | None = None
    average: Tensor | None = None


class Call(NamedTuple):
    """
    What a kernel is asked, checked; the tensors are those of [`~modeling_aft.ops.aft_attention`].

    Attributes:
        state: that of the tokens before, or None.
        tokens: which are kept, and where they stand; with `next_position` where a state is to be returned.
        grid: the rows and columns of a picture, whose tokens are T = rows x columns places, row by row, or None. It is
            not causal, and has a window bias [H, kh, kw].
        seq_idx: the document of each token, or None. Only the reference reads it: what others get is taken apart.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position_bias: Tensor | None = None
    window_bias: Tensor | None = None
    decay: Tensor | None = None
    causal: bool = True
    state: AFTState | None = None
    return_state: bool = False
    query_activation: str = "sigmoid"
    tokens: Tokens = Tokens()
    seq_idx: Tensor | None = None
    grid: tuple[int, int] | None = None


def position_tables(position_bias: Tensor) -> Tensor | None:
    """The tables [h, N, N] of an AFT-full whose biases are looked up by position, or None if it has those of each
    query."""
    if position_bias.dim() == 2:
        return position_bias[None]
    is_table = position_bias.dim() == 4 and position_bias.shape[1] == 1
    return position_bias[:, 0] if is_table and position_bias.shape[2] == position_bias.shape[3] else None


def position_rows(position_bias: Tensor, positions: Tensor) -> Tensor:
    """The biases [h, B, T, N] of the queries of AFT-full, which stand at positions [B, T]."""
    tables = position_tables(position_bias)
    if tables is not None:
        return tables[:, positions]
    return position_bias if position_bias.dim() == 4 else position_bias[None]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Sums and exponentials are taken in float64 if one of the tensors is in float64, else in float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


QUERY_ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "identity": lambda query: query}


# The gradient with respect to the input of an activation, from the gradient and the output.
DERIVATIVES = {
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
    "relu": lambda grad, out: grad * (out > 0),
    "identity": lambda grad, out: grad,
}


def gated(query: Tensor, average: Tensor, activation: str) -> Tensor:
    """activation(query) times the average, in the dtype of the query."""
    if torch.is_grad_enabled() and query.requires_grad and not (is_static() or is_transformed()):
        return _Gate.apply(query, average, activation)
    return _gate(query, average, activation)


def _gate(query: Tensor, average: Tensor, activation: str) -> Tensor:
    return (QUERY_ACTIVATIONS[activation](query.to(average.dtype)) * average).to(query.dtype)


class _Gate(torch.autograd.Function):
    """Computes the activation again in the backward pass, as the memory of a layer counts."""

    @staticmethod
    def forward(ctx, query, average, activation):
        ctx.save_for_backward(query, average)
        ctx.activation = activation
        return _gate(query, average, activation)

    @staticmethod
    def backward(ctx, grad):
        query, average = ctx.saved_tensors
        gate, grad = QUERY_ACTIVATIONS[ctx.activation](query.to(average.dtype)), grad.to(average.dtype)
        d_query = DERIVATIVES[ctx.activation](grad * average, gate).to(query.dtype)
        return d_query, grad * gate if ctx.needs_input_grad[1] else None, None


def spread(per_key_channel: Tensor, values: Tensor) -> Tensor:
    """Repeats [..., K] over the value channels that share each key channel: [..., V]."""
    shared = values.shape[-1] // per_key_channel.shape[-1]
    return per_key_channel if shared == 1 else per_key_channel.repeat_interleave(shared, dim=-1)


def sum_shared(per_value_channel: Tensor, keys: Tensor) -> Tensor:
    """Sums [..., V] over the value channels that share a key channel: [..., K]."""
    if per_value_channel.shape[-1] == keys.shape[-1]:
        return per_value_channel
    return per_value_channel.unflatten(-1, (keys.shape[-1], -1)).sum(-1)


def finite(maximum: Tensor) -> Tensor:
    """Replaces the maximum of nothing (minus infinity), so that differences with it stay numbers."""
    return torch.where(maximum == -torch.inf, torch.zeros_like(maximum), maximum)


def largest(*tensors: Tensor) -> float:
    """The largest magnitude in them, 0 of nothing."""
    bounds = [max(-float(low), float(high)) for low, high in (t.aminmax() for t in tensors if t.numel())]
    return max(bounds, default=0.0)


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


def log(total: Tensor) -> Tensor:
    """Of a sum of weights: minus infinity for that of none, through which no gradient passes."""
    return torch.where(total == 0, -torch.inf, nonzero(total).log())


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


def past_of(state: AFTState | None, key: Tensor, value: Tensor, dtype: torch.dtype):
    """The keys and values of the window before the first query, or None, and the sum of those before."""
    if state is None:
        return None, nothing(key, value, dtype)
    return (state.key, state.value), (state.maximum, state.normalizer.to(dtype), state.average.to(dtype))


def falling(maximum: Tensor, decay: Tensor | None) -> Tensor:
    """The maximum of a state in the dtype in which it can fall by the decay token by token."""
    return maximum if decay is None else maximum.to(widest_dtype(maximum.device))


def decayed(key: Tensor, decay: Tensor | None, distance: Tensor | int) -> Tensor:
    """Keys `distance` tokens later: less by `decay` [K] for each."""
    return key if decay is None else key - decay * distance


def moment(gradients: Tensor, start: float) -> Tensor:
    """
    The sum [K] of the gradients of keys [T, K], times where each stands: start, start + 1, ..., in float64.

    It is the gradient of the decay, wherever 0 is. A query loses nothing if all its keys are larger by the same: the
    gradients of its logits add up to 0. So the sum of (t' - t) times that of each pair is the sum of t' times the
    gradient of each key.
    """
    places = torch.arange(len(gradients), dtype=torch.float64, device=gradients.device) + start
    return places @ gradients.double()


def window_state(
    key: Tensor, value: Tensor, left: int, count: Tensor | None, initial, decay: Tensor | None
) -> AFTState:
    """The state of the windowed forms after the last token, but for its position: key [B, L+T, K] and value, with the
    L = `left` before the first in front, count [B] of kept tokens or None, the sum `initial` of all before."""
    length = key.shape[1] - left
    older_key, older_value = key[:, :length], value[:, :length]
    window_key, window_value = key[:, length:], value[:, length:]
    if count is not None:
        beyond = torch.arange(length, device=key.device) >= count[:, None]
        older_key = older_key.masked_fill(beyond[..., None], -torch.inf)
        index = (count[:, None] + torch.arange(left, device=key.device))[..., None]
        window_key = key.gather(1, index.expand(-1, -1, key.shape[2]))
        window_value = value.gather(1, index.expand(-1, -1, value.shape[2]))
    if decay is not None:
        leaving = length if count is None else count[:, None]
        distance = leaving - 1 - torch.arange(length, device=key.device)  # from the last of those
        reference = finite(older_key.detach().amax(1))  # or what is taken off a large key is lost
        older_key = decayed(older_key - reference[:, None], decay, distance[..., None])
        maximum = decayed(falling(initial[0], decay), decay, leaving)
        initial = (maximum - reference, *initial[1:])
    constant, normalizer, average = merge(initial, summarize(older_key, older_value, dim=1))
    maximum = torch.maximum(initial[0], older_key.amax(1).to(initial[0].dtype))
    normalizer = normalizer * (finite(constant) - finite(maximum)).exp()  # a factor of 1, with its gradient
    if decay is not None:
        maximum = maximum + reference
    # Copies, because slices would keep the tensors of the whole text alive.
    window = window_key.clone(), window_value.clone()
    return AFTState(None, *window, None, maximum, normalizer.to(key.dtype), average.to(key.dtype))


def full_state(key: Tensor, value: Tensor, tokens: Tokens, before: AFTState | None) -> AFTState:
    """All keys and values so far, with the positions of each, but for the next position."""
    key, value = without_padding(key, value, tokens)
    position_ids = tokens.position_ids
    if position_ids is None and tokens.keep is None:
        position_ids = torch.arange(key.shape[1], device=key.device)[None].expand(key.shape[0], -1)
    elif position_ids is None:
        position_ids = tokens.slot.masked_fill(~tokens.keep, 0)
    if before is None:
        return AFTState(None, key, value, position_ids)
    key, value = torch.cat([before.key.to(key.dtype), key], 1), torch.cat([before.value.to(value.dtype), value], 1)
    return AFTState(None, key, value, torch.cat([before.key_position, position_ids], 1))


def completed(state: AFTState, key: Tensor, value: Tensor, tokens: Tokens) -> AFTState:
    """With the next position, and keys and values in the dtypes that they came in."""
    # A copy: the states of all layers would share one tensor, and each be written into.
    position = tokens.next_position.clone()
    return state._replace(position=position, key=state.key.to(key.dtype), value=state.value.to(value.dtype))


def without_padding(key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Keys and values that are minus infinity and 0 for padding."""
    if tokens.keep is None:
        return key, value
    padding = ~tokens.keep[..., None]
    return key.masked_fill(padding, -torch.inf), value.masked_fill(padding, 0)


def advance(before: AFTState | None, new, like: AFTState) -> AFTState:
    """
    The state after new tokens.

    Args:
        before: that before them, None at the start.
        new: has `key` [B, T, K], `value` [B, T, D], `tokens` and `decay`, [K] or None.
        like: any state of the same form.
    """
    tokens = new.tokens.advanced(None if before is None else before.position, new.key)
    key, value = new.key, new.value
    if like.key_position is not None:
        state = full_state(key, value, tokens, before)
    else:
        if tokens.slot is not None:
            key, value = compact(key, tokens.slot, -torch.inf), compact(value, tokens.slot)
        dtype, left = compute_dtype(key, value), like.key.shape[1]
        past, initial = past_of(before, key, value, dtype)
        decay = None if new.decay is None else new.decay.to(dtype)
        state = window_state(*with_past(key, value, past, left, dtype), left, tokens.count, initial, decay)
    return completed(state, key, value, tokens)
