# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Files that are there whole or not at all, whatever stops the program, and whoever else writes them."""

import contextlib
import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from aft.flags import like_path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of the system that name no file, as a full disk's, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    A name beside `path` to write a file to, and folders before that. When the block ends, what was written reaches the
    disk and then becomes `path`; when it raises, it is removed. No two writers have the same name, on any machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:50]}.{uuid4().hex}.tmp")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """
    An empty folder to write files to. When the block ends, they reach the disk, and then it becomes `folder`; when it
    raises, it is removed. A `folder` that is there stays, as another process wrote it with the same content, unless
    `replace` says that it is damaged: then it is moved away, for a process that has mapped its files goes on.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name[:20]}-new-", ignore_cleanup_errors=True
    ) as temporary:
        new, damaged = Path(temporary) / "new", Path(temporary) / "damaged"
        new.mkdir()
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        if replace:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, damaged)
        while new.exists():
            try:
                os.rename(new, folder)
            except OSError as error:
                if folder.exists():
                    break
                # Another process was faster, and a third has moved its folder away again.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync(folder.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all: a reader finds the old content or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_rows(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    """Writes a CSV file, whole or not at all."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())


def move_model(source: Path, folder: Path) -> None:
    """Moves the files of a saved model into another folder of the same disk, once all of them are on it; config.json,
    which says that a model is there, comes last."""
    files = sorted(source.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        sync(path)
    for path in files:
        os.replace(path, folder / path.name)
    sync(folder)


def check_file(path: Path, name: str) -> None:
    """Raises a ValueError, which begins with `name`, if `path` is no file that can be read again and again."""
    if path.is_file():
        return
    if not path.exists():
        raise ValueError(f"{name}: no such file: {path}{like_path(path)}")
    kind = "a folder" if path.is_dir() else "a pipe" if path.is_fifo() else "a device or socket"
    raise ValueError(f"{name}: must be a file, got {kind}: {path}")


def check_new_folder(path: Path, name: str) -> None:
    """Raises a ValueError, which begins with `name`, if `path` is neither an empty folder nor free for a new one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name} must be a new or an empty folder, got {path}")


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
