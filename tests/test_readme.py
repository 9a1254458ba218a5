"""What the documents say: commands, links and names exist, Python runs, and the README stays short."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from launching import run
from PIL import Image

from aft.__main__ import main as aft
from aft.image_training import make_processor
from modeling_aft import (
    AFTConfig,
    AFTForCausalLM,
    AFTForImageClassification,
    AFTForMaskedLM,
    AFTImageProcessor,
    AFTVisionConfig,
    ByteTokenizer,
    SynthesizerForConditionalGeneration,
    SynthesizerSeq2SeqConfig,
)


ROOT = Path(__file__).resolve().parent.parent
CARDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("model_cards/*/README.md"))]
PAGES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))]
GUIDES = ("README.md", *PAGES)  # their Python blocks run, page by page
DOCUMENTS = (*GUIDES, "CONTRIBUTING.md", "benchmarks/README.md", "configuration/README.md", *CARDS)
LINKED = (*GUIDES, "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/claims.md", "configuration/README.md")
FOLDERS = ("benchmarks", "configuration", "docs", "model_cards", "modeling_aft", "scripts", "tests")
SEPARATORS = {"&&", "||", "|", ";", "&"}
MOST_WORDS = 1250  # of the README, as `wc -w` counts


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def find_blocks(document: str, *languages: str) -> list[tuple[int, str]]:
    """Line and text of each fenced block of a document in one of the languages."""
    text, blocks = read(document), []
    for match in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            blocks.append((text[: match.start()].count("\n") + 1, match[2]))
    return blocks


def code_blocks(*languages: str) -> list:
    """A pytest parameter for each fenced block in one of the languages, named by document and line."""
    found = ((document, *block) for document in DOCUMENTS for block in find_blocks(document, *languages))
    return [pytest.param(text, id=f"{document}:{line}") for document, line, text in found]


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
    """Those that its --help names. It runs in this process, which has imported most of what it needs."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:] = [script, "--help"], [str(ROOT / "scripts"), *sys.path]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ending:
        assert not ending.code, f"{script} --help ended with {ending.code}"
    finally:
        sys.argv, sys.path[:] = before
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


@cache
def flags_of_command(command: str) -> set[str]:
    """Those that the --help of a command of `aft` names."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="^0$"):
        aft([command, "--help"])
    found = set(re.findall(r"--[\w-]+", printed.getvalue()))
    runs = ("pretrain", "classify", "seq2seq") if command == "compare" else ()  # which gives them their flags
    return found.union(*map(flags_of_command, runs))


def assert_flags_exist(words: list[str], program: int, known: set[str]):
    """Checks the flags after a program, and those of `accelerate launch` before it."""
    before, after = words[:program], words[program + 1 :]
    assert flags(after) <= known, words
    if "launch" in before:
        assert flags(before) <= flags_of_accelerate_launch(), words


@cache
def flags_of_accelerate_launch() -> set[str]:
    return {option for action in launch_command_parser()._actions for option in action.option_strings}


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), flags=re.MULTILINE))


@pytest.mark.parametrize("block", code_blocks("bash", "sh"))
def test_commands_exist(block):
    for command in commands(block):
        if command[0] == "make":
            assert {word for word in command[1:] if "=" not in word} <= make_targets(), command
        for word in command:
            if word.startswith(("configuration/", "scripts/", "tests/", "modeling_aft/", "model_cards/")):
                assert (ROOT / word).exists(), f"{word} in {command}"
        for i, word in enumerate(command):
            if re.fullmatch(r"scripts/\w+\.py", word):
                assert_flags_exist(command, i, flags_of_script(word))
            elif Path(word).name == "aft" and (i == 0 or command[i - 1] == "-m"):
                assert_flags_exist(command, i, flags_of_command(command[i + 1]))


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_compiles_and_imports_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            module = __import__(node.module, fromlist=sorted(names))
            assert all(hasattr(module, name) for name in names), f"from {node.module} import {names}"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder of models as small as they get, in place of those of runs/, which take minutes to train."""
    folder = tmp_path_factory.mktemp("documents")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "position_bias_rank": 4, "max_position_embeddings": 256}
    AFTForCausalLM(AFTConfig(**sizes)).save_pretrained(folder / "tiny")
    ByteTokenizer().save_pretrained(folder / "tiny")
    AFTForMaskedLM(AFTConfig(**sizes, vocab_size=257, is_decoder=False)).save_pretrained(folder / "tiny-masked")
    ByteTokenizer(mask_token="[MASK]").save_pretrained(folder / "tiny-masked")
    vision = AFTVisionConfig(hidden_size=16, num_hidden_layers=1, image_size=28, patch_size=4, num_labels=10)
    AFTForImageClassification(vision).save_pretrained(folder / "fashion")
    make_processor(28, 1.0, 3, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}).save_pretrained(folder / "fashion")
    processor = AFTImageProcessor(size={"height": 4, "width": 4}, num_channels=1)
    pictures = AFTForCausalLM(AFTConfig(**sizes, vocab_size=257))
    pictures.generation_config = processor.generation_config()
    for part in (pictures, processor):
        part.save_pretrained(folder / "photos")
    stack = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 257}
    ids = {"pad_token_id": 256, "eos_token_id": 255, "decoder_start_token_id": 256}
    pair = SynthesizerSeq2SeqConfig(encoder=stack, decoder=stack, **ids)
    for part in (SynthesizerForConditionalGeneration(pair), ByteTokenizer(padding_side="right")):
        part.save_pretrained(folder / "en-de")
    return folder


@pytest.mark.parametrize("document", [name for name in GUIDES if find_blocks(name, "python")])
def test_python_runs(document, stand_in, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, in a folder that has what the root of the repository has."""
    for name in ("configuration", "model_cards", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(stand_in, tmp_path / "runs")
    Image.new("L", (28, 28)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in find_blocks(document, "python"):
        # As many lines before it as the document has, so that a traceback names its line.
        exec(compile("\n" * line + block, str(ROOT / document), "exec"), namespace)


def first_examples() -> list:
    """The first Python block of each document that begins with text out of a checkpoint."""
    return [pytest.param(find_blocks(name, "python")[0][1], id=name) for name in ("README.md", *CARDS)]


@pytest.mark.parametrize("example", first_examples())
def test_first_example_writes_text_or_draws(example, tmp_path):
    """In a process of its own, which has imported nothing of the package yet."""
    assert "model_cards/" in example
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    environment = {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run("import torch; torch.manual_seed(0)\n" + example, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    if pictures:
        completed, drawn = pictures
        assert drawn.shape == completed.shape == (28, 28) and (completed[:14] == drawn[:14]).all()
        # Clothes in the middle of a black ground, which a model that has learned nothing does not draw.
        assert (drawn[:, [0, -1]] < 32).mean() > 0.5 and drawn[:, 10:18].mean() > 32
    else:
        words = re.findall(r"[a-z]+", done.stdout)  # a model that has learned nothing writes few letters in a row
        assert len(words) > 10 and sum(map(len, words)) > 0.5 * len(done.stdout)


def anchors(text: str) -> set[str]:
    """Those that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    headings = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = (ROOT / document).parent / name if name else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", LINKED)
def test_named_files_exist(document):
    text = read(document)
    paths = re.findall(rf"(?<![\w.~/-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    paths += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page():
    text = read("README.md")
    assert len(text.split()) <= MOST_WORDS
    assert [page for page in PAGES if f"]({page})" not in text] == []


def table_rows(document: str) -> list[list[str]]:
    lines = re.findall(r"^\|(.+)\|$", read(document), flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_figures_of_the_readme_are_those_of_the_benchmarks():
    measured = table_rows("benchmarks/README.md")
    figures = [row for row in table_rows("README.md") if re.fullmatch(r"[\d.,]+", row[1])]
    assert len(figures) > 10
    for row in figures:
        assert any(row[0] == other[0] and set(row) <= {*other, ""} for other in measured), row


def test_makefile_calls_what_exists():
    recipes = read("Makefile").replace("\\\n", " ")
    for line in recipes.splitlines():
        words = shlex.split(line) if line.startswith("\t") and ("scripts/" in line or "/aft " in line) else []
        for i, word in enumerate(words):
            if word.startswith("scripts/"):
                assert (ROOT / word).exists() and flags(words[i + 1 :]) <= flags_of_script(word), line
            elif word.endswith("/aft"):
                assert_flags_exist(words, i, flags_of_command(words[i + 1]))
