# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Triton kernels one by one: what runs them, compiles them for a GPU that need not be there, and lays them out."""

import ast
import contextlib
import io
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from aft.atomic_files import write_whole
from modeling_aft import ops_triton, ops_triton_full, triton_language, triton_layouts
from modeling_aft.ops_state import nothing


# Forms of AFT, and what the layouts call them.
FORMS = {"simple": "simple", "local": "windowed", "conv": "windowed", "full": "full"}
DIRECTIONS = ("forward", "backward")
LAYOUT_FIELDS = ("rows", "columns", "depth", "num_warps", "num_stages", "processor_warps")
H100 = "sm_90", 132  # its compute capability, and its multiprocessors
START = "LAYOUTS = "  # of the table, which is the last in its file


class Sizes(NamedTuple):
    """Of the inputs of an operator: [batch_size, length, width], heads of AFT-conv, and the window size."""

    batch_size: int
    length: int
    width: int
    heads: int
    window: int


def make_passes(form: str, sizes: Sizes, dtype: torch.dtype, device: str) -> tuple[Callable, Callable]:
    """The forward and the backward pass of an operator in `dtype`, as functions without arguments. Runs the first."""
    batch, length, width, heads, window = sizes
    torch.manual_seed(0)
    query, value, grad = (torch.randn(batch, length, width, device=device, dtype=dtype) for _ in range(3))
    if form == "full":
        inputs = query, value, torch.randn(1, length, length, device=device)  # the query as the key
        saved = ops_triton_full._full(*inputs, True)
        return (
            lambda: ops_triton_full._full(*inputs, True),
            lambda: ops_triton_full._full_backward(grad, *inputs, *saved, True, True),
        )
    key = torch.randn(batch, length, heads if form == "conv" else width, device=device, dtype=dtype)
    shape = {"simple": None, "local": (1, 1, length, window), "conv": (heads, 1, 1, window)}[form]
    rows = None if shape is None else torch.randn(*shape, device=device)
    initial = torch.stack([sums.expand_as(value[:, 0]) for sums in nothing(value, value, torch.float32)], 1)
    inputs = query, key, value, rows, initial, None

    def forward():
        return ops_triton._windowed(*inputs, "sigmoid")

    _, *saved = forward()

    def backward():
        return ops_triton._windowed_backward(grad, *inputs, *saved, "sigmoid", rows is not None, False)

    return forward, backward


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute has another value while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def laid_out(layout: dict[str, int]) -> Iterator[None]:
    """All kernels have this layout while the block runs."""
    with contextlib.ExitStack() as stack:
        for module in (ops_triton, ops_triton_full):
            stack.enter_context(replaced(module, "layout_of", lambda *_: layout))
        yield


@contextlib.contextmanager
def noting_kernels(runs: bool) -> Iterator[dict[str, object]]:
    """Gives the compiled kernels that are called in the block, by name. They run, or are compiled alone."""
    import triton

    run, kernels = triton.JITFunction.run, {}

    def noted(kernel, *arguments, grid, warmup, **options):
        name = kernel.__name__
        kernels[name] = run(kernel, *arguments, grid=grid, warmup=warmup or not runs, **options)
        return kernels[name]

    with replaced(triton.JITFunction, "run", noted):
        yield kernels


class _Driver:
    """As much of the driver of a GPU as the compiler asks for. Each has kernels of its own."""

    def __init__(self, architecture: str):
        self.capability = int(architecture.removeprefix("sm_"))

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(architecture: str, processors: int) -> Iterator[dict[str, object]]:
    """
    Kernels that are called in the block, with tensors of the CPU, are compiled anew for a GPU of so many
    multiprocessors, and do not run. Gives them by name; each has what its assembler said as `log`.
    """
    import triton

    def logged(kernel, *arguments, **options):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            compiled = run(kernel, *arguments, **options)
        if printed.getvalue():  # else it was compiled before
            compiled.log = printed.getvalue()
        return compiled

    with contextlib.ExitStack() as stack:
        run = triton.JITFunction.run
        for scope in (triton.knobs.cache, triton.knobs.nvidia):
            stack.enter_context(scope.scope())
        triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())  # what is read there has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        stack.enter_context(replaced(triton.runtime.driver, "_active", _Driver(architecture)))
        for module in (triton_language, ops_triton, ops_triton_full):
            stack.enter_context(replaced(module, "processor", lambda device: (architecture, processors)))
        stack.enter_context(replaced(triton.JITFunction, "run", logged))
        yield stack.enter_context(noting_kernels(runs=False))


def resources(kernel: object) -> dict[str, int]:
    """
    What `compiling_for` has found that a kernel takes of a multiprocessor: registers of a thread, bytes that a thread
    writes and reads because it has too few of them, and bytes of shared memory.
    """
    columns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    found = {name: int(re.search(pattern, kernel.log)[1]) for name, pattern in columns.items()}
    return {**found, "shared_bytes": kernel.metadata.shared}


# ---------------------------------------------------------------------------------------------------------- layouts


def best_layouts(rows: list[dict]) -> dict[str, dict]:
    """
    The table of the layouts that take the least time, as tune_triton.py has measured them.

    Args:
        rows: a row for each form, layout and size of the inputs; without times if there was no time to measure it.

    Returns:
        By architecture, form and direction; of a form that was measured in no layout at all sizes, there is none.
    """
    times = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        layout = tuple((name, int(row[name])) for name in LAYOUT_FIELDS if row.get(name))
        case = tuple(row[name] for name in ("form", *Sizes._fields, "dtype"))
        for direction in DIRECTIONS:
            milliseconds = row.get(f"{direction}_ms")
            times[row["architecture"], FORMS[row["form"]], direction][layout][case] = float(milliseconds or "inf")
    found = {}
    for (architecture, form, direction), by_layout in times.items():
        cases = dict.fromkeys(case for measured in by_layout.values() for case in measured)
        best = {case: min(measured.get(case, float("inf")) for measured in by_layout.values()) for case in cases}
        # Cases count alike, however long they take.
        scores = {
            layout: sum(measured.get(case, float("inf")) / best[case] for case in cases)
            for layout, measured in by_layout.items()
        }
        layout = min(scores, key=scores.get)
        if scores[layout] < float("inf"):
            found.setdefault(architecture, {}).setdefault(form, {})[direction] = dict(layout)
    return found


def add_layouts(path: Path, layouts: dict[str, dict]) -> None:
    """Puts entries into the table of a file like modeling_aft/triton_layouts.py; other forms and GPUs keep theirs."""
    head, start, source = path.read_text(encoding="utf-8").partition(START)
    table = ast.literal_eval(source)
    for architecture, forms in layouts.items():
        table[architecture] = {**table.get(architecture, {}), **forms}
    write_whole(path, head + start + _as_source(table) + "\n")
    triton_layouts.LAYOUTS.update(table)


def _as_source(table: dict, depth: int = 0) -> str:
    """A dict as the formatter writes it, the innermost ones in a line."""
    if not any(isinstance(value, dict) for value in table.values()):
        return json.dumps(table)
    space = " " * 4 * depth
    entries = "".join(f'{space}    "{key}": {_as_source(value, depth + 1)},\n' for key, value in table.items())
    return f"{{\n{entries}{space}}}"
