"""Programs that tests start in processes of their own: forked from one that has imported the libraries where that is
no part of what is tested, since a new Python takes some ten seconds to import them."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryFile


ROOT = Path(__file__).resolve().parent.parent
# What importing the package, and its programs, takes its time for.
LIBRARIES = ["pytest", "torch._dynamo", "transformers.generation", "transformers.modeling_layers"]
LIBRARIES += ["accelerate", "datasets", "transformers.trainer"]


def free_port() -> str:
    """A port of this machine that no one listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# Forked processes


@cache
def processes() -> multiprocessing.context.BaseContext:
    """Makes processes that have imported the libraries, but not the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    error = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)  # what libraries say of each other when they are imported
        try:
            forkserver.ensure_running()
        finally:
            os.dup2(error, 2)
            os.close(error)
    return context


class Descriptor:
    """The number of an open file, which has another number in the process that it is sent to when that is started."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _receive, (reduction.DupFd(self.number),)


def _receive(sent) -> int:
    return sent.detach()


def _call(environment: dict[str, str], streams: list[int], function: Callable, arguments: tuple) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_MODULES_CACHE" in environment:  # which transformers has read; and the search path is that of the tests
        sys.path[:] = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    function(*arguments)


def fork(
    target: Callable, args: tuple = (), *, stdin: int = 0, stdout: int = 1, stderr: int = 2, **environment: str
) -> BaseProcess:
    """
    A process, not yet started, that is forked from one that has imported the libraries. They have read their part of
    the environment before.

    Args:
        stdin, stdout, stderr: the numbers of open files.
        environment: what it has beside that of this process.
    """
    streams = [Descriptor(number) for number in (stdin, stdout, stderr)]
    return processes().Process(target=_call, args=({**os.environ, **environment}, streams, target, args))


def _execute(code: str, argv: list[str], cwd: str) -> None:
    os.chdir(cwd)
    sys.argv = ["-c", *argv]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def start(code: str, *argv: str | Path, cwd: Path = ROOT, **options) -> BaseProcess:
    """Starts what `python -c code` does. The options are those of `fork`."""
    process = fork(_execute, (code, [str(word) for word in argv], str(cwd)), **options)
    process.start()
    return process


def program(script: Path) -> str:
    """Code that does what `python script` does."""
    folder, path = str(script.parent), str(script)
    return f"import runpy, sys\nsys.path.insert(0, {folder!r})\nrunpy.run_path({path!r}, None, '__main__')"


def run(code: str, *argv: str | Path, copies: tuple[dict, ...] = ({},), **options) -> subprocess.CompletedProcess:
    """Starts it, once with each of the `copies` of more options, and waits. Returns the first that fails, or the
    first."""
    done = []
    with TemporaryFile() as stdout, TemporaryFile() as stderr:
        streams = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
        started = [start(code, *argv, **streams, **options, **more) for more in copies]
        for process in started:
            process.join(300)
            process.kill()
            process.join()
        for file in (stdout, stderr):
            file.seek(0)
            done.append(file.read().decode())
    status = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess([code, *argv], status, *done)


# Two processes


def run_on_two_processes(script: Path, flags: list[str]) -> None:
    """A script on two processes of the CPU, with what `accelerate launch` tells each of them; fails if it does."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    copies = tuple({"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
    result = run(program(script), *flags, copies=copies, **environment)
    assert result.returncode == 0, result.stderr[-3000:]


def launch_two_processes(script: Path, flags: list[str]) -> subprocess.CompletedProcess:
    """The same by `accelerate launch` itself."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    launch += ["--config_file", str(ROOT / "configuration" / "accelerate" / "cpu-2-processes.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*launch, str(script), *flags], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result
