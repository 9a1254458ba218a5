# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The log of a training run, one JSON object per line, and what is made of it: training curve and model card."""

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from aft.atomic_files import naming, replacing, sync, write_whole
from aft.pretraining_arguments import PATHS, public_flags, public_value
from aft.protocols import unit_of
from aft.redaction import public_path


CARD_TEMPLATE = Path(__file__).resolve().parent / "model_card_template.md"
MEANINGLESS_ELSEWHERE = {"training_preset", "imports", *PATHS}  # arguments that no card shows; the command is on it
HUB_DATASETS = {"enwik8": "LTCB/enwik8"}  # names on the Hub of the known files of raw_files
LETTERS = {
    **{"length": "T", "stride": "S", "stream_length": "L", "refresh_every": "R", "refresh_overlap": "O"},
    **{"mlm_probability": "P", "mask_unit": "unit", "mean_span_length": "mean span"},
    **{"first_bits": "bits of the first sub-pixel"},
}
PAPERS = {
    "aft": "an [Attention Free Transformer](https://arxiv.org/abs/2105.14103)",
    "aft_vision": "an [Attention Free Transformer](https://arxiv.org/abs/2105.14103) for images",
    "synthesizer": "a [Synthesizer](https://arxiv.org/abs/2005.00743)",
}


class RunLog:
    """
    Appends events to `run.jsonl`, and passes their numbers on to trackers.

    Args:
        path (`Path`): the file.
        continues (`Path`, *optional*): the log to go on with: of the run whose checkpoint this one starts from.
        keep_lines (`int`): how many of its lines to keep; the rest is younger than the checkpoint resumed from.
        track (`Callable`, *optional*): `track(numbers, step)` gets those of each event that has a step.
        active (`bool`): False on every process but one, where nothing is written.

    Attributes:
        kept (`list[dict]`): the events of the lines that were kept; fewer than `keep_lines` if the log has fewer.

    Raises:
        ValueError: a line to keep is damaged.
    """

    def __init__(
        self,
        path: Path,
        continues: Path | None = None,
        keep_lines: int = 0,
        track: Callable[[dict[str, float], int], None] | None = None,
        active: bool = True,
    ):
        self.path, self.active, self.track, self.num_lines, self.kept = path, active, track, 0, []
        if not active:
            return
        if continues is not None and continues.is_file():
            self.kept = [public_event(event) for event in read_log(continues, keep_lines)]
        write_whole(path, "".join(json.dumps(event) + "\n" for event in self.kept))
        self.num_lines = len(self.kept)

    def write(self, event: str, **values) -> None:
        """Appends one line; for trackers, numbers of an event that has a step are named event/value."""
        if not self.active:
            return
        line = json.dumps({"event": event, **values}, allow_nan=False)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.num_lines += 1
        if self.track is not None and "step" in values:
            numbers = {name: value for name, value in values.items() if name != "step" and type(value) in (int, float)}
            self.track({f"{values.get('split', event)}/{name}": numbers[name] for name in numbers}, values["step"])

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint that counts on them comes after."""
        if self.active:
            sync(self.path)


def read_log(path: Path, num_lines: int | None = None) -> list[dict]:
    """
    The events of a log, in order; of its first `num_lines` lines if given.

    Raises:
        ValueError: a line is no JSON object; the message has its number.
    """
    events = []
    for number, line in enumerate(path.read_bytes().splitlines()[:num_lines], start=1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is damaged: {error}") from error
        if not isinstance(event, dict) or "event" not in event:
            raise ValueError(f"{path}: line {number} is damaged: it must be an object with an event, got {line!r}")
        events.append(event)
    return events


def public_event(event: dict) -> dict:
    """An event that an earlier version may have written, without folders of the machine and credentials."""
    changed = {}
    if isinstance(event.get("arguments"), dict):
        changed["arguments"] = {name: public_value(name, value) for name, value in event["arguments"].items()}
    if event["event"] in ("config", "resume") and "command" in event:
        changed["command"] = shlex.join(public_flags(shlex.split(event["command"])))
    return {**event, **changed}


def plot_training_curve(events: list[dict], path: Path) -> None:
    """Bits per byte, or per dimension, over steps, train and valid, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    unit, _ = unit_of(next((event["protocol"] for event in events if event["event"] == "evaluation"), "segments"))
    axes = figure.add_subplot(xlabel="step", ylabel=unit)
    for name, style, chosen in (
        ("train", "-", [event for event in events if event["event"] == "train"]),
        ("valid", "o-", [event for event in events if event["event"] == "evaluation" and event["split"] == "valid"]),
    ):
        steps, values = [event["step"] for event in chosen], [event["bits_per_byte"] for event in chosen]
        axes.plot(steps, values, style, label=name, markersize=4)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def describe_score(evaluation: dict) -> str:
    """The score of an evaluation in words, with the perplexity of a token where tokens are no bytes."""
    perplexity = f", perplexity {evaluation['perplexity']:.2f}" if "perplexity" in evaluation else ""
    unit, _ = unit_of(evaluation["protocol"])
    return f"{evaluation['bits_per_byte']:.4f} {unit}{perplexity}"


def describe_protocol(evaluation: dict) -> str:
    """The protocol of an evaluation in words, e.g. `segments, T = 256, 23310 bytes, float32`."""
    parts = [evaluation["protocol"]]
    parts += [f"{letter} = {evaluation[name]}" for name, letter in LETTERS.items() if name in evaluation]
    parts += [f"{evaluation['tokens_scored']} tokens"] if "tokens_scored" in evaluation else []
    _, scored = unit_of(evaluation["protocol"])
    return ", ".join([*parts, f"{evaluation['bytes_scored']} {scored}", evaluation["dtype"]])


def final_scores(events: list[dict]) -> list[dict]:
    """The evaluations of the model that a log ends with: all of a release, or the last of test and of valid."""
    released = max((index for index, event in enumerate(events) if event["event"] == "release"), default=None)
    scores = [event for event in events[released or 0 :] if event["event"] == "evaluation"]
    if released is not None:
        return scores
    last = {event["split"]: event for event in scores}
    return [last[split] for split in ("test", "valid") if split in last]  # a log that was lost in part may lack valid


def number(value: int | None) -> str | None:
    """A whole number with commas, None for none."""
    return None if value is None else f"{value:,}"


def curve_part(arguments: dict) -> str | None:
    """How much of valid the curve of a run is of; None if all."""
    most = {"bytes": arguments["eval_bytes"], "pictures": arguments.get("eval_pictures")}
    return next((f"{count:,} {unit}" for unit, count in most.items() if count), None)


def card_values(events: list[dict]) -> dict:
    """
    What a model card says of a finished run.

    Args:
        events (`list[dict]`): the log, with one config event, evaluations of both splits, and one final event; and if
            the run was released, with a release event and the scores of what was stored after it.
    """
    config = next(event for event in events if event["event"] == "config")
    final = next(event for event in reversed(events) if event["event"] == "final")
    one = {event["event"]: event for event in events}  # the last of each kind
    model_type, model_class = config["model"].split(", ")
    masked = config["arguments"].get("objective") == "masked"
    arguments, fields = (
        "\n".join(
            f"| {name} | `{value}` |"
            for name, value in sorted(table.items())
            if value is not None and name not in MEANINGLESS_ELSEWHERE
        )
        for table in (config["arguments"], config["model_config"])
    )
    return {
        "name": final["model_name"],
        "path": public_path(one["release"]["folder"] if "release" in one else config["arguments"]["output_dir"]),
        "model_type": model_type,
        "model_class": model_class,
        "auto_class": "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM",
        "masked": masked,
        "parameters": config["parameters"],
        "dataset": config["data"],
        # A log of a version that did not say it has checked the data itself only if it downloaded them.
        "hub_dataset": config.get(
            "hub_dataset", HUB_DATASETS.get(config["data"]) if config["arguments"].get("dataset") == "enwik8" else None
        ),
        "dataset_sha256": config["data_sha256"],
        **{f"{split}_bytes": number(config[f"{split}_bytes"]) for split in ("train", "valid", "test")},
        "picture": config.get("picture"),
        **{f"{split}_pictures": number(config.get(f"{split}_pictures")) for split in ("train", "valid", "test")},
        "unit": unit_of(final_scores(events)[0]["protocol"])[0],
        "tokenizer": config.get("tokenizer"),
        "init_from": config.get("init_from"),
        "vocab_size": number(config.get("vocab_size")),
        "keeps_text": config.get("keeps_text", True),
        "documents": config.get("documents"),
        "scores": [
            {
                "split": event["split"],
                "bpb": f"{event['bits_per_byte']:.4f}",
                "protocol": describe_protocol(event),
                "command": event.get("command"),
            }
            for event in final_scores(events)
        ],
        "release": one.get("release"),
        "has_code": "release" not in one,
        "curve_bytes": curve_part(config["arguments"]),
        "steps": f"{final['step']:,}",
        "tokens": f"{final['step'] * config['tokens_per_step']:,}",
        "minutes": f"{final['training_seconds'] / 60:,.1f}",
        **{name: config[name] for name in ("hardware", "num_processes", "precision", "date", "command")},
        "versions": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
        "pictures": final.get("pictures", []),
        "sample": "\n".join("    " + line for line in final["sample"].splitlines()),
        "arguments": arguments,
        "model_fields": fields,
    }


def card_metadata(values: dict) -> ModelCardData:
    """What the Hub reads of a model card: the values that its template gets."""
    from modeling_aft import AFTPreTrainedModel, AFTVisionPreTrainedModel  # what else is here runs without them

    family = AFTVisionPreTrainedModel if values["images"] else AFTPreTrainedModel
    task = family.heads[values["auto_class"]].pipeline_tag
    if values["picture"]:
        task = "unconditional-image-generation"
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag=task, tags=[values["model_type"]]
    )
    if values["run"]:
        dataset = values["hub_dataset"]
        kind = "images" if values["picture"] else "text" if values["tokenizer"] else "bytes"
        data.tags += [] if values["tokenizer"] or values["picture"] else ["byte-level"]
        data.tags += ["masked-lm" if values["masked"] else "causal-lm"]
        data.language = (values["release"] or {}).get("language")
        data.datasets = [dataset] if dataset else None
        data.metrics = [values["unit"].replace(" ", "_")]
        data.model_name = values["name"]
        data.eval_results = [
            EvalResult(
                task_type=task,
                dataset_type=dataset or kind,
                dataset_name=values["dataset"],
                dataset_split="test",
                metric_type=data.metrics[0],
                metric_name=f"{values['unit']} ({score['protocol']})",
                metric_value=float(score["bpb"]),
            )
            for score in values["scores"]
            if score["split"] == "test"
        ]
    return data


def fill_model_card(events: list[dict], **values) -> str:
    """
    A model card, made of `CARD_TEMPLATE`, of which every number of a run is from its log.

    Args:
        events (`list[dict]`): the log of a finished run, empty if there is none.
        values: `name`, `path` (what `from_pretrained` gets), `has_code` (whether the code is beside the weights),
            `model_type`, `model_class`, `auto_class` and `parameters` (an int) of the model, needed if there is no
            log; `images`, whether it reads images; `picture`, height x width x channels of what it makes, None if that
            is text; and `metrics`, a dict of what else it was evaluated by.

    Raises:
        jinja2.UndefinedError: the template asks for a value that there is not.
    """
    values = {
        "metrics": {},
        "images": False,
        "picture": None,
        **(card_values(events) if events else {}),
        **values,
        "run": bool(events),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8"))
    paper = PAPERS.get(values["model_type"])
    metadata = card_metadata(values)
    return template.render(**values, paper=paper, task=metadata.pipeline_tag, metadata=metadata.to_yaml())


def today() -> str:
    """The date in UTC, as YYYY-MM-DD."""
    return datetime.now(UTC).date().isoformat()
