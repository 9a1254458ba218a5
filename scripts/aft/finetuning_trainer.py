# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Trainer of finetune.py: it saves before it evaluates, and does not go on with numbers that are none."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from aft.atomic_files import move_model, replacing
from aft.console import is_out_of_memory
from aft.finetuning_checkpoints import find_damage, write_checksums
from aft.length_groups import ShuffledLengthGroups
from aft.saved_models import is_finite


ADVICE = "lower --learning_rate"
# These change by an evaluation, so that they are saved after it once more.
SCHEDULED_BY_SCORES = ("reduce_lr_on_plateau", "greedy")


class RunIdentity(TrainerCallback, ExportableState):
    """Keeps in every checkpoint what the run was made of, for `finetuning_checkpoints.check_identity`."""

    def __init__(self, identity: dict):
        self.identity = identity

    def state(self) -> dict:
        return {"args": {"identity": self.identity}, "attributes": {}}


class PendingEvaluation(TrainerCallback):
    """Makes up for an evaluation in which the run has ended, before training goes on."""

    def __init__(self, trainer: "FinetuningTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if control.should_evaluate:  # as the checkpoint says
            self.trainer.evaluate_again()


class Stopwatch(TrainerCallback):
    """The time that steps take with their data, without evaluations and checkpoints, and the epochs that they are."""

    def __init__(self):
        self.seconds = self.seconds_read = self.before = 0.0
        self.first = self.epoch = self.epoch_read = None  # as Trainer counts them

    def restart(self, args, state, control, **kwargs) -> None:
        self.before = perf_counter()
        if self.epoch is None:
            self.first = self.epoch = self.epoch_read = state.epoch

    on_epoch_begin = on_evaluate = on_save = restart

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = perf_counter()
        self.seconds += now - self.before
        self.before, self.epoch = now, state.epoch

    def speed(self) -> float | None:
        """Epochs per second since the last time that this was asked; None if there was no step."""
        if self.seconds == self.seconds_read:
            return None
        speed = (self.epoch - self.epoch_read) / (self.seconds - self.seconds_read)
        self.seconds_read, self.epoch_read = self.seconds, self.epoch
        return speed


class FinetuningTrainer(Trainer):
    """
    `Trainer` in which an evaluation costs nothing of what was trained, however it ends: where a checkpoint is due, it
    is written before the evaluation, and gets its result afterwards. Evaluations leave the random state alone, so that
    a run that continues from such a checkpoint is the same as one that was never stopped. Each line of the log says
    how many rows a second were trained on since the line before, and the last one how many seconds that took.

    Raises:
        FloatingPointError: a loss, a weight that is to be saved, or a score is NaN or infinite.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.add_callback(PendingEvaluation(self))
        self.stopwatch = Stopwatch()
        self.add_callback(self.stopwatch)
        self.saved_step = None  # of the checkpoint that is waiting for its evaluation
        self.sampler: Sampler | None = None  # of the rows to train on

    @property
    def checkpoint(self) -> Path:
        """That of this step."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    @property
    def is_saved(self) -> bool:
        return self.saved_step == self.state.global_step

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the checkpoint but the state of this class changes any more."""
        return self.is_saved and self.args.lr_scheduler_type not in SCHEDULED_BY_SCORES

    @property
    def saves_the_best(self) -> bool:
        """Whether it is the evaluation that decides whether to save."""
        return self.args.save_strategy == SaveStrategy.BEST

    @property
    def data_seed(self) -> int:
        """That of the order of the rows."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = ShuffledLengthGroups(sampler.batch_size, sampler.lengths, self.data_seed)
        self.sampler = sampler
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Rows are evaluated in their own order, whatever that of training is: predictions are written and scored
        beside them."""
        sampler = super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _run_epoch(self, *args, **options) -> None:
        for part in (self.train_dataset, self.sampler):  # accelerate tells one of them, and not in every case
            if hasattr(part, "set_epoch"):
                part.set_epoch(options["epoch"])
        # Trainer would make one step more of a run that continues from its last checkpoint.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **options)

    def training_step(self, *args, **options) -> torch.Tensor:
        loss = super().training_step(*args, **options)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: {ADVICE}")
        return loss

    def rates(self, speed: float) -> dict[str, float]:
        """What a line of the log says of a speed in epochs per second."""
        return {"samples_per_second": round(speed * len(self.train_dataset), 3)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and (speed := self.stopwatch.speed()) is not None:
            logs |= self.rates(speed)
        if "train_runtime" in logs:
            logs["train_seconds"] = round(self.stopwatch.seconds, 4)
        super().log(logs, start_time)

    def evaluate(self, *args, **options) -> dict[str, float]:
        due = self.control.should_save or (self.saves_the_best and self.control.should_evaluate)
        if self.is_in_train and due and not self.is_saved:
            self._save_checkpoint(self.model, trial=None)
            self.saved_step = self.state.global_step
        with torch.random.fork_rng():
            return check_scores(super().evaluate(*args, **options))

    def evaluate_again(self) -> None:
        """Evaluates the checkpoint that was loaded, which gets the result if it is of this run's folder."""
        self.saved_step = self.state.global_step
        metrics = self._evaluate(trial=None, ignore_keys_for_eval=None)
        is_best = self._determine_best_metric(metrics=metrics, trial=None)
        if self.checkpoint.is_dir() and (is_best or not self.saves_the_best):
            self._save_checkpoint(self.model, trial=None)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if self.saves_the_best and not is_best and self.is_saved and self.args.should_save:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        return is_best

    def _save_checkpoint(self, model, trial) -> None:
        with named_write_errors(self.checkpoint), whole_state(self.state):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its random state
        if self.args.should_save and not self.is_complete:
            write_checksums(self.checkpoint)

    def _load_best_model(self) -> None:
        if damage := find_damage(Path(self.state.best_model_checkpoint)):
            raise ValueError(f"the best checkpoint cannot be loaded: {damage}")
        if not self.load_renamed(Path(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.load_renamed(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def load_renamed(self, checkpoint: Path) -> bool:
        """
        Loads the weights of a checkpoint whose model, such as a ViT, is saved under names of earlier versions: Trainer
        would leave out those that have other names now.

        Returns:
            Whether it is such a checkpoint.
        """
        path = checkpoint / SAFE_WEIGHTS_NAME
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) <= self.model.state_dict().keys():
                return False
        saved = type(self.model).from_pretrained(checkpoint, config=self.model.config, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        return True

    def save_result(self) -> None:
        """Writes the model to the output folder."""
        folder = Path(self.args.output_dir)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as temporary:
            self.save_model(temporary, _internal_call=True)  # else it would be pushed at once
            if self.args.should_save:
                move_model(Path(temporary), folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    # What a checkpoint that was written before its evaluation has already.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        broken = [name for name, weight in self.model.named_parameters() if not is_finite(weight)]
        if broken:
            raise FloatingPointError(f"after step {self.state.global_step}, {broken[0]} is not finite: {ADVICE}")
        folder = Path(output_dir or self.args.output_dir)
        if not (folder == self.checkpoint and self.is_saved):
            with named_write_errors(folder):
                super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_complete:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        if not self.is_saved:
            super()._save_rng_state(output_dir)


@contextlib.contextmanager
def whole_state(state: TrainerState) -> Iterator[None]:
    """Lets a state write its file whole or not at all: that of a checkpoint is written a second time."""

    def save_to_json(path: str) -> None:
        with replacing(Path(path)) as temporary:
            type(state).save_to_json(state, str(temporary))

    state.save_to_json = save_to_json
    try:
        yield
    finally:
        del state.save_to_json


@contextlib.contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """
    Makes one kind of error of what torch and safetensors raise on a full disk.

    Raises:
        OSError: names the folder, and the reason in a line.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise OSError(f"{folder} cannot be written: {str(error).strip().partition(chr(10))[0]}") from error


def check_scores(metrics: dict[str, float]) -> dict[str, float]:
    """
    The metrics themselves.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    if wrong := [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(wrong)}: {ADVICE}")
    return metrics
