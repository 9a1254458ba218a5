"""scripts/aft/atomic_files.py: a file is the old one or the new one, never a part."""

import csv
import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aft.atomic_files import write_rows, write_whole


@pytest.mark.parametrize("content", ["Zeile für Zeile\n", b"\x00\xff\n"], ids=["text", "bytes"])
def test_content_and_folders(tmp_path, content):
    path = tmp_path / "new" / "file.md"
    for _ in range(2):  # the second replaces the first
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.md"
    write_whole(path, "old")
    write_bytes = Path.write_bytes

    def stop_half_way(self, content):
        write_bytes(self, content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", stop_half_way)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: '.*file.md'") as error:
        write_whole(tmp_path / "file.md", "new")
    assert error.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_rows(tmp_path):
    rows = [{"run": "a, b", "valid": "2.5"}, {"run": 'the "other"', "valid": ""}]
    write_rows(tmp_path / "table.csv", ["run", "valid"], rows)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "file"
    contents = [letter * 200_000 for letter in "abcdefgh"]
    write_whole(path, contents[0])
    found = set()
    with ThreadPoolExecutor(9) as pool:  # threads: as processes in two containers, all have one process id
        writers = [pool.submit(write_whole, path, content) for content in contents * 5]
        while not all(writer.done() for writer in writers):
            found.add(path.read_text())
    assert [writer.exception() for writer in writers] == [None] * 40
    assert found <= set(contents) and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    write_whole(tmp_path / "file.md", "new")
    assert [Path(call).name for call in calls] == [calls[0].rpartition("/")[2], "replace", tmp_path.name]
    assert calls[0].endswith(".tmp")


def test_a_long_name_has_room_for_a_second_one(tmp_path):
    write_whole(tmp_path / ("ä" * 127), "new")
    assert [path.name for path in tmp_path.iterdir()] == ["ä" * 127]
