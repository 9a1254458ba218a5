# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags of `aft seq2seq`, as far as they can be read without transformers."""

import argparse
import math
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from aft.finetuning_flags import FinetuningDefaults, find_model, is_preset, make_parser, pick
from aft.flags import HUB_NAME, IMPORT_HELP, flag, like_path


PRESETS = "seq2seq"  # where those of --model are
SOURCES = ("pairs_file", "dataset", "text_file")
METRICS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}  # and what computes them
TRUNCATIONS = ("none", "right")
FILES = ("pairs_file", "text_file", "validation_file", "test_file", "predict_file")
MAYBE_PATHS = (*FILES, "dataset", "tokenizer")  # from the folder of a plan, or from where a run is started


@dataclass
class Seq2SeqInputs:
    _argument_group_name = "model and data"

    model: str | None = flag(
        None,
        "Folder of a saved model, or its name on the Hub; or, to begin from nothing, a JSON file of a configuration, "
        "or the name of a preset.",
    )
    model_override: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of the configuration to change, as key=value; decoder.key is one of a stack."},
    )
    imports: list[str] = field(default_factory=list, metadata={"help": IMPORT_HELP, "aliases": ["--import"]})
    trust_remote_code: bool = flag(False, "Run the code that comes with a model of an unknown type.")
    tokenizer: str | None = flag(
        None,
        "Of a model that begins from nothing: bpe (trained on the texts to train on), bytes, or a saved one, a folder "
        "or a name on the Hub; None is bpe.",
    )
    vocab_size: int | None = flag(None, "Tokens of a BPE, special ones too; None is what the configuration says.")
    pairs_file: str | None = flag(None, "Table (.jsonl, .csv, .parquet) of sources and targets to train on.")
    dataset: str | None = flag(None, "What datasets.load_dataset reads instead, a path or a name on the Hub.")
    dataset_config: str | None = flag(None, "Configuration of a data set that has several.")
    text_file: str | None = flag(
        None, "Text to pre-train on instead, by span corruption; .zip and .gz are unpacked. UTF-8."
    )
    source_column: str = flag("source", "Column of the sources; translation.en is a field of a column of objects.")
    target_column: str = flag("target", "Column of the targets.")
    source_prefix: str = flag("", "Stands before each source, as in T5: 'translate English to German: '.")
    train_split: str = flag("train", "Part of a data set to train on.")
    validation_split: str | None = flag(None, "Part to validate on; None is validation if there is one, else a share.")
    test_split: str | None = flag(None, "Part to score once at the end; None is test if there is one.")
    validation_file: str | None = flag(None, "File of the same kind to evaluate on, in place of a held-out share.")
    validation_share: float = flag(0.1, "Share of the data that is held out: rows, or the end of a text.")
    split_seed: int = flag(0, "Seed of which rows are held out.")
    test_file: str | None = flag(None, "File of the same kind that is scored once, at the end.")
    predict_file: str | None = flag(
        None, "Table of sources, with or without targets, to write targets for at the end."
    )
    max_source_length: int | None = flag(None, "Tokens of a source at most; None is the length of the model's tables.")
    max_target_length: int | None = flag(
        None, "Tokens of a target at most; None is the length of the tables, and of span corruption what it takes."
    )
    truncation: str = flag("none", "Of texts that are too long: none (an error) or right (drop the end).")
    noise_density: float | None = flag(None, "Share of the tokens that span corruption takes out; None is 0.15.")
    mean_span_length: float | None = flag(
        None, "Mean number of tokens of a span; None is 20 for bytes, as ByT5 has it, else 3, as T5 does."
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "What else than exact match scores written texts: bleu, chrf, rouge."},
    )
    length_penalty: float | None = flag(None, "Of beams: above 0 longer texts gain; None is that of the model.")
    search_steps: int | None = flag(
        None, "Try four learning rates around the default for so many steps each, and take the best on held-out data."
    )
    cache_dir: str | None = flag(None, "Folder for what `evaluate` writes; None is its default.")


@dataclass
class Seq2SeqDefaults(FinetuningDefaults):
    output_dir: str = flag("runs/seq2seq", "Folder of the results.")
    predict_with_generate: bool = flag(
        False, "Score what the model writes in each evaluation, too; at the end it is scored anyway."
    )
    generation_max_length: int | None = flag(
        None, "Tokens to write at most, with the one that the decoder begins with; None is what fits."
    )
    generation_num_beams: int | None = flag(None, "Beams to write with; None is those of the model, or else 1.")


GROUPS = (Seq2SeqInputs, Seq2SeqDefaults)


def seq2seq_problems(inputs: Seq2SeqInputs) -> list[str]:
    """What is wrong with the flags of the model and the data by themselves."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(inputs, name)!r}")

    given = [name for name in SOURCES if getattr(inputs, name) is not None]
    check(bool(inputs.model), "model", "given")
    check(len(given) > 0, SOURCES[0], "given, or else --dataset or --text_file")
    for name in given[1:]:
        check(False, name, f"left out with --{given[0]}")
    defaults = Seq2SeqInputs()

    def check_left_out(names: tuple[str, ...], other: str):
        for name in names:
            check(getattr(inputs, name) == getattr(defaults, name), name, f"left out {other}")

    if inputs.dataset is None:
        check_left_out(("dataset_config", "train_split", "validation_split", "test_split"), "without --dataset")
    else:
        check_left_out(("validation_file", "test_file"), "with --dataset, which has splits")
    if inputs.text_file is None:
        check_left_out(("noise_density", "mean_span_length"), "without --text_file")
    else:
        of_pairs = ("source_column", "target_column", "source_prefix", "truncation", "predict_file", "metrics")
        check_left_out((*of_pairs, "split_seed"), "with --text_file")
    if inputs.model and not is_preset(inputs.model, PRESETS):
        check_left_out(("tokenizer",), "with a saved model, which has its own")
    if inputs.tokenizer not in (None, "bpe") or (inputs.model and not is_preset(inputs.model, PRESETS)):
        check_left_out(("vocab_size",), "without --tokenizer bpe")
    for name in FILES:
        path = getattr(inputs, name)
        if path is not None and not Path(path).is_file():
            problems.append(f"--{name} must be a file, got {path!r}{like_path(Path(path))}")
    if inputs.dataset is not None and not Path(inputs.dataset).exists():
        if not re.fullmatch(HUB_NAME, inputs.dataset, re.ASCII):
            problems.append(f"--dataset {inputs.dataset}: no such folder{like_path(Path(inputs.dataset))}")
    check(inputs.source_column != inputs.target_column, "target_column", "another column than --source_column")
    check(inputs.tokenizer != "", "tokenizer", "bpe, bytes, a folder or a name on the Hub")
    check(inputs.cache_dir != "", "cache_dir", "a path")
    check(0 <= inputs.split_seed < 2**32, "split_seed", "in [0, 2**32)")
    check(0 < inputs.validation_share < 1, "validation_share", "in (0, 1)")
    for name, least in (("max_source_length", 2), ("max_target_length", 2), ("vocab_size", 1), ("search_steps", 1)):
        value = getattr(inputs, name)
        check(value is None or value >= least, name, f"at least {least}")
    density, length = inputs.noise_density, inputs.mean_span_length
    check(density is None or 0 < density < 1, "noise_density", "in (0, 1)")
    check(length is None or 1 <= length < math.inf, "mean_span_length", "at least 1 and finite")
    check(inputs.truncation in TRUNCATIONS, "truncation", " or ".join(TRUNCATIONS))
    check(set(inputs.metrics) <= set(METRICS), "metrics", f"among {', '.join(METRICS)}")
    for package in sorted({METRICS[name] for name in inputs.metrics if name in METRICS}):
        if find_spec(package) is None:
            problems.append(f"--metrics {' '.join(inputs.metrics)} needs {package}: pip install {package}")
    try:
        if inputs.model:
            find_model(inputs.model, PRESETS)
    except ValueError as error:
        problems.append(str(error))
    return problems


def read_flags(argv: list[str], description: str = "") -> Seq2SeqInputs:
    """
    The flags of the model and the data, after a look at the names of all others.

    Raises:
        ValueError: a flag is unknown.
    """
    found: argparse.Namespace = make_parser("seq2seq", description, GROUPS).parse_args(argv)
    return pick(Seq2SeqInputs, found)
