# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The exponential moving average of the weights of a model in training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class WeightAverage:
    """
    An average of the weights after each step, a <- d a + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) at step n:
    the smaller decay at the beginning lets it forget the random weights. `accelerator.register_for_checkpointing`
    takes it.

    Args:
        model (`nn.Module`): whose weights are averaged, not sharded.
        decay (`float`): in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.weights, self.decay, self.num_steps = list(model.parameters()), decay, 0
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of the step that is over."""
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - decay)
        self.num_steps += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model has the averages, after it the weights again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            other = weight.detach().clone()
            weight.copy_(average)
            average.copy_(other)

    def state_dict(self) -> dict:
        return {"averages": self.averages, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
        self.num_steps = state["num_steps"]
