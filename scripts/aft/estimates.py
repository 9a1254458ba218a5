# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a training step will take, told before the first: its operations, and its memory, from shapes alone."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from aft.saved_models import LANGUAGE_MODELS, without_cache


MOST_LAYERS = 48  # of a model that is made whole; of one with more, the layers are alike


@dataclass
class Estimate:
    """
    Attributes:
        flops_per_token: of the forward and the backward pass, a multiplication and an addition counted as two.
        state_bytes: weights, gradients and the averages of AdamW, in float32.
        window_bytes: what the forward pass of a window keeps for the backward pass, in float32.
        batch_bytes: the same that does not depend on the number of windows.
    """

    flops_per_token: float
    state_bytes: int
    window_bytes: int
    batch_bytes: int

    def needed(self, windows: int) -> int:
        """Bytes of memory that a process needs for a forward and backward pass of so many windows."""
        return self.state_bytes + self.batch_bytes + windows * self.window_bytes

    def most_windows(self, memory: int) -> int:
        """How many windows fit."""
        return max(0, (memory - self.state_bytes - self.batch_bytes) // max(self.window_bytes, 1))


def trace(config: PreTrainedConfig, objective: str, windows: int, length: int) -> tuple[float, int, int]:
    """The operations of a step on the device "meta", the bytes that it keeps, and those of the parameters."""
    with torch.device("meta"):
        model = LANGUAGE_MODELS[objective].from_config(config).train()
        ids = torch.zeros(windows, length, dtype=torch.long)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, sizes = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = model(input_ids=ids, **without_cache(objective)).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum").backward()
    return (
        counter.get_total_flops(),
        sum(sizes.values()) + logits.numel() * 4,  # and the gradient of the logits
        sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    )


def estimate(config: PreTrainedConfig, length: int, objective: str = "causal") -> Estimate | None:
    """What a step on windows of `length` tokens takes; None for a model that cannot be traced without data."""

    def of_layers(number: int | None) -> tuple[float, int, int, int]:
        changed = copy.deepcopy(config)
        if number is not None:
            changed.num_hidden_layers = number
        (_, one, _), (flops, two, weights) = (trace(changed, objective, windows, length) for windows in (1, 2))
        return flops / (2 * length), two - one, max(2 * one - two, 0), weights

    try:
        layers = getattr(config, "num_hidden_layers", 1)
        if layers <= MOST_LAYERS:
            found = of_layers(None)
        else:
            first, second = of_layers(1), of_layers(2)
            found = tuple(a + (b - a) * (layers - 1) for a, b in zip(first, second, strict=True))
    except Exception:  # of a library's model: what it does may need values
        return None
    flops, window, batch, weights = found
    return Estimate(flops, 4 * weights, int(window), int(batch))
