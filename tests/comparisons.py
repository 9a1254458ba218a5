"""Plans of `aft compare` whose runs are trained in this process, for the tests of each command that is compared."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from aft import comparison
from aft.commands.compare import main


def in_this_process(run, command, seconds):
    """In place of `run_process`, without the time in which a new process imports everything."""
    comparison.train(run, command)
    AcceleratorState._reset_state(reset_partial_state=True)
    return True


def no_training(run, command, seconds):
    raise AssertionError(f"{run.folder} must not be trained")


@pytest.fixture(autouse=True)
def without_processes(on_the_cpu, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", in_this_process)


def plan_flags(folder: Path, *more: str, data: bool = True) -> list[str]:
    """The plan in a folder, which gets the runs and the table; with `data` also where evaluate may write."""
    own = [str(folder / "plan.yaml"), "--runs_dir", str(folder / "runs"), "--output_dir", str(folder / "out")]
    return [*own, *(["--cache_dir", str(folder / "cache")] if data else []), *more]


def finish(folder: Path, argv: list[str]) -> Path:
    """The folder with all runs of its plan, for a fixture of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(comparison, "run_process", in_this_process)
        main(argv)
    return folder


def run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / "plan" / f"{name}-seed{seed}"


def table(folder: Path) -> dict[str, dict]:
    with open(folder / "out" / "compare-plan.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def check_that_nothing_is_trained_again(finished: Path, copy: Path, monkeypatch, lose_data: Callable[[Path], None]):
    """Finished runs are skipped, and their table needs no data."""
    monkeypatch.setattr(comparison, "run_process", no_training)
    before = table(finished)
    main(plan_flags(finished))
    assert table(finished) == before
    shutil.copytree(finished, copy)
    lose_data(copy)
    main(plan_flags(copy, "--table_only", data=False))
    assert table(copy) == before


def check_that_changed_entries_are_refused(
    finished: Path,
    copy: Path,
    monkeypatch,
    change: Callable[[Path], None] | None,
    more: list[str],
    message: str,
    flags: Callable[..., list[str]] = plan_flags,
):
    monkeypatch.setattr(comparison, "run_process", no_training)
    shutil.copytree(finished, copy)
    if change is not None:
        change(copy)
    with pytest.raises(ValueError, match=message):
        main(flags(copy, *more, data="--table_only" not in more))
