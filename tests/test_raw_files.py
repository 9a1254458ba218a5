"""Files of bytes: local ones, unpacked, and public ones, downloaded and verified."""

import base64
import errno
import gzip
import hashlib
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import psutil
import pytest

from aft.raw_files import (
    ENWIK8,
    KnownFile,
    file_bytes,
    known_file_bytes,
    pydoc_bytes,
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
    """
    A function that serves a body at a local address, promising `missing` bytes more than it sends, or sends elsewhere.
    Its attribute `requests` lists what was asked.
    """
    servers = []

    def start(body: bytes, missing: int = 0, location: str | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                start.requests.append(self)
                self.send_response(302 if location else 200)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", str(len(body) + missing))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/letters.zip"

    start.requests = []
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


def change(path, *changes: tuple[int, bytes]):
    content = bytearray(path.read_bytes())
    for position, new in changes:
        content[position : position + len(new)] = new
    path.write_bytes(content)


def find(path, text: bytes) -> int:
    return path.read_bytes().index(text)


@pytest.mark.parametrize(
    "field, value, message",
    [
        pytest.param(6, b"\x01\x00", "'letters' is encrypted", id="encrypted"),
        pytest.param(8, b"\x63\x00", "compression method is not supported", id="compression"),
        pytest.param(4, b"\xff\x00", "zip file version", id="version"),
    ],
)
def test_zip_that_cannot_be_unpacked_is_named(tmp_path, field, value, message):
    path = write_file(tmp_path / "letters.zip")
    change(path, (field, value), (find(path, b"PK\x01\x02") + field + 2, value))
    with pytest.raises(ValueError, match=f"letters.zip: not a whole .zip file .*{message}"):
        file_bytes(path)


@pytest.mark.parametrize("name", ["letters.zip", "letters.gz"])
def test_changed_archive_is_the_content_or_named(tmp_path, name):
    whole = write_file(tmp_path / name).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        (tmp_path / name).write_bytes(whole)
        change(tmp_path / name, (int(random.integers(40)) - 20 * int(random.integers(2)), random.bytes(2)))
        try:
            assert file_bytes(tmp_path / name) == CONTENT
        except ValueError as error:
            assert name in str(error)


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/null")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("make, kind", [(os.mkdir, "a folder"), (make_pipe, "a pipe"), (make_device, "a device")])
@pytest.mark.parametrize("name", ["data", "data.zip", "data.gz"])
def test_what_is_no_file_is_named(tmp_path, make, kind, name):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"must be a file, got {kind}.*{name}"):
        file_bytes(tmp_path / name)


def test_suffix_in_capitals(tmp_path):
    os.rename(write_file(tmp_path / "letters.zip"), tmp_path / "LETTERS.ZIP")
    assert file_bytes(tmp_path / "LETTERS.ZIP") == CONTENT


def test_more_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 10**12)
    with pytest.raises(ValueError, match=r"sparse: must fit into the memory.*got 1,000,000,000,000"):
        file_bytes(tmp_path / "sparse")
    path = write_file(tmp_path / "letters.zip")
    change(path, (find(path, b"PK\x01\x02") + 24, (2**32 - 2).to_bytes(4, "little")))  # what its table says
    memory = psutil.virtual_memory()._replace(available=2 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match="letters.zip: must fit into the memory.*got 4,294,967,294"):
        file_bytes(path)
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(10**8)))
    with pytest.raises(ValueError, match="zeros.gz: must fit into the memory.*2,097,152 bytes are free"):
        file_bytes(tmp_path / "zeros.gz")


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


def test_damaged_download_is_made_again(tmp_path, serve, capsys):
    url = serve(write_file(tmp_path / "letters.zip").read_bytes())
    known_file_bytes(KNOWN, None, url, tmp_path / "cache")
    change(tmp_path / "cache" / "letters.zip", (200, b"damaged"))
    assert known_file_bytes(KNOWN, None, url, tmp_path / "cache") == CONTENT
    assert "letters.zip: not a whole .zip file" in capsys.readouterr().err


SECRETS = "user%40home:pass%20word"


def with_secrets(url: str) -> str:
    return url.replace("http://", f"http://{SECRETS}@") + "?token=t0ken#part"


def test_credentials_reach_the_server_and_no_file_name(tmp_path, serve):
    url = serve(write_file(tmp_path / "letters.zip").read_bytes())
    assert known_file_bytes(KNOWN, None, with_secrets(url), tmp_path / "cache") == CONTENT
    assert os.listdir(tmp_path / "cache") == ["letters.zip"]
    (request,) = serve.requests
    expected = base64.b64encode(b"user@home:pass word").decode()
    assert (request.path, request.headers["Authorization"]) == ("/letters.zip?token=t0ken", f"Basic {expected}")


def test_credentials_are_not_sent_elsewhere(tmp_path, serve):
    body = write_file(tmp_path / "letters.zip").read_bytes()
    first = serve(b"", location=serve(body))
    assert known_file_bytes(KNOWN, None, with_secrets(first), tmp_path / "cache") == CONTENT
    assert ["Authorization" in request.headers for request in serve.requests] == [True, False]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.zip", "http://127.0.0.1:port/a.zip", "scheme://127.0.0.1/a.zip", "http:///a b.zip"]
)
def test_no_secret_stands_in_an_error(tmp_path, url):
    with pytest.raises(OSError, match="a b.zip|a.zip") as error:
        known_file_bytes(KNOWN, None, with_secrets(url), tmp_path)
    assert not any(secret in str(error.value) for secret in (*SECRETS.split(":"), "t0ken"))
    assert "--dataset_path" in str(error.value) and "\n" not in str(error.value)


def test_full_disk_during_the_download_is_named(tmp_path, serve, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="letters.zip cannot be downloaded to .*No space left"):
        known_file_bytes(KNOWN, None, serve(b"PK"), tmp_path / "cache")
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


def test_an_address_that_does_not_answer_is_named(tmp_path):
    known = KnownFile("tiny", "http://127.0.0.1:9/tiny.zip", 1, "", "")
    with pytest.raises(OSError, match="127.0.0.1:9/tiny.zip.*--dataset_path"):
        known_file_bytes(known, None, None, tmp_path)
    assert list(tmp_path.iterdir()) == []
