# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The command line of finetune.py: its flags, the checks on them, and what decides the weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from shared.pretraining_arguments import flag


# Flags that neither change the weights nor which of them are the best, so that a resumed run may change them; what is
# in the files counts in place of their paths.
MAY_DIFFER_ON_RESUME = {
    *("model", "trust_remote_code", "text_file", "labelled_file", "validation_file", "predict_file", "cache_dir"),
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
class InputArguments:
    _argument_group_name = "model and data"

    model: str | None = flag(None, "Folder of a saved model, or its name on the Hub.")
    trust_remote_code: bool = flag(False, "Run the code that comes with a model of an unknown type.")
    text_file: str | None = flag(None, "File to train a language model on; .zip and .gz are unpacked.")
    labelled_file: str | None = flag(None, "Table (.csv, .jsonl) of texts and labels to train a classifier on.")
    validation_file: str | None = flag(None, "File of the same kind to evaluate on, in place of a held-out share.")
    validation_share: float = flag(0.1, "Share of the data that is held out without validation_file.")
    split_seed: int = flag(0, "Seed of which rows of a table are held out.")
    predict_file: str | None = flag(None, "Table of texts, with or without labels, to classify at the end.")
    text_column: str = flag("text", "Column of the texts.")
    label_column: str = flag("label", "Column of the labels.")
    max_length: int | None = flag(
        None,
        "Tokens of a window, or at most of a row; None is max_position_embeddings, for rows only if it is a limit.",
    )
    truncation: str = flag("none", "Of rows that are too long: none (an error), right (drop the end) or left.")
    cache_dir: str | None = flag(None, "Folder for what `evaluate` writes; None is its default. No table goes there.")


@dataclass
class FinetuningArguments(TrainingArguments):
    _argument_group_name = "training"

    output_dir: str = flag("runs/finetuning", "Folder of the results.")
    eval_strategy: str = flag("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = flag("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = flag(2, "How many checkpoints to keep; the best is always among them.")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint instead of the last one.")
    restore_callback_states_from_checkpoint: bool = flag(True, "Resume with the patience that was left.")
    resume_from_checkpoint: str | None = flag(
        None, "true (newest checkpoint of output_dir), auto (the same if there is one, else start) or its path."
    )
    logging_nan_inf_filter: bool = flag(False, "Must be false: a loss that is no number ends the run.")
    early_stopping_patience: int | None = flag(None, "Stop after so many evaluations in a row that are no better.")
    early_stopping_threshold: float = flag(0.0, "By how much an evaluation must be better to count.")

    def __post_init__(self):
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("bits_per_byte"):
            self.greater_is_better = False  # Trainer takes everything but a loss for a score
        super().__post_init__()

    @property
    def trains(self) -> bool:
        """Whether there is anything to train, and not only to evaluate."""
        return self.max_steps > 0 or self.num_train_epochs > 0


def parse_arguments(argv: list[str] | None) -> tuple[InputArguments, FinetuningArguments]:
    """
    The flags of this script, checked as far as that goes without loading anything.

    Raises:
        ValueError: a flag is unknown or of the wrong type, or one error that lists every value that is not allowed.
    """
    parser = HfArgumentParser(
        (InputArguments, FinetuningArguments),
        allow_abbrev=False,
        description="Fine-tune a language model on a text, or a classifier on a table of labelled texts.",
        exit_on_error=False,
    )
    try:
        inputs, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # of argparse for one value, of TrainingArguments for those that do not fit together
        raise ValueError(f"finetune.py: {error}") from error
    values, problems = {**vars(inputs), **vars(args)}, []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {values[name]!r}")

    text_mode = inputs.text_file is not None
    check(bool(inputs.model), "model", "given")
    check(text_mode or inputs.labelled_file is not None, "text_file", "given, or else --labelled_file")
    check(not text_mode or inputs.labelled_file is None, "labelled_file", "left out with --text_file")
    check(not text_mode or inputs.predict_file is None, "predict_file", "left out with --text_file")
    for name in ("text_file", "labelled_file", "validation_file", "predict_file"):
        check(values[name] is None or Path(values[name]).is_file(), name, "a file")
    for name in ("output_dir", "cache_dir", "resume_from_checkpoint"):
        check(values[name] != "", name, "a path")
    for name, value in values.items():
        check(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
    for name in ("split_seed", "seed", "data_seed"):
        check(values[name] is None or 0 <= values[name] < 2**32, name, "in [0, 2**32)")
    check(args.learning_rate >= 0, "learning_rate", "at least 0")
    check(inputs.label_column != inputs.text_column, "label_column", "another column than --text_column")
    check(0 < inputs.validation_share < 1, "validation_share", "in (0, 1)")
    check(inputs.max_length is None or inputs.max_length >= 2, "max_length", "at least 2")
    check(inputs.truncation in ("none", "right", "left"), "truncation", "none, right or left")
    if args.early_stopping_patience is not None:
        check(args.early_stopping_patience >= 1, "early_stopping_patience", "at least 1")
        check(args.load_best_model_at_end, "load_best_model_at_end", "true with --early_stopping_patience")
    metrics = ("loss", "bits_per_byte") if text_mode else ("loss", "accuracy", "macro_f1")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    check(best in metrics, "metric_for_best_model", "one of " + ", ".join(metrics))
    check(
        not args.dataloader_drop_last, "dataloader_drop_last", "false, because Trainer would drop rows to score, too"
    )
    for name in ("batch_eval_metrics", "prediction_loss_only", "logging_nan_inf_filter"):
        check(not values[name], name, "false: all that is evaluated is scored, and no NaN is passed over")
    check(0 <= args.label_smoothing_factor < 1, "label_smoothing_factor", "in [0, 1)")
    if problems:
        raise ValueError("finetune.py: " + "; ".join(problems))
    return inputs, args


def describe_run(inputs: InputArguments, args: FinetuningArguments, made_of: dict) -> dict:
    """
    Everything that decides the weights of a run, and which of them are the best, as JSON has it.

    Args:
        made_of: what identifies the model and the content of the files.
    """
    flags = {**vars(inputs), **args.to_dict()}
    identity = {name: value for name, value in flags.items() if name not in MAY_DIFFER_ON_RESUME}
    identity |= {"num_processes": args.world_size, "devices_per_process": max(args.n_gpu, 1)}
    identity |= {"text_file": None, "labelled_file": None, "validation_file": None, **made_of}
    return json.loads(json.dumps(identity, default=str))
