# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Files of bytes for language modelling: where they come from, their splits, a memory-mapped copy, and batches.

A file of N bytes is split 90/5/5 into train [0, 0.90 N), valid [0.90 N, 0.95 N) and test [0.95 N, N).
"""

import gzip
import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value, load_from_disk


BLOCK_SIZE = 4096  # bytes per row of the memory-mapped table


@dataclass(frozen=True)
class KnownFile:
    """A public file with its official address, and the length in bytes and checksums that its content must have."""

    name: str
    url: str
    size: int
    md5: str
    sha1: str


ENWIK8 = KnownFile(
    name="enwik8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    size=100_000_000,
    md5="a1fa5ffddb56f4953e226637dabbb36a",
    sha1="57b8363b814821dc9d47aa4d41f58733519076b2",
)


def pydoc_bytes() -> bytes:
    """The documentation topics of the running Python, sorted by name: about half a megabyte, part of every Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode("utf-8")


def file_bytes(path: str | Path) -> bytes:
    """
    The content of a file; the one member of a `.zip` and the stream of a `.gz` are unpacked.

    Raises:
        ValueError: there is no such file, or it is not what its suffix says, or a `.zip` has not exactly one member.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"dataset_path: no such file: {path}")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if not name.endswith("/")]
                if len(members) != 1:
                    raise ValueError(f"{path}: must hold exactly one file, found {members}")
                return archive.read(members[0])
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole {path.suffix} file: {error}") from error


def known_file_bytes(known: KnownFile, path: str | None, url: str | None, cache_dir: str | Path) -> bytes:
    """
    The verified content of a known file: from `path` if given, else downloaded once to `cache_dir`.

    Raises:
        ValueError: the content has another length or checksum; the message has the expected and the found value.
        OSError: the download failed.
    """
    if path is not None:
        return verify(known, file_bytes(path), path)
    url = url or known.url
    target = Path(cache_dir) / Path(url).name
    if not target.exists():
        try:
            download(url, target)
        except urllib.error.URLError as error:
            raise OSError(f"{url} cannot be read ({error}); --dataset_path takes a copy of the file") from error
    try:
        return verify(known, file_bytes(target), url)
    except ValueError:
        target.unlink()  # so that the next start downloads again
        raise


def verify(known: KnownFile, content: bytes, origin: str) -> bytes:
    """`content` itself, or a ValueError that says how it differs from the known file."""
    for name, expected, found in (
        ("length", known.size, len(content)),
        ("md5", known.md5, hashlib.md5(content).hexdigest()),
        ("sha1", known.sha1, hashlib.sha1(content).hexdigest()),
    ):
        if expected != found:
            raise ValueError(f"{origin} is not {known.name}: expected {name} {expected}, found {found}")
    return content


def download(url: str, target: Path) -> None:
    """Downloads `url` to `target`, which appears only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".part", delete=False) as part:
        try:
            with urllib.request.urlopen(url) as response:
                shutil.copyfileobj(response, part)
                expected = response.headers.get("Content-Length")
            if expected is not None and part.tell() != int(expected):
                raise OSError(f"{url}: expected {expected} bytes, got {part.tell()}")
            part.close()
            os.replace(part.name, target)
        finally:
            Path(part.name).unlink(missing_ok=True)


def split_ranges(num_bytes: int) -> dict[str, tuple[int, int]]:
    """Where train, valid and test begin and end: 90/5/5."""
    train_end, valid_end = num_bytes * 90 // 100, num_bytes * 95 // 100
    return {"train": (0, train_end), "valid": (train_end, valid_end), "test": (valid_end, num_bytes)}


class ByteData:
    """
    The bytes of one file as a memory-mapped Arrow table of `datasets`.

    Args:
        table (`datasets.Dataset`): rows of `BLOCK_SIZE` bytes in the column "block"; the last may be shorter.
        sha256 (`str`): checksum of the whole content.
    """

    def __init__(self, table: Dataset, sha256: str):
        self.table = table
        self.sha256 = sha256
        self.num_bytes = BLOCK_SIZE * (len(table) - 1) + len(table[-1]["block"])
        self.splits = split_ranges(self.num_bytes)

    @classmethod
    def from_bytes(cls, content: bytes, cache_dir: str | Path) -> "ByteData":
        """
        Memory-maps the copy of `content` in `cache_dir`, which is written first if it is not there yet.

        Raises:
            ValueError: fewer than 100 bytes, of which no sensible split exists.
        """
        if len(content) < 100:
            raise ValueError(f"the data must have at least 100 bytes, got {len(content)}")
        sha256 = hashlib.sha256(content).hexdigest()
        folder = Path(cache_dir) / f"bytes-{sha256}-{BLOCK_SIZE}"
        if not folder.exists():
            blocks = [content[start : start + BLOCK_SIZE] for start in range(0, len(content), BLOCK_SIZE)]
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="bytes-") as temporary:
                table = Dataset.from_dict({"block": blocks}, features=Features({"block": Value("binary")}))
                table.save_to_disk(Path(temporary) / "table")
                try:
                    os.rename(Path(temporary) / "table", folder)
                except OSError:
                    if not folder.exists():  # else another process was faster, with the same content
                        raise
        return cls(load_from_disk(str(folder), keep_in_memory=False), sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes [start, stop) as uint8 [stop - start]."""
        first = start // BLOCK_SIZE
        rows = self.table[first : (stop - 1) // BLOCK_SIZE + 1]["block"]
        return np.frombuffer(b"".join(rows), dtype=np.uint8)[start - first * BLOCK_SIZE : stop - first * BLOCK_SIZE]


class TrainingWindows:
    """
    The windows of the train split in training order. Each epoch cuts the split at a new offset into windows of
    `length` inputs and as many labels (the next bytes), and visits them in a new order. Everything is a pure function
    of the seed and the step, so there is no state to save, and any number of processes sees the same batch.

    Raises:
        ValueError: the train split is shorter than two windows.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray], num_bytes: int, length: int, seed: int):
        # One window less than fits, so that every offset below `length` leaves the same number of windows.
        self.windows_per_epoch = (num_bytes - 1) // length - 1
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"sequence_length {length} needs a train split of {2 * length + 1} bytes or more, got {num_bytes}"
            )
        self.read, self.length, self.seed = read, length, seed
        # A batch touches two epochs at most, unless it is larger than an epoch.
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order of training: int64 [windows_per_epoch]."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return generator.integers(self.length) + generator.permutation(self.windows_per_epoch) * self.length

    def batch(self, step: int, batch_size: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step` (from 0).

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), length]; a label is the byte after its input.
        """
        windows = []
        for row in rows:
            epoch, index = divmod(step * batch_size + row, self.windows_per_epoch)
            start = int(self.epoch_order(epoch)[index])
            windows.append(self.read(start, start + self.length + 1))
        windows = np.stack(windows).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]
