"""scripts/aft/labelled_tables.py: the file that was named, all of it, as it stands there, and what is wrong."""

import csv
import json
import os
from pathlib import Path

import pytest

from aft.labelled_tables import EncodedRows, describe_labels, encode_table, read_table
from modeling_aft import ByteTokenizer


ODD_TEXTS = [
    *("null", "NaN", "NA", "None", "007", "1.50", "1e5", "-0", "True", "2024-01-02", "2024-01-02 03:04:05"),
    *(
        "12:30",
        "a, b",
        'say "so"',
        " spaces ",
        "two\nlines",
        "two\r\nlines",
        "tab\t",
        "NUL\0",
        "\u4e2d\u6587 caf\u00e9",
    ),
    *("\u2028\u2029\x85\x0b\x1c", "\ufeffinside", "a" * 200_000, "#", "'", "\\n", "{}"),
]


def read(path: Path, **options):
    return read_table(path, "predict_file", "text", "label", with_labels=False, **options)


def write(path: Path, rows: list[dict], encoding: str = "utf-8", ends: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator=ends)
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + ends for row in rows)
    return path


both = pytest.mark.parametrize("suffix", [".csv", ".jsonl"])


@both
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "bom"])
def test_what_stands_there_is_what_is_read(tmp_path, suffix, encoding, ends):
    labels = [f"{number}: {text[:20]}." for number, text in enumerate(ODD_TEXTS)]
    rows = [{"text": text, "other": "x", "label": label} for text, label in zip(ODD_TEXTS, labels, strict=True)]
    table = read(write(tmp_path / f"table{suffix}", rows, encoding, ends))
    assert table.texts == ODD_TEXTS
    assert table.labels == labels


@both
@pytest.mark.parametrize(
    "name",
    [
        *("mails[1]", "mails*", "mails?", "mails{1,2}", "zip://mails::x", "file://mails", "hf:mails", "two words"),
        *(
            "\u043f\u0438\u0441\u044c\u043c\u0430",
            "mails%20",
            "~mails",
            "-mails",
            "mails.gz",
            os.fsdecode(b"mails\xff"),
        ),
    ],
)
def test_the_file_that_is_named_is_read(tmp_path, monkeypatch, name, suffix):
    """A name is no pattern and no address: beside each lies what it would match."""
    monkeypatch.chdir(tmp_path)
    for other in ("mails1", "mails", "x", "mails 20", "mails2"):
        write(tmp_path / f"{other}{suffix}", [{"text": "wrong"}])
    write(Path(f"{name}{suffix}"), [{"text": "right"}])
    assert read(Path(f"{name}{suffix}")).texts == ["right"]


@both
def test_a_new_content_is_read_whatever_the_time_stamp(tmp_path, suffix):
    path, shas = tmp_path / f"table{suffix}", set()
    for text in ("old", "new", "longer"):
        write(path, [{"text": text, "label": "x"}])
        os.utime(path, (1, 1))
        table = read(path)
        assert table.texts == [text]
        shas.add(table.sha256)
    assert len(shas) == 3


@both
def test_a_link_leads_to_its_file(tmp_path, suffix):
    for name in ("first", "second"):
        write(tmp_path / f"{name}{suffix}", [{"text": name}])
        link = tmp_path / f"link{suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{name}{suffix}")
        assert read(link).texts == [name]


@pytest.mark.parametrize(
    "content, texts",
    [
        pytest.param("text,label\n\na,x\n\n", ["a"], id="blank-lines"),
        pytest.param("text,label\ra,x\rb,y\r", ["a", "b"], id="old-mac"),
        pytest.param('"text","label"\n"a ""b""",x', ['a "b"'], id="quoted-without-end"),
        pytest.param("label,extra,text\nx,1\nx,1,b\n", None, id="short-row"),
        pytest.param("x,x,text\n1,2,a\n", ["a"], id="others-twice"),
    ],
)
def test_forms_of_csv(tmp_path, content, texts):
    (tmp_path / "TABLE.CSV").write_text(content, newline="")
    if texts is None:
        with pytest.raises(ValueError, match="'text' must not be empty, got '' in row 1"):
            read(tmp_path / "TABLE.CSV")
    else:
        assert read(tmp_path / "TABLE.CSV").texts == texts


def test_numbers_in_jsonl_are_labels(tmp_path):
    rows = [{"text": "a", "label": 7}, {"text": "b", "label": -12}, {"text": "c", "label": 10**30}]
    assert read(write(tmp_path / "table.jsonl", rows)).labels == ["7", "-12", "1" + "0" * 30]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\nGr\xf6\xdfe,x\n", "must be UTF-8, and byte 0xf6 at position 13 is not"),
        ("a.jsonl", '{"text": "\xe9", "label": "x"}\n', "must be UTF-8, and byte 0xe9 at position 10 is not"),
        ("a.csv", "\xff\xfet\0", "must be UTF-8, and byte 0xff at position 0 is not"),
        ("a.csv", "text,label\na,x,y\nb,z,w\n", "no .csv table with rows: .*Expected 2 fields in line 2, saw 3"),
        ("a.csv", 'text,label\n"a,x\n', "no .csv table with rows: .*EOF inside string"),
        ("a.csv", "text;label\na;x\n", "no column 'text', only 'text;label'; --text_column"),
        ("a.csv", "text, label\na,x\n", "no column 'label', only 'text', ' label'; --label_column"),
        ("a.csv", "text,label,text\na,x,b\n", "column 'text' must be there once, is 2 times"),
        ("a.csv", "text,label,label\na,x,b\n", "column 'label' must be there once, is 2 times"),
        ("a.csv", "\n \n", "no .csv table with rows"),
        ("a.csv", "text,label\n", "no .csv table with rows: there is only the line with the names"),
        ("a.jsonl", "\n\n", "no .jsonl table with rows: there is none"),
        ("a.jsonl", "{}\n", "no .jsonl table with rows: there is none"),
        ("a.jsonl", "[1]\n", "line 1: must be an object, got list"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{\n', "line 2: Expecting property name"),
        ("a.jsonl", '{"text": "a", "label": "x", "text": "b"}\n', "line 1: the key 'text' stands there twice"),
        ("a.jsonl", "[" * 100_000, "no .jsonl table with rows: "),
        ("a.jsonl", '{"text": "a", "label": true}\n', "'label' must have strings or integers, has bool in row 1"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "'label' must have strings or integers, has float64 in row 1"),
        ("a.jsonl", '{"text": ["a"], "label": "x"}\n', "'text' must have strings, has list in row 1"),
        ("a.jsonl", '{"text": "a", "label": 7}\n{"text": "a", "label": "7"}\n', "has both: see row 2"),
        ("a.jsonl", '{"text": "\\ud800", "label": "x"}\n', "'text' must have whole characters, .* in row 1"),
        ("a.csv", "text,label\na, \n", "'label' must not be empty, got ' ' in row 1"),
        ("a.csv", "text,label\na,spam\nb,spam \n", "more than white space, got 'spam' and 'spam '"),
        ("a.csv", "text,label\na,big deal\nb,big  deal\n", "got 'big deal' and 'big  deal'"),
        ("a.csv", "text,label\na,caf\xc3\xa9\nb,cafe\xcc\x81\n", "labels must differ in more than white space"),
        ("a.tsv", "text\tlabel\n", "must end in .csv, .jsonl or .parquet"),
        ("a.parquet", "PAR1", "no .parquet table with rows: "),
        ("a.csv", "", "must have at least one row, is empty"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"--labelled_file {tmp_path / name}: .*{message}"):
        read_table(tmp_path / name, "labelled_file", "text", "label")


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match="--predict_file: (must be a file, got a|no such file)"):
        read(path)


def test_labels_are_listed_and_those_that_look_alike_named():
    line = describe_labels(["spam", "Spam", "ham", "spam"], ["Spam", "ham", "spam"])
    assert line == "labels: Spam (1 rows), ham (1 rows), spam (2 rows); only their case differs in 'Spam' and 'spam'"
    assert "case" not in describe_labels(["a"], ["a", "b"])


@pytest.mark.parametrize("truncation, expected", [("right", [97, 98]), ("left", [98, 99])])
def test_rows_are_encoded_when_they_are_asked_for(tmp_path, truncation, expected):
    table = read(write(tmp_path / "a.csv", [{"text": "abc", "label": "x"}, {"text": "\u00e9", "label": "y"}]))
    rows = encode_table(table, {"y": 0, "x": 1}, ByteTokenizer(), truncation, 2)
    assert isinstance(rows, EncodedRows) and len(rows) == 2
    assert (rows[0]["input_ids"], rows[0]["labels"]) == (expected, 1)
    assert (rows[1]["input_ids"], rows[1]["labels"]) == ([195, 169], 0)
    with pytest.raises(ValueError, match="row 1 has 3 tokens; allowed: 1 to 2"):
        encode_table(table, {"y": 0, "x": 1}, ByteTokenizer(), "none", 2)
    with pytest.raises(ValueError, match=r"unknown label 'y' in row 2; known: \['x'\]"):
        encode_table(table, {"x": 0}, ByteTokenizer(), "none", None)


def test_the_row_that_is_too_long_is_named_by_its_number(tmp_path):
    table = read(write(tmp_path / "a.csv", [{"text": "a" * (3 if row == 2345 else 1)} for row in range(1, 2400)]))
    with pytest.raises(ValueError, match="row 2345 has 3 tokens"):
        encode_table(table, {}, ByteTokenizer(), "none", 2)
