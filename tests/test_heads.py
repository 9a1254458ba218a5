"""Masked language modelling and classification: losses, padding, saving, pipelines."""

import json

import pytest
import torch
import transformers
from families import VARIANTS, make_config, make_ids
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import modeling_aft
from modeling_aft import AFTForMaskedLM, AFTPreTrainedModel, ByteTokenizer, SynthesizerPreTrainedModel


HEADS = {
    "masked": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
heads = pytest.mark.parametrize("auto_class", HEADS.values(), ids=HEADS)
variants = pytest.mark.parametrize("variant", VARIANTS)


def make_model(variant, auto_class, **changes):
    torch.manual_seed(0)
    config = make_config(variant, **{"is_decoder": False, "num_labels": 3, "initializer_range": 0.4, **changes})
    return auto_class.from_config(config).double().eval()


@pytest.mark.parametrize("family", [AFTPreTrainedModel, SynthesizerPreTrainedModel])
def test_a_head_is_declared_once(family, tmp_path):
    """What follows from its Auto class: the registrations, the map in a saved config, the names of the package."""
    tasks = {
        "AutoModel": "feature-extraction",
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForMaskedLM": "fill-mask",
        "AutoModelForSequenceClassification": "text-classification",
        "AutoModelForTokenClassification": "token-classification",
    }
    assert {name: head.pipeline_tag for name, head in family.heads.items()} == tasks
    small = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
    for name, head in family.heads.items():
        config = family.config_class(**small, is_decoder=name == "AutoModelForCausalLM")
        model = getattr(transformers, name).from_config(config)
        assert type(model) is head
        assert getattr(modeling_aft, head.__name__) is head and head.__name__ in modeling_aft.__all__
        model.save_pretrained(tmp_path / name)
        served = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert {auto: path.split(".")[1] for auto, path in served.items() if auto != "AutoConfig"} == {
            auto: other.__name__ for auto, other in family.heads.items()
        }


def test_what_a_user_derives_from_a_head_does_not_take_its_place():
    class Mine(AFTForMaskedLM):
        pass

    assert AFTPreTrainedModel.heads["AutoModelForMaskedLM"] is AFTForMaskedLM is Mine.heads["AutoModelForMaskedLM"]


@heads
@variants
def test_logits_and_loss(variant, auto_class):
    model, ids = make_model(variant, auto_class), make_ids(10)
    classes = model.config.vocab_size if auto_class is AutoModelForMaskedLM else 3
    labels = torch.tensor([2, 0]) if auto_class is AutoModelForSequenceClassification else make_ids(10) % 3
    if labels.dim() == 2:
        labels[:, 4:] = -100
    output = model(ids, labels=labels)
    assert output.logits.shape == ((2, 3) if labels.dim() == 1 else (2, 10, classes))
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3


@pytest.mark.parametrize("side", ["left", "right"])
@heads
@variants
def test_padding_changes_nothing(variant, auto_class, side):
    model, ids = make_model(variant, auto_class), make_ids(12)
    mask = torch.ones_like(ids)
    padded = slice(0, 5) if side == "left" else slice(-5, None)
    mask[0, padded] = 0
    logits = model(ids, attention_mask=mask).logits[:1]
    alone = model(ids[:1, mask[0].bool()]).logits
    torch.testing.assert_close(logits if logits.dim() == 2 else logits[:, mask[0].bool()], alone)


@heads
@pytest.mark.parametrize("variant", ["local", "conv-nopos", "dense", "random+dot_product"])
def test_save_and_load(variant, auto_class, tmp_path):
    model = make_model(variant, auto_class).float()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(make_ids(10)).logits, model(make_ids(10)).logits)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize("variant", ["local", "dense"])
def test_classifiers_may_be_causal(variant, auto_class):
    model = make_model(variant, auto_class, is_decoder=True)
    assert model(make_ids(10)).logits.shape[-1] == 3


def test_a_masked_language_model_must_be_bidirectional():
    with pytest.raises(ValueError, match="is_decoder.*False.*True"):
        AFTForMaskedLM(make_config("local"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problem_types(problem):
    labels = 1 if problem == "regression" else 3
    model = make_model("conv", AutoModelForSequenceClassification, num_labels=labels, problem_type=problem)
    assert model(make_ids(10), labels=torch.rand(2, labels, dtype=torch.float64)).loss.isfinite()


@pytest.mark.parametrize("variant", ["conv-nopos", "dense"])
def test_pipelines(variant):
    tokenizer = ByteTokenizer()
    model = make_model(variant, AutoModelForSequenceClassification).float()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    together, alone = classify(["short", "a longer one"], batch_size=2)[0], classify("short")[0]
    assert together["label"] == alone["label"]
    assert together["score"] == pytest.approx(alone["score"], abs=1e-5)
    model = make_model(variant, AutoModelForTokenClassification).float()
    entities = pipeline("token-classification", model=model, tokenizer=tokenizer)("abc")
    assert [entity["index"] for entity in entities] == [0, 1, 2]
