# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What `aft compare` knows of the commands whose runs it compares."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from aft.compare_plan import COMMANDS
from aft.settings_files import read_json


ENTRY = "entry.json"  # of a run: what decides its result
RESULT = "result.json"  # whose presence means that the run is complete


class Program(ABC):
    """
    A command whose runs are compared: what decides the result of a run, how it is trained, and what it is told by.

    Attributes:
        amount: column of what a run has read, the same for all seeds, and of its curve.
        held_out: what the score is called that everything is chosen by.
        form: how a score is printed.
        best: of several scores, the best one.
        note: sentence on the scores, for the table.
        counts: columns that all seeds of a run have in common, and how each is printed.
        more_scores: columns of scores beside `valid` and `test`, and how each is printed.
        with_spread: those of scores of which the deviation over the seeds is told, too.
        more_speeds: columns of other speeds, in tokens or whatever they say per second.
    """

    amount: str
    held_out: str
    form: str
    note: str
    counts: dict[str, str]
    more_scores: Mapping[str, str] = MappingProxyType({})
    with_spread: tuple[str, ...] = ("valid", "test")
    more_speeds: tuple[str, ...] = ()

    @staticmethod
    @abstractmethod
    def best(scores: list[float]) -> float: ...

    @property
    def speed(self) -> str:
        """Column of how much is read in a second."""
        return f"{self.amount}_per_second"

    @abstractmethod
    def score(self, rows: list[dict]) -> str:
        """What the scores of the rows of a table are called, which have all one kind of data."""

    # Entries

    @abstractmethod
    def describe(self, flags: list[str], whole: bool) -> dict:
        """
        What decides the result of a run, as `json` takes it: `model_config`, and if `whole` arguments and data.

        Raises:
            ValueError: a flag, the model or the data is wrong.
        """

    def read_entry(self, folder: Path) -> dict:
        """The entry of a run that is there."""
        return read_json(folder / ENTRY, "run")

    def known_keys(self, entries: list[dict]) -> set[str]:
        """What must be the same for entries to be the same."""
        return set().union(*entries)

    # Runs

    @abstractmethod
    def train(self, flags: list[str]) -> None:
        """Trains a run, or what is left of it, and scores it."""

    @abstractmethod
    def has_trained(self, folder: Path) -> bool:
        """Whether the last `train` has made steps, and not only scored."""

    def facts(self, flags: list[str]) -> dict:
        """What a run does not leave by itself, for its result file."""
        return {}

    @abstractmethod
    def read_run(self, folder: Path) -> dict:
        """
        One finished run.

        Returns:
            `dict`: values of the columns of the table for its one seed, and `curve`, float [evaluations, 2]: the
            amount that was read, and the score on what is held out.
        """


def find_program(command: str) -> Program:
    """That of a command of `aft`, whose libraries are only loaded now."""
    return pkgutil.resolve_name(COMMANDS[command].program)()
