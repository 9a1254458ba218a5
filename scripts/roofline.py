# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Sets what the operators take beside what they cannot do without, from the rows of the suites operator and ceiling.

    python scripts/roofline.py               # writes benchmarks/roofline-cpu.csv
    python scripts/roofline.py --device cuda

The floor of a pass forward and backward is the sum of three times, each at the speed that the suite ceiling has
measured: the products of matrices that the algorithm consists of, its exponentials, and reading every input and
writing every result once. What is spent beyond is found by the profiler, on a CPU: how much of one pass goes into
products, exponentials, copies, and all other operations, and how much passes outside of any.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from aft.atomic_files import write_rows
from aft.benchmark_contestants import operator_contestants
from aft.benchmark_rows import read_rows
from aft.console import any_text, run_program
from modeling_aft import ops_cpu


PRODUCTS = dict.fromkeys(("bmm", "baddbmm", "baddbmm_", "mm"), "products")
KINDS = {**PRODUCTS, "exp": "exponentials", "exp_": "exponentials"}
KINDS |= {"copy_": "copies", "cat": "copies"}
SHARES = ("products", "exponentials", "copies", "other_operations", "outside")


def counts(contestant: str, batch: int, length: int, width: int) -> tuple[float, float, float]:
    """Floating-point operations, exponentials, and numbers moved, of one pass forward and backward.

    A windowed form multiplies, for each of C queries, C + s - 1 weights with two columns per channel, in the forward
    pass, for the gradients of keys and values, and with a window once more for those of the bias. AFT-full does so for
    half of all pairs. Moved are q, k, v, y and the two sums of each channel forward; those, the gradient of y, and
    three gradients backward.
    """
    channels = batch * length * width
    form, *sizes = contestant.removeprefix("aft-").split("-")
    if form == "full":
        pairs = length / 2
        return 3 * 4 * pairs * channels, 2 * (channels + length**2 / 2), 16 * channels + 4 * length**2
    window = int(sizes[-1]) if sizes else 1
    keys = int(sizes[0]) * batch * length if form == "conv" else channels
    values_and_keys = channels + keys
    pairs = ops_cpu._CHUNK + window - 1
    products = (2 + (window > 1)) * 2 * pairs * values_and_keys
    forward = 3 * channels + keys + values_and_keys
    return products, 2 * keys, forward + values_and_keys + 5 * channels + 2 * keys


def shares(run) -> dict[str, float]:
    """The part of a pass that each kind of operation takes by itself."""
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            run()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    elapsed = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    spent = Counter()
    for event in events:
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::"):
            spent[KINDS.get(name, "other_operations")] += event.self_cpu_time_total
    spent["outside"] = elapsed - sum(spent.values())
    return {kind: round(spent[kind] / elapsed, 3) for kind in SHARES}


def rooflines(folder: Path, device: str) -> list[dict]:
    """
    A row per AFT operator and length of operator-<device>.csv.

    Raises:
        ValueError: that file, or ceiling-<device>.csv, is not in the folder, or has not the rows that are needed.
    """
    measured = [row for row in read_rows(folder / f"operator-{device}.csv") if row["contestant"].startswith("aft-")]
    ceiling = {row["contestant"]: float(row["rate"]) * 1e9 for row in read_rows(folder / f"ceiling-{device}.csv")}
    if not measured or not {"bmm-64x96x512", "exp-in-cache", "copy"} <= ceiling.keys():
        raise ValueError(
            f"--output_dir must hold operator-{device}.csv and ceiling-{device}.csv, each with the rows that "
            f"benchmark.py writes, got {folder}"
        )
    product, exponential, copy = (ceiling[name] for name in ("bmm-64x96x512", "exp-in-cache", "copy"))
    rows = []
    names = [row["contestant"].split("-") for row in measured]
    window = next((int(name[-1]) for name in names if name[1] in ("local", "conv")), 1)
    conv_heads = next((int(name[2]) for name in names if name[1] == "conv"), 1)
    sizes = {"window": window, "conv_heads": conv_heads, "heads": 1}
    for row in measured:
        name, batch, length, width = row["contestant"], int(row["batch_size"]), int(row["length"]), int(row["width"])
        operations, exponentials, numbers = counts(name, batch, length, width)
        size = 2 if row["dtype"] == "bfloat16" else 4
        times = operations / product, exponentials / exponential, numbers * size / copy
        floor = sum(times)
        rows.append(
            {
                **{"contestant": name, "length": length, "batch_size": batch, "width": width},
                **{"gflop": f"{operations / 1e9:.4g}", "mexp": f"{exponentials / 1e6:.4g}"},
                **{"mbytes": f"{numbers * size / 1e6:.4g}", "products_ms": f"{times[0] * 1e3:.4g}"},
                **{"exponentials_ms": f"{times[1] * 1e3:.4g}", "bytes_ms": f"{times[2] * 1e3:.4g}"},
                **{"floor_ms": f"{floor * 1e3:.4g}", "measured_ms": f"{float(row['p50']) * 1e3:.4g}"},
                "floor_of_measured": f"{floor / float(row['p50']):.3f}",
            }
        )
        if device == "cpu":
            args = argparse.Namespace(device=device, dtype="float32", width=width, **sizes)
            rows[-1] |= shares(operator_contestants(args, batch, length)[name]().run)
    return rows


@any_text()
def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose rows to read")
    parser.add_argument("--output_dir", default="benchmarks", help="folder of the csv files")
    args = parser.parse_args(argv)
    if not args.output_dir:
        raise ValueError("roofline.py: --output_dir must be a path, got ''")
    folder = Path(args.output_dir)
    torch.manual_seed(0)
    rows = rooflines(folder, args.device)
    path = folder / f"roofline-{args.device}.csv"
    write_rows(path, rows[0], rows)
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    return path


if __name__ == "__main__":
    run_program(main)
