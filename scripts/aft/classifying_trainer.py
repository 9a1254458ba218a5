# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Trainer of `aft classify`: soft targets, weight decay for matrices alone, an average of the weights."""

import contextlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from aft.averaging import WeightAverage
from aft.finetuning_checkpoints import step_of
from aft.finetuning_trainer import FinetuningTrainer
from aft.image_training import RepeatedSampler


UNDECAYED = re.compile("bias|position|token")  # among the parameters that are matrices
TRAINED = "trained.safetensors"  # of a checkpoint whose model is the average: what training goes on with


class AfterEachStep(TrainerCallback):
    """Lets the average of the weights take in those of the step that is over."""

    def __init__(self, trainer: "ClassifyingTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update()


class ClassifyingTrainer(FinetuningTrainer):
    """
    `FinetuningTrainer` for classifiers of pictures.

    Args:
        ema_decay (`float`, *optional*): of the average of the weights, which is what is scored and saved.
        forward_options (`dict`): what the model gets beside pictures.
    """

    def __init__(self, *args, ema_decay: float | None = None, forward_options: dict | None = None, **options):
        super().__init__(*args, **options)
        self.forward_options = forward_options or {}
        self.model_accepts_loss_kwargs = False  # the loss of compute_loss is a mean, which Trainer then averages
        self.ema_decay, self.average = ema_decay, None
        self.add_callback(AfterEachStep(self))

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross entropy with classes [B] or with their probabilities [B, num_labels], of any model."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, **self.forward_options)
        loss = F.cross_entropy(outputs.logits.float(), labels)
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, weight in model.named_parameters() if weight.dim() > 1 and not UNDECAYED.search(name)]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        times = self.train_dataset.recipe.repeated_augmentation
        if times == 1:
            return super()._get_train_sampler(train_dataset)
        return RepeatedSampler(self.train_dataset, times, self.data_seed)

    # The average of the weights

    def averaged(self):
        """A block in which the model has the averages, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def train(self, *args, **options):
        self.average = None if self.ema_decay is None else WeightAverage(self.model, self.ema_decay)
        result = super().train(*args, **options)
        if self.average is not None:  # and no best checkpoint has been loaded
            self.average.swap()
            self.average = None
        return result

    def evaluation_loop(self, *args, **options):
        with self.averaged():
            return super().evaluation_loop(*args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.averaged():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save and not self.is_saved:
            weights = {name: weight.detach().contiguous() for name, weight in self.model.named_parameters()}
            save_file(weights, Path(output_dir) / TRAINED)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        trained = Path(resume_from_checkpoint) / TRAINED
        if self.average is not None and trained.is_file():
            averages = [weight.detach().clone() for weight in self.model.parameters()]
            self.average.load_state_dict({"averages": averages, "num_steps": step_of(trained.parent)})
            saved = load_file(trained)
            for name, weight in self.model.named_parameters():
                weight.copy_(saved[name])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.average = None  # the best checkpoint has it as its model
