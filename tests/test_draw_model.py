"""scripts/draw_model.py: what is drawn is what the mixers compute, and every kind of model has its pictures."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from families import AFT_VARIANTS, LIMIT, make_ids, make_model
from matplotlib.figure import Figure

from aft import drawing, model_pictures
from aft.commands import draw as draw_model
from modeling_aft import AFTForImageClassification, AFTVisionConfig


PICTURES = {
    "full": ["bias-map.png", "bias-curve.svg"],
    "local": ["bias-map.png", "bias-curve.svg"],
    "conv": ["bias-map.png", "bias-curve.svg"],
    "simple": [],
    "fixed-random": ["bias-map.png", "bias-curve.svg"],
    "random+dot_product": ["bias-map.png", "bias-curve.svg", "mixture.svg"],
    "dense+random+factorized_dense+dot_product": ["bias-map.png", "bias-curve.svg", "mixture.svg"],
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", AFT_VARIANTS)
def test_biases_are_those_of_the_mixer(variant, causal):
    model = make_model(variant, head=False, dtype=torch.float32, is_decoder=causal)
    mixer, length = model.layers[1].mixer, 20
    hidden = torch.randn(1, length, 16)
    query, key, value = mixer.split(mixer.qkv_proj(hidden)[0])
    found = model_pictures.position_bias(mixer, length)
    assert (found is None) == (variant in ("simple", "simple-nopos", "local-0"))
    pairs = np.zeros((1, length, length)) if found is None else model_pictures.as_pairs(*found, length, causal)
    pairs = torch.from_numpy(pairs).float().repeat_interleave(key.shape[1] // len(pairs), 0)
    logits = key.T[:, None] + pairs  # [D or H, T, T]
    if "decay" in variant:
        distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        logits = logits - mixer.decay()[:, None, None] * distance
    if causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    weights = logits.softmax(2).repeat_interleave(value.shape[1] // len(logits), dim=0)
    gate = torch.tanh if variant == "z1t" else torch.sigmoid
    out = mixer.o_proj(gate(query) * (weights * value.T[:, None]).sum(2).T)
    out = out.tanh() if variant == "z1t" else out
    torch.testing.assert_close(out, mixer(hidden)[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["full", "local", "conv"])
def test_rows_over_the_offset(variant):
    mixer = make_model(variant, head=False, dtype=torch.float32).layers[0].mixer
    kind, bias = model_pictures.position_bias(mixer, 9)
    pairs = model_pictures.as_pairs(kind, bias, 9, causal=True)
    offsets, rows = model_pictures.by_offset(kind, bias, 9, causal=True)
    assert offsets.tolist() == list(range(9 if variant == "full" else 5))
    for t in range(9):
        for index, offset in enumerate(offsets):
            if offset <= t:
                assert (rows[:, min(t, rows.shape[1] - 1), index] == pairs[:, t, t - offset]).all()
            elif variant != "conv":
                assert np.isnan(rows[:, t, index]).all()


def test_static_logits_of_a_synthesizer_are_weighted():
    mixer = make_model("random+dot_product", head=False, dtype=torch.float32).layers[0].mixer
    kind, bias = model_pictures.position_bias(mixer, 7)
    alpha = mixer.mixture_logits.softmax(1)[:, 0].detach()
    assert kind == "pairs" and alpha.std() > 0.01
    expected = alpha[:, None, None] * mixer.logits["random"].table[:, :7, :7].detach()
    torch.testing.assert_close(torch.from_numpy(bias), expected)


def uniform_share(length: int) -> np.ndarray:
    """Equal weights: query t gives 1 / (t + 1) to each distance up to t."""
    queries = range(length // 2, length)
    return np.array([np.mean([(d <= t) / (t + 1) for t in queries]) for d in range(length)])


def test_receptive_field_of_equal_keys_is_uniform():
    model = make_model("simple", head=False, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.qkv_proj.weight[16:32] = 0
    shares = model_pictures.receptive_field(model, make_ids(12))
    np.testing.assert_allclose(shares, np.tile(uniform_share(12), (2, 1)), rtol=1e-5)


def test_receptive_field_follows_the_bias():
    model = make_model("conv", head=False, dtype=torch.float32)
    with torch.no_grad():
        bias = model.layers[1].mixer.position_bias
        bias.weight.zero_()
        bias.weight[:, 3] = 1
        bias.gamma.fill_(50)  # only the offset 3 is left
    shares = model_pictures.receptive_field(model, make_ids(12))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert shares[1, 3] > 0.999 > shares[0].max()


@pytest.mark.parametrize("variant", ["full", "local", "conv", "simple", "conv-decay", "relative-decay", "z1t"])
def test_receptive_field_is_that_of_the_attention_weights(variant):
    model, ids = make_model(variant, head=False), make_ids(12)
    shares = model_pictures.receptive_field(model, ids)
    for found, weights in zip(shares, model(ids, output_attentions=True).attentions, strict=True):
        of_pairs = weights.mean((0, 1))[6:]  # of the queries of the second half
        expected = [of_pairs.diagonal(6 - distance).sum() / 6 for distance in range(12)]
        np.testing.assert_allclose(found, torch.stack(expected).detach(), rtol=1e-4, atol=1e-6)


def test_receptive_field_is_the_same_in_blocks(monkeypatch):
    model, ids = make_model("local", head=False, dtype=torch.float32), make_ids(40, batch=3)
    whole = model_pictures.receptive_field(model, ids)
    monkeypatch.setattr(model_pictures, "BLOCK", 1)
    np.testing.assert_allclose(model_pictures.receptive_field(model, ids), whole, rtol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each of the models in PICTURES is saved, and two that have nothing to draw."""
    base, found = tmp_path_factory.mktemp("models"), {}
    for variant in (*PICTURES, "dense", "dot_product-nopos"):
        found[variant] = str(base / variant)
        make_model(variant, dtype=torch.float32).save_pretrained(found[variant])
    return found


@pytest.mark.parametrize("variant", PICTURES)
def test_pictures_of_one_model(folders, tmp_path, variant):
    written = draw_model.main([folders[variant], "--output_dir", str(tmp_path), "--num_windows", "1"])
    names = [f"{variant}-{name}" for name in PICTURES[variant]]
    assert [path.name for path in written] == names + ["receptive-field.svg"] * (variant in AFT_VARIANTS)
    for path in written:
        assert 1000 < path.stat().st_size <= 300_000
        text = "" if path.suffix == ".png" else "".join(ElementTree.parse(path).getroot().itertext())
        assert path.suffix == ".png" or variant in text or path.name == "receptive-field.svg"
        if path.name.endswith("mixture.svg"):
            assert all(component in text for component in variant.split("+"))


def test_several_models_share_the_receptive_field(folders, tmp_path):
    chosen = [folders[name] for name in ("local", "fixed-random", "simple")]
    written = draw_model.main([*chosen, "--output_dir", str(tmp_path), "--length", "20", "--num_windows", "1"])
    text = "".join(ElementTree.parse(written[-1]).getroot().itertext())
    assert "local" in text and "simple" in text and "fixed-random" not in text and "T = 20" in text


@pytest.mark.parametrize(
    "more, message",
    [
        pytest.param(["{local}", "{dense}"], "dense has nothing to draw", id="dense"),
        pytest.param(["{dot_product-nopos}"], "has nothing to draw: .*dot_product", id="transformer"),
        pytest.param(["{local}", "--output_dir", ""], "--output_dir must be a path, got ''", id="no-output"),
        pytest.param(["nowhere"], "models: nowhere: no such folder", id="no-model"),
        pytest.param(["{local}", "--length", "1"], "--length must be at least 2, got 1", id="length"),
        pytest.param(["{local}", "--num_windows", "0"], "--num_windows must be at least 1", id="windows"),
        pytest.param(["{local}", "--length", str(LIMIT + 1)], "max_position_embeddings", id="long"),
        pytest.param(["{local}", "--dataset_path", "nowhere"], "no such file: nowhere", id="no-data"),
        pytest.param(
            ["{simple}", "--dataset_path", "{short}"],
            "valid split of one window, 48 tokens, or more, got 10",
            id="short",
        ),
    ],
)
def test_wrong_input_is_refused(folders, tmp_path, more, message):
    (tmp_path / "short").write_bytes(bytes(200))
    paths = {**folders, "short": str(tmp_path / "short")}
    argv = [paths.get(word.strip("{}"), word) for word in more]
    with pytest.raises(ValueError, match=message):
        draw_model.main(["--output_dir", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_two_models_of_one_name_are_told_apart(folders, tmp_path):
    make_model("local", dtype=torch.float32).save_pretrained(tmp_path / "other" / "local")
    models = model_pictures.load_models([model_pictures.Path(folders["local"]), tmp_path / "other" / "local"])
    assert len(models) == 2 and "other-local" in models


def test_large_picture_becomes_a_small_png(tmp_path, monkeypatch):
    figure = Figure(figsize=(6, 4))
    figure.add_subplot().imshow(np.random.default_rng(0).random((300, 300)))
    monkeypatch.setattr(drawing, "LARGEST", 60_000)
    path = drawing.save_figure(figure, tmp_path / "noise.svg")
    assert path == tmp_path / "noise.png" and list(tmp_path.iterdir()) == [path]
    assert 1000 < path.stat().st_size <= 60_000


def test_thinned_offsets_keep_the_near_ones():
    offsets = np.arange(-1023, 1024)
    kept = offsets[model_pictures.thinned(offsets)]
    assert set(range(-16, 17)) <= set(kept.tolist()) and {-1023, 1023} <= set(kept.tolist()) and len(kept) < 150


NAMES = ["a$x$b", "$\\frac$", "_hidden", "two words", "\u043c\u043e\u0434\u0435\u043b\u044c"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_folder_is_printed(tmp_path, name):
    make_model("local", dtype=torch.float32).save_pretrained(tmp_path / name)
    written = draw_model.main([str(tmp_path / name), "--output_dir", str(tmp_path / "out"), "--num_windows", "1"])
    text = "".join(ElementTree.parse(written[-1]).getroot().itertext())
    assert name in text
    assert [path.name for path in written] == [f"{name}-bias-map.png", f"{name}-bias-curve.svg", "receptive-field.svg"]


def image_model(folder, **changes):
    sizes = dict(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=4, kernel_size=3, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    model = AFTForImageClassification(AFTVisionConfig(**sizes, num_channels=1, position_bias_rank=4, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_bias" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def test_kernels_of_images_are_drawn_as_the_paper_does(tmp_path, monkeypatch):
    """exp(w) - 1, where w is the standardised kernel, scaled and shifted: six layers, a square for each head."""
    model = image_model(tmp_path / "images")
    drawn = []
    monkeypatch.setattr(model_pictures, "save_figure", lambda figure, path: drawn.append((figure, path)) or path)
    assert draw_model.main([str(tmp_path / "images"), "--output_dir", str(tmp_path)]) == [
        tmp_path / "images-kernels.png"
    ]
    rows = [axes for axes in drawn[0][0].axes if axes.get_ylabel().startswith("layer")]
    assert [axes.get_ylabel() for axes in rows] == [f"layer {layer}" for layer in (0, 1, 3, 4, 6, 7)]
    bias = model.model.layers[3].mixer.position_bias
    weight = bias.weight.detach()
    weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True, unbiased=False)
    expected = (bias.gamma[:, None] * weight + bias.beta[:, None]).exp().detach() - 1
    shown = rows[2].images[0].get_array()
    assert shown.shape == (3, 4 * 4 - 1)
    for head in range(4):
        square = np.asarray(shown[:, 4 * head : 4 * head + 3])
        np.testing.assert_allclose(square, expected[head].view(3, 3).numpy(), rtol=1e-4)


def test_pairs_of_patches_are_drawn(tmp_path):
    image_model(tmp_path / "full", aft_type="full")
    written = draw_model.main([str(tmp_path / "full"), "--output_dir", str(tmp_path)])
    assert [path.name for path in written] == ["full-bias-map.png", "full-bias-curve.svg"]


def test_an_image_model_without_biases_has_nothing_to_draw(tmp_path):
    image_model(tmp_path / "simple", aft_type="simple")
    with pytest.raises(ValueError, match="simple has nothing to draw: .* position biases, but simple"):
        draw_model.main([str(tmp_path / "simple"), "--output_dir", str(tmp_path)])
