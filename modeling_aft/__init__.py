# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""AFT and Synthesizer for transformers. Importing the package registers their models with the Auto classes."""

import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision

from . import (
    modeling_aft_seq2seq,
    modeling_aft_vision,
    modeling_attention_free,
    modeling_synthesizer,
    modeling_synthesizer_seq2seq,
)
from .cache_files import load_cache, save_cache
from .configuration_aft import AFTConfig
from .configuration_aft_seq2seq import AFTSeq2SeqConfig
from .configuration_aft_vision import AFTVisionConfig
from .configuration_synthesizer import SynthesizerConfig
from .configuration_synthesizer_seq2seq import SynthesizerSeq2SeqConfig
from .image_processing_aft import AFTImageProcessor
from .modeling_aft_seq2seq import *  # noqa: F403
from .modeling_aft_vision import *  # noqa: F403
from .modeling_attention_free import *  # noqa: F403  (its mixer, and the heads that it declares)
from .modeling_synthesizer import *  # noqa: F403
from .modeling_synthesizer_seq2seq import *  # noqa: F403
from .streaming import TokenStream
from .tokenization_bytes import ByteTokenizer


__version__ = "0.1.0"
__all__ = [
    "AFTConfig",
    "AFTImageProcessor",
    "AFTSeq2SeqConfig",
    "AFTVisionConfig",
    "ByteTokenizer",
    "SynthesizerConfig",
    "SynthesizerSeq2SeqConfig",
    "TokenStream",
    "load_cache",
    "save_cache",
    *modeling_aft_seq2seq.__all__,
    *modeling_aft_vision.__all__,
    *modeling_attention_free.__all__,
    *modeling_synthesizer.__all__,
    *modeling_synthesizer_seq2seq.__all__,
]

# With register_for_auto_class, every save_pretrained, also of a Trainer checkpoint, carries the code that loads it
# without this package.
_text = modeling_attention_free.AFTPreTrainedModel, modeling_synthesizer.SynthesizerPreTrainedModel
_seq2seq = (
    modeling_aft_seq2seq.AFTSeq2SeqPreTrainedModel,
    modeling_synthesizer_seq2seq.SynthesizerSeq2SeqPreTrainedModel,
)
for _family in (*_text, *_seq2seq, modeling_aft_vision.AFTVisionPreTrainedModel):
    _config = _family.config_class
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
    for _auto_class, _head in _family.heads.items():
        getattr(transformers, _auto_class).register(_config, _head, exist_ok=True)
        _head.register_for_auto_class(_auto_class)
for _family in (*_text, *_seq2seq):
    transformers.AutoTokenizer.register(_family.config_class, fast_tokenizer_class=ByteTokenizer, exist_ok=True)
for _family in _text:
    AutoImageProcessor.register(
        _family.config_class, image_processor_classes={"pil": AFTImageProcessor}, exist_ok=True
    )
ByteTokenizer.register_for_auto_class("AutoTokenizer")
AFTImageProcessor.register_for_auto_class("AutoImageProcessor")
