"""scripts/convert_z1t.py: random small trees in both formats become the models that they are, others are refused."""

import json

import convert_z1t
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from modeling_aft.compatibility import CACHE_NAME


VOCABULARY, WIDTH, LAYERS, HEADS, WINDOW, LENGTH = 19, 8, 2, 4, 3, 16
IDS = np.random.default_rng(5).integers(VOCABULARY, size=(2, 12))


def sinusoid_table():
    angle = np.arange(LENGTH)[:, None] * 1e4 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(LENGTH, WIDTH)


TABLES = {
    "sinusoidal": sinusoid_table(),
    "none": 1e-12 * sinusoid_table(),
    "learned": 0.5 * sinusoid_table(),
}


def make_tree(fan_in=None, table="sinusoidal") -> dict[str, np.ndarray]:
    """The arrays of a random model, by name, in the order of the published tree."""
    random, tree = np.random.default_rng(0), {}

    def floats(name, *shape, scale=1.0):
        tree[name] = (scale * random.standard_normal(shape)).astype(np.float32)

    def linear(name, inputs, outputs):
        is_sparse = fan_in is not None and fan_in < inputs
        floats(f"{name}.weight", outputs, fan_in if is_sparse else inputs, scale=0.5)
        floats(f"{name}.bias", outputs, scale=0.3)
        if is_sparse:
            rows = [random.choice(inputs, fan_in, replace=False) for _ in range(outputs)]
            tree[f"{name}.indices"] = np.array(rows, dtype=np.int32)

    def norm(name):
        floats(f"{name}.alpha")
        floats(f"{name}.weight", WIDTH)
        floats(f"{name}.bias", WIDTH, scale=0.3)

    floats("embedding.weight", VOCABULARY, WIDTH)
    tree["pe.pe"] = TABLES[table].astype(np.float32)
    for block in range(LAYERS):
        norm(f"blocks.{block}.norm1")
        linear(f"blocks.{block}.attn.qkv_proj", WIDTH, 2 * WIDTH + HEADS)
        linear(f"blocks.{block}.attn.out_proj", WIDTH, WIDTH)
        floats(f"blocks.{block}.attn.w_conv", HEADS, WINDOW)
        norm(f"blocks.{block}.norm2")
        linear(f"blocks.{block}.mlp.proj1", WIDTH, 4 * WIDTH)
        linear(f"blocks.{block}.mlp.proj2", 4 * WIDTH, WIDTH)
    norm("norm")
    floats("clf.weight", VOCABULARY, WIDTH)
    floats("clf.bias", VOCABULARY)
    return tree


def run_tree(tree, ids, tanh_linear, tanh_mlp) -> np.ndarray:
    """The logits [T, V] of ids [T], written as plainly as it gets, in float64."""
    tree = {name: array.astype(np.float64 if array.dtype.kind == "f" else int) for name, array in tree.items()}

    def linear(name, x, squashed=tanh_linear):
        weight, indices = tree[f"{name}.weight"], tree.get(f"{name}.indices")
        y = x @ weight.T if indices is None else (x[:, indices] * weight).sum(-1)
        y = y + tree[f"{name}.bias"]
        return np.tanh(y) if squashed else y

    def norm(name, x):
        return tree[f"{name}.weight"] * np.tanh(tree[f"{name}.alpha"] * x) + tree[f"{name}.bias"]

    def attend(name, x):
        query, value, key = np.split(linear(f"{name}.qkv_proj", x), [WIDTH, 2 * WIDTH], axis=1)
        taps, out = tree[f"{name}.w_conv"], np.zeros_like(query)
        for t in range(len(x)):
            for channel in range(WIDTH):
                head = channel // (WIDTH // HEADS)
                exponents = np.tanh(key[: t + 1, head])
                for offset in range(min(WINDOW, t + 1)):
                    exponents[t - offset] += taps[head, WINDOW - 1 - offset]
                weights = np.exp(exponents)
                average = (weights * value[: t + 1, channel]).sum() / weights.sum()
                out[t, channel] = np.tanh(query[t, channel]) * average
        return linear(f"{name}.out_proj", out)

    def feed_forward(name, x):
        hidden = linear(f"{name}.proj1", x)
        return linear(f"{name}.proj2", np.tanh(hidden) if tanh_mlp else hidden / (1 + np.exp(-hidden)))

    x = tree["embedding.weight"][ids] + tree["pe.pe"][: len(ids)]
    for block in range(LAYERS):
        x = x + attend(f"blocks.{block}.attn", norm(f"blocks.{block}.norm1", x))
        x = x + feed_forward(f"blocks.{block}.mlp", norm(f"blocks.{block}.norm2", x))
    return linear("clf", norm("norm", x), squashed=False)


def write_tree(path, arrays):
    with path.open("wb") as file:
        for array in arrays:
            np.save(file, array)


def write(path, tree):
    """A file in the format of its suffix; the conversion to safetensors has alphas of one dimension."""
    if path.suffix == ".eqx":
        write_tree(path, tree.values())
    else:
        save_file({name: np.atleast_1d(array) for name, array in tree.items()}, path)
    return path


def convert(tmp_path, tree, *flags, suffix=".eqx"):
    checkpoint = write(tmp_path / f"model{suffix}", tree)
    return convert_z1t.main([str(checkpoint), str(tmp_path / "converted"), *flags])


FLAGS = ["--no-tanh_linear", "--no-tanh_mlp"]


@pytest.mark.parametrize("tanh_mlp", [True, False], ids=["tanh-mlp", "silu"])
@pytest.mark.parametrize("tanh_linear", [True, False], ids=["tanh-linear", "plain-linear"])
@pytest.mark.parametrize("fan_in", [None, 4, 8], ids=["dense", "sparse", "one-layer-sparse"])
@pytest.mark.parametrize("suffix", [".eqx", ".safetensors"])
def test_logits_are_those_of_the_tree(suffix, fan_in, tanh_linear, tanh_mlp, tmp_path):
    tree = make_tree(fan_in)
    (tmp_path / "config.json").write_text(json.dumps({"tanh_linear": tanh_linear, "tanh_mlp": tanh_mlp}))
    folder = convert(tmp_path, tree, "--config", str(tmp_path / "config.json"), suffix=suffix)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tree["pe.pe"] = TABLES["sinusoidal"]  # which the model computes, and does not round as the file does
    expected = np.stack([run_tree(tree, ids, tanh_linear, tanh_mlp) for ids in IDS])
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_positions(table, tmp_path):
    tree = make_tree(4, table)
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path, tree, *FLAGS), dtype=torch.float64)
    assert model.config.position_embedding_type == table
    assert model.config.has_position_table == (table == "learned")
    expected = run_tree(tree, IDS[0], False, False)
    logits = model(torch.from_numpy(IDS[:1])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)  # a table in the file is that of float32


def test_the_model_decodes_and_is_saved_and_loaded(tmp_path):
    folder = convert(tmp_path, make_tree(4), *FLAGS)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.from_numpy(IDS)
    assert model.dtype == torch.float32 and model.lm_head.weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        outputs, parts = model(ids[:, :5]), []
        parts.append(outputs.logits)
        for t in range(5, ids.shape[1]):
            outputs = model(ids[:, t : t + 1], cache=outputs[CACHE_NAME])
            parts.append(outputs.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    written = model.generate(ids, max_new_tokens=2 * LENGTH, do_sample=False)
    assert written.shape == (2, 12 + 2 * LENGTH)  # there is no table to end at
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, whole)


def test_flags_win_over_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"tanh_linear": True, "tanh_mlp": False}}))
    folder = convert(tmp_path, make_tree(), "--config", str(tmp_path / "config.json"), "--tanh_mlp")
    config = json.loads((folder / "config.json").read_text())
    assert config["linear_activation"] == "tanh" and config["hidden_act"] == "tanh"


def without(name):
    return lambda tree: tree.pop(name)


def replaced(name, change):
    return lambda tree: tree.update({name: change(tree[name])})


WRONG_TREES = {
    "too-few": (without("clf.bias"), "norm|clf"),
    "too-many": (lambda tree: tree.update(more=np.zeros(3, np.float32)), "must go on with"),
    "nothing-but-embeddings": (lambda tree: [tree.pop(name) for name in list(tree)[1:]], "must go on with pe.pe"),
    "shape": (replaced("blocks.1.mlp.proj2.bias", lambda a: a[1:]), r"proj2.bias must be \[8\], got \[7\]"),
    "width-of-positions": (replaced("pe.pe", lambda a: a[:, :6]), r"pe.pe must be \[16, 8\], got \[16, 6\]"),
    "dtype": (replaced("norm.weight", lambda a: a.astype(np.float16)), "norm.weight must be torch.float32.*float16"),
    "whole-numbers": (replaced("embedding.weight", lambda a: a.astype(np.int32)), "embedding.weight.*floating-point"),
    "index": (replaced("blocks.0.attn.out_proj.indices", lambda a: a + 8), r"out_proj.indices must be in \[0, 8\)"),
    "fan-ins": (replaced("blocks.0.mlp.proj1.weight", lambda a: a[:, :3]), r"weight must be \[.*, 3\], got \[.*, 4\]"),
    "objects": (replaced("norm.bias", lambda a: a.astype("U3")), "must be a whole .npy of numbers"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TREES.values(), ids=WRONG_TREES)
def test_a_tree_of_another_kind_is_refused_and_nothing_written(change, message, tmp_path):
    tree = make_tree(4)
    change(tree)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tree, *FLAGS)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_file_that_ends_too_early_is_refused(cut, tmp_path):
    path = write(tmp_path / "model.eqx", make_tree(4))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"array \d+, at byte \d+: must be a whole .npy|must go on with"):
        convert_z1t.main([str(path), str(tmp_path / "converted"), *FLAGS])
    assert not (tmp_path / "converted").exists()


WRONG_NAMES = {
    "missing": (without("blocks.0.norm1.bias"), "there is none that becomes model.layers.0.mixer_norm.bias"),
    "unexpected": (lambda tree: tree.update(decay=np.zeros(8, np.float32)), "decay is unexpected"),
    "no-size": (without("blocks.0.attn.w_conv"), "must have blocks.0.attn.w_conv"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_names_of_another_model_are_refused(change, message, tmp_path):
    tree = make_tree(4)
    change(tree)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tree, *FLAGS, suffix=".safetensors")


def test_a_file_of_neither_format_is_refused(tmp_path):
    (tmp_path / "model.eqx").write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ValueError, match="must be .npy arrays or safetensors"):
        convert_z1t.main([str(tmp_path / "model.eqx"), str(tmp_path / "converted"), *FLAGS])


@pytest.mark.parametrize(
    ("published", "flags", "message"),
    [
        ({}, [], "--tanh_linear or --no-tanh_linear, --tanh_mlp or --no-tanh_mlp must be given"),
        ({"tanh_linear": True}, [], "--tanh_mlp or --no-tanh_mlp must be given"),
        ({"tanh_linear": 1, "tanh_mlp": True}, [], "must be true or false, got tanh_linear 1"),
        ({"n_layers": 4, "aft_ksize": 3}, FLAGS, "n_layers 4 is 2 in the checkpoint$"),
        ({"aft_kind": "recurrence"}, FLAGS, "aft_kind must be conv, got 'recurrence'"),
    ],
    ids=["nothing", "half", "number", "size", "kind"],
)
def test_what_is_told_must_be_whole_and_right(published, flags, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, make_tree(), "--config", str(tmp_path / "config.json"), *flags)


def test_a_folder_with_files_is_left_as_it_is(tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="new or an empty folder"):
        convert(tmp_path, make_tree(), *FLAGS)
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["notes"]
