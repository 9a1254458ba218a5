# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Tables of texts, maybe with labels: what stands in a file, all of it, and as it stands there."""

import hashlib
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas
import pyarrow.parquet
import torch

from aft.atomic_files import check_file
from aft.console import one_line
from aft.settings_files import unique_keys


KINDS = {int: "int64", float: "float64", bool: "bool"}  # of values in a .jsonl file; all others by their class


@dataclass
class Table:
    """
    The texts of a table and, unless it has no such column, their labels.

    Attributes:
        name: the flag and the file, with which errors begin.
        sha256: of the file.
    """

    name: str
    sha256: str
    texts: list[str]
    labels: list[str] | None


def read_table(path: Path, flag_name: str, text_column: str, label_column: str, with_labels: bool = True) -> Table:
    """
    The table in a file. A file is read as it is: nothing of it is remembered for the next time.

    Args:
        with_labels: whether it must have a column of labels.

    Raises:
        ValueError: it is not readable or empty, lacks a column, or has something else than texts and labels there.
    """
    columns = {"text": text_column, "label": label_column}
    name, content, found = read_columns(path, flag_name, columns, set() if with_labels else {"label"})
    labels = [str(label) for label in found["label"]] if "label" in found else None
    if labels is not None:
        check_labels(labels, name)
    return Table(name, hashlib.sha256(content).hexdigest(), found["text"], labels)


def read_columns(
    path: Path, flag_name: str, columns: dict[str, str], optional: Collection[str] = ()
) -> tuple[str, bytes, dict[str, list]]:
    """
    Columns of the table in a file.

    Args:
        columns: by what each is for, their names; that of a field in a column of objects is `column.field`.
        optional: those that need not be there, by what they are for.

    Returns:
        What errors begin with (the flag and the file), the content of the file, and the values of the columns that
        are there, by what they are for.

    Raises:
        ValueError: it is not readable or empty, lacks a column, or has values there that may not be.
    """
    name, suffix = f"--{flag_name} {path}", path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{name}: must end in {', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}")
    check_file(path, f"--{flag_name}")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{name}: must have at least one row, is empty")
    try:
        names, found = READERS[suffix](content, tuple(columns.values()))
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise ValueError(f"{name}: must be UTF-8, and {where} is not") from None
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
        raise ValueError(f"{name}: no {suffix} table with rows: {one_line(error)}") from error
    return name, content, check_columns(names, found, columns, optional, name)


def check_columns(
    names: list[str], found: dict[str, list], columns: dict[str, str], optional: Collection[str], name: str
) -> dict[str, list]:
    """
    The values of columns by what they are for; `names` are those of all columns, the rest is as in `read_columns`.

    Raises:
        ValueError: a column is missing, is there twice, or has values that may not be; begins with `name`.
    """
    for role, column in columns.items():
        if (count := names.count(column)) > 1:
            raise ValueError(f"{name}: column {column!r} must be there once, is {count} times")
        if count == 1:
            check_values(found[column], f"{name}: column {column!r}", role)
        elif role not in optional:
            known = ", ".join(map(repr, names))
            raise ValueError(f"{name}: no column {column!r}, only {known}; --{role}_column says which to take")
    return {role: found[column] for role, column in columns.items() if column in found}


def read_csv(content: bytes, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, list]]:
    """
    The names of all columns of a .csv file, and the values of those that are wanted and there. Neither "null" nor
    "007" nor a date is anything but these characters.

    Raises:
        ValueError: it is not UTF-8, there are no rows, a row has more fields than the first line, or a quotation does
            not end.
    """
    options = {"dtype": str, "keep_default_na": False, "na_filter": False}
    table = pandas.read_csv(io.StringIO(content.decode("utf-8-sig")), header=None, **options).to_numpy()
    if len(table) < 2:
        raise ValueError("there is only the line with the names of the columns")
    names = table[0].tolist()
    return names, {name: table[1:, names.index(name)].tolist() for name in wanted if name in names}


def read_jsonl(content: bytes, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, list]]:
    """
    The names of all columns of a .jsonl file, an object in each line, and the values of those that are wanted and
    there, None where a row has none.

    Raises:
        ValueError: it is not UTF-8, there are no rows, or a line is no JSON or no object, or has a name twice.
    """
    names, values = {}, {name: [] for name in wanted}
    # splitlines knows other ends, which texts may have
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
            if not isinstance(row, dict):
                raise ValueError(f"must be an object, got {type(row).__name__}")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        for column, value in list(row.items()):
            if isinstance(value, dict):
                row |= {f"{column}.{field}": inner for field, inner in value.items()}
        names |= dict.fromkeys(row)
        for name in wanted:
            values[name].append(row.get(name))
    if not names:
        raise ValueError("there is none")
    return list(names), {name: values[name] for name in wanted if name in names}


def read_parquet(content: bytes, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, list]]:
    """The same of a .parquet file; a ValueError if it is none, or has no rows."""
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content)).flatten()
    except Exception as error:  # of pyarrow, of any type
        raise ValueError(one_line(error)) from error
    if not len(table):
        raise ValueError("there is none")
    return table.column_names, {name: table[name].to_pylist() for name in wanted if name in table.column_names}


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def check_values(values: list, where: str, role: str) -> None:
    """
    Checks the values of a column.

    Raises:
        ValueError: one is empty, or no string, nor, of a label, an integer, or there are both.
    """
    allowed = ("strings or integers", {str, int}) if role == "label" else ("strings", {str})
    for row, value in enumerate(values, start=1):
        if value is None or value == "" or (role == "label" and isinstance(value, str) and not value.strip()):
            raise ValueError(f"{where} must not be empty, got {value!r} in row {row}")
        if type(value) not in allowed[1]:
            kind = KINDS.get(type(value), type(value).__name__)
            raise ValueError(f"{where} must have {allowed[0]}, has {kind} in row {row}")
        if type(value) is not type(values[0]):
            raise ValueError(f"{where} must have strings or integers, has both: see row {row}")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where} must have whole characters, has half of one (a surrogate) in row {row}"
            ) from None


def check_labels(labels: Iterable[str], name: str) -> None:
    """
    Checks that no two labels look the same.

    Raises:
        ValueError: two differ in white space alone, or in how Unicode writes the same letters.
    """
    seen = {}
    for label in dict.fromkeys(labels):
        other = seen.setdefault(" ".join(unicodedata.normalize("NFC", label).split()), label)
        if other != label:
            raise ValueError(f"{name}: labels must differ in more than white space, got {other!r} and {label!r}")


def describe_labels(labels: list[str], names: list[str]) -> str:
    """How many rows each label has, in a line, and which labels differ only in their case."""
    counts = Counter(labels)
    text = "labels: " + ", ".join(f"{name} ({counts[name]} rows)" for name in names)
    same = {}
    for name in names:
        same.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(map(repr, group)) for group in same.values() if len(group) > 1]
    return text + (f"; only their case differs in {', '.join(alike)}" if alike else "")


class EncodedRows(torch.utils.data.Dataset):
    """
    The rows of a table as token ids, encoded when they are asked for.

    Args:
        labels (`list[int]`, *optional*): the class of each row.
        options: of the tokenizer.
    """

    def __init__(self, texts: list[str], labels: list[int] | None, tokenizer, options: dict):
        self.texts, self.labels, self.tokenizer, self.options = texts, labels, tokenizer, options

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = {**self.tokenizer(self.texts[index], **self.options)}
        return row if self.labels is None else {**row, "labels": self.labels[index]}


def encode_table(table: Table, label2id: dict[str, int], tokenizer, truncation: str, limit: int | None) -> EncodedRows:
    """
    The rows of a table with the class of each, if they have labels.

    Raises:
        ValueError: a label is unknown, or a row has no tokens, or more than `limit` and `truncation` is "none".
    """
    tokenizer.truncation_side = "left" if truncation == "left" else "right"
    options = {"truncation": True, "max_length": limit} if limit and truncation != "none" else {}
    for start in range(0, len(table.texts), 1000):
        for row, ids in enumerate(tokenizer(table.texts[start : start + 1000], **options)["input_ids"], start + 1):
            if not ids or len(ids) > (limit or len(ids)):
                raise ValueError(
                    f"{table.name}: row {row} has {len(ids)} tokens; allowed: 1 to {limit or 'any number'} "
                    "(--max_length, at most the max_position_embeddings of the model), or --truncation right or left"
                )
    for row, label in enumerate(table.labels or (), start=1):
        if label not in label2id:
            raise ValueError(f"{table.name}: unknown label {label!r} in row {row}; known: {list(label2id)}")
    classes = None if table.labels is None else [label2id[label] for label in table.labels]
    return EncodedRows(table.texts, classes, tokenizer, options)
