# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures of what `benchmark.py` has written: one svg per csv file, one panel per dtype and width."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from aft.benchmark_rows import read_rows
from aft.drawing import colour_of, groups, save_figure, tidy


# What is drawn of a suite: title, column, factor, label of the axis, and which columns beside dtype and width make
# a panel. Where the batch follows from the length, it makes none.
PICTURES = {
    "operator": ("Forward and backward pass of the operator", "rate", 1, "tokens/s", ()),
    "forward": ("Forward pass of the operator", "rate", 1, "tokens/s", ()),
    "dense": ("Forward and backward pass of the dense Synthesizer", "rate", 1, "tokens/s", ()),
    "train": ("Training step", "rate", 1, "tokens/s", ()),
    "decode": ("Decoding step", "rate", 1, "tokens/s", ("batch_size",)),
    "memory": ("Peak memory of training", "peak_bytes", 2**-20, "MiB", ("batch_size",)),
}
REFERENCES = ("gpt2", "sdpa")  # which of them is in each picture of a suite
OURS = ("aft-", "synthesizer", "transformer", "dense")
MARKERS = "os^Dv<>pPX*hd"


def draw_pictures(folder: Path) -> list[Path]:
    """Draws every csv file of a suite in PICTURES into an svg file beside it, and what is too many into others.

    Args:
        folder: where the csv files are.

    Returns:
        The files that were written.

    Raises:
        ValueError: if there is nothing to draw, or a file has other columns.
    """
    paths = []
    for path in sorted(folder.glob("*-*.csv")):
        suite = path.stem.partition("-")[0]
        if suite in PICTURES and (rows := read_rows(path)):
            contestants = dict.fromkeys(row["contestant"] for row in rows)
            reference = next((name for name in REFERENCES if name in contestants), None)
            for number, names in enumerate(groups(contestants, reference), start=1):
                chosen = [row for row in rows if row["contestant"] in names]
                name = path.stem if number == 1 else f"{path.stem}-{number}"
                paths.append(draw(suite, chosen, path.with_name(f"{name}.svg")))
                print(f"wrote {paths[-1]}")
    if not paths:
        raise ValueError(f"--output_dir must hold csv files of {', '.join(PICTURES)}, got {folder}")
    return paths


def draw(suite: str, rows: list[dict], path: Path) -> Path:
    """One picture: a line per contestant, in one panel for each group of rows that can be compared."""
    title, column, factor, label, more = PICTURES[suite]
    panels = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row[column]:
            panel = ", ".join([row["dtype"], f"D = {row['width']}", *(f"batch {row[name]}" for name in more)])
            panels[panel][row["contestant"]][int(row["length"])] = float(row[column]) * factor
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = Figure(figsize=(6.4 * len(panels) + 1.6, 4.2), layout="constrained")
    for index, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1, xscale="log", yscale="log", title=name)
        draw_lines(axes, lines, names)
        axes.set_xlabel("context T, tokens" if suite == "decode" else "length T, tokens")
        axes.set_ylabel(label)
    machines = sorted({f"{row['processor']}, {row['threads']} threads, torch {row['torch']}" for row in rows})
    if rows[0]["device"] == "cuda":
        machines = sorted({f"{row['processor']}, torch {row['torch']}" for row in rows})
    figure.suptitle(f"{title} — {'; '.join(machines)}", fontsize=10)
    return save_figure(figure, path)


def draw_lines(axes, lines: dict[str, dict[int, float]], names: list[str]) -> None:
    """Lines with a legend in the order in which they end; ours are solid, those of others dashed."""
    ends = sorted(lines, key=lambda name: -lines[name][max(lines[name])])
    for name in ends:
        lengths = sorted(lines[name])
        compiled = name.endswith("-compiled")
        axes.plot(
            lengths,
            [lines[name][length] for length in lengths],
            label=name,
            color=colour_of(name),
            linestyle="-" if name.startswith(OURS) else "--",
            marker=MARKERS[names.index(name) % len(MARKERS)],
            markerfacecolor="white" if compiled else None,
            markersize=5,
            linewidth=1.4,
        )
    ticks = sorted({length for points in lines.values() for length in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    tidy(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
