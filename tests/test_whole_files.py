"""scripts/whole_files.py: a file is the old one or the new one, never a part."""

import csv
from pathlib import Path

import pytest
from whole_files import write_rows, write_whole


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


def test_rows(tmp_path):
    rows = [{"run": "a, b", "valid": "2.5"}, {"run": 'the "other"', "valid": ""}]
    write_rows(tmp_path / "table.csv", ["run", "valid"], rows)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
