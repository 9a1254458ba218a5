"""The commands and imports in the documents exist: scripts, flags, presets, make targets, names. The first runs."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser


ROOT = Path(__file__).resolve().parent.parent
CARDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("model_cards/*/README.md"))]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "configuration/README.md", *CARDS)
SEPARATORS = {"&&", "||", "|", ";", "&"}


def code_blocks(*languages: str) -> list:
    """A pytest parameter for each fenced block in one of the languages, named by document and line."""
    blocks = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                line = text[: match.start()].count("\n") + 1
                blocks.append(pytest.param(match[2], id=f"{document}:{line}"))
    return blocks


def commands(block: str):
    """The commands of a shell block as lists of words, without variable assignments and comments."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        lexer.whitespace_split = True
        command = []
        for word in (*lexer, ";"):
            if word not in SEPARATORS:
                if command or not re.match(r"[A-Z_]+=", word):
                    command.append(word)
            elif command:
                yield command
                command = []


def flags(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


@cache
def flags_of_script(script: str) -> set[str]:
    result = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"--[\w-]+", result.stdout))


@cache
def flags_of_accelerate_launch() -> set[str]:
    return {option for action in launch_command_parser()._actions for option in action.option_strings}


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("block", code_blocks("bash", "sh"))
def test_commands_exist(block):
    for command in commands(block):
        if command[0] == "make":
            assert {word for word in command[1:] if "=" not in word} <= make_targets(), command
        for word in command:
            if word.startswith(("configuration/", "scripts/", "tests/", "modeling_aft/", "model_cards/")):
                assert (ROOT / word).exists(), f"{word} in {command}"
        scripts = [i for i, word in enumerate(command) if re.fullmatch(r"scripts/\w+\.py", word)]
        if scripts:
            before, after = command[: scripts[0]], command[scripts[0] + 1 :]
            assert flags(after) <= flags_of_script(command[scripts[0]]), command
            if "launch" in before:
                assert flags(before) <= flags_of_accelerate_launch(), command


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_compiles_and_imports_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            module = __import__(node.module, fromlist=sorted(names))
            assert all(hasattr(module, name) for name in names), f"from {node.module} import {names}"


def first_examples() -> list:
    """The first Python block of each document that begins with text out of a checkpoint."""
    blocks = code_blocks("python")
    return [next(block for block in blocks if block.id.startswith(f"{name}:")) for name in ("README.md", *CARDS)]


@pytest.mark.parametrize("example", first_examples())
def test_first_example_writes_text(example):
    assert "model_cards/" in example
    start = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.manual_seed(0)\n"
    command = [sys.executable, "-I", "-c", start + example]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    words = re.findall(r"[a-z]+", done.stdout)  # a model that has learned nothing writes few letters in a row
    assert len(words) > 10 and sum(map(len, words)) > 0.5 * len(done.stdout)


def test_makefile_calls_what_exists():
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in recipes.splitlines():
        if "scripts/" in line:
            words = shlex.split(line)
            script = next(word for word in words if word.startswith("scripts/"))
            assert flags(words[words.index(script) + 1 :]) <= flags_of_script(script)
            assert all((ROOT / word).exists() for word in words if word.startswith(("configuration/", "scripts/")))
