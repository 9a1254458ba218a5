# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The edge between a program and whoever starts it: text that every terminal can print, and errors in one line."""

import contextlib
import importlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


# What its user or the machine can do wrong. All else is a mistake of the program, and its traceback is shown.
MISTAKES = (ValueError, OSError, ArithmeticError, MemoryError)
# What libraries say that is no news to anybody, by their loggers: of each other when they are imported, and of a
# head that is tied to the embedding and so is in no file.
TIED = "'model.decoder.embed_tokens.weight'"  # of an encoder-decoder
NOISE = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "Enum subclass",
    "accelerate.utils.other": r"Removed shared tensor \{'lm_head.weight'\}",
    "transformers.trainer": rf"missing keys in the checkpoint model loaded: \[({TIED}, )?'lm_head.weight'\]",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
# Threads that wait look for work for some tenths of a millisecond, which the pauses between the operations of a step
# are shorter than, and then sleep: a training step takes a third longer if they sleep at once, and two programs that
# share their cores several times as long if they go on looking.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "8000"}
CAN_FAIL = ("strict", "surrogateescape", "surrogatepass")  # error handlers of a stream that do not know every text


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """
    Lets stdout and stderr print any text: a character that their encoding lacks is printed as its number, `\\u4e2d`,
    and raises no UnicodeEncodeError. For a `with` block, or as a decorator: `@any_text()` above `main`.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]  # no StringIO has it
    changed = [(stream, stream.errors) for stream in streams if stream.errors in CAN_FAIL]
    for stream, _ in changed:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(OSError, ValueError):  # full, or closed: what was printed is not lost by this
                stream.reconfigure(errors=errors)


def program() -> str:
    """How to start `aft` from here: by its name if the shell finds it, else by its path."""
    if shutil.which("aft"):
        return "aft"
    path = Path(sys.executable).with_name("aft")
    if not path.is_file():
        return f"{sys.executable} -m aft"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how torch says that a device has no more memory."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def leave_processes() -> None:
    """Ends what processes that work together share: its threads, left alone, can abort Python as it ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def run_program(main: Callable[[], object]) -> None:
    """
    Calls a program's `main` from its command line. A mistake of its user or of the machine ends the process with one
    line on stderr and status 1, Ctrl-C with 130; `python -X dev` shows the traceback. Whoever calls `main` from Python
    gets its exceptions.

    Raises:
        SystemExit: with the status, if it is not 0.
    """
    if not WAITING.keys() & os.environ.keys():  # torch reads them when it is imported
        os.environ.update(WAITING)
    for name, text in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, text=text: not re.search(text, record.getMessage()))
    message, status = None, 0
    try:
        with any_text():
            main()
            leave_processes()
            print(end="", flush=True)  # a full disk or a closed pipe shows here, not while Python ends
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except SystemExit as ending:  # of argparse, which has printed why
        status = ending.code
    except Exception as error:
        if sys.flags.dev_mode or not (isinstance(error, MISTAKES) or is_out_of_memory(error)):
            raise
        message, status = f"error: {one_line(error)}", 1
    try:
        print(end="", flush=True)
    except (OSError, ValueError):  # nobody reads what is left: Python would complain once more when it ends
        if not sys.stdout.closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 1
    if message is not None:
        with contextlib.suppress(OSError, ValueError), any_text():
            print(message, file=sys.stderr, flush=True)
    if status:
        sys.exit(status)


def run_elsewhere(module: str, name: str, arguments: tuple, output: Path | None = None) -> None:
    """
    Calls a function in a new process as `run_program` does, and imports its module only then, so that what libraries
    say of each other is not heard here either.

    Args:
        output: file to add all that is printed to; the reason of a failure then stands on stderr as well.

    Raises:
        SystemExit: with the status, if it is not 0.
    """

    def call() -> None:
        getattr(importlib.import_module(module), name)(*arguments)

    if output is None:
        return run_program(call)
    terminal = os.dup(2)
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        run_program(call)
    except SystemExit:
        last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        os.write(terminal, f"{output.parent.name}: {' '.join(last)}\n".encode())
        raise
