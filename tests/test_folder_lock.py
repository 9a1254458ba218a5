"""scripts/aft/folder_lock.py: one run per folder, and no lock outlives its process."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from aft.folder_lock import HOLDER, locked


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
HOLD = """
import pathlib, sys, time
from aft.folder_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_holder_is_named(tmp_path, other):
    message = (
        rf"--output_dir .*run is in use by process {other.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    )
    with pytest.raises(ValueError, match=message), locked(tmp_path / "run"):
        raise AssertionError("never held")
    assert other.poll() is None and (tmp_path / "run" / HOLDER).is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_lock_of_a_dead_process_is_free(tmp_path, other, number):
    other.send_signal(number)
    other.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["process"] == os.getpid()


def test_inactive_process_does_not_lock(tmp_path, other):
    with locked(tmp_path / "run", active=False), locked(tmp_path / "new", active=False):
        assert not (tmp_path / "new").exists()


def test_one_of_several_gets_the_folder(tmp_path):
    barrier = Barrier(6, timeout=30)

    def run(_) -> bool:
        barrier.wait()
        try:
            with locked(tmp_path / "run"):
                barrier.wait()  # until all others have tried
            return True
        except ValueError:
            barrier.wait()
            return False

    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            assert sum(pool.map(run, range(6))) == 1


def test_one_thread_does_not_lock_twice(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="in use"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 1}'], ids=["empty", "part", "list", "field"])
def test_unreadable_holder_is_no_crash(tmp_path, content):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / HOLDER).write_text(content)
        with pytest.raises(ValueError, match="in use by another process"), locked(tmp_path / "run"):
            pass


def test_failed_run_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError("No space left on device")

    monkeypatch.setattr("aft.folder_lock.write_whole", full)
    with pytest.raises(OSError, match="No space"), locked(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False], ids=["folder-was-there", "file-was-left"])
def test_what_was_there_stays(tmp_path, before):
    folder = tmp_path / "run"
    if before:
        folder.mkdir()
    with locked(folder):
        if not before:
            (folder / "run.jsonl").touch()
    assert {path.name for path in folder.iterdir()} == (set() if before else {"run.jsonl"})


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_is_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir must be a folder.*file"), locked(tmp_path / name):
        pass
