# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Saved models: found, loaded whole, and checked the same way by every script, with the package or without."""

import contextlib
import math
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from aft.console import one_line
from aft.flags import check_model_name, like_path


with contextlib.suppress(ImportError):  # without the package, --trust_remote_code runs the code beside the weights
    import modeling_aft  # noqa: F401  (registers the model types)


# What trains and scores a language model, by its objective.
LANGUAGE_MODELS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def objective_of(config: PreTrainedConfig) -> str:
    """Of which of the `LANGUAGE_MODELS` a saved model is, by its configuration."""
    return "masked" if any(name.endswith("ForMaskedLM") for name in config.architectures or ()) else "causal"


def without_cache(objective: str) -> dict:
    """What a language model gets in a forward pass so that it returns no cache; a masked one has none."""
    return {"use_cache": False} if objective == "causal" else {}


def load(
    auto_class, name: str | Path, flag: str = "--model", what: str = "model", file: str = "config.json", **options
):
    """
    What an Auto class makes of a folder, or of a name on the Hub; `options` are those of its `from_pretrained`.

    Args:
        what, file: what it makes, and the file that a folder must have for it.

    Raises:
        ValueError: there is no such folder, or it does not load; names the flag, the folder and the reason.
    """
    check_model_name(name, flag, what=what, file=file)
    elsewhere = "" if Path(name).exists() else f"no such folder{like_path(Path(name))}; as a name on the Hub: "
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # of JSON, of a configuration's own checks, of files of weights, of remote code
        raise ValueError(f"{flag} {name}: {elsewhere}{one_line(error)}") from error


def load_config(name: str | Path, trust_remote_code: bool = False, flag: str = "--model") -> PreTrainedConfig:
    """
    The configuration of a model.

    Raises:
        ValueError: it does not load.
    """
    return load(AutoConfig, name, flag, trust_remote_code=trust_remote_code)


def shape_of_model(name: str | Path) -> tuple[int, int, int] | None:
    """Height, width and channels of the pictures of a saved model, by its image processor; None if it has none."""
    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(name)
        return values["size"]["height"], values["size"]["width"], values["num_channels"]
    except (OSError, KeyError, TypeError):
        return None


def check_reads_text(name: str | Path, flag: str = "--model") -> None:
    """
    Checks that a saved model is none of pictures.

    Raises:
        ValueError: it is one; says what it is for.
    """
    if shape_of_model(name) is not None:
        raise ValueError(
            f"{flag} {name}: must be a model of text, got one of pictures: aft paint draws with it, aft evaluate "
            "--pictures scores it, and aft pretrain --pictures --init_from trains it further"
        )


def load_model(
    auto_class,
    name: str | Path,
    flag: str = "--model",
    new_head: bool = False,
    added: frozenset[str] = frozenset(),
    **options,
):
    """
    A model, after a check that the tensors of its file are those that it has, and finite.

    Args:
        new_head: whether its head may be another than the one that was saved, and then random.
        added: names of tensors that the file need not have: those that it lacks begin as in a new model.

    Returns:
        The `PreTrainedModel`, and the names of the tensors that are new, a set.

    Raises:
        ValueError: it does not load, or names the tensors that are missing, unexpected, of another shape or not
            finite, or the fields of its configuration that are not finite.
    """
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its report of the same tensors, a table of many lines
    try:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}
        model, report = load(auto_class, name, flag, **options)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    # The names of what is missing are the model's own, those of what is unexpected are the file's.
    saved, base = model.config.architectures or (), model.base_model
    of_body = f"{model.base_model_prefix}."
    other_head = new_head and type(model).__name__ not in saved
    new, spare = (
        {tensor for tensor in report[kind] if may_differ and not tensor.startswith(of_body)}
        for kind, may_differ in (
            ("missing_keys", other_head and base is not model),
            ("unexpected_keys", other_head and type(base).__name__ not in saved),
        )
    )
    new |= added & set(report["missing_keys"])
    found = {
        "missing": set(report["missing_keys"]) - new,
        "unexpected": set(report["unexpected_keys"]) - spare,
        "of another shape": {tensor for tensor, *_ in report["mismatched_keys"]},
        "not finite": {tensor for tensor, values in model.named_parameters() if not is_finite(values)},
    }
    if problems := [f"{what}: {first_of(tensors)}" for what, tensors in found.items() if tensors]:
        raise ValueError(f"{flag} {name}: its tensors are not those of {type(model).__name__}; {'; '.join(problems)}")
    fields = vars(model.config).items()
    if wrong := [f"{key} {value}" for key, value in fields if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"{flag} {name}: its config.json must have finite numbers, got {', '.join(wrong)}")
    return model, new


def first_of(tensors: set[str], most: int = 10) -> str:
    """Names of tensors in a line, as many as one reads."""
    names = sorted(tensors)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity; what quantization makes of weights is taken as it is."""
    return type(values.data) is not torch.Tensor or bool(torch.isfinite(values).all())
