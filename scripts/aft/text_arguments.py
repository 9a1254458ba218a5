# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags that say which text a program reads, and the checks on them. Nothing here loads torch or `datasets`."""

import argparse
import itertools
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from aft.atomic_files import check_file
from aft.flags import HUB_NAME, did_you_mean, flag, like_path


NAMED = ("pydoc", "enwik8", "file")  # what --dataset may be beside a path and a name on the Hub
# Suffixes of tables, each of which `datasets` reads with the builder of this name. All else is text.
BUILDERS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv",), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow",), "arrow"),
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
TEXTS = (".txt", ".md", ".xml", ".bin", ".zip", *COMPRESSED)  # of files, which no name on the Hub ends with
SAVED = ("state.json", "dataset_dict.json")  # one is in a folder that `save_to_disk` wrote
CACHE = Path.home() / ".cache" / "modeling_aft"


@dataclass
class TextArguments:
    _argument_group_name = "text"

    dataset: str | None = flag(
        None,
        "pydoc (Python's documentation, no network), enwik8, a file or folder, or a data set on the Hub; None is file "
        "with dataset_path, else pydoc.",
    )
    dataset_path: list[str] | None = flag(
        None,
        "Files or folders: .jsonl, .json, .csv, .parquet and .arrow are tables, whose rows are documents; one file "
        "of another kind is a text (.zip and .gz are unpacked), and several are documents. With --dataset enwik8: "
        "where that file already is.",
    )
    dataset_config: str | None = flag(None, "The configuration of a data set on the Hub that has several.")
    dataset_url: str | None = flag(None, "Another address of the data set's file; length and checksums still count.")
    text_column: str | None = flag(None, "The column of the documents; None is text, or the only column of strings.")
    validation_split: str | None = flag(
        None, "The split that valid is; None is validation, valid, val or dev if there is one, else a share of train."
    )
    test_split: str | None = flag(None, "The split that test is; None is test if there is one, else a share of train.")
    test_size: float | None = flag(
        None,
        "How much of train becomes valid, and test, where there is no such split: a share of its documents, or from 1 "
        "on their number; None is 0.05, with streaming 1000. Of one text it is always 5% each, from its end.",
    )
    streaming: bool = flag(
        False, "Read train as it is needed and never whole: memory and disk stay as they are, whatever its size."
    )
    cache_dir: str = flag(str(CACHE), "Folder for downloads and for the memory-mapped tokens of the text.")


def flag_words(args: argparse.Namespace, *groups: type) -> list[str]:
    """
    The flags of dataclasses that name the same data again, as words of a command line, without where this machine
    caches them.
    """
    words = []
    for entry in itertools.chain.from_iterable(map(fields, groups)):
        value = getattr(args, entry.name)
        if entry.name == "cache_dir" or value == entry.default or (entry.name == "dataset" and value in NAMED[::2]):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a number of pictures, where the flag may be a share as well
        words += [f"--{entry.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def suffix_of(path: str | Path) -> str:
    """The suffix of a file in small letters, without that of a compression: `.jsonl` of `a.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED and suffixes[-2] in BUILDERS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def complete_text_arguments(args: argparse.Namespace) -> None:
    """Gives `dataset` its final value: pydoc, enwik8, file (with dataset_path), or a name on the Hub."""
    if args.dataset is None:
        args.dataset = "file" if args.dataset_path else "pydoc"
    elif args.dataset not in NAMED and not args.dataset_path and Path(args.dataset).exists():
        args.dataset, args.dataset_path = "file", [args.dataset]


def is_one_text(args: argparse.Namespace) -> bool:
    """Whether the text is one file of bytes, and no documents."""
    if args.dataset in ("pydoc", "enwik8"):
        return True
    if args.dataset != "file" or len(args.dataset_path) != 1:
        return False
    path = Path(args.dataset_path[0])
    return not path.is_dir() and suffix_of(path) not in BUILDERS


def text_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the text, which `complete_text_arguments` has completed."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            value = getattr(args, name)
            problems.append(f"--{name} must be {allowed}, got {value!r}")

    dataset, paths = args.dataset, args.dataset_path
    for name in ("dataset_config", "text_column", "validation_split", "test_split", "cache_dir"):
        check(getattr(args, name) != "", name, "given, or left out")
    check(dataset != "pydoc" or not paths, "dataset_path", "left out with --dataset pydoc")
    check(dataset != "file" or bool(paths), "dataset_path", "given with --dataset file")
    check(dataset != "enwik8" or len(paths or ()) <= 1, "dataset_path", "one file with --dataset enwik8")
    check(dataset == "enwik8" or args.dataset_url is None, "dataset_url", "left out without --dataset enwik8")
    is_hub = dataset not in NAMED
    check(is_hub or args.dataset_config is None, "dataset_config", "left out without a data set on the Hub")
    if is_hub:
        check(not paths, "dataset_path", f"left out with --dataset {dataset}")
        path = Path(dataset)
        is_local = (path.parent != Path() and path.parent.is_dir()) or path.suffix.lower() in {*BUILDERS, *TEXTS}
        if is_local or not re.fullmatch(HUB_NAME, dataset, re.ASCII):
            problems.append(f"--dataset {dataset}: no such file or folder{like_path(path)}")
        elif hint := did_you_mean(dataset, NAMED) if path.parent == Path() else "":
            problems.append(
                f"--dataset must be one of {', '.join(NAMED)}, a path, or on the Hub, got {dataset!r}{hint}"
            )
    if problems:
        return problems
    for path in map(Path, paths or ()):
        if path.is_dir() and str(path):
            check(dataset == "file", "dataset_path", "a file with --dataset enwik8")
        else:
            try:
                check_file(path, "--dataset_path")
            except ValueError as error:
                problems.append(str(error))
    if problems:
        return problems
    one_text, default = is_one_text(args), (0.05, 1000)[args.streaming]
    if one_text:
        for name in ("text_column", "validation_split", "test_split"):
            check(getattr(args, name) is None, name, "left out: the text is one file, not a table")
        fixed = args.test_size is None or args.streaming
        check(fixed, "test_size", "left out: of one text, valid and test are the last 5% each")
        check(not args.streaming or dataset == "file", "streaming", f"left out with --dataset {dataset}")
        suffix = Path(paths[0]).suffix.lower() if paths else ""
        check(not args.streaming or suffix != ".zip", "streaming", "left out with a .zip")
    size = default if args.test_size is None else args.test_size
    whole = 1 <= size < math.inf and size == int(size)
    allowed = "a whole number of documents" if args.streaming else "a share below 0.5, or a whole number of documents"
    check(whole or (0 < size < 0.5 and not args.streaming), "test_size", allowed)
    return problems
