# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the pictures of several scripts have in common: colours, line styles, and files of a bounded size."""

import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from aft.atomic_files import write_whole
from aft.redaction import readable


# The palette of Okabe and Ito, which the colour-blind can tell apart; its yellow is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Whose colour each is in every picture: of all models whose name begins so, the longest beginning first.
OWNERS = {
    "aft-simple": "#0072B2",
    "aft-local": "#D55E00",
    "aft-relative": "#D55E00",
    "aft-conv": "#009E73",
    "aft-full": "#CC79A7",
    "plain-aft-full": "#E69F00",
    "sdpa": "#000000",
    "synthesizer": "#E69F00",
    "dense-plain": "#000000",
    "dense": "#E69F00",
    "transformer": "#56B4E9",
    "gpt2": "#000000",
    "llama": "#888888",
    "mamba": "#56B4E9",
    "rwkv": "#D55E00",
    "hgrn": "#009E73",
    "gla": "#CC79A7",
}
MOST_LINES = 6  # in one picture
DASHES = ("-", "--", ":", "-.")
LARGEST = 300_000  # bytes of a picture


def colour_of(name: str) -> str | None:
    """The colour that a model has in every picture, None for one of another kind."""
    return next((OWNERS[owner] for owner in sorted(OWNERS, key=len, reverse=True) if name.startswith(owner)), None)


def line_styles(names: Iterable[str]) -> dict[str, dict]:
    """
    Colour and dashes for each of several models. A model has its colour, and others of the same colour other dashes;
    models that differ in a number alone have colours in the order of that number, from dark to light.
    """
    names = list(names)
    numbers = [re.findall(r"\d+", name) for name in names]
    alike = len({re.sub(r"\d+", "#", name) for name in names}) == 1
    varying = [values for values in zip(*numbers, strict=True) if len(set(values)) > 1] if alike else []
    if len(names) > 2 and len(varying) == 1:
        values = varying[0]
        order = sorted(range(len(names)), key=lambda index: int(values[index]))
        shades = matplotlib.colormaps["viridis"].resampled(256)(np.linspace(0, 0.85, len(names)))
        return {names[index]: {"color": to_hex(shades[rank]), "linestyle": "-"} for rank, index in enumerate(order)}
    owned = {name: colour_of(name) for name in names}
    free = [colour for colour in COLOURS if colour not in owned.values()] or list(COLOURS)
    others = [name for name in names if owned[name] is None]
    owned |= {name: free[index % len(free)] for index, name in enumerate(others)}
    styles = {}
    for name in names:
        before = sum(style["color"] == owned[name] for style in styles.values())
        styles[name] = {"color": owned[name], "linestyle": DASHES[before % len(DASHES)]}
    return styles


def groups(names: Iterable[str], reference: str | None = None) -> list[list[str]]:
    """Names in their order, MOST_LINES or fewer for each picture; the reference, if there is one, is in all."""
    names = list(names)
    if len(names) <= MOST_LINES:
        return [names]
    others = [name for name in names if name != reference]
    room = MOST_LINES - (reference in names)
    count = -(-len(others) // room)
    size = -(-len(others) // count)
    parts = [others[start : start + size] for start in range(0, len(others), size)]
    return [[name for name in names if name in part or name == reference] for part in parts]


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
