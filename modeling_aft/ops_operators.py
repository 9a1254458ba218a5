# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Operators of one's own: how they are registered, differentiated and counted."""

import re
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula


@contextmanager
def autograd_inside_operator():
    """Records gradients inside of an operator's body, where autograd is off."""
    exclude, keys = torch._C._dispatch_tls_local_exclude_set(), torch._C.DispatchKey
    for key in (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield


def gradients_inside_operator(function, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function(*inputs)`, 0 where there is none, inside of an operator's body."""
    with autograd_inside_operator():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        grads = torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))


def operator_namespace(module: str) -> str:
    """Remote code may load a file under several module names in one process: each gets its own operators. Their names
    are ASCII, those of modules need not be."""
    return re.sub(r"[^a-zA-Z0-9_.]", lambda found: f"_{ord(found[0]):x}_", module).replace(".", "_")


def operator(name: str):
    """Registers a function as an operator. It runs in full precision under autocast, and, as it reads data, outside of
    CUDA graphs."""

    def register(function):
        @wraps(function)
        def in_full_precision(*args, **kwargs):
            with torch.autocast(args[0].device.type, enabled=False):
                return function(*args, **kwargs)

        registered = torch.library.custom_op(
            f"{operator_namespace(__name__)}::{name}",
            in_full_precision,
            mutates_args=(),
            tags=(torch.Tag.cudagraph_unsafe,),
        )
        registered.plain = function
        return registered

    return register


def flops_of(operator):
    """Registers how many operations an operator takes, a function of its arguments, for torch.utils.flop_counter: that
    cannot look into it. As of torch's own operators those of matrix products are counted, 2 for a multiplication with
    its addition, but not what inputs of extreme size need beside."""

    def register(function):
        packet = operator._opoverload.overloadpacket
        flop_registry.pop(packet, None)  # that of the same file, loaded before
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val, **kwargs: function(*args, **kwargs))
        return function

    return register


def differentiable_gradients(function, inputs, constants, grad) -> tuple[Tensor | None, ...]:
    """The gradients of `function(*inputs, *constants)`, of one tensor or of several, of which a gradient can be
    taken."""
    required = [tensor is not None and tensor.requires_grad for tensor in inputs]
    needed = [tensor for tensor, wanted in zip(inputs, required, strict=True) if wanted]
    grads = iter(
        torch.autograd.grad(function(*inputs, *constants), needed, grad, create_graph=True, allow_unused=True)
    )
    return tuple(next(grads) if wanted else None for wanted in required)
