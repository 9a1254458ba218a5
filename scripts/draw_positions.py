# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Draws bits per byte over the position in the text, one line for each file that `score.py --by_position` has written.

    python scripts/draw_positions.py runs/carried.csv runs/segments.csv --output runs/positions.svg

A point is the mean of a range of positions, from one power of two to the next, and stands where the range ends. The
legend says how each model reads the text, where not all read it alike.
"""

import argparse
import csv
import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from aft.atomic_files import check_file
from aft.console import any_text, run_program
from aft.drawing import MOST_LINES, label, line_styles, save_figure, tidy
from aft.protocols import POSITION_COLUMNS


WAYS = {  # how a text is read, by the name of the protocol
    "segments": "in windows",
    "sliding": "in overlapping windows",
    "carried": "as one stream",
    "refreshed": "starting anew",
}


def read_positions(path: Path) -> list[dict]:
    """
    The rows of a file that `score.py --by_position` has written.

    Raises:
        ValueError: it is not one.
    """
    check_file(path, "files")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if not rows or tuple(reader.fieldnames) != POSITION_COLUMNS:
            raise ValueError(f"its columns are {reader.fieldnames}")
        return [{**row, "last": int(row["last"]), "bits_per_byte": float(row["bits_per_byte"])} for row in rows]
    except (csv.Error, TypeError, ValueError) as error:
        raise ValueError(f"files: {path} must be a file that score.py --by_position wrote: {error}") from error


def legends(lines: list[list[dict]]) -> list[str]:
    """What each line is: its model, and how it reads the text where not all read it alike."""
    models = [re.sub(r"-seed\d+$", "", Path(rows[0]["model"]).name) for rows in lines]
    ways = [WAYS[rows[0]["protocol"].partition(",")[0]] for rows in lines]
    return models if len(set(ways)) == 1 else [f"{model}, {way}" for model, way in zip(models, ways, strict=True)]


@any_text()
def main(argv: list[str] | None = None) -> Path:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the file that was written.

    Raises:
        ValueError: --output is no picture, or a file is not one of score.py.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what score.py --by_position has written")
    parser.add_argument("--output", type=Path, required=True, help="the picture, .svg or .png")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".svg", ".png"):
        raise ValueError(f"--output must end in .svg or .png, got {args.output}")
    if len(args.files) > MOST_LINES:
        raise ValueError(
            f"files: must be {MOST_LINES} at most, as many lines as one can tell apart, got {len(args.files)}"
        )
    lines = [read_positions(path) for path in args.files]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="position, tokens", ylabel="bits per byte")
    names = legends(lines)
    styles = line_styles(dict.fromkeys(names))
    for name, rows in zip(names, lines, strict=True):
        points = [row["last"] for row in rows], [row["bits_per_byte"] for row in rows]
        axes.plot(*points, label=label(name), marker="o", markersize=4, linewidth=1.4, **styles[name])
    axes.set_xticks(sorted({row["last"] for rows in lines for row in rows})[1::2])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("Bits per byte by the position in the text", fontsize=10)
    path = save_figure(figure, args.output)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    run_program(main)
