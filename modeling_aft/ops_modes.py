# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What torch is doing at the moment, which decides what code may look at: exporting, compiling, transforming."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_exporting() -> bool:
    """Whether torch.export or torch.jit.trace is at work. Under torch.compile, torch 2.11 says so too; the flag behind
    it is right."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() if flag is None else flag)


def is_static() -> bool:
    """Whether a graph is being made, by torch.compile, torch.export, torch.jit.trace or the capture of a CUDA graph:
    what a tensor holds must then decide nothing."""
    if torch.compiler.is_compiling() or is_exporting():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Whether torch.func is at work (grad, vmap, jvp, ...), or forward-mode differentiation: operators of this package
    have no rules for those."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.func.vmap has hidden a dimension of the tensor, so that nobody can look at its numbers."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def can_read(tensor: Tensor) -> bool:
    """Whether Python may look at what a tensor holds."""
    return not is_static() and tensor.device.type != "meta" and not is_batched(tensor)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Turns autocast off for the device of a tensor: sums of exponentials are not for half precision, and autocast
    refuses to put together tensors of some types."""
    device = tensor.device.type
    under_autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if under_autocast else nullcontext()


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on the devices of Apple, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def leading(table: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` places of `table` along `dim`: a view, or in an exported program a copy, because the strides
    of a view would depend on whether all of the table is used."""
    if is_exporting():
        return table.index_select(dim, torch.arange(length, device=table.device))
    if not torch.is_grad_enabled():  # a view of a parameter would still say that it needs a gradient
        table = table.detach()
    return table[(slice(None),) * dim + (slice(length),)]
