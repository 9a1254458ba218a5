"""Files of bytes: sources, verification, splits, the memory-mapped copy, and the order of training windows."""

import gzip
import hashlib
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from byte_data import (
    BLOCK_SIZE,
    ENWIK8,
    ByteData,
    KnownFile,
    TrainingWindows,
    file_bytes,
    known_file_bytes,
    pydoc_bytes,
    split_ranges,
)


def random_bytes(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(256, size=length, dtype=np.uint8).tobytes()


CONTENT = bytes(range(256)) * 5 + random_bytes(1000)
KNOWN = KnownFile(
    name="letters",
    url="http://127.0.0.1:9/letters.zip",
    size=len(CONTENT),
    md5=hashlib.md5(CONTENT).hexdigest(),
    sha1=hashlib.sha1(CONTENT).hexdigest(),
)


def write_file(path, content: bytes = CONTENT):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("letters", content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def serve():
    """A function that serves a body at a local address, promising `missing` bytes more than it sends."""
    servers = []

    def start(body: bytes, missing: int = 0) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + missing))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/letters.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# Sources


@pytest.mark.parametrize("name", ["letters", "letters.bin", "letters.zip", "letters.gz"])
def test_file_bytes_are_exact(tmp_path, name):
    assert file_bytes(write_file(tmp_path / name)) == CONTENT
    assert known_file_bytes(KNOWN, str(tmp_path / name), None, tmp_path) == CONTENT


@pytest.mark.parametrize("name", ["letters.zip", "letters.gz"])
def test_broken_archive_is_refused(tmp_path, name):
    whole = write_file(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        file_bytes(tmp_path / name)


def test_zip_of_two_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("first", CONTENT)
        archive.writestr("second", CONTENT)
    with pytest.raises(ValueError, match="exactly one file, found .'first', 'second'"):
        file_bytes(tmp_path / "two.zip")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file: .*nowhere"):
        file_bytes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content, expected, found",
    [
        pytest.param(CONTENT[:-1], KNOWN.size, KNOWN.size - 1, id="length"),
        pytest.param(CONTENT[::-1], KNOWN.md5, hashlib.md5(CONTENT[::-1]).hexdigest(), id="checksum"),
    ],
)
def test_wrong_file_is_refused(tmp_path, content, expected, found):
    path = write_file(tmp_path / "letters", content)
    with pytest.raises(ValueError, match=f"expected .* {expected}, found {found}"):
        known_file_bytes(KNOWN, str(path), None, tmp_path)


def test_download_happens_once(tmp_path, serve):
    url = serve(write_file(tmp_path / "letters.zip").read_bytes())
    assert known_file_bytes(KNOWN, None, url, tmp_path / "cache") == CONTENT
    # The same file name at an address where nobody listens: only the cache can answer.
    assert known_file_bytes(KNOWN, None, None, tmp_path / "cache") == CONTENT
    assert os.listdir(tmp_path / "cache") == ["letters.zip"]


def test_wrong_download_is_refused_and_not_kept(tmp_path, serve):
    url = serve(write_file(tmp_path / "letters.zip", CONTENT[::-1]).read_bytes())
    with pytest.raises(ValueError, match=f"expected md5 {KNOWN.md5}"):
        known_file_bytes(KNOWN, None, url, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_interrupted_download_leaves_nothing(tmp_path, serve):
    url = serve(b"PK", missing=10)
    with pytest.raises(OSError, match="expected 12 bytes, got 2"):
        known_file_bytes(KNOWN, None, url, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_enwik8_is_the_published_file():
    assert ENWIK8.url == "http://mattmahoney.net/dc/enwik8.zip"
    assert ENWIK8.size == 100_000_000
    assert ENWIK8.md5 == "a1fa5ffddb56f4953e226637dabbb36a"
    assert ENWIK8.sha1 == "57b8363b814821dc9d47aa4d41f58733519076b2"


def test_pydoc_is_english_text():
    content = pydoc_bytes()
    assert len(content) > 300_000
    assert b"The simple form" in content
    assert content == pydoc_bytes()


# The memory-mapped copy


@pytest.mark.parametrize("length", [100, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 17])
def test_reads_are_exact(tmp_path, length):
    content = (bytes(range(256)) + random_bytes(length))[:length]
    data = ByteData.from_bytes(content, tmp_path)
    assert data.num_bytes == length
    assert data.sha256 == hashlib.sha256(content).hexdigest()
    borders = sorted({0, 1, 99, *(border for border in (BLOCK_SIZE, 2 * BLOCK_SIZE) if border < length), length})
    for start in borders[:-1]:
        for stop in (end for end in (start + 1, *borders) if end > start):
            assert data.read(start, stop).tobytes() == content[start:stop]


def test_copy_is_memory_mapped_and_reused(tmp_path):
    first = ByteData.from_bytes(CONTENT, tmp_path)
    (folder,) = tmp_path.iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert first.table.cache_files
    second = ByteData.from_bytes(CONTENT, tmp_path)
    assert second.read(0, len(CONTENT)).tobytes() == CONTENT
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    ByteData.from_bytes(CONTENT[::-1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_several_writers_agree(tmp_path):
    content = random_bytes(20 * BLOCK_SIZE)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: ByteData.from_bytes(content, tmp_path), range(4)))
    assert all(copy.read(0, len(content)).tobytes() == content for copy in copies)
    assert len(list(tmp_path.iterdir())) == 1


def test_too_few_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 100 bytes, got 99"):
        ByteData.from_bytes(bytes(99), tmp_path)


def test_splits():
    splits = split_ranges(ENWIK8.size)
    assert splits == {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}
    assert split_ranges(101) == {"train": (0, 90), "valid": (90, 95), "test": (95, 101)}


# Training windows


def training_windows(num_bytes: int = 1000, length: int = 16, seed: int = 0) -> tuple[np.ndarray, TrainingWindows]:
    # Every value is its own position, so that a window shows where it was read.
    text = np.arange(num_bytes)
    return text, TrainingWindows(lambda start, stop: text[start:stop], num_bytes, length, seed)


def test_labels_are_the_next_bytes():
    _, windows = training_windows()
    inputs, labels = windows.batch(step=3, batch_size=8, rows=range(8))
    assert inputs.shape == labels.shape == (8, 16)
    assert inputs.dtype == labels.dtype == np.int64
    assert (labels == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()


@pytest.mark.parametrize("num_bytes, length", [(1000, 16), (1001, 10), (33, 16), (257, 1)])
def test_an_epoch_sees_each_byte_once(num_bytes, length):
    _, windows = training_windows(num_bytes, length)
    inputs, labels = windows.batch(step=0, batch_size=windows.windows_per_epoch, rows=range(windows.windows_per_epoch))
    assert len(np.unique(inputs)) == inputs.size > num_bytes - 2 * length - 1
    assert inputs.min() >= 0 and labels.max() < num_bytes


def test_epochs_differ_in_order_and_offset():
    _, windows = training_windows()
    starts = [windows.epoch_order(epoch) for epoch in range(4)]
    assert len({tuple(order) for order in starts}) == 4
    assert len({order[0] % 16 for order in starts}) > 1
    assert not (np.diff(starts[0]) > 0).all()


@pytest.mark.parametrize("step", [0, 7, 8, 1000])  # with 8 rows, step 7 is where the second epoch begins
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_depends_only_on_seed_and_step(step, parts):
    whole, _ = training_windows()[1].batch(step, 8, range(8))
    _, windows = training_windows()
    windows.batch(5, 8, range(8))  # what was read before does not matter
    size = 8 // parts
    pieces = [windows.batch(step, 8, range(first, first + size))[0] for first in range(0, 8, size)]
    assert (np.concatenate(pieces) == whole).all()
    assert (training_windows(seed=1)[1].batch(step, 8, range(8))[0] != whole).any()


def test_short_train_split_is_refused():
    with pytest.raises(ValueError, match="sequence_length 16 needs .* 33 bytes or more, got 32"):
        training_windows(num_bytes=32, length=16)


def test_an_address_that_does_not_answer_is_named(tmp_path):
    known = KnownFile("tiny", "http://127.0.0.1:9/tiny.zip", 1, "", "")
    with pytest.raises(OSError, match="127.0.0.1:9/tiny.zip.*--dataset_path"):
        known_file_bytes(known, None, None, tmp_path)
    assert list(tmp_path.iterdir()) == []
