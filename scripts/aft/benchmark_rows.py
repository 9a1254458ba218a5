# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The files that `benchmark.py` writes, a row per contestant and length, and the columns of those for GPUs."""

import csv
from pathlib import Path

from aft.atomic_files import write_rows


KEY = ("contestant", "length", "batch_size", "dtype", "layers", "width")
COLUMNS = (
    *("suite", "contestant", "length", "turns", "p20", "p50", "p80", "rate", "unit", "peak_bytes"),
    *("layers", "width", "parameters", "device", "processor", "threads", "dtype", "batch_size"),
    *("modeling_aft", "torch", "transformers", "date"),
)
# Of what the Triton kernels take of a multiprocessor, of what they take in each layout, and of the steps of gpu.py.
REGISTER_COLUMNS = (
    *("form", "dtype", "columns", "kernel", "num_warps", "registers", "spill_stores", "spill_loads", "shared_bytes"),
    *("architecture", "triton", "date"),
)
LAYOUT_COLUMNS = (
    *("form", "rows", "columns", "depth", "num_warps", "num_stages", "processor_warps"),
    *("forward_ms", "backward_ms", "forward_launch_ms", "backward_launch_ms"),
    *("forward_registers", "backward_registers", "forward_spills", "backward_spills"),
    *("batch_size", "length", "width", "heads", "window"),
    *("dtype", "architecture", "processor", "torch", "triton", "date"),
)
STEP_COLUMNS = ("part", "step", "status", "seconds", "device", "processor", "date", "command", "last_lines")


def read_rows(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """The rows of a file, none if there is no such file.

    Raises:
        ValueError: if it has other columns than those that are written now.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"{path} must have the columns {', '.join(columns)}, got {reader.fieldnames}: remove it.")
        return list(reader)


def add_rows(path: Path, rows: list[dict]) -> None:
    """Puts rows in the place of those of the same key, by length; the file is replaced when all of it is there."""

    def key(row):
        return tuple(str(row.get(column, "")) for column in KEY)

    new = {key(row) for row in rows}
    rows = sorted([row for row in read_rows(path) if key(row) not in new] + rows, key=lambda row: int(row["length"]))
    write_rows(path, COLUMNS, rows)
