# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The encoder-decoder of Attention Free Transformers (arXiv 2105.14103)."""

from .compatibility import list_in_library
from .configuration_aft_seq2seq import AFTSeq2SeqConfig
from .modeling_attention_free import AFTMixer, AFTModel
from .modeling_seq2seq import (
    CrossAttention,
    CrossBlock,
    MixerDecoder,
    MixerEncoderDecoder,
    MixerEncoderModel,
    MixerForConditionalGeneration,
    MixerSeq2SeqModel,
    Seq2SeqGenerationMixin,
)
from .modeling_seq2seq_heads import MixerSeq2SeqForSequenceClassification


class AFTCrossBlock(CrossBlock):
    mixer_class = AFTMixer


class AFTDecoder(AFTModel, MixerDecoder):
    """A causal Attention Free Transformer that attends to the states of an encoder."""

    block_class = AFTCrossBlock
    _no_split_modules = ["AFTCrossBlock"]
    _can_record_outputs = {
        "hidden_states": AFTCrossBlock,
        "attentions": AFTMixer,
        "cross_attentions": CrossAttention,
    }


class AFTSeq2SeqPreTrainedModel(MixerEncoderDecoder):
    config_class = AFTSeq2SeqConfig
    encoder_class = AFTModel
    decoder_class = AFTDecoder
    _no_split_modules = ["AFTBlock", "AFTCrossBlock"]


class AFTSeq2SeqModel(AFTSeq2SeqPreTrainedModel, MixerSeq2SeqModel):
    """Encoder and decoder of Attention Free Transformers without a head: see [`AFTSeq2SeqConfig`]."""


class AFTForConditionalGeneration(AFTSeq2SeqPreTrainedModel, MixerForConditionalGeneration, Seq2SeqGenerationMixin):
    """Encoder and decoder of Attention Free Transformers with a language-model head."""

    model_class = AFTSeq2SeqModel


class AFTSeq2SeqForSequenceClassification(AFTSeq2SeqPreTrainedModel, MixerSeq2SeqForSequenceClassification):
    """Encoder and decoder of Attention Free Transformers with a classifier of sequences."""

    model_class = AFTSeq2SeqModel


class AFTEncoderModel(AFTSeq2SeqPreTrainedModel, MixerEncoderModel):
    """The encoder of Attention Free Transformers alone, as an encoder-decoder has it."""


list_in_library(AFTSeq2SeqPreTrainedModel)

__all__ = [
    "AFTSeq2SeqPreTrainedModel",
    *(head.__name__ for head in AFTSeq2SeqPreTrainedModel.heads.values()),
]
