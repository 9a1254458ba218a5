# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags of `aft finetune`, and of every program on the Trainer, as far as they need no transformers."""

import argparse
import ast
import textwrap
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from aft.flags import CONFIGURATION, IMPORT_HELP, FlagParser, check_model_name, find_preset, flag, like_path
from aft.settings_files import read_json


@dataclass
class InputArguments:
    _argument_group_name = "model and data"

    model: str | None = flag(None, "Folder of a saved model, or its name on the Hub.")
    imports: list[str] = field(default_factory=list, metadata={"help": IMPORT_HELP, "aliases": ["--import"]})
    trust_remote_code: bool = flag(False, "Run the code that comes with a model of an unknown type.")
    text_file: str | None = flag(None, "File to train a language model on; .zip and .gz are unpacked.")
    labelled_file: str | None = flag(None, "Table (.csv, .jsonl, .parquet) of texts and labels for a classifier.")
    chat_file: str | None = flag(
        None, "Table (.jsonl, .parquet) of chats (messages) or of prompt and completion, of which answers are trained."
    )
    validation_file: str | None = flag(None, "File of the same kind to evaluate on, in place of a held-out share.")
    validation_share: float = flag(0.1, "Share of the data that is held out without validation_file.")
    split_seed: int = flag(0, "Seed of which rows of a table are held out.")
    predict_file: str | None = flag(None, "Table of texts, with or without labels, to classify at the end.")
    text_column: str = flag("text", "Column of the texts.")
    label_column: str = flag("label", "Column of the labels.")
    max_length: int | None = flag(
        None,
        "Tokens of a window, or at most of a row; None is max_position_embeddings, for rows only if it is a limit.",
    )
    truncation: str = flag("none", "Of rows that are too long: none (an error), right (drop the end) or left.")
    search_steps: int | None = flag(
        None, "Try four learning rates around the default for so many steps each, and take the best on held-out data."
    )
    cache_dir: str | None = flag(None, "Folder for what `evaluate` writes; None is its default. No table goes there.")


@dataclass
class FinetuningDefaults:
    """What this program adds to the flags of `transformers.TrainingArguments`, and where its defaults are others."""

    _argument_group_name = "training"

    output_dir: str = flag("runs/finetuning", "Folder of the results.")
    learning_rate: float | None = flag(
        None, "Peak; None is 3e-3 for up to 2 million parameters, and falls with the root of their number to 5e-5."
    )
    eval_strategy: str = flag("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = flag("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = flag(2, "How many checkpoints to keep; the best is always among them.")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint instead of the last one.")
    restore_callback_states_from_checkpoint: bool = flag(True, "Resume with the patience that was left.")
    resume_from_checkpoint: str | None = flag(
        None, "true (newest checkpoint of output_dir), auto (the same if there is one, else start) or its path."
    )
    logging_nan_inf_filter: bool = flag(False, "Must be false: a loss that is no number ends the run.")
    early_stopping_patience: int | None = flag(None, "Stop after so many evaluations in a row that are no better.")
    early_stopping_threshold: float = flag(0.0, "By how much an evaluation must be better to count.")


def names_of_training_arguments() -> list[str]:
    """The fields of `transformers.TrainingArguments`, read from its source: to import it takes seconds."""
    source = Path(find_spec("transformers").origin).parent / "training_args.py"
    classes = (node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    body = next(node.body for node in classes if node.name == "TrainingArguments")
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    return [name for name in names if not name.startswith("_")]


def is_preset(model: str | None, kind: str) -> bool:
    """
    Whether `--model` is a configuration to begin with from nothing, and not a saved model.

    Args:
        kind: the folder of `configuration/` with the presets of a program.
    """
    if model is None or Path(model).suffix == ".json":
        return True
    return Path(model).name == model and (CONFIGURATION / kind / f"{model}.json").is_file()


def find_model(model: str, kind: str) -> str:
    """
    The path of a configuration, or the folder or name of a saved model; `kind` as in `is_preset`.

    Raises:
        ValueError: there is neither.
    """
    if is_preset(model, kind) and not Path(model).is_dir():
        path = find_preset(model, kind, "--model")
        if not Path(path).is_file():
            raise ValueError(f"--model {model}: no such file{like_path(Path(model))}")
        return path
    if not Path(model).exists() and Path(model).name == model:
        return find_preset(model, kind, "--model")
    check_model_name(model)
    return model


def read_preset(model: str, kind: str) -> dict:
    """
    The fields of a configuration to begin with from nothing; the arguments are those of `is_preset`.

    Raises:
        ValueError: there is none, or it is no configuration.
    """
    values = read_json(find_model(model, kind), "--model")
    if "model_type" not in values:
        raise ValueError(f"--model {model}: must be a JSON object with a model_type")
    return values


def input_problems(inputs: InputArguments) -> list[str]:
    """What is wrong with the flags of the model and the data by themselves."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(inputs, name)!r}")

    modes = ("text_file", "labelled_file", "chat_file")
    given = [name for name in modes if getattr(inputs, name) is not None]
    check(bool(inputs.model), "model", "given")
    check(len(given) > 0, "text_file", "given, or else --labelled_file or --chat_file")
    for name in given[1:]:
        check(False, name, f"left out with --{given[0]}")
    check(
        given == ["labelled_file"] or inputs.predict_file is None, "predict_file", "left out without --labelled_file"
    )
    for name in (*modes, "validation_file", "predict_file"):
        path = getattr(inputs, name)
        if path is not None and not Path(path).is_file():
            problems.append(f"--{name} must be a file, got {path!r}{like_path(Path(path))}")
    check(inputs.cache_dir != "", "cache_dir", "a path")
    check(0 <= inputs.split_seed < 2**32, "split_seed", "in [0, 2**32)")
    check(inputs.label_column != inputs.text_column, "label_column", "another column than --text_column")
    check(0 < inputs.validation_share < 1, "validation_share", "in (0, 1)")
    check(inputs.max_length is None or inputs.max_length >= 2, "max_length", "at least 2")
    check(inputs.search_steps is None or inputs.search_steps >= 1, "search_steps", "at least 1")
    check(inputs.truncation in ("none", "right", "left"), "truncation", "none, right or left")
    if inputs.model:
        try:
            check_model_name(inputs.model)
        except ValueError as error:
            problems.append(str(error))
    return problems


def make_parser(command: str, description: str, groups: tuple[type, ...]) -> FlagParser:
    """What reads the flags of these dataclasses, and knows the names of all others of TrainingArguments."""
    parser = FlagParser(command, description, groups)
    ours = {action.dest for action in parser._actions}
    others = [name for name in names_of_training_arguments() if name not in ours]
    for name in others:
        parser.add_argument(f"--{name}", f"--no_{name}", nargs="*", help=argparse.SUPPRESS)
    listed = textwrap.fill(" ".join(f"--{name}" for name in others), 118, break_on_hyphens=False)
    parser.epilog = f"and those of transformers.TrainingArguments:\n{listed}"
    return parser


def pick(group: type, found: argparse.Namespace):
    """The flags of one dataclass among those that were found."""
    return group(**{entry.name: getattr(found, entry.name) for entry in fields(group)})


def read_flags(argv: list[str], description: str = "") -> InputArguments:
    """
    The flags of the model and the data, after a look at the names of all others.

    Raises:
        ValueError: a flag is unknown.
    """
    found = make_parser("finetune", description, (InputArguments, FinetuningDefaults)).parse_args(argv)
    return pick(InputArguments, found)
