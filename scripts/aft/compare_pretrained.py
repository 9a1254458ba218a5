# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of `aft pretrain`, for `aft compare`."""

from pathlib import Path
from statistics import median

import numpy as np

from aft.checkpointing import EARLIER
from aft.compare_program import RESULT, Program
from aft.model_configs import build_config, changed_fields
from aft.picture_data import load_source
from aft.pretraining import pretrain
from aft.pretraining_arguments import MAY_DIFFER_WHEN_CONTINUED, check_arguments, parse_arguments
from aft.protocols import unit_of
from aft.run_log import describe_protocol, read_log
from aft.settings_files import read_json


class Pretrained(Program):
    amount = "tokens"
    held_out = "valid"
    form = "{:.3f}"
    best = staticmethod(min)
    note = "train is what the last tenth of the training read, as it went by, with dropout where there is any."
    counts = {"parameters": "{:,}", "steps": "{:,}", "tokens": "{:,}"}
    more_scores = {"train": form}

    def __init__(self):
        self.data = None  # its checksum: no run of a plan has data of its own

    def score(self, rows: list[dict]) -> str:
        return unit_of(rows[0]["valid_protocol"].split(",")[0])[0]

    def describe(self, flags: list[str], whole: bool) -> dict:
        args = parse_arguments(flags)
        config = check_arguments(args, num_processes=1) if whole else build_config(args)
        model = changed_fields(config)
        if not whole:
            return {"model_config": model}
        self.data = self.data or load_source(args).sha256
        decisive = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER_WHEN_CONTINUED}
        return {"model_config": model, "data": self.data, **decisive}

    def read_entry(self, folder: Path) -> dict:
        return {**EARLIER, **super().read_entry(folder)}

    def train(self, flags: list[str]) -> None:
        pretrain(flags)

    def has_trained(self, folder: Path) -> bool:
        events = read_log(folder / "run.jsonl")
        resumed = [event["step"] for event in events if event["event"] == "resume"]
        return not resumed or resumed[-1] != events[-1]["step"]

    def read_run(self, folder: Path) -> dict:
        result = read_json(folder / RESULT, "run")
        events = read_log(folder / "run.jsonl")
        config = next(event for event in events if event["event"] == "config")
        train = [event for event in events if event["event"] == "train"]
        valid, test = (
            [event for event in events if event["event"] == "evaluation" and event["split"] == split]
            for split in ("valid", "test")
        )
        per_step = config["tokens_per_step"]
        last = [event["step"] > 0.9 * train[-1]["step"] for event in train]
        lengths = np.diff([event["step"] for event in train], prepend=0) * last  # steps that a line of the end sums up
        versions = {name: config["versions"][name] for name in ("Python", "torch", "transformers")}
        versions["modeling_aft"] = result["modeling_aft"]
        return {
            "seed": result["seed"],
            "parameters": config["parameters"],
            "steps": train[-1]["step"],
            "tokens": train[-1]["step"] * per_step,
            "train": float(np.average([event["bits_per_byte"] for event in train], weights=lengths)),
            "valid": valid[-1]["bits_per_byte"],
            "test": test[-1]["bits_per_byte"],
            "tokens_per_second": median(event["tokens_per_second"] for event in train),
            "peak_bytes": result["peak_bytes"],
            "valid_protocol": describe_protocol(valid[-1]),
            "test_protocol": describe_protocol(test[-1]),
            "data": config["data"],
            "data_sha256": config["data_sha256"],
            "hardware": f"{result['processor']}; {config['hardware']}",
            "precision": config["precision"],
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "date": config["date"],
            "command": result["command"],
            "curve": np.array([[event["step"] * per_step, event["bits_per_byte"]] for event in valid]),
        }
