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

import base64
import contextlib
import gzip
import hashlib
import os
import reprlib
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
import psutil
from datasets import Dataset, Features, Value, load_from_disk

from aft.atomic_files import check_file, replacing, sync
from aft.console import one_line
from aft.redaction import public_address


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
        ValueError: there is no such file, it is a folder or a pipe, is not what its suffix says or cannot be unpacked,
            is larger than the memory, or a `.zip` has not exactly one member.
    """
    path = Path(path)
    check_file(path, "dataset_path")
    suffix, limit = path.suffix.lower(), psutil.virtual_memory().available
    check_size(path, path.stat().st_size, limit)
    try:
        if suffix == ".zip":
            return unzip(path, limit)
        return gunzip(path, limit) if suffix == ".gz" else path.read_bytes()
    except MemoryError:
        raise ValueError(f"{path}: must fit into the memory of this machine, {limit:,} bytes are free") from None
    except Exception as error:  # a broken archive raises anything
        if suffix not in (".zip", ".gz") or type(error) is ValueError:  # of the checks here
            raise
        raise ValueError(f"{path}: not a whole {suffix} file that can be unpacked: {one_line(error)}") from error


def check_size(path: Path, size: int, limit: int) -> None:
    """Raises a ValueError if a file of `size` bytes cannot be in `limit` bytes of memory."""
    if size > limit:
        raise ValueError(f"{path}: must fit into the memory of this machine, {limit:,} bytes are free, got {size:,}")


def unzip(path: Path, limit: int) -> bytes:
    """The one member of a `.zip`, of `limit` bytes at most."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            found = [member.filename for member in members]
            raise ValueError(f"{path}: must hold exactly one file, found {reprlib.repr(found)}")
        check_size(path, members[0].file_size, limit)
        return archive.read(members[0].filename)


def gunzip(path: Path, limit: int) -> bytes:
    """The content of a `.gz`, of `limit` bytes at most; how many there are is known at its end only."""
    content = bytearray()
    with gzip.open(path) as stream:
        while part := stream.read(1 << 20):
            content += part
            check_size(path, len(content), limit)
    return bytes(content)


def known_file_bytes(known: KnownFile, path: str | None, url: str | None, cache_dir: str | Path) -> bytes:
    """
    The verified content of a known file: from `path` if given, else downloaded once to `cache_dir`, and once more if
    what lies there is not that file any longer.

    Raises:
        ValueError: the content has another length or checksum; the message has the expected and the found value.
        OSError: the download failed.
    """
    if path is not None:
        return verify(known, file_bytes(path), path)
    url = url or known.url
    target = Path(cache_dir) / (Path(urlsplit(url).path).name or known.name)
    cached = target.exists()
    if not cached:
        download(url, target)
    try:
        return verify(known, file_bytes(target), str(target) if cached else public_address(url))
    except ValueError as error:
        target.unlink()
        if not cached:
            raise
        print(f"{one_line(error)}; it is downloaded again", file=sys.stderr)
    return known_file_bytes(known, None, url, cache_dir)


def differences(known: KnownFile, content: bytes) -> Iterator[str]:
    """How `content` differs from a known file, if it does."""
    for name, expected, find in (
        ("length", known.size, len),
        ("md5", known.md5, lambda content: hashlib.md5(content).hexdigest()),
        ("sha1", known.sha1, lambda content: hashlib.sha1(content).hexdigest()),
    ):
        if (found := find(content)) != expected:
            yield f"expected {name} {expected}, found {found}"


def verify(known: KnownFile, content: bytes, origin: str) -> bytes:
    """`content` itself, or a ValueError that says how it differs from the known file."""
    for difference in differences(known, content):
        raise ValueError(f"{origin} is not {known.name}: {difference}")
    return content


def download(url: str, target: Path) -> None:
    """
    Downloads `url`, with user and password if it has them, to `target`, which appears only when it is whole.

    Raises:
        OSError: it cannot be read or written.
    """
    parts = urlsplit(url)
    user, _, server = parts.netloc.rpartition("@")
    try:
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=server, fragment="")))
        if user:  # to this server alone, wherever it sends us
            token = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with replacing(target) as part, urllib.request.urlopen(request, timeout=60) as response:
            with open(part, "wb") as file:
                shutil.copyfileobj(response, file)
            expected, found = response.headers.get("Content-Length"), part.stat().st_size
            if expected is not None and found != int(expected):
                raise OSError(f"expected {expected} bytes, got {found}")
    except (OSError, HTTPException, ValueError) as error:
        shown = public_address(url)
        reason = one_line(error).replace(url, shown)
        reason = reason.replace(parts.query, "...") if parts.query else reason
        advice = "--dataset_path takes a copy of the file"
        raise OSError(f"{shown} cannot be downloaded to {target} ({reason}); {advice}") from None


def split_ranges(num_bytes: int) -> dict[str, tuple[int, int]]:
    """Where train, valid and test begin and end: 90/5/5."""
    train_end, valid_end = num_bytes * 90 // 100, num_bytes * 95 // 100
    return {"train": (0, train_end), "valid": (train_end, valid_end), "test": (valid_end, num_bytes)}


def write_table(content: bytes, folder: Path, replace: bool) -> None:
    """Writes `content` as the table of a `ByteData`, whole or not at all; if `replace` in place of a damaged one."""
    blocks = [content[start : start + BLOCK_SIZE] for start in range(0, len(content), BLOCK_SIZE)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="bytes-", ignore_cleanup_errors=True) as temporary:
        new, damaged = Path(temporary) / "table", Path(temporary) / "damaged"
        table = Dataset.from_dict({"block": blocks}, features=Features({"block": Value("binary")}))
        table.save_to_disk(new)
        for path in (*new.iterdir(), new):
            sync(path)
        if replace:  # not in place: a process that has mapped it goes on
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, damaged)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise
        sync(folder.parent)


class ByteData:
    """
    The bytes of one file as a memory-mapped Arrow table of `datasets`.

    Args:
        table (`datasets.Dataset`): rows of `BLOCK_SIZE` bytes in the column "block"; the last may be shorter.
        sha256 (`str`): checksum of the whole content.

    Attributes:
        known (`KnownFile`, *optional*): the public file that this is, by its checksums.
    """

    def __init__(self, table: Dataset, sha256: str):
        self.table = table
        self.sha256 = sha256
        self.known: KnownFile | None = None
        self.num_bytes = BLOCK_SIZE * (len(table) - 1) + len(table[-1]["block"])
        self.splits = split_ranges(self.num_bytes)

    @classmethod
    def from_bytes(cls, content: bytes, cache_dir: str | Path) -> "ByteData":
        """
        Memory-maps the copy of `content` in `cache_dir`, which is written first if it is not there yet, and again if
        it is damaged.

        Raises:
            ValueError: fewer than 100 bytes, of which no sensible split exists.
            OSError: the copy cannot be written.
        """
        if len(content) < 100:
            raise ValueError(f"the data must have at least 100 bytes, got {len(content)}")
        sha256 = hashlib.sha256(content).hexdigest()
        folder = Path(cache_dir) / f"bytes-{sha256}-{BLOCK_SIZE}"
        for _ in range(10):  # once more after writing it, and whenever another process replaces it at that moment
            damaged = folder.exists()
            if damaged:
                try:
                    return cls.open(folder, sha256)
                except Exception as error:  # a damaged table raises anything
                    print(f"{folder}: damaged ({one_line(error)}), written again", file=sys.stderr)
            try:
                write_table(content, folder, replace=damaged)
            except OSError as error:
                raise OSError(f"--cache_dir {cache_dir}: the data cannot be written there: {error}") from error
        raise OSError(f"--cache_dir {cache_dir}: what is read from there is not what was written")

    @classmethod
    def open(cls, folder: Path, sha256: str) -> "ByteData":
        """
        The copy in a folder, read once to check it: training reads of it what it is said to be.

        Raises:
            ValueError: the content has another checksum; other errors for what is no table at all.
        """
        table = load_from_disk(str(folder), keep_in_memory=False)
        table.data.validate(full=True)  # so that no damaged offset is followed out of the file
        data, digest = cls(table, sha256), hashlib.sha256()
        for start in range(0, data.num_bytes, 1 << 20):
            digest.update(data.read(start, min(start + (1 << 20), data.num_bytes)))
        if (found := digest.hexdigest()) != sha256:
            raise ValueError(f"its sha256 is {found}")
        return data

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes [start, stop) as uint8 [stop - start]."""
        first = start // BLOCK_SIZE
        rows = self.table[first : (stop - 1) // BLOCK_SIZE + 1]["block"]
        return np.frombuffer(b"".join(rows), dtype=np.uint8)[start - first * BLOCK_SIZE : stop - first * BLOCK_SIZE]


class TrainingWindows:
    """
    The windows of the train split in training order. Each epoch cuts the split at a new offset into streams of
    `stream_length` inputs and as many labels (the next bytes), and visits them in a new order. A row of the batch
    reads one stream, a window of `length` at each step, and then the next: all rows begin one at the same steps.
    Everything is a pure function of the seed and the step, so there is no state to save, and any number of processes
    sees the same batch.

    Args:
        read (`Callable`): `read(start, stop)` returns bytes of the split.
        num_bytes (`int`): the size of the split.
        length (`int`): inputs per window.
        batch_size (`int`): windows per step, over all processes and micro-batches.
        seed (`int`): decides offsets and orders.
        stream_length (`int`, *optional*): inputs per stream, a multiple of `length`; a window is one by default.

    Raises:
        ValueError: the train split is shorter than two streams.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        num_bytes: int,
        length: int,
        batch_size: int,
        seed: int,
        stream_length: int | None = None,
    ):
        self.read, self.length, self.batch_size, self.seed = read, length, batch_size, seed
        self.stream_length = stream_length or length
        self.steps_per_stream = self.stream_length // length
        # One stream less than fits, so that every offset below its length leaves the same number.
        self.streams_per_epoch = (num_bytes - 1) // self.stream_length - 1
        if self.streams_per_epoch < 1:
            name = "sequence_length" if stream_length is None else "stream_length"
            raise ValueError(
                f"--{name} must be at most {(num_bytes - 1) // 2}, as a train split of {num_bytes} bytes must hold "
                f"two and a byte more, got {self.stream_length}"
            )
        self.windows_per_epoch = self.streams_per_epoch * self.steps_per_stream
        # A batch touches two epochs at most, unless it is larger than an epoch.
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Where the streams of an epoch start, in the order of training: int64 [streams_per_epoch]."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        offset = generator.integers(self.stream_length)
        return offset + generator.permutation(self.streams_per_epoch) * self.stream_length

    def start(self, step: int, row: int) -> int:
        """Where the window of a row of the global batch of `step` starts."""
        stream, window = divmod(step, self.steps_per_stream)
        epoch, index = divmod(stream * self.batch_size + row, self.streams_per_epoch)
        return int(self.epoch_order(epoch)[index]) + window * self.length

    def begins(self, step: int) -> bool:
        """Whether the rows begin streams at this step, instead of going on in theirs."""
        return step % self.steps_per_stream == 0

    def batch(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step` (from 0).

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), length]; a label is the byte after its input.
        """
        starts = [self.start(step, row) for row in rows]
        windows = np.stack([self.read(start, start + self.length + 1) for start in starts]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]
