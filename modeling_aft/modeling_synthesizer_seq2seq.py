# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The encoder-decoder of Synthesizers (arXiv 2005.00743)."""

from .compatibility import list_in_library
from .configuration_synthesizer_seq2seq import SynthesizerSeq2SeqConfig
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
from .modeling_synthesizer import SynthesizerMixer, SynthesizerModel


class SynthesizerCrossBlock(CrossBlock):
    mixer_class = SynthesizerMixer


class SynthesizerDecoder(SynthesizerModel, MixerDecoder):
    """A causal Synthesizer that attends to the states of an encoder."""

    block_class = SynthesizerCrossBlock
    _no_split_modules = ["SynthesizerCrossBlock"]
    _can_record_outputs = {
        "hidden_states": SynthesizerCrossBlock,
        "attentions": SynthesizerMixer,
        "cross_attentions": CrossAttention,
    }


class SynthesizerSeq2SeqPreTrainedModel(MixerEncoderDecoder):
    config_class = SynthesizerSeq2SeqConfig
    encoder_class = SynthesizerModel
    decoder_class = SynthesizerDecoder
    _no_split_modules = ["SynthesizerBlock", "SynthesizerCrossBlock"]


class SynthesizerSeq2SeqModel(SynthesizerSeq2SeqPreTrainedModel, MixerSeq2SeqModel):
    """Encoder and decoder of Synthesizers without a head: see [`SynthesizerSeq2SeqConfig`]."""


class SynthesizerForConditionalGeneration(
    SynthesizerSeq2SeqPreTrainedModel, MixerForConditionalGeneration, Seq2SeqGenerationMixin
):
    """Encoder and decoder of Synthesizers with a language-model head."""

    model_class = SynthesizerSeq2SeqModel


class SynthesizerSeq2SeqForSequenceClassification(
    SynthesizerSeq2SeqPreTrainedModel, MixerSeq2SeqForSequenceClassification
):
    """Encoder and decoder of Synthesizers with a classifier of sequences."""

    model_class = SynthesizerSeq2SeqModel


class SynthesizerEncoderModel(SynthesizerSeq2SeqPreTrainedModel, MixerEncoderModel):
    """The encoder of Synthesizers alone, as an encoder-decoder has it."""


list_in_library(SynthesizerSeq2SeqPreTrainedModel)

__all__ = [
    "SynthesizerSeq2SeqPreTrainedModel",
    *(head.__name__ for head in SynthesizerSeq2SeqPreTrainedModel.heads.values()),
]
