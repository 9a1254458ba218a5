# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Byte tokenizer: a token id is the value of a UTF-8 byte."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, BatchEncoding, PreTrainedTokenizerFast


def byte_symbols() -> list[str]:
    """The printable character that the byte-level components of `tokenizers` use for each byte value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


BYTE_SYMBOLS = byte_symbols()
BYTES = {symbol: bytes([byte]) for byte, symbol in enumerate(BYTE_SYMBOLS)}
END_OF_TEXT = "<|endoftext|>"  # names byte 255 where it is a special token
# Arguments of other tokenizers that choose a vocabulary.
VOCABULARIES = ("tokenizer_object", "vocab", "merges", "vocab_file", "merges_file", "gguf_file")
# What a tokenizer.json says of how a text becomes tokens and back.
KEPT_PARTS = ("model", "normalizer", "pre_tokenizer", "decoder")
# Those of `from_pretrained` that say where a folder on the Hub is.
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class ByteTokenizer(PreTrainedTokenizerFast):
    r"""
    Tokenizer of 256 tokens, one per byte value: `tokenizer(text).input_ids` are the bytes of `text.encode("utf-8")`,
    and `tokenizer.decode` gives the same text back, whatever it contains. Bytes that are not UTF-8 need no tokenizer:
    `list(data)` are their ids, and `bytes(ids)` are the bytes of ids; `decode` shows a broken character as U+FFFD.

    The end of a text is `"<|endoftext|>"`, id 255: the byte 0xFF occurs in no UTF-8 text, so a model of 256 ids can
    learn and write it, and nothing is lost. Binary data have that byte; `eos_token=None` leaves it to them.

    Padding is no byte. The id of `pad_token` comes after all others, 256 by default, and these models need no row of
    an embedding for it. Batches are padded on the left.

    Other special tokens, an `eos_token` of one's own too, get ids from 256 on, and a model needs a row for each
    (`resize_token_embeddings(len(tokenizer))`). Special tokens other than padding are found in a text, unless
    `split_special_tokens=True` is given, here or in a call. The symbols of bytes never are.

    In the folder of a model of this package whose learned tables end, a tokenizer is saved, and loaded, with a
    `model_max_length` of at most their length, so `truncation=True` makes a text fit.

    Args:
        pad_token (`str`, *optional*, defaults to `"<|pad|>"`):
            Token that pads batches, `None` for none.
        tokenizer_file (`str`, *optional*):
            A tokenizer.json that a `ByteTokenizer` wrote.
        kwargs:
            Arguments of [`PreTrainedTokenizerFast`]. There is nothing to choose about the vocabulary. `eos_token` is
            `"<|endoftext|>"` by default; that of a folder is what it was saved with.

    Raises:
        ValueError: a file holds, or an argument chooses, another vocabulary than that of bytes.

    Example:

    ```python
    >>> from modeling_aft import ByteTokenizer

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer("né<|endoftext|>").input_ids
    [110, 195, 169, 255]
    >>> tokenizer.decode([110, 195, 169])
    'né'
    ```"""

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, pad_token="<|pad|>", tokenizer_file=None, **kwargs):
        for name in VOCABULARIES:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` must not be given: the vocabulary of a ByteTokenizer is the 256 bytes.")
        vocab = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
        if tokenizer_file is not None:
            vocab, saved = read_tokenizer_file(tokenizer_file)
            kwargs = {**saved, **kwargs}
        is_named = tokenizer_file is None or vocab.get(END_OF_TEXT) == 255
        kwargs.setdefault("eos_token", END_OF_TEXT if is_named else None)
        others = special_tokens(kwargs)
        name_last_byte(vocab, END_OF_TEXT in others, kwargs["eos_token"] is None)
        for token in [*others, pad_token]:
            if token:
                vocab.setdefault(str(token), len(vocab))
        added = {i: token for i, token in kwargs.pop("added_tokens_decoder", {}).items() if str(token) in vocab}
        # Of the vocabulary, `tokenizers` finds in a text what is added to it besides: all but symbols and padding.
        self._not_in_text = {*BYTE_SYMBOLS, *({str(pad_token)} - {*others, *map(str, added.values())})}
        kwargs["added_tokens_decoder"] = added
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(tokenizer_object=byte_backend(vocab), pad_token=pad_token, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, **kwargs):
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        if kwargs.get("model_max_length") is None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            config = model_config(pretrained_model_name_or_path, **options)
            tokenizer.model_max_length = within_tables(tokenizer.model_max_length, config)
        return tokenizer

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """The arguments of `__init__` for a saved folder. It reads tokenizer.json itself, all of it."""
        if kwargs.get("tokenizer_file") is None:
            folder = kwargs.get("name_or_path")
            if getattr(model_config(folder), "vocab_size", None) != len(BYTE_SYMBOLS):
                raise ValueError(
                    f"{folder} must have a tokenizer.json that a ByteTokenizer wrote, or a model of 256 bytes and no "
                    "tokenizer, got neither."
                )
        return kwargs

    def save_pretrained(self, save_directory, *args, **kwargs):
        given = self.model_max_length
        if Path(save_directory, "config.json").is_file():
            self.model_max_length = within_tables(given, model_config(save_directory))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.model_max_length = given

    @property
    def vocab_size(self) -> int:
        """The number of bytes. `len` counts the special tokens too."""
        return len(BYTE_SYMBOLS)

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        new_tokens = [token for token in new_tokens if str(token) not in self._not_in_text]
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(BYTES.get(token) or token.encode() for token in tokens).decode("utf-8", errors="replace")

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs) -> str:
        # Exact, so there are no spaces to clean up, whatever the keywords say.
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        skipped = set()
        if skip_special_tokens:
            skipped = {i for i, token in self.added_tokens_decoder.items() if token.special} | {*self.all_special_ids}
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens([i for i in ids if i not in skipped])
        return self.convert_tokens_to_string([token for token in tokens if token is not None])

    def apply_chat_template(self, *args, **kwargs):
        encoded = super().apply_chat_template(*args, **kwargs)
        if isinstance(encoded, BatchEncoding) and "assistant_masks" in encoded:
            # Up to 5.23 the library marks the first byte alone of the last character of an answer.
            masks, rows = encoded["assistant_masks"], encoded.encodings
            is_flat = len(masks) == 0 or isinstance(masks[0], int)
            for mask, row in zip([masks] if is_flat else masks, rows, strict=True):
                for i in range(1, len(mask)):
                    if mask[i - 1] and row.offsets[i] == row.offsets[i - 1]:
                        mask[i] = 1
        return encoded

    def train_new_from_iterator(self, *args, **kwargs):
        """
        Raises:
            ValueError: in any case.
        """
        raise ValueError(
            "A ByteTokenizer has nothing to train: its vocabulary is the 256 bytes. Train a tokenizers.Tokenizer and "
            "wrap it in a PreTrainedTokenizerFast; or add tokens to this one with `add_tokens`."
        )


def byte_backend(vocab: dict[str, int]) -> Tokenizer:
    """What splits a text into bytes, for a vocabulary that begins with them. No other token of it is ever found."""
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def special_tokens(arguments: dict) -> list[str]:
    """The special tokens among the arguments of a tokenizer, without padding, in the order of their ids."""
    found = []
    for name in dict.fromkeys([*PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES, *arguments]):
        value = arguments.get(name)
        if name.endswith("_token") and name != "pad_token":
            found.append(value)
        elif name.endswith("_special_tokens") and isinstance(value, (dict, list, tuple)):
            found += value.values() if isinstance(value, dict) else value
    return [str(token) for token in found if token and isinstance(token, (str, AddedToken))]


def name_last_byte(vocab: dict[str, int], is_special: bool, is_free: bool) -> None:
    """Renames byte 255 in a vocabulary where the end of texts is a special token, and back where they have none."""
    symbol = BYTE_SYMBOLS[255]
    if is_special and END_OF_TEXT not in vocab:
        vocab[END_OF_TEXT] = vocab.pop(symbol)
    elif is_free and not is_special and vocab.get(END_OF_TEXT) == 255:
        vocab[symbol] = vocab.pop(END_OF_TEXT)


def read_tokenizer_file(path) -> tuple[dict[str, int], dict]:
    """
    The vocabulary of a tokenizer.json, special tokens included, and what else a `ByteTokenizer` takes from it.

    Raises:
        ValueError: the file is not that of a `ByteTokenizer`.
    """
    try:
        saved = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other type
        raise ValueError(f"{path} must be a tokenizer.json: {error}") from error
    vocab = saved.get_vocab(with_added_tokens=True)
    names = sorted(vocab, key=vocab.get)
    found, expected = (json.loads(backend.to_str()) for backend in (saved, byte_backend({})))
    for parts in (found, expected):
        parts["model"].pop("vocab")
    other = [part for part in found if part in KEPT_PARTS and found[part] != expected[part]]
    is_bytes = (
        names[:255] == BYTE_SYMBOLS[:255]
        and names[255:256] in ([BYTE_SYMBOLS[255]], [END_OF_TEXT])
        and sorted(vocab.values()) == list(range(len(vocab)))
    )
    if other or not is_bytes:
        differs = f" and another {', '.join(other)}" if other else ""
        raise ValueError(
            f"{path} must hold the 256 bytes of a ByteTokenizer, got a {found['model']['type']} tokenizer of "
            f"{len(vocab)} tokens{differs}: load it with AutoTokenizer or PreTrainedTokenizerFast."
        )
    return vocab, {
        "added_tokens_decoder": saved.get_added_tokens_decoder(),
        "post_processor": saved.post_processor,
        "tokenizer_padding": saved.padding,
        "tokenizer_truncation": saved.truncation,
    }


def model_config(folder, **options):
    """The configuration of the model of this package that a folder holds, None if it holds none."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception:  # there is none, or whoever loads the model hears what is wrong with it
        return None
    return config if hasattr(config, "has_position_table") else None


def within_tables(length: int, config) -> int:
    """A length, or that of the tables of a model (None for no model), if they end before it."""
    ends = config is not None and config.has_position_table
    return min(length, config.max_position_embeddings) if ends else length


__all__ = ["ByteTokenizer"]
