"""scripts/aft/console.py: programs print any text anywhere, and end with one line on a mistake of their users."""

import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from aft.console import WAITING, any_text, one_line, run_program


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TEXT = "café, 中, 🙂, \ufffd and \udcff"  # the last is what Python makes of a byte in a path that is not UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_any_text_is_printed(monkeypatch, encoding, errors):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    with any_text():
        print(TEXT)
    stream.flush()
    assert stream.buffer.getvalue() == (TEXT + "\n").encode(encoding, "backslashreplace")
    assert stream.errors == errors  # whoever calls a program from Python finds the stream as it was


@pytest.mark.parametrize("stream", [io.StringIO(), None], ids=["StringIO", "no-stdout"])
def test_other_streams_are_left_alone(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    with any_text():
        print(TEXT)
    assert stream is None or stream.getvalue() == TEXT + "\n"


def test_chosen_error_handler_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="ignore")
    monkeypatch.setattr(sys, "stdout", stream)
    any_text()(print)("é!", flush=True)
    assert stream.buffer.getvalue() == b"!\n"


def test_message_is_one_line():
    assert one_line(ValueError("first\n  second\n")) == "first second"
    assert one_line(MemoryError()) == "MemoryError"


def program(body: str, *, stdout=subprocess.PIPE, options: tuple = (), **environment) -> subprocess.CompletedProcess:
    """A process whose main is the function that `body` defines."""
    code = f"import sys\nfrom aft.console import run_program\n{body}\nrun_program(main)"
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONUNBUFFERED": "", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
    )


def test_processes_part_before_python_ends(tmp_path):
    body = f"""
import atexit
import torch.distributed as dist
def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path / "group"}", world_size=1, rank=0)
    atexit.register(lambda: print(dist.is_initialized()))
"""
    result = program(body)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"False\n", b"")


MEMORY = "DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "body, status, line",
    [
        pytest.param("return {'result': 1}", 0, "", id="result"),
        pytest.param("raise ValueError('--seed must\\n be 0')", 1, "error: --seed must be 0\n", id="value"),
        pytest.param("open('/no')", 1, "error: [Errno 2] No such file or directory: '/no'\n", id="file"),
        pytest.param("raise FloatingPointError('the loss is nan')", 1, "error: the loss is nan\n", id="diverged"),
        pytest.param("raise MemoryError", 1, "error: MemoryError\n", id="memory"),
        pytest.param(f"raise RuntimeError({MEMORY!r})", 1, f"error: {MEMORY}\n", id="memory-of-torch"),
        pytest.param("import torch; raise torch.OutOfMemoryError('CUDA')", 1, "error: CUDA\n", id="memory-of-cuda"),
        pytest.param("raise KeyboardInterrupt", 130, "interrupted\n", id="interrupt"),
        pytest.param("sys.exit(2)", 2, "", id="exit-2"),
        pytest.param("sys.exit()", 0, "", id="exit"),
        pytest.param("raise ValueError('\u4e2d')", 1, "error: \\u4e2d\n", id="unprintable"),
    ],
)
def test_mistake_ends_with_one_line(body, status, line):
    result = program(f"def main(): {body}", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr.decode()) == (status, line)


@pytest.mark.parametrize("kind", ["KeyError", "RuntimeError", "AssertionError"])
def test_error_of_the_program_has_a_traceback(kind):
    result = program(f"def main(): raise {kind}(1)")
    assert result.returncode == 1 and b"Traceback" in result.stderr


def test_developer_mode_shows_every_traceback():
    result = program("def main(): raise ValueError(1)", options=("-X", "dev"))
    assert result.returncode == 1 and b"Traceback" in result.stderr


@pytest.mark.parametrize("size", [10, 10**6], ids=["buffered", "written"])
@pytest.mark.parametrize("then", ["", "; raise ValueError('wrong')", "; sys.exit(0)"], ids=["end", "error", "exit"])
def test_closed_pipe_ends_with_one_line_at_most(size, then):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nobody_reads:
        result = program(f"def main(): print('a' * {size}){then}", stdout=nobody_reads)
    assert result.returncode == 1
    expected = b"error: wrong\n" if "wrong" in then and size == 10 else b"error: [Errno 32] Broken pipe\n"
    assert result.stderr == (b"" if "exit" in then and size == 10 else expected)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_ends_with_one_line():
    with open("/dev/full", "wb") as full:
        result = program("def main(): print('a')", stdout=full)
    assert (result.returncode, result.stderr) == (1, b"error: [Errno 28] No space left on device\n")


def test_exceptions_reach_whoever_calls_from_python():
    with pytest.raises(KeyError):
        run_program({}.popitem)
    with pytest.raises(SystemExit) as ending:
        run_program(lambda: int("x"))
    assert ending.value.code == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another library")
def test_memory_that_a_step_frees_stays():
    """The next step finds it: no page of it comes from the system again."""
    body = """
import resource
import torch
from aft.machine import settle_allocator
def main():
    for settle in (lambda: None, settle_allocator):
        settle()
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(3 * 2**18) for _ in range(20)]
            del blocks
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = program(body)
    plain, settled = map(int, result.stdout.split())
    assert plain > 10_000 and settled < plain / 10


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_waiting_threads_look_for_work_briefly_unless_told_otherwise(monkeypatch, given):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run_program(lambda: None)
    assert {name: os.environ[name] for name in WAITING if name in os.environ} == (given or WAITING)
