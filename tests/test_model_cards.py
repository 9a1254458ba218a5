"""The checkpoints in model_cards/: they hold no code, have learned, say what they are, and are pushed with code."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_remote_code import run_without_package
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.commands.push import main as push
from aft.pushing import copy_with_code
from aft.run_log import fill_model_card, final_scores, read_log
from modeling_aft import AFTImageProcessor, ByteTokenizer


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
OF_PICTURES = [folder for folder in FOLDERS if (folder / "preprocessor_config.json").is_file()]
BY_NAME = {"argvalues": FOLDERS, "ids": lambda folder: folder.name}
OF_TEXT = {**BY_NAME, "argvalues": [folder for folder in FOLDERS if folder not in OF_PICTURES]}


def reader(folder: Path) -> tuple[type, type, str]:
    """What reads the inputs of the model in a folder, the Auto class that loads it, and its file of code."""
    if folder in OF_PICTURES:
        return AFTImageProcessor, AutoImageProcessor, "image_processing_aft.py"
    return ByteTokenizer, AutoTokenizer, "tokenization_bytes.py"


def test_each_family_is_there_and_all_are_small():
    types = sorted(AutoModelForCausalLM.from_pretrained(folder).config.model_type for folder in FOLDERS)
    assert set(types) == {"aft", "synthesizer"}
    sizes = [path.stat().st_size for folder in FOLDERS for path in folder.iterdir() if path.is_file()]
    assert sum(sizes) < 25e6


@pytest.mark.parametrize("folder", **OF_TEXT)
def test_it_has_learned_english(folder):
    """Text that no data set of these models holds, the license: bytes at random take 8 bits, `xz -9e` 3.1."""
    content = (ROOT / "LICENSE").read_bytes()[:4096]
    input_ids = torch.tensor(list(content)).view(16, 256)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert model(input_ids, labels=input_ids).loss.item() / math.log(2) < 2.8


@pytest.mark.parametrize("folder", **BY_NAME)
def test_it_holds_no_code_and_names_none(folder):
    assert not list(folder.glob("*.py"))
    assert not [path.name for path in folder.glob("*config.json") if "auto_map" in path.read_text()]
    kind, loader, _ = reader(folder)
    assert type(loader.from_pretrained(folder)) is kind


@pytest.mark.parametrize("folder", **BY_NAME)
def test_what_is_pushed_loads_without_the_package(folder, tmp_path):
    copy, (kind, loader, _) = copy_with_code(folder, tmp_path), reader(folder)
    script = f"""
from transformers import AutoModelForCausalLM
from {loader.__module__} import {loader.__name__}
for loader in (AutoModelForCausalLM, {loader.__name__}):
    loaded = loader.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert "transformers_modules" in type(loaded).__module__
    print(type(loaded).__name__)
"""
    result = run_without_package(copy, tmp_path, script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1:] == [kind.__name__]
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("folder", **BY_NAME)
def test_card_is_what_the_log_makes(folder):
    events = read_log(folder / "run.jsonl")
    advice = "write fill_model_card(read_log(folder / 'run.jsonl')) of scripts/aft/run_log.py into it"
    assert (folder / "README.md").read_text(encoding="utf-8") == fill_model_card(events), advice
    release = next(event for event in events if event["event"] == "release")
    assert abs(release["storage_cost"]) < 0.005
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == release["weights_sha256"]
    pictures = release["pictures"] + next(event for event in events if event["event"] == "final").get("pictures", [])
    assert {picture["file"] for picture in pictures} <= {path.name for path in folder.iterdir()}
    assert folder not in OF_PICTURES or {"samples.png", "samples-completed.png"} <= {p["file"] for p in pictures}
    with safe_open(folder / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}
    assert dtypes == {getattr(torch, release["dtype"])}


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder.name.startswith("aft")], ids=BY_NAME["ids"])
def test_aft_is_ahead_of_the_compressor(folder):
    events = read_log(folder / "run.jsonl")
    release = next(event for event in events if event["event"] == "release")
    scores = [
        event["bits_per_byte"]
        for event in final_scores(events)
        if event["split"] == "test" and event["protocol"] != "carried"  # longer than what it was trained on
    ]
    assert max(scores) < release["xz_bits_per_byte"] - 0.1


@pytest.mark.parametrize("folder", **BY_NAME)
def test_it_is_ready_to_push(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    push([str(folder), f"me/{folder.name}", "--dry_run"])
    printed = capsys.readouterr().out
    settings = "preprocessor_config.json" if folder in OF_PICTURES else "tokenizer_config.json"
    code = ("modeling_stack.py", reader(folder)[2])
    for name in ("model.safetensors", "config.json", settings, *code, "README.md", "run.jsonl"):
        assert f" {name}\n" in printed
    assert f'name = "me/{folder.name}"' in printed and "from_pretrained(name, trust_remote_code=True)" in printed
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
