# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Trainer of `aft seq2seq`: an exact loss for any model, and what the model writes, scored against the texts."""

import math
from functools import partial
from time import perf_counter

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from aft.finetuning_trainer import FinetuningTrainer
from aft.text_pairs import EncodedPairs


IGNORED = -100  # the label of padding


def mean_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, smoothing: float = 0.0) -> torch.Tensor:
    """
    Cross entropy of logits [B, T, V] with the labels [B, T] at their places, for every encoder-decoder: those of the
    library divide by the labels of a part of a step, where Trainer adds up the losses of all parts.

    Args:
        num_items_in_batch: the number of labels of a step; None if only those of this batch are known.
        smoothing: which share of the probability all tokens have in equal parts.
    """
    logits = outputs["logits"].flatten(0, 1).float()
    options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "sum"}
    total = F.cross_entropy(logits, labels.flatten(), **options)
    return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def log_perplexity(output: EvalPrediction) -> dict[str, float]:
    """The nats per token of all targets, of what `Seq2SeqFinetuningTrainer.prediction_step` returns."""
    found = output.predictions
    nats = found[0] if isinstance(found, tuple) else found
    return {"log_perplexity": math.fsum(nats) / int((output.label_ids != IGNORED).sum())}


class Seq2SeqFinetuningTrainer(FinetuningTrainer, Seq2SeqTrainer):
    """
    `FinetuningTrainer` for encoder-decoders. Targets are written for pairs: with the prefixes "test" and "predict"
    always, with "eval" if `args.predict_with_generate`.

    Args:
        text_metric (`evaluate.Metric`): of predictions and references.
        names (`list[str]`): which of its scores to compute.
    """

    def __init__(self, *args, text_metric: evaluate.Metric, names: list[str], **options):
        smoothing = options["args"].label_smoothing_factor
        super().__init__(*args, compute_loss_func=partial(mean_loss, smoothing=smoothing), **options)
        self.text_metric, self.names = text_metric, names
        self.seconds_written = 0.0

    def rates(self, speed: float) -> dict[str, float]:
        tokens = round(speed * self.train_dataset.num_tokens, 1)  # of sources and targets, without padding
        return {**super().rates(speed), "tokens_per_second": tokens}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        watch = self.stopwatch
        if "train_runtime" in logs:
            logs["train_tokens"] = self.train_dataset.num_tokens
            if watch.seconds:
                speed = (watch.epoch - watch.first) / watch.seconds
                logs["train_tokens_per_second"] = self.rates(speed)["tokens_per_second"]
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **options) -> EvalLoopOutput:
        rows, asked = dataloader.dataset, self.args.predict_with_generate
        writes = metric_key_prefix in ("test", "predict") or (asked and metric_key_prefix == "eval")
        self.args.predict_with_generate = writes = writes and isinstance(rows, EncodedPairs)
        self.seconds_written = 0.0
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer keeps rows that fill up a batch
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **options)
        finally:
            self.args.predict_with_generate = asked
        if writes:
            scores = self.score_written(rows, self.written(output.predictions))
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **options):
        """
        Returns:
            The loss, for each row the nats of its target and the tokens that are written (of both only what there is),
            and the labels.
        """
        inputs = self._prepare_inputs(inputs)
        labels, loss, found = inputs.pop("labels", None), None, ()
        if labels is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**inputs)["logits"].float()
            nats = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)  # [B]
            loss, found = nats.sum() / labels.ne(IGNORED).sum(), (nats,)
        if self.args.predict_with_generate:
            sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            before = perf_counter()
            _, tokens, _ = super().prediction_step(model, sources, prediction_loss_only, ignore_keys, **options)
            self.seconds_written += perf_counter() - before
            found = (*found, tokens)
        return loss, found if len(found) > 1 else found[0], labels

    def written(self, predictions) -> np.ndarray:
        """The ids that the decoder wrote, without the one that it began with, padding behind them: int64 [rows, T]."""
        tokens = predictions[-1] if isinstance(predictions, tuple) else predictions
        pad = self.processing_class.pad_token_id
        return np.where(tokens == IGNORED, pad, tokens)[:, 1:]

    def decode(self, tokens: np.ndarray) -> list[str]:
        """The texts of ids [rows, T]."""
        return self.processing_class.batch_decode(tokens, skip_special_tokens=True)

    def score_written(self, rows: EncodedPairs, tokens: np.ndarray) -> dict[str, float | str]:
        """How fast tokens were written and, where there are targets, how good the texts are."""
        count = int((tokens != self.processing_class.pad_token_id).sum())
        scores = {"generated_tokens_per_second": round(count / self.seconds_written, 1)}
        if rows.pairs.targets is None:
            return scores
        found = self.text_metric.compute(
            predictions=self.decode(tokens), references=rows.pairs.targets, names=self.names
        )
        return scores | found
