# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The configuration fields that the model families share, and their checks."""

import dataclasses
import difflib
import json
import math
import os
from functools import wraps

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging


POSITION_EMBEDDING_TYPES = ("learned", "sinusoidal", "none")
NORM_TYPES = ("layer", "dyt", "rms")
SCALINGS = ("logits", "weights")
ACTIVATIONS = ("none", "tanh")  # of linear layers and of keys
FIELDS_OF_TOOLS = ("auto_map", "quantization_config")  # which tools add to any configuration

logger = logging.get_logger(__name__)


def strict_config(config_class):
    """`@strict` of huggingface_hub, with all fields of a wrong type in one ValueError instead of the first."""
    config_class = strict(config_class)
    init = config_class.__init__

    @wraps(init)
    def init_with_one_error(self, *args, **fields):
        problems = []
        for name, value in fields.items():
            for validator in config_class.__validators__.get(name, ()):
                try:
                    validator(value)
                except (TypeError, ValueError) as error:
                    problems.append(str(error))
        if problems:
            raise ValueError(f"{config_class.__name__}: " + "; ".join(problems) + ".")
        init(self, *args, **fields)

    config_class.__init__ = init_with_one_error
    return config_class


@strict_config
class CheckedConfig(PreTrainedConfig):
    """What every configuration in the package can do: check its fields, and be saved with the code of its models."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As the library's; with the code of the models, so that the folder serves every Auto class of the family,
        whether a model has saved it or a configuration alone."""
        # The models have put them there; what a user derives from a configuration has others.
        heads = type(self).__dict__.get("heads", {}) if self._auto_class is not None else {}
        if heads:
            names = {name: f"{head.__module__.rpartition('.')[2]}.{head.__name__}" for name, head in heads.items()}
            self.auto_map = {**(getattr(self, "auto_map", None) or {}), **names}
        super().save_pretrained(save_directory)
        for head in {head.__module__: head for head in heads.values()}.values():  # which copies whole modules
            custom_object_save(head, save_directory)
        if push_to_hub:  # from a folder of its own, which gets the same files
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._warn_of_unknown(kwargs)
        self.validate_fields()

    def _warn_of_unknown(self, given: dict) -> None:
        """Says what no model will read. It is kept, as the library keeps it: a file may be of a later version."""
        known = {entry.name for entry in dataclasses.fields(self)}
        for name in given:
            is_attribute = name in vars(self) and not hasattr(type(self), name)  # else the library has a use for it
            if not is_attribute or name.startswith("_") or name in FIELDS_OF_TOOLS:
                continue
            likely = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{likely[0]}`?" if likely else ""
            logger.warning(f"`{name}` is no field of {type(self).__name__}, and its models do not read it.{hint}")

    def validate_layer_type(self):
        """Replaces the check of the base class, which knows only the layer types of the library."""

    def validate_fields(self):
        """Raises one ValueError that lists every field with a value that is not allowed."""
        if problems := self._problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        """What is wrong with the fields. Subclasses say it."""
        return []

    def _problem(self, name: str, allowed: str) -> str:
        return f"`{name}` must be {allowed}, got {getattr(self, name)!r}"

    def _below_one(self, *names: str) -> list[str]:
        """What is wrong with numbers that have to be at least 1."""
        return [self._problem(name, "at least 1") for name in names if getattr(self, name) < 1]


@strict_config
class MixerConfig(CheckedConfig):
    """Fields of every model of one stack of blocks: those of its blocks."""

    hidden_size: int = 512
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    num_attention_heads: int = 1
    hidden_dropout_prob: float | int = 0.1
    norm_type: str = "layer"
    layer_norm_eps: float = 1e-5
    linear_fan_in: int | None = None
    linear_activation: str = "none"
    linear_bias: bool = True
    qkv_bias: bool = False
    initializer_range: float = 0.02

    def _problems(self) -> list[str]:
        problems = self._below_one("hidden_size", "num_hidden_layers", "num_attention_heads")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            problems.append(self._problem("intermediate_size", "None or at least 1"))
        if self.hidden_act not in ACT2FN:
            problems.append(self._problem("hidden_act", "a name in transformers.activations.ACT2FN"))
        if self.norm_type not in NORM_TYPES:
            problems.append(self._problem("norm_type", f"one of {', '.join(NORM_TYPES)}"))
        if self.linear_fan_in is not None and self.linear_fan_in < 1:
            problems.append(self._problem("linear_fan_in", "None or at least 1"))
        if self.linear_activation not in ACTIVATIONS:
            problems.append(self._problem("linear_activation", f"one of {', '.join(ACTIVATIONS)}"))
        if not 0 <= self.hidden_dropout_prob < 1:
            problems.append(self._problem("hidden_dropout_prob", "in [0, 1)"))
        if not 0 < self.layer_norm_eps < math.inf:
            problems.append(self._problem("layer_norm_eps", "positive and finite"))
        if not 0 <= self.initializer_range < math.inf:
            problems.append(self._problem("initializer_range", "at least 0 and finite"))
        return problems

    def _heads_problem(self) -> list[str]:
        """What is wrong where the heads share out the channels."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads == 0:
            return []
        return [self._problem("num_attention_heads", f"a divisor of hidden_size ({self.hidden_size})")]


@strict_config
class TextMixerConfig(MixerConfig):
    """Fields of every model of text; see [`AFTConfig`] and [`SynthesizerConfig`], which document them."""

    # What Trainer does not gather from the outputs: the cache, by the names that releases of transformers give it.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # The fields that decide what a state means.
    _state_fields = ("model_type", "hidden_size", "num_hidden_layers", "position_embedding_type")

    vocab_size: int = 256
    max_position_embeddings: int = 1024
    position_embedding_type: str = "learned"
    scaling: str = "logits"
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    is_decoder: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def state_kind(self) -> str:
        """What the caches of such models have in common, as JSON: no other fits (not serialised)."""
        fields = {name: getattr(self, name) for name in self._state_fields}
        if self.has_position_table:
            fields["max_position_embeddings"] = self.max_position_embeddings
        return json.dumps(fields)

    @property
    def position_limit(self) -> int | None:
        """How many positions there are learned tables for; None where no table ends (not serialised)."""
        return self.max_position_embeddings if self.has_position_table else None

    def validate_token_ids(self):
        """The check of the base class, which warns of ids beyond the vocabulary, where that of padding is within it:
        beyond it, no byte is lost to padding."""
        if self.pad_token_id is None or self.pad_token_id < self.vocab_size:
            super().validate_token_ids()

    def _problems(self) -> list[str]:
        problems = super()._problems() + self._below_one("vocab_size", "max_position_embeddings")
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            problems.append(self._problem("position_embedding_type", f"one of {', '.join(POSITION_EMBEDDING_TYPES)}"))
        if self.scaling not in SCALINGS:
            problems.append(self._problem("scaling", f"one of {', '.join(SCALINGS)}"))
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            problems.append(self._problem("hidden_size", "even with sinusoidal position embeddings"))
        return problems
