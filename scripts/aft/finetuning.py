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
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    default_data_collator,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aft.atomic_files import write_whole
from aft.bits_per_byte import METRIC as BITS_PER_BYTE
from aft.bits_per_byte import load_metric
from aft.chats import encode_chats, prepare_tokenizer, read_chats
from aft.finetuning_arguments import FinetuningArguments, default_learning_rate, describe_run, parse_arguments
from aft.finetuning_checkpoints import check_identity, find_checkpoint
from aft.finetuning_flags import InputArguments
from aft.finetuning_trainer import FinetuningTrainer, RunIdentity
from aft.flags import import_files
from aft.folder_lock import locked
from aft.labelled_tables import EncodedRows, describe_labels, encode_table, read_table
from aft.learning_rate_search import search_learning_rate
from aft.model_configs import has_length_limit
from aft.raw_files import file_bytes
from aft.saved_models import load, load_model
from aft.vocabulary import rows_needed
from modeling_aft import ByteTokenizer


SCORES = (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"))  # what a result is told by, and its unit
CLASSIFICATION = Path(__file__).resolve().parent / "metrics" / "classification" / "classification.py"


def load_config_and_tokenizer(inputs: InputArguments):
    """
    What `--model` is, without its weights.

    Raises:
        ValueError: it cannot be loaded, or `--max_length` is more than it can take.
    """
    config, tokenizer = (
        load(auto_class, inputs.model, trust_remote_code=inputs.trust_remote_code)
        for auto_class in (AutoConfig, AutoTokenizer)
    )
    if (needed := rows_needed(tokenizer, config)) > config.vocab_size:
        raise ValueError(
            f"--model {inputs.model}: its vocab_size must be at least that of its tokenizer, {needed}, got "
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
    """What one of the modes gives to Trainer, and what of its files and its model decides the weights."""

    model: torch.nn.Module
    train: Dataset
    validation: Dataset
    collator: Callable
    compute_metrics: Callable
    identity: dict
    reduce_logits: Callable | None = None  # of a batch, to what compute_metrics needs of them
    prediction: EncodedRows | None = None

    def make_trainer(self, model: torch.nn.Module, args, tokenizer, callbacks=()) -> FinetuningTrainer:
        """A trainer of a model on what this task has."""
        return FinetuningTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=self.collator,
            processing_class=tokenizer,
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.reduce_logits,
            callbacks=[*callbacks],
        )


def load_base(auto_class, inputs: InputArguments, **options) -> tuple[torch.nn.Module, dict]:
    """
    The model to begin with, whose head may be new, and what identifies it.

    Raises:
        ValueError: it does not load, or not all of it is there.
    """
    trust = {"trust_remote_code": inputs.trust_remote_code}
    model, new = load_model(auto_class, inputs.model, new_head=True, dtype=torch.float32, **trust, **options)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in new:  # which --seed decides
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    config = model.config.to_diff_dict()
    config.pop("transformers_version", None)
    return model, {"model_config": config, "model_weights": digest.hexdigest()}


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


def split_rows(rows: Dataset, inputs: InputArguments) -> tuple[Dataset, Dataset]:
    """Those to train on, and those that `--split_seed` draws to validate on."""
    held_out = int(len(rows) * inputs.validation_share)
    if held_out == 0:
        raise ValueError(f"--validation_share {inputs.validation_share} of {len(rows)} rows is not a single one")
    order = np.random.default_rng(inputs.split_seed).permutation(len(rows))
    return Subset(rows, order[held_out:]), Subset(rows, order[:held_out])


def chat_task(inputs: InputArguments, args: FinetuningArguments, config, tokenizer) -> Task:
    """The causal language model, and the chats of `--chat_file` and of what validates it."""
    prepare_tokenizer(tokenizer, f"--model {inputs.model}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded has no labels
    limit = inputs.max_length or (config.max_position_embeddings if has_length_limit(config) else None)
    tables = {
        name: read_chats(Path(path), name)
        for name in ("chat_file", "validation_file")
        if (path := getattr(inputs, name))
    }
    chats = tables["chat_file"].rows
    if "validation_file" not in tables:
        parts = split_rows(range(len(chats)), inputs)
        train, held_out = (
            replace(tables["chat_file"], rows=[chats[index] for index in part.indices]) for part in parts
        )
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
    limit = inputs.max_length or (config.max_position_embeddings if has_length_limit(config) else None)
    rows = {
        flag_name: encode_table(table, label2id, tokenizer, inputs.truncation, limit)
        for flag_name, table in tables.items()
    }
    train, validation = rows["labelled_file"], rows.get("validation_file")
    if validation is None:
        train, validation = split_rows(train, inputs)
    with args.main_process_first(desc="loading a metric"):
        metric = load_metric(CLASSIFICATION, inputs.cache_dir)

    def compute_metrics(output) -> dict[str, float]:
        return metric.compute(predictions=output.predictions.argmax(-1), references=output.label_ids)

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
        prediction=rows.get("predict_file"),
    )


def write_predictions(path: Path, texts: list[str], logits: np.ndarray, names: dict[int, str]) -> None:
    """One JSON object per text: the text, the likeliest label, and the score of every label."""
    lines = []
    for text, scores in zip(texts, torch.from_numpy(logits).double().softmax(-1), strict=True):
        named = {names[index]: score for index, score in enumerate(scores.tolist())}
        line = {"text": text, "label": names[int(scores.argmax())], "scores": named}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def run(inputs: InputArguments, args: FinetuningArguments, config, tokenizer, task: Task) -> dict[str, float]:
    """Trains if there is anything to train, evaluates and predicts; returns all metrics."""
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(task.model.num_parameters())
        if inputs.search_steps is not None:
            start = args.learning_rate
            found, losses = search_learning_rate(task, args, start, inputs.search_steps, tokenizer)
            tried = ", ".join(f"{rate:.1e}: {loss:.4f}" for rate, loss in losses.items())
            print(f"learning rate {found:.1e}, by the loss after {inputs.search_steps} steps ({tried})", flush=True)
            args.learning_rate = found
    checkpoint = find_checkpoint(args, verify=True)  # once more: what ran here may have ended meanwhile
    identity = describe_run(inputs, args, task.identity)
    if checkpoint is not None:
        check_identity(Path(checkpoint), identity)
    patience = args.early_stopping_patience
    callbacks = [RunIdentity(identity)]
    if patience:
        callbacks.append(EarlyStoppingCallback(patience, args.early_stopping_threshold))
    trainer = task.make_trainer(task.model, args, tokenizer, callbacks)
    metrics, before = {}, {}

    def report(part: str, values: dict[str, float]):
        trainer.log_metrics(part, values)
        trainer.save_metrics(part, values)
        metrics.update(values)

    # A Trainer that has evaluated would not wrap its model for several processes any more.
    if args.trains and checkpoint is None and args.world_size == 1:
        with torch.random.fork_rng():  # as if nothing had been drawn
            before = trainer.predict(task.validation, metric_key_prefix="before").metrics
    if args.trains:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        task.model.config.use_cache = getattr(config, "use_cache", None)  # which Trainer turned off
        trainer.save_result()
        trainer.save_state()
        report("train", result.metrics)
    report("eval", trainer.evaluate())
    if args.process_index == 0:
        print(describe_gain(before, metrics), flush=True)
    if task.prediction is not None:
        output = trainer.predict(task.prediction, metric_key_prefix="predict")
        if not np.isfinite(output.predictions).all():
            raise FloatingPointError(f"--predict_file {inputs.predict_file}: the model computes no numbers for it")
        report("predict", output.metrics)
        if trainer.is_world_process_zero():
            path = Path(args.output_dir) / "predictions.jsonl"
            write_predictions(path, task.prediction.texts, output.predictions, task.model.config.id2label)
    return metrics


def describe_gain(before: dict[str, float], after: dict[str, float]) -> str:
    """What training has changed on the held-out data, in a line; the score alone if it was not known before."""
    name, unit = next((name, unit) for name, unit in SCORES if f"eval_{name}" in after)
    change = f"{before[f'before_{name}']:.4f} before, " if before else ""
    return f"held out: {change}{after[f'eval_{name}']:.4f} {unit}"


def finetune(argv: list[str]) -> dict[str, float]:
    """
    Runs with the flags of `aft finetune`; returns all metrics.

    Raises:
        ValueError: a flag, a file or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    inputs, args = parse_arguments(argv)
    import_files(inputs.imports)
    find_checkpoint(args)  # before the work
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    config, tokenizer = load_config_and_tokenizer(inputs)
    set_seed(args.seed)  # the initial weights of a new head
    make_task = language_model_task if inputs.text_file else chat_task if inputs.chat_file else classifier_task
    task = make_task(inputs, args, config, tokenizer)
    with locked(Path(args.output_dir), active=args.process_index == 0):
        return run(inputs, args, config, tokenizer, task)
