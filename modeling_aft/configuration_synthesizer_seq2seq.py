# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Configuration of the encoder-decoder of Synthesizers (arXiv 2005.00743)."""

from typing import ClassVar

from transformers import PreTrainedConfig

from .configuration_common import strict_config
from .configuration_seq2seq import Seq2SeqConfig
from .configuration_synthesizer import SynthesizerConfig


@strict_config
class SynthesizerSeq2SeqConfig(Seq2SeqConfig):
    r"""
    Configuration of [`SynthesizerSeq2SeqModel`], [`SynthesizerForConditionalGeneration`],
    [`SynthesizerSeq2SeqForSequenceClassification`] and [`SynthesizerEncoderModel`]: two stacks whose self-attention is
    a Synthesizer's, and between them attention of dot products.

    Args:
        encoder, decoder (`SynthesizerConfig` or `dict`, *optional*):
            The two stacks, which may be of different types, depths, widths and maximum lengths. Of a `dict`, which
            may leave fields out, `is_decoder` need not be given; a configuration must have it right. Of the fields
            that are those of a whole model, `lm_head_bias` is read in that of the decoder, and `tie_word_embeddings`
            here alone.
        num_cross_attention_heads (`int`, defaults to 8):
            Heads of the attention to what the encoder gives, a divisor of `decoder.hidden_size`.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the embeddings of encoder and decoder and the head share their weight. `vocab_size` and
            `hidden_size` must then be the same in both stacks.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Special token ids of both stacks; none by default.
        decoder_start_token_id (`int`, *optional*):
            The id that the decoder reads first. There is none by default, and without it neither labels can become
            inputs of the decoder nor `generate` begin without an input of it.

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.

    Example:

    ```python
    >>> from modeling_aft import SynthesizerForConditionalGeneration, SynthesizerSeq2SeqConfig

    >>> config = SynthesizerSeq2SeqConfig(
    ...     encoder={"synthesizer_type": "random", "num_hidden_layers": 2, "max_position_embeddings": 64},
    ...     decoder={"synthesizer_type": "dense", "num_hidden_layers": 2, "max_position_embeddings": 32},
    ...     decoder_start_token_id=0,
    ... )
    >>> model = SynthesizerForConditionalGeneration(config)
    ```"""

    model_type = "synthesizer_seq2seq"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "encoder": SynthesizerConfig,
        "decoder": SynthesizerConfig,
    }

    encoder: SynthesizerConfig | dict | None = None
    decoder: SynthesizerConfig | dict | None = None


__all__ = ["SynthesizerSeq2SeqConfig"]
