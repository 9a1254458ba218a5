# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the pictures of several scripts have in common: colours, line styles, and files of a bounded size."""

from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aft.atomic_files import write_whole
from aft.redaction import readable


# The palette of Okabe and Ito, which the colour-blind can tell apart; its yellow is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
LARGEST = 300_000  # bytes of a picture


def line_style(index: int) -> dict[str, str]:
    """Colour and dashes of line number `index`: all colours solid, then all dashed, and so on."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def label(name: str) -> str:
    """A name as matplotlib prints it: a `$` in it begins no formula, and a `_` hides no line from the legend."""
    name = readable(name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def tidy(axes) -> None:
    """A light grid behind everything, and no frame at the right and the top."""
    axes.set_axisbelow(True)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    """
    Saves a figure as `path`, svg or png. What is larger than `LARGEST` becomes a png, of fewer and fewer pixels.

    Returns:
        The file that was written: `path`, or the same name with the suffix .png.
    """

    def render(suffix: str, **options) -> bytes:
        figure.savefig(file := BytesIO(), format=suffix[1:], **options)
        return file.getvalue()

    content = None
    if path.suffix == ".svg":
        # Letters stay letters, which keeps the file small; the same figure gives the same file.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "modeling_aft"}):
            content = render(path.suffix, metadata={"Date": None})
    if content is None or len(content) > LARGEST:
        path = path.with_suffix(".png")
        for dpi in (150, 120, 90, 70, 50, 35):
            content = render(path.suffix, dpi=dpi)
            if len(content) <= LARGEST:
                break
    write_whole(path, content)
    return path
