"""Text that is read as it is needed: its windows, where they go on, and what they need of memory."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_dataset
from stream_memory import main as stream_memory

from aft.streamed_windows import StreamedWindows
from aft.text_sources import DocumentText
from aft.vocabulary import ByteVocabulary


NUMBERS = [chr(0x100 + i) * (i % 7 + 1) for i in range(50)]  # two bytes for each character


class Accelerator(SimpleNamespace):
    """What the windows use of one: which process it is, and hooks."""

    def __init__(self, process_index: int = 0, num_processes: int = 1):
        super().__init__(process_index=process_index, num_processes=num_processes)

    def register_save_state_pre_hook(self, hook) -> None:
        self.save = lambda folder: hook([], [], str(folder))

    def register_load_state_pre_hook(self, hook) -> None:
        self.load = lambda folder: hook([], str(folder))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in NUMBERS))
    return file


def streamed(path: Path, accelerator=None, batch_size=2, micro=1, buffer=0, separated=True, seed=0) -> StreamedWindows:
    stream = load_dataset(
        "json", data_files=[str(path)], split="train", streaming=True, cache_dir=path.parent / "cache"
    )
    text = DocumentText("a", {}, "text", stream=stream, separated=separated)
    accelerator = accelerator or Accelerator()
    return StreamedWindows(text, ByteVocabulary(), 8, batch_size, micro, seed, buffer, accelerator)


def tokens(texts: list[str], separated: bool = True) -> list[int]:
    end = [255] if separated else []
    return [token for text in texts for token in [*text.encode(), *end]]


@pytest.mark.parametrize("separated", [True, False])
def test_windows_are_the_documents_one_after_the_other(path, separated):
    windows = streamed(path, separated=separated)
    expected = tokens(NUMBERS * 3, separated)
    for step in range(2 * len(expected) // 3 // 16):
        inputs, labels = windows.batch(step, range(2))
        assert inputs.dtype == np.int64 and inputs.shape == labels.shape == (2, 8)
        assert inputs.flatten().tolist() == expected[16 * step : 16 * step + 16]
        assert labels.flatten().tolist() == expected[16 * step + 1 : 16 * step + 17]
        assert windows.sizes(step, range(2)).sum() == sum(token != 255 for token in labels.flatten())


def test_rows_may_be_read_again_until_the_next_step(path):
    windows = streamed(path, batch_size=4, micro=2)
    whole = windows.batch(3, range(4))[0]
    assert (windows.batch(3, range(2, 4))[0] == whole[2:]).all()
    windows.batch(4, range(4))
    with pytest.raises(ValueError, match="a stream is read forwards: step 3 comes before 4"):
        windows.batch(3, range(4))


@pytest.mark.parametrize("buffer", [0, 10])
def test_processes_share_the_documents(path, buffer):
    """Each reads its own, in windows of its own rows; together they read each document once an epoch."""
    count = len(tokens(NUMBERS)) // 4
    found = []
    for process in range(2):
        windows = streamed(path, Accelerator(process, 2), batch_size=4, micro=1, buffer=buffer)
        rows = [range(process, process + 1), range(process + 2, process + 3)]
        parts = [windows.batch(step, row)[0] for step in range(count // 16) for row in rows]
        found.append(np.concatenate(parts).flatten().tolist())
    texts = [bytes(part).split(b"\xff")[1:-1] for part in found]
    assert all(texts) and not {*texts[0]} & {*texts[1]}
    if not buffer:
        expected = tokens(NUMBERS[::2])
        assert found[0] == expected[: len(found[0])]


@pytest.mark.parametrize("buffer", [0, 10])
@pytest.mark.parametrize("stop", [1, 4, 13, 40])
def test_a_stream_goes_on_where_it_was_saved(path, tmp_path, buffer, stop):
    accelerator = Accelerator()
    windows = streamed(path, accelerator, buffer=buffer)
    expected = [windows.batch(step, range(2)) for step in range(60)]
    first, second = Accelerator(), Accelerator()
    windows = streamed(path, first, buffer=buffer)
    for step in range(stop + 1):
        windows.batch(step, range(2))
    first.save(tmp_path)
    windows = streamed(path, second, buffer=buffer)
    second.load(tmp_path)
    for step in range(stop, 60):
        for got, wanted in zip(windows.batch(step, range(2)), expected[step], strict=True):
            assert (got == wanted).all()


def test_the_order_is_drawn_anew_each_epoch_by_the_seed(path):
    def order(seed: int) -> list[list[bytes]]:
        windows = streamed(path, buffer=50, seed=seed)
        steps = 3 * len(tokens(NUMBERS)) // 16
        read = bytes(np.concatenate([windows.batch(step, range(2))[0] for step in range(steps)]).flatten().tolist())
        texts = read.split(b"\xff")
        return [texts[start : start + 50] for start in (0, 50)]

    first, second = order(0)
    assert sorted(first) == sorted(second) == sorted(text.encode() for text in NUMBERS)
    assert first != second and order(0) == [first, second] != order(1)


def test_a_stream_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 5)
    with pytest.raises(ValueError, match="--dataset: the stream has no text for each process"):
        streamed(tmp_path / "a.jsonl", separated=False).batch(0, range(2))


def test_memory_does_not_grow_with_what_is_read(tmp_path, capsys):
    rows = stream_memory(["--gigabytes", "0.02", "--csv", str(tmp_path / "rows.csv")])
    assert [row["gigabytes_read"] for row in rows] == pytest.approx(np.linspace(0.002, 0.02, 10), abs=0.01)
    assert rows[-1]["resident_megabytes"] - rows[2]["resident_megabytes"] < 15
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 11
