# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Files of bytes: local ones, unpacked, and public ones that are downloaded and verified."""

import base64
import gzip
import hashlib
import reprlib
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import psutil

from aft.atomic_files import check_file, replacing
from aft.console import one_line
from aft.redaction import public_address


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
