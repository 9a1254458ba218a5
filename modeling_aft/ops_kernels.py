# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Tables of kernels: which code runs is decided here, by what each kernel says of itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """
    One way to compute an operator.

    Attributes:
        name: by which it can be asked for.
        scope: what it is for, as its errors say it.
        supports: whether it gives the result of a call, where it is called, correctly.
        run: takes a call and gives that result.
        pays: whether it should be taken for a call that it supports, where nobody has asked for it.
    """

    name: str
    scope: str
    supports: Callable[[Any], bool]
    run: Callable[[Any], Any]
    pays: Callable[[Any], bool] = lambda call: True


def choose(tables: dict[str, Sequence[Kernel]], call, backend: str = "auto") -> Kernel:
    """
    The first kernel of a table that supports the call and pays, or the kernel of that name.

    Args:
        tables: by their names, of which "auto" holds all kernels.
        call: what is asked.
        backend: the name of a table or of a kernel.

    Raises:
        ValueError: there is none of that name, or it does not support the call.
    """
    for kernel in tables.get(backend, ()):
        if kernel.supports(call) and kernel.pays(call):
            return kernel
    for kernel in tables["auto"]:
        if kernel.name == backend:
            if not kernel.supports(call):
                raise ValueError(f"`backend` must be one that supports the call: {backend!r} is for {kernel.scope}.")
            return kernel
    names = ", ".join([*tables, *(kernel.name for kernel in tables["auto"])])
    raise ValueError(f"`backend` must be one of {names}, got {backend!r}.")
