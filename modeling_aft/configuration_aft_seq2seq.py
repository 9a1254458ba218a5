# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of the encoder-decoder of Attention Free Transformers (arXiv 2105.14103)."""

from typing import ClassVar

from transformers import PreTrainedConfig

from .configuration_aft import AFTConfig
from .configuration_common import strict_config
from .configuration_seq2seq import Seq2SeqConfig


@strict_config
class AFTSeq2SeqConfig(Seq2SeqConfig):
    r"""
    Configuration of [`AFTSeq2SeqModel`], [`AFTForConditionalGeneration`], [`AFTSeq2SeqForSequenceClassification`] and
    [`AFTEncoderModel`]: two stacks of an Attention Free Transformer, and between them attention of dot products.

    Args:
        encoder, decoder (`AFTConfig` or `dict`, *optional*): The two stacks.

        The other arguments, and what is said of these, are those of [`SynthesizerSeq2SeqConfig`].

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.

    Example:

    ```python
    >>> from modeling_aft import AFTForConditionalGeneration, AFTSeq2SeqConfig

    >>> stack = {"aft_type": "conv", "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> config = AFTSeq2SeqConfig(encoder=stack, decoder=stack, decoder_start_token_id=0)
    >>> model = AFTForConditionalGeneration(config)
    ```"""

    model_type = "aft_seq2seq"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"encoder": AFTConfig, "decoder": AFTConfig}

    encoder: AFTConfig | dict | None = None
    decoder: AFTConfig | dict | None = None


__all__ = ["AFTSeq2SeqConfig"]
