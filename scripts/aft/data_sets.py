# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Data sets that `datasets` reads, from a folder or the Hub, and which of their splits is for what."""

from pathlib import Path

import datasets

from aft.console import one_line
from aft.flags import did_you_mean, like_path


PARTS = {"validation": ("valid", "validation", "val", "dev"), "test": ("test",)}  # names of splits, and of folders


def load_tables(path: str, config: str | None, name: str, problem: str) -> datasets.DatasetDict:
    """
    The splits of a data set, of which there may be one, train.

    Args:
        path, config: what `datasets.load_dataset` takes, or a folder that `save_to_disk` wrote.
        name: what errors call it.
        problem: what errors say of something that it does not read.

    Raises:
        ValueError: it does not load.
    """
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config)
    except Exception as error:  # of files, columns, servers
        like = "" if folder.exists() else like_path(folder)
        raise ValueError(f"{name}: {problem}: {one_line(error)}{like}") from error
    return found if isinstance(found, dict) else datasets.DatasetDict({"train": found})


def choose_parts(tables: datasets.DatasetDict, inputs, name: str) -> dict[str, str]:
    """
    Which of the splits is "train" and, where there are such, "validation" and "test".

    Args:
        inputs: flags, with `train_split`, `validation_split` and `test_split`.
        name: what errors call the data set.

    Raises:
        ValueError: there is no such split, or an empty one.
    """
    chosen = {"train": inputs.train_split}
    for part, asked in (("validation", inputs.validation_split), ("test", inputs.test_split)):
        known = next((split for split in PARTS[part] if split in tables and split != inputs.train_split), None)
        if split := asked or known:
            chosen[part] = split
    for part, split in chosen.items():
        if split not in tables:
            allowed = f"one of {', '.join(tables)}"
            raise ValueError(
                f"--{part}_split must be {allowed} for {name}, got {split!r}{did_you_mean(split, tables)}"
            )
        if not len(tables[split]):
            raise ValueError(f"{name}: {split} must have at least one row, is empty")
    return chosen
