# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Attention with synthesized logits: the plain form, and the same through factors, fused kernels and shared weights.

Most synthesized logits are a product q k^T with keys that do not depend on the input: relu(x W1) W2 + b2 of the dense
type is [relu(x W1), 1] [W2, b2]^T, and the factorized random matrix is R1 R2^T. A weighted sum of such logits is one
product of the concatenated (weighted) queries and keys. Fused attention therefore computes them without a [T, T]
tensor, where it exists. Logits that depend on positions alone need one softmax for the whole batch. All others are
computed for one block of queries at a time, and again in the backward pass.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_kernels import Kernel, choose
from .ops_modes import is_exporting, is_transformed, leading
from .ops_operators import differentiable_gradients, flops_of, gradients_inside_operator, operator


_BLOCK = 128  # queries per block, where neither factors nor one matrix for the batch will do


class SynthesizerState(NamedTuple):
    """What a layer of the Synthesizer keeps of the past.

    Attributes:
        position: [B] int64, the position that the next kept token will have.
        key: [B, H, S, d] keys of the past tokens, or None where no dot product is among the components.
        value: [B, H, S, d] their values.
        key_position: [B, S] int64, their positions, -1 for padding.
    """

    position: Tensor
    key: Tensor | None
    value: Tensor
    key_position: Tensor


def advance(before: SynthesizerState | None, new, like: SynthesizerState | None = None) -> SynthesizerState:
    """
    The state after new tokens.

    Args:
        before: that before them, None at the start.
        new: has `key` [B, H, T, d] or None, `value` [B, H, T, d], and `tokens`.
        like: not read; other states need to know more of their form.
    """
    batch, length = new.value.shape[0], new.value.shape[2]
    tokens = new.tokens
    if tokens.next_position is None:
        tokens = tokens.advanced(None if before is None else before.position, new.value.transpose(1, 2))
    key_position = tokens.position_ids
    if key_position is None:
        places = torch.arange(length, device=new.value.device)
        key_position = places.expand(batch, -1) if tokens.slot is None else tokens.slot
    if tokens.keep is not None:
        key_position = key_position.masked_fill(~tokens.keep, -1)
    position = (
        tokens.next_position.clone()
    )  # the states of all layers would share one tensor, and each be written into
    if before is None:
        return SynthesizerState(position, new.key, new.value, key_position)
    key = None if new.key is None else torch.cat([before.key, new.key], 2)
    value, key_position = torch.cat([before.value, new.value], 2), torch.cat([before.key_position, key_position], 1)
    return SynthesizerState(position, key, value, key_position)


class Logits(NamedTuple):
    """The parts of attention logits, query @ key^T + bias + product, each None where there is none.

    Attributes:
        query: [1 or B, H, T, K].
        key: [1 or B, H, S, K].
        bias: [1 or B, H, T, S].
        product: [B, H, T, a] and [B, H, T, b]: position n has the logit `first[n // b] * second[n % b]`.
        key_position: [B, S] the positions of the keys, which `product` needs; None where they are 0 to S - 1.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    bias: Tensor | None = None
    product: tuple[Tensor, Tensor] | None = None
    key_position: Tensor | None = None


class Call(NamedTuple):
    """What a kernel is asked: the arguments of [`attend_fused`], with a `count` only where it matters."""

    logits: Logits
    value: Tensor
    causal: bool
    count: Tensor | None


def outer(first: Tensor, second: Tensor) -> Tensor:
    """[..., a] and [..., b] to [..., a * b]: the first repeated, the second tiled, multiplied."""
    return (first[..., :, None] * second[..., None, :]).flatten(-2)


def product_by_head(rows: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T, d] and [H, d, N] to [B, H, T, N], as `rows @ weight`, which would copy the weights for every row."""
    batch, _, length, _ = rows.shape
    return (rows.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (batch, length)).transpose(0, 1)


def columns(logits: Tensor, key_position: Tensor | None, length: int) -> Tensor:
    """The columns of logits [1 or B, H, T, N] at the key positions [B, S], or the first `length` for None."""
    if key_position is None:
        return leading(logits, 3, length)
    index = key_position.clamp_min(0)[:, None, None]
    return logits.expand(index.shape[0], -1, -1, -1).gather(3, index.expand(-1, *logits.shape[1:3], -1))


def attend(logits: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys, times the values: the definition.

    Args:
        logits (`Tensor` [1 or B, H, T, S]): floating point.
        value (`Tensor` [B, H, S, d]): the values.
        visible (`Tensor` [1 or B, 1, T, S], *optional*): which keys each query sees, bool; None for all.

    Returns:
        The output [B, H, T, d] and the weights [1 or B, H, T, S]. A query that sees nothing gets 0 for both.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    hidden = None if visible is None else ~visible
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
    weights = weights.to(value.dtype)
    if weights.shape[0] < value.shape[0]:  # one product for the batch: a broadcast one would copy the weights
        columns = value.permute(1, 2, 0, 3)  # [H, S, B, d]
        out = (weights[0] @ columns.flatten(2)).unflatten(2, columns.shape[2:])
        return out.permute(2, 0, 1, 3), weights
    return weights @ value, weights


def attend_fused(
    logits: Logits, value: Tensor, causal: bool, count: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`attend` for keys and queries at the same T places: the output [B, H, T, d], without a [T, T] tensor per row.

    Args:
        logits: their parts.
        value (`Tensor` [B, H, T, d]): the values.
        causal (`bool`): whether a query sees only its own and earlier places.
        count (`Tensor` [B], *optional*): how many places, from the first, hold a token; None for all. A causal query
            needs no other mask than its place; what queries behind the tokens get has no meaning.
        backend (`str`): "auto" is the first kernel of the table `KERNELS` that supports the call; or the name of one.

    Raises:
        ValueError: there is no such kernel, or it does not support the call.
    """
    if causal:
        count = None
    elif count is not None:
        count = count.clamp_min(1)  # a row without any token sees its first place, so that no softmax is over nothing
    call = Call(logits, value, causal, count)
    return choose({"auto": KERNELS}, call, backend).run(call)


def _visible(rows: slice, value: Tensor, causal: bool, count: Tensor | None) -> Tensor | None:
    """Which of the keys up to the last row (causal) or of all keys the queries `rows` see: [1 or B, 1, 1 or T, S]."""
    places = torch.arange(value.shape[2], device=value.device)
    if causal:
        return (places[: rows.stop] <= places[rows, None])[None, None]
    return None if count is None else (places < count[:, None])[:, None, None]


def _attend_factors(call: Call) -> Tensor:
    logits, value, causal, count = call
    batch, width = value.shape[0], value.shape[-1]
    # Fused kernels want one head size for all three, and those of GPUs a multiple of 8.
    size = max(logits.query.shape[-1], width)
    size = size if value.device.type == "cpu" else -(-size // 8) * 8
    query, key, value = (F.pad(t, (0, size - t.shape[-1])) for t in (logits.query, logits.key, value))
    query, key = (t.expand(batch, -1, -1, -1) for t in (query, key))
    mask = None if causal else _visible(slice(None), value, causal, count)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=1.0)[..., :width]


def _attend_in_blocks(call: Call) -> Tensor:
    logits = call.logits
    query, key = _in_one_dtype(logits.query, logits.key)
    product = logits.product or (None, None)
    positions = logits.key_position
    return attend_in_blocks(call.value, query, key, logits.bias, *product, positions, call.count, call.causal)


def _attend_in_one(call: Call) -> Tensor:
    logits, value, causal, count = call
    return _attend_block(logits, value, _visible(slice(0, value.shape[2]), value, causal, count))


def _has_factors_alone(call: Call) -> bool:
    return call.logits.bias is None and call.logits.product is None


def _has_one_bias_alone(call: Call) -> bool:
    logits = call.logits
    return logits.query is None and logits.product is None and logits.bias.shape[0] == 1 and call.count is None


# In order of preference.
KERNELS = (
    Kernel(
        "factors",
        "logits that are a product of queries and keys, outside of transforms",
        lambda call: _has_factors_alone(call) and not is_transformed(),
        _attend_factors,
    ),
    Kernel("shared", "logits that are one matrix for the batch, without padding", _has_one_bias_alone, _attend_in_one),
    Kernel(
        "blocks",
        "calls outside of exports, which must not fix the number of blocks, and transforms, which have no rules",
        lambda call: not is_exporting() and not is_transformed(),
        _attend_in_blocks,
    ),
    Kernel("whole", "all calls", lambda call: True, _attend_in_one),
)


def _in_one_dtype(query: Tensor | None, key: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Inside of an operator there is no autocast to do this."""
    if query is None:
        return None, None
    device = query.device.type
    dtype = torch.promote_types(query.dtype, key.dtype)
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype)


@operator("attend_in_blocks")
def attend_in_blocks(
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    bias: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    key_position: Tensor | None,
    count: Tensor | None,
    causal: bool,
) -> Tensor:
    """`attend_fused` for one block of queries at a time: [B, H, T, d]. The other arguments are those of `Logits`, with
    its `product` as first and second."""
    logits = Logits(query, key, bias, None if first is None else (first, second), key_position)
    out = value.new_empty(value.shape)
    for rows, keys in _blocks(value.shape[2], causal):
        part = _part(logits, rows, keys)
        out[:, :, rows] = _attend_block(part, value[:, :, :keys], _visible(rows, value, causal, count))
    return out


@attend_in_blocks.register_fake
def _(value, query, key, bias, first, second, key_position, count, causal):
    return value.new_empty(value.shape)


@flops_of(attend_in_blocks)
def _attend_flops(value, query, key, bias, first, second, key_position, count, causal):
    batch, heads, length, width = value.shape
    columns = batch * width + (0 if query is None else max(len(query), len(key)) * query.shape[3])
    return 2 * heads * columns * sum((rows.stop - rows.start) * keys for rows, keys in _blocks(length, causal))


@operator("attend_in_blocks_backward")
def attend_in_blocks_backward(
    grad: Tensor, tensors: list[Tensor | None], key_position: Tensor | None, count: Tensor | None, causal: bool
) -> list[Tensor]:
    """Gradients of `attend_in_blocks` with respect to its first six arguments, `tensors`; empty for None. The logits
    of a block are computed again."""
    length = grad.shape[2]
    grads = [grad.new_empty(0) if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
    for rows, keys in _blocks(length, causal):
        places = [slice(keys), rows, slice(keys), (rows, slice(keys)), rows, rows]
        given = [i for i, tensor in enumerate(tensors) if tensor is not None]
        index = [(slice(None), slice(None), *(p if isinstance(p, tuple) else (p,))) for p in places]

        def block(*parts, given=given, rows=rows, keys=keys):
            value, query, key, bias, first, second = map(dict(zip(given, parts, strict=True)).get, range(6))
            product = None if first is None else (first, second)
            positions = None if key_position is None else key_position[:, :keys]
            visible = _visible(rows, grad, causal, count)
            return _attend_block(Logits(query, key, bias, product, positions), value, visible)

        parts = [tensors[i][index[i]] for i in given]
        for i, part in zip(given, gradients_inside_operator(block, parts, grad[:, :, rows]), strict=True):
            grads[i][index[i]] += part
    return grads


@attend_in_blocks_backward.register_fake
def _(grad, tensors, key_position, count, causal):
    return [grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


@flops_of(attend_in_blocks_backward)
def _(grad, tensors, key_position, count, causal):
    return 3 * _attend_flops(
        *tensors, key_position, count, causal
    )  # the products, again, and the two gradients of each


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # a derivative of this one is wanted
        given = [i for i, (t, needed) in enumerate(zip(inputs, ctx.needs_input_grad, strict=False)) if needed]
        rest = list(inputs)

        def whole(*parts):
            for i, part in zip(given, parts, strict=True):
                rest[i] = part
            value, query, key, bias, first, second, key_position, count = rest
            logits = Logits(query, key, bias, None if first is None else (first, second), key_position)
            return _attend_block(logits, value, _visible(slice(0, value.shape[2]), value, ctx.causal, count))

        grads = dict(zip(given, differentiable_gradients(whole, [inputs[i] for i in given], (), grad), strict=True))
        return tuple(map(grads.get, range(9)))
    *tensors, key_position, count = inputs
    grads = attend_in_blocks_backward(grad, tensors, key_position, count, ctx.causal)
    return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None)


attend_in_blocks.register_autograd(_differentiate, setup_context=_save_for_backward)


def _blocks(length: int, causal: bool):
    """The queries of each block, and how many keys they see."""
    for start in range(0, length, _BLOCK):
        rows = slice(start, min(start + _BLOCK, length))
        yield rows, rows.stop if causal else length


def _part(logits: Logits, rows: slice, keys: int) -> Logits:
    """The logits of a block of queries over the first keys."""
    return Logits(
        query=None if logits.query is None else logits.query[:, :, rows],
        key=None if logits.key is None else logits.key[:, :, :keys],
        bias=None if logits.bias is None else logits.bias[:, :, rows, :keys],
        product=None if logits.product is None else tuple(t[:, :, rows] for t in logits.product),
        key_position=None if logits.key_position is None else logits.key_position[:, :keys],
    )


def _attend_block(part: Logits, value: Tensor, visible: Tensor | None) -> Tensor:
    terms = []
    if part.query is not None:
        terms.append(part.query @ part.key.transpose(2, 3))
    if part.bias is not None:
        terms.append(part.bias)
    if part.product is not None:
        terms.append(columns(outer(*part.product), part.key_position, value.shape[2]))
    return attend(reduce(torch.add, terms), value, visible)[0]
