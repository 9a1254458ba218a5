# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of `aft classify` that begin from nothing, for `aft compare`."""

import importlib.metadata
import platform
from pathlib import Path
from statistics import median

import numpy as np

from aft.classifying import identify_data, new_config, parse_arguments, preset_values
from aft.classifying_flags import add_recipe, read_flags
from aft.commands.classify import main
from aft.compare_program import RESULT, Program
from aft.finetuning_arguments import describe_run
from aft.finetuning_checkpoints import TRAINER_STATE
from aft.flags import import_files
from aft.image_data import read_images
from aft.machine import hardware_name
from aft.model_configs import override
from aft.redaction import public_path
from aft.run_log import today
from aft.settings_files import read_json


class Classified(Program):
    amount = "pictures"
    held_out = "held out"
    form = "{:.4f}"
    best = staticmethod(max)
    note = "pictures are those that were trained on, in all epochs."
    counts = {"parameters": "{:,}", "epochs": "{:.3g}", "steps": "{:,}", "pictures": "{:,}"}

    def __init__(self):
        self.data = None  # no run of a plan has pictures of its own

    def score(self, rows: list[dict]) -> str:
        return "accuracy"

    def describe(self, flags: list[str], whole: bool) -> dict:
        argv = add_recipe(flags)
        inputs = read_flags(argv)
        import_files(inputs.imports)
        entry = {"model_config": describe_model(inputs)}
        if not whole:
            return entry
        inputs, args = parse_arguments(argv)
        for name, ok, allowed in (
            ("num_train_epochs", args.trains, "positive"),
            ("early_stopping_patience", args.early_stopping_patience is None, "left out: all seeds end alike"),
        ):
            if not ok:
                raise ValueError(f"--{name} must be {allowed}, got {getattr(args, name)!r}")
        if self.data is None:
            self.data = read_images(inputs)
            self.identity = identify_data(self.data)
        new_config(inputs, self.data)
        return describe_run(inputs, args, {**self.identity, **entry})

    def known_keys(self, entries: list[dict]) -> set[str]:
        return set.intersection(*map(set, entries))  # a flag that some lack is of another version of transformers

    def train(self, flags: list[str]) -> None:
        main(flags)

    def has_trained(self, folder: Path) -> bool:
        return read_json(folder / "all_results.json", "run")["train_seconds"] > 0

    def facts(self, flags: list[str]) -> dict:
        inputs, args = parse_arguments(add_recipe(flags))
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return {
            "data": public_path(inputs.data),
            "hardware": hardware_name(args.device),
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "versions": {"Python": platform.python_version(), **versions},
            "date": today(),
        }

    def read_run(self, folder: Path) -> dict:
        result, entry = read_json(folder / RESULT, "run"), self.read_entry(folder)
        scores, state = read_json(folder / "all_results.json", "run"), read_json(folder / TRAINER_STATE, "run")
        log, count = state["log_history"], scores["train_samples"]
        curve = {line["epoch"] * count: line["eval_accuracy"] for line in log if "eval_accuracy" in line}
        curve = curve or {state["epoch"] * count: scores["eval_accuracy"]}
        valid = f"{scores['eval_samples']:,} pictures"
        if entry["load_best_model_at_end"]:
            valid += f", best of {len(curve)} checkpoints by {entry['metric_for_best_model']}"
        versions = {**result["versions"], "modeling_aft": result["modeling_aft"]}
        return {
            "seed": result["seed"],
            "parameters": scores["num_parameters"],
            "epochs": state["epoch"],
            "steps": state["global_step"],
            "pictures": round(state["epoch"] * count),
            "valid": scores["eval_accuracy"],
            "test": scores.get("test_accuracy"),
            "pictures_per_second": median(line["samples_per_second"] for line in log if "samples_per_second" in line),
            "peak_bytes": result["peak_bytes"],
            "valid_protocol": valid,
            "test_protocol": f"{scores['test_samples']:,} pictures" if "test_samples" in scores else "none",
            "data": result["data"],
            "data_sha256": ", ".join(f"{part} {sha256}" for part, sha256 in entry["data"].items()),
            "hardware": f"{result['processor']}; {result['hardware']}",
            "precision": result["precision"],
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "date": result["date"],
            "command": result["command"],
            "curve": np.array(sorted(curve.items())),
        }


def describe_model(inputs) -> dict:
    """The configuration of a model as far as the plan says it; the data, which are in the entry too, say the rest."""
    model = override(preset_values(inputs), inputs.model_override, f"--model {inputs.model}").to_diff_dict()
    model.pop("transformers_version", None)
    return model
