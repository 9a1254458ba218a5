"""scripts/aft/saved_models.py: a saved model is loaded whole or not at all, and programs say what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from aft.commands import draw as draw_model
from aft.commands import evaluate as score
from aft.commands import generate
from aft.saved_models import load_config, load_model
from modeling_aft import AFTConfig, AFTForCausalLM, AFTForSequenceClassification, AFTModel, ByteTokenizer


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32, "position_bias_rank": 2}
CLASSES = {"model": AFTModel, "causal": AFTForCausalLM, "classifier": AFTForSequenceClassification}
INFINITE_CONFIG = json.dumps({"model_type": "aft", **SIZES, "layer_norm_eps": float("inf")})
NAN_CONFIG = json.dumps({"model_type": "aft", **SIZES, "layer_norm_eps": float("nan")})
PROGRAMS = {
    "generate": lambda folder: generate.main(["--model", str(folder), "--prompt", "a"]),
    "score": lambda folder: score.main([str(folder)]),
    "draw_model": lambda folder: draw_model.main([str(folder), "--output_dir", str(folder / "out")]),
}
every_program = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a model of each class, and a language model whose head has weights of its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_class in {**CLASSES, "untied": AFTForCausalLM}.items():
        model_class(AFTConfig(**SIZES, tie_word_embeddings=name != "untied")).save_pretrained(folder / name)
        ByteTokenizer().save_pretrained(folder / name)
    return folder


def remove(tensors: dict) -> None:
    del tensors["model.norm.bias"]


def add(tensors: dict) -> None:
    tensors["model.spare"] = torch.zeros(2)


def make_nan(tensors: dict) -> None:
    tensors["model.norm.bias"][1] = torch.nan


def make_infinite(tensors: dict) -> None:
    tensors["model.norm.bias"][1] = -torch.inf


def cut(tensors: dict) -> None:
    tensors["model.norm.bias"] = torch.zeros(2)


CHANGES = {
    remove: "missing: model.norm.bias",
    add: "unexpected: model.spare",
    make_nan: "not finite: model.norm.bias",
    make_infinite: "not finite: model.norm.bias",
    cut: "of another shape: model.norm.bias",
}


def changed(saved: Path, folder: Path, change, name: str = "causal") -> Path:
    """A copy of a model with a change of its tensors."""
    shutil.copytree(saved / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@every_program
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_incomplete_models_are_refused(saved, tmp_path, capsys, program, change):
    folder = changed(saved, tmp_path / "model", change)
    message = CHANGES[change]
    if program == "draw_model" and change is not add:  # its model has no head, and so no prefix
        message = message.replace("model.", "")
    with pytest.raises(ValueError, match=f"(--model|models:) {folder}: its tensors .*; {message}$"):
        PROGRAMS[program](folder)
    assert not (folder / "out").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", [*CLASSES, "untied"])
def test_only_a_head_may_be_new(saved, tmp_path, name, auto_class):
    model, new = load_model(auto_class, saved / name, new_head=True)
    head = {"score.weight", "score.bias"}
    assert new == (head if auto_class is AutoModelForSequenceClassification and name != "classifier" else set())
    same_class = type(model) is CLASSES[name.replace("untied", "causal")]
    if new or (not same_class and name in ("classifier", "untied")):
        with pytest.raises(ValueError, match="score.weight|lm_head.weight"):
            load_model(auto_class, saved / name)
    prefix = "" if name == "model" else "model."
    broken = changed(saved, tmp_path / "model", lambda tensors: tensors.pop(f"{prefix}norm.bias"), name)
    with pytest.raises(ValueError, match="missing: (model.)?norm.bias$"):
        load_model(auto_class, broken, new_head=True)


def test_a_head_that_was_saved_is_not_new(saved, tmp_path):
    for name, head, auto_class in (
        ("classifier", "score.bias", AutoModelForSequenceClassification),
        ("untied", "lm_head.weight", AutoModelForCausalLM),
    ):
        broken = changed(saved, tmp_path / name, lambda tensors, head=head: tensors.pop(head), name)
        with pytest.raises(ValueError, match=f"missing: {head}$"):
            load_model(auto_class, broken, new_head=True)


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param("{", "config.json", id="no-json"),
        pytest.param("[]", "", id="list"),
        pytest.param("null", "", id="null"),
        pytest.param('"text"', "", id="text"),
        pytest.param("\ufeff{}", "", id="bom"),
        pytest.param("{}", "Unrecognized model", id="empty"),
        pytest.param(INFINITE_CONFIG, "layer_norm_eps", id="infinite"),
        pytest.param(NAN_CONFIG, "layer_norm_eps", id="nan"),
        pytest.param(json.dumps({"model_type": "aft", **SIZES, "hidden_size": -1}), "hidden_size", id="negative"),
        pytest.param(json.dumps({"model_type": "aft", **SIZES, "layer_norm_eps": "a"}), "layer_norm_eps", id="type"),
        pytest.param(json.dumps({"model_type": "aft", **SIZES, "hidden_size": 10**12}), "", id="huge"),
    ],
)
@every_program
def test_a_wrong_config_is_refused(saved, tmp_path, program, content, message):
    folder = shutil.copytree(saved / "causal", tmp_path / "model")
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"(--model|models:) {folder}: .*{message}"):
        PROGRAMS[program](folder)


@pytest.mark.parametrize("content", [b"", b"no tensors", bytes(100)], ids=["empty", "text", "zeros"])
@every_program
def test_broken_weights_are_refused(saved, tmp_path, program, content):
    folder = shutil.copytree(saved / "causal", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"(--model|models:) {folder}: "):
        PROGRAMS[program](folder)


@every_program
@pytest.mark.parametrize("kind", ["missing", "file", "empty", "relative"])
def test_a_missing_folder_is_named_as_one(tmp_path, monkeypatch, program, kind):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/nowhere") if kind == "relative" else tmp_path / "model"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_bytes(b"a")
    expected = ": no such folder" if kind in ("missing", "relative") else ": must be a folder with a saved model"
    with pytest.raises(ValueError, match=f"(--model|models:) {folder}{expected}"):
        PROGRAMS[program](folder)


@pytest.mark.parametrize("name", ["", "."])
def test_no_name_is_no_model(saved, monkeypatch, name):
    monkeypatch.chdir(saved)
    with pytest.raises(ValueError, match="must be a folder with a saved model"):
        load_config(name)
    monkeypatch.chdir(saved / "causal")
    if name == ".":
        assert load_config(name).vocab_size == 256
    else:
        with pytest.raises(ValueError, match="must be a folder with a saved model"):
            load_config(name)


def test_a_report_does_not_print_a_table(saved, tmp_path, capfd):
    with pytest.raises(ValueError):
        load_model(AutoModelForCausalLM, changed(saved, tmp_path / "model", remove))
    assert "REPORT" not in capfd.readouterr().err


def test_not_all_of_many_names_are_listed(saved, tmp_path):
    broken = changed(saved, tmp_path / "model", lambda tensors: [tensors.pop(name) for name in list(tensors)[:14]])
    with pytest.raises(ValueError, match="missing: lm_head.weight, model.embed_positions.weight, .* and 5 more$"):
        load_model(AutoModelForCausalLM, broken)
