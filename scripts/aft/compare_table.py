# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Table and picture of what `compare.py` has trained, made of nothing but the folders of the runs."""

from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from aft.atomic_files import write_rows, write_whole
from aft.drawing import groups, label, line_styles, save_figure, tidy
from aft.protocols import unit_of
from aft.run_log import describe_protocol, read_log
from aft.settings_files import read_json


RESULT = "result.json"
COLUMNS = (
    *("run", "parameters", "steps", "tokens", "seeds", "train", "valid", "valid_std", "test", "test_std"),
    *("seconds", "equal_seconds", "valid_at_equal_seconds", "tokens_per_second", "peak_bytes"),
    *("valid_protocol", "test_protocol", "hardware", "precision", "versions"),
    *("data", "data_sha256", "date", "command"),
)
# What the Markdown table shows: heading, column, format.
SHOWN = (
    ("run", "run", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("steps", "steps", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("train", "train", "{:.3f}"),
    ("valid", "valid", "{:.3f}"),
    ("test", "test", "{:.3f}"),
    ("valid at equal wall-clock", "valid_at_equal_seconds", "{:.3f}"),
    ("training seconds", "seconds", "{:,.0f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("peak MiB", "peak_bytes", "{:,.0f}"),
    ("seeds", "seeds", "{}"),
)
CONDITIONS = ("valid_protocol", "test_protocol", "hardware", "precision", "versions")  # columns where runs differ
ORIGINS = ("data", "data_sha256", "date", "command")


def read_run(folder: Path) -> dict:
    """
    One finished run.

    Returns:
        `dict`: values of `COLUMNS` for its one seed, and `curve`, float [evaluations of valid, 2]: tokens and bits
        per byte.
    """
    result = read_json(folder / RESULT, "run")
    events = read_log(folder / "run.jsonl")
    config = next(event for event in events if event["event"] == "config")
    train = [event for event in events if event["event"] == "train"]
    valid, test = (
        [event for event in events if event["event"] == "evaluation" and event["split"] == split]
        for split in ("valid", "test")
    )
    per_step = config["tokens_per_step"]
    last = [event["step"] > 0.9 * train[-1]["step"] for event in train]
    lengths = np.diff([event["step"] for event in train], prepend=0) * last  # steps that a line of the end sums up
    versions = {name: config["versions"][name] for name in ("Python", "torch", "transformers")}
    versions["modeling_aft"] = result["modeling_aft"]
    return {
        "seed": result["seed"],
        "parameters": config["parameters"],
        "steps": train[-1]["step"],
        "tokens": train[-1]["step"] * per_step,
        "train": float(np.average([event["bits_per_byte"] for event in train], weights=lengths)),
        "valid": valid[-1]["bits_per_byte"],
        "test": test[-1]["bits_per_byte"],
        "tokens_per_second": median(event["tokens_per_second"] for event in train),
        "peak_bytes": result["peak_bytes"],
        "valid_protocol": describe_protocol(valid[-1]),
        "test_protocol": describe_protocol(test[-1]),
        "data": config["data"],
        "data_sha256": config["data_sha256"],
        "hardware": f"{result['processor']}; {config['hardware']}",
        "precision": config["precision"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": config["date"],
        "command": result["command"],
        "curve": np.array([[event["step"] * per_step, event["bits_per_byte"]] for event in valid]),
    }


def value_at(curve: np.ndarray, tokens: float) -> float | None:
    """
    Bits per byte after so many tokens, on the straight line between two evaluations.

    Args:
        curve (`np.ndarray`): as `read_run` returns it.

    Returns:
        None before the first evaluation, and the last value where training ended earlier.
    """
    if tokens < curve[0, 0]:
        return None
    return float(np.interp(tokens, curve[:, 0], curve[:, 1]))


def join_seeds(name: str, runs: list[dict]) -> dict:
    """
    One row without equal wall-clock: means of the scores over the seeds and their sample standard deviations, and the
    best of the speeds and the peaks of memory, as what else a machine does only slows a run, and what a process holds
    beyond the least is an accident of its allocator.
    """
    row = {"run": name, "seeds": " ".join(str(run["seed"]) for run in runs)}
    row |= {column: runs[0][column] for column in ("parameters", "steps", "tokens")}
    for column in (*CONDITIONS, *ORIGINS):
        row[column] = "; ".join(dict.fromkeys(run[column] for run in runs))
    for column in ("train", "valid", "test"):
        row[column] = fmean(run[column] for run in runs)
    for column in ("valid", "test"):
        row[f"{column}_std"] = stdev(run[column] for run in runs) if len(runs) > 1 else None
    row["tokens_per_second"] = max(run["tokens_per_second"] for run in runs)
    row["seconds"] = row["tokens"] / row["tokens_per_second"]
    peaks = [run["peak_bytes"] for run in runs]
    row["peak_bytes"] = None if None in peaks else min(peaks)
    return row


def score_at(row: dict, runs: list[dict], seconds: float | None) -> float | None:
    """The mean score on valid after so many seconds of training at the speed of the row; None before the first."""
    if seconds is None:
        return None
    values = [value_at(run["curve"], seconds * row["tokens_per_second"]) for run in runs]
    return None if None in values else fmean(values)


def write_table(
    stem: Path, folders: dict[str, list[Path]], reference: str | None = None, seconds: float | None = None
) -> list[Path]:
    """
    Writes the table of finished runs and the picture of their learning curves.

    Args:
        stem: path of the files without their suffix.
        folders: for each name, the folders of its seeds; names without any are left out.
        reference: the run whose training time is the budget at equal wall-clock, where `seconds` is None.

    Returns:
        The files: csv, Markdown, and pictures of six curves at most, the reference in each.

    Raises:
        ValueError: the runs have different data.
    """
    runs = {name: [read_run(folder) for folder in each] for name, each in folders.items() if each}
    if len({run["data_sha256"] for each in runs.values() for run in each}) > 1:
        found = [f"{name} of seed {run['seed']} {run['data_sha256']}" for name, each in runs.items() for run in each]
        raise ValueError(f"the runs of a table must have data of the same sha256, got {', '.join(found)}")
    rows = {name: join_seeds(name, each) for name, each in runs.items()}
    origin = ""
    if seconds is None and reference in rows:
        seconds, origin = rows[reference]["seconds"], f", as {reference} took"
    for name, row in rows.items():
        row |= {"equal_seconds": seconds, "valid_at_equal_seconds": score_at(row, runs[name], seconds)}
    pictures = []
    for number, names in enumerate(groups(runs, reference), start=1):
        path = stem.with_name(f"{stem.name}{'' if number == 1 else f'-{number}'}.svg")
        pictures.append(save_figure(draw_curves({name: runs[name] for name in names}, rows, seconds), path))
    rounded = [
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows.values()
    ]
    write_rows(table := stem.with_suffix(".csv"), COLUMNS, rounded)
    missing = [name for name, each in folders.items() if not each]
    text = markdown(stem.name, list(rows.values()), origin, missing, [path.name for path in pictures])
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


def markdown(title: str, rows: list[dict], origin: str, missing: list[str], pictures: list[str]) -> str:
    """The table as a Markdown document, with everything that its numbers depend on."""
    best = min(row["valid"] for row in rows)
    differing = [column for column in CONDITIONS if len({row[column] for row in rows}) > 1]
    shown = [entry for entry in SHOWN if any(row[entry[1]] is not None for row in rows)]
    shown += [(column.replace("_", " "), column, "{}") for column in differing]
    lines = [f"# {title}", "", "| " + " | ".join(heading for heading, _, _ in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row, column, form, best) for _, column, form in shown) + " |")
    notes = [
        f"Scores are {score_name(rows)};",
        "means over the seeds ± their sample standard deviation, the best on valid bold;",
        "train is what the last tenth of the training read, as it went by, with dropout where there is any.",
        "Tokens/s is the median over the lines of a log, the best of the seeds; seconds are the training at that",
        "speed, without evaluations. Peak MiB is what a process held beyond its libraries, the least of the seeds; it",
        "differs by tens of MiB between equal runs.",
    ]
    if (seconds := rows[0]["equal_seconds"]) is not None:
        notes += [
            f"Equal wall-clock is {seconds:,.1f} s{origin}, read off the curve of valid, whose learning rate was",
            "meant for the whole run. An asterisk marks a run that ended before.",
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


def score_name(rows: list[dict]) -> str:
    """What the scores of rows are called, which have all one kind of data."""
    return unit_of(rows[0]["valid_protocol"].split(",")[0])[0]


def draw_curves(runs: dict[str, list[dict]], rows: dict[str, dict], seconds: float | None) -> Figure:
    """Bits per byte on valid over tokens and over training seconds: means of the seeds, shaded from best to worst."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels, styles = figure.subplots(1, 2, sharey=True), line_styles(runs)
    for name, each in runs.items():
        curves = np.stack([run["curve"] for run in each])  # the seeds of a run are evaluated at the same steps
        tokens, scores = curves[0, :, 0], curves[..., 1]
        for x, axes in zip((tokens, tokens / rows[name]["tokens_per_second"]), panels, strict=True):
            style = styles[name]
            axes.plot(x, scores.mean(0), label=label(name), linewidth=1.4, marker=".", markersize=4, **style)
            if len(each) > 1:
                low, high = scores.min(0), scores.max(0)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if seconds is not None:
        panels[1].axvline(seconds, color="#888888", linewidth=1)
        panels[1].annotate(" equal wall-clock", (seconds, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    for axes, quantity in zip(panels, ("tokens", "training seconds"), strict=True):
        axes.set_xlabel(quantity)
        tidy(axes)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(f"{score_name(list(rows.values()))}, valid")
    handles, _ = panels[0].get_legend_handles_labels()
    ends = sorted(zip(runs, handles, strict=True), key=lambda end: -rows[end[0]]["valid"])  # from the top
    figure.legend(
        [handle for _, handle in ends],
        [f"{label(name)} {rows[name]['valid']:.3f}" for name, _ in ends],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    return figure
