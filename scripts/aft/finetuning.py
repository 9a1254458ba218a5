# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fine-tuning of a saved model with `transformers.Trainer`: what `aft finetune` does."""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aft.atomic_files import write_whole
from aft.bits_per_byte import METRIC as BITS_PER_BYTE
from aft.bits_per_byte import load_metric
from aft.chats import encode_chats, prepare_tokenizer, read_chats
from aft.console import program
from aft.finetuning_arguments import FinetuningArguments, parse_arguments
from aft.finetuning_flags import InputArguments
from aft.finetuning_run import (
    Task,
    accuracy_of_classes,
    identify_model,
    pipeline_command,
    prepare,
    report,
    split_rows,
    train_and_evaluate,
)
from aft.folder_lock import locked
from aft.labelled_tables import describe_labels, encode_table, read_table
from aft.model_configs import length_limit
from aft.raw_files import file_bytes
from aft.saved_models import check_reads_text, load, load_model
from aft.vocabulary import rows_needed
from modeling_aft import ByteTokenizer


FILES = ("text_file", "labelled_file", "chat_file", "validation_file")  # whose content identifies a run


def load_config_and_tokenizer(inputs: InputArguments):
    """
    What `--model` is, without its weights.

    Raises:
        ValueError: it cannot be loaded, is one of pictures, or `--max_length` is more than it can take.
    """
    check_reads_text(inputs.model)
    config, tokenizer = (
        load(auto_class, inputs.model, trust_remote_code=inputs.trust_remote_code)
        for auto_class in (AutoConfig, AutoTokenizer)
    )
    if (needed := rows_needed(tokenizer, config)) > config.vocab_size:
        raise ValueError(
            f"--model {inputs.model}: its vocab_size must be at least that of its tokenizer, {needed}, got "
            f"{config.vocab_size}"
        )
    if (table := length_limit(config)) is not None and (inputs.max_length or 0) > table:
        raise ValueError(f"--max_length must be at most max_position_embeddings ({table}), got {inputs.max_length}")
    return config, tokenizer


def load_base(auto_class, inputs: InputArguments, **options) -> tuple[torch.nn.Module, dict]:
    """
    The model to begin with, whose head may be new, and what identifies it.

    Raises:
        ValueError: it does not load, or not all of it is there.
    """
    trust = {"trust_remote_code": inputs.trust_remote_code}
    model, new = load_model(auto_class, inputs.model, new_head=True, dtype=torch.float32, **trust, **options)
    return model, identify_model(model, new)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Language model


class TokenWindows(Dataset):
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


def bits_per_byte_of(num_bytes: int, inputs: InputArguments, args: FinetuningArguments) -> Callable:
    """What makes bits per byte of the nats of each row, of held-out text of so many bytes."""
    with args.main_process_first(desc="loading a metric"):
        metric = load_metric(BITS_PER_BYTE, inputs.cache_dir)

    def compute_metrics(output) -> dict[str, float]:
        return metric.compute(nats=[math.fsum(output.predictions)], byte_counts=[num_bytes])

    return compute_metrics


def language_model_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The causal language model, and the windows of `--text_file` and of what validates it."""
    length = inputs.max_length or getattr(config, "max_position_embeddings", None)
    if length is None:
        raise ValueError("--max_length must be given for a model without max_position_embeddings, got None")
    name = f"--text_file {inputs.text_file}"
    content = file_bytes(inputs.text_file)
    identity = {"text_file": sha256(content)}
    if inputs.validation_file:
        held_out, held_out_name = file_bytes(inputs.validation_file), f"--validation_file {inputs.validation_file}"
        identity["validation_file"] = sha256(held_out)
    else:
        content, held_out = split_text(content, inputs.validation_share)
        held_out_name = f"the last --validation_share {inputs.validation_share} of {name}"
    ids, _ = encode_text(content, tokenizer, name)
    held_out_ids, bytes_scored = encode_text(held_out, tokenizer, held_out_name)
    compute_metrics = bits_per_byte_of(bytes_scored, inputs, args)
    model, identity_of_model = load_base(AutoModelForCausalLM, inputs)
    # With smoothing, Trainer computes the loss itself, and shifts the labels of the classes in this table alone.
    if args.label_smoothing_factor > 0 and type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"--label_smoothing_factor must be 0 for {type(model).__name__}, a class that Trainer does not know, got "
            f"{args.label_smoothing_factor}"
        )
    return Task(
        model=model,
        train=TokenWindows(ids, length),
        validation=TokenWindows(held_out_ids, length),
        collator=default_data_collator,
        compute_metrics=compute_metrics,
        identity=identity | identity_of_model,
        reduce_logits=sum_nats,
    )


# Chats


def chat_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The causal language model, and the chats of `--chat_file` and of what validates it."""
    prepare_tokenizer(tokenizer, f"--model {inputs.model}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded has no labels
    limit = inputs.max_length or length_limit(config)
    tables = {
        name: read_chats(Path(path), name)
        for name in ("chat_file", "validation_file")
        if (path := getattr(inputs, name))
    }
    chats = tables["chat_file"].rows
    if "validation_file" not in tables:
        parts = split_rows(len(chats), inputs.validation_share, inputs.split_seed)
        train, held_out = (replace(tables["chat_file"], rows=[chats[index] for index in part]) for part in parts)
    else:
        train, held_out = tables["chat_file"], tables["validation_file"]
    train, validation = (encode_chats(part, tokenizer, inputs.truncation, limit) for part in (train, held_out))
    compute_metrics = bits_per_byte_of(validation.num_bytes, inputs, args)
    model, identity = load_base(AutoModelForCausalLM, inputs)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Task(
        model=model,
        train=train,
        validation=validation,
        collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=compute_metrics,
        identity=identity | {name: table.sha256 for name, table in tables.items()},
        reduce_logits=sum_nats,
    )


# Classifier


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


def classifier_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The classifier, and the rows of `--labelled_file`, of what validates it, and of `--predict_file`."""
    if tokenizer.pad_token is None:
        raise ValueError(f"--model {inputs.model}: its tokenizer must have a padding token to make batches of rows")
    columns = {"text_column": inputs.text_column, "label_column": inputs.label_column}
    tables = {
        flag_name: read_table(Path(path), flag_name, **columns, with_labels=flag_name != "predict_file")
        for flag_name in ("labelled_file", "validation_file", "predict_file")
        if (path := getattr(inputs, flag_name))
    }
    labels = tables["labelled_file"].labels
    names = label_names(labels, config, inputs)
    label2id = {name: index for index, name in enumerate(names)}
    limit = inputs.max_length or length_limit(config)
    rows = {
        flag_name: encode_table(table, label2id, tokenizer, inputs.truncation, limit)
        for flag_name, table in tables.items()
    }
    train, validation = rows["labelled_file"], rows.get("validation_file")
    if validation is None:
        parts = split_rows(len(train), inputs.validation_share, inputs.split_seed)
        train, validation = (Subset(train, part) for part in parts)
    compute_metrics = accuracy_of_classes(inputs, args)
    model, identity = load_base(
        AutoModelForSequenceClassification,
        inputs,
        id2label=dict(enumerate(names)),
        label2id=label2id,
        problem_type="single_label_classification",
    )
    if args.process_index == 0:
        print(describe_labels(labels, names), flush=True)
    return Task(
        model=model,
        train=train,
        validation=validation,
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        identity={**identity, **{name: tables[name].sha256 for name in tables if name != "predict_file"}},
        reduce_logits=only_logits,
        prediction=rows.get("predict_file"),
    )


def only_logits(outputs, labels) -> torch.Tensor:
    """Those of the classes, without what else an encoder-decoder returns."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def write_predictions(path: Path, texts: list[str], logits: np.ndarray, names: dict[int, str]) -> None:
    """One JSON object per text: the text, the likeliest label, and the score of every label."""
    lines = []
    for text, scores in zip(texts, torch.from_numpy(logits).double().softmax(-1), strict=True):
        named = {names[index]: score for index, score in enumerate(scores.tolist())}
        line = {"text": text, "label": names[int(scores.argmax())], "scores": named}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def run(inputs: InputArguments, args: FinetuningArguments, tokenizer, task: Task) -> dict[str, float]:
    """Trains if there is anything to train, evaluates and predicts; returns all metrics."""
    task.identity = {**dict.fromkeys(FILES), **task.identity}
    trainer, metrics = train_and_evaluate(task, inputs, args, tokenizer)
    if task.prediction is not None:
        output = trainer.predict(task.prediction, metric_key_prefix="predict")
        if not np.isfinite(output.predictions).all():
            raise FloatingPointError(f"--predict_file {inputs.predict_file}: the model computes no numbers for it")
        report(trainer, metrics, "predict", output.metrics, task.prediction)
        if trainer.is_world_process_zero():
            path = Path(args.output_dir) / "predictions.jsonl"
            write_predictions(path, task.prediction.texts, output.predictions, task.model.config.id2label)
    if args.trains and args.process_index == 0:
        print(next_command(inputs, args), flush=True)
    return metrics


def next_command(inputs: InputArguments, args: FinetuningArguments) -> str:
    """What to type when a run has ended."""
    if inputs.labelled_file:
        command = pipeline_command(args.output_dir, "a text")
    else:
        how = "--chat" if inputs.chat_file else '--prompt "The "'
        command = f"{program()} generate --model {shlex.quote(args.output_dir)} {how}"
    return f"model: {args.output_dir}\nnext:\n  {command}"


def finetune(argv: list[str]) -> dict[str, float]:
    """
    Runs with the flags of `aft finetune`; returns all metrics.

    Raises:
        ValueError: a flag, a file or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    inputs, args = parse_arguments(argv)
    prepare(inputs, args)
    config, tokenizer = load_config_and_tokenizer(inputs)
    set_seed(args.seed)  # the initial weights of a new head
    make_task = language_model_task if inputs.text_file else chat_task if inputs.chat_file else classifier_task
    task = make_task(inputs, args, config, tokenizer)
    with locked(Path(args.output_dir), active=args.process_index == 0):
        return run(inputs, args, tokenizer, task)
