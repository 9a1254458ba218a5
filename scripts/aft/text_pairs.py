# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pairs of texts, a source and a target: from tables, from data sets of `datasets`, and as token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from aft.data_sets import choose_parts, load_tables
from aft.labelled_tables import check_columns, read_columns


@dataclass
class Pairs:
    """
    Attributes:
        name: the flag and the file, or the data set and its split, with which errors begin.
        sources: texts.
        targets: a text for each; None if there are none.
    """

    name: str
    sources: list[str]
    targets: list[str] | None

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, rows: Sequence[int]) -> "Pairs":
        """Those of some rows."""
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        return Pairs(self.name, [self.sources[row] for row in rows], targets)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in [*self.sources, *(self.targets or ())]:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def read_pairs(inputs) -> dict[str, Pairs]:
    """
    The pairs of `--pairs_file` or `--dataset`, by what they are for: "train" and, where there are such, "validation",
    "test" and, maybe without targets, "predict".

    Raises:
        ValueError: a file or the data set cannot be read, lacks a column, or has no text there.
    """
    columns = {"source": inputs.source_column, "target": inputs.target_column}
    pairs = read_data_set(inputs, columns) if inputs.dataset else {}
    for part, flag_name in (
        ("train", "pairs_file"),
        ("validation", "validation_file"),
        ("test", "test_file"),
        ("predict", "predict_file"),
    ):
        if path := getattr(inputs, flag_name):
            name, _, found = read_columns(Path(path), flag_name, columns, {"target"} if part == "predict" else ())
            pairs[part] = Pairs(name, found["source"], found.get("target"))
    return pairs


def read_data_set(inputs, columns: dict[str, str]) -> dict[str, Pairs]:
    """The pairs of the splits of `--dataset`."""
    name = f"--dataset {inputs.dataset}"
    tables = load_tables(inputs.dataset, inputs.dataset_config, name, "no data set")
    pairs = {}
    for part, split in choose_parts(tables, inputs, name).items():
        where, table = f"{name}, {split}", tables[split].flatten()
        values = {column: table[column][:] for column in columns.values() if column in table.column_names}
        found = check_columns(table.column_names, values, columns, (), where)
        pairs[part] = Pairs(where, found["source"], found["target"])
    return pairs


class EncodedPairs(Dataset):
    """
    Pairs as token ids.

    Args:
        pairs (`Pairs`): the texts themselves, by which what a model writes is scored.
        sources, targets: the token ids of each; no targets if the pairs have none.

    Attributes:
        num_tokens (`int`): of all sources and targets.
    """

    def __init__(self, pairs: Pairs, sources: list[list[int]], targets: list[list[int]] | None):
        self.pairs, self.sources, self.targets = pairs, sources, targets
        self.num_tokens = sum(map(len, [*sources, *(targets or ())]))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        source = self.sources[index]
        row = {"input_ids": source, "attention_mask": [1] * len(source)}
        return row if self.targets is None else {**row, "labels": self.targets[index]}


def encode_pairs(
    pairs: Pairs, tokenizer, prefix: str, truncation: str, limits: tuple[int | None, int | None]
) -> EncodedPairs:
    """
    Pairs as token ids, of which each text ends with the token that ends texts.

    Args:
        tokenizer: puts that token at the end, also of what it truncates.
        prefix: stands before each source.
        truncation: what happens to texts that are too long: "none" (an error) or "right".
        limits: how many tokens a source and a target may have, None for any number.

    Raises:
        ValueError: a text is too long and `truncation` is "none"; names its row.
    """
    encoded = {}
    for role, limit, texts, argument in (
        ("source", limits[0], [prefix + text for text in pairs.sources], "text"),
        ("target", limits[1], pairs.targets, "text_target"),
    ):
        if texts is None:
            continue
        options = {"truncation": True, "max_length": limit} if limit and truncation == "right" else {}
        encoded[role] = []
        for start in range(0, len(texts), 1000):
            rows = tokenizer(**{argument: texts[start : start + 1000]}, **options)["input_ids"]
            for row, ids in enumerate(rows, start + 1):
                if limit and len(ids) > limit:
                    raise ValueError(
                        f"{pairs.name}: the {role} of row {row} has {len(ids)} tokens; allowed: {limit} "
                        f"(--max_{role}_length, at most the length of the tables of the model), or --truncation right"
                    )
            encoded[role] += rows
    return EncodedPairs(pairs, encoded["source"], encoded.get("target"))
