# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Files that are there whole or not at all, whatever stops the program, and whoever else writes them."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside `path`, makes it `path` when all of it is there, and folders before that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_rows(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    """Writes a CSV file, whole or not at all."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())
