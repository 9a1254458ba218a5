# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a run needs at least, before any of it is allocated: sizes that no device has are refused, and not tried."""

import copy
import sys

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig

from aft.estimates import Estimate, bound, estimate
from aft.saved_models import LANGUAGE_MODELS


def device_memory() -> int:
    """The bytes of memory of the device that Accelerator will choose."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total


def training_bytes(config: PreTrainedConfig, objective: str = "causal") -> int | None:
    """
    The bytes of what is trained: float32 weights, gradients, and an average of them (AdamW has two); of other weights
    and buffers, the weights alone. None if the model cannot be made without memory.

    Raises:
        ValueError: a single tensor has more elements than can be counted.
    """

    def count(config: PreTrainedConfig) -> int:
        with torch.device("meta"):
            model = LANGUAGE_MODELS[objective].from_config(config)
        return sum(
            tensor.numel() * (12 if tensor.requires_grad else 4) for tensor in (*model.parameters(), *model.buffers())
        )

    def with_layers(number: int) -> PreTrainedConfig:
        changed = copy.deepcopy(config)
        changed.num_hidden_layers = number
        return changed

    try:
        layers = getattr(config, "num_hidden_layers", 1)
        if layers < 1000:
            return count(config)
        one, two = (count(with_layers(number)) for number in (1, 2))  # even to make so many layers takes long
        return one + (two - one) * (layers - 1)
    except Exception as error:  # of a library's model, which a device may well have room for
        if "overflow" in str(error).lower() or isinstance(error, OverflowError):
            raise ValueError("a tensor of it has too many elements") from error
        return None


def check_memory(args, config: PreTrainedConfig, num_processes: int) -> list[str]:
    """
    What cannot fit into the memory of a device, in words.

    Args:
        args: the flags of `aft pretrain`, checked and completed.
    """
    from_preset = args.init_from is None
    of_model = f"--model_preset {args.model_preset}" if from_preset else f"--init_from {args.init_from}"
    memory, problems = device_memory(), []

    def check(needed: int, what: str):
        if needed > memory:
            problems.append(f"{what}: needs more than {needed:,} bytes of memory, the device has {memory:,}")

    try:
        check((training_bytes(config, args.objective) or 0) // num_processes, of_model)
    except ValueError as error:
        problems.append(f"{of_model}: {error}")
    of_window = args.sequence_length * config.vocab_size * 4  # its logits
    for name in ("micro_batch_size", "eval_batch_size"):
        windows = getattr(args, name)
        check(windows * of_window, f"--{name} {windows} with --sequence_length {args.sequence_length}")
    check((args.sample_bytes or 0) * 8, f"--sample_bytes {args.sample_bytes}")
    most = bound(config, args.micro_batch_size, args.sequence_length, args.objective)
    if problems or most is None or most <= memory:
        return problems
    return activation_problems(args, estimate(config, args.sequence_length, args.objective), memory)


def activation_problems(args, found: Estimate | None, memory: int) -> list[str]:
    """
    What is wrong with `--micro_batch_size`, if a step needs more memory than there is, and which would do. With mixed
    precision or recomputed activations it needs less than is estimated, so this only warns.
    """
    windows = args.micro_batch_size
    if found is None or found.needed(windows) <= memory:
        return []
    fits = found.most_windows(memory)
    fitting = max((size for size in range(1, windows) if args.batch_size % size == 0 and size <= fits), default=None)
    advice = "no size would do" if fitting is None else f"{fitting} would do"
    text = (
        f"--micro_batch_size {windows} with --sequence_length {args.sequence_length}: a step needs about "
        f"{found.needed(windows):,} bytes of memory, the device has {memory:,}; {advice}"
    )
    is_less = args.gradient_checkpointing or args.compile or args.mixed_precision in ("bf16", "fp16")
    if not is_less:
        return [text]
    print(f"{text}, without --mixed_precision, --compile or --gradient_checkpointing", file=sys.stderr)
    return []
