# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Builds pairs of texts for encoder-decoders: a folder of train.jsonl, valid.jsonl, test.jsonl and sources.json.

    python scripts/build_pairs.py --task translation --language de --output_dir runs/en-de
    python scripts/build_pairs.py --task summarization --output_dir runs/synopses
    python scripts/build_pairs.py --task sort --count 20000 --length 12 --output_dir runs/sort

Of what Debian's packages say of themselves, which apt fetches into a folder of its own, or --lists_dir has:

    translation    columns en and that of --language: synopses and paragraphs, and their translations
    summarization  document and summary: all paragraphs, and the synopsis
    sections       text and label: synopsis and paragraphs, and the section of the archive

A source package is in one split alone, with all that has its name up to digits (gcc-11, gcc-12): a hash of that name
says in which. Of pairs that stand in a split twice one is left out, and from valid and test those whose source text
stands in an earlier split. --longest leaves out pairs with a text of more characters, in all splits. A text is a line,
or of several paragraphs a line each. sources.json has the sums of the files that were read and how much was left out.
The texts are under the licences of their packages: nothing of them comes with this repository.

Of random letters, with spaces between them:

    copy, reverse, sort  columns source and target: one to --length letters, no two strings the same
"""

import argparse
import hashlib
import json
import random
import re
import shlex
import string
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from aft.atomic_files import check_new_folder, new_folder
from aft.console import run_program
from aft.package_descriptions import Description, fetch_indexes, read_descriptions


HELD_BACK = 0.05  # the share of names in valid, and that in test
SPLITS = ("train", "valid", "test")
SYNTHETIC = {"copy": list, "reverse": lambda letters: letters[::-1], "sort": sorted}
DEFAULTS = {"count": 10_000, "length": 20, "seed": 0}  # of synthetic strings


def pair_translations(of: Description) -> list[tuple[str, str]]:
    """Synopsis and paragraphs with those of the translation; none where their numbers differ."""
    translated = of.translated or []
    return list(zip(of.english, translated, strict=True)) if len(translated) == len(of.english) else []


def pair_summary(of: Description) -> list[tuple[str, str]]:
    """The paragraphs with the synopsis; none where there is a synopsis alone."""
    synopsis, *paragraphs = of.english
    return [("\n".join(paragraphs), synopsis)] if paragraphs else []


def pair_section(of: Description) -> list[tuple[str, str]]:
    """Synopsis and paragraphs with the section; none where a package has no section."""
    return [("\n".join(of.english), of.section)] if of.section else []


DESCRIBED = {"translation": pair_translations, "summarization": pair_summary, "sections": pair_section}
COLUMNS = {"summarization": ("document", "summary"), "sections": ("text", "label")}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed, or that the task would not read.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*DESCRIBED, *SYNTHETIC], required=True, help="what the pairs are")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the files, new or empty")
    parser.add_argument("--language", help="of translations, as apt names it: de, fr, it, pt_BR, ...")
    parser.add_argument(
        "--lists_dir", type=Path, help="folder of index files as apt keeps them, instead of the network"
    )
    parser.add_argument(
        "--longest", type=int, help="characters of a text of a description; pairs with a longer one are left out"
    )
    parser.add_argument("--count", type=int, help=f"strings in all three splits (default: {DEFAULTS['count']})")
    parser.add_argument("--length", type=int, help=f"letters of the longest (default: {DEFAULTS['length']})")
    parser.add_argument("--seed", type=int, help=f"of the strings (default: {DEFAULTS['seed']})")
    args = parser.parse_args(argv)
    is_synthetic, translates = args.task in SYNTHETIC, args.task == "translation"
    unread = ["language"] * (not translates) + (["lists_dir", "longest"] if is_synthetic else [*DEFAULTS])
    problems = [
        f"--{name} must not be given with --task {args.task}, got {getattr(args, name)}"
        for name in unread
        if getattr(args, name) is not None
    ]
    if translates and (args.language == "en" or not re.fullmatch("[a-z]{2,3}(_[A-Z]{2})?", args.language or "")):
        problems.append(f"--language must be one other than en, e.g. de or pt_BR, got {args.language}")
    if args.lists_dir is not None and not args.lists_dir.is_dir():
        problems.append(f"--lists_dir must be a folder, got {args.lists_dir}")
    if args.longest is not None and args.longest < 1:
        problems.append(f"--longest must be at least 1, got {args.longest}")
    if is_synthetic:
        for name, value in DEFAULTS.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        problems += [
            f"--{name} must be at least {least}, got {getattr(args, name)}"
            for name, least in (("count", 1), ("length", 1), ("seed", 0))
            if getattr(args, name) < least
        ]
        most = len(string.ascii_lowercase) ** max(args.length, 1) // 2
        if args.count > most:
            problems.append(
                f"--count must be at most {most} with --length {args.length}, half of all strings, got {args.count}"
            )
    if problems:
        raise ValueError("; ".join(problems))
    check_new_folder(args.output_dir, "--output_dir")
    return args


def draw_pairs(task: str, count: int, length: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Different random strings, of every length as likely, with what the task makes of them; each is its own group."""
    generator, drawn = random.Random(seed), {}
    while len(drawn) < count:
        letters = generator.choices(string.ascii_lowercase, k=generator.randint(1, length))
        drawn[" ".join(letters)] = " ".join(SYNTHETIC[task](letters))
    return ((source, source, target) for source, target in drawn.items())


def hash_of(text: str) -> int:
    """64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def choose_split(group: str) -> str:
    """The split that all pairs of a group are in."""
    share = hash_of(group) / 2**64
    return "test" if share < HELD_BACK else "valid" if share < 2 * HELD_BACK else "train"


def split_pairs(pairs: Iterable[tuple[str, str, str]]) -> tuple[dict[str, list[tuple[str, str]]], dict[str, dict]]:
    """
    Pairs by split, each once, without those of valid and test whose source stands in an earlier split.

    Args:
        pairs: of each its group, source and target.

    Returns:
        The pairs, in an order that says nothing of them, and the numbers of those that are there and left out.
    """
    splits, counts, earlier = {name: [] for name in SPLITS}, {}, set()
    for group, *pair in pairs:
        splits[choose_split(group)].append(tuple(pair))
    for name, found in splits.items():
        different = set(found)
        kept = [pair for pair in different if pair[0] not in earlier]
        counts[name] = {
            "pairs": len(kept),
            "left_out_as_duplicates": len(found) - len(different),
            "left_out_as_in_an_earlier_split": len(different) - len(kept),
        }
        earlier.update(source for source, _ in kept)
        splits[name] = sorted(kept, key=lambda pair: (hash_of("\n".join(pair)), pair))
    return splits, counts


def describe(args: argparse.Namespace) -> tuple[list[tuple[str, str, str]], dict]:
    """The pairs of a task of descriptions, and what is to be known of their origin."""
    languages = ["en", args.language] if args.language else ["en"]
    with tempfile.TemporaryDirectory(prefix="build-pairs-") as temporary:
        folder = args.lists_dir or fetch_indexes(Path(temporary), languages)
        found, sums = read_descriptions(folder, languages)
    origin = {"md5_of_indexes": sums, "descriptions": len(found)}
    if args.language:
        translated = [one for one in found if one.translated is not None]
        unequal = sum(len(one.translated) != len(one.english) for one in translated)
        origin |= {"translated": len(translated), "left_out_as_of_unequal_paragraphs": unequal}
    pair = DESCRIBED[args.task]
    pairs = [(re.sub(r"[\d.]+", "", one.source), *texts) for one in found for texts in pair(one) if all(texts)]
    if args.longest is not None:
        short = [one for one in pairs if max(map(len, one[1:])) <= args.longest]
        origin |= {"left_out_as_longer": len(pairs) - len(short)}
        pairs = short
    return pairs, origin


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """
    Builds the files; returns how many pairs each split has and what was left out.

    Raises:
        ValueError: a flag is wrong, the indexes cannot be had, or a split would be empty; nothing is written then.
    """
    args = parse_arguments(argv)
    if args.task in SYNTHETIC:
        pairs, origin = draw_pairs(args.task, args.count, args.length, args.seed), {}
        columns = "source", "target"
    else:
        pairs, origin = describe(args)
        columns = COLUMNS.get(args.task, ("en", args.language))
    splits, counts = split_pairs(pairs)
    if empty := [name for name in SPLITS if not splits[name]]:
        raise ValueError(f"--task {args.task}: there are too few pairs, {', '.join(empty)} would be empty")
    command = shlex.join(["python", "scripts/build_pairs.py", *(sys.argv[1:] if argv is None else argv)])
    with new_folder(args.output_dir, replace=True) as folder:  # an empty one gives way
        for name, found in splits.items():
            rows = (json.dumps(dict(zip(columns, pair, strict=True)), ensure_ascii=False) + "\n" for pair in found)
            (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        sources = json.dumps({"command": command, **origin, "splits": counts}, indent=2)
        (folder / "sources.json").write_text(sources + "\n", encoding="utf-8")
    for name, numbers in counts.items():
        print(f"{name}: " + ", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in numbers.items()))
    print(f"wrote {args.output_dir}")
    return counts


if __name__ == "__main__":
    run_program(main)
