# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""One run per folder: two would write one log and delete each other's files."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from aft.atomic_files import write_whole


LOCK, HOLDER = ".lock", ".lock.json"


@contextlib.contextmanager
def locked(folder: Path, active: bool = True) -> Iterator[None]:
    """
    Makes `--output_dir` and holds it while the block runs. The lock dies with its process, however that ends, and goes
    with the block. A folder that is new and in which the block leaves nothing is removed.

    Args:
        active (`bool`): False on every process of a distributed run but one, where this does nothing.

    Raises:
        ValueError: another run holds the folder; the message says which and since when. Or it is no folder.
    """
    if not active:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--output_dir must be a folder, and {error.filename} is none, got {str(folder)!r}") from None
    try:
        held = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"--output_dir {folder} is in use by {holder(folder)}: wait, or choose another") from None
    with held:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        me = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        try:
            write_whole(folder / HOLDER, json.dumps(me))
            yield
        finally:
            (folder / HOLDER).unlink(missing_ok=True)
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                (folder / LOCK).unlink(missing_ok=True)  # while it is held; who waits for it, begins with a new one
            with contextlib.suppress(OSError):  # something is there
                for path in made:
                    path.rmdir()


def holder(folder: Path) -> str:
    """Who holds the lock of a folder, in words."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or has just ended
        return "another process"
