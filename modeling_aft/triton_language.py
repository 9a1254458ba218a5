# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the Triton kernels of several files share: records and functions of theirs, and what is known of a GPU."""

from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_state import compute_dtype
from .triton_layouts import LAYOUTS


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)


INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # decided when triton is imported
TINY = {torch.float32: 1e-25, torch.float64: 1e-250}  # denominators below are computed again in log space
LARGEST = {torch.float32: 1e30, torch.float64: 1e250}  # of the gradients of a row outside of log space
TRITON_DTYPE = triton and {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def triton_can_run(device: torch.device) -> bool:
    """Whether triton is there, and the device one that the kernels have code for: an NVIDIA GPU, or a CPU for its
    interpreter."""
    return triton is not None and (INTERPRETED or (device.type == "cuda" and torch.version.hip is None))


def jit(function):
    """A function of kernels; where triton is not there, one that nobody calls."""
    return function if triton is None else triton.jit(function)


class Matrix(NamedTuple):
    """
    A tensor [batches, rows, channels], its channels side by side: what a kernel needs to know of it.

    Attributes:
        start: the tensor; in a kernel, the address of its first element.
        batch, row: how many elements lie between two batches, and between two rows.
    """

    start: Any
    batch: int
    row: int


class Columns(NamedTuple):
    """The row of the batch and the channel of each column of a tile, and whether there is one."""

    batch: Any
    channel: Any
    exists: Any


@jit
def finite(maximum):
    """Replaces the maximum of nothing (minus infinity), so that differences with it stay numbers."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@jit
def exp(x, C: tl.constexpr):
    """C says in FAST whether the processor's own approximation will do."""
    if C.FAST:  # without the care of numbers below 1e-38, which costs three times as many instructions
        x *= 1.4426950408889634
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@jit
def inverse(x, C: tl.constexpr):
    """1 / x, see `exp`."""
    if C.FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1 / x


@jit
def contiguous(pointer, rows, width):
    """A contiguous tensor [., rows, width]."""
    return Matrix(pointer, tl.cast(rows, tl.int64) * width, width)


@jit
def least_denominator(reference, C: tl.constexpr):
    """The least that does without log space, by the largest key: any where there are no keys."""
    return tl.where(reference > float("-inf"), C.TINY, -1.0).to(C.DTYPE)


def on_its_device(function: Callable) -> Callable:
    """Runs a function with the GPU of its first argument as the current one, on which Triton launches kernels."""

    @wraps(function)
    def run(first, *others, **options):
        with torch.cuda.device_of(first):
            return function(first, *others, **options)

    return run


def matrix(tensor: Tensor) -> Matrix:
    """The record of a tensor, for a kernel."""
    return Matrix(tensor, tensor.stride(0), tensor.stride(1))


def ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least one that is not below the number."""
    return 1 << (number - 1).bit_length()


def factor_dtype(*inputs: Tensor) -> torch.dtype:
    """What the factors of matrix products are rounded to. Those of float16 need more exponents than it has, and the
    interpreter multiplies the bits of bfloat16."""
    narrow = all(t.dtype == torch.bfloat16 for t in inputs) and not INTERPRETED
    return torch.bfloat16 if narrow else compute_dtype(*inputs)


def is_half(*inputs: Tensor) -> bool:
    return all(t.dtype in (torch.float16, torch.bfloat16) for t in inputs)


def numerics(*inputs: Tensor) -> dict[str, Any]:
    """
    What kernels are compiled for, by the dtypes of their inputs.

    DTYPE, TINY, LARGEST: of the computation, and the bounds beyond which it is done in log space. FACTOR, PRECISION:
    what the factors of matrix products are rounded to, and how they are multiplied. FAST: whether the processor's own
    approximations of exp(x) and 1 / x, in float32, will do.
    """
    dtype = compute_dtype(*inputs)
    return {
        "DTYPE": TRITON_DTYPE[dtype],
        "TINY": TINY[dtype],
        "LARGEST": LARGEST[dtype],
        "FACTOR": TRITON_DTYPE[factor_dtype(*inputs)],
        "PRECISION": "tf32" if is_half(*inputs) else "ieee" if dtype == torch.float64 else "tf32x3",
        "FAST": dtype == torch.float32 and not INTERPRETED,
    }


@cache
def processor(device: torch.device) -> tuple[str, int]:
    """What the layouts call a GPU, and how many multiprocessors it has."""
    if device.type != "cuda":
        return "default", 0
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def layout_of(form: str, direction: str, device: torch.device) -> dict[str, int]:
    """The layout of a GPU that was measured, else the default."""
    measured = LAYOUTS.get(processor(device)[0], {}).get(form, {}).get(direction)
    return measured or LAYOUTS["default"][form][direction]
