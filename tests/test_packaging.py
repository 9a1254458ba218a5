"""The wheel: pure Python, all of the package and nothing else, usable where only the wheel is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "modeling_aft"):  # setuptools writes beside what it builds
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_is_for_every_platform_and_holds_the_package_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"modeling_aft/{path.name}" for path in (ROOT / "modeling_aft").glob("*.py")
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
