# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT-conv of a picture: each key counts by its offset in rows and columns, and all of the picture counts.

Two forms of one operator. The dense form looks the kernel up for each pair of places, and is AFT-full with heads from
there on. The convolution is that of exp(w) - 1, beside the sums over the whole picture, which do not depend on the
query. It subtracts where w is below 0, so a head of steep biases takes the dense form. Both compute again in the
backward pass whatever is as large as all pairs.

Inside of the operator tensors are [B, T, h, c]: h heads, of c channels that share a kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_full import shared_average
from .ops_operators import differentiable_gradients, flops_of, operator
from .ops_panel import panel, panel_backward, panel_composed
from .ops_state import Call, compute_dtype, finite, gated, largest, nonzero, without_padding


# Biases that a convolution takes: what it subtracts costs e^6 roundings, and no weight in it leaves float32.
_LOWEST, _HIGHEST = -6.0, 12.0
_LARGEST = 1e12  # of values and gradients that a convolution takes as they are
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def on_grid(average: Callable[..., Tensor]) -> Callable[[Call], tuple[Tensor, None]]:
    """The answer to a call, by a function that gives the average [B, T, V] of keys, values, a kernel, and the rows and
    columns of the grid."""

    def run(call: Call) -> tuple[Tensor, None]:
        dtype = compute_dtype(call.key, call.value)
        tensors = *without_padding(call.key, call.value, call.tokens), call.window_bias
        out = average(*(tensor.to(dtype) for tensor in tensors), *call.grid)
        return gated(call.query, out, call.query_activation), None

    return run


def convolution_pays(call: Call) -> bool:
    """Depth-wise convolutions with large kernels are slow on GPUs, and on CPUs in float64 or without oneDNN."""
    single = compute_dtype(call.key, call.value) == torch.float32
    return _HAS_ONEDNN and call.value.device.type == "cpu" and single


def by_pairs(panel: Callable[..., tuple]) -> Callable[..., Tensor]:
    """The dense form of the average, in torch's own operators, by a function that gives the average of a panel."""

    def average(key: Tensor, value: Tensor, kernel: Tensor, rows: int, columns: int) -> Tensor:
        return shared_average(panel, key, value, pair_bias(kernel, rows, columns), False)

    return average


def by_convolution(key: Tensor, value: Tensor, kernel: Tensor, rows: int, columns: int) -> Tensor:
    return grid_average(key, value, kernel, rows, columns, True)[0]


def densely(key: Tensor, value: Tensor, kernel: Tensor, rows: int, columns: int) -> Tensor:
    return grid_average(key, value, kernel, rows, columns, False)[0]


def pair_bias(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """The bias [h, T, T] of each query and key of a grid, from the kernel [h, kh, kw]."""
    taps = _taps(rows, columns, *kernel.shape[1:], kernel.device)
    outside = F.pad(kernel.flatten(1), (0, 1))
    return outside.index_select(1, taps.flatten()).unflatten(1, taps.shape)


def _taps(rows: int, columns: int, kernel_rows: int, kernel_columns: int, device) -> Tensor:
    """The place in a flat kernel of each query and key [T, T], its size for those that are too far apart."""
    down, right = torch.arange(rows, device=device), torch.arange(columns, device=device)
    down = (down[:, None] - down + kernel_rows // 2)[:, None, :, None]  # [rows, 1, rows, 1]
    right = (right[:, None] - right + kernel_columns // 2)[:, None]  # [columns, 1, columns]
    inside = (down >= 0) & (down < kernel_rows) & (right >= 0) & (right < kernel_columns)
    taps = torch.where(inside, down * kernel_columns + right, kernel_rows * kernel_columns)
    return taps.flatten(2).flatten(0, 1)


def _sum_by_tap(pairs: Tensor, taps: Tensor, size: int) -> Tensor:
    """Sums what belongs to pairs [n, T, T] over those of the same tap: [n, size]."""
    sums = pairs.new_zeros(pairs.shape[0], size + 1)
    return sums.index_add_(1, taps.flatten(), pairs.flatten(1))[:, :-1]


def _cropped(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """Without the offsets that no pair of the grid has."""
    _, down, right = kernel.shape
    down_spare, right_spare = max(down // 2 - rows + 1, 0), max(right // 2 - columns + 1, 0)
    return kernel[:, down_spare : down - down_spare, right_spare : right - right_spare]


def _by_key(values: Tensor, keys: Tensor) -> Tensor:
    """The value channels [..., c_v] of each key channel, [..., c_k, c_v / c_k]: a view."""
    return values.unflatten(-1, (keys.shape[-1], -1))


def _beside(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An empty tensor for what has the key and the value channels of each head, and views of both parts."""
    both = keys.new_empty(*keys.shape[:-1], keys.shape[-1] + values.shape[-1])
    of_keys, of_values = both.split([keys.shape[-1], values.shape[-1]], -1)
    return both, of_keys, _by_key(of_values, keys)


def _weights(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """exp(k - maximum of the picture), and that and its products with the values, beside each other."""
    weight = (key - finite(key.amax(1, keepdim=True))).exp_()
    terms, of_keys, of_values = _beside(key, value)
    of_keys.copy_(weight)
    torch.mul(_by_key(value, key), weight.unsqueeze(-1), out=of_values)
    return weight, terms


def _filtered(terms: Tensor, kernel: Tensor, rows: int, columns: int) -> Tensor:
    """The sum of terms [B, T, h, c] around each place: a depth-wise convolution of pictures with their channels last,
    which is the layout that they have, and in which the CPU is fast."""
    heads, channels = terms.shape[2:]
    pictures = terms.flatten(2).unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    weight = kernel.repeat_interleave(channels, 0)[:, None]
    padding = kernel.shape[1] // 2, kernel.shape[2] // 2
    out = F.conv2d(pictures, weight, padding=padding, groups=heads * channels)
    return out.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (heads, channels))


def _correlated(upstream: Tensor, terms: Tensor, rows: int, columns: int, size: torch.Size) -> Tensor:
    """The sum [h, kh, kw] of the products of all pairs of places at each offset of a kernel of a size [kh, kw].

    A matrix product for each offset in rows gives all pairs of columns: convolutions of torch are slow at this.
    """

    def by_column(tensor):  # [h, columns, rows x B x c]
        return tensor.unflatten(1, (rows, columns)).permute(3, 2, 1, 0, 4).flatten(2)

    each = upstream.shape[0] * upstream.shape[3]
    upstream, terms = by_column(upstream), by_column(terms)
    pairs = []
    for offset in range(-(size[0] // 2), size[0] // 2 + 1):
        count, first, other = (rows - abs(offset)) * each, max(offset, 0) * each, max(-offset, 0) * each
        pairs.append(upstream.narrow(2, first, count) @ terms.narrow(2, other, count).mT)
    pairs = torch.stack(pairs, 1).flatten(0, 1)  # [h x kh, columns, columns]
    return _sum_by_tap(pairs, _taps(1, columns, 1, size[1], pairs.device), size[1]).unflatten(0, (-1, size[0]))


def _convolution(key, value, kernel, rows, columns):
    """The average and its denominator, relative to the maximum of each key channel."""
    kernel = _cropped(kernel, rows, columns)
    _, terms = _weights(key, value)
    sums = _filtered(terms, kernel.flip(1, 2).expm1(), rows, columns).add_(terms.sum(1, keepdim=True))
    total, out = sums.split([key.shape[3], value.shape[3]], -1)
    return (_by_key(out, key) / nonzero(total).unsqueeze(-1)).flatten(3), total


def _convolution_backward(grad, out, total, key, value, kernel, rows, columns):
    d_kernel = torch.zeros_like(kernel, memory_format=torch.contiguous_format)
    kernel = _cropped(kernel, rows, columns)
    weight, terms = _weights(key, value)
    upstream, of_total, of_sum = _beside(key, value)
    torch.div(_by_key(grad, key), nonzero(total).unsqueeze(-1), out=of_sum)
    torch.sum(of_sum * _by_key(out, key), -1, out=of_total).neg_()
    d_terms = _filtered(upstream, kernel.expm1(), rows, columns).add_(upstream.sum(1, keepdim=True))
    d_weight, d_product = d_terms.split([key.shape[3], value.shape[3]], -1)
    d_product = _by_key(d_product, key)
    d_key = (d_weight + (d_product * _by_key(value, key)).sum(-1)) * weight
    correlation = _correlated(upstream, terms, rows, columns, kernel.shape[1:])
    _cropped(d_kernel, rows, columns).copy_(correlation * kernel.exp())
    return d_key, (d_product * weight.unsqueeze(-1)).flatten(3), d_kernel


def _to_panel(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, h, c] to [h, T, B, c], and back."""
    return tuple(tensor.permute(2, 1, 0, 3).contiguous() for tensor in tensors)


def _panel_inputs(key, value, kernel, rows, columns):
    key, value = _to_panel(key, value)
    no_key, no_value = key[:, :0], value[:, :0]
    return [key, value, no_key, no_key, no_value, pair_bias(kernel, rows, columns)]


def _dense(key, value, kernel, rows, columns):
    """The average and its denominator, relative to the maxima of the panel."""
    out, _, total = panel.plain(*_panel_inputs(key, value, kernel, rows, columns), 0, False)
    return _to_panel(out, total)


def _dense_backward(grad, out, total, key, value, kernel, rows, columns):
    inputs = _panel_inputs(key, value, kernel, rows, columns)
    grad, out, total = _to_panel(grad, out, total)
    d_key, d_value, *_, d_bias = panel_backward.plain(grad, None, out, total, inputs, 0, True)
    size = kernel.shape[1:]
    d_kernel = _sum_by_tap(d_bias, _taps(rows, columns, *size, kernel.device), size.numel()).unflatten(1, size)
    return *_to_panel(d_key, d_value), d_kernel


def _steep(kernel: Tensor, value: Tensor) -> Tensor:
    """The heads [h], bool, that a convolution is not exact for. A NaN is steep."""
    kernel = kernel.flatten(1)
    flat = (kernel.amin(1) >= _LOWEST) & (kernel.amax(1) <= _HIGHEST)
    return ~flat if largest(value) < _LARGEST else torch.ones_like(flat)


def _heads(tensor: Tensor, index: Tensor) -> Tensor:
    """Some heads of [B, T, h, c] or [h, kh, kw]."""
    return tensor.index_select(2 if tensor.dim() == 4 else 0, index)


def _by_heads(convolution, dense, steep: Tensor, tensors, rows: int, columns: int) -> tuple[Tensor, ...]:
    """What one function gives of the heads that are not steep, and the other of those that are."""
    if steep.all() or not steep.any():
        return (dense if steep.any() else convolution)(*tensors, rows, columns)
    groups = (~steep).nonzero().squeeze(1), steep.nonzero().squeeze(1)
    parts = [
        function(*(_heads(tensor, index) for tensor in tensors), rows, columns)
        for function, index in zip((convolution, dense), groups, strict=True)
    ]
    order = torch.cat(groups).argsort()
    return tuple(_heads(torch.cat(both, 2 if both[0].dim() == 4 else 0), order) for both in zip(*parts, strict=True))


def _split(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1))


@operator("grid_average")
def grid_average(
    key: Tensor, value: Tensor, kernel: Tensor, rows: int, columns: int, convolve: bool
) -> tuple[Tensor, Tensor]:
    """Weighted average [B, T, V] of keys [B, T, K] and values [B, T, V] under a kernel [h, kh, kw], and for the
    backward pass its denominator [B, T, K]: by convolutions where they are exact, else by all pairs."""
    heads = kernel.shape[0]
    tensors = _split(key, heads), _split(value, heads), kernel
    if convolve:
        found = _by_heads(_convolution, _dense, _steep(kernel, value), tensors, rows, columns)
    else:
        found = _dense(*tensors, rows, columns)
    out, total = (tensor.flatten(2).contiguous() for tensor in found)
    return out, total


@grid_average.register_fake
def _(key, value, kernel, rows, columns, convolve):
    return value.new_empty(value.shape), key.new_empty(key.shape)


@operator("grid_backward")
def grid_backward(
    grad: Tensor, out: Tensor, total: Tensor, inputs: list[Tensor], rows: int, columns: int, convolve: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `grid_average` with respect to its first three arguments, `inputs`."""
    key, value, kernel = inputs
    heads = kernel.shape[0]
    tensors = *(_split(tensor, heads) for tensor in (grad, out, total, key, value)), kernel
    if convolve:
        size = largest(grad)
        if size and not 1 / _LARGEST < size < _LARGEST:
            scaled = grid_backward.plain(grad / size, out, total, inputs, rows, columns, convolve)
            return tuple(tensor * size for tensor in scaled)
        found = _by_heads(_convolution_backward, _dense_backward, _steep(kernel, value), tensors, rows, columns)
    else:
        found = _dense_backward(*tensors, rows, columns)
    d_key, d_value, d_kernel = found
    return d_key.flatten(2).contiguous(), d_value.flatten(2).contiguous(), d_kernel


@grid_backward.register_fake
def _(grad, out, total, inputs, rows, columns, convolve):
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


@flops_of(grid_average)
def _grid_flops(key, value, kernel, rows, columns, convolve):
    _, down, right = _cropped(kernel, rows, columns).shape
    pairs = down * right if convolve else rows * columns
    return 2 * pairs * rows * columns * key.shape[0] * (key.shape[2] + value.shape[2])


@flops_of(grid_backward)
def _(grad, out, total, inputs, rows, columns, convolve):
    key, value, kernel = inputs
    forward = _grid_flops(*inputs, rows, columns, convolve)
    if not convolve:
        return 2 * forward
    radius = min(kernel.shape[1] // 2, rows - 1)
    pairs = (rows * (2 * radius + 1) - radius * (radius + 1)) * columns * columns
    return forward + 2 * pairs * key.shape[0] * (key.shape[2] + value.shape[2])


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.rows, ctx.columns, ctx.convolve = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    out, total, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # a derivative of this one is wanted
        grads = differentiable_gradients(by_pairs(panel_composed), inputs, (ctx.rows, ctx.columns), grad)
    else:
        grads = grid_backward(grad.contiguous(), out, total, inputs, ctx.rows, ctx.columns, ctx.convolve)
    return (*grads, None, None, None)


grid_average.register_autograd(_backward, setup_context=_save_for_backward)
