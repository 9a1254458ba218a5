"""scripts/pretrain_enwik8.py: arguments, the run folder, resumption, and independence of the number of processes."""

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
import yaml
from accelerate.state import AcceleratorState
from families import VARIANTS, make_model
from launching import launch_two_processes, program, start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from aft.checkpointing import complete_checkpoints
from aft.commands.generate import main as generate
from aft.commands.pretrain import main
from aft.optimization import Muon, create_optimizers, learning_rate, parameter_groups, set_learning_rate
from aft.pretraining import seed_step
from aft.pretraining_arguments import check_arguments, flag_name, parse_arguments, public_flags
from aft.run_log import read_log
from modeling_aft import ByteTokenizer


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "pretrain_enwik8.py"
LENGTH = 32
MODEL = {
    "model_type": "aft",
    "aft_type": "local",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": LENGTH,
    "window_size": 4,
    "position_bias_rank": 4,
    "hidden_dropout_prob": 0.1,
}


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model preset and a file of text that repeats itself, so that little training lowers the loss."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model.json").write_text(json.dumps(MODEL))
    words = np.random.default_rng(0).choice(["byte ", "model ", "state ", "window ", "é\n"], size=2000)
    (folder / "text.bin").write_bytes("".join(words).encode() + bytes(range(256)))
    return folder


def flags(inputs: Path, output_dir: Path | str, **changes) -> list[str]:
    """Those of a run that is longer than the small ones."""
    every = dict.fromkeys(("eval_every", "save_every", "sample_every"), 20)
    longer = {"batch_size": 8, "max_steps": 40, "warmup_steps": 10, "log_every": 5, "sample_bytes": 20, **every}
    return small_runs.flags(inputs, output_dir, **{**longer, "keep_checkpoints": None, **changes})


# Arguments


def test_explicit_flags_win_over_the_preset(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({"batch_size": 4, "learning_rate": "1e-3", "num_epochs": 2, "compile": True}))
    args = parse_arguments(["--batch_size", "6", "--training_preset", str(preset)])
    assert (args.batch_size, args.learning_rate, args.num_epochs, args.compile) == (6, 1e-3, 2.0, True)
    args = parse_arguments([f"--training_preset={preset}", "--max_steps=3", "--compile", "false"])
    assert (args.batch_size, args.max_steps, args.num_epochs, args.compile) == (4, 3, None, False)


@pytest.mark.parametrize(
    "text, expected",
    [
        pytest.param("mixed_precision: no", {"mixed_precision": "no"}, id="no-is-a-word"),
        pytest.param("compile: yes\nstreaming: on", {"compile": True, "streaming": True}, id="yes-and-on"),
        pytest.param("overwrite: off\ncompile: No", {"overwrite": False, "compile": False}, id="off-and-no"),
        pytest.param("dataset_path: null\nnum_epochs: ~\ndataset:", {"dataset_path": None}, id="null"),
        pytest.param("sample_prompt: 2024-01-01", {"sample_prompt": "2024-01-01"}, id="date"),
        pytest.param("sample_prompt: 2024-01-01 10:00:00", {"sample_prompt": "2024-01-01 10:00:00"}, id="time"),
        pytest.param("sample_prompt: 007", {"sample_prompt": "007"}, id="zeros"),
        pytest.param("sample_prompt: 1:30", {"sample_prompt": "1:30"}, id="base-sixty"),
        pytest.param("sample_prompt: ' 1 = --seed '", {"sample_prompt": " 1 = --seed "}, id="spaces-and-signs"),
        pytest.param("sample_prompt: --seed", {"sample_prompt": "--seed"}, id="like-a-flag"),
        pytest.param("model_override: [a=no, b=null]", {"model_override": ["a=no", "b=null"]}, id="list"),
        pytest.param("model_override: a=1", {"model_override": ["a=1"]}, id="list-of-one"),
        pytest.param("model_override: []", {"model_override": []}, id="empty-list"),
    ],
)
def test_a_preset_says_what_stands_there(tmp_path, text, expected):
    (tmp_path / "preset.yaml").write_text(text)
    args = parse_arguments(["--training_preset", str(tmp_path / "preset.yaml")])
    assert {name: getattr(args, name) for name in expected} == expected


def test_paths_in_a_preset_start_at_its_folder(tmp_path, monkeypatch):
    preset = tmp_path / "training" / "preset.yaml"
    preset.parent.mkdir()
    preset.write_text("model_preset: ../model.json\n")
    monkeypatch.chdir("/")
    assert Path(parse_arguments(["--training_preset", str(preset)]).model_preset).resolve() == tmp_path / "model.json"


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("batch_sise: 4\n", "unknown keys batch_sise", id="unknown-key"),
        pytest.param("- 4\n", "must be a mapping", id="no-mapping"),
        pytest.param("batch_size: many\n", "batch_size.*many", id="wrong-type"),
        pytest.param("batch_size: [1, 2]", r"batch_size must be one value, got \['1', '2'\]", id="list"),
        pytest.param("batch_size: {a: 1}", "batch_size must be one value, got {'a': '1'}", id="mapping"),
        pytest.param("batch_size: null", "batch_size must be one value, got null", id="null"),
        pytest.param("batch_size: 2024-01-01", "batch_size.*2024-01-01", id="date"),
        pytest.param("compile: 2", "--compile: .*boolean.*'2'|--compile.*2", id="no-boolean"),
        pytest.param("model_override: {a: 1}", "model_override must be a list of texts, got {'a': '1'}", id="no-list"),
        pytest.param("model_override: [[a]]", r"model_override must be a list of texts, got \[\['a'\]\]", id="lists"),
        pytest.param("seed: 1\nseed: 2", "'seed' stands there twice", id="twice"),
        pytest.param("1: 2\nnull: 3", "unknown keys 1, None", id="no-text-as-key"),
        pytest.param("[a]: 2", "preset.yaml: unhashable", id="list-as-key"),
        pytest.param("a: b: c", "preset.yaml: mapping values are not allowed", id="syntax"),
        pytest.param("seed: &a [*a]", "seed must be one value", id="endless"),
        pytest.param("seed: " + "[" * 2000, "preset.yaml: is nested too deeply", id="deep"),
        pytest.param("seed: !!timestamp 5", "preset.yaml: ", id="parser-error"),
        pytest.param("seed: !!python/name:os.system", "preset.yaml: .*python/name:os.system", id="python"),
        pytest.param("sample_prompt: \udcff", "preset.yaml: 'utf-8' codec", id="no-utf-8"),
        pytest.param("", "must be a mapping", id="empty"),
    ],
)
def test_wrong_preset_is_refused(tmp_path, text, message):
    (tmp_path / "preset.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments(["--training_preset", str(tmp_path / "preset.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, message", [("mkdir", "got a folder"), ("mkfifo", "got a pipe"), ("len", "no such")])
@pytest.mark.parametrize("name", ["training_preset", "model_preset"])
def test_preset_that_is_no_file_is_refused(tmp_path, name, kind, message):
    getattr(os, kind, len)(str(tmp_path / "preset"))
    with pytest.raises(ValueError, match=f"--{name}: .*{message}"):
        main([f"--{name}", str(tmp_path / "preset"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["--batch_sise", "4"], ["--batch", "4"], ["--max_steps", "few"]])
def test_wrong_flag_is_refused(argv):
    with pytest.raises(ValueError, match=argv[0]):
        parse_arguments(argv)


def test_a_list_may_be_given_in_parts_and_wins_over_that_of_a_preset(tmp_path):
    (tmp_path / "preset.yaml").write_text("model_override: [window_size=8, aft_type=local]")
    preset = ["--preset", str(tmp_path / "preset.yaml")]
    assert parse_arguments(preset).model_override == ["window_size=8", "aft_type=local"]
    parts = ["--model-override", "window_size=4", "--model_override", "aft_type=conv", "num_attention_heads=2"]
    assert parse_arguments([*preset, *parts]).model_override == [
        "window_size=4",
        "aft_type=conv",
        "num_attention_heads=2",
    ]
    assert parse_arguments(["--import", "a.py", "--import", "b.py", "c.py"]).imports == ["a.py", "b.py", "c.py"]


@pytest.mark.parametrize(
    "flag, name",
    [("--model", "model_preset"), ("--model-preset=a", "model_preset"), ("--import", "imports"), ("--seed", "seed")],
)
def test_a_flag_has_one_name_however_it_is_written(flag, name):
    assert flag_name(flag) == name


def test_a_path_given_by_an_alias_is_not_public():
    written = ["--model", "/home/me/model.json", "--import=/home/me/variant.py", "--preset", "/home/me/a.yaml"]
    assert "home" not in " ".join(public_flags(written))


def test_deepspeed_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as the launch file sets it
    with pytest.raises(ValueError, match="distributed_type .* must not be DEEPSPEED.*fsdp.yaml"):
        main(flags(inputs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"lr_decay": "steep", "adam_beta1": 1.5, "keep_checkpoints": 0}, {"batch_size": 6, "sequence_length": 64}],
    ids=["by-themselves", "with-the-model"],
)
def test_all_problems_are_in_one_error(inputs, tmp_path, wrong):
    with pytest.raises(ValueError) as caught:
        main(flags(inputs, tmp_path / "run", micro_batch_size=4, **wrong))
    for name, value in wrong.items():
        assert name in str(caught.value) and str(value) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"model_override": "hidden_sise=8"}, "hidden_sise=8", id="unknown-field"),
        pytest.param({"model_override": "window_size=-1"}, "window_size", id="value-of-field"),
        pytest.param(
            {"model_override": "vocab_size=100"},
            "vocab_size must be 256 for --tokenizer bytes, got 100",
            id="vocabulary",
        ),
        pytest.param({"model_preset": "nowhere.json"}, "no such file: nowhere.json", id="no-preset"),
        pytest.param({"eval_protocol": "carried"}, "--eval_stream_length .*tables .* end", id="carried-with-tables"),
        pytest.param(
            {"eval_refresh_every": 8}, "left out without --eval_protocol refreshed", id="refresh-of-segments"
        ),
        pytest.param({"num_epochs": 1}, "num_epochs", id="steps-and-epochs"),
        pytest.param({"dataset": "pydoc"}, "dataset_path", id="path-of-pydoc"),
        pytest.param({"sample_prompt": "a" * 32}, "sample_prompt", id="long-prompt"),
        pytest.param({"resume": "auto", "overwrite": True}, "overwrite", id="resume-and-overwrite"),
        pytest.param({"resume": "/nowhere"}, "resume /nowhere", id="no-checkpoint"),
        pytest.param(
            {"model_override": "initializer_range=NaN"}, "finite numbers, got initializer_range=nan", id="NaN"
        ),
        pytest.param({"model_override": "layer_norm_eps=1e999"}, "finite numbers, got layer_norm_eps=inf", id="inf"),
        pytest.param({"learning_rate": "nan"}, "--learning_rate must be a finite number, got nan", id="flag-nan"),
        pytest.param({"max_grad_norm": "inf"}, "--max_grad_norm must be a finite number, got inf", id="flag-inf"),
        pytest.param({"weight_decay": "1e999"}, "--weight_decay must be a finite number, got inf", id="flag-1e999"),
        pytest.param({"seed": 2**32}, "--seed must be less than 2\\^32, got 4294967296", id="seed"),
        pytest.param({"eval_every": 10**30}, "--eval_every must be less than 2\\^63", id="int64"),
        pytest.param({"sequence_length": 10**12}, "--sequence_length must be at most", id="length"),
        *(
            pytest.param({name: 10**12}, f"--{name} 1000000000000.*needs more than .* bytes", id=f"large-{name}")
            for name in ("eval_batch_size", "sample_bytes")
        ),
        pytest.param({"batch_size": 10**12}, "--micro_batch_size 1000000000000 with", id="large-batch"),
        *(
            pytest.param({"model_override": f"{name}=1000000000000"}, message, id=f"large-{name}")
            for name, message in {
                "hidden_size": "--model_preset .*: a tensor of it has too many elements",
                "max_position_embeddings": "--model_preset .*: needs more than [0-9,]+ bytes",
                "num_hidden_layers": "num_hidden_layers must be at most 1000000, got",
            }.items()
        ),
        pytest.param({"model_override": "num_hidden_layers=1000000"}, "--model_preset .*: needs more than", id="deep"),
    ],
)
def test_wrong_arguments_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["output_dir", "dataset_path", "cache_dir", "model_preset", "training_preset", "resume", "dataset_url"]
)
def test_empty_flag_is_refused(inputs, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--{name}"):
        main([*flags(inputs, tmp_path / "run"), f"--{name}", ""])
    assert list(tmp_path.iterdir()) == []


def test_flag_without_its_value_is_refused():
    for argv in (["--training_preset"], ["--seed"], ["--model_override"]):
        with pytest.raises(ValueError, match=f"{argv[0]}.*expected"):
            parse_arguments(argv)


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b'{"model_type": "aft", "layer_norm_eps": NaN}', "got layer_norm_eps=nan", id="NaN"),
        pytest.param(b'{"model_type": "aft", "x": [{"y": -Infinity}]}', "finite numbers, got x=", id="nested"),
        pytest.param(b'{"model_type": "aft", "model_type": "gpt2"}', "'model_type' stands there twice", id="twice"),
        pytest.param(b'{"model_type": ["aft"]}', "model.json: unhashable", id="list-as-type"),
        pytest.param(b'{"model_type": "no"}', "model.json: Unrecognized model identifier: no", id="unknown-type"),
        pytest.param(b'["aft"]', "must be a mapping", id="list"),
        pytest.param(b'{"hidden_size": 8}', "must be a JSON object with a model_type", id="no-type"),
        pytest.param(b'{"model_type": "\xe9"}', "model.json: 'utf-8' codec", id="latin-1"),
        pytest.param(b'{"model_type": ', "model.json: Expecting value", id="part"),
        pytest.param(b"[" * 100_000, "model.json: is nested too deeply", id="deep"),
        pytest.param(b"", "model.json: Expecting value", id="empty"),
    ],
)
def test_wrong_model_preset_is_refused(inputs, tmp_path, content, message):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        main(flags(inputs, tmp_path / "run", model_preset=tmp_path / "model.json"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_model_override_has_json_types(inputs, tmp_path):
    argv = flags(inputs, tmp_path, max_steps=1) + ["--model_override", "aft_type=conv", "num_attention_heads=4"]
    argv += ["tie_word_embeddings=false", "position_bias_rank=null"]
    with pytest.raises(ValueError, match="'aft_type=full': aft_type stands there twice"):
        check_arguments(parse_arguments([*argv, "aft_type=full"]), num_processes=1)
    config = check_arguments(parse_arguments(argv), num_processes=1)
    assert (config.aft_type, config.num_attention_heads, config.tie_word_embeddings) == ("conv", 4, False)
    assert config.position_bias_rank is None


@pytest.mark.parametrize("num_processes, allowed", [(1, True), (2, True), (3, False), (16, False)])
def test_batch_must_divide_among_processes(inputs, tmp_path, num_processes, allowed):
    args = parse_arguments(flags(inputs, tmp_path))
    if allowed:
        check_arguments(args, num_processes)
        assert args.micro_batch_size * num_processes == 8
    else:
        with pytest.raises(ValueError, match=f"batch_size must be divisible by {num_processes}, .*got 8"):
            check_arguments(args, num_processes)


# Optimisation


@pytest.mark.parametrize(
    "decay, at_peak, at_middle, at_end",
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 1.0, 0.55, 0.1),
        ("cosine", 1.0, 0.55, 0.1),
        ("inverse_sqrt", 1.0, math.sqrt(10 / 60), math.sqrt(10 / 110)),
    ],
)
def test_learning_rate(decay, at_peak, at_middle, at_end):
    args = parse_arguments(["--max_steps", "110", "--warmup_steps", "10", "--learning_rate", "2", "--lr_decay", decay])
    assert [learning_rate(step, args) / 2 for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    found = [learning_rate(step, args) / 2 for step in (10, 60, 110)]
    assert found == pytest.approx([at_peak, at_middle, at_end], rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("variant", "position"),
    [
        ({"aft_type": "local"}, {"query_factors", "key_factors"}),
        ({"aft_type": "full", "position_bias_rank": None}, {"table"}),
        ({"aft_type": "conv"}, {"weight", "gamma", "beta"}),
        ({"synthesizer_type": "mixture", "mixture_components": ["random", "factorized_random", "dense"]}, None),
    ],
    ids=["local", "full-table", "conv", "mixture"],
)
def test_parameter_groups(variant, position, tied):
    from modeling_aft import AFTConfig, AFTForCausalLM, SynthesizerConfig, SynthesizerForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": LENGTH, "num_attention_heads": 4}
    if position is None:
        position = {"table", "query_factors", "key_factors"}
        model = SynthesizerForCausalLM(SynthesizerConfig(**sizes, **variant, tie_word_embeddings=tied))
    else:
        model = AFTForCausalLM(AFTConfig(**sizes, **variant, tie_word_embeddings=tied))
    groups = parameter_groups(model, 0.5, 7.0)
    assert {name: (group["weight_decay"], group["lr_scale"]) for name, group in groups.items()} == {
        "linear": (0.5, 1.0),
        "head": (0.5, 1.0),
        "position": (0.0, 7.0),
        "rest": (0.0, 1.0),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: {names[id(parameter)] for parameter in group["params"]} for name, group in groups.items()}
    assert sorted(name for group in found.values() for name in group) == sorted(names.values())
    embedding = "model.embed_tokens.weight"
    assert found["head"] == {embedding if tied else "lm_head.weight"}
    assert (embedding in found["rest"]) != tied
    assert {name.rpartition(".")[2] for name in found["position"]} == position
    assert all(".position_bias." in name or ".logits." in name for name in found["position"])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found["linear"] == linear - {"lm_head.weight"}


def test_sparse_weights_decay_and_are_no_matrices_for_muon():
    from modeling_aft import AFTConfig, AFTForCausalLM

    groups = parameter_groups(AFTForCausalLM(AFTConfig(aft_type="conv", hidden_size=32, linear_fan_in=4)), 0.5)
    assert "linear" not in groups and len(groups["sparse"]["params"]) == 4 * 12
    assert groups["sparse"]["weight_decay"] == 0.5 and groups["sparse"]["lr_scale"] == 1.0


def test_optimizers_and_their_learning_rates():
    from modeling_aft import AFTConfig, AFTForCausalLM

    model = AFTForCausalLM(AFTConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=LENGTH))
    args = parse_arguments(["--optimizer", "muon", "--position_lr_scale", "5", "--adam_beta2", "0.9"])
    muon, adamw = optimizers = create_optimizers(model, args)
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.9)
    linear = {module.weight for name, module in model.named_modules() if name.endswith("_proj")}
    assert set(muon.param_groups[0]["params"]) == linear
    assert muon.param_groups[0]["weight_decay"] == 0.1
    everything = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    set_learning_rate(optimizers, 0.5)
    rates = {group["lr_scale"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {1.0: 0.5, 5.0: 2.5}
    assert [type(one) for one in create_optimizers(model, parse_arguments([]))] == [torch.optim.AdamW]


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_about_positions_have_their_own_learning_rate(variant):
    model = make_model(variant)
    found = {id(parameter) for parameter in parameter_groups(model, 0.0).get("position", {"params": []})["params"]}
    expected = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if ".position_bias." in name or ".random." in name or ".factorized_random." in name
    }
    assert found == expected


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (1, 5)], ids=str)
def test_muon_is_that_of_torch_in_float32(shape):
    """Against torch's, which rounds to bfloat16, and the singular values against the polynomial in float64."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"params": [], "weight_decay": 0.1}
    pair = [
        (ours, Muon([{**options, "params": [ours]}], lr=0.02)),
        (theirs, torch.optim.Muon([{**options, "params": [theirs]}], lr=0.02, adjust_lr_fn="match_rms_adamw")),
    ]
    for grad in grads:
        before = ours.detach().clone()
        for weight, optimizer in pair:
            weight.grad = grad.clone()
            optimizer.step()
        step = ((before * (1 - 0.02 * 0.1) - ours) / (0.02 * 0.2 * math.sqrt(max(shape)))).detach().double()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * 0.2 * math.sqrt(max(shape)) * 0.03)
    torch.testing.assert_close(pair[0][1].state[ours], pair[1][1].state[theirs])
    average, momentum = torch.zeros(shape, dtype=torch.float64), pair[0][1].defaults["momentum"]
    for grad in grads:
        average = momentum * average + (1 - momentum) * grad
    left, values, right = torch.linalg.svd(momentum * average + (1 - momentum) * grad, full_matrices=False)
    values = values / values.norm()
    a, b, c = pair[0][1].defaults["ns_coefficients"]
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(step, left @ torch.diag(values) @ right, rtol=0, atol=1e-3)


def test_muon_runs_a_closure_with_gradients_and_skips_what_has_none():
    used, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = Muon([{"params": [used, unused]}], lr=0.1)

    def closure() -> torch.Tensor:
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    assert (used != 1).all() and (unused == 1).all() and unused not in optimizer.state


def test_muon_trains_the_linear_layers_of_gpt2():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1))
    muon, _ = create_optimizers(model, parse_arguments(["--optimizer", "muon"]))
    trained = {id(weight) for group in muon.param_groups for weight in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in trained}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.0.{part}.weight" for part in parts}


def test_muon_refuses_models_without_linear_layers():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=256, n_embd=8, n_layer=0, n_head=1))
    with pytest.raises(ValueError, match="--optimizer must be adamw: GPT2LMHeadModel has no linear layers"):
        create_optimizers(model, parse_arguments(["--optimizer", "muon"]))


def test_muon_refuses_one_loss_scale(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("aft.pretraining.Accelerator.mixed_precision", "fp16")  # which wants a GPU
    with pytest.raises(ValueError, match="--optimizer must be adamw with fp16.*got 'muon'"):
        main(flags(inputs, tmp_path / "run", optimizer="muon"))
    assert not (tmp_path / "run").exists()


def test_each_step_of_each_process_has_its_own_random_numbers():
    def numbers(*where: int) -> tuple:
        seed_step(*where)
        return tuple(torch.rand(3).tolist())

    places = [(seed, step, process) for seed in (0, 1) for step in (0, 1) for process in (0, 1)]
    assert len({numbers(*place) for place in places}) == len(places)
    assert numbers(0, 1, 1) == numbers(0, 1, 1)


# Runs


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished: a run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main(flags(inputs, folder, report_to="tensorboard"))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def events(folder: Path, name: str) -> list[dict]:
    return [event for event in read_log(folder / "run.jsonl") if event["event"] == name]


def test_log(finished, inputs):
    (config,) = events(finished, "config")
    size = (inputs / "text.bin").stat().st_size
    assert [config[f"{split}_bytes"] for split in ("train", "valid", "test")] == pytest.approx(
        [size * 0.9, size * 0.05, size * 0.05], abs=1
    )
    assert (config["tokens_per_step"], config["arguments"]["batch_size"]) == (8 * LENGTH, 8)
    assert config["model_config"]["window_size"] == MODEL["window_size"]
    train = events(finished, "train")
    assert [event["step"] for event in train] == list(range(5, 41, 5))
    assert train[0]["bits_per_byte"] > 5 > train[-1]["bits_per_byte"]
    assert [(event["split"], event["step"]) for event in events(finished, "evaluation")] == [
        ("valid", 20),
        ("valid", 40),
        ("test", 40),
    ]
    assert [event["step"] for event in events(finished, "sample")] == [20]
    (final,) = events(finished, "final")
    assert final["sample"].startswith("The ")
    assert final["model_path"] == finished.name


def test_saved_folder_loads_and_scores_the_same(finished, inputs):
    model = AutoModelForCausalLM.from_pretrained(finished).eval()
    assert model.generation_config.do_sample
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert type(tokenizer) is ByteTokenizer
    limit = model.config.max_position_embeddings
    assert (tokenizer.model_max_length, model.generation_config.max_new_tokens) == (limit, limit // 2)
    content = (inputs / "text.bin").read_bytes()
    start = len(content) * 95 // 100
    nats = 0.0
    for first in range(start, len(content), LENGTH):
        window = torch.tensor([list(content[first - 1 : first + LENGTH])])
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits.double()
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    test = events(finished, "evaluation")[-1]
    assert test["bytes_scored"] == len(content) - start
    assert test["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(content) - start), rel=1e-5)


def test_a_model_without_a_limit_says_at_which_length_it_was_trained(inputs, tmp_path):
    model = {**MODEL, "aft_type": "simple", "position_embedding_type": "none"}
    (tmp_path / "model.json").write_text(json.dumps(model))
    changes = {"model_preset": tmp_path / "model.json", "sequence_length": 2 * LENGTH, "max_steps": 1}
    main(flags(inputs, tmp_path / "run", **changes))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.config.max_position_embeddings == 2 * LENGTH
    assert saved.generation_config.max_new_tokens is None
    assert AutoTokenizer.from_pretrained(tmp_path / "run").model_max_length > 1e20


def test_model_card_has_the_numbers_of_the_log(finished):
    card = (finished / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    test, (config,) = events(finished, "evaluation")[-1], events(finished, "config")
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "finished: a run"
    assert result["metrics"][0]["value"] == round(test["bits_per_byte"], 4)
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert f"{test['bits_per_byte']:.4f} | segments, T = {LENGTH}, {test['bytes_scored']} bytes, float32" in body
    assert config["data_sha256"] in body and config["command"] in body and "${" not in body


def test_curve_and_tensorboard_exist(finished):
    assert (finished / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").rglob("events.out.tfevents.*"))


def test_checkpoints_are_pruned(inputs, finished, tmp_path):
    assert [path.name for path in complete_checkpoints(finished / "checkpoints")] == ["step-20", "step-40"]
    main(flags(inputs, tmp_path / "run", max_steps=8, save_every=2, keep_checkpoints=3))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-4", "step-6", "step-8"]


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_finished_run_is_not_lost(finished, inputs, resume):
    weights = (finished / "model.safetensors").read_bytes()
    if resume == "none":
        with pytest.raises(ValueError, match="holds a run"):
            main(flags(inputs, finished, seed=1))
    else:
        main(flags(inputs, finished, resume="auto"))
        assert [event["step"] for event in events(finished, "train")] == list(range(5, 41, 5))
        assert len(events(finished, "evaluation")) == 3 and len(events(finished, "final")) == 1
    assert (finished / "model.safetensors").read_bytes() == weights


def test_overwrite_replaces_a_run(inputs, tmp_path):
    main(flags(inputs, tmp_path / "run", max_steps=4, save_every=2))
    final = main(flags(inputs, tmp_path / "run", max_steps=1) + ["--overwrite"])
    assert final["step"] == 1
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-1"]
    assert len(events(tmp_path / "run", "config")) == 1


def test_resume_from_the_checkpoint_of_another_folder(finished, inputs, tmp_path):
    main(flags(inputs, tmp_path / "run", resume=finished / "checkpoints" / "step-20"))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert [event["step"] for event in events(tmp_path / "run", "train")] == list(range(5, 41, 5))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [20]


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"learning_rate": 0.02}, "learning_rate is 0.02 but was 0.01", id="argument"),
        pytest.param({"model_override": "window_size=3"}, "'window_size': 3", id="model"),
    ],
)
def test_resume_refuses_another_run(finished, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, finished, resume="auto", **changes))


def test_resume_refuses_other_data(finished, inputs, tmp_path):
    (tmp_path / "text.bin").write_bytes((inputs / "text.bin").read_bytes()[1:])
    with pytest.raises(ValueError, match="data is '[0-9a-f]{64}' but was"):
        main(flags(inputs, finished, resume="auto", dataset_path=tmp_path / "text.bin"))


def test_killed_and_resumed_equals_uninterrupted(inputs, tmp_path):
    changes = {"max_steps": 120, "save_every": 30, "log_every": 1, "eval_every": 0, "sample_every": 0}
    changes["optimizer"] = "muon"  # and AdamW beside it
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with open(os.devnull, "wb") as nothing:
        streams = {"stdout": nothing.fileno(), "stderr": nothing.fileno()}
        process = start(program(SCRIPT), *flags(inputs, killed, **changes), **streams)
    steps_after_checkpoint = 0
    deadline = time.monotonic() + 120
    while steps_after_checkpoint < 3:
        assert process.is_alive() and time.monotonic() < deadline
        checkpoints = complete_checkpoints(killed / "checkpoints")
        if checkpoints:
            last_line = (killed / "run.jsonl").read_text().splitlines()[-1]
            if last_line.endswith("}"):
                steps_after_checkpoint = json.loads(last_line).get("step", 0) - int(checkpoints[-1].name[5:])
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (killed / "config.json").exists()
    # What an interrupted save leaves behind is no checkpoint.
    (killed / "checkpoints" / "step-110.tmp").mkdir()
    (killed / "checkpoints" / "step-115").mkdir()

    main(flags(inputs, killed, **changes, resume="auto"))
    main(flags(inputs, whole, **changes))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = [[event["bits_per_byte"] for event in events(folder, "train")] for folder in (killed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 120


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def without_dropout(inputs, tmp_path_factory) -> tuple[dict, Path]:
    """The flags and the folder of a run whose weights may depend on rounding only."""
    changes = {"max_steps": 10, "warmup_steps": 5, "model_override": "hidden_dropout_prob=0.0"}
    folder = tmp_path_factory.mktemp("runs") / "without_dropout"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main(flags(inputs, folder, **changes))
        AcceleratorState._reset_state(reset_partial_state=True)
    return changes, folder


@pytest.mark.parametrize("more", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
def test_micro_batches_change_only_the_rounding(inputs, without_dropout, tmp_path, more):
    changes, whole = without_dropout
    main(flags(inputs, tmp_path / "run", **changes, **more))
    torch.testing.assert_close(weights(tmp_path / "run"), weights(whole), rtol=0, atol=1e-4)


def test_compiled_run_saves_and_resumes(inputs, without_dropout, tmp_path, monkeypatch):
    changes, whole = without_dropout
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as --compile, without the time that inductor takes
    main(flags(inputs, tmp_path / "run", **changes, save_every=5))
    last = tmp_path / "run" / "checkpoints" / "step-10"
    last.rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "config.json").unlink()
    assert main(flags(inputs, tmp_path / "run", **changes, resume="auto"))["step"] == 10
    assert last.exists()
    assert weights(tmp_path / "run").keys() == weights(whole).keys()
    torch.testing.assert_close(weights(tmp_path / "run"), weights(whole), rtol=0, atol=1e-4)


def test_two_processes_equal_one(inputs, without_dropout, tmp_path):
    changes, one = without_dropout
    two = tmp_path / "two"
    result = launch_two_processes(SCRIPT, flags(inputs, two, **changes))
    assert events(two, "config")[0]["num_processes"] == 2
    assert result.stdout.count("test: ") == 1  # one process prints
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-4)
    scores = [[event.get("bits_per_byte") for event in read_log(folder / "run.jsonl")[1:-1]] for folder in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_sample_is_printed_in_every_encoding(inputs, tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("aft.pretraining.sample_text", lambda model, vocabulary, args: "\u4e2d \ufffd")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    main(flags(inputs, tmp_path / "run", max_steps=2, sample_every=1))
    stdout.flush()
    assert stdout.buffer.getvalue().count(b"\\u4e2d \\ufffd\n---") == 2


def test_wrong_flag_is_one_line():
    command = [sys.executable, str(SCRIPT), "--batch_size", "0"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("error: aft pretrain: --batch_size must be at least 1, got 0\n")


def test_default_data_needs_no_path(inputs, tmp_path):
    argv = flags(inputs, tmp_path / "run", max_steps=1, sample_bytes=0, eval_every=0)
    argv[argv.index("--dataset_path") : argv.index("--dataset_path") + 2] = []
    main(argv)
    assert events(tmp_path / "run", "config")[0]["data"].startswith("pydoc topics of Python")


@pytest.mark.parametrize(
    "protocol, of_protocol, described",
    [
        ("carried", {"stream_length": 100}, "L = 100"),
        ("refreshed", {"refresh_every": 40, "refresh_overlap": 8}, "R = 40, O = 8"),
    ],
)
def test_length_free_model_is_evaluated_in_streams(inputs, tmp_path, protocol, of_protocol, described):
    override = ["aft_type=simple", "position_embedding_type=none"]
    changes = {"eval_protocol": protocol, **{f"eval_{name}": value for name, value in of_protocol.items()}}
    main(flags(inputs, tmp_path / "run", max_steps=1, **changes) + ["--model_override", *override])
    test = events(tmp_path / "run", "evaluation")[-1]
    assert {name: test[name] for name in ("protocol", *of_protocol)} == {"protocol": protocol, **of_protocol}
    assert f"{protocol}, T = 32, {described}, " in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("components", [["dense"], ["random", "dot_product"]], ids="+".join)
def test_the_same_scripts_train_and_sample_a_synthesizer(inputs, tmp_path, capsys, components):
    model = {name: MODEL[name] for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings")}
    model |= {"model_type": "synthesizer", "num_attention_heads": 4}
    model |= {"synthesizer_type": "mixture", "mixture_components": components}
    (tmp_path / "model.json").write_text(json.dumps(model))
    folder = tmp_path / "run"
    main(flags(inputs, folder, model_preset=tmp_path / "model.json"))
    scores = [event["bits_per_byte"] for event in read_log(folder / "run.jsonl") if event["event"] == "train"]
    assert scores[-1] < scores[0] - 1
    capsys.readouterr()
    generate(["--model", str(folder), "--prompt", "byte ", "--max_new_tokens", "8"])
    out = capsys.readouterr().out
    assert out.startswith("byte ") and len(out) > len("byte \n")
    assert "synthesizer" in (folder / "README.md").read_text(encoding="utf-8")
