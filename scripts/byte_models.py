# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Saved models of bytes: found and checked the same way by every script, with the package or without."""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


try:
    import modeling_aft  # noqa: F401  (registers the model types)

    TRUST_REMOTE_CODE = False
except ImportError:
    TRUST_REMOTE_CODE = True  # the code that was saved beside the weights


def read_config(name: str) -> PreTrainedConfig:
    """
    The configuration of the model of 256 bytes in a folder or on the Hub.

    Raises:
        ValueError: the model has other tokens.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE)
    if (found := getattr(config, "vocab_size", "no")) != 256:
        raise ValueError(f"--model {name}: must be a model of 256 bytes, got {found} tokens")
    return config


def load_model(name: str, dtype) -> PreTrainedModel:
    """The causal language model of a folder or a name on the Hub, in a torch dtype, or "auto" for its own."""
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE, dtype=dtype)
