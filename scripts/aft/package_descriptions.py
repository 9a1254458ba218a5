# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Descriptions of packages and their translations, from the index files of apt (Debian and its relatives)."""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from aft.console import one_line


HELPER = Path("/usr/lib/apt/apt-helper")  # reads every compression that apt writes
INDEX = re.compile(r"(?:.*_)?(?:(?P<packages>Packages)|Translation-(?P<language>\w+))(?:\.(?:lz4|gz|xz|bz2|zst))?")
# Read after all other files of settings: those of container images set no languages.
SETTINGS = """#clear Acquire::Languages;
Acquire::Languages {{ {languages} }};
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
APT::Update::Error-Mode "any";
"""


@dataclass(frozen=True)
class Description:
    """
    What one or more packages say of themselves.

    Attributes:
        package: the first of them by name.
        source: the source package that this is built from.
        section: its section, without that of the archive.
        english: the synopsis, and then the paragraphs.
        translated: the same in another language; None where there is no translation.
    """

    package: str
    source: str
    section: str
    english: list[str]
    translated: list[str] | None = None


def fetch_indexes(folder: Path, languages: list[str]) -> Path:
    """
    Fetches the indexes of the machine's sources into a folder of their own; those of the machine stay what they are.

    Returns:
        The folder that holds them, for `read_descriptions`.

    Raises:
        ValueError: there is no apt, or it cannot fetch all of them.
    """
    (folder / "lists" / "partial").mkdir(parents=True)
    folder.chmod(0o755)  # for the user that apt fetches as
    settings = folder / "apt.conf"
    quoted = " ".join(f'"{language}";' for language in languages)
    settings.write_text(SETTINGS.format(languages=quoted, folder=folder), encoding="utf-8")
    run(["apt-get", "--quiet", "--config-file", str(settings), "update"], "or give --lists_dir")
    return folder / "lists"


def find_indexes(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder of apt's lists, sorted: those of "Packages", and those of each language."""
    found = {}
    for path in sorted(folder.iterdir()):
        if match := INDEX.fullmatch(unquote(path.name)):
            found.setdefault(match["packages"] or match["language"], []).append(path)
    return found


def read_descriptions(folder: Path, languages: list[str]) -> tuple[list[Description], dict[str, str]]:
    """
    The descriptions in index files, in the order of their packages, whatever the order of the files.

    Args:
        folder: as apt keeps its lists, compressed or not.
        languages: "en", and maybe that of translations.

    Returns:
        The descriptions, and the MD5 sum of the content of every file that was read, by its name.

    Raises:
        ValueError: files are missing, or cannot be read.
    """
    files, sums = find_indexes(folder), {}
    if missing := [name for name in ("Packages", *languages) if name not in files]:
        known = ", ".join(sorted(files)) or "none"
        raise ValueError(f"{folder}: must have indexes of {', '.join(missing)}, got those of {known}")

    def stanzas(name: str, *required: str) -> Iterator[dict[str, str]]:
        for path in files[name]:
            content = read_index(path)
            sums[path.name] = hashlib.md5(content).hexdigest()
            yield from read_stanzas(content, path, required)

    texts = {}
    for language in languages:
        field = f"Description-{language}"
        found = stanzas(language, "Description-md5", field)
        texts[language] = {stanza["Description-md5"]: split_paragraphs(stanza[field]) for stanza in found}
    owners = {}
    for stanza in stanzas("Packages", "Package"):
        package, key = stanza["Package"], stanza.get("Description-md5")
        owner = package, stanza.get("Source", package).split()[0], stanza.get("Section", "").rpartition("/")[2]
        owners[key] = min(owner, owners.get(key, owner))
    english, *other = texts.values()
    translated = other[0] if other else {}
    found = sorted((owner, key) for key, owner in owners.items() if key in english)
    return [Description(*owner, english[key], translated.get(key)) for owner, key in found], sums


def read_index(path: Path) -> bytes:
    """The content of a file; apt reads those that are compressed."""
    if path.suffix in ("", path.name):
        return path.read_bytes()
    return run([str(HELPER), "cat-file", str(path)], "or decompress the files")


def read_stanzas(content: bytes, path: Path, required: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """
    The stanzas of a control file: fields by name, the lines of a value without the space that they begin with.

    Raises:
        ValueError: it is no such file, or a stanza lacks a required field; begins with `path`.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    for stanza in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        fields, name = {}, ""
        for line in stanza.split("\n"):
            if line.startswith(" ") and name:
                fields[name] += f"\n{line[1:]}"
                continue
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"{path}: must be lines of `Field: value`, got {line[:60]!r}")
            fields[name] = value.strip()
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"{path}: a stanza must have {', '.join(missing)}, got {', '.join(fields)}")
        yield fields


def split_paragraphs(text: str) -> list[str]:
    """The synopsis of a description and its paragraphs, which lines of a single point separate, each as one line."""
    synopsis, *lines = text.split("\n")
    paragraphs = "\n".join("\n\n" if line.strip() == "." else line for line in lines).split("\n\n")
    return [" ".join(synopsis.split()), *(" ".join(words) for part in paragraphs if (words := part.split()))]


def run(command: list[str], otherwise: str) -> bytes:
    """What a program of apt prints; a ValueError says what else can be done where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]}: there is no such program here; run this on Debian, {otherwise}") from None
    if done.returncode:
        reason = one_line(ValueError(done.stderr.decode(errors="replace")))
        raise ValueError(f"{command[0]} failed, {otherwise}: {reason}")
    return done.stdout
