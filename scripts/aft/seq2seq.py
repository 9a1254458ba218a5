# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Training of encoder-decoders with `transformers.Seq2SeqTrainer`: what `aft seq2seq` does."""

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import evaluate
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig, Seq2SeqTrainingArguments, set_seed

from aft.atomic_files import write_whole
from aft.bits_per_byte import load_metric
from aft.console import program
from aft.finetuning import sha256, split_text
from aft.finetuning_arguments import FinetuningArguments, parse_dataclasses, training_problems
from aft.finetuning_run import Task, identify_model, prepare, report, split_rows, train_and_evaluate
from aft.finetuning_trainer import check_scores
from aft.folder_lock import locked
from aft.model_configs import stack_limits
from aft.raw_files import file_bytes
from aft.seq2seq_flags import Seq2SeqDefaults, Seq2SeqInputs, read_flags, seq2seq_problems
from aft.seq2seq_models import (
    fit_config,
    fit_generation,
    make_model,
    make_tokenizer,
    read_config,
    sentinel_ids,
)
from aft.seq2seq_trainer import Seq2SeqFinetuningTrainer, log_perplexity
from aft.span_corruption import CorruptedText, SpanCorruption
from aft.text_pairs import EncodedPairs, Pairs, encode_pairs, read_pairs
from aft.text_sources import pieces
from aft.vocabulary import ByteVocabulary, TokenizerVocabulary, is_byte_tokenizer


GENERATED_TEXT = Path(__file__).resolve().parent / "metrics" / "generated_text" / "generated_text.py"
SCORES = {"bleu": ("bleu",), "chrf": ("chrf",), "rouge": ("rouge1", "rouge2", "rougeL")}  # of each of --metrics


@dataclass
class Seq2SeqArguments(Seq2SeqDefaults, FinetuningArguments, Seq2SeqTrainingArguments):
    pass


def parse_arguments(argv: list[str]) -> tuple[Seq2SeqInputs, Seq2SeqArguments]:
    """
    All flags, checked as far as that goes without loading anything.

    Raises:
        ValueError: a flag is unknown or of the wrong type, or one error that lists every value that is not allowed.
    """
    *_, args = parse_dataclasses("seq2seq", argv, Seq2SeqInputs, Seq2SeqArguments)
    inputs = read_flags(argv)
    metrics = ["loss", "log_perplexity"]
    if args.predict_with_generate:
        metrics += ["exact_match", *chain.from_iterable(SCORES[name] for name in inputs.metrics if name in SCORES)]
    problems = seq2seq_problems(inputs) + training_problems(inputs, args, tuple(metrics))

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    for name in ("predict_with_generate", "generation_max_length", "generation_num_beams"):
        check(not (inputs.text_file and getattr(args, name)), name, "left out with --text_file")
    check(args.generation_max_length is None or args.generation_max_length >= 2, "generation_max_length", "at least 2")
    check(args.generation_num_beams is None or args.generation_num_beams >= 1, "generation_num_beams", "at least 1")
    if problems:
        raise ValueError("aft seq2seq: " + "; ".join(problems))
    return inputs, args


@dataclass
class Seq2SeqTask(Task):
    """A `Task` of an encoder-decoder, with texts that are scored."""

    text_metric: evaluate.Metric | None = None
    names: tuple[str, ...] = ()
    test: Dataset | None = None

    def make_trainer(self, model: torch.nn.Module, args, processor, callbacks=()) -> Seq2SeqFinetuningTrainer:
        own = {"text_metric": self.text_metric, "names": list(self.names)}
        return Seq2SeqFinetuningTrainer(**self.options(model, args, processor, callbacks), **own)


def check_lengths(inputs: Seq2SeqInputs, config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """
    How many tokens a source and a target may have, None for any number.

    Raises:
        ValueError: a flag says more than the tables of the model have.
    """
    limits = []
    for role, table in zip(("source", "target"), stack_limits(config), strict=True):
        asked = getattr(inputs, f"max_{role}_length")
        if asked is not None and table is not None and asked > table:
            raise ValueError(f"--max_{role}_length must be at most the tables of the model, {table}, got {asked}")
        limits.append(table if asked is None else asked)
    return tuple(limits)


@dataclass
class Data:
    """
    Attributes:
        tokenizer: of sources and targets.
        parts: those to train on, to validate on, and maybe to test and to predict.
        identity: what identifies the texts.
        limit: how many tokens a target may have, None for any number.
        longest: how many the longest has that is trained.
    """

    tokenizer: object
    parts: dict[str, Dataset]
    identity: dict
    limit: int | None
    longest: int


def split_pairs(inputs: Seq2SeqInputs) -> dict[str, Pairs]:
    """The pairs of each part, of which validation is a share of those to train on where there is no other."""
    pairs = read_pairs(inputs)
    if "validation" not in pairs:
        rows = split_rows(len(pairs["train"]), inputs.validation_share, inputs.split_seed)
        pairs["train"], pairs["validation"] = map(pairs["train"].select, rows)
    return pairs


def pair_data(inputs: Seq2SeqInputs, config: PreTrainedConfig) -> Data:
    """Pairs of texts as token ids."""
    limits = check_lengths(inputs, config)
    pairs = split_pairs(inputs)
    tokenizer = make_tokenizer(inputs, config, texts_of(pairs["train"], inputs.source_prefix))
    fit_config(config, tokenizer, inputs)
    encoded = {
        part: encode_pairs(found, tokenizer, inputs.source_prefix, inputs.truncation, limits)
        for part, found in pairs.items()
    }
    identity = {part: pairs[part].sha256() for part in ("train", "validation")}
    return Data(tokenizer, encoded, identity, limits[1], max(map(len, encoded["train"].targets)))


def texts_of(pairs: Pairs, prefix: str) -> Iterator[list[str]]:
    """The texts of pairs."""
    yield [prefix + text for text in pairs.sources]
    yield pairs.targets


def read_text(path: str, flag: str) -> bytes:
    """
    The content of a text.

    Raises:
        ValueError: it is not UTF-8.
    """
    content = file_bytes(path)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--{flag} {path}: must be UTF-8, and is not at byte {error.start}") from None
    return content


def split_texts(inputs: Seq2SeqInputs) -> dict[str, bytes]:
    """The text of each part, of which validation is the end of that to train on where there is no other."""
    flags = {"train": "text_file", "validation": "validation_file", "test": "test_file"}
    texts = {part: read_text(path, flag) for part, flag in flags.items() if (path := getattr(inputs, flag))}
    if "validation" not in texts:
        texts["train"], texts["validation"] = split_text(texts["train"], inputs.validation_share)
    return texts


def identify_data(inputs: Seq2SeqInputs) -> dict[str, str]:
    """The sha256 of the pairs or the text of each part."""
    if inputs.text_file:
        return {part: sha256(text) for part, text in split_texts(inputs).items()}
    return {part: pairs.sha256() for part, pairs in split_pairs(inputs).items()}


def identify_tokenizer(tokenizer) -> str:
    """The sha256 of its vocabulary."""
    return sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())


def token_ids(content: bytes, tokenizer, name: str) -> np.ndarray:
    """
    The ids of the tokens of a text [N], without special ones.

    Raises:
        ValueError: there are not two tokens, or the tokenizer is not fast; begins with `name`.
    """
    vocabulary = ByteVocabulary() if is_byte_tokenizer(tokenizer) else TokenizerVocabulary(tokenizer, name)
    parts = [ids for ids, _ in vocabulary.encode(list(pieces(content.decode("utf-8"))))]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    if len(ids) < 2:
        raise ValueError(f"{name}: must have at least 2 tokens, got {len(ids)}")
    return ids


def corrupted_data(inputs: Seq2SeqInputs, config: PreTrainedConfig, seed: int) -> Data:
    """Windows of a text, with spans taken out."""
    source_limit, target_limit = check_lengths(inputs, config)
    if source_limit is None:
        raise ValueError("--max_source_length must be given for a model without tables of positions, got None")
    texts = split_texts(inputs)
    tokenizer = make_tokenizer(inputs, config, ([piece] for piece in pieces(texts["train"].decode("utf-8"))))
    fit_config(config, tokenizer, inputs)
    mean = inputs.mean_span_length or (20.0 if is_byte_tokenizer(tokenizer) else 3.0)
    density = inputs.noise_density or 0.15
    sentinels = sentinel_ids(tokenizer, f"--model {inputs.model}")
    corruption = SpanCorruption(density, mean, sentinels, tokenizer.eos_token_id)
    length = corruption.raw_length(source_limit)
    needed = corruption.sizes(length)[1]
    if target_limit is not None and needed > target_limit:
        raise ValueError(
            f"--max_target_length must be at least {needed} for sources of {source_limit} tokens, got {target_limit}"
        )
    parts = {
        part: CorruptedText(token_ids(content, tokenizer, f"the {part} part of the text"), corruption, length, seed)
        for part, content in texts.items()
    }
    return Data(tokenizer, parts, {part: sha256(texts[part]) for part in texts}, target_limit, needed)


def make_task(inputs: Seq2SeqInputs, args: Seq2SeqArguments) -> tuple[Seq2SeqTask, Data]:
    """The model, and its sources and targets."""
    config = read_config(inputs)
    data = corrupted_data(inputs, config, args.seed) if inputs.text_file else pair_data(inputs, config)
    with args.main_process_first(desc="loading a metric"):
        metric = load_metric(GENERATED_TEXT, inputs.cache_dir)
    set_seed(args.seed)  # the initial weights
    model, new = make_model(inputs, config)
    fit_generation(model, data.tokenizer, inputs, args, data.limit, data.longest)
    identity = {"data": data.identity, "tokenizer": identify_tokenizer(data.tokenizer)}
    task = Seq2SeqTask(
        model=model,
        train=data.parts["train"],
        validation=data.parts["validation"],
        collator=DataCollatorForSeq2Seq(data.tokenizer, model=model),
        compute_metrics=log_perplexity,
        identity=identity | identify_model(model, new),
        prediction=data.parts.get("predict"),
        text_metric=metric,
        names=tuple(inputs.metrics),
        test=data.parts.get("test"),
    )
    if args.process_index == 0:
        print(describe_task(task), flush=True)
    return task, data


def describe_task(task: Seq2SeqTask) -> str:
    parts = {"to train on": task.train, "held out": task.validation, "to test": task.test}
    counts = ", ".join(f"{len(rows):,} {purpose}" for purpose, rows in parts.items() if rows is not None)
    what = "pairs" if isinstance(task.train, EncodedPairs) else "windows of text"
    model = task.model
    return f"{what}: {counts}; a vocabulary of {model.config.vocab_size:,}; {model.num_parameters():,} parameters"


def write_predictions(path: Path, pairs: Pairs, texts: Iterable[str]) -> None:
    """One JSON object per source: source, prediction and, where there is one, target."""
    lines = []
    for row, text in enumerate(texts):
        line = {"source": pairs.sources[row], "prediction": text}
        if pairs.targets is not None:
            line["target"] = pairs.targets[row]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def next_command(inputs: Seq2SeqInputs, folder: str) -> str:
    """What to type when a run has ended."""
    lines = [f"model: {folder}"]
    if not inputs.text_file:
        prompt = shlex.quote(f"{inputs.source_prefix}a text")
        lines += ["next:", f"  {program()} generate --model {shlex.quote(folder)} --greedy --prompt {prompt}"]
    return "\n".join(lines)


def seq2seq(argv: list[str]) -> dict[str, float]:
    """
    Runs with the flags of `aft seq2seq`; returns all metrics.

    Raises:
        ValueError: a flag, the data or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    inputs, args = parse_arguments(argv)
    prepare(inputs, args)
    task, data = make_task(inputs, args)
    with locked(Path(args.output_dir), active=args.process_index == 0):
        trainer, metrics = train_and_evaluate(task, inputs, args, data.tokenizer)
        for part, rows in (("test", task.test), ("predict", task.prediction)):
            if rows is None:
                continue
            output = trainer.predict(rows, metric_key_prefix=part)
            report(trainer, metrics, part, check_scores(output.metrics), rows)
            if part == "predict" and args.process_index == 0:
                texts = trainer.decode(trainer.written(output.predictions))
                write_predictions(Path(args.output_dir) / "predictions.jsonl", rows.pairs, texts)
        if args.trains and args.process_index == 0:
            print(next_command(inputs, args.output_dir), flush=True)
    return metrics
