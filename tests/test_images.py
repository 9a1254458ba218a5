"""AFT for images: forms, sizes, padding, loss, presets, weights of a ViT, saving, pipelines, ONNX."""

import json
from pathlib import Path

import onnx_ir
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from launching import run
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.export import Dim
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # where torchvision is not needed

from aft.commands.push import main as push
from modeling_aft import AFTForImageClassification, AFTVisionConfig, AFTVisionModel, AFTVisionPreTrainedModel
from modeling_aft.modeling_images import DropPath, resample
from modeling_aft.ops_tokens import Tokens


VARIANTS = {
    "conv": {},
    "conv-all-heads": {"num_attention_heads": 16},
    "conv-plain": {"conv_reparameterization": False},
    "conv-places": {"position_embedding_type": "learned"},
    "full": {"aft_type": "full"},
    "full-table": {"aft_type": "full", "position_bias_rank": None},
    "full-mean": {"aft_type": "full", "pooling": "mean"},
    "local": {"aft_type": "local"},
    "local-relative": {"aft_type": "local", "position_bias_type": "relative", "position_embedding_type": "none"},
    "simple": {"aft_type": "simple"},
    "simple-mean": {"aft_type": "simple", "pooling": "mean", "position_embedding_type": "none"},
}
UNLIMITED = ["conv", "conv-all-heads", "conv-plain", "local-relative", "simple-mean"]
variants = pytest.mark.parametrize("variant", VARIANTS)
IMAGES = Path(__file__).resolve().parent.parent / "configuration" / "images"
# images.md A3: what the paper's tables have, to the digit.
COUNTS = {
    "aft-full-tiny": 6_322_600,
    "aft-full-small": 22_655_848,
    "aft-conv-tiny-11-32": 5_356_072,
    "aft-conv-tiny-11-192": 5_962_792,
    "aft-conv-small-11-16": 20_298_088,
    "aft-conv-small-11-384": 22_541_416,
    "aft-conv-small-15-384": 23_020_648,
    "aft-conv-base-25-32-384": 79_864_552,
}


def make_config(variant="conv", **changes):
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, kernel_size=3, position_bias_rank=4)
    sizes = dict(image_size=[12, 16], patch_size=4, num_channels=2, window_size=3, num_labels=3)
    return AFTVisionConfig(**{**small, **sizes, **VARIANTS[variant], **changes})


def make_model(variant="conv", dtype=torch.float64, model_class=AFTForImageClassification, **changes):
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    model = model_class(make_config(variant, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def make_images(batch=2, height=12, width=16, dtype=torch.float64):
    return torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def mixed_by_hand(mixer, hidden, grid, lead, outside=0.0):
    """Eq. 2 in plain sums, with the bias that eq. 4, 6 and 8 give to each pair of places, 0 outside of a kernel."""
    query, key, value = mixer.split(mixer.qkv_proj(hidden))
    length, bias = hidden.shape[1], mixer.position_bias
    pairs = torch.zeros(key.shape[2], length, length, dtype=hidden.dtype)
    places = torch.arange(length)
    if hasattr(bias, "side"):
        weight, reach = bias.weight, bias.side // 2
        if hasattr(bias, "gamma"):
            spread = weight.var(1, keepdim=True, unbiased=False).sqrt()
            weight = bias.gamma[:, None] * (weight - weight.mean(1, keepdim=True)) / spread + bias.beta[:, None]
        kernels = weight.view(-1, bias.side, bias.side)
        rows, columns = places // grid[1], places % grid[1]
        pairs.fill_(outside)
        for p in range(length):
            for q in range(length):
                y, x = rows[p] - rows[q] + reach, columns[p] - columns[q] + reach
                if 0 <= y < bias.side and 0 <= x < bias.side:
                    pairs[:, p, q] = kernels[:, y, x]
    elif bias is not None and bias.argument == "position_bias":
        pairs += bias(places)
    elif bias is not None:
        taps = bias(places)  # [1 or H, T or 1, taps]
        reach = taps.shape[-1] // 2
        for p in range(length):
            for q in range(max(p - reach, 0), min(p + reach + 1, length)):
                row = taps[:, p if taps.shape[1] > 1 else 0, p - q + reach]
                pairs[:, p, q] = row.repeat_interleave(len(pairs) // len(row))
    weights = (key.transpose(1, 2)[:, :, None] + pairs).softmax(-1)  # [B, K, T, T]
    weights = weights.repeat_interleave(value.shape[2] // key.shape[2], 1)
    average = (weights * value.transpose(1, 2)[:, :, None]).sum(-1).transpose(1, 2)
    return mixer.o_proj(query.sigmoid() * average)


@variants
def test_a_layer_is_the_formula(variant):
    model = make_model(variant).model
    lead = int(model.config.pooling == "token")
    hidden = torch.randn(2, 12 + lead, 16, dtype=torch.float64)
    mixer = model.layers[1].mixer
    found, _ = mixer(hidden, Tokens(grid=(3, 4)))
    torch.testing.assert_close(found, mixed_by_hand(mixer, hidden, (3, 4), lead))


def test_the_masked_kernels_of_the_page():
    """The variant of docs/your-own-variant.md that sees nothing outside of its kernels."""
    page = (
        (IMAGES.parent.parent / "docs" / "your-own-variant.md").read_text(encoding="utf-8").partition("Of images")[2]
    )
    code, config = (page.partition(f"```{language}\n")[2].partition("```")[0] for language in ("python", "json"))
    variant = {}
    exec(code, variant)
    config = AutoConfig.for_model(**json.loads(config))
    model = AutoModelForImageClassification.from_config(config).double()
    assert type(model) is variant["MaskedForImageClassification"]
    mixer, hidden = model.model.layers[1].mixer, torch.randn(2, 24, 64, dtype=torch.float64)
    found, _ = mixer(hidden, Tokens(grid=(4, 6)))
    torch.testing.assert_close(found, mixed_by_hand(mixer, hidden, (4, 6), 0, outside=-torch.inf))


@variants
def test_the_model_is_its_parts(variant):
    model, images = make_model(variant), make_images()
    body = model.model
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    hidden = patches @ body.patch_embeddings.projection.weight.flatten(1).T + body.patch_embeddings.projection.bias
    lead = int(model.config.pooling == "token")
    if lead:
        hidden = torch.cat([body.class_token.expand(2, 1, -1), hidden], 1)
    if model.config.position_embedding_type == "learned":
        hidden = hidden + body.position_embeddings
    for layer in body.layers:
        hidden = hidden + mixed_by_hand(layer.mixer, layer.mixer_norm(hidden), (3, 4), lead)
        hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
    hidden = body.norm(hidden)
    pooled = hidden[:, 0] if lead else hidden.mean(1)
    output = body(images)
    torch.testing.assert_close(output.last_hidden_state, hidden)
    torch.testing.assert_close(output.pooler_output, pooled)
    torch.testing.assert_close(model(images).logits, model.classifier(pooled))


def test_defaults_are_those_of_the_paper():
    conv, full = AFTVisionConfig(), AFTVisionConfig(aft_type="full")
    assert (conv.pooling, conv.position_embedding_type, conv.has_position_table) == ("mean", "none", False)
    assert (full.pooling, full.position_embedding_type, full.has_position_table) == ("token", "learned", True)
    assert full.max_position_embeddings == 197 and full.position_bias_rank == 128 and full.qkv_bias
    assert "vocab_size" not in conv.to_dict() and "max_position_embeddings" not in conv.to_dict()


@pytest.mark.parametrize("name", COUNTS)
def test_a_row_of_the_paper_has_its_count(name):
    config = AutoConfig.from_pretrained(IMAGES / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert type(model) is AFTForImageClassification and model.num_parameters() == COUNTS[name]


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (24, 12)], ids=str)
@pytest.mark.parametrize("variant", UNLIMITED)
def test_images_of_any_size(variant, size):
    model = make_model(variant)
    assert model(make_images(2, *size)).logits.shape == (2, 3)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in UNLIMITED])
def test_tables_end(variant):
    model, images = make_model(variant), make_images(2, 24, 32)
    with pytest.raises(ValueError, match="pixel_values.*images of 12 x 16.*interpolate_pos_encoding.*24 x 32"):
        model(images)
    if variant == "local":
        with pytest.raises(ValueError, match="interpolate_pos_encoding.*local"):
            model(images, interpolate_pos_encoding=True)
    else:
        assert model(images, interpolate_pos_encoding=True).logits.isfinite().all()
    same = make_images()
    assert torch.equal(model(same, interpolate_pos_encoding=True).logits, model(same).logits)


def test_tables_are_resampled_as_those_of_vit():
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=12, patch_size=4))
    embeddings = vit.embeddings.eval()
    pixels = torch.randn(1, 3, 20, 28)
    with torch.no_grad():
        expected = embeddings(pixels, interpolate_pos_encoding=True)[0]
        patches = embeddings.patch_embeddings(pixels)[0]
        found = resample(embeddings.position_embeddings[0], (3, 3), (5, 7), 1)
        found = found + torch.cat([embeddings.cls_token[0], patches])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", ["conv", "conv-all-heads", "simple-mean"])
def test_padding_changes_nothing(variant):
    """An image in a corner of a larger one, of which the rest is masked, is what it is alone."""
    model, images = make_model(variant), make_images(2, 16, 20)
    mask = torch.ones(2, 16, 20, dtype=torch.long)
    mask[0, 8:] = 0
    mask[0, :, 12:] = 0
    images[0, :, 8:] = 1e4
    both = model(images, pixel_mask=mask).logits
    torch.testing.assert_close(both[:1], model(images[:1, :, :8, :12]).logits)
    torch.testing.assert_close(both[1:], model(images[1:]).logits)


def test_padding_of_a_model_with_tables_is_not_seen():
    model, images = make_model("full"), make_images()
    mask = torch.ones(2, 12, 16, dtype=torch.bool)
    mask[0, 8:] = False
    before = model(images, pixel_mask=mask).logits
    images[0, :, 8:] += 100
    torch.testing.assert_close(model(images, pixel_mask=mask).logits, before)
    assert not torch.allclose(before[0], model(images).logits[0])
    torch.testing.assert_close(before[1], model(images).logits[1])


WRONG_INPUTS = {
    "nothing": (dict(pixel_values=None), "pixel_values.*None"),
    "three dimensions": (dict(pixel_values=torch.zeros(2, 12, 16)), r"pixel_values.*\[B, 2, height, width\]"),
    "channels": (dict(pixel_values=torch.zeros(2, 3, 12, 16)), "pixel_values.*num_channels is 2"),
    "whole numbers": (dict(pixel_values=torch.zeros(2, 2, 12, 16, dtype=torch.uint8)), "floating point.*uint8"),
    "part of a patch": (dict(pixel_values=torch.zeros(2, 2, 13, 16)), "multiples of 4 x 4"),
    "no image": (dict(pixel_values=torch.zeros(0, 2, 12, 16)), "pixel_values"),
    "shape of the mask": (dict(pixel_mask=torch.ones(2, 3, 4)), r"pixel_mask.*\[2, 12, 16\]"),
    "mask within a patch": (dict(pixel_mask=torch.arange(16).lt(6).expand(2, 12, 16)), "pixel_mask.*whole patches"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_inputs_are_refused(name):
    given, message = WRONG_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        make_model()(**{"pixel_values": make_images(), **given})


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="bool_masked_pos"):
        make_model()(make_images(), bool_masked_pos=None)


WRONG_FIELDS = {
    "even kernel": (dict(kernel_size=4), "kernel_size.*odd"),
    "image is no multiple of the patch": (dict(image_size=30), "image_size.*multiple of patch_size"),
    "three sides": (dict(patch_size=[4, 4, 4]), "patch_size.*height and width"),
    "no pixels": (dict(patch_size=0), "patch_size.*at least 1"),
    "no channels": (dict(num_channels=0), "num_channels.*at least 1"),
    "token of conv": (dict(pooling="token"), "pooling.*mean"),
    "pooling": (dict(pooling="max"), "pooling.*mean, token"),
    "sinusoids": (dict(position_embedding_type="sinusoidal"), "position_embedding_type.*learned or none"),
    "drop path": (dict(drop_path_rate=1.0), "drop_path_rate"),
    "heads": (dict(num_attention_heads=5), "num_attention_heads.*divisor"),
    "window": (dict(aft_type="local", window_size=99), "window_size.*at most"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_wrong_fields_are_refused(name):
    changes, message = WRONG_FIELDS[name]
    with pytest.raises(ValueError, match=f"AFTVisionConfig: .*{message}"):
        make_config(**changes)


def test_loss_of_classes_probabilities_and_numbers():
    model, images = make_model(), make_images()
    logits = model(images).logits
    classes = torch.tensor([2, 0])
    expected = F.cross_entropy(logits, classes)
    torch.testing.assert_close(model(images, labels=classes).loss, expected)
    assert model.config.problem_type == "single_label_classification"
    torch.testing.assert_close(model(images, labels=F.one_hot(classes, 3).double()).loss, expected)
    torch.testing.assert_close(model(images, labels=classes, num_items_in_batch=8).loss, expected * 2 / 8)
    mixture = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(model(images, labels=mixture).loss, -(mixture * logits.log_softmax(-1)).sum(-1).mean())
    several = make_model(problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(several(images).logits, mixture)
    torch.testing.assert_close(several(images, labels=mixture).loss, expected)


def test_drop_path_leaves_out_and_scales():
    torch.manual_seed(0)
    drop, added = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    found = drop(added)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert all((image == image[0, 0]).all() for image in found[:50])
    assert found.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(added) is added
    rates = [layer.dropout[1].rate for layer in make_model(drop_path_rate=0.3, num_hidden_layers=4).model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@variants
def test_every_parameter_gets_a_gradient(variant):
    model = make_model(variant)
    model(make_images(), labels=torch.tensor([2, 0])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant", ["conv", "full", "local", "simple"])
def test_attentions_are_the_weights(variant):
    model, images = make_model(variant), make_images()
    output = model(images, output_attentions=True, output_hidden_states=True)
    keys, length = (4, 12) if variant == "conv" else (16, 13)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, keys, length, length)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, keys, length, dtype=torch.float64))
    assert len(output.hidden_states) == 3


@variants
def test_save_and_load(variant, tmp_path):
    model, images = make_model(variant, torch.float32), make_images(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "aft_vision"
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    assert (tmp_path / "modeling_images.py").exists() and (tmp_path / "ops_grid.py").exists()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is AFTForImageClassification and loaded.config.to_dict() == model.config.to_dict() | {
        "_name_or_path": str(tmp_path)
    }
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=0, atol=0)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is AFTVisionModel
    torch.testing.assert_close(body(images).pooler_output, model.model(images).pooler_output, rtol=0, atol=0)


def test_heads_are_declared():
    names = {name: head.pipeline_tag for name, head in AFTVisionPreTrainedModel.heads.items()}
    assert names == {
        "AutoModel": "image-feature-extraction",
        "AutoModelForImageClassification": "image-classification",
    }


# From a ViT or DeiT


SOURCES = {
    "vit": (ViTConfig, ViTForImageClassification),
    "vit without a head": (ViTConfig, ViTModel),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "distilled deit": (DeiTConfig, DeiTForImageClassificationWithTeacher),
    "deit without a head": (DeiTConfig, DeiTModel),
}


def make_vit(source, **changes):
    config_class, model_class = SOURCES[source]
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3)
    vit = model_class(config_class(**{**small, "image_size": 16, "patch_size": 4, "num_channels": 2, **changes}))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


@pytest.mark.parametrize("aft_type", ["conv", "full"])
@pytest.mark.parametrize("source", SOURCES)
def test_weights_of_a_vit_are_taken_over(source, aft_type):
    vit, changes = make_vit(source, layer_norm_eps=1e-5), dict(aft_type=aft_type, num_attention_heads=4)
    model, info = AFTForImageClassification.from_vit(vit, output_loading_info=True, **changes)
    assert not model.training and model.config.layer_norm_eps == 1e-5 and model.config.intermediate_size == 40
    body = getattr(vit, vit.base_model_prefix, vit)
    for layer, other in zip(model.model.layers, body.layers, strict=True):
        assert torch.equal(layer.mixer.qkv_proj.weight[-16:], other.attention.v_proj.weight)
        assert torch.equal(layer.mixer.qkv_proj.bias[-16:], other.attention.v_proj.bias)
        assert not layer.mixer.qkv_proj.bias[:-16].any()
        for name in ("weight", "bias"):
            pairs = [
                (layer.mixer.o_proj, other.attention.o_proj),
                (layer.mixer_norm, other.layernorm_before),
                (layer.feed_forward_norm, other.layernorm_after),
                (layer.feed_forward.up_proj, other.mlp.fc1),
                (layer.feed_forward.down_proj, other.mlp.fc2),
            ]
            assert all(torch.equal(getattr(here, name), getattr(there, name)) for here, there in pairs)
    patches = body.embeddings.patch_embeddings.projection
    assert torch.equal(model.model.patch_embeddings.projection.weight, patches.weight)
    assert torch.equal(model.model.norm.weight, body.layernorm.weight)
    head = getattr(vit, "classifier", None) or getattr(vit, "cls_classifier", None)
    assert ("classifier.weight" in info["new"]) == (head is None)
    if head is not None:
        assert torch.equal(model.classifier.weight, head.weight)
    if model.config.pooling == "token":
        assert torch.equal(model.model.class_token, body.embeddings.cls_token.view(-1))
        places = body.embeddings.position_embeddings[0]
        assert torch.equal(model.model.position_embeddings[0], places[0])
        assert torch.equal(model.model.position_embeddings[1:], places[-16:])
    assert {*info["copied"], *info["new"]} == {name for name, _ in model.named_parameters()}
    left_out = {name.rpartition(".")[0].rpartition(".")[2] for name in info["left_out"]}
    assert {"q_proj", "k_proj"} <= left_out and "v_proj" not in left_out
    assert model(torch.randn(2, 2, 16, 16)).logits.isfinite().all()
    if model.config.pooling == "mean":
        assert model(torch.randn(2, 2, 24, 8)).logits.isfinite().all()


@pytest.mark.parametrize("aft_type", ["local", "simple"])
def test_other_types_take_the_weights_of_a_vit_too(aft_type):
    vit = make_vit("vit")
    model = AFTForImageClassification.from_vit(vit, aft_type=aft_type, window_size=3)
    assert torch.equal(model.model.position_embeddings, vit.vit.embeddings.position_embeddings[0])
    assert model(torch.randn(2, 2, 16, 16)).logits.isfinite().all()


def test_a_model_of_a_vit_trains():
    vit = make_vit("vit")
    model = AFTForImageClassification.from_vit(vit, num_attention_heads=4, kernel_size=3).train()
    model(torch.randn(2, 2, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in vit.parameters())


def test_the_gates_of_a_vit_may_be_opened():
    model = AFTForImageClassification.from_vit(make_vit("vit"), num_attention_heads=4, gate_bias=2.0)
    for layer in model.model.layers:
        assert (layer.mixer.qkv_proj.bias[:16] == 2).all() and not layer.mixer.qkv_proj.bias[16:20].any()


def test_what_becomes_of_the_weights_is_said(caplog):
    AFTForImageClassification.from_vit(make_vit("vit"), num_attention_heads=4)
    assert "must be trained" in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(hidden_size=32), "hidden_size.*that of `vit`"),
        (dict(norm_type="dyt"), "norm_type.*that of `vit`"),
        (dict(gate_bias=2.0), "gate_bias.*no bias"),
        (dict(num_attention_heads=5), "num_attention_heads.*divisor"),
    ],
    ids=["size", "norm", "gate", "heads"],
)
def test_what_does_not_go_with_a_vit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AFTForImageClassification.from_vit(make_vit("vit", qkv_bias=False), **{"num_attention_heads": 4, **changes})


def test_another_model_is_no_vit():
    with pytest.raises(ValueError, match="vit.*vit or deit.*AFTForImageClassification"):
        AFTForImageClassification.from_vit(make_model())


# Around it


PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_convert_rgb": True}


@pytest.fixture
def folder(tmp_path):
    make_model("conv", torch.float32, num_channels=3, image_size=16).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 16
    return tmp_path


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines(folder, task):
    image = Image.new("L", (20, 30), 90)
    found = pipeline(task, model=str(folder))([image, image])
    if task == "image-classification":
        assert len(found) == 2 and {entry["label"] for entry in found[0]} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    else:
        assert torch.tensor(found[0]).shape == (1, 16, 16)


WITHOUT_PACKAGE = """
import sys
sys.modules["modeling_aft"] = None  # importing it now fails, also where it is installed
import torch
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from PIL import Image
folder, out = sys.argv[1:]
images = torch.load(out + "/images.pt")
head = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
found = pipeline("image-classification", model=folder, trust_remote_code=True)(Image.new("L", (20, 30), 90))
head.train()(images, labels=torch.tensor([0, 1])).loss.backward()
torch.save([head.eval()(images).logits, body(images).pooler_output, found], out + "/found.pt")
"""


def test_loads_without_the_package(folder, tmp_path):
    torch.save(images := torch.randn(2, 3, 24, 20), tmp_path / "images.pt")
    result = run(WITHOUT_PACKAGE, folder, tmp_path, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr
    logits, pooled, found = torch.load(tmp_path / "found.pt")
    model = AFTForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(logits, model(images).logits)
    torch.testing.assert_close(pooled, model.model(images).pooler_output)
    assert len(found) == 3


def test_gradient_checkpointing_with_lora_has_the_same_gradients():
    model = make_model(dtype=torch.float32)
    lora = LoraConfig(target_modules=["qkv_proj", "o_proj"], init_lora_weights=False, modules_to_save=["classifier"])
    model, images = get_peft_model(model, lora).train(), make_images(dtype=torch.float32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        model.zero_grad()
        model(pixel_values=images, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 2 * 2 + 2
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("variant", ["conv", "full"])
def test_exported_program_and_onnx_graph_equal_the_model(variant):
    """At any batch, and at any size of the images where there are no tables."""
    model = make_model(variant, torch.float32)
    shapes = {0: Dim("batch")}
    if variant in UNLIMITED:
        shapes |= {2: 4 * Dim("rows", max=64), 3: 4 * Dim("columns", max=64)}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"pixel_values": make_images(3, dtype=torch.float32)}, dynamic_shapes={"pixel_values": shapes}
        )
    assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    graph = torch.onnx.export(program, (), dynamo=True, verbose=False)
    serialized = onnx_ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    for size in [(2, 12, 16), (1, 8, 24), (2, 20, 12)] if variant in UNLIMITED else [(1, 12, 16), (4, 12, 16)]:
        images = make_images(*size, dtype=torch.float32)
        expected = model(images).logits.detach()
        torch.testing.assert_close(program.module()(pixel_values=images).logits, expected, rtol=0, atol=2e-5)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=2e-5)


def test_a_compiled_model_is_the_model():
    model, images = make_model("conv", torch.float32), make_images(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)
    loss = compiled(images, labels=torch.tensor([0, 2])).loss
    torch.testing.assert_close(loss, model(images, labels=torch.tensor([0, 2])).loss)


def test_int8_weights_say_nearly_the_same():
    model, images = make_model(dtype=torch.float32, hidden_size=64), make_images(dtype=torch.float32)
    before = model(images).logits
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mixer.qkv_proj.weight) is not torch.nn.Parameter
    error = (model(images).logits - before).norm() / before.norm()
    assert 0 < error < 0.05


def test_trainer_learns_and_scores(tmp_path):
    """Bright pictures are of one class, and dark ones of the other."""
    shade = torch.arange(64) % 2
    pictures = 0.1 * make_images(64, dtype=torch.float32) + shade.view(-1, 1, 1, 1)
    rows = [{"pixel_values": p, "labels": int(s)} for p, s in zip(pictures, shade, strict=True)]
    torch.manual_seed(0)
    model = AFTForImageClassification(make_config(num_labels=2, drop_path_rate=0.1))
    args = TrainingArguments(
        tmp_path,
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        report_to="none",
        gradient_accumulation_steps=2,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 < before
    trainer.save_model(tmp_path / "saved")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "saved").config.num_labels == 2


def test_the_gradients_of_a_layer_are_those_of_the_formula():
    mixer = make_model().model.layers[0].mixer
    hidden = torch.randn(1, 6, 16, dtype=torch.float64)
    upstream, parameters = torch.randn(1, 6, 16, dtype=torch.float64), list(mixer.parameters())
    found = torch.autograd.grad((mixer(hidden, Tokens(grid=(2, 3)))[0] * upstream).sum(), parameters)
    expected = torch.autograd.grad((mixed_by_hand(mixer, hidden, (2, 3), 0) * upstream).sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_a_folder_of_images_can_be_pushed(folder, capsys):
    push([str(folder), "me/images", "--dry_run"])
    output = capsys.readouterr().out
    assert " preprocessor_config.json" in output and " model.safetensors" in output
    card = ModelCard(output[output.index("---\n") :])
    assert (card.data.pipeline_tag, card.data.tags) == ("image-classification", ["aft_vision"])
    assert 'pipeline("image-classification", model=name, trust_remote_code=True)' in card.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no preprocessor_config.json"),
        (lambda path: path.write_text(json.dumps(PROCESSOR | {"image_mean": [0.5]})), "1 channels .* num_channels 3"),
    ],
    ids=["missing", "channels"],
)
def test_a_folder_whose_image_processor_does_not_fit_is_not_pushed(folder, change, message):
    change(folder / "preprocessor_config.json")
    with pytest.raises(ValueError, match=message):
        push([str(folder), "me/images", "--dry_run"])
