# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags that say which pictures a language model of sub-pixels reads, in place of a text."""

import argparse
import math
import re
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

from aft.flags import HUB_NAME, flag, like_path
from aft.text_arguments import TextArguments, complete_text_arguments, flag_words, text_problems


OF_PICTURES_TOO = ("dataset_config", "validation_split", "test_split", "test_size", "cache_dir")  # flags of a text


@dataclass
class PictureArguments:
    _argument_group_name = "pictures, in place of a text"

    pictures: str | None = flag(
        None,
        "Folder of pictures, or with train/, valid/ and test/ of such; folder with the files of MNIST or "
        "Fashion-MNIST; or what datasets.load_dataset reads, a path or a name on the Hub. Flags of a text that it "
        f"takes: {', '.join(OF_PICTURES_TOO)}.",
    )
    image_column: str | None = flag(None, "Column of the pictures of a data set; None is the only one there is.")
    image_size: int | None = flag(
        None,
        "Pixels of the square that a picture is made to; None leaves pictures as they are, which have all one size.",
    )
    num_channels: int | None = flag(None, "1 for grey and 3 for red, green and blue; None is what the pictures have.")


# The flags of a text that pictures have too, for a program that reads no text.
SplitArguments = make_dataclass(
    "SplitArguments",
    [
        (entry.name, entry.type, field(default=entry.default, metadata=entry.metadata))
        for entry in fields(TextArguments)
        if entry.name in OF_PICTURES_TOO
    ],
    namespace={"_argument_group_name": "parts of the pictures"},
)


def source_flags(args: argparse.Namespace) -> list[str]:
    """The flags that name the same pictures or the same text again, as words of a command line."""
    return flag_words(args, PictureArguments, TextArguments)


def complete_source(args: argparse.Namespace) -> None:
    """Gives the flags that name a text their final values, unless there are pictures in its place."""
    if args.pictures is None:
        complete_text_arguments(args)


def source_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the pictures, or of the text if there are none."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(args, name)!r}")

    if args.pictures is None:
        for entry in fields(PictureArguments):
            check(getattr(args, entry.name) is None, entry.name, "left out without --pictures")
        return problems + text_problems(args)
    for entry in fields(TextArguments):
        left_out = getattr(args, entry.name, entry.default) == entry.default
        check(left_out or entry.name in OF_PICTURES_TOO, entry.name, "left out with --pictures")
    check(args.image_size is None or args.image_size >= 1, "image_size", "at least 1")
    check(args.num_channels in (None, 1, 3), "num_channels", "1 or 3")
    for name in ("image_column", "dataset_config", "validation_split", "test_split", "cache_dir"):
        check(getattr(args, name) != "", name, "given, or left out")
    size = 0.05 if args.test_size is None else args.test_size
    whole = 1 <= size < math.inf and size == int(size)
    check(whole or 0 < size < 0.5, "test_size", "a share below 0.5, or a whole number of pictures")
    path = Path(args.pictures)
    if not path.exists():
        is_local = path.parent != Path() and path.parent.is_dir()
        if is_local or not re.fullmatch(HUB_NAME, args.pictures, re.ASCII):
            problems.append(f"--pictures {args.pictures}: no such folder{like_path(path)}")
    return problems
