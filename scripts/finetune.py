# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Fine-tunes a saved model with `transformers.Trainer`, as a language model or as a classifier of texts.

    python scripts/finetune.py --model runs/tiny --text_file notes.txt --output_dir runs/notes
    python scripts/finetune.py --model runs/tiny --labelled_file mails.csv --predict_file new.csv
    accelerate launch scripts/finetune.py --model runs/tiny --text_file notes.txt --resume_from_checkpoint auto

--text_file: any bytes for a model of bytes, else UTF-8 text for the model's own tokenizer. It is cut into windows of
--max_length tokens that overlap by one, so that every token but the first is predicted once.
--labelled_file: .csv or .jsonl with a column of texts and one of labels, strings or integers. The model gets a new
head, with the names of the labels in its config; one that is a classifier already goes on with the labels it has.

Every flag of TrainingArguments is a flag here. By default each epoch ends with an evaluation and a checkpoint, and the
best checkpoint becomes the result; --num_train_epochs 0 only evaluates and predicts. Without --validation_file a share
of the data is held out: the end of a text, or rows that --split_seed draws. bits_per_byte is exact, loss the mean over
batches that Trainer makes. output_dir gets the model with its code and tokenizer, checkpoints, the results as JSON
files, and with --predict_file predictions.jsonl: text, label (the likeliest) and scores (of all labels) per row.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bpb_evaluation import METRIC as BITS_PER_BYTE
from byte_data import file_bytes
from console import any_text, run_program
from datasets.exceptions import DatasetsError
from finetuning_arguments import FinetuningArguments, InputArguments, find_checkpoint, parse_arguments
from pretraining_arguments import has_length_limit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    default_data_collator,
    set_seed,
)
from whole_files import write_whole

from modeling_aft import ByteTokenizer


CLASSIFICATION = Path(__file__).resolve().parent / "metrics" / "classification" / "classification.py"
LOADERS = {".csv": "csv", ".jsonl": "json"}  # of `datasets`, by the suffix of the file


def load_config_and_tokenizer(inputs: InputArguments):
    """
    What `--model` is, without its weights.

    Raises:
        ValueError: it cannot be loaded, or `--max_length` is more than it can take.
    """
    try:
        config, tokenizer = (
            auto_class.from_pretrained(inputs.model, trust_remote_code=inputs.trust_remote_code)
            for auto_class in (AutoConfig, AutoTokenizer)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {inputs.model}: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--model {inputs.model}: its vocab_size must be at least that of its tokenizer, {len(tokenizer)}, got "
            f"{config.vocab_size}"
        )
    if has_length_limit(config) and (inputs.max_length or 0) > config.max_position_embeddings:
        raise ValueError(
            f"--max_length must be at most max_position_embeddings ({config.max_position_embeddings}), "
            f"got {inputs.max_length}"
        )
    return config, tokenizer


@dataclass
class Task:
    """What one of the two modes gives to Trainer."""

    model: torch.nn.Module
    train: torch.utils.data.Dataset | datasets.Dataset
    validation: torch.utils.data.Dataset | datasets.Dataset
    collator: Callable
    compute_metrics: Callable
    reduce_logits: Callable | None = None  # of a batch, to what compute_metrics needs of them
    prediction: datasets.Dataset | None = None
    prediction_texts: list[str] | None = None


def load_metric(path: Path, args: FinetuningArguments) -> evaluate.Metric:
    with args.main_process_first(desc="loading a metric"):
        return evaluate.load(str(path), keep_in_memory=True)


# Language model


class TokenWindows(torch.utils.data.Dataset):
    """
    Windows of `length` tokens that overlap by one. A model predicts all tokens of a window but the first, so each of
    the text but its first is predicted once. The last window ends with the text, and its labels are -100 where it
    repeats an earlier one.
    """

    def __init__(self, ids: np.ndarray, length: int):
        self.ids, self.length = ids, min(length, len(ids))

    def __len__(self) -> int:
        return -(-(len(self.ids) - 1) // (self.length - 1))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * (self.length - 1)
        start = min(first, len(self.ids) - self.length)
        window = self.ids[start : start + self.length].astype(np.int64)
        labels = window.copy()
        labels[: first - start + 1] = -100
        return {"input_ids": window, "labels": labels}


def split_text(content: bytes, share: float) -> tuple[bytes, bytes]:
    """The beginning and, as its last `share`, the end; they do not part the bytes of a UTF-8 character."""
    cut = len(content) - int(len(content) * share)
    while cut < len(content) and content[cut] & 0b11000000 == 0b10000000:
        cut += 1
    return content[:cut], content[cut:]


def encode_text(content: bytes, tokenizer, name: str) -> tuple[np.ndarray, int]:
    """
    Token ids [N] of a text, and how many of its bytes come after the first token.

    Raises:
        ValueError: there are no two tokens, or the tokenizer needs UTF-8 and this is none.
    """
    if isinstance(tokenizer, ByteTokenizer):
        ids, first_bytes = np.frombuffer(content, dtype=np.uint8), 1
    else:
        try:
            lines = content.decode("utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: must be UTF-8 for the tokenizer of this model: {error}") from error
        encodings = tokenizer(lines, add_special_tokens=False).encodings if lines else []
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.int64)
        first_bytes = 0
        for line, encoding in zip(lines, encodings, strict=True):
            end = encoding.offsets[0][1] if encoding.ids else None
            first_bytes += len(line[:end].encode("utf-8"))
            if encoding.ids:
                break
    if len(ids) < 2:
        raise ValueError(f"{name}: must have at least 2 tokens, got {len(ids)}")
    return ids, len(content) - first_bytes


def sum_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row, the nats of all labels that count: logits [B, T, V] and labels [B, T] to [B]."""
    return F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="none").sum(1)


def language_model_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The causal language model, and the windows of `--text_file` and of what validates it."""
    length = inputs.max_length or getattr(config, "max_position_embeddings", None)
    if length is None:
        raise ValueError("--max_length must be given for a model without max_position_embeddings, got None")
    name = f"--text_file {inputs.text_file}"
    content = file_bytes(inputs.text_file)
    if inputs.validation_file:
        held_out, held_out_name = file_bytes(inputs.validation_file), f"--validation_file {inputs.validation_file}"
    else:
        content, held_out = split_text(content, inputs.validation_share)
        held_out_name = f"the last --validation_share {inputs.validation_share} of {name}"
    ids, _ = encode_text(content, tokenizer, name)
    held_out_ids, bytes_scored = encode_text(held_out, tokenizer, held_out_name)
    metric = load_metric(BITS_PER_BYTE, args)

    def compute_metrics(output) -> dict[str, float]:
        return metric.compute(nats=[math.fsum(output.predictions)], byte_counts=[bytes_scored])

    return Task(
        model=AutoModelForCausalLM.from_pretrained(
            inputs.model, dtype=torch.float32, trust_remote_code=inputs.trust_remote_code
        ),
        train=TokenWindows(ids, length),
        validation=TokenWindows(held_out_ids, length),
        collator=default_data_collator,
        compute_metrics=compute_metrics,
        reduce_logits=sum_nats,
    )


# Classifier


def read_table(flag_name: str, inputs: InputArguments, args: FinetuningArguments) -> datasets.Dataset:
    """
    The file that a flag names, with its texts in the column "text" and its labels, as strings, in "label". Only
    `--predict_file` may be without labels.

    Raises:
        ValueError: it is not readable or empty, lacks a column, or has something else than texts and labels there.
    """
    path = Path(getattr(inputs, flag_name))
    name = f"--{flag_name} {path}"
    if path.suffix not in LOADERS:
        raise ValueError(f"{name}: must end in {' or '.join(LOADERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: must have at least one row, is empty")
    columns = {inputs.text_column: "text", inputs.label_column: "label"}
    # What stands in a csv file is what is meant: neither "null" nor "007" is anything else.
    options = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)} if path.suffix == ".csv" else {}
    try:
        with args.main_process_first(desc="reading a table"):
            rows = datasets.load_dataset(
                LOADERS[path.suffix], data_files=str(path), split="train", cache_dir=inputs.cache_dir, **options
            )
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"{name}: no {path.suffix} table with rows: {error.__cause__ or error}") from error
    if inputs.label_column not in rows.column_names and flag_name == "predict_file":
        del columns[inputs.label_column]
    for column, role in columns.items():
        if column not in rows.column_names:
            found = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"{name}: no column {column!r}, only {found}; --{role}_column says which to take")
        kind = str(getattr(rows.features[column], "dtype", rows.features[column]))
        if not re.fullmatch(r"(large_)?string" if role == "text" else r"(large_)?string|u?int\d+", kind):
            allowed = "strings" if role == "text" else "strings or integers"
            raise ValueError(f"{name}: column {column!r} must have {allowed}, has {kind}")
        for row, value in enumerate(rows[column], start=1):
            if value is None or value == "":
                raise ValueError(f"{name}: column {column!r} must not be empty, got {value!r} in row {row}")
    rows = rows.select_columns(list(columns)).rename_columns(columns)
    return rows.cast(datasets.Features(dict.fromkeys(rows.column_names, datasets.Value("string"))))


def label_names(labels: list[str], config, inputs: InputArguments) -> list[str]:
    """
    The names of the classes: those of the model if it is a classifier already, else all labels there are, in order.

    Raises:
        ValueError: there is only one.
    """
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return [config.id2label[index] for index in range(config.num_labels)]
    found = sorted(set(labels))
    if len(found) < 2:
        raise ValueError(
            f"--labelled_file {inputs.labelled_file}: column {inputs.label_column!r} must have at least 2 labels, has "
            f"{found}"
        )
    return sorted(found, key=int) if all(re.fullmatch(r"-?\d+", name) for name in found) else found


def encode_table(rows: datasets.Dataset, name: str, label2id: dict[str, int], tokenizer, truncation: str, limit):
    """
    Token ids, attention mask and, where there are labels, the class of every row.

    Raises:
        ValueError: a label is unknown, or a row has no tokens, or more than `limit` and `truncation` is "none".
    """

    def encode(batch, indices):
        cut = {"truncation": True, "max_length": limit} if limit and truncation != "none" else {}
        encoded = {**tokenizer(batch["text"], **cut)}
        for index, ids in zip(indices, encoded["input_ids"], strict=True):
            if not ids or len(ids) > (limit or len(ids)):
                raise ValueError(
                    f"{name}: row {index + 1} has {len(ids)} tokens; allowed: 1 to {limit or 'any number'} "
                    "(--max_length, at most the max_position_embeddings of the model), or --truncation right or left"
                )
        if "label" in batch:
            for index, label in zip(indices, batch["label"], strict=True):
                if label not in label2id:
                    raise ValueError(f"{name}: unknown label {label!r} in row {index + 1}; known: {list(label2id)}")
            encoded["labels"] = [label2id[label] for label in batch["label"]]
        return encoded

    tokenizer.truncation_side = "left" if truncation == "left" else "right"
    return rows.map(encode, with_indices=True, batched=True, remove_columns=rows.column_names)


def classifier_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The classifier, and the rows of `--labelled_file`, of what validates it, and of `--predict_file`."""
    if tokenizer.pad_token is None:
        raise ValueError(f"--model {inputs.model}: its tokenizer must have a padding token to make batches of rows")
    flag_names = ("labelled_file", "validation_file", "predict_file")
    tables = {name: read_table(name, inputs, args) for name in flag_names if getattr(inputs, name)}
    names = label_names(tables["labelled_file"]["label"], config, inputs)
    label2id = {name: index for index, name in enumerate(names)}
    limit = inputs.max_length or (config.max_position_embeddings if has_length_limit(config) else None)
    encoded = {}
    for flag_name, rows in tables.items():
        name = f"--{flag_name} {getattr(inputs, flag_name)}"
        with args.main_process_first(desc="encoding a table"):
            encoded[flag_name] = encode_table(rows, name, label2id, tokenizer, inputs.truncation, limit)
    train, validation = encoded["labelled_file"], encoded.get("validation_file")
    if validation is None:
        held_out = int(len(train) * inputs.validation_share)
        if held_out == 0:
            raise ValueError(f"--validation_share {inputs.validation_share} of {len(train)} rows is not a single one")
        train, validation = train.train_test_split(held_out, seed=inputs.split_seed).values()
    metric = load_metric(CLASSIFICATION, args)

    def compute_metrics(output) -> dict[str, float]:
        return metric.compute(predictions=output.predictions.argmax(-1), references=output.label_ids)

    return Task(
        model=AutoModelForSequenceClassification.from_pretrained(
            inputs.model,
            id2label=dict(enumerate(names)),
            label2id=label2id,
            problem_type="single_label_classification",
            dtype=torch.float32,
            trust_remote_code=inputs.trust_remote_code,
        ),
        train=train,
        validation=validation,
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        prediction=encoded.get("predict_file"),
        prediction_texts=tables["predict_file"]["text"] if inputs.predict_file else None,
    )


def write_predictions(path: Path, texts: list[str], logits: np.ndarray, names: dict[int, str]) -> None:
    """One JSON object per text: the text, the likeliest label, and the score of every label."""
    lines = []
    for text, scores in zip(texts, torch.from_numpy(logits).double().softmax(-1), strict=True):
        named = {names[index]: score for index, score in enumerate(scores.tolist())}
        line = {"text": text, "label": names[int(scores.argmax())], "scores": named}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


@any_text()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program with the flags `argv`, those of the command line by default; returns all metrics."""
    inputs, args = parse_arguments(argv)
    checkpoint = find_checkpoint(args)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    config, tokenizer = load_config_and_tokenizer(inputs)
    set_seed(args.seed)  # the initial weights of a new head
    task = (language_model_task if inputs.text_file else classifier_task)(inputs, args, config, tokenizer)
    patience = args.early_stopping_patience
    trainer = Trainer(
        model=task.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator,
        processing_class=tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=[EarlyStoppingCallback(patience, args.early_stopping_threshold)] if patience else [],
    )
    metrics = {}

    def report(part: str, values: dict[str, float]):
        trainer.log_metrics(part, values)
        trainer.save_metrics(part, values)
        metrics.update(values)

    if args.trains:
        report("train", trainer.train(resume_from_checkpoint=checkpoint).metrics)
        task.model.config.use_cache = getattr(config, "use_cache", None)  # which Trainer turned off
        trainer.save_model()
        trainer.save_state()
    report("eval", trainer.evaluate())
    if task.prediction is not None:
        output = trainer.predict(task.prediction, metric_key_prefix="predict")
        report("predict", output.metrics)
        if trainer.is_world_process_zero():
            path = Path(args.output_dir) / "predictions.jsonl"
            write_predictions(path, task.prediction_texts, output.predictions, task.model.config.id2label)
    return metrics


if __name__ == "__main__":
    run_program(main)
