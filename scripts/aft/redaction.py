# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a log and a card, which others read, may say of the machine that a run was on and of whoever started it."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


ROOT = Path(__file__).resolve().parents[2]


def public_path(path: str | Path) -> str:
    """A relative path as it is; an absolute one from the root of the repository, or its last part alone."""
    normal = Path(os.path.normpath(path))
    if not normal.is_absolute():
        return str(path)
    return str(normal.relative_to(ROOT)) if normal.is_relative_to(ROOT) else normal.name


def public_address(url: str) -> str:
    """An address without what others must not read: user, password, query, and folders of this machine."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return f"file:{Path(parts.path).name}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def readable(text: str) -> str:
    """
    Text of the command line or of a path without the lone surrogates that Python makes of bytes that its locale cannot
    read: what is UTF-8 is read as that, and the rest becomes U+FFFD.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
