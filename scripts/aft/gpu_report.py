# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The page of `scripts/gpu.py`: which goals are met, by the CSV files of its folder alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from aft.atomic_files import write_whole
from aft.benchmark_rows import LAYOUT_COLUMNS, REGISTER_COLUMNS, STEP_COLUMNS, read_rows
from aft.gpu_plan import AFT_MODELS, CONTEXT, LENGTHS, Step


STEPS_FILE, PAGE = "gpu-steps.csv", "README.md"
SUITES = ("ceiling", "forward", "operator", "train", "decode")
# Parts of the bandwidth of copies, for the forward pass and for both, and of the speed of matrix products.
BANDWIDTH = {"aft-simple": (0.8, 0.7), "aft-local-32": (0.6, 0.6), "aft-conv-32-32": (0.6, 0.6)}
PRODUCTS, LONGEST_FULL = 0.5, 16384  # beyond that T, AFT-full's table would be too large
AGAINST_GPT2 = (1.3, 3, 8)  # at each of LENGTHS
AGAINST_FLA = 1.0
AGAINST_LLAMA = 10


class Result(NamedTuple):
    """A goal, the figure that was measured (None: it was not), and what else is to be said of it."""

    what: str
    figure: float | None
    goal: float
    percent: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        return "not measured" if self.figure is None else "met" if self.figure >= self.goal else "**not met**"

    def cells(self) -> tuple[str, str, str, str]:
        """What, figure, goal and verdict, as the page has them."""
        figure, goal = (
            "" if value is None else f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"
            for value in (self.figure, self.goal)
        )
        return self.what, f"{figure} {self.note}".strip(), goal, self.verdict


def numbers_moved(contestant: str, tokens: int, width: int) -> tuple[int, int]:
    """
    Numbers that the kernels of a windowed form cannot do without, in the forward pass and in both: q, k, v and y, and
    k again for its largest; then q, k, v, the gradient of y, and three gradients.
    """
    channels = tokens * width
    keys = int(contestant.split("-")[2]) * tokens if contestant.startswith("aft-conv-") else channels
    forward = 3 * channels + 2 * keys
    return forward, forward + 5 * channels + 2 * keys


def causal_operations(tokens: int, length: int, width: int) -> tuple[int, int]:
    """Floating-point operations of AFT-full, in the forward pass and in both: two products over all pairs of a query
    and a key that is no later, and two gradients of each."""
    forward = 2 * 2 * tokens * width * (length + 1) // 2
    return forward, 3 * forward


def operator_results(tables: dict[str, list[dict]], lengths: Iterable[int]) -> list[Result]:
    """Of the operators, beside what the suite ceiling has measured."""
    ceiling = {row["contestant"]: float(row["rate"]) * 1e9 for row in tables["ceiling"]}
    copy = ceiling.get("copy")
    product = max((rate for name, rate in ceiling.items() if name.startswith("matmul-")), default=None)
    results = []
    for index, (suite, passes) in enumerate({"forward": "forward", "operator": "forward + backward"}.items()):
        for name, goals in {**BANDWIDTH, "aft-full": (PRODUCTS, PRODUCTS)}.items():
            for length in lengths:
                row = find(tables[suite], name, length)
                full, figure = name == "aft-full", None
                if full and length > LONGEST_FULL:
                    continue
                if row is not None and (product if full else copy):
                    tokens, width = int(row["batch_size"]) * length, int(row["width"])
                    if full:
                        figure = causal_operations(tokens, length, width)[index] / float(row["p50"]) / product
                    else:
                        moved = 2 * numbers_moved(name, tokens, width)[index]  # bytes of bfloat16
                        figure = moved / float(row["p50"]) / copy
                of = "bf16 matrix rate" if full else "copy bandwidth"
                what = f"{name}, {passes}, T = {length:,}, of the {of}"
                results.append(Result(what, figure, goals[index], percent=True))
    return results


def find(rows: list[dict], contestant: str, length: int) -> dict | None:
    """The row of a contestant, compiled if there is such a one."""
    found = {row["contestant"]: row for row in rows if int(row["length"]) == length}
    return found.get(f"{contestant}-compiled", found.get(contestant))


def train_results(tables: dict[str, list[dict]], lengths: Iterable[int]) -> list[Result]:
    """Of training steps."""
    results = []
    for length, goal in zip(lengths, AGAINST_GPT2, strict=True):
        rows = tables["train"]
        gpt2 = find(rows, "gpt2", length)
        of_fla = [row for row in rows if "-fla" in row["contestant"] and int(row["length"]) == length]
        fla = min(of_fla, key=lambda row: float(row["p50"]), default=None)
        for name in AFT_MODELS:
            ours = find(rows, name, length)
            for other, least, title in ((gpt2, goal, "GPT-2"), (fla, AGAINST_FLA, "fla's fastest")):
                figure, note = None, ""
                if ours is not None and other is not None:
                    figure = float(other["p50"]) / float(ours["p50"])
                    note = f"({other['contestant']})" if other is fla else ""
                what = f"{name}, training step against {title}, T = {length:,}"
                results.append(Result(what, figure, least, note=note))
    return results


def decode_results(tables: dict[str, list[dict]], context: int) -> list[Result]:
    """Of decoding with the largest batch of each model."""

    def fastest(name):
        names = {f"{name}{kind}" for kind in ("", "-static", "-compiled")}
        rows = [row for row in tables["decode"] if row["contestant"] in names and int(row["length"]) == context]
        return max(rows, key=lambda row: float(row["rate"]), default=None)

    llama, results = fastest("llama"), []
    for name in AFT_MODELS:
        ours, figure, note = fastest(name), None, ""
        if ours is not None and llama is not None:
            figure = float(ours["rate"]) / float(llama["rate"])
            note = f"(batches of {int(ours['batch_size']):,} and {int(llama['batch_size']):,})"
        results.append(
            Result(f"{name}, decoding against Llama, context {context:,}", figure, AGAINST_LLAMA, note=note)
        )
    return results


def table_of(header: Iterable[str], rows: Iterable[Iterable]) -> list[str]:
    """The lines of a table in Markdown."""
    header = list(header)
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


def write_page(folder: Path, device: str, plan: list[Step], command: str) -> Path:
    """
    Writes the page from the CSV files of a folder: those of the processor that its steps last ran on.

    Args:
        plan: all steps, of which those that have not run are said.
        command: how the page is made.

    Returns:
        The path of the page.
    """
    steps = {(row["part"], row["step"]): row for row in read_rows(folder / STEPS_FILE, STEP_COLUMNS)}
    processor = next((row["processor"] for row in reversed(steps.values())), "an unknown processor")
    tables = {suite: read_rows(folder / f"{suite}-{device}.csv") for suite in SUITES}
    tables = {suite: [row for row in rows if row["processor"] == processor] for suite, rows in tables.items()}
    results = operator_results(tables, LENGTHS[device])
    results += train_results(tables, LENGTHS[device])
    results += decode_results(tables, CONTEXT[device])
    rows = [row for table in tables.values() for row in table]
    versions = [f"{name} {', '.join(sorted({row[name] for row in rows}))}" for name in ("torch", "transformers")]
    dates = ", ".join(sorted({row["date"] for row in rows}))
    verdicts = [result.verdict for result in results]
    measured = len(verdicts) - verdicts.count("not measured")
    lines = [
        "# On a GPU" if device == "cuda" else "# A dry run on a CPU",
        "",
        f"`{command}` wrote this page, from the CSV files beside it.",
        "",
        f"{processor}; {', '.join(versions)}; {dates}." if rows else f"{processor}; nothing is measured yet.",
        *(
            ["", "All sizes are tiny: these figures try the way to the page, and say nothing else."]
            * (device == "cpu")
        ),
        "",
        f"Of {len(verdicts)} goals {verdicts.count('met')} are met, {measured - verdicts.count('met')} are not, and "
        f"{verdicts.count('not measured')} are not measured.",
        "",
        *table_of(("what", "figure", "goal", ""), (result.cells() for result in results)),
        "",
        "Bytes are those that no kernel could do without, at the speed of the copies that were measured here. Of "
        "AFT-full, pairs of a query and a later key do not count. Against another model stands how many times as fast "
        "a model is. Times are medians.",
        "",
        "## What ran",
        "",
        *table_of(("part", "step", "", "seconds", "last line", "command"), (step_cells(step, steps) for step in plan)),
        *kernel_lines(folder),
        *layout_lines(folder),
    ]
    for path in sorted(folder.glob(f"*-{device}*.svg")):
        lines += ["", f"![{path.stem}]({path.name})"]
    write_whole(folder / PAGE, "\n".join(lines) + "\n")
    return folder / PAGE


def step_cells(step: Step, rows: dict) -> tuple:
    row = rows.get((step.part, step.name))
    if row is None:
        return step.part, step.name, "has not run", "", "", ""
    last = row["last_lines"].splitlines()[-1:]
    return step.part, step.name, row["status"], row["seconds"], " ".join(last), f"`{row['command']}`"


def kernel_lines(folder: Path) -> list[str]:
    """What the main kernels take of a multiprocessor."""
    rows = read_rows(folder / "triton-registers.csv", REGISTER_COLUMNS)
    rows = [row for row in rows if row["kernel"] in ("_forward", "_backward")]
    if not rows:
        return []
    names = ("form", "dtype", "kernel", "columns", "num_warps", "registers", "spill_stores", "shared_bytes")
    return [
        *("", "## The main kernels", "", f"Compiled for {rows[0]['architecture']} by Triton {rows[0]['triton']}.", ""),
        *table_of((name.replace("_", " ") for name in names), ([row[name] for name in names] for row in rows)),
    ]


def layout_lines(folder: Path) -> list[str]:
    """How many layouts were timed, and the fastest."""
    rows = read_rows(folder / "triton-layouts.csv", LAYOUT_COLUMNS)
    if not rows:
        return []
    missing = sum(not row["forward_ms"] for row in rows)
    lines = ["", "## Layouts", "", f"Of {len(rows)} forms and layouts at a size, {missing} were not timed.", ""]
    names = ("form", "batch_size", "length", "columns", "num_warps", "processor_warps")
    best = {}
    for direction in ("forward", "backward"):
        for row in rows:
            case = row["form"], int(row["length"]), direction
            if row[f"{direction}_ms"] and float(row[f"{direction}_ms"]) < best.get(case, ([], float("inf")))[1]:
                cells = [direction, *(row[name] for name in names), row[f"{direction}_ms"]]
                cells += [row[f"{direction}_registers"], row[f"{direction}_spills"]]
                best[case] = cells, float(row[f"{direction}_ms"])
    header = ("fastest", *(name.replace("_", " ") for name in names), "ms", "registers", "spilled words")
    return [*lines, *table_of(header, (cells for cells, _ in best.values()))]
