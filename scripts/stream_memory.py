# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Shows what `aft pretrain --streaming` needs of memory: writes a file of documents as large as asked for, reads all of
it as training would, and notes the memory of the process, and the bytes read in a second, on the way.

    python scripts/stream_memory.py --gigabytes 10 --csv benchmarks/stream-memory.csv
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from accelerate import Accelerator
from datasets import disable_progress_bars

from aft.atomic_files import write_rows
from aft.console import any_text, run_program
from aft.flags import FlagParser
from aft.machine import processor_name
from aft.raw_files import pydoc_bytes
from aft.streamed_windows import StreamedWindows
from aft.text_arguments import TextArguments, complete_text_arguments
from aft.text_sources import load_text
from aft.vocabulary import ByteVocabulary


COLUMNS = ("gigabytes_read", "resident_megabytes", "megabytes_per_second", "processor")


def write_documents(path: Path, num_bytes: int) -> None:
    """A table of so many bytes, whose rows are parts of Python's documentation."""
    text = pydoc_bytes().decode()
    starts = np.random.default_rng(0).integers(0, len(text) - 10_000, 20_000)
    lines = [json.dumps({"text": text[start : start + 5000]}) + "\n" for start in starts[:2000]]
    block = "".join(lines).encode()
    with open(path, "wb") as file:
        while file.tell() < num_bytes:
            file.write(block)


def read_stream(path: Path, cache_dir: Path, num_bytes: int) -> list[dict]:
    """Reads windows of documents of a file until they are as many bytes; a row for each tenth of them."""
    argv = ["--dataset", str(path), "--streaming", "--cache_dir", str(cache_dir)]
    args = FlagParser("stream_memory", "", (TextArguments,)).parse_args(argv)
    complete_text_arguments(args)
    sizes = SimpleNamespace(length=1024, batch_size=64, micro_batch_size=64)
    windows = StreamedWindows(
        load_text(args),
        ByteVocabulary(),
        **vars(sizes),
        seed=0,
        shuffle_buffer=1000,
        accelerator=Accelerator(cpu=True),
    )
    process, rows, step, started = psutil.Process(), [], 0, time.perf_counter()
    per_step = sizes.length * sizes.batch_size
    for mark in np.linspace(num_bytes / 10, num_bytes, 10):
        while step * per_step < mark:
            windows.batch(step, range(sizes.batch_size))
            step += 1
        done = step * per_step
        row = (done / 1e9, process.memory_info().rss / 1e6, done / 1e6 / (time.perf_counter() - started))
        rows.append(dict(zip(COLUMNS, (*(round(value, 2) for value in row), processor_name("cpu")), strict=True)))
        print("{:.2f} GB read, {:.0f} MB of memory, {:.1f} MB a second".format(*row), flush=True)
    return rows


@any_text()
def main(argv: list[str] | None = None) -> list[dict]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the rows.

    Raises:
        ValueError: a flag is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the file, 10^9 bytes each (default: 1)")
    parser.add_argument("--csv", type=Path, help="file for the rows")
    args = parser.parse_args(argv)
    if not 0 < args.gigabytes <= 1000:
        raise ValueError(f"--gigabytes must be in (0, 1000], got {args.gigabytes}")
    if args.csv is not None and args.csv.suffix != ".csv":
        raise ValueError(f"--csv must be a .csv file, got {args.csv}")
    disable_progress_bars()
    num_bytes = int(args.gigabytes * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        write_documents(path, int(num_bytes * 1.06))  # with the quotes and escapes of JSON
        rows = read_stream(path, Path(folder) / "cache", num_bytes)
    if args.csv is not None:
        write_rows(args.csv, COLUMNS, rows)
    return rows


if __name__ == "__main__":
    run_program(main)
