# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of `aft seq2seq` that begin from nothing, for `aft compare`."""

from transformers import PreTrainedConfig

from aft.commands.seq2seq import main
from aft.compare_trained import Trained
from aft.seq2seq import SCORES, check_lengths, identify_data, identify_tokenizer, parse_arguments
from aft.seq2seq_flags import SOURCES, Seq2SeqInputs, read_flags
from aft.seq2seq_models import make_tokenizer, read_config


class EncoderDecoders(Trained):
    amount, rows = "tokens", "rows"
    form = "{:.3f}"
    best = staticmethod(min)
    note = (
        "tokens are those of sources and targets without padding, in all epochs; exact match, BLEU, chrF and ROUGE "
        "are of what was written for test, and generated tokens/s is how fast."
    )
    counts = {"parameters": "{:,}", "epochs": "{:.3g}", "steps": "{:,}", "tokens": "{:,}"}
    more_scores = {"exact_match": "{:.3f}"} | {name: "{:.2f}" for names in SCORES.values() for name in names}
    with_spread = (*more_scores, "valid", "test")
    more_speeds = ("generated_tokens_per_second",)
    metric, of_epoch, rate = "log_perplexity", "train_tokens", "tokens_per_second"

    def __init__(self):
        self.identity = None  # of the data: no run of a plan has its own

    def score(self, rows: list[dict]) -> str:
        return "nats per token of the targets"

    def read(self, flags: list[str]) -> Seq2SeqInputs:
        return read_flags(flags)

    def parse(self, flags: list[str]) -> tuple:
        return parse_arguments(flags)

    def where(self, inputs: Seq2SeqInputs) -> str:
        return next(value for name in SOURCES if (value := getattr(inputs, name)))

    def configure(self, inputs: Seq2SeqInputs) -> PreTrainedConfig:
        return read_config(inputs)

    def identify(self, inputs: Seq2SeqInputs, config: PreTrainedConfig) -> dict:
        check_lengths(inputs, config)
        if self.identity is None:
            self.identity = identify_data(inputs)
        return {"data": {**self.identity, "tokenizer": describe_tokenizer(inputs, config)}}

    def train(self, flags: list[str]) -> None:
        main(flags)


def describe_tokenizer(inputs: Seq2SeqInputs, config: PreTrainedConfig) -> str:
    """What decides a tokenizer beside the texts: scores per token can only be compared with the same one."""
    if inputs.tokenizer in (None, "bpe"):
        return f"BPE of {inputs.vocab_size or config.vocab_size}"
    return identify_tokenizer(make_tokenizer(inputs, config, ()))
