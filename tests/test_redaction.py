"""scripts/aft/redaction.py: no secret of an address and no folder of the machine reaches a log or a card."""

import pytest

from aft.redaction import ROOT, public_address, public_path, readable


@pytest.mark.parametrize(
    "url, public",
    [
        ("http://mattmahoney.net/dc/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"),
        ("https://user:secret@host:8080/a/b.zip?token=secret#secret", "https://host:8080/a/b.zip"),
        ("http://secret@host/b", "http://host/b"),
        ("ftp://user:se@cret@host/b", "ftp://host/b"),
        ("file:///home/secret/enwik8.zip", "file:enwik8.zip"),
        ("file://localhost/home/secret/enwik8.zip", "file:enwik8.zip"),
    ],
)
def test_public_address(url, public):
    assert public_address(url) == public


@pytest.mark.parametrize(
    "path, public",
    [
        ("runs/tiny", "runs/tiny"),
        ("../data/enwik8", "../data/enwik8"),
        ("/home/secret/runs/tiny", "tiny"),
        ("/home/secret/runs/tiny/", "tiny"),
        (ROOT / "runs" / "tiny", "runs/tiny"),
        (ROOT / "configuration" / "training" / ".." / "models" / "a.json", "configuration/models/a.json"),
        ("auto", "auto"),
    ],
)
def test_public_path(path, public):
    assert public_path(path) == public


def test_bytes_of_another_locale_are_readable():
    assert readable("caf\udcc3\udca9 \udcff \u4e2d") == "café \ufffd \u4e2d"
