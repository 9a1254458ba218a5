# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Truncated backpropagation through time: the recurrent state that a training step leaves to the next one."""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import DynamicCache

from aft.training_windows import TrainingWindows
from modeling_aft import load_cache, save_cache


class CarriedState:
    """
    The states of the rows of one process, without gradients: one cache for each of its micro-batches. Checkpoints of
    the accelerator include them, as files of `save_cache`.

    Args:
        config (`AFTConfig`): that of the model, whose state has a fixed size and no last position.
        windows (`TrainingWindows`): says at which steps the rows begin new streams.
        first_rows (`range`): which row of the global batch each micro-batch of this process begins with.
        accelerator (`Accelerator`): the one that saves and loads the checkpoints.
    """

    def __init__(self, config, windows: TrainingWindows, first_rows: range, accelerator: Accelerator):
        self.config, self.windows, self.first_rows = config, windows, first_rows
        self.caches: dict[int, DynamicCache] = {}  # by the first row of the micro-batch
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(Path(folder)))
        accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder), accelerator.device))

    def before(self, step: int, first_row: int) -> DynamicCache:
        """The cache that a micro-batch of `step` goes on from; an empty one where its rows begin anew."""
        return DynamicCache(config=self.config) if self.windows.begins(step) else self.caches[first_row]

    def keep(self, first_row: int, cache: DynamicCache) -> None:
        """Takes over the cache that the forward pass of a micro-batch has left behind."""
        for layer in cache.layers:
            layer.detach()
        self.caches[first_row] = cache

    def save(self, folder: Path) -> None:
        """Writes one file for each micro-batch, after a step."""
        for first_row in self.first_rows:
            save_cache(self.caches[first_row], state_file(folder, first_row))

    def load(self, folder: Path, device: torch.device) -> None:
        """Reads what `save` has written; raises a ValueError or a FileNotFoundError if that cannot be."""
        for first_row in self.first_rows:
            self.caches[first_row] = load_cache(state_file(folder, first_row), self.config, device)


def state_file(checkpoint: Path, first_row: int) -> Path:
    """Where a checkpoint has the state of the micro-batch that begins with a row of the global batch."""
    return checkpoint / f"carried_state_{first_row}.safetensors"
