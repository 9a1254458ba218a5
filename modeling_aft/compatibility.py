# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What differs between the supported releases of transformers, and what has to be as expected in all of them.

Up to 5.23 the cache is called `past_key_values`, in what `generate` passes to a model and in what a model returns;
from 5.24 on it is called `cache`. The models take both names, and give their outputs the one of the installed release.
"""

import inspect
from dataclasses import dataclass, fields

import transformers
from packaging.version import Version
from transformers import GenerationMixin, logging, modeling_outputs


OLDEST, NEWEST = "5.17", "5.24"  # releases of transformers that the tests have run on
CACHE_NAMES = ("cache", "past_key_values")  # the newest first

logger = logging.get_logger(__name__)


def cache_name(mixin: type = GenerationMixin, output: type = modeling_outputs.CausalLMOutputWithPast) -> str:
    """
    The name under which `generate` passes the cache, and reads it from an output.

    Args:
        mixin: the class whose `prepare_inputs_for_generation` makes the arguments of a forward pass.
        output: the class of a causal language model's output.

    Raises:
        ImportError: the installed release uses a name that these models do not take. Each step of `generate` would
            begin without a past, and the text would be nonsense.
    """
    parameters = inspect.signature(mixin.prepare_inputs_for_generation).parameters
    passed = [name for name in CACHE_NAMES if name in parameters]
    read = [name for name in CACHE_NAMES if name in {field.name for field in fields(output)}]
    if len(passed) != 1 or passed != read:
        raise ImportError(
            f"These models take the cache of `generate` as {' or '.join(CACHE_NAMES)}, but transformers "
            f"{transformers.__version__} passes it as {passed or 'something else'} and reads it from "
            f"{read or 'something else'}. Install transformers >= {OLDEST} and <= {NEWEST}, or a newer modeling_aft "
            "(for a model from the Hub: a newer revision of its code)."
        )
    return passed[0]


CACHE_NAME = cache_name()
if Version(transformers.__version__).release[:2] > Version(NEWEST).release[:2]:
    logger.warning_once(
        f"The code of these models was tested with transformers {OLDEST} to {NEWEST}; {transformers.__version__} is "
        "installed."
    )


@dataclass
class _CacheByItsNewName(transformers.utils.ModelOutput):
    """An output of a release up to 5.23 whose cache can also be read by the name of newer ones."""

    @property
    def cache(self):
        return self.past_key_values


def _output_class(base: type) -> type:
    if CACHE_NAME == "cache":
        return base
    return dataclass(type(base.__name__, (base,), {"cache": _CacheByItsNewName.cache, "__module__": __name__}))


BaseModelOutputWithPast = _output_class(modeling_outputs.BaseModelOutputWithPast)
CausalLMOutputWithPast = _output_class(modeling_outputs.CausalLMOutputWithPast)
DecoderOutput = _output_class(modeling_outputs.BaseModelOutputWithPastAndCrossAttentions)
Seq2SeqModelOutput = _output_class(modeling_outputs.Seq2SeqModelOutput)
Seq2SeqLMOutput = _output_class(modeling_outputs.Seq2SeqLMOutput)


def one_cache(cache, past_key_values):
    """
    The cache that was given under one of its two names, or None.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Give the cache as `cache` or as `past_key_values`, which is its older name, not as both.")
    return past_key_values if cache is None else cache


def refuse_unknown(model, keywords: dict, known: frozenset[str]) -> None:
    """
    Checks the keywords of a forward pass that are no parameters of it.

    Args:
        model: whose forward pass it is.
        keywords: what it was given beside its parameters.
        known: those that mean something to it.

    Raises:
        TypeError: one is unknown. What is swallowed may be what a newer release passes, or a misspelled argument.
    """
    if unknown := sorted(name for name in keywords if name not in known):
        raise TypeError(
            f"{type(model).__name__}.forward() got unexpected keyword arguments {', '.join(unknown)}; allowed: "
            f"{', '.join(sorted((inspect.signature(model.forward).parameters.keys() | known) - {'kwargs'}))}."
        )


def list_in_library(family: type) -> None:
    """
    Names the heads of a family in the tables by which Trainer, pipelines and other tools know what kind of model a
    class is, as for label smoothing, whether labels have to be shifted. Registration with the Auto classes does not
    reach those tables.
    """
    for auto_class, head in family.heads.items():
        mapping = getattr(transformers, auto_class)._model_mapping
        mapping._model_mapping[family.config_class.model_type] = head.__name__
