# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What `aft pretrain` optimizes with: learning rates, groups of parameters, and one optimizer or two."""

import argparse
import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modeling_aft.modeling_attention_free import PositionBias
from modeling_aft.modeling_linear import SparseLinear
from modeling_aft.modeling_synthesizer import FactorizedRandomLogits, RandomLogits


# The modules of which every parameter is a bias or a logit of positions, or a factor of one.
POSITION_MODULES = (PositionBias, RandomLogits, FactorizedRandomLogits)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step (from 0): linear warm-up to the peak, then `args.lr_decay`."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    if args.lr_decay == "constant":
        return args.learning_rate
    if args.lr_decay == "inverse_sqrt":
        return args.learning_rate * math.sqrt(args.warmup_steps / (step + 1))
    progress = (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    remaining = 1 - progress if args.lr_decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * remaining)


def parameter_groups(model: nn.Module, weight_decay: float, position_lr_scale: float = 1.0) -> dict[str, dict]:
    """
    The parameters of a model by what an optimizer does with them.

    Returns:
        For each of these names that has parameters, a group for a torch optimizer, whose `lr_scale` multiplies the
        learning rate: "linear", the weights of linear layers; "sparse", those of sparse ones, which are no matrices;
        "head", a linear layer's weight that scores tokens, tied to the embedding or not; "position", the biases and
        logits of positions; "rest". The last two do not decay.
    """
    head = model.get_output_embeddings()
    # GPT-2's linear layers are of a kind of their own, with weights [in, out].
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    linear = {id(module.weight) for module in layers}
    sparse = {id(module.weight) for module in model.modules() if isinstance(module, SparseLinear)}
    position = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, POSITION_MODULES)
        for parameter in module.parameters(recurse=False)
    }

    def name(parameter: nn.Parameter) -> str:
        if head is not None and parameter is head.weight:
            return "head"
        of_layers = {"linear": linear, "sparse": sparse, "position": position}
        return next((key for key, group in of_layers.items() if id(parameter) in group), "rest")

    groups = {}
    for parameter in model.parameters():
        groups.setdefault(name(parameter), {"params": []})["params"].append(parameter)
    for key, group in groups.items():
        group["weight_decay"] = weight_decay if key in ("linear", "sparse", "head") else 0.0
        group["lr_scale"] = position_lr_scale if key == "position" else 1.0
    return groups


class Muon(torch.optim.Muon):
    """
    `torch.optim.Muon` whose steps have the root mean square of AdamW's (`match_rms_adamw`), and whose Newton-Schulz
    iteration is in float32 for weights on a CPU. That of torch is in bfloat16, which most CPUs only emulate: there it
    takes twenty times as long, and far longer than the pass through a small model.

    Args:
        params (`list[dict]`): groups of matrices [out, in] or [in, out].
        lr (`float`): the learning rate.
    """

    def __init__(self, params: list[dict], lr: float):
        super().__init__(params, lr=lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        if any(weight.device.type != "cpu" for group in self.param_groups for weight in group["params"]):
            return super().step(closure)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum, state = group["momentum"], self.state[weight]
                average = state.setdefault("momentum_buffer", torch.zeros_like(weight.grad))
                average.lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum) if group["nesterov"] else average
                update = orthogonal(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """
    A matrix with the singular vectors of another and singular values near 1, [out, in] like it: `steps` of the
    iteration X -> aX + b(XX')X + c(XX')(XX')X with the coefficients (a, b, c), from the matrix over its norm.
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def create_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """
    What trains a model: AdamW for all parameters, or with `args.optimizer` "muon" Muon for the weights of linear
    layers and AdamW for the others. One learning rate serves both.

    Raises:
        ValueError: Muon is asked for, and the model has no linear layers beside its head.
    """
    groups = parameter_groups(model, args.weight_decay, args.position_lr_scale)
    optimizers = []
    if args.optimizer == "muon":
        if "linear" not in groups:
            raise ValueError(f"--optimizer must be adamw: {type(model).__name__} has no linear layers, got 'muon'")
        optimizers.append(Muon([groups.pop("linear")], lr=args.learning_rate))
    betas = (args.adam_beta1, args.adam_beta2)
    return [*optimizers, torch.optim.AdamW(list(groups.values()), lr=args.learning_rate, betas=betas, fused=True)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Sets the learning rate of every group, times the group's `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value * group["lr_scale"]


def all_finite(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> bool:
    """Whether weights and buffers of a model, and what its optimizers remember, are finite; of a shard, if sharded."""
    remembered = [value for one in optimizers for state in one.state.values() for value in state.values()]
    return all(
        bool(torch.isfinite(tensor.to_local() if hasattr(tensor, "to_local") else tensor).all())
        for tensor in (*model.parameters(), *model.buffers(), *remembered)
        if isinstance(tensor, torch.Tensor)
    )
