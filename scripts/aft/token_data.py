# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The tokens of a text as memory-mapped files, and how many bytes of it each stands for."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from aft.atomic_files import new_folder
from aft.checkpointing import sha256
from aft.console import one_line
from aft.text_sources import SPLITS, DocumentText, FileText, split_ranges


VERSION = 1  # of what the files hold for a text


class TokenData:
    """
    The tokens of the three splits, one after the other.

    Args:
        ids (`np.ndarray`): of the tokens, unsigned integers [tokens].
        sizes (`np.ndarray`, *optional*): how many bytes of the text each token stands for; None if 1.
        splits (`dict`): where the tokens of train, valid and test begin and end.
        num_bytes (`dict`): how many bytes of text each split has.
        sha256 (`str`): of the text.
    """

    def __init__(
        self,
        ids: np.ndarray,
        sizes: np.ndarray | None,
        splits: dict[str, tuple[int, int]],
        num_bytes: dict[str, int],
        sha256: str,
    ):
        self.ids, self.sizes, self.splits, self.num_bytes, self.sha256 = ids, sizes, splits, num_bytes, sha256

    @classmethod
    def of_bytes(cls, content: bytes, sha256: str = "") -> "TokenData":
        """The bytes of a file that is in memory."""
        splits = split_ranges(len(content))
        num_bytes = {split: stop - start for split, (start, stop) in splits.items()}
        return cls(np.frombuffer(content, dtype=np.uint8), None, splits, num_bytes, sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids of the tokens [start, stop)."""
        return self.ids[start:stop]

    def first_bytes(self, split: str, num_bytes: int) -> tuple[int, int]:
        """Where the tokens of a split begin, and where those that stand for its first bytes end; 0 for all."""
        start, stop = self.splits[split]
        if num_bytes == 0:
            return start, stop
        if self.sizes is None:
            return start, min(start + num_bytes, stop)
        ends = np.cumsum(self.read_sizes(start, stop), dtype=np.int64)
        return start, min(start + 1 + int(np.searchsorted(ends, num_bytes)), stop)

    def read_sizes(self, start: int, stop: int) -> np.ndarray:
        """The bytes of text of each of the tokens [start, stop)."""
        return np.ones(stop - start, dtype=np.int64) if self.sizes is None else self.sizes[start:stop]


def dtype_for(size: int) -> type:
    """The smallest unsigned integers that hold the ids of a vocabulary."""
    return np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32


def is_plain(text, vocabulary) -> bool:
    """Whether the tokens of a text are the bytes of its file."""
    return isinstance(text, FileText) and vocabulary.is_bytes


def write_tokens(text: FileText | DocumentText, vocabulary, folder: Path) -> None:
    """
    Writes the tokens of a text to a folder. Of documents, each is followed by the token that ends a text, if the
    vocabulary has one, which stands for no byte, and one stands before the first.
    """
    splits, num_bytes, count = {}, {}, 0
    ids_type = dtype_for(vocabulary.size)
    end = vocabulary.end if text.are_documents else None
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "sizes.bin", "wb") as sizes_file:

        def write(ids, sizes) -> int:
            ids_file.write(np.asarray(ids).astype(ids_type).tobytes())
            sizes_file.write(np.asarray(sizes).astype(np.uint32).tobytes())
            return len(ids)

        if end is not None:
            count += write([end], [0])
        for split in SPLITS:
            start, total, left = (0 if split == "train" else count), 0, 0
            for texts in text.texts(split):
                for one, (ids, sizes) in zip(texts, vocabulary.encode(texts), strict=True):
                    length = len(one.encode("utf-8", "surrogatepass"))
                    total, left = total + length, left + length - int(sizes.sum())
                    if end is not None:
                        ids, sizes = np.append(ids, end), np.append(sizes, 0)
                    if left and len(ids):  # the bytes of a text without tokens
                        sizes, left = [sizes[0] + left, *sizes[1:]], 0
                    count += write(ids, sizes)
            if left:
                raise ValueError(f"--tokenizer: {split} must not end with text that has no tokens, got {left} bytes")
            splits[split], num_bytes[split] = (start, count), total
    names = ("ids.bin", "sizes.bin")
    content = {"dtype": np.dtype(ids_type).name, "splits": splits, "num_bytes": num_bytes, "text": text.sha256}
    content |= {"is_exact": vocabulary.is_exact, "sha256": {name: sha256(folder / name) for name in names}}
    (folder / "tokens.json").write_text(json.dumps(content))


def write_bytes(text: FileText, folder: Path) -> None:
    """The same for the bytes of a file, of which any are allowed."""
    (folder / "ids.bin").write_bytes(text.content)
    splits = split_ranges(len(text.content))
    content = {"dtype": "uint8", "splits": splits, "text": text.sha256, "is_exact": True}
    content["num_bytes"] = {split: stop - start for split, (start, stop) in splits.items()}
    content["sha256"] = {"ids.bin": text.sha256}
    (folder / "tokens.json").write_text(json.dumps(content))


def open_tokens(folder: Path, vocabulary) -> TokenData:
    """
    What `write_tokens` or `write_bytes` has written, read once to check that it is what training shall read.

    Raises:
        ValueError: a file has another checksum; other errors for what is no such folder.
    """
    content = json.loads((folder / "tokens.json").read_text())
    arrays = {"ids.bin": np.dtype(content["dtype"]), "sizes.bin": np.dtype(np.uint32)}
    for name, expected in content["sha256"].items():
        if (found := sha256(folder / name)) != expected:
            raise ValueError(f"the sha256 of {name} is {found}")
    found = {name: np.memmap(folder / name, dtype=arrays[name], mode="r") for name in content["sha256"]}
    vocabulary.is_exact = vocabulary.is_exact and content["is_exact"]
    splits = {split: tuple(content["splits"][split]) for split in SPLITS}
    return TokenData(found["ids.bin"], found.get("sizes.bin"), splits, content["num_bytes"], content["text"])


def token_data(text: FileText | DocumentText, vocabulary, cache_dir: str | Path) -> TokenData:
    """
    The tokens of a text, memory-mapped from `cache_dir`, where they are written first if they are not there yet, and
    again if they are damaged. They are found by the content of the text and of the tokenizer.

    Raises:
        ValueError: the text cannot be tokenized.
        OSError: the files cannot be written.
    """
    parts = [VERSION, text.sha256, text.are_documents, vocabulary.fingerprint]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = Path(cache_dir) / f"tokens-{key}"
    for _ in range(10):  # once more after writing it, and whenever another process replaces it at that moment
        is_damaged = folder.exists()
        if is_damaged:
            try:
                return open_tokens(folder, vocabulary)
            except Exception as error:  # damaged files raise anything
                print(f"{folder}: damaged ({one_line(error)}), written again", file=sys.stderr)
        try:
            write_folder(text, vocabulary, folder, replace=is_damaged)
        except OSError as error:
            raise OSError(f"--cache_dir {cache_dir}: the data cannot be written there: {error}") from error
    raise OSError(f"--cache_dir {cache_dir}: what is read from there is not what was written")


def tokens_at_hand(text: FileText | DocumentText, vocabulary, cache_dir: str | Path) -> TokenData:
    """The same, but bytes that are in memory stay there, for those who read them once."""
    if is_plain(text, vocabulary):
        return TokenData.of_bytes(text.content, text.sha256)
    return token_data(text, vocabulary, cache_dir)


def write_folder(text, vocabulary, folder: Path, replace: bool) -> None:
    """Writes the tokens of a text as `folder`, whole or not at all; if `replace` in place of damaged ones."""
    with new_folder(folder, replace) as new:
        if is_plain(text, vocabulary):
            write_bytes(text, new)
        else:
            write_tokens(text, vocabulary, new)
