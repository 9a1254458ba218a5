# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Byte tokenizer: a token id is the value of a UTF-8 byte."""

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def byte_symbols() -> list[str]:
    """The printable character that the byte-level components of `tokenizers` use for each byte value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


BYTE_SYMBOLS = byte_symbols()


class ByteTokenizer(PreTrainedTokenizerFast):
    r"""
    Tokenizer of 256 tokens, one per byte value: `tokenizer(text).input_ids` are the bytes of `text.encode("utf-8")`,
    and `tokenizer.decode` gives the same text back, whatever it contains. Bytes that are not UTF-8 need no tokenizer:
    `list(data)` are their ids, and `bytes(ids)` are the bytes of ids; `decode` shows a broken character as U+FFFD.

    Every id is a byte, so batches are padded with byte 0 (NUL), on the left by default, and only the attention mask
    tells padding from a NUL of the text. `decode(ids, skip_special_tokens=True)` drops both.

    Args:
        pad_token (`str`, *optional*, defaults to the symbol of byte 0):
            Token that pads batches, `None` for none. A string that is not the symbol of a byte becomes token 256, and
            then the model needs `resize_token_embeddings(257)`.
        kwargs:
            Arguments of [`PreTrainedTokenizerFast`]. There is nothing to choose about the vocabulary.

    Example:

    ```python
    >>> from modeling_aft import ByteTokenizer

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer("né").input_ids
    [110, 195, 169]
    >>> tokenizer.decode([110, 195, 169])
    'né'
    ```"""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, pad_token=BYTE_SYMBOLS[0], **kwargs):
        backend = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        # from_pretrained passes the vocabulary of tokenizer.json: the same 256 tokens.
        kwargs.pop("vocab", None)
        # The symbol of the padding token is an ordinary character (U+0100) of some texts: never read it as padding.
        kwargs["split_special_tokens"] = True
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(tokenizer_object=backend, pad_token=pad_token, **kwargs)


__all__ = ["ByteTokenizer"]
