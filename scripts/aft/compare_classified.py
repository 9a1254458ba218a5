# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of `aft classify` that begin from nothing, for `aft compare`."""

from transformers import PreTrainedConfig

from aft.classifying import identify_data, new_config, parse_arguments, preset_values
from aft.classifying_flags import add_recipe, read_flags
from aft.commands.classify import main
from aft.compare_trained import Trained
from aft.image_data import read_images
from aft.model_configs import override


class Classified(Trained):
    amount = rows = "pictures"
    form = "{:.4f}"
    best = staticmethod(max)
    note = "pictures are those that were trained on, in all epochs."
    counts = {"parameters": "{:,}", "epochs": "{:.3g}", "steps": "{:,}", "pictures": "{:,}"}
    metric, of_epoch, rate = "accuracy", "train_samples", "samples_per_second"

    def __init__(self):
        self.data = None  # no run of a plan has pictures of its own

    def score(self, rows: list[dict]) -> str:
        return "accuracy"

    def read(self, flags: list[str]):
        return read_flags(add_recipe(flags))

    def parse(self, flags: list[str]) -> tuple:
        return parse_arguments(add_recipe(flags))

    def where(self, inputs) -> str:
        return inputs.data

    def configure(self, inputs) -> PreTrainedConfig:
        return override(preset_values(inputs), inputs.model_override, f"--model {inputs.model}")

    def identify(self, inputs, config: PreTrainedConfig) -> dict:
        if self.data is None:
            self.data = read_images(inputs)
            self.identity = identify_data(self.data)
        new_config(inputs, self.data)
        return self.identity

    def train(self, flags: list[str]) -> None:
        main(flags)
