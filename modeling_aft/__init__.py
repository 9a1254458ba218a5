"""Attention-free language models for transformers. Importing the package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_aft import AFTConfig
from .modeling_aft import AFTForCausalLM, AFTModel
from .tokenization_bytes import ByteTokenizer


__version__ = "0.1.0"

AutoConfig.register(AFTConfig.model_type, AFTConfig, exist_ok=True)
AutoModel.register(AFTConfig, AFTModel, exist_ok=True)
AutoModelForCausalLM.register(AFTConfig, AFTForCausalLM, exist_ok=True)
AutoTokenizer.register(AFTConfig, fast_tokenizer_class=ByteTokenizer, exist_ok=True)

# Every save_pretrained, also of a Trainer checkpoint, then carries the code that loads it without this package.
AFTConfig.register_for_auto_class()
AFTModel.register_for_auto_class("AutoModel")
AFTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ByteTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = ["AFTConfig", "AFTForCausalLM", "AFTModel", "ByteTokenizer"]
