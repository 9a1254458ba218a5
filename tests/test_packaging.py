"""The wheel: pure Python, all of the package and nothing else, usable where only the wheel is."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import modeling_aft


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Links, because setuptools writes beside what it builds.
    for name in ("pyproject.toml", "README.md", "LICENSE", "modeling_aft", "scripts", "configuration"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_is_for_every_platform_and_holds_the_package_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    programs, presets = ROOT / "scripts" / "aft", ROOT / "configuration"
    kept = [path for path in programs.rglob("*") if path.suffix in (".py", ".md")]
    assert {name for name in names if ".dist-info/" not in name} == {
        *(f"modeling_aft/{path.name}" for path in (ROOT / "modeling_aft").glob("*.py")),
        "modeling_aft/py.typed",
        *(f"aft/{path.relative_to(programs)}" for path in kept),
        *(f"aft/configuration/{path.relative_to(presets)}" for path in presets.glob("*/*.*")),
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_generates_where_there_is_nothing_but_the_wheel(wheel, tmp_path):
    program = """
import torch
from transformers import AutoModelForCausalLM
import modeling_aft
assert ".whl" in modeling_aft.__file__, modeling_aft.__file__
config = modeling_aft.AFTConfig(hidden_size=16, num_hidden_layers=1, window_size=4)
model = AutoModelForCausalLM.from_config(config)
print(model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}){program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "torch.Size([1, 5])", done.stderr


def test_the_command_trains_from_any_folder_with_the_presets_of_the_wheel(wheel, tmp_path):
    """From the wheel unpacked: datasets and metrics are files that a library opens."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    text = tmp_path / "text.bin"
    text.write_bytes(b"a text of letters. " * 40)
    model = ["--model_preset", "aft-simple-tiny", "--model_override", "hidden_size=16", "num_hidden_layers=1"]
    flags = ["--preset", "tiny", *model, "position_embedding_type=none", "--dataset", "file"]
    flags += ["--dataset_path", text, "--cache_dir", tmp_path / "cache", "--sequence_length", 16, "--max_steps", 2]
    flags += ["--warmup_steps", 0, "--sample_prompt", "a", "--sample_bytes", 9, "--output_dir", "runs/tiny"]
    done = subprocess.run(
        [sys.executable, "-m", "aft", "pretrain", *map(str, flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "generate --model runs/tiny" in done.stdout
    assert (tmp_path / "runs/tiny/README.md").is_file()
    where = "import aft, modeling_aft; print(aft.__file__, modeling_aft.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", where]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert found.count(str(tmp_path / "site")) == 2


def test_the_wheel_has_the_program(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "aft = aft.__main__:run" in archive.read(entry_points).decode()


def test_the_source_distribution_can_run_its_tests(tmp_path):
    kept = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "runs", "*.egg-info", "build", "enwik8*"
    )
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=kept)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", "MANIFEST.in", ".gitignore"}
    original = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    original -= {name for name in original if name.startswith(("dist/", "modeling_aft.egg-info/", "scripts/aft.egg"))}
    assert original - made == {name for name in names if ".egg-info/" not in name} - made


def test_the_version_is_the_same_everywhere():
    version = modeling_aft.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0].rstrip(",") == version


def test_what_users_get_begins_with_the_license_and_tests_do_not():
    notice = (ROOT / "modeling_aft" / "ops.py").read_text(encoding="utf-8").partition('"""')[0]
    assert notice.startswith("# Copyright") and notice.count("\n") == 8
    for folder, has_notice in (("modeling_aft", True), ("scripts", True), ("tests", False)):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text(encoding="utf-8").startswith(notice) == has_notice, path
