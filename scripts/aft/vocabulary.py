# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
What turns text into token ids and back: bytes, or a tokenizer of transformers, of which each token stands for as many
bytes of the text as its offsets say. Which tokenizer fits a model, and how many rows of its embedding it needs.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aft.atomic_files import new_folder
from aft.console import one_line
from aft.saved_models import check_reads_text, load


END_OF_TEXT = "<|endoftext|>"
MASK_TOKEN = "[MASK]"
ENDS = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}  # the special tokens of a BPE for causal models
START_OF_PICTURE = 256  # the id of the token before the sub-pixels of a picture, whose ids are their values
BYTE_END = 255  # the id of the end of a text in a model of bytes: no text in UTF-8 has this byte
WHITESPACE = b" \t\n\r\f\v"
SPACE_MARKS = "\u2581\u0120\u010a\u0109\u010d \n\t\r"  # what SentencePiece and byte-level BPE write for whitespace
MOST_TRAINING_CHARACTERS = 200_000_000  # of the text that a BPE is trained on


def byte_tokenizer(config, mask: int | None = None):
    """
    The `ByteTokenizer` of a model of 256 bytes, and of a mask token if it has one. Only the models of this package
    need no row for padding; others pad with the byte that ends a text, which UTF-8 never has.
    """
    from modeling_aft import ByteTokenizer  # what else is here runs without the package

    options = {} if hasattr(config, "has_position_table") else {"pad_token": END_OF_TEXT}
    return ByteTokenizer(**options) if mask is None else ByteTokenizer(mask_token=MASK_TOKEN, **options)


def rows_needed(tokenizer, config) -> int:
    """
    The number of ids that the tokens of a text can have.

    Args:
        tokenizer: of transformers.
        config: of the model. Those of this package need no row for padding, whose id may come after all others.
    """
    ids = set(tokenizer.get_vocab().values())
    others = {tokenizer.convert_tokens_to_ids(t) for n, t in tokenizer.special_tokens_map.items() if n != "pad_token"}
    if hasattr(config, "has_position_table"):
        ids -= {tokenizer.pad_token_id} - others
    return 1 + max(ids)


def character_ends(text: str) -> np.ndarray:
    """At which byte of a text in UTF-8 each of its characters begins, and its end: int64 [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


class ByteVocabulary:
    """
    Bytes as tokens: an id is the value of a byte.

    Args:
        masks (`bool`): whether there is a mask token too, which stands in no text. Its id is 256.
    """

    name, end, is_bytes = "bytes", BYTE_END, True
    fingerprint = "bytes"
    is_exact = True

    def __init__(self, masks: bool = False):
        self.mask = 256 if masks else None
        self.size = 257 if masks else 256
        self.text_ids = np.arange(256)

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text the ids of its tokens, and the bytes that each stands for, here 1: [tokens] of integers."""
        found = (np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8) for text in texts)
        return [(ids, np.ones(len(ids), dtype=np.uint8)) for ids in found]

    def encode_prompt(self, prompt: bytes) -> list[int]:
        """The ids of what a model continues."""
        return list(prompt)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        return bytes(ids)

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Which bytes begin a word, bool [T]: words end where spaces begin, and have those before them."""
        is_space = np.isin(ids, list(WHITESPACE))
        return is_space & ~np.concatenate([[False], is_space[:-1]])

    def save(self, folder: Path, config) -> None:
        """Writes the tokenizer of a model to its folder, after the model, of which it takes the limit of length."""
        byte_tokenizer(config, self.mask).save_pretrained(folder)


class PixelVocabulary:
    """
    The values of sub-pixels as tokens, and one that stands before each picture.

    Args:
        shape (`tuple`): height, width and channels of the pictures.
    """

    name, start, end, mask, size, is_bytes = "sub-pixels", START_OF_PICTURE, None, None, 257, True

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = tuple(shape)

    def processor(self):
        """The image processor of a model of these pictures."""
        from modeling_aft import AFTImageProcessor  # what else is here runs without the package

        height, width, channels = self.shape
        return AFTImageProcessor(size={"height": height, "width": width}, num_channels=channels)

    def save(self, folder: Path, config) -> None:
        """Writes the image processor of a model to its folder."""
        self.processor().save_pretrained(folder)


class TokenizerVocabulary:
    """
    The tokens of a tokenizer of transformers.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): one whose tokens have offsets in the text.
        name (`str`): what errors call it, flag and all.

    Attributes:
        size (`int`): how many ids a text can have in a model of this package.
        end (`int`, *optional*): the id of the token between two documents; None if the tokenizer has none.
        mask (`int`, *optional*): the id of the mask token; None if the tokenizer has none.
        text_ids (`np.ndarray`): the ids of the tokens that a text can have, without special ones, int64.
        fingerprint (`str`): of all that decides which ids a text gets.
        is_exact (`bool`): whether what was encoded could be decoded to the same text; else bits per byte are those of
            less than the text.

    Raises:
        ValueError: the tokenizer has no offsets.
    """

    is_bytes = False

    def __init__(self, tokenizer, name: str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{name}: must be a fast tokenizer, whose tokens have offsets, got {type(tokenizer).__name__}"
            )
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path or type(tokenizer).__name__
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # what a text has is text, even if it looks like a special token
        self.end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
        self.mask = tokenizer.mask_token_id
        names = {i: token for token, i in tokenizer.get_vocab().items()}
        self.size = 1 + max(names)
        self.text_ids = np.array(sorted({*names} - {*tokenizer.all_special_ids}))
        self.starts = np.zeros(self.size, dtype=bool)
        # Of WordPiece the others go on with a word; elsewhere spaces are part of the tokens, by the characters that
        # SentencePiece and byte-level BPE have for them.
        model = self.backend.model
        goes_on = getattr(model, "continuing_subword_prefix", None) if isinstance(model, models.WordPiece) else None
        for i, name in names.items():
            self.starts[i] = name[:1] in SPACE_MARKS if goes_on is None else not name.startswith(goes_on)
        self.fingerprint = hashlib.sha256(f"{self.backend.to_str()} {self.end}".encode()).hexdigest()
        self.is_exact = True

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        For each text the ids of its tokens, and the bytes that each stands for, [tokens] of integers: all from the end
        of the token before to its own, so that they add up to those of the text, unless it has no tokens.
        """
        found = []
        for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            sizes = np.zeros(0, dtype=np.int64)
            if len(ids):
                ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
                ends[-1] = len(text)
                sizes = np.diff(character_ends(text)[ends], prepend=0)
            self.is_exact = self.is_exact and self.backend.decode(encoding.ids, skip_special_tokens=False) == text
            found.append((ids, sizes))
        return found

    def encode_prompt(self, prompt: bytes) -> list[int]:
        """
        The ids of what a model continues, without special tokens.

        Raises:
            ValueError: it is not UTF-8, or has no tokens.
        """
        try:
            ids = self.backend.encode(prompt.decode("utf-8"), add_special_tokens=False).ids
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the prompt must be text in UTF-8 for a tokenizer, and is not at byte {error.start}"
            ) from None
        if not ids:
            raise ValueError("the prompt must have at least one token")
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text that ids stand for, in UTF-8, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False).encode(
            "utf-8", "surrogatepass"
        )

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens begin a word, bool [T]."""
        return self.starts[ids]

    def save(self, folder: Path, config) -> None:
        """Writes the tokenizer to the folder of a model, with the limit of length that the model has."""
        given, limit = self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)
        if limit is not None and getattr(config, "has_position_table", True):
            self.tokenizer.model_max_length = min(given, limit)
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.model_max_length = given


def load_vocabulary(name: str, flag: str = "--tokenizer", **options) -> TokenizerVocabulary | ByteVocabulary:
    """
    The vocabulary of a saved tokenizer: a tokenizer.json, a folder, or a name on the Hub.

    Args:
        options: of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: it does not load, has no offsets, or is a model of pictures; begins with the flag and the name.
    """
    if Path(name).is_file():
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(name))
        except Exception as error:  # the library raises no other type
            raise ValueError(f"{flag} {name}: must be a tokenizer.json or a folder: {one_line(error)}") from error
        return TokenizerVocabulary(tokenizer, f"{flag} {name}")
    check_reads_text(name, flag)
    tokenizer = load(AutoTokenizer, name, flag, what="tokenizer", file="tokenizer_config.json", **options)
    if is_byte_tokenizer(tokenizer):
        return ByteVocabulary(masks=tokenizer.mask_token_id == 256)
    return TokenizerVocabulary(tokenizer, f"{flag} {name}")


def is_byte_tokenizer(tokenizer) -> bool:
    """Whether the ids of a tokenizer are bytes."""
    return tokenizer.vocab_size == 256 and tokenizer("a\u00e9", add_special_tokens=False).input_ids == [97, 195, 169]


def vocabulary_of_model(name: str | Path, config, flag: str = "--model", **options):
    """
    The vocabulary of a saved model, which is that of its tokenizer; a model of 256 tokens without one is of bytes.

    Args:
        config: of the model.
        options: of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: there is no tokenizer, or it has ids that the model has not, or the model is one of pictures.
    """
    rows = getattr(config, "vocab_size", None)
    files = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    if rows == 256 and Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        return ByteVocabulary()
    vocabulary = load_vocabulary(str(name), flag, **options)
    size = vocabulary.size if isinstance(vocabulary, ByteVocabulary) else rows_needed(vocabulary.tokenizer, config)
    if rows is not None and size > rows:
        raise ValueError(f"{flag} {name}: its tokenizer must have at most its vocab_size, {rows}, of ids, got {size}")
    if isinstance(vocabulary, ByteVocabulary) and rows != size:
        raise ValueError(f"{flag} {name}: must have a vocab_size of {size} for its tokenizer of bytes, got {rows}")
    return vocabulary


def train_bpe(
    texts: Iterable[list[str]], size: int, special_tokens: dict[str, str | list[str]] = ENDS
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE of `size` tokens, as GPT-2 has it: special tokens, whose ids are the first, all bytes, and the
    pairs that are the most frequent. What it encodes can be decoded exactly.

    Args:
        texts: lists of texts, of which the first `MOST_TRAINING_CHARACTERS` characters are read.
        special_tokens: as arguments of the tokenizer, such as `eos_token` and `extra_special_tokens`.

    Raises:
        ValueError: the text has not so many different pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = itertools.chain(*([value] if isinstance(value, str) else value for value in special_tokens.values()))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def first_texts():
        left = MOST_TRAINING_CHARACTERS
        for batch in texts:
            for text in batch:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return

    tokenizer.train_from_iterator(first_texts(), trainer)
    if (found := tokenizer.get_vocab_size()) != size:
        raise ValueError(f"--vocab_size must be at most {found}, the tokens that this text gives, got {size}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def trained_vocabulary(text, size: int, cache_dir: str | Path, masks: bool = False) -> TokenizerVocabulary:
    """
    The BPE of `size` tokens of the train split of a text, which is kept in `cache_dir` by the content of the text. It
    has a token that ends texts, and if it `masks` a mask token.

    Raises:
        ValueError: the text does not give so many tokens.
        OSError: it cannot be written.
    """
    parts = [text.sha256, size, MOST_TRAINING_CHARACTERS, *([MASK_TOKEN] if masks else [])]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = Path(cache_dir) / f"bpe-{key}"
    if not (folder / "tokenizer.json").is_file():
        tokenizer = train_bpe(text.training_texts(), size, ENDS | ({"mask_token": MASK_TOKEN} if masks else {}))
        with new_folder(folder, replace=folder.exists()) as new:  # one that is not whole
            tokenizer.save_pretrained(new)
    vocabulary = load_vocabulary(str(folder))
    vocabulary.name = "a byte-level BPE, trained on the train split"
    vocabulary.tokenizer.name_or_path = ""
    return vocabulary


def make_vocabulary(args, text):
    """The vocabulary that `--tokenizer` names, for a text and an objective; of pictures that of their sub-pixels."""
    if args.pictures is not None:
        return PixelVocabulary(text.shape)
    masks = args.objective == "masked"
    if args.tokenizer == "bytes":
        return ByteVocabulary(masks)
    if args.tokenizer == "bpe":
        return trained_vocabulary(text, args.vocab_size, args.cache_dir, masks)
    return load_vocabulary(args.tokenizer)


def asked_size(args) -> int:
    """
    How many ids the tokens of `--tokenizer` or `--pictures` have, before those are read.

    Raises:
        ValueError: it does not load, or has no mask token where one is needed.
    """
    if args.pictures is not None:
        return PixelVocabulary.size
    masks = args.objective == "masked"
    if args.tokenizer in ("bytes", "bpe"):
        return args.vocab_size if args.tokenizer == "bpe" else ByteVocabulary(masks).size
    vocabulary = load_vocabulary(args.tokenizer)
    if masks and vocabulary.mask is None:
        raise ValueError(f"--tokenizer {args.tokenizer}: must have a mask token for --objective masked")
    return vocabulary.size
