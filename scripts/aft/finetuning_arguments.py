# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""All flags of `aft finetune`, the checks that every program on the Trainer makes, and what decides the weights."""

import json
import math
from dataclasses import dataclass

from transformers import HfArgumentParser, TrainingArguments

from aft.finetuning_flags import FinetuningDefaults, InputArguments, input_problems, read_flags


# Flags that neither change the weights nor which of them are the best, so that a resumed run may change them; what is
# in the files counts in place of their paths.
MAY_DIFFER_ON_RESUME = {
    *("model", "imports", "trust_remote_code", "cache_dir"),
    *("text_file", "labelled_file", "chat_file", "validation_file", "predict_file"),
    *("pairs_file", "dataset", "test_file", "tokenizer", "metrics"),
    *("output_dir", "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "use_cpu", "local_rank"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_on_start", "do_train", "do_eval", "do_predict", "disable_tqdm", "report_to"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "include_num_input_tokens_seen", "run_name", "project", "debug"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "push_to_hub"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps", "ddp_timeout"),
    *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
    *("ddp_static_graph",),
}


@dataclass
class FinetuningArguments(FinetuningDefaults, TrainingArguments):
    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(
            ("bits_per_byte", "log_perplexity")
        ):
            self.greater_is_better = False  # Trainer takes everything but a loss for a score
        super().__post_init__()
        if self.device.type == "cpu":  # for which torch warns of it, batch loader by batch loader
            self.dataloader_pin_memory = False

    @property
    def trains(self) -> bool:
        """Whether there is anything to train, and not only to evaluate."""
        return self.max_steps > 0 or self.num_train_epochs > 0


def parse_dataclasses(command: str, argv: list[str], *groups: type) -> tuple:
    """
    All flags, one dataclass after the other.

    Raises:
        ValueError: a flag is unknown or of the wrong type.
    """
    parser = HfArgumentParser(groups, allow_abbrev=False, exit_on_error=False)
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # of argparse for one value, of TrainingArguments for those that do not fit together
        raise ValueError(f"aft {command}: {error}") from error


def training_problems(inputs, args: FinetuningArguments, metrics: tuple[str, ...]) -> list[str]:
    """
    What is wrong with the flags of a program on the Trainer.

    Args:
        inputs: its other flags.
        metrics: what an evaluation can be compared by.
    """
    values, problems = {**vars(inputs), **vars(args)}, []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {values[name]!r}")

    for name in ("output_dir", "resume_from_checkpoint"):
        check(values[name] != "", name, "a path")
    for name, value in values.items():
        check(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
    for name in ("seed", "data_seed"):
        check(values[name] is None or 0 <= values[name] < 2**32, name, "in [0, 2**32)")
    check(args.learning_rate is None or args.learning_rate >= 0, "learning_rate", "at least 0")
    alone = args.learning_rate is None and args.world_size == 1 and args.trains
    check(inputs.search_steps is None or alone, "search_steps", "left out with --learning_rate, or several processes")
    if args.early_stopping_patience is not None:
        check(args.early_stopping_patience >= 1, "early_stopping_patience", "at least 1")
        check(args.load_best_model_at_end, "load_best_model_at_end", "true with --early_stopping_patience")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    check(best in metrics, "metric_for_best_model", "one of " + ", ".join(metrics))
    check(
        not args.dataloader_drop_last, "dataloader_drop_last", "false, because Trainer would drop rows to score, too"
    )
    for name in ("batch_eval_metrics", "prediction_loss_only", "logging_nan_inf_filter"):
        check(not values[name], name, "false: all that is evaluated is scored, and no NaN is passed over")
    check(0 <= args.label_smoothing_factor < 1, "label_smoothing_factor", "in [0, 1)")
    return problems


def parse_arguments(argv: list[str]) -> tuple[InputArguments, FinetuningArguments]:
    """
    All flags, checked as far as that goes without loading anything.

    Raises:
        ValueError: a flag is unknown or of the wrong type, or one error that lists every value that is not allowed.
    """
    inputs, args = parse_dataclasses("finetune", argv, InputArguments, FinetuningArguments)
    inputs.imports = read_flags(argv).imports  # of all flags, where the library takes the last
    metrics = ("loss", "accuracy", "macro_f1") if inputs.labelled_file else ("loss", "bits_per_byte")
    if problems := input_problems(inputs) + training_problems(inputs, args, metrics):
        raise ValueError("aft finetune: " + "; ".join(problems))
    return inputs, args


def default_learning_rate(num_parameters: int) -> float:
    """What small models learn a text with, down to Trainer's default for those of billions of parameters."""
    return max(5e-5, min(3e-3, 3e-3 * math.sqrt(2e6 / num_parameters)))


def describe_run(inputs, args: FinetuningArguments, made_of: dict) -> dict:
    """
    Everything that decides the weights of a run, and which of them are the best, as JSON has it.

    Args:
        made_of: what identifies the model and the content of the files.
    """
    flags = {**vars(inputs), **args.to_dict()}
    identity = {name: value for name, value in flags.items() if name not in MAY_DIFFER_ON_RESUME}
    identity |= {"num_processes": args.world_size, "devices_per_process": max(args.n_gpu, 1)}
    identity |= made_of
    return json.loads(json.dumps(identity, default=str))
