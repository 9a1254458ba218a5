"""Every program of scripts/ from its command line: any text on any terminal, and one line where its user is wrong."""

import ast
import io
import runpy
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NOWHERE = "nowhere/\u043c\u043e\u0434\u0435\u043b\u044c-\u4e2d-\udcff"  # the last is a byte of a path that is no UTF-8
ESCAPED = NOWHERE.encode("ascii", "backslashreplace").decode()
WRONG = {  # flags that are refused at once, and with what
    "addition.py": (["--output_dir", "out", "--model_preset", NOWHERE], "--model_preset: no such file: nowhere/"),
    "benchmark.py": (["train", "--models", NOWHERE], "--models must be files or of aft-simple,"),
    "roofline.py": (["--output_dir", NOWHERE], "--output_dir must hold operator-cpu.csv"),
    "score.py": ([NOWHERE, "--dtype", NOWHERE], "--dtype must be one of auto, float32, bfloat16, float16"),
    "compare.py": ([NOWHERE], "plan: no such file: "),
    "convert_z1t.py": ([NOWHERE, "out", "--tanh_linear", "--tanh_mlp"], "checkpoint: no such file: nowhere/"),
    "draw_model.py": ([NOWHERE, "--output_dir", NOWHERE], "models: nowhere/"),
    "finetune.py": (["--model", "m", "--text_file", NOWHERE], "finetune.py: --text_file must be a file, got "),
    "draw_positions.py": ([NOWHERE, "--output", "a.svg"], "files: no such file: "),
    "generate.py": (["--model", "m", "--dtype", NOWHERE], "generate.py: --dtype must be float32, bfloat16 or "),
    "stream.py": ([NOWHERE, "--dtype", NOWHERE], "stream.py: --dtype must be one of auto, float32, bfloat16, float16"),
    "push_to_hub.py": ([NOWHERE, "me/model"], "nowhere/"),
    "release.py": ([NOWHERE, "out", "--dtype", NOWHERE], "release.py: --dtype must be one of float32, "),
}


def imported_modules(path: Path) -> set[str]:
    """The names of all modules that a file imports, anywhere in it, up to their first dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


def test_scripts_holds_programs_and_what_they_share():
    assert {path.name for path in SCRIPTS.iterdir()} - {"__pycache__"} == {*WRONG, "pretrain_enwik8.py", "shared"}
    assert not [path for path in SCRIPTS.glob("shared/**/*.py") if "__main__" in path.read_text(encoding="utf-8")]


def test_nothing_imports_a_program():
    programs = {path.stem for path in SCRIPTS.glob("*.py")}
    arrows = {path.name: imported_modules(path) & programs for path in SCRIPTS.rglob("*.py")}
    assert {name: found for name, found in arrows.items() if found} == {}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("program", WRONG)
def test_a_mistake_is_one_line_on_every_terminal(program, encoding, monkeypatch):
    flags, message = WRONG[program]
    stderr = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "argv", [program, *flags])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(SCRIPTS / program), run_name="__main__")
    printed = stderr.buffer.getvalue().decode(encoding)
    assert ending.value.code == 1
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    assert ESCAPED[-20:] in printed.replace("\\\\", "\\")


@pytest.mark.parametrize("program", [*WRONG, "pretrain_enwik8.py"])
def test_help_is_printed_on_every_terminal(program, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    runpy.run_path(str(SCRIPTS / program), run_name="__main__")
    assert stdout.buffer.getvalue().startswith(f"usage: {program} ".encode())
