# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of commands on `transformers.Trainer`, for `aft compare`."""

import importlib.metadata
import platform
from abc import abstractmethod
from pathlib import Path
from statistics import median

import numpy as np
from transformers import PreTrainedConfig

from aft.compare_program import RESULT, Program
from aft.finetuning_arguments import FinetuningArguments, describe_run
from aft.finetuning_checkpoints import TRAINER_STATE
from aft.flags import import_files
from aft.machine import hardware_name
from aft.model_configs import changed_fields
from aft.redaction import public_path
from aft.run_log import today
from aft.settings_files import read_json


class Trained(Program):
    """
    A command on Trainer, whose runs begin from nothing.

    Attributes:
        metric: of an evaluation, by which runs are compared.
        rows: what is scored, in the plural.
        of_epoch: of the metrics of a run, that of the amount which an epoch has.
        rate: of a line of the log, the amount per second.
    """

    held_out = "held out"
    metric: str
    rows: str
    of_epoch: str
    rate: str

    @abstractmethod
    def read(self, flags: list[str]):
        """The flags of the data and the model."""

    @abstractmethod
    def parse(self, flags: list[str]) -> tuple:
        """The same, and those of training."""

    @abstractmethod
    def configure(self, inputs) -> PreTrainedConfig:
        """The configuration of the model as far as the plan says it; the data, which are in the entry too, say the
        rest."""

    @abstractmethod
    def identify(self, inputs, config: PreTrainedConfig) -> dict:
        """What identifies the data, as `data`, and maybe more that they say; checks that the model takes them."""

    @abstractmethod
    def where(self, inputs) -> str:
        """Where the data are."""

    def check_training(self, args: FinetuningArguments) -> None:
        """
        Raises:
            ValueError: the runs could not be compared.
        """
        for name, ok, allowed in (
            ("num_train_epochs", args.trains, "positive"),
            ("early_stopping_patience", args.early_stopping_patience is None, "left out: all seeds end alike"),
        ):
            if not ok:
                raise ValueError(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    def describe(self, flags: list[str], whole: bool) -> dict:
        inputs = self.read(flags)
        import_files(inputs.imports)
        config = self.configure(inputs)
        entry = {"model_config": changed_fields(config)}
        if not whole:
            return entry
        inputs, args = self.parse(flags)
        self.check_training(args)
        return describe_run(inputs, args, {**self.identify(inputs, config), **entry})

    def known_keys(self, entries: list[dict]) -> set[str]:
        return set.intersection(*map(set, entries))  # a flag that some lack is of another version of transformers

    def has_trained(self, folder: Path) -> bool:
        return read_json(folder / "all_results.json", "run")["train_seconds"] > 0

    def facts(self, flags: list[str]) -> dict:
        inputs, args = self.parse(flags)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return {
            "data": public_path(self.where(inputs)),
            "hardware": hardware_name(args.device),
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "versions": {"Python": platform.python_version(), **versions},
            "date": today(),
        }

    def read_run(self, folder: Path) -> dict:
        result, entry = read_json(folder / RESULT, "run"), self.read_entry(folder)
        scores, state = read_json(folder / "all_results.json", "run"), read_json(folder / TRAINER_STATE, "run")
        log, of_epoch, metric = state["log_history"], scores[self.of_epoch], f"eval_{self.metric}"
        curve = {line["epoch"] * of_epoch: line[metric] for line in log if metric in line}
        curve = curve or {state["epoch"] * of_epoch: scores[metric]}
        valid = f"{scores['eval_samples']:,} {self.rows}"
        if entry["load_best_model_at_end"]:
            valid += f", best of {len(curve)} checkpoints by {entry['metric_for_best_model']}"
        versions = {**result["versions"], "modeling_aft": result["modeling_aft"]}
        return {
            "seed": result["seed"],
            "parameters": scores["num_parameters"],
            "epochs": state["epoch"],
            "steps": state["global_step"],
            self.amount: round(state["epoch"] * of_epoch),
            "valid": scores[metric],
            "test": scores.get(f"test_{self.metric}"),
            **{column: scores.get(f"test_{column}") for column in (*self.more_scores, *self.more_speeds)},
            self.speed: median(line[self.rate] for line in log if self.rate in line),
            "peak_bytes": result["peak_bytes"],
            "valid_protocol": valid,
            "test_protocol": f"{scores['test_samples']:,} {self.rows}" if "test_samples" in scores else "none",
            "data": result["data"],
            "data_sha256": ", ".join(f"{part} {sha256}" for part, sha256 in entry["data"].items()),
            "hardware": f"{result['processor']}; {result['hardware']}",
            "precision": result["precision"],
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "date": result["date"],
            "command": result["command"],
            "curve": np.array(sorted(curve.items())),
        }
