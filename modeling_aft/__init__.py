"""Attention-free language models for transformers. Importing the package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .cache_files import load_cache, save_cache
from .configuration_aft import AFTConfig
from .configuration_synthesizer import SynthesizerConfig
from .modeling_attention_free import (
    AFTForCausalLM,
    AFTForMaskedLM,
    AFTForSequenceClassification,
    AFTForTokenClassification,
    AFTModel,
)
from .modeling_synthesizer import (
    SynthesizerForCausalLM,
    SynthesizerForMaskedLM,
    SynthesizerForSequenceClassification,
    SynthesizerForTokenClassification,
    SynthesizerModel,
)
from .tokenization_bytes import ByteTokenizer


__version__ = "0.1.0"

_AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
_MODELS = {
    AFTConfig: (
        AFTModel,
        AFTForCausalLM,
        AFTForMaskedLM,
        AFTForSequenceClassification,
        AFTForTokenClassification,
    ),
    SynthesizerConfig: (
        SynthesizerModel,
        SynthesizerForCausalLM,
        SynthesizerForMaskedLM,
        SynthesizerForSequenceClassification,
        SynthesizerForTokenClassification,
    ),
}
# With register_for_auto_class, every save_pretrained, also of a Trainer checkpoint, carries the code that loads it
# without this package.
for _config, _models in _MODELS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=ByteTokenizer, exist_ok=True)
    _config.register_for_auto_class()
    for _auto_class, _model in zip(_AUTO_CLASSES, _models, strict=True):
        _auto_class.register(_config, _model, exist_ok=True)
        _model.register_for_auto_class(_auto_class.__name__)
ByteTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = [
    "AFTConfig",
    "AFTForCausalLM",
    "AFTForMaskedLM",
    "AFTForSequenceClassification",
    "AFTForTokenClassification",
    "AFTModel",
    "ByteTokenizer",
    "SynthesizerConfig",
    "SynthesizerForCausalLM",
    "SynthesizerForMaskedLM",
    "SynthesizerForSequenceClassification",
    "SynthesizerForTokenClassification",
    "SynthesizerModel",
    "load_cache",
    "save_cache",
]
