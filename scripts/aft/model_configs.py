# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The configuration of a model to train: from a preset and changes of it, and what it allows."""

import argparse
import copy
import functools
import json
import math

from transformers import AutoConfig, PreTrainedConfig

from aft.console import one_line
from aft.saved_models import LANGUAGE_MODELS, load_config
from aft.settings_files import read_json
from aft.vocabulary import START_OF_PICTURE, asked_size


MOST_PADDING = 1023  # ids that a model has and its tokenizer does not, to round their number
MOST_LAYERS = 1_000_000  # to make a configuration of more takes memory


def build_config(args: argparse.Namespace) -> PreTrainedConfig:
    """
    The model configuration of `args.model_preset`, or of the model `args.init_from`, with the fields of
    `args.model_override` changed. The `vocab_size` of a preset is that of `args.tokenizer`, unless it says another
    than the 256 of bytes.

    Raises:
        ValueError: the file is not a model configuration, a field or its value is not allowed, the tokenizer does not
            load, or `vocab_size` is another than it needs.
    """
    if args.init_from is None:
        name, values = f"--model_preset {args.model_preset}", read_json(args.model_preset, "--model_preset")
    else:
        name, values = f"--init_from {args.init_from}", load_config(args.init_from, flag="--init_from").to_dict()
    if "model_type" not in values:
        raise ValueError(f"{name}: must be a JSON object with a model_type")
    size = asked_size(args)
    if args.init_from is None:
        if args.objective == "masked":
            values.setdefault("is_decoder", False)  # which the models of this package need for it
        if values.get("vocab_size", 256) == 256:  # what the presets have, for bytes
            values["vocab_size"] = size
        if args.pictures is not None:
            values["bos_token_id"] = START_OF_PICTURE
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # those of a model's own tokenizer elsewhere
            values.setdefault(token, None)
    config = override(values, args.model_override, name)
    if type(config) not in LANGUAGE_MODELS[args.objective]._model_mapping:
        allowed = f"one that has a {LANGUAGE_MODELS[args.objective].__name__} with --objective {args.objective}"
        raise ValueError(f"{name}: model_type must be {allowed}, got {config.model_type!r}")
    most = size + MOST_PADDING if args.tokenizer not in (None, "bytes", "bpe") else size
    if not size <= config.vocab_size <= most:
        allowed = f"{size} for {'--pictures' if args.tokenizer is None else f'--tokenizer {args.tokenizer}'}"
        allowed += f", or with padding up to {most}" if most > size else ""
        raise ValueError(f"vocab_size must be {allowed}, got {config.vocab_size}; left out, it is {size}")
    return config


def override(values: dict, items: list[str], name: str) -> PreTrainedConfig:
    """
    The configuration of these fields, with those of `--model_override` changed.

    Raises:
        ValueError: a field or its value is not allowed; begins with `name`, or with the flag.
    """
    overrides = read_overrides(items, make_config(values, name))
    changed = copy.deepcopy(values)
    for key, value in overrides.items():
        *outer, field = key.split(".")
        fields = changed
        for part in outer:
            fields = fields.setdefault(part, {})
        fields[field] = value
    return make_config(changed, f"{name} with --model_override" if overrides else name)


def read_overrides(items: list[str], config: PreTrainedConfig) -> dict:
    """
    What `--model_override` says, by fields of this configuration; `decoder.key` is one of a configuration in it.

    Raises:
        ValueError: an item is no key=value, or stands there twice.
    """
    overrides = {}
    for item in items:
        key, equals, text = item.partition("=")
        *outer, field = key.split(".")
        owner = functools.reduce(lambda found, part: getattr(found, part, None), outer, config)
        if not equals or field == "model_type" or not hasattr(owner, field):
            raise ValueError(f"--model_override {item!r}: must be key=value with a field of {type(config).__name__}")
        if key in overrides:
            raise ValueError(f"--model_override {item!r}: {key} stands there twice")
        try:
            overrides[key] = json.loads(text)
        except (ValueError, RecursionError):
            overrides[key] = text  # a bare word is a string
    return overrides


def make_config(values: dict, name: str) -> PreTrainedConfig:
    """The configuration of these fields; a ValueError that begins with `name` if one of them is not allowed."""

    def find_infinite(value) -> bool:
        if isinstance(value, (dict, list)):
            return any(map(find_infinite, value.values() if isinstance(value, dict) else value))
        return isinstance(value, float) and not math.isfinite(value)

    if wrong := [field for field, value in values.items() if find_infinite(value)]:
        raise ValueError(f"{name}: must have finite numbers, got {', '.join(f'{key}={values[key]}' for key in wrong)}")
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"{name}: num_hidden_layers must be at most {MOST_LAYERS}, got {layers}")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # the configuration's own checks, and those of its strict dataclass
        raise ValueError(f"{name}: {one_line(error)}") from error


def changed_fields(config: PreTrainedConfig) -> dict:
    """The fields of a configuration that are not their defaults, without the version of the library."""
    fields = config.to_diff_dict()
    fields.pop("transformers_version", None)
    return fields


def has_fixed_state(config: PreTrainedConfig) -> bool:
    """Whether each layer of the model keeps what it has read in AFT's state of fixed size."""
    return set(getattr(config, "layer_types", None) or ()) == {"aft_state"}


def has_length_limit(config: PreTrainedConfig) -> bool:
    """Whether the model has tables that end at `max_position_embeddings`: a config may say so, else they do."""
    return getattr(config, "has_position_table", hasattr(config, "max_position_embeddings"))


def stack_limits(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """How many tokens encoder and decoder can read, None for any number."""
    stacks = config.get_text_config(encoder=True), config.get_text_config(decoder=True)
    return tuple(stack.max_position_embeddings if has_length_limit(stack) else None for stack in stacks)


def length_limit(config: PreTrainedConfig) -> int | None:
    """How many tokens every stack of the model can read, None for any number."""
    return min((limit for limit in stack_limits(config) if limit is not None), default=None)
