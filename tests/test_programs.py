"""Every program of scripts/ from its command line: any text on any terminal, and one line where its user is wrong."""

import ast
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from aft.__main__ import COMMANDS


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NOWHERE = "nowhere/\u043c\u043e\u0434\u0435\u043b\u044c-\u4e2d-\udcff"  # the last is a byte of a path that is no UTF-8
ESCAPED = NOWHERE.encode("ascii", "backslashreplace").decode()
HEAVY = ["torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "modeling_aft"]
WRONG = {  # flags that are refused at once, and with what
    "addition.py": (["--output_dir", "out", "--model_preset", NOWHERE], "--model_preset: no such file: nowhere/"),
    "benchmark.py": (["train", "--models", NOWHERE], "--models must be files or of aft-simple,"),
    "build_pairs.py": (
        ["--task", "sections", "--output_dir", "out", "--lists_dir", NOWHERE],
        "--lists_dir must be a folder, got nowhere/",
    ),
    "compile_triton.py": (["--csv", NOWHERE], "--csv must be a .csv file, got nowhere/"),
    "gpu.py": ([NOWHERE], "PART must be of compile, tests, tune, ceiling, operator, train, decode, report, got "),
    "roofline.py": (["--output_dir", NOWHERE], "--output_dir must hold operator-cpu.csv"),
    "score.py": (
        [NOWHERE, "--dtype", NOWHERE],
        "aft evaluate: --dtype must be one of auto, float32, bfloat16, float16",
    ),
    "compare.py": ([NOWHERE], "plan: no such file: "),
    "stream_memory.py": (["--csv", NOWHERE], "--csv must be a .csv file, got nowhere/"),
    "tune_triton.py": (
        ["--csv", NOWHERE, "--columns", "1", "--dtype", "float32"],
        "--columns must be at least 2 with --dtype float32, got 1: it takes half; --csv must be a .csv file, got ",
    ),
    "classify.py": (["--data", "owner/name", "--model", NOWHERE], "aft classify: --model nowhere/"),
    "convert_vit.py": ([NOWHERE, "out"], "source nowhere/"),
    "convert_z1t.py": ([NOWHERE, "out", "--tanh_linear", "--tanh_mlp"], "checkpoint: no such file: nowhere/"),
    "draw_model.py": ([NOWHERE, "--output_dir", NOWHERE], "models: nowhere/"),
    "finetune.py": (["--model", "m", "--text_file", NOWHERE], "aft finetune: --text_file must be a file, got "),
    "draw_positions.py": ([NOWHERE, "--output", "a.svg"], "files: no such file: "),
    "generate.py": (["--model", "m", "--dtype", NOWHERE], "aft generate: --dtype must be float32, bfloat16 or "),
    "paint.py": (["m", "--output", NOWHERE], "aft paint: --output must be a file whose name ends with .png, got "),
    "seq2seq.py": (["--model", "m.json", "--text_file", NOWHERE], "aft seq2seq: --text_file must be a file, got "),
    "stream.py": (
        [NOWHERE, "--dtype", NOWHERE],
        "aft stream: --dtype must be one of auto, float32, bfloat16, float16",
    ),
    "push_to_hub.py": ([NOWHERE, "me/model"], "folder nowhere/"),
    "pretrain_enwik8.py": (["--model_preset", NOWHERE], "aft pretrain: --model_preset: no such file: nowhere/"),
    "release.py": ([NOWHERE, "out", "--dtype", NOWHERE], "aft release: --dtype must be one of float32, "),
}


COMMANDS_OF = {  # programs that are a command of `aft`
    "classify.py": "aft classify",
    "compare.py": "aft compare",
    "draw_model.py": "aft draw",
    "finetune.py": "aft finetune",
    "generate.py": "aft generate",
    "paint.py": "aft paint",
    "pretrain_enwik8.py": "aft pretrain",
    "push_to_hub.py": "aft push",
    "release.py": "aft release",
    "score.py": "aft evaluate",
    "seq2seq.py": "aft seq2seq",
    "stream.py": "aft stream",
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
    assert {path.name for path in SCRIPTS.iterdir()} - {"__pycache__"} == {*WRONG, "aft"}
    programs = [path.name for path in SCRIPTS.glob("aft/**/*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert programs == ["__main__.py"]


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


@pytest.mark.parametrize("program", WRONG)
def test_help_is_printed_on_every_terminal(program, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    runpy.run_path(str(SCRIPTS / program), run_name="__main__")
    assert stdout.buffer.getvalue().startswith(f"usage: {COMMANDS_OF.get(program, program)} ".encode())


# The command line `aft`


def aft(*argv: str, **environment) -> subprocess.CompletedProcess:
    """A process of `aft`, which says at its end on stderr what it has imported of the heavy libraries."""
    tell = f"[print('imported', name, file=sys.stderr) for name in {HEAVY} if name in sys.modules]"
    code = f"import atexit, sys\natexit.register(lambda: {tell})\nfrom aft.__main__ import run\nrun()"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), **environment}
    return subprocess.run([sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True)


def test_every_command_is_a_script_too():
    assert set(COMMANDS_OF.values()) == {f"aft {name}" for name in COMMANDS}
    modules = {path.stem for path in SCRIPTS.glob("aft/commands/*.py")} - {"__init__"}
    assert modules == set(COMMANDS)
    for script, command in COMMANDS_OF.items():
        assert imported_modules(SCRIPTS / script) == {"aft"}
        assert f"from aft.commands.{command.split()[1]} import main" in (SCRIPTS / script).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "argv", [["--help"], [], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_needs_no_heavy_library(argv):
    done = aft(*argv)
    assert done.returncode == 0 and done.stderr == ""
    if argv[-1:] == ["--version"]:
        assert re.fullmatch(r"modeling-aft \d+\.\d+\.\d+\S*\n", done.stdout)
    elif argv and argv[0] in COMMANDS:
        assert (
            done.stdout.startswith(f"usage: aft {argv[0]} [") and f"aft {argv[0]} " in done.stdout.partition("\n\n")[2]
        )
    else:
        assert done.stdout.startswith("usage: aft COMMAND") and all(f"  {name} " in done.stdout for name in COMMANDS)


MISTAKES = {  # of the flags, and what is said of each, before anything heavy is imported
    "command": (["pretrian"], "no command 'pretrian'; did you mean pretrain?"),
    "no-command": (["--model"], "no command '--model'; aft --help lists them"),
    "flag": (
        ["pretrain", "--max_step", "5"],
        "aft pretrain: unrecognized arguments: --max_step 5; did you mean --max_steps?",
    ),
    "dashes": (["generate", "--model", "m", "--max-new-token", "5"], "did you mean --max_new_tokens?"),
    "trainer-flag": (["finetune", "--model", "m", "--learning_rat", "1"], "did you mean --learning_rate?"),
    "value": (["pretrain", "--max_steps", "many"], "argument --max_steps: invalid int value: 'many'"),
    "truth": (["pretrain", "--compile", "maybe"], "argument --compile: must be true or false, got 'maybe'"),
    "missing": (["generate", "--prompt", "a"], "aft generate: the following arguments are required: --model"),
    "preset": (
        ["pretrain", "--preset", "tinny"],
        "--training_preset tinny: no such file or preset; did you mean tiny?",
    ),
    "model-preset": (["pretrain", "--model_preset", "aft-conv-tin"], "did you mean aft-conv-tiny?"),
    "plan": (["compare", "variant"], "plan variant: no such file or preset; did you mean variants?"),
    "data": (
        ["pretrain", "--dataset_path", "notes.tx"],
        "--dataset_path: no such file: notes.tx; did you mean notes.txt?",
    ),
    "model": (["generate", "--model", "runs/tinny"], "--model runs/tinny: no such folder; did you mean runs/tiny?"),
    "scored": (["evaluate", "runs/tinny"], "--model runs/tinny: no such folder; did you mean runs/tiny?"),
    "read": (["stream", "./runs/other"], "model ./runs/other: no such folder"),
    "drawn": (["draw", "tinny", "--output_dir", "o"], "models: tinny: no such folder"),
    "tuned": (
        ["finetune", "--model", "runs/tinny", "--text_file", "notes.txt"],
        "--model runs/tinny: no such folder; did",
    ),
    "pictures": (["classify", "--data", "runs/tinny"], "--data runs/tinny: no such folder; did you mean runs/tiny?"),
    "no-pictures": (["classify", "--model", "runs/tiny"], "aft classify: --data must be given, got None"),
    "image-preset": (["classify", "--data", "runs", "--model", "aft-full-tin"], "did you mean aft-full-tiny?"),
    "recipe": (["classify", "--data", "runs", "--recipe", "smal"], "no such file or preset; did you mean small?"),
    "recipe-flag": (["classify", "--data", "runs", "--mixop", "1"], "did you mean --mixup?"),
    "pair-preset": (["seq2seq", "--model", "transformer-smal"], "did you mean transformer-small?"),
    "no-pairs": (["seq2seq", "--model", "runs/tiny"], "--pairs_file must be given, or else --dataset or --text_file"),
    "pairs": (
        ["seq2seq", "--model", "runs/tiny", "--pairs_file", "note.txt"],
        "--pairs_file must be a file, got 'note.txt'; did you mean notes.txt?",
    ),
    "no-model": (["generate", "--model", "runs/empty"], "must be a folder with a saved model, and has no config.json"),
    "pushed": (["push", "runs/tinny", "me/m"], "folder runs/tinny: no such folder; did you mean runs/tiny?"),
    "name": (
        ["push", "runs/tiny", "me/m/n"],
        "aft push: repo_id must be owner/name, of letters, digits, -, _ and ., got",
    ),
    "released": (["release", "runs/tinny", "new"], "run: runs/tinny: no such folder; did you mean runs/tiny?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/tiny", "runs/empty"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/tiny/config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("notes")
    argv, message = MISTAKES[name]
    done = aft(*argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
