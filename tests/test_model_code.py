"""scripts/aft/model_code.py: code that is taken from a saved model comes back as `save_pretrained` writes it."""

import json

import pytest
from families import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.model_code import add_code, configurations, remove_code
from modeling_aft import AFTImageProcessor, ByteTokenizer


@pytest.mark.parametrize(
    ("variant", "reader"),
    [("local", ByteTokenizer), ("random+dot_product", ByteTokenizer), ("local", AFTImageProcessor)],
    ids=["aft", "synthesizer", "pictures"],
)
def test_code_that_is_taken_away_comes_back(variant, reader, tmp_path):
    make_model(variant).save_pretrained(tmp_path)
    reader().save_pretrained(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    remove_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name in written if not name.endswith(".py")}
    assert not any("auto_map" in json.loads((tmp_path / name).read_text()) for name in configurations(tmp_path))
    auto_class = AutoTokenizer if reader is ByteTokenizer else AutoImageProcessor
    for loader in (AutoModelForCausalLM, auto_class):  # with the package, nothing is missing
        assert type(loader.from_pretrained(tmp_path)).__module__.startswith("modeling_aft.")
    add_code(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_code_is_added_to_the_models_of_the_package_alone(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=256)).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must begin with a class of modeling_aft, .*, got 'GPT2LMHeadModel'"):
        add_code(tmp_path)
