"""The tokens of a text: exact, memory-mapped, found again by content, and written again when they are damaged."""

import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from datasets import Dataset

from aft.raw_files import ENWIK8
from aft.text_sources import DocumentText, FileText, split_ranges
from aft.token_data import TokenData, dtype_for, token_data
from aft.vocabulary import ByteVocabulary, TokenizerVocabulary, train_bpe


def random_bytes(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(256, size=length, dtype=np.uint8).tobytes()


CONTENT = bytes(range(256)) * 5 + random_bytes(1000)
WORDS = "the cat and the dog sat on a mat; né 中文 😀 ".split(" ")
DOCUMENTS = [" ".join(np.random.default_rng(i).choice(WORDS, 30)) for i in range(40)] + ["", "x"]


def of_bytes(content: bytes, cache_dir) -> TokenData:
    return token_data(FileText("text", content), ByteVocabulary(), cache_dir)


def documents() -> DocumentText:
    parts = {"train": DOCUMENTS[:30], "valid": DOCUMENTS[30:36], "test": DOCUMENTS[36:]}
    return DocumentText(
        "documents", {split: Dataset.from_dict({"text": texts}) for split, texts in parts.items()}, "text"
    )


def bpe() -> TokenizerVocabulary:
    return TokenizerVocabulary(train_bpe([DOCUMENTS], 280), "--tokenizer bpe")


VOCABULARIES = {"bytes": ByteVocabulary, "bpe": bpe}


@pytest.mark.parametrize("length", [100, 4095, 4096, 4097])
def test_bytes_are_exact(tmp_path, length):
    content = (bytes(range(256)) + random_bytes(length))[:length]
    data = of_bytes(content, tmp_path)
    assert data.ids.tobytes() == content and data.read(7, 19).tobytes() == content[7:19]
    assert data.splits == split_ranges(length) and sum(data.num_bytes.values()) == length
    assert data.sha256 == hashlib.sha256(content).hexdigest()
    assert data.read_sizes(3, 9).tolist() == [1] * 6


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_documents_end_with_a_token_that_stands_for_no_byte(tmp_path, kind):
    vocabulary, text = VOCABULARIES[kind](), documents()
    data = token_data(text, vocabulary, tmp_path)
    assert data.ids[0] == vocabulary.end and data.splits["train"][0] == 0
    for split, expected in text.splits.items():
        start, stop = data.splits[split]
        ids = data.read(start, stop)[split == "train" :]
        ends = np.flatnonzero(ids == vocabulary.end)
        assert ends[-1] == len(ids) - 1
        found = [vocabulary.decode(part[part != vocabulary.end]).decode() for part in np.split(ids, ends + 1)[:-1]]
        assert found == expected["text"][:]
        sizes = data.read_sizes(start, stop)
        assert sizes.sum() == data.num_bytes[split] == sum(len(one.encode()) for one in found)
        assert (sizes[split == "train" :][ends] == 0).all()


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_first_bytes_of_a_split(tmp_path, kind):
    data = token_data(documents(), VOCABULARIES[kind](), tmp_path)
    start, stop = data.first_bytes("valid", 100)
    assert start == data.splits["valid"][0]
    assert data.read_sizes(start, stop).sum() >= 100 > data.read_sizes(start, stop - 1).sum()
    assert data.first_bytes("valid", 0) == data.first_bytes("valid", 10**9) == data.splits["valid"]


def test_one_text_is_cut_between_characters(tmp_path):
    text = FileText("text", ("é" * 501 + "中" * 33).encode())
    data = token_data(text, bpe(), tmp_path)
    whole = [bpe().decode(data.read(*data.splits[split])).decode() for split in ("train", "valid", "test")]
    assert "".join(whole) == "é" * 501 + "中" * 33 and all(whole)
    assert [len(part.encode()) for part in whole] == list(data.num_bytes.values())


def test_a_text_of_many_pieces_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("aft.text_sources.PIECE", 50)
    content = "\n".join(DOCUMENTS)
    data = token_data(FileText("text", content.encode()), bpe(), tmp_path)
    assert bpe().decode(data.ids).decode() == content
    assert data.sizes.sum() == len(content.encode())


def test_no_utf8_is_refused_for_a_tokenizer_and_fine_for_bytes(tmp_path):
    content = b"a" * 150 + b"\xff" + b"a" * 150
    with pytest.raises(ValueError, match="UTF-8 for a tokenizer, and has byte 0xff at 150; --tokenizer bytes"):
        token_data(FileText("text", content), bpe(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert of_bytes(content, tmp_path).ids.tobytes() == content


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_take_the_least_room(size, dtype):
    assert np.dtype(dtype_for(size)) == dtype


def test_copy_is_memory_mapped_and_found_by_content(tmp_path):
    first = of_bytes(CONTENT, tmp_path)
    (folder,) = tmp_path.iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert isinstance(first.ids, np.memmap)
    assert of_bytes(CONTENT, tmp_path).ids.tobytes() == CONTENT
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    of_bytes(CONTENT[::-1], tmp_path)
    token_data(documents(), bpe(), tmp_path)
    token_data(documents(), ByteVocabulary(), tmp_path)
    token_data(documents(), bpe(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_several_writers_agree(tmp_path):
    content = random_bytes(80_000)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: of_bytes(content, tmp_path), range(4)))
    assert all(copy.ids.tobytes() == content for copy in copies)
    assert len(list(tmp_path.iterdir())) == 1


def change(path, index: int, new: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(index)
        file.write(new)


DAMAGES = {
    "ten-bytes": lambda folder: change(folder / "ids.bin", 50, b"ten bytes!"),
    "every-byte": lambda folder: (folder / "ids.bin").write_bytes(bytes((folder / "ids.bin").stat().st_size)),
    "truncated": lambda folder: os.truncate(folder / "ids.bin", 1000),
    "empty": lambda folder: os.truncate(folder / "ids.bin", 0),
    "no-ids": lambda folder: os.remove(folder / "ids.bin"),
    "no-facts": lambda folder: os.remove(folder / "tokens.json"),
    "facts": lambda folder: (folder / "tokens.json").write_text('{"dtype": 1}'),
    "facts-no-text": lambda folder: (folder / "tokens.json").write_bytes(b"\xff"),
    "empty-folder": lambda folder: [os.remove(path) for path in folder.iterdir()],
    "file": lambda folder: (shutil.rmtree(folder), folder.touch()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copy_is_written_again(tmp_path, damage, capsys):
    of_bytes(CONTENT, tmp_path)
    (folder,) = tmp_path.iterdir()
    DAMAGES[damage](folder)
    assert of_bytes(CONTENT, tmp_path).ids.tobytes() == CONTENT
    assert list(tmp_path.iterdir()) == [folder] and f"{folder}: damaged" in capsys.readouterr().err
    of_bytes(CONTENT, tmp_path)
    assert capsys.readouterr().err == ""


def test_several_writers_repair_a_copy(tmp_path):
    content = random_bytes(80_000)
    for damage in ("truncated", "no-ids", "facts"):
        of_bytes(content, tmp_path)
        DAMAGES[damage](next(tmp_path.iterdir()))
        with ThreadPoolExecutor(4) as pool:
            copies = list(pool.map(lambda _: of_bytes(content, tmp_path), range(4)))
        assert all(copy.ids.tobytes() == content for copy in copies)
        assert len(list(tmp_path.iterdir())) == 1


def test_a_copy_that_another_has_moved_away_is_written(tmp_path, monkeypatch):
    rename, calls = os.rename, []

    def fail_first(old, new):
        calls.append(new)
        if len(calls) == 1:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rename(old, new)

    monkeypatch.setattr("os.rename", fail_first)
    assert of_bytes(CONTENT, tmp_path).ids.tobytes() == CONTENT and len(calls) == 2


def test_copy_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, before, rename = [], [], os.rename
    monkeypatch.setattr("aft.atomic_files.sync", lambda path: synced.append(path.name))
    monkeypatch.setattr("os.rename", lambda old, new: (before.append({*synced}), rename(old, new)))
    of_bytes(CONTENT, tmp_path)
    assert before == [{"ids.bin", "tokens.json", "new"}]
    assert synced[-1] == tmp_path.name


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--cache_dir .*file: the data cannot be written there"):
        of_bytes(CONTENT, tmp_path / "file")


def test_too_few_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 100 bytes, got 99"):
        of_bytes(bytes(99), tmp_path)


def test_splits():
    splits = split_ranges(ENWIK8.size)
    assert splits == {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}
    assert split_ranges(101) == {"train": (0, 90), "valid": (90, 95), "test": (95, 101)}
