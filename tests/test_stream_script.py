"""scripts/stream.py: the surprise of lines, marks, what is expected, states, files that grow, and constant memory."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from memory import LargestTensor

from aft import line_surprise
from aft.commands import stream as program
from modeling_aft import ByteTokenizer


ROOT = Path(__file__).resolve().parent.parent
LINES = [
    b"a line of ASCII\n",
    "é, 中, and \U0001f600 of two to four bytes\n".encode(),
    b"\n",
    b"\xff\x00 no UTF-8 \x1b[31m\n",
    b"a long line " * 30 + b"\n",
    b"dos\r\n",
    b"and one without an end",
]
ROW = re.compile(r"([ *]) +(\d+\.\d{3}) +(\d+)  (.*)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Saved models: one without a limit, and one with position tables."""
    folder = tmp_path_factory.mktemp("models")
    for variant in ("conv-nopos", "conv"):
        make_model(variant, dtype=torch.float32).save_pretrained(folder / variant)
        ByteTokenizer().save_pretrained(folder / variant)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").write_bytes(b"".join(LINES))
    return tmp_path / "text"


def rows_of(out: str) -> list[tuple[str, float, int, str]]:
    """Mark, bits per byte, bytes and text of each line of the output."""
    found = (ROW.fullmatch(line) for line in out.splitlines())
    return [(row[1], float(row[2]), int(row[3]), row[4]) for row in found if row]


@torch.no_grad()
def plain_bits(lines: list[bytes]) -> list[float]:
    """The bits of each line, in one forward pass over all of them; the first byte of all has none."""
    ids = torch.tensor([list(b"".join(lines))])
    log_probabilities = make_model("conv-nopos", dtype=torch.float32)(ids).logits[0, :-1].double().log_softmax(-1)
    bits = -log_probabilities.gather(1, ids[0, 1:, None])[:, 0] / math.log(2)
    return [part.sum().item() for part in torch.cat([torch.zeros(1), bits]).split([len(line) for line in lines])]


@pytest.mark.parametrize("at_once", [1, 7, 4096], ids=["byte-by-byte", "parts", "whole"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_each_line_has_its_surprise(folders, text, capsys, monkeypatch, source, at_once):
    monkeypatch.setattr(line_surprise, "AT_ONCE", at_once)
    argv = [str(folders / "conv-nopos"), "--width", "30"]
    with open(text) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        program.main(argv + ([str(text)] if source == "file" else []))
    out = capsys.readouterr().out
    bits, scored = plain_bits(LINES), [len(line) for line in LINES]
    scored[0] -= 1  # nothing comes before the first byte
    rows = rows_of(out)
    assert [row[2] for row in rows] == [len(line) for line in LINES]
    assert [row[1] for row in rows] == pytest.approx([b / n for b, n in zip(bits, scored, strict=True)], abs=2e-3)
    assert [row[3] for row in rows] == [
        "a line of ASCII",
        "é, 中, and \U0001f600 of two to fo",
        "",
        "\N{REPLACEMENT CHARACTER}\\x00 no UTF-8 \\x1b[31m",
        "a long line a long line a long",
        "dos",
        "and one without an end",
    ]
    total = re.search(r"^(\S+) bits per byte, (\d+) bytes scored", out, flags=re.MULTILINE)
    assert float(total[1]) == pytest.approx(sum(bits) / sum(scored), abs=2e-4) and int(total[2]) == sum(scored)


def test_a_character_that_is_cut_off_is_not_shown():
    assert [line_surprise.readable("a\U0001f600".encode()[:length]) for length in range(1, 6)] == ["a"] * 4 + [
        "a\U0001f600"
    ]


def test_marked_lines_are_those_far_above_the_mean_of_all_before(folders, tmp_path, capsys):
    lines = [b"the same line again and again\n"] * 14 + [bytes(range(128, 250)) + b"\n", b"the same line again\n"] * 2
    (tmp_path / "text").write_bytes(b"".join(lines))
    before = []
    program.main([str(folders / "conv-nopos"), str(tmp_path / "text"), "--mark", "0.5"])
    rows = rows_of(capsys.readouterr().out)
    for mark, bits, _, _ in rows:
        values = torch.tensor(before, dtype=torch.float64)
        threshold = values.mean() + 0.5 * values.std(correction=0) if len(before) >= 10 else math.inf
        assert abs(bits - threshold) > 1e-3 and mark == (" *"[bits > threshold])
        before.append(bits)
    assert {mark for mark, *_ in rows} == {" ", "*"}


@pytest.mark.parametrize("refresh", [[], ["--refresh_every", "40", "--refresh_overlap", "8"]], ids=["", "refreshed"])
def test_a_state_goes_on_where_the_file_had_ended(folders, text, tmp_path, capsys, refresh):
    model, state = str(folders / "conv-nopos"), ["--state", str(tmp_path / "state"), "--expect", "9"]
    whole = program.main([model, str(text), *refresh, "--expect", "9"])
    expected = capsys.readouterr().out.splitlines()
    content = text.read_bytes()
    for end in (len(b"".join(LINES[:3])), len(b"".join(LINES[:5])), len(content)):
        text.write_bytes(content[:end])
        stream = program.main([model, str(text), *refresh, *state])
        refresh = []  # the state has it
    out = capsys.readouterr().out
    assert rows_of(out) == [
        (*row[:1], pytest.approx(row[1], abs=2e-3), *row[2:]) for row in rows_of("\n".join(expected))
    ]
    assert out.splitlines()[-1] == expected[-1] and expected[-1].startswith("expected next: ")
    assert stream.num_tokens == whole.num_tokens == len(content)
    assert stream.notes == {key: pytest.approx(value) for key, value in whole.notes.items()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_file_is_followed_until_a_signal(folders, tmp_path, number):
    file, state = tmp_path / "log", tmp_path / "state"
    file.write_bytes(b"first\n")
    command = [sys.executable, "-u", "scripts/stream.py", str(folders / "conv-nopos"), str(file), "--follow"]
    command += ["--state", str(state), "--expect", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline().endswith(" first\n")
        with open(file, "ab") as more:
            more.write(b"second\nthi")
        assert process.stdout.readline().endswith(" second\n")
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline().startswith("expected next: ")
        file.write_bytes(b"new\n")  # shorter: another file of this name
        line = process.stdout.readline()
        assert line.endswith(" thinew\n") and not state.exists()
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "bits per byte, 19 bytes scored" in out and out.splitlines()[-1].startswith("expected next: ")
    assert state.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["log", "state"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_pipe_that_is_silent_can_be_stopped(folders, tmp_path):
    command = [sys.executable, "scripts/stream.py", str(folders / "conv-nopos"), "--state", str(tmp_path / "state")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        process.stdin.write(b"a line\nhalf a")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b" a line\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stdout.readline().endswith(b" half a\n")
    assert (tmp_path / "state").exists()


def test_nothing_to_read_leaves_no_state(folders, tmp_path, capsys):
    (tmp_path / "empty").touch()
    program.main([str(folders / "conv-nopos"), str(tmp_path / "empty"), "--state", str(tmp_path / "state")])
    assert capsys.readouterr().out == "no byte was scored\n" and not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("conv-nopos", "nowhere", "file must be a file or a pipe, got 'nowhere'"),
        ("conv-nopos", "--follow", "--follow must be left out without a file"),
        ("conv-nopos", "--state nowhere/state", "--state must be a file in a folder that is there"),
        ("conv-nopos", "--expect 0 --mark nan", "--expect must be at least 1, got 0; --mark must be a finite number"),
        ("conv-nopos", "--refresh_every 8", "`refresh_overlap` must be given with `refresh_every`"),
        ("conv", "", "`refresh_every` and `refresh_overlap` must be given, got None: the position tables"),
        ("conv-nopos", "--state STATE --refresh_every 8", "--refresh_every must be None as in --state"),
        ("conv", "--state STATE", "must be a cache of a model with position_embedding_type 'learned', not 'none'"),
    ],
    ids=["file", "follow", "folder", "two", "overlap", "tables", "other-refresh", "other-model"],
)
def test_mistakes_are_named(folders, text, tmp_path, model, flags, message):
    state = tmp_path / "state"
    program.main([str(folders / "conv-nopos"), str(text), "--state", str(state)])
    before = state.read_bytes()
    with pytest.raises(ValueError, match=message):
        program.main([str(folders / model), *flags.replace("STATE", str(state)).split()])
    assert state.read_bytes() == before


@pytest.mark.parametrize("content", [b"a line of a text\n", b"\x00"], ids=["lines", "one-long-line"])
def test_memory_does_not_grow_with_the_stream(folders, tmp_path, content, monkeypatch):
    monkeypatch.setattr(line_surprise, "AT_ONCE", 64)
    largest, files = [], []
    for size in (2000, 8000):
        (tmp_path / "text").write_bytes(content * (size // len(content)))
        (tmp_path / "state").unlink(missing_ok=True)
        with LargestTensor() as tensors:
            program.main([str(folders / "conv-nopos"), str(tmp_path / "text"), "--state", str(tmp_path / "state")])
        largest.append(tensors.largest)
        files.append((tmp_path / "state").stat().st_size)
    assert largest[0] == largest[1] and abs(files[0] - files[1]) < 100
