# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The configuration fields that the encoder-decoders of the model families share, and their checks."""

import copy
from dataclasses import fields
from typing import ClassVar

from transformers import PreTrainedConfig

from .configuration_common import CheckedConfig, TextMixerConfig, strict_config


@strict_config
class Seq2SeqConfig(CheckedConfig):
    """Fields of every encoder-decoder; see [`SynthesizerSeq2SeqConfig`], which documents them. Subclasses have the
    fields `encoder` and `decoder`, and name the class of both in `sub_configs`."""

    keys_to_ignore_at_inference = [*TextMixerConfig.keys_to_ignore_at_inference, "encoder_last_hidden_state"]
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {}

    num_cross_attention_heads: int = 8
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        of_stacks = {entry.name for config_class in self.sub_configs.values() for entry in fields(config_class)}
        problems = [
            f"`{name}` must be given in `encoder` or `decoder`, got {value!r} beside them"
            for name, value in kwargs.items()
            if name in of_stacks and name != "vocab_size"
        ]
        for name, config_class in self.sub_configs.items():
            try:
                setattr(self, name, self._sub_config(getattr(self, name), config_class, is_decoder=name == "decoder"))
            except ValueError as error:
                problems.append(f"`{name}`: {str(error).rstrip('.')}")
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems) + ".")
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        if name == "pad_token_id":  # which both stacks read
            for stack in self.sub_configs:
                if isinstance(config := getattr(self, stack, None), PreTrainedConfig):
                    config.pad_token_id = value

    def _sub_config(self, given, config_class: type[PreTrainedConfig], is_decoder: bool) -> PreTrainedConfig:
        """A configuration of its own from that, or the fields, of one stack."""
        if isinstance(given, PreTrainedConfig):
            config = copy.deepcopy(given)
        else:
            values = {"is_decoder": is_decoder, **(given or {})}
            model_type = values.pop("model_type", config_class.model_type)
            if model_type != config_class.model_type:
                raise ValueError(f"`model_type` must be {config_class.model_type!r}, got {model_type!r}")
            config = config_class(**values)
        if config.pad_token_id is None:
            config.pad_token_id = self.pad_token_id
        return config

    @property
    def vocab_size(self) -> int:
        """The number of ids that the decoder writes (not serialised). Setting it sets that of both stacks."""
        return self.decoder.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.encoder.vocab_size = self.decoder.vocab_size = value

    @property
    def hidden_size(self) -> int:
        """That of the decoder, as `num_hidden_layers` and `num_attention_heads` are: what tools look for."""
        return self.decoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.decoder.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.decoder.num_attention_heads

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """That of the encoder, if it alone is asked for, or else that of the decoder, of which caches are made."""
        return self.encoder if encoder and not decoder else self.decoder

    def _problems(self) -> list[str]:
        problems = [f"`{name}`: {problem}" for name in self.sub_configs for problem in getattr(self, name)._problems()]
        if problems:
            return problems  # the rest compares what would have to be right
        problems = self._below_one("num_cross_attention_heads")
        width = self.decoder.hidden_size
        if not problems and width % self.num_cross_attention_heads:
            allowed = f"a divisor of decoder.hidden_size ({width})"
            problems.append(self._problem("num_cross_attention_heads", allowed))
        if not self.is_encoder_decoder:
            problems.append(self._problem("is_encoder_decoder", "True"))
        for name in self.sub_configs:
            config, is_decoder = getattr(self, name), name == "decoder"
            if config.is_decoder != is_decoder:
                problems.append(f"`{name}.is_decoder` must be {is_decoder}, got {config.is_decoder}")
            for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
                value, of_both = getattr(config, token), getattr(self, token)
                if value is not None and value != of_both:
                    problems.append(
                        f"`{name}.{token}` must be None or `{token}` of the whole ({of_both}), got {value}"
                    )
        if self.tie_word_embeddings:
            for name in ("vocab_size", "hidden_size"):
                ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
                if ours != theirs:
                    allowed = f"that of the decoder ({theirs}), whose embeddings it shares (tie_word_embeddings=True)"
                    problems.append(f"`encoder.{name}` must be {allowed}, got {ours}")
        start = self.decoder_start_token_id
        if start is not None and not 0 <= start < self.decoder.vocab_size:
            allowed = f"None or an id of the decoder's vocabulary (0 to {self.decoder.vocab_size - 1})"
            problems.append(self._problem("decoder_start_token_id", allowed))
        return problems
