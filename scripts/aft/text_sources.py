# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Text for language modelling, in three splits: one file of bytes, or documents that `datasets` reads.

One file of N bytes is split 90/5/5 into train [0, 0.90 N), valid [0.90 N, 0.95 N) and test [0.95 N, N). Of documents,
valid and test are the splits of these names, or a share of train that is drawn by a fixed seed.
"""

import argparse
import hashlib
import itertools
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    Value,
    disable_progress_bars,
    load_dataset,
    load_from_disk,
)

from aft.console import one_line
from aft.raw_files import ENWIK8, KnownFile, differences, file_bytes, known_file_bytes, pydoc_bytes
from aft.redaction import readable
from aft.text_arguments import BUILDERS, SAVED, is_one_text, suffix_of


SPLITS = ("train", "valid", "test")
NAMES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}  # of splits, for valid and test
PIECE = 1 << 20  # characters that are tokenized at once
DRAWN = 0  # the seed that draws valid and test


def split_ranges(num_bytes: int) -> dict[str, tuple[int, int]]:
    """Where train, valid and test of a file begin and end: 90/5/5."""
    train_end, valid_end = num_bytes * 90 // 100, num_bytes * 95 // 100
    return {"train": (0, train_end), "valid": (train_end, valid_end), "test": (valid_end, num_bytes)}


def pieces(text: str) -> Iterator[str]:
    """A text in parts of about `PIECE` characters, which end with a line where there is one."""
    start = 0
    while start < len(text):
        stop = text.rfind("\n", start, start + PIECE) + 1 if start + PIECE < len(text) else len(text)
        stop = stop or start + PIECE
        yield text[start:stop]
        start = stop


@dataclass
class FileText:
    """
    The text of one file.

    Attributes:
        name (`str`): for the log and the card.
        content (`bytes`): all of it, UTF-8 or not.
        known (`KnownFile`, *optional*): the public file that this is, by its checksums.
    """

    name: str
    content: bytes
    known: KnownFile | None = None
    hub_dataset: str | None = None
    are_documents = False
    stream = None

    def __post_init__(self):
        if len(self.content) < 100:
            raise ValueError(f"the data must have at least 100 bytes, got {len(self.content)}")

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def training_texts(self) -> Iterator[list[str]]:
        """Those of train."""
        return self.texts("train")

    def split_bytes(self, split: str) -> bytes:
        """All of a split."""
        start, stop = split_ranges(len(self.content))[split]
        return self.content[start:stop]

    def character_ranges(self) -> dict[str, tuple[int, int]]:
        """The ranges of `split_ranges`, where they would cut a character in UTF-8 moved to the next one."""

        def next_character(index: int) -> int:
            while index < len(self.content) and self.content[index] & 0xC0 == 0x80:
                index += 1
            return index

        ranges = split_ranges(len(self.content))
        return {split: (next_character(start), next_character(stop)) for split, (start, stop) in ranges.items()}

    def texts(self, split: str) -> Iterator[list[str]]:
        """
        The text of a split, in lists of parts of it.

        Raises:
            ValueError: it is not UTF-8.
        """
        start, stop = self.character_ranges()[split]
        try:
            text = self.content[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            where = start + error.start
            raise ValueError(
                f"--dataset_path: must be text in UTF-8 for a tokenizer, and has byte {self.content[where]:#04x} at "
                f"{where}; --tokenizer bytes takes any bytes"
            ) from None
        for piece in pieces(text):
            yield [piece]


@dataclass
class DocumentText:
    """
    Documents, each a text of its own.

    Attributes:
        name (`str`): for the log and the card.
        splits (`dict`): for each name of `SPLITS` a `datasets.Dataset`; train is empty if it is streamed.
        column (`str`): of the documents.
        stream (`datasets.IterableDataset`, *optional*): train, if it is streamed.
        separated (`bool`): whether they end; lines of one text do not.
    """

    name: str
    splits: dict[str, Dataset]
    column: str
    hub_dataset: str | None = None
    stream: IterableDataset | None = None
    separated: bool = True
    known: KnownFile | None = None
    batch_size: int = field(default=256, repr=False)

    @property
    def are_documents(self) -> bool:
        return self.separated

    @cached_property
    def sha256(self) -> str:
        """Of the splits that are not streamed: the name of each, and the length and bytes of each document."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(split.encode())
            for text in itertools.chain.from_iterable(self.texts(split)):
                content = text.encode("utf-8", "surrogatepass")
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def texts(self, split: str) -> Iterator[list[str]]:
        """
        The documents of a split, in lists.

        Raises:
            ValueError: a row has no text.
        """
        documents = self.splits[split]
        for start in range(0, len(documents), self.batch_size):
            batch = documents[start : start + self.batch_size][self.column]
            check_texts(batch, split, start)
            yield batch

    def split_bytes(self, split: str) -> bytes:
        """All documents of a split, one after the other, in UTF-8."""
        texts = itertools.chain.from_iterable(self.texts(split))
        return b"".join(text.encode("utf-8", "surrogatepass") for text in texts)

    def training_texts(self) -> Iterator[list[str]]:
        """Those of train, in the order of the stream if it is one."""
        if self.stream is None:
            yield from self.texts("train")
            return
        rows, start = iter(self.stream), 0
        while batch := [row[self.column] for row in itertools.islice(rows, self.batch_size)]:
            check_texts(batch, "train", start)
            yield batch
            start += len(batch)


def check_texts(batch: list, split: str, start: int) -> None:
    """Raises a ValueError if one of these rows of a split, which begin at `start`, is no text."""
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise ValueError(f"--dataset: row {start + index} of {split} must have a text, got {text!r}")


def list_files(paths: Iterable[str]) -> list[Path]:
    """
    The files that paths stand for, in order: of a folder all in it, at any depth, but those whose name begins with a
    dot.

    Raises:
        ValueError: a folder has none.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not inside:
            raise ValueError(f"--dataset_path {path}: must have files in it, and has none")
        files += inside
    return files


def split_name(path: Path) -> str | None:
    """The split that the name of a file in a folder says: that of `valid-00.parquet` and `dev/a.txt` is validation."""
    for name in (path.stem.split(".")[0], path.parent.name):
        word = name.lower().replace("_", "-").split("-")[0]
        for split, names in (("train", ("train",)), *NAMES.items()):
            if word in names:
                return split
    return None


def by_split(files: list[Path]) -> dict[str, list[str]]:
    """Files by the splits that their names say, if one says train; else all are train."""
    names = [split_name(path) for path in files]
    found = {}
    for path, name in zip(files, names, strict=True):
        found.setdefault(name or "train" if "train" in names else "train", []).append(str(path))
    return found


def read_text_file(path: Path) -> str:
    """The text of a file of a folder; a ValueError names one that is not UTF-8."""
    try:
        return file_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--dataset_path {path}: must be text in UTF-8, and is not at byte {error.start}") from None


def read_folder_of(args: argparse.Namespace) -> dict[str, Dataset] | DatasetDict:
    """The splits that files have, as `datasets` reads them."""
    [first] = args.dataset_path if len(args.dataset_path) == 1 else [None]
    if first is not None and any((Path(first) / name).is_file() for name in SAVED):
        if args.streaming:
            raise ValueError("--streaming must be left out with a folder of save_to_disk, which is memory-mapped")
        loaded = load_from_disk(first)
        return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    files = list_files(args.dataset_path)
    kinds = {}
    for path in files:
        kinds.setdefault(BUILDERS.get(suffix_of(path), "text"), []).append(path)
    if len(kinds) > 1:
        found = "; ".join(f"{kind}: {paths[0]}" for kind, paths in sorted(kinds.items()))
        raise ValueError(f"--dataset_path: must be files of one kind, got {found}")
    [kind] = kinds
    is_folder = any(Path(path).is_dir() for path in args.dataset_path)
    data_files = by_split(files) if is_folder else {"train": [str(path) for path in files]}
    if kind != "text":
        return load_dataset(kind, data_files=data_files, streaming=args.streaming, cache_dir=tables_dir(args))
    if args.streaming:  # line by line, which is all of the text
        options = {"sample_by": "line", "keep_linebreaks": True}
        return load_dataset("text", data_files=data_files, streaming=True, cache_dir=tables_dir(args), **options)
    return {
        split: Dataset.from_dict({"text": [read_text_file(Path(path)) for path in paths]})
        for split, paths in data_files.items()
    }


def tables_dir(args: argparse.Namespace) -> str:
    """Where `datasets` keeps its memory-mapped copies."""
    return str(Path(args.cache_dir) / "datasets")


def read_splits(args: argparse.Namespace) -> dict:
    """
    The splits of documents, `Dataset`s or with --streaming `IterableDataset`s, by the names that the source gives.

    Raises:
        ValueError: they cannot be read; names the data set and the reason.
    """
    if args.dataset == "file":
        what = f"--dataset_path {readable(' '.join(args.dataset_path))}"
    else:
        what = f"--dataset {args.dataset}"
    try:
        if args.dataset == "file":
            return read_folder_of(args)
        return load_dataset(args.dataset, args.dataset_config, streaming=args.streaming, cache_dir=tables_dir(args))
    except ValueError as error:
        reason = one_line(error)
        if reason.startswith("--"):
            raise
        if "onfig" in reason and args.dataset != "file":  # none is given, or one that is not there
            what, reason = f"{what} --dataset_config {args.dataset_config}", reason.split(" Example of usage")[0]
        raise ValueError(f"{what}: {reason}") from error
    except Exception as error:  # of pyarrow, pandas, the Hub, and the network
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{what}: cannot be read: {reason}") from error


def choose_column(table, asked: str | None) -> str:
    """
    The column of the documents.

    Raises:
        ValueError: there is none of this name, or it has no strings; or none is given and several columns have.
    """
    features = table.features
    if features is None:  # of a stream that does not know them before it reads
        features = table._resolve_features().features
    strings = [
        name for name, kind in features.items() if isinstance(kind, Value) and kind.dtype in ("string", "large_string")
    ]
    column = asked or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if column not in strings:
        known = ", ".join(strings) or "none"
        raise ValueError(f"--text_column must be one of the columns of strings ({known}), got {asked!r}")
    return column


def choose_splits(found: dict, args: argparse.Namespace) -> dict:
    """
    What train is, and valid and test where they are splits of the source.

    Raises:
        ValueError: there is no split of a name that was asked for, or no train.
    """
    known = ", ".join(found)
    if "train" not in found:
        raise ValueError(f"--dataset must have a split train, got {known}")
    chosen = {"train": found["train"]}
    for split, name, asked in (
        ("valid", "validation", args.validation_split),
        ("test", "test", args.test_split),
    ):
        if asked is not None and (asked not in found or asked == "train"):
            raise ValueError(f"--{name}_split must be a split beside train ({known}), got {asked!r}")
        names = [asked] if asked else [name for name in NAMES[name] if name in found]
        if names:
            chosen[split] = found[names[0]]
    if args.validation_split is not None and args.validation_split == args.test_split:
        raise ValueError(f"--test_split must be another split than --validation_split, got {args.test_split!r}")
    return chosen


def draw_rows(count: int, missing: list[str], size: float, of: str) -> dict[str, np.ndarray]:
    """
    The rows of train that remain train, and those that become the splits that are `missing`, by a fixed seed: for each
    the sorted numbers, int64.

    Args:
        count: rows of train.
        size: a share of them for each missing split, or from 1 on their number.
        of: what errors call them.

    Raises:
        ValueError: none are left for train.
    """
    taken = int(size) if size >= 1 else max(1, round(size * count))
    if count <= taken * len(missing):
        raise ValueError(
            f"--test_size must leave {of} for train: it has {count}, got {size:g} for {', '.join(missing)}"
        )
    order = np.random.default_rng(DRAWN).permutation(count)
    rows = {split: order[index * taken : (index + 1) * taken] for index, split in enumerate(missing)}
    return {split: np.sort(drawn) for split, drawn in {"train": order[len(missing) * taken :], **rows}.items()}


def share_out(chosen: dict, size: float) -> dict[str, Dataset]:
    """
    The three splits, of which those that `chosen` lacks are drawn from train.

    Raises:
        ValueError: train has too few documents.
    """
    missing = [split for split in ("valid", "test") if split not in chosen]
    rows = draw_rows(len(chosen["train"]), missing, size, "documents")
    if missing:
        chosen = chosen | {split: chosen["train"].select(drawn) for split, drawn in rows.items()}
    return {split: chosen[split] for split in SPLITS}


def take_out(chosen: dict, column: str, size: int) -> tuple[dict[str, Dataset], IterableDataset]:
    """
    Valid and test of a stream, each the first `size` documents of its split, or of train where it has none; and the
    rest of train.

    Raises:
        ValueError: there are too few documents.
    """
    stream, splits = chosen["train"], {"train": Dataset.from_dict({column: []})}
    for split in ("valid", "test"):
        source = chosen.get(split)
        taken = [row[column] for row in (stream if source is None else source).take(size)]
        if not taken or (source is None and len(taken) < size):
            raise ValueError(f"--test_size must be at most the documents of the stream, got {size} for {split}")
        check_texts(taken, split, 0)
        splits[split] = Dataset.from_dict({column: taken})
        if source is None:
            stream = stream.skip(size)
    return splits, stream


def load_text(args: argparse.Namespace) -> FileText | DocumentText:
    """
    The text that the flags of `TextArguments` name, once they are complete and checked.

    Raises:
        ValueError: it cannot be read, has too little text, or not the column or the split that was asked for.
        OSError: a download failed.
    """
    disable_progress_bars()
    if args.dataset == "pydoc":
        return FileText(f"pydoc topics of Python {platform.python_version()}", pydoc_bytes())
    [path] = args.dataset_path if len(args.dataset_path or ()) == 1 else [None]
    if args.dataset == "enwik8":
        return FileText(ENWIK8.name, known_file_bytes(ENWIK8, path, args.dataset_url, args.cache_dir), ENWIK8)
    if is_one_text(args) and not args.streaming:
        content = file_bytes(path)
        if not any(differences(ENWIK8, content)):
            return FileText(ENWIK8.name, content, ENWIK8)
        return FileText(readable(Path(path).name), content)

    found = read_splits(args)
    chosen = choose_splits(found, args)
    column = choose_column(chosen["train"], args.text_column)
    chosen = {split: table.select_columns([column]) for split, table in chosen.items()}
    default = 1000 if args.streaming else 0.05
    size, stream = default if args.test_size is None else args.test_size, None
    if args.streaming:
        splits, stream = take_out(chosen, column, int(size))
    else:
        splits = share_out(chosen, size)
    is_file = args.dataset == "file"
    name = ", ".join(readable(Path(path).resolve().name) for path in args.dataset_path) if is_file else args.dataset
    if args.dataset_config:
        name += f", {args.dataset_config}"
    is_lines = args.streaming and is_file and suffix_of(list_files(args.dataset_path)[0]) not in BUILDERS
    return DocumentText(name, splits, column, None if is_file else args.dataset, stream, separated=not is_lines)
