"""Where text comes from: files of every kind, folders, splits and columns; and what is refused."""

import argparse
import gzip
import json
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from aft.flags import FlagParser
from aft.text_arguments import (
    TextArguments,
    complete_text_arguments,
    flag_words,
    is_one_text,
    text_problems,
)
from aft.text_sources import DocumentText, FileText, load_text


DOCUMENTS = [f"document {i}, é and 中\nits second line" for i in range(40)]


def arguments(cache_dir: Path, *argv) -> argparse.Namespace:
    args = FlagParser("test", "", (TextArguments,)).parse_args([*map(str, argv), "--cache_dir", str(cache_dir)])
    complete_text_arguments(args)
    return args


def text_of(cache_dir: Path, *argv) -> FileText | DocumentText:
    args = arguments(cache_dir, *argv)
    assert text_problems(args) == []
    return load_text(args)


def documents(text: DocumentText, split: str) -> list[str]:
    return [one for texts in text.texts(split) for one in texts]


def everything(text: DocumentText) -> list[str]:
    return [one for split in ("train", "valid", "test") for one in documents(text, split)]


def write_json(path: Path, texts: list[str], column: str = "text") -> None:
    lines = "".join(json.dumps({column: text, "number": i}) + "\n" for i, text in enumerate(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def write_array(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts]))


def write_folder(path: Path, texts: list[str]) -> None:
    for index, text in enumerate(texts):
        file = path / f"part{index % 3}" / f"{index:03}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (path / ".hidden").write_bytes(b"\xff")


def write_parts(path: Path, texts: list[str]) -> None:
    for index in range(4):
        write_json(path / "deep" / f"{index}.jsonl", texts[10 * index : 10 * index + 10])


KINDS = {
    "a.jsonl": write_json,
    "a.jsonl.gz": write_json,
    "a.JSONL": write_json,
    "a.json": write_array,
    "a.parquet": lambda path, texts: Dataset.from_dict({"text": texts}).to_parquet(path),
    "a.csv": lambda path, texts: Dataset.from_dict({"text": texts}).to_csv(path),
    "saved": lambda path, texts: Dataset.from_dict({"text": texts}).save_to_disk(path),
    "folder": write_folder,
    "parts": write_parts,
}


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_path"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path, name, flag):
    KINDS[name](tmp_path / name, DOCUMENTS)
    text = text_of(tmp_path / "cache", flag, tmp_path / name)
    assert text.are_documents and text.name == name and text.hub_dataset is None
    assert sorted(everything(text)) == sorted(DOCUMENTS)
    assert [len(documents(text, split)) for split in ("train", "valid", "test")] == [36, 2, 2]
    if name != "folder":  # which has another order
        reference = tmp_path / "reference.jsonl"
        write_json(reference, DOCUMENTS)
        assert text_of(tmp_path / "cache", "--dataset", reference).sha256 == text.sha256


def test_several_files_are_one_text(tmp_path):
    for index in range(4):
        write_json(tmp_path / f"{index}.jsonl", DOCUMENTS[10 * index : 10 * index + 10])
    paths = sorted(tmp_path.iterdir())
    text = text_of(tmp_path / "cache", "--dataset_path", *paths)
    assert sorted(everything(text)) == sorted(DOCUMENTS)
    assert text.name == "0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl"


def test_one_file_of_another_kind_is_one_text(tmp_path):
    content = bytes(range(256)) * 2
    for name in ("text.txt", "data", "code.py"):
        (tmp_path / name).write_bytes(content)
        text = text_of(tmp_path / "cache", "--dataset", tmp_path / name)
        assert text.content == content and not text.are_documents and text.name == name


def test_sizes(tmp_path):
    write_json(tmp_path / "a.jsonl", DOCUMENTS)
    for size, expected in ((0.1, 4), ("0.25", 10), (1, 1), (7, 7)):
        text = text_of(tmp_path / "cache", "--dataset", tmp_path / "a.jsonl", "--test_size", size)
        assert [len(documents(text, split)) for split in ("train", "valid", "test")] == [
            40 - 2 * expected,
            expected,
            expected,
        ]
        assert sorted(everything(text)) == sorted(DOCUMENTS)


def test_the_share_is_drawn_once_and_for_all(tmp_path):
    write_json(tmp_path / "a.jsonl", DOCUMENTS)
    first, second = (text_of(tmp_path / name, "--dataset", tmp_path / "a.jsonl") for name in ("one", "two"))
    assert documents(first, "test") == documents(second, "test") != DOCUMENTS[-2:]
    assert documents(first, "train") == sorted(documents(first, "train"), key=DOCUMENTS.index)


SPLIT_NAMES = [("validation", "test"), ("valid", "test"), ("dev", None), (None, "test"), (None, None)]


@pytest.mark.parametrize("kind", ["saved", "files", "folders"])
@pytest.mark.parametrize("valid, test", SPLIT_NAMES)
def test_splits_that_have_names(tmp_path, kind, valid, test):
    parts = {"train": DOCUMENTS[:30], valid: DOCUMENTS[30:34], test: DOCUMENTS[34:36]}
    parts.pop(None, None)
    path = tmp_path / "data"
    if kind == "saved":
        DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()}).save_to_disk(path)
    for name, texts in parts.items() if kind != "saved" else ():
        write_json(path / (f"{name}-00001.jsonl" if kind == "files" else f"{name}/00001.jsonl"), texts)
    text = text_of(tmp_path / "cache", "--dataset", path)
    if valid:
        assert documents(text, "valid") == DOCUMENTS[30:34]
    if test:
        assert documents(text, "test") == DOCUMENTS[34:36]
    given = DOCUMENTS[:30] + (DOCUMENTS[30:34] if valid else []) + (DOCUMENTS[34:36] if test else [])
    assert sorted(everything(text)) == sorted(given)
    assert all(documents(text, split) for split in ("train", "valid", "test"))


def test_names_of_files_say_nothing_without_train(tmp_path):
    for index, text in enumerate(DOCUMENTS):
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / f"test_{index:02}.py").write_bytes(text.encode())
    assert len(documents(text_of(tmp_path / "cache", "--dataset", tmp_path / "code"), "train")) == 36


def test_splits_that_are_asked_for(tmp_path):
    parts = {"train": DOCUMENTS[:30], "held": DOCUMENTS[30:34], "other": DOCUMENTS[34:36]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in parts.items()}).save_to_disk(
        tmp_path / "a"
    )
    flags = ("--dataset", tmp_path / "a", "--validation_split", "other", "--test_split", "held")
    text = text_of(tmp_path / "cache", *flags)
    assert [documents(text, split) for split in ("train", "valid", "test")] == [
        DOCUMENTS[:30],
        DOCUMENTS[34:36],
        DOCUMENTS[30:34],
    ]


def test_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    write_json(path, DOCUMENTS, "body")
    assert sorted(everything(text_of(tmp_path / "cache", "--dataset", path))) == sorted(DOCUMENTS)
    rows = [{"title": "t", "body": text, "number": 1} for text in DOCUMENTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = text_of(tmp_path / "cache", "--dataset", path, "--text_column", "body")
    assert sorted(everything(text)) == sorted(DOCUMENTS)
    for asked in ((), ("--text_column", "number"), ("--text_column", "bodi")):
        with pytest.raises(ValueError, match=r"--text_column must be one of the columns of strings \(title, body\)"):
            text_of(tmp_path / "cache", "--dataset", path, *asked)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_a_row_without_text_is_named(tmp_path, streaming):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    path.write_text("\n".join([*lines[:3], '{"text": null}', *lines[3:]]))
    with pytest.raises(ValueError, match="--dataset: row 3 of .* must have a text, got None"):
        text = text_of(
            tmp_path / "cache", "--dataset", path, *(("--streaming", "--test_size", "9") if streaming else ())
        )
        list(text.training_texts())


BROKEN = {
    "a.jsonl": b'{"text": "a"}\n{"text": ',
    "a.parquet": b"PAR1 and nothing",
    "a.json": b"[1, 2",
    "a.jsonl.gz": b"\x1f\x8b\x08 and no more",
    "empty.jsonl": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=f"--dataset_path .*{name}: "):
        text_of(tmp_path / "cache", "--dataset", tmp_path / name)


def test_files_of_several_kinds_are_refused(tmp_path):
    write_json(tmp_path / "data" / "a.jsonl", DOCUMENTS)
    (tmp_path / "data" / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match="must be files of one kind, got json: .*a.jsonl; text: .*readme.txt"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: must have files in it, and has none"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "empty")


def test_a_file_that_is_no_text_is_named(tmp_path):
    write_folder(tmp_path / "data", DOCUMENTS)
    (tmp_path / "data" / "part0" / "bad.md").write_bytes(b"good\xffbad")
    with pytest.raises(ValueError, match="bad.md: must be text in UTF-8, and is not at byte 4"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "data")


def test_too_few_documents_are_refused(tmp_path):
    write_json(tmp_path / "a.jsonl", DOCUMENTS[:2])
    with pytest.raises(ValueError, match="--test_size must leave documents for train: it has 2, got 0.05"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="--test_size must be at most the documents of the stream, got 2 for test"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "a.jsonl", "--streaming", "--test_size", "2")


WRONG = {
    "enwki8": (["--dataset", "enwki8"], "got 'enwki8'; did you mean enwik8?"),
    "no-text": (["--dataset", "nots.txt"], "--dataset nots.txt: no such file or folder"),
    "no-table": (["--dataset", "nowhere/texts.parquet"], "--dataset nowhere/texts.parquet: no such file or folder"),
    "no-folder": (["--dataset", "./nowhere/a.jsonl"], "--dataset ./nowhere/a.jsonl: no such file or folder"),
    "like": (["--dataset", "data/thta.jsonl"], "no such file or folder; did you mean data/that.jsonl"),
    "no-path": (["--dataset_path", "nowhere"], "--dataset_path: no such file: nowhere"),
    "file": (["--dataset", "file"], "--dataset_path must be given with --dataset file"),
    "pydoc-path": (["--dataset", "pydoc", "--dataset_path", "a"], "left out with --dataset pydoc"),
    "hub-path": (["--dataset", "me/data", "--dataset_path", "a"], "left out with --dataset me/data"),
    "config": (["--dataset_config", "en"], "left out without a data set on the Hub, got 'en'"),
    "url": (["--dataset_url", "http://a"], "left out without --dataset enwik8"),
    "column-of-text": (["--dataset", "text", "--text_column", "a"], "the text is one file, not a table, got 'a'"),
    "split-of-text": (["--dataset", "text", "--test_split", "a"], "the text is one file, not a table, got 'a'"),
    "size-of-text": (["--dataset", "text", "--test_size", "0.1"], "valid and test are the last 5% each, got 0.1"),
    "half": (
        ["--dataset", "data", "--test_size", "0.5"],
        "a share below 0.5, or a whole number of documents",
    ),
    "none": (["--dataset", "data", "--test_size", "0"], "or a whole number of documents, got 0.0"),
    "parts": (["--dataset", "data", "--test_size", "1.5"], "or a whole number of documents, got 1.5"),
    "nan": (["--dataset", "data", "--test_size", "nan"], "or a whole number of documents, got nan"),
    "infinite": (["--dataset", "data", "--test_size", "inf"], "or a whole number of documents, got inf"),
    "share-of-stream": (
        ["--dataset", "data", "--streaming", "--test_size", "0.1"],
        "whole number of documents, got 0.1",
    ),
    "stream-of-pydoc": (["--streaming"], "--streaming must be left out with --dataset pydoc, got True"),
    "empty": (["--dataset", "data", "--text_column", ""], "--text_column must be given, or left out, got ''"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "data" / "that.jsonl", DOCUMENTS)
    (tmp_path / "text").write_bytes(b"text" * 100)
    argv, message = WRONG[case]
    problems = text_problems(arguments(tmp_path / "cache", *argv))
    assert any(message in problem for problem in problems), problems


def test_a_split_that_is_not_there_is_named(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": DOCUMENTS})}).save_to_disk(tmp_path / "a")
    for name in ("held", "train"):
        with pytest.raises(ValueError, match=rf"--test_split must be a split beside train \(train\), got '{name}'"):
            text_of(tmp_path / "cache", "--dataset", tmp_path / "a", "--test_split", name)
    DatasetDict({"other": Dataset.from_dict({"text": DOCUMENTS})}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="--dataset must have a split train, got other"):
        text_of(tmp_path / "cache", "--dataset", tmp_path / "b")


def test_the_flags_of_a_text_name_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "a.jsonl", DOCUMENTS, "body")
    args = arguments(tmp_path / "cache", "--dataset", "a.jsonl", "--text_column", "body", "--test_size", "3")
    words = flag_words(args, TextArguments)
    assert words == ["--dataset_path", "a.jsonl", "--text_column", "body", "--test_size", "3"]
    again = arguments(tmp_path / "cache", *words)
    assert all(getattr(again, entry.name) == getattr(args, entry.name) for entry in fields(TextArguments))
    assert flag_words(arguments(tmp_path / "cache"), TextArguments) == []


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a", "a.TXT", "a.gz", "a.jsonl", "a.parquet"])
def test_which_file_is_one_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"text")
    assert is_one_text(arguments(tmp_path, "--dataset", tmp_path / name)) == (
        "jsonl" not in name and "par" not in name
    )
