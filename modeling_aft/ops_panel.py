# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The core of AFT as one differentiable operator: a panel of C queries and S keys under [C, S] log weights.

A panel is computed as exp(w - row max) @ exp(k - column max), which is exact wherever its row sum does not underflow.
The rows below `_TINY` (a later key of the panel is larger by 69 or more, say) are computed again in log space. The
choice depends on the data, so both directions are torch.library operators: torch.compile sees one opaque node.

Shapes: G independent panels, C queries, S keys, Z in {0, 1, 2} sums of further keys, P columns (batch, or batch x
chunks), K key channels, V = K x R value channels (R value channels share a key channel).
"""

import torch
from torch import Tensor

from .ops_operators import differentiable_gradients, flops_of, operator
from .ops_state import finite, largest, log, nonzero, spread, sum_shared


_TINY = {torch.float32: 1e-30, torch.float64: 1e-280}
_FULL_ROWS = (128, 256)  # queries per matrix product where `visible` is given, at least and at most
_EXACT_ELEMENTS = 2**22  # elements of the largest tensor when rows are computed again in log space
_LARGEST = 1e30  # of what is summed up in float32; what may be larger is computed in float64


def _exponentials(key, value, maximum, normalizer, average):
    """exp(k - column max) of sums and keys [G, Z+S, P, K], and the same times values."""
    groups, sums = maximum.shape[:2]
    reference = torch.cat([maximum, key], 1) if sums else key
    reference = finite(reference.amax(1, keepdim=True))
    size = (groups, sums + key.shape[1], *key.shape[2:])
    weight = key.new_empty(size)
    torch.sub(key, reference, out=weight[:, sums:])
    torch.sub(maximum, reference, out=weight[:, :sums])
    weight.exp_()
    weight[:, :sums] *= normalizer
    term = value.new_empty((*size[:-1], value.shape[-1]))
    torch.mul(spread(weight[:, sums:], value), value, out=term[:, sums:])
    torch.mul(spread(weight[:, :sums], average), average, out=term[:, :sums])
    return weight, term


def _row_blocks(queries: int, keys: int, visible: int):
    """Slices of queries, and how many keys their last one sees. `visible` > 0: query 0 sees that many, each later one
    more."""
    if visible <= 0:
        return [(slice(0, queries), keys)]
    least, most = _FULL_ROWS
    count = max(least, min(most, queries // 16))
    return [(slice(t, min(t + count, queries)), min(visible + t + count - 1, keys)) for t in range(0, queries, count)]


def masked(bias: Tensor, visible: int, query: Tensor | None = None) -> Tensor:
    """The bias [.., C, Z+S] with -inf for what a query does not see, if `visible` > 0; the queries [C] are 0, 1, ...
    unless they are given."""
    if visible <= 0:
        return bias
    own, key = (torch.arange(size, device=bias.device) for size in bias.shape[-2:])
    query = own if query is None else query
    return bias.masked_fill(key >= visible + query[:, None], -torch.inf)


def _pair_weights(bias: Tensor, rows: slice, seen: int, visible: int) -> tuple[Tensor, Tensor]:
    """exp(w - row max) of the queries `rows` and the keys they see, [G, c, seen], and the row maxima [G, c, 1]."""
    weights = bias[:, rows, :seen].clone()
    if visible > 0:
        later = weights[..., visible + rows.start :]  # the keys that not all of these queries see
        later.masked_fill_(later.new_ones(later.shape[1:], dtype=torch.bool).triu(), -torch.inf)
    largest = finite(weights.amax(-1, keepdim=True))
    return weights.sub_(largest).exp_(), largest


def underflown(total: Tensor, bias: Tensor) -> Tensor:
    """[G, C, P] bool: the rows to compute in log space."""
    sees_something = bias.amax(-1) > -torch.inf  # [G, C]; other rows are 0
    return (total < _TINY[total.dtype]).any(-1) & sees_something[..., None]


def _exact_rows(total: Tensor, bias: Tensor, visible: int, channels: int):
    """Indices (g, c, p) of the rows to compute in log space, in groups of bounded memory."""
    if not (total < _TINY[total.dtype]).any():
        return []
    rows = underflown(total, masked(bias, visible)).nonzero()
    group = max(1, _EXACT_ELEMENTS // (bias.shape[2] * channels))
    return [index.unbind(1) for index in rows.split(group)] if len(rows) else []


def exact_weights(index, key, maximum, normalizer, bias, visible=0):
    """Normalised weights [R, Z+S, K] of the rows `index`, all zero where a row sees nothing, and the log of what they
    were divided by, [R, K]."""
    g, c, p = index
    logits = torch.cat([maximum[g, :, p], key[g, :, p]], 1) + masked(bias[g, c], visible, c)[..., None]
    reference = finite(logits.amax(1, keepdim=True))
    weights = (logits - reference).exp()
    sums = maximum.shape[1]
    weights = torch.cat([weights[:, :sums] * normalizer[g, :, p], weights[:, sums:]], 1)
    total = weights.sum(1, keepdim=True)
    return weights / nonzero(total), (log(total) + reference).squeeze(1)


def _log_total(total, key, maximum, row_maximum):
    """The log of the denominators [G, C, P, K], of which `total` is that relative to the exponentials of a panel, with
    the row maxima [G, C, 1]."""
    reference = finite(torch.cat([maximum, key], 1).amax(1, keepdim=True))
    return log(total) + reference + row_maximum[..., None]


def _is_moderate(
    grad: Tensor, grad_log: Tensor | None, out: Tensor, total: Tensor, value: Tensor, average: Tensor
) -> bool:
    """Whether no sum of the backward pass can leave the range of float32. A NaN passes."""
    # Those that are smaller are computed in log space.
    smallest = float(torch.where(total >= _TINY[total.dtype], total, 1.0).amin().clamp(max=1.0))
    size = largest(grad) * max(largest(out, value, average), 1.0)
    size += 0.0 if grad_log is None else largest(grad_log)
    return not size * total.shape[1] / smallest > _LARGEST


@operator("panel")
def panel(
    key: Tensor,
    value: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    average: Tensor,
    bias: Tensor,
    visible: int,
    with_log: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted average [G, C, P, V], `with_log` the log of its denominator [G, C, P, K], else an empty tensor, and for
    the backward pass the denominator relative to the maxima [G, C, P, K].

    key [G, S, P, K], value [G, S, P, V]; maximum, normalizer [G, Z, P, K], average [G, Z, P, V]; bias [G, C, Z+S].
    `visible` > 0: query 0 sees so many of the keys, each later one more, and the rest of the bias is not read.
    """
    if value.dtype == torch.float32 and largest(value, average) > _LARGEST:
        inputs = (tensor.double() for tensor in (key, value, maximum, normalizer, average, bias))
        return tuple(tensor.float() for tensor in panel.plain(*inputs, visible, with_log))
    weight, term = _exponentials(key, value, maximum, normalizer, average)
    groups, queries, columns = bias.shape[0], bias.shape[1], key.shape[2]
    total = key.new_empty(groups, queries, columns * key.shape[3])
    out = value.new_empty(groups, queries, columns * value.shape[3])
    row_maxima = []
    for rows, seen in _row_blocks(queries, bias.shape[2], visible):
        pair_weight, row_maximum = _pair_weights(bias, rows, seen, visible)
        torch.bmm(pair_weight, weight[:, :seen].flatten(2), out=total[:, rows])
        torch.bmm(pair_weight, term[:, :seen].flatten(2), out=out[:, rows])
        row_maxima.append(row_maximum)
    total = total.unflatten(2, (columns, -1))
    out = out.unflatten(2, (columns, -1))
    out /= spread(nonzero(total), out)
    logs = _log_total(total, key, maximum, torch.cat(row_maxima, 1)) if with_log else total.new_empty(0)
    for index in _exact_rows(total, bias, visible, value.shape[3]):
        g, c, p = index
        weights, log_total = exact_weights(index, key, maximum, normalizer, bias, visible)
        values = torch.cat([average[g, :, p], value[g, :, p]], 1)
        out[g, c, p] = (spread(weights, values) * values).sum(1)
        if with_log:
            logs[g, c, p] = log_total
    return out, logs, total


def panel_average(
    key: Tensor,
    value: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    average: Tensor,
    bias: Tensor,
    visible: int,
    with_log: bool = False,
) -> tuple[Tensor, Tensor]:
    """The average and the log. `panel_composed` and `panel_for_export` give the same by other means."""
    return panel(key, value, maximum, normalizer, average, bias, visible, with_log)[:2]


@panel.register_fake
def _(key, value, maximum, normalizer, average, bias, visible, with_log):
    size = (bias.shape[0], bias.shape[1], key.shape[2])
    total = key.new_empty((*size, key.shape[3]))
    return value.new_empty((*size, value.shape[3])), torch.empty_like(total) if with_log else key.new_empty(0), total


@flops_of(panel)
def _panel_flops(key, value, maximum, normalizer, average, bias, visible, with_log=False):
    groups, queries, keys = bias.shape
    pairs = sum((rows.stop - rows.start) * seen for rows, seen in _row_blocks(queries, keys, visible))
    return 2 * groups * pairs * key.shape[2] * (key.shape[3] + value.shape[3])


@operator("panel_backward")
def panel_backward(
    grad: Tensor,
    grad_log: Tensor | None,
    out: Tensor,
    total: Tensor,
    inputs: list[Tensor],
    visible: int,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `panel` with respect to its first six arguments, `inputs` (bias: empty unless `needs_bias`), from
    those of the average and of the log."""
    key, value, maximum, normalizer, average, bias = inputs
    if value.dtype == torch.float32 and not _is_moderate(grad, grad_log, out, total, value, average):
        inputs = [tensor.double() for tensor in inputs]
        out, _, total = panel.plain(*inputs, visible, False)
        upstream = grad.double(), None if grad_log is None else grad_log.double()
        return tuple(t.float() for t in panel_backward.plain(*upstream, out, total, inputs, visible, needs_bias))
    weight, term = _exponentials(key, value, maximum, normalizer, average)
    sums, keys, columns = maximum.shape[1], bias.shape[2], key.shape[2]
    underflow = total < _TINY[key.dtype]
    # A row computed in log space has no meaningful denominator: it is left out here and added below.
    inverse = torch.where(underflow.any(-1, keepdim=True), torch.zeros_like(total), 1 / total)
    grad_term = grad * spread(inverse, grad)
    grad_weight = sum_shared(grad_term * out, key).neg_()
    if grad_log is not None:
        grad_weight.addcmul_(grad_log, inverse)
    grad_term, grad_weight = grad_term.flatten(2), grad_weight.flatten(2)
    d_term = value.new_zeros(term.shape[0], keys, grad_term.shape[2])
    d_weight = key.new_zeros(weight.shape[0], keys, grad_weight.shape[2])
    d_bias = torch.zeros_like(bias) if needs_bias else bias.new_empty(0)
    for rows, seen in _row_blocks(bias.shape[1], keys, visible):
        pair_weight, _ = _pair_weights(bias, rows, seen, visible)
        d_term[:, :seen].baddbmm_(pair_weight.mT, grad_term[:, rows])
        d_weight[:, :seen].baddbmm_(pair_weight.mT, grad_weight[:, rows])
        if needs_bias:
            d_pair = torch.bmm(grad_term[:, rows], term[:, :seen].flatten(2).mT)
            d_pair.baddbmm_(grad_weight[:, rows], weight[:, :seen].flatten(2).mT)
            torch.mul(d_pair, pair_weight, out=d_bias[:, rows, :seen])
    d_term, d_weight = d_term.unflatten(2, (columns, -1)), d_weight.unflatten(2, (columns, -1))
    d_value = d_term[:, sums:] * spread(weight[:, sums:], value)
    d_average = d_term[:, :sums] * spread(weight[:, :sums], average)
    d_key = sum_shared(d_term[:, sums:] * value, key).add_(d_weight[:, sums:]).mul_(weight[:, sums:])
    d_maximum = sum_shared(d_term[:, :sums] * average, key).add_(d_weight[:, :sums]).mul_(weight[:, :sums])
    counted = normalizer > 0
    d_normalizer = torch.where(counted, d_maximum / normalizer, torch.zeros_like(normalizer))
    for index in _exact_rows(total, bias, visible, value.shape[3]):
        g, c, p = index
        weights, _ = exact_weights(index, key, maximum, normalizer, bias, visible)
        values = torch.cat([average[g, :, p], value[g, :, p]], 1)
        grads = grad[g, c, p][:, None]  # [R, 1, V]
        d_values = spread(weights, values) * grads
        d_logits = sum_shared(grads * (values - out[g, c, p][:, None]), key)
        if grad_log is not None:
            d_logits += grad_log[g, c, p][:, None]
        d_logits *= weights
        d_value.transpose(1, 2).index_put_((g, p), d_values[:, sums:], accumulate=True)
        d_key.transpose(1, 2).index_put_((g, p), d_logits[:, sums:], accumulate=True)
        if needs_bias:
            d_bias.index_put_((g, c), d_logits.sum(-1), accumulate=True)
        if sums:
            d_average.transpose(1, 2).index_put_((g, p), d_values[:, :sums], accumulate=True)
            d_maximum.transpose(1, 2).index_put_((g, p), d_logits[:, :sums], accumulate=True)
            count = normalizer[g, :, p]
            d_count = torch.where(count > 0, d_logits[:, :sums] / count, torch.zeros_like(count))
            d_normalizer.transpose(1, 2).index_put_((g, p), d_count, accumulate=True)
    return d_key, d_value, d_maximum, d_normalizer, d_average, d_bias


@panel_backward.register_fake
def _(grad, grad_log, out, total, inputs, visible, needs_bias):
    *others, bias = inputs
    like = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in others]
    return (*like, torch.empty_like(bias) if needs_bias else bias.new_empty(0))


@flops_of(panel_backward)
def _(grad, grad_log, out, total, inputs, visible, needs_bias):
    return (1 + needs_bias) * _panel_flops(*inputs, visible)


def panel_composed(
    key: Tensor,
    value: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    average: Tensor,
    bias: Tensor,
    visible: int,
    with_log: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The average [G, C, P, V] and the log that `panel` gives, in torch's own operators: for transforms of functions
    and second derivatives. It is exact, in log space, and takes the memory of all weights at once."""
    bias = masked(bias, visible)
    count = torch.cat([normalizer, torch.ones_like(key)], 1)[:, None]  # [G, 1, Z + S, P, K]
    logits, values = torch.cat([maximum, key], 1), torch.cat([average, value], 1)[:, None]
    of_columns = finite(logits.detach().amax(1, keepdim=True))
    logits = logits - of_columns  # or what is added to a large key is lost
    logits = logits[:, None] + bias[..., None, None]  # [G, C, Z + S, P, K]
    of_rows = finite(logits.detach().amax(2, keepdim=True))
    weights = (logits - of_rows).exp() * count
    total = weights.sum(2)
    sums = (spread(weights, values) * values).sum(2)
    logs = log(total) + of_rows.squeeze(2) + of_columns if with_log else None
    return sums / spread(nonzero(total), sums), logs


def panel_for_export(
    key: Tensor,
    value: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    average: Tensor,
    bias: Tensor,
    visible: int,
    with_log: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The average and the log that `panel` gives."""
    bias = masked(bias, visible)
    count = torch.cat([normalizer, torch.ones_like(key)], 1)
    logits, values = torch.cat([maximum, key], 1), torch.cat([average, value], 1)
    weight = (logits - finite(logits.amax(1, keepdim=True))).exp() * count
    pair_weight = (bias - finite(bias.amax(-1, keepdim=True))).exp()
    total = (pair_weight @ weight.flatten(2)).unflatten(2, key.shape[2:])
    out = (pair_weight @ (spread(weight, values) * values).flatten(2)).unflatten(2, value.shape[2:])
    index = g, c, p = _some_of(underflown(total, bias))
    total = torch.where(total < _TINY[total.dtype], 0.0, total)  # no gradient, not even 0, goes through 1 / total
    out = out / spread(nonzero(total), out)
    weights, log_total = exact_weights(index, key, maximum, normalizer, bias)
    values = values[g, :, p]
    out = out.index_put(index, (spread(weights, values) * values).sum(1))
    if not with_log:
        return out, None
    row_maximum = finite(bias.amax(-1, keepdim=True))
    return out, _log_total(total, key, maximum, row_maximum).index_put(index, log_total)


def _some_of(rows: Tensor) -> tuple[Tensor, ...]:
    """The indices [R] of what is True in rows [G, C, P], and of the first in any case: generated code crashes with
    tensors of no row, and some runtimes refuse them."""
    grids = torch.meshgrid(*(torch.arange(size, device=rows.device) for size in rows.shape), indexing="ij")
    # Of one dimension, because the result of `nonzero` for several lies in memory as no other tensor does.
    places = (rows | (sum(grids) == 0)).flatten().nonzero().flatten()
    return tuple(grid.flatten().index_select(0, places) for grid in grids)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.visible, ctx.with_log = inputs
    out, _, total = output
    ctx.save_for_backward(out, total, *tensors)
    ctx.mark_non_differentiable(*output[1 + ctx.with_log :])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_log, _):
    if grad is None and grad_log is None:
        return (None,) * 8
    out, total, *inputs = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad.contiguous()
    if torch.is_grad_enabled():  # a derivative of this one is wanted
        grads = (grad, torch.zeros_like(total) if grad_log is None else grad_log) if ctx.with_log else grad
        return (*differentiable_gradients(_composed_outputs, inputs, (ctx.visible, ctx.with_log), grads), None, None)
    needs_bias = ctx.needs_input_grad[5]
    grad_log = None if grad_log is None else grad_log.contiguous()
    grads = panel_backward(grad, grad_log, out, total, inputs, ctx.visible, needs_bias)
    return (*grads[:5], grads[5] if needs_bias else None, None, None)


def _composed_outputs(*arguments):
    """What `panel_composed` gives, without what is None."""
    average, logs = panel_composed(*arguments)
    return average if logs is None else (average, logs)


panel.register_autograd(_backward, setup_context=_save_for_backward)
