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
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from aft.saved_models import LANGUAGE_MODELS, without_cache


MOST_LAYERS = 48  # of a model that is made whole; of one with more, the layers are alike
_FOUND: dict[tuple, tuple] = {}  # what `of_all_layers` has found


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


def kept_bytes(model: torch.nn.Module, objective: str, windows: int, length: int) -> tuple[int, torch.Tensor]:
    """What a step on the device "meta" keeps for its backward pass, in bytes, and its loss."""
    ids = torch.zeros(windows, length, dtype=torch.long, device="meta")
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, sizes = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, **without_cache(objective)).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum")
    return sum(sizes.values()) + logits.numel() * 4, loss  # and the gradient of the logits


def make(config: PreTrainedConfig, objective: str) -> torch.nn.Module:
    """The model on the device "meta"."""
    with torch.device("meta"):
        return LANGUAGE_MODELS[objective].from_config(config).train()


def state_bytes(model: torch.nn.Module) -> int:
    """Weights, gradients and the averages of AdamW."""
    return 4 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def of_all_layers(
    config: PreTrainedConfig, measure: Callable[..., tuple], length: int, objective: str
) -> tuple | None:
    """
    What `measure` says of the model, of very many layers as follows from two; None if it needs data for it. That is
    found once for each model: many runs of a plan have the same.
    """

    def of_layers(number: int) -> tuple:
        changed = copy.deepcopy(config)
        changed.num_hidden_layers = number
        return measure(changed, length, objective)

    key = (measure, type(config), config.to_json_string(use_diff=False), length, objective)
    if key in _FOUND:
        return _FOUND[key]
    try:
        layers = getattr(config, "num_hidden_layers", 1)
        if layers <= MOST_LAYERS:
            found = measure(config, length, objective)
        else:
            first, second = of_layers(1), of_layers(2)
            found = tuple(a + (b - a) * (layers - 1) for a, b in zip(first, second, strict=True))
    except Exception:  # of a library's model: what it does may need values
        return None
    _FOUND[key] = found
    return found


def _measure_bound(config: PreTrainedConfig, length: int, objective: str) -> tuple[int, int]:
    model = make(config, objective)
    return state_bytes(model), kept_bytes(model, objective, 1, length)[0]


def bound(config: PreTrainedConfig, windows: int, length: int, objective: str = "causal") -> int | None:
    """
    The bytes of memory that a forward and backward pass of so many windows needs at most, which is found sooner than
    an estimate: all of what a window keeps is counted for each. None for a model that cannot be traced without data.
    """
    found = of_all_layers(config, _measure_bound, length, objective)
    return None if found is None else found[0] + windows * found[1]


def _measure_step(config: PreTrainedConfig, length: int, objective: str) -> tuple[float, int, int, int]:
    model = make(config, objective)
    one, _ = kept_bytes(model, objective, 1, length)
    with FlopCounterMode(display=False) as counter:
        two, loss = kept_bytes(model, objective, 2, length)
        loss.backward()
    return counter.get_total_flops() / (2 * length), state_bytes(model), two - one, max(2 * one - two, 0)


def estimate(config: PreTrainedConfig, length: int, objective: str = "causal") -> Estimate | None:
    """What a step on windows of `length` tokens takes; None for a model that cannot be traced without data."""
    found = of_all_layers(config, _measure_step, length, objective)
    return None if found is None else Estimate(found[0], *map(int, found[1:]))
