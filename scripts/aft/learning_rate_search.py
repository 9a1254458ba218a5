# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A learning rate for fine-tuning, found by trying several for a few steps each: `aft finetune --search_steps`."""

import copy
import tempfile

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


FACTORS = (1 / 9, 1 / 3, 1, 3)  # of the rate that would be taken without a search


def short_arguments(args, rate: float, num_steps: int, folder: str):
    """Those of a run of so many steps at a rate, which writes nothing that stays."""
    changed = copy.copy(args)
    changed.learning_rate, changed.max_steps, changed.output_dir = rate, num_steps, folder
    changed.save_strategy, changed.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    changed.load_best_model_at_end, changed.report_to, changed.push_to_hub = False, [], False
    changed.disable_tqdm, changed.logging_strategy = True, IntervalStrategy.NO
    return changed


def search_learning_rate(task, args, rate: float, num_steps: int, tokenizer) -> tuple[float, dict[float, float]]:
    """
    The rate among FACTORS times `rate` after which the loss on the held-out data is the least. Each begins with the
    same weights and the same data, and ends after `num_steps` steps; one that diverges has no loss.

    Args:
        task (`Task`): the model is left as it is.
        args (`FinetuningArguments`): of the run, whose schedule is that of each try as well.

    Returns:
        The rate, and the loss at each rate.

    Raises:
        FloatingPointError: all diverge.
    """
    losses = {}
    for factor in FACTORS:
        tried = rate * factor
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            short = short_arguments(args, tried, num_steps, folder)
            trainer = task.make_trainer(copy.deepcopy(task.model), short, tokenizer)
            try:
                trainer.train()
                losses[tried] = trainer.evaluate()["eval_loss"]
            except FloatingPointError:
                continue
    if not losses:
        raise FloatingPointError(
            f"--search_steps: no rate from {rate * FACTORS[0]:.1e} to {rate * FACTORS[-1]:.1e} learns"
        )
    return min(losses, key=losses.get), losses
