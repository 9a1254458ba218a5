"""Attention-free language models for transformers. Importing the package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_aft import AFTConfig
from .configuration_synthesizer import SynthesizerConfig
from .modeling_aft import AFTForCausalLM, AFTModel
from .modeling_synthesizer import SynthesizerForCausalLM, SynthesizerModel
from .tokenization_bytes import ByteTokenizer


__version__ = "0.1.0"

# With register_for_auto_class, every save_pretrained, also of a Trainer checkpoint, carries the code that loads it
# without this package.
for _config, _models in (
    (AFTConfig, {AutoModel: AFTModel, AutoModelForCausalLM: AFTForCausalLM}),
    (SynthesizerConfig, {AutoModel: SynthesizerModel, AutoModelForCausalLM: SynthesizerForCausalLM}),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, fast_tokenizer_class=ByteTokenizer, exist_ok=True)
    _config.register_for_auto_class()
    for _auto_class, _model in _models.items():
        _auto_class.register(_config, _model, exist_ok=True)
        _model.register_for_auto_class(_auto_class.__name__)
ByteTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = [
    "AFTConfig",
    "AFTForCausalLM",
    "AFTModel",
    "ByteTokenizer",
    "SynthesizerConfig",
    "SynthesizerForCausalLM",
    "SynthesizerModel",
]
