# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The linear layers inside of blocks: dense, or with few inputs per output; and what may follow on them."""

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers import initialization
from transformers.activations import GELUActivation

from .ops_modes import is_exporting, is_transformed


MOST_ROWS = 8  # of an input, to be one of few rows


def activated(tensor: torch.Tensor, activation: str) -> torch.Tensor:
    """tanh of a tensor, or with "none" the tensor."""
    return tensor.tanh() if activation == "tanh" else tensor


def project(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `layer(hidden_states)`, [..., in] to [..., out]. What decoding steps have, one row or a few, is multiplied faster
    on CPUs than `nn.Linear` does it. Libraries of matrix products share the work out by the rows of the result: the
    outputs of the layer should be these. And torch.compile multiplies a single row faster with code of its own, in
    bfloat16 several times as fast.
    """
    if torch.is_grad_enabled() or type(layer) is not nn.Linear:
        return layer(hidden_states)
    if torch.compiler.is_compiling():
        return _compiled_row(layer, hidden_states) if _is_compiled_row(layer, hidden_states) else layer(hidden_states)
    weight, bias = _own_weights(layer)
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or not _is_plain(layer, hidden_states):
        return layer(hidden_states)
    shape = hidden_states.shape
    rows = shape.numel() // shape[-1]
    if rows == 1:
        return _times_row(weight, bias, hidden_states.reshape(-1), shape)
    if rows in (0, 2) or rows > MOST_ROWS:
        return layer(hidden_states)
    columns = hidden_states.reshape(rows, -1).T
    out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.T.contiguous().view(*shape[:-1], -1)


def activate(act_fn: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`act_fn(hidden_states)`, an activation of each number. torch has GELU on CPUs from a library whose call takes
    longer than the numbers of one token do. For what is not contiguous, such as a tensor that stands twice in the same
    place, it has a loop of its own."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_exact_gelu(act_fn):
        return act_fn(hidden_states)
    if not _is_plain(act_fn, hidden_states) or hidden_states.numel() != hidden_states.shape[-1]:
        return act_fn(hidden_states)
    return F.gelu(hidden_states.expand(2, *hidden_states.shape)).select(0, 0)


def _compiled_row(layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    row = hidden_states.reshape(-1)
    row = row.as_strided(row.shape, row.stride())  # else inductor computes it again for each output
    return _times_row(layer.weight, layer.bias, row, hidden_states.shape)


def _times_row(weight: torch.Tensor, bias: torch.Tensor | None, row: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The outputs of a layer for one row [in], which came in this shape [..., in]."""
    out = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
    return out.view(*shape[:-1], -1)


def _is_compiled_row(layer: nn.Linear, hidden_states: torch.Tensor) -> bool:
    """Whether a graph of torch.compile has a plain layer for one row on a CPU."""
    if is_exporting() or hidden_states.device.type != "cpu":
        return False
    # Without a guard on a size that torch.compile leaves open.
    if not all(statically_known_true(size == 1) for size in hidden_states.shape[:-1]):
        return False
    if type(layer.weight) is not nn.Parameter or is_watched(layer):
        return False
    return layer.weight.dtype == hidden_states.dtype and not torch.is_autocast_enabled("cpu")


def _own_weights(layer: nn.Linear) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a layer, sooner than as its attributes; a weight of None where they are not its own."""
    own = layer._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (None, None)


def _is_exact_gelu(act_fn: nn.Module) -> bool:
    return type(act_fn) is GELUActivation and act_fn.act is F.gelu


def _is_plain(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether the input is an ordinary tensor of float32 on a CPU, which nothing casts, nobody watches the module, and
    no graph is made. Each step of decoding asks this at each layer."""
    if type(hidden_states) is not torch.Tensor or hidden_states.dtype != torch.float32 or not hidden_states.is_cpu:
        return False
    if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    return not (is_watched(module) or is_transformed())


def is_watched(module: nn.Module) -> bool:
    """Whether hooks run, or another `forward`, when a module is called."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(own) or _has_any_global_hook()


def make_linear(config, in_features: int, out_features: int, bias: bool | None = None) -> nn.Module:
    """A linear layer inside of a block, with a bias if `config.linear_bias` or the argument says so: sparse where
    `config.linear_fan_in` is less than all inputs."""
    bias = config.linear_bias if bias is None else bias
    fan_in = config.linear_fan_in
    if fan_in is None or fan_in >= in_features:
        return nn.Linear(in_features, out_features, bias=bias)
    return SparseLinear(in_features, out_features, fan_in, bias=bias)


def draw_rows(module: nn.Module, std: float) -> None:
    """Normal weights of a linear layer; with `smaller_rows` = (n, factor) the first n rows are smaller by it."""
    if not hasattr(module, "smaller_rows"):
        initialization.normal_(module.weight, mean=0.0, std=std)
        return
    rows, factor = module.smaller_rows
    weight = torch.randn_like(module.weight) * std
    weight[:rows] *= factor
    initialization.copy_(module.weight, weight)


class SparseLinear(nn.Module):
    """
    A linear layer of which every output has `fan_in` inputs: y_o = sum_j weight[o, j] x[indices[o, j]] + bias[o].

    The indices are drawn with the weights, without repetition in a row, and are saved with them, but not trained. What
    it keeps for the gradients is as large as its input.

    Args:
        in_features, out_features (`int`): the widths of input and output.
        fan_in (`int`): k, the number of inputs of each output.
        bias (`bool`): whether there is a bias.
    """

    def __init__(self, in_features: int, out_features: int, fan_in: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.fan_in = in_features, out_features, fan_in
        self.weight = nn.Parameter(torch.empty(out_features, fan_in))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("indices", torch.zeros(out_features, fan_in, dtype=torch.int32))

    def draw_weights(self, std: float):
        # Outputs are as large as those of a dense layer.
        draw_rows(self, std * (self.in_features / self.fan_in) ** 0.5)
        if self.bias is not None:
            initialization.zeros_(self.bias)
        initialization.copy_(self.indices, self._draw_indices())

    def _draw_indices(self) -> torch.Tensor:
        """[out, k] int32: any k of the inputs for each output, by Floyd's algorithm."""
        indices = torch.empty_like(self.indices)
        for place, last in enumerate(range(self.in_features - self.fan_in, self.in_features)):
            drawn = torch.randint(last + 1, (self.out_features,), dtype=indices.dtype, device=indices.device)
            taken = (indices[:, :place] == drawn[:, None]).any(1)
            indices[:, place] = drawn.masked_fill(taken, last)
        return indices

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in the dtype of the input."""
        dtype = hidden_states.dtype
        if is_transformed() or is_exporting():  # what is below has no rules there, but is faster and keeps less
            out = (hidden_states[..., self.indices] * self.weight.to(dtype)).sum(-1)
            return out if self.bias is None else out + self.bias.to(dtype)
        features = hidden_states.reshape(-1, self.in_features).T  # [in, tokens]: rows to look up, scale and add
        out = F.embedding_bag(self.indices, features, per_sample_weights=self.weight.to(dtype), mode="sum").T
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.reshape(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}"
