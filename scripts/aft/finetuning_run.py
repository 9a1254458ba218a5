# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A run of Trainer: what it is given, from the first evaluation to the last, and what it writes."""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback

from aft.bits_per_byte import load_metric
from aft.finetuning_arguments import FinetuningArguments, default_learning_rate, describe_run
from aft.finetuning_checkpoints import check_identity, find_checkpoint
from aft.finetuning_trainer import FinetuningTrainer, RunIdentity
from aft.flags import import_files
from aft.learning_rate_search import search_learning_rate
from aft.machine import settle_allocator
from aft.model_configs import changed_fields


# What a result is told by, and its unit.
SCORES = (
    ("bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy"),
    ("log_perplexity", "nats per token of the targets"),
)
CLASSIFICATION = Path(__file__).resolve().parent / "metrics" / "classification" / "classification.py"


@dataclass
class Task:
    """What a program gives to Trainer, and what of its files and its model decides the weights."""

    model: torch.nn.Module
    train: Dataset
    validation: Dataset
    collator: Callable
    compute_metrics: Callable
    identity: dict
    reduce_logits: Callable | None = None  # of a batch, to what compute_metrics needs of them
    prediction: Dataset | None = None

    def make_trainer(self, model: torch.nn.Module, args, processor, callbacks=()) -> FinetuningTrainer:
        """A trainer of a model on what this task has."""
        return FinetuningTrainer(**self.options(model, args, processor, callbacks))

    def options(self, model: torch.nn.Module, args, processor, callbacks) -> dict:
        return {
            "model": model,
            "args": args,
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "data_collator": self.collator,
            "processing_class": processor,
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.reduce_logits,
            "callbacks": [*callbacks],
        }


def identify_model(model: torch.nn.Module, new: set[str]) -> dict:
    """What a model is for the identity of a run, without the tensors that `--seed` decides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in new:
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"model_config": changed_fields(model.config), "model_weights": digest.hexdigest()}


def split_rows(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows to train on, and of those that `--split_seed` draws to validate on."""
    held_out = int(count * share)
    if held_out == 0:
        raise ValueError(f"--validation_share {share} of {count} rows is not a single one")
    order = np.random.default_rng(seed).permutation(count)
    return order[held_out:], order[:held_out]


def accuracy_of_classes(inputs, args: FinetuningArguments) -> Callable:
    """What makes accuracy and macro F1 of the scores of the classes."""
    with args.main_process_first(desc="loading a metric"):
        metric = load_metric(CLASSIFICATION, inputs.cache_dir)

    def compute_metrics(output) -> dict[str, float]:
        return metric.compute(predictions=output.predictions.argmax(-1), references=output.label_ids)

    return compute_metrics


def report(
    trainer: FinetuningTrainer, metrics: dict[str, float], part: str, values: dict[str, float], rows: Dataset
) -> None:
    """Prints and writes the metrics of a part of the run, with the number of its rows, and adds them to all others."""
    values = {**values, f"{part}_samples": len(rows)}
    trainer.log_metrics(part, values)
    trainer.save_metrics(part, values)
    metrics.update(values)


def train_and_evaluate(
    task: Task, inputs, args: FinetuningArguments, processor
) -> tuple[FinetuningTrainer, dict[str, float]]:
    """
    Trains if there is anything to train, writes the model, and evaluates it.

    Args:
        inputs: the other flags of the program, with `search_steps` among them.
        processor: what makes the model's inputs, which is saved with it.

    Returns:
        The trainer, and all metrics.
    """
    settle_allocator()
    use_cache = getattr(task.model.config, "use_cache", None)
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(task.model.num_parameters())
        if inputs.search_steps is not None:
            start = args.learning_rate
            found, losses = search_learning_rate(task, args, start, inputs.search_steps, processor)
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
    trainer = task.make_trainer(task.model, args, processor, callbacks)
    metrics, before = {}, {}
    # A Trainer that has evaluated would not wrap its model for several processes any more.
    if args.trains and checkpoint is None and args.world_size == 1:
        with torch.random.fork_rng():  # as if nothing had been drawn
            before = trainer.predict(task.validation, metric_key_prefix="before").metrics
    if args.trains:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if use_cache is not None:
            task.model.config.use_cache = use_cache  # which Trainer turned off
        else:
            vars(task.model.config).pop("use_cache", None)  # which it added
        trainer.save_result()
        trainer.save_state()
        parameters = {"num_parameters": task.model.num_parameters()}
        report(trainer, metrics, "train", {**result.metrics, **parameters}, task.train)
    report(trainer, metrics, "eval", trainer.evaluate(), task.validation)
    if args.process_index == 0:
        print(describe_gain(before, metrics), flush=True)
    return trainer, metrics


def prepare(inputs, args: FinetuningArguments) -> None:
    """
    What comes before the work: files to import, a look for the checkpoint to go on from, and no bars but Trainer's.

    Raises:
        ValueError: a file does not import, there is no such checkpoint, or another run is in the output folder.
    """
    import_files(inputs.imports)
    find_checkpoint(args)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def pipeline_command(folder: str, example: str) -> str:
    """What to type to try the model in a folder on an input."""
    load = f"print(pipeline(model={folder!r})({example!r}))"
    return f"python -c {shlex.quote(f'import modeling_aft; from transformers import pipeline; {load}')}"


def describe_gain(before: dict[str, float], after: dict[str, float]) -> str:
    """What training has changed on the held-out data, in a line; the score alone if it was not known before."""
    name, unit = next((name, unit) for name, unit in SCORES if f"eval_{name}" in after)
    change = f"{before[f'before_{name}']:.4f} before, " if before else ""
    return f"held out: {change}{after[f'eval_{name}']:.4f} {unit}"
