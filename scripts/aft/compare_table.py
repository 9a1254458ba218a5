# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Table and picture of what `aft compare` has trained, made of nothing but the folders of the runs."""

from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from aft.atomic_files import write_rows, write_whole
from aft.compare_program import Program
from aft.drawing import groups, label, line_styles, save_figure, tidy


CONDITIONS = ("valid_protocol", "test_protocol", "hardware", "precision", "versions")  # columns where runs differ
ORIGINS = ("data", "data_sha256", "date", "command")


def columns_of(program: Program) -> tuple[str, ...]:
    """The columns of the csv."""
    scores = []
    for column in (*program.more_scores, "valid", "test"):
        scores += [column, f"{column}_std"] if column in program.with_spread else [column]
    return (
        *("run", *program.counts, "seeds", *scores, "seconds", "equal_seconds", "valid_at_equal_seconds"),
        *(program.speed, *program.more_speeds, "peak_bytes", *CONDITIONS, *ORIGINS),
    )


def shown(program: Program) -> list[tuple[str, str, str]]:
    """What the Markdown table shows: heading, column, format."""
    return [
        ("run", "run", "{}"),
        *((column, column, form) for column, form in program.counts.items()),
        *((heading(column), column, form) for column, form in program.more_scores.items()),
        (program.held_out, "valid", program.form),
        ("test", "test", program.form),
        (f"{program.held_out} at equal wall-clock", "valid_at_equal_seconds", program.form),
        ("training seconds", "seconds", "{:,.0f}"),
        *((heading(column), column, "{:,.0f}") for column in (program.speed, *program.more_speeds)),
        ("peak MiB", "peak_bytes", "{:,.0f}"),
        ("seeds", "seeds", "{}"),
    ]


def heading(column: str) -> str:
    """What stands above a column of scores or speeds."""
    return column.replace("_per_second", "/s").replace("_", " ")


def value_at(curve: np.ndarray, amount: float) -> float | None:
    """
    The score after so much was read, on the straight line between two evaluations.

    Args:
        curve (`np.ndarray`): as `Program.read_run` returns it.

    Returns:
        None before the first evaluation, and the last value where training ended earlier.
    """
    if amount < curve[0, 0]:
        return None
    return float(np.interp(amount, curve[:, 0], curve[:, 1]))


def join_seeds(program: Program, name: str, runs: list[dict]) -> dict:
    """
    One row without equal wall-clock: means of the scores over the seeds and their sample standard deviations, and the
    best of the speeds and the peaks of memory, as what else a machine does only slows a run, and what a process holds
    beyond the least is an accident of its allocator.
    """
    row = {"run": name, "seeds": " ".join(str(run["seed"]) for run in runs)}
    row |= {column: runs[0][column] for column in program.counts}
    for column in (*CONDITIONS, *ORIGINS):
        row[column] = "; ".join(dict.fromkeys(run[column] for run in runs))
    for column in (*program.more_scores, "valid", "test"):
        row[column] = mean_of([run[column] for run in runs])
    for column in program.with_spread:
        there = len(runs) > 1 and row[column] is not None
        row[f"{column}_std"] = stdev(run[column] for run in runs) if there else None
    for column in (program.speed, *program.more_speeds):
        speeds = [run[column] for run in runs]
        row[column] = None if None in speeds else max(speeds)
    row["seconds"] = row[program.amount] / row[program.speed]
    peaks = [run["peak_bytes"] for run in runs]
    row["peak_bytes"] = None if None in peaks else min(peaks)
    return row


def mean_of(values: list[float | None]) -> float | None:
    """Their mean; None if one is not known."""
    return None if None in values else fmean(values)


def score_at(runs: list[dict], seconds: float | None, speed: float) -> float | None:
    """The mean score on valid after so many seconds of training at a speed; None before the first."""
    return None if seconds is None else mean_of([value_at(run["curve"], seconds * speed) for run in runs])


def write_table(
    program: Program,
    stem: Path,
    folders: dict[str, list[Path]],
    reference: str | None = None,
    seconds: float | None = None,
) -> list[Path]:
    """
    Writes the table of finished runs and the picture of their learning curves.

    Args:
        program: that of the runs.
        stem: path of the files without their suffix.
        folders: for each name, the folders of its seeds; names without any are left out.
        reference: the run whose training time is the budget at equal wall-clock, where `seconds` is None.

    Returns:
        The files: csv, Markdown, and pictures of six curves at most, the reference in each.

    Raises:
        ValueError: the runs have different data.
    """
    runs = {name: [program.read_run(folder) for folder in each] for name, each in folders.items() if each}
    if len({run["data_sha256"] for each in runs.values() for run in each}) > 1:
        found = [f"{name} of seed {run['seed']} {run['data_sha256']}" for name, each in runs.items() for run in each]
        raise ValueError(f"the runs of a table must have data of the same sha256, got {', '.join(found)}")
    rows = {name: join_seeds(program, name, each) for name, each in runs.items()}
    origin = ""
    if seconds is None and reference in rows:
        seconds, origin = rows[reference]["seconds"], f", as {reference} took"
    for name, row in rows.items():
        score = score_at(runs[name], seconds, row[program.speed])
        row |= {"equal_seconds": seconds, "valid_at_equal_seconds": score}
    pictures = []
    for number, names in enumerate(groups(runs, reference), start=1):
        path = stem.with_name(f"{stem.name}{'' if number == 1 else f'-{number}'}.svg")
        pictures.append(save_figure(draw_curves(program, {name: runs[name] for name in names}, rows, seconds), path))
    rounded = [
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows.values()
    ]
    write_rows(table := stem.with_suffix(".csv"), columns_of(program), rounded)
    missing = [name for name, each in folders.items() if not each]
    text = markdown(program, stem.name, list(rows.values()), origin, missing, [path.name for path in pictures])
    write_whole(document := stem.with_suffix(".md"), text)
    return [table, document, *pictures]


def cell(row: dict, column: str, form: str, best: float) -> str:
    """One cell of the Markdown table; the best score on valid is bold."""
    value = row[column]
    if value is None:
        return ""
    text = form.format(value / 2**20 if column == "peak_bytes" else value).replace("|", "\\|")
    if row.get(f"{column}_std") is not None:
        text += " ± " + form.format(row[f"{column}_std"])
    if column == "valid_at_equal_seconds" and row["seconds"] < row["equal_seconds"]:
        text += " *"
    return f"**{text}**" if column == "valid" and value == best else text


def markdown(
    program: Program, title: str, rows: list[dict], origin: str, missing: list[str], pictures: list[str]
) -> str:
    """The table as a Markdown document, with everything that its numbers depend on."""
    best = program.best([row["valid"] for row in rows])
    differing = [column for column in CONDITIONS if len({row[column] for row in rows}) > 1]
    entries = [entry for entry in shown(program) if any(row[entry[1]] is not None for row in rows)]
    entries += [(column.replace("_", " "), column, "{}") for column in differing]
    headings = " | ".join(heading for heading, _, _ in entries)
    lines = [f"# {title}", "", f"| {headings} |", "|---" * len(entries) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row, column, form, best) for _, column, form in entries) + " |")
    notes = [
        f"Scores are {program.score(rows)}; means over the seeds ± their sample standard deviation, the best on",
        f"{program.held_out} bold; {program.note}",
        f"{program.amount.capitalize()}/s is the median over the lines of a log, the best of the seeds; seconds are",
        "the training at that speed, without evaluations. Peak MiB is what a process held beyond its libraries, the",
        "least of the seeds; it differs by tens of MiB between equal runs.",
    ]
    if (seconds := rows[0]["equal_seconds"]) is not None:
        notes += [
            f"Equal wall-clock is {seconds:,.1f} s{origin}, read off the curve of {program.held_out}, whose learning",
            "rate was meant for the whole run. An asterisk marks a run that ended before.",
        ]
    lines += ["", " ".join(notes), ""]
    for column in (*CONDITIONS, *ORIGINS):
        if column not in differing:
            values = dict.fromkeys(row[column] for row in rows)
            lines.append(f"- {column.replace('_', ' ')}: {'; '.join(values)}")
    if missing:
        lines.append(f"- not finished, and left out: {', '.join(missing)}")
    lines += [line for picture in pictures for line in ("", f"![Learning curves]({picture})")]
    return "\n".join([*lines, ""])


def draw_curves(program: Program, runs: dict[str, list[dict]], rows: dict[str, dict], seconds: float | None) -> Figure:
    """Scores on valid over what was read and over training seconds: means of the seeds, shaded from best to worst."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels, styles = figure.subplots(1, 2, sharey=True), line_styles(runs)
    for name, each in runs.items():
        curves = np.stack([run["curve"] for run in each])  # the seeds of a run are evaluated at the same steps
        amount, scores = curves[0, :, 0], curves[..., 1]
        for x, axes in zip((amount, amount / rows[name][program.speed]), panels, strict=True):
            style = styles[name]
            axes.plot(x, scores.mean(0), label=label(name), linewidth=1.4, marker=".", markersize=4, **style)
            if len(each) > 1:
                low, high = scores.min(0), scores.max(0)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if seconds is not None:
        panels[1].axvline(seconds, color="#888888", linewidth=1)
        panels[1].annotate(" equal wall-clock", (seconds, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    for axes, quantity in zip(panels, (program.amount, "training seconds"), strict=True):
        axes.set_xlabel(quantity)
        tidy(axes)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(f"{program.score(list(rows.values()))}, {program.held_out}")
    handles, _ = panels[0].get_legend_handles_labels()
    ends = sorted(zip(runs, handles, strict=True), key=lambda end: -rows[end[0]]["valid"])  # from the top
    figure.legend(
        [handle for _, handle in ends],
        [f"{label(name)} {program.form.format(rows[name]['valid'])}" for name, _ in ends],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    return figure
