"""What the tests of the Triton kernels share. They run on a GPU, or without one under Triton's interpreter.

Triton decides between the two when it is imported, for the whole process: the interpreter gets a process of its own,
which runs the tests of a file in it.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def run_under_interpreter(path: str, expression: str = "") -> None:
    """Runs the tests of a file whose names match the expression."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", expression, path]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " failed" not in result.stdout


@pytest.fixture(scope="module", autouse=True)
def patch_once():
    """What the interpreter does to the language of Triton at each call of a function, 40 % of all it does, is done
    once for each module that has functions."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_for_module(function):
        if function.__module__ not in patched:
            patched[function.__module__] = patch(function)
        return SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_for_module)
        yield
