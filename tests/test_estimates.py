"""What is said of a step before the first: operations and memory, beside what a step really takes."""

import json
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from small_runs import flags, make_inputs
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_aft  # noqa: F401  (registers the model types)
from aft.commands.pretrain import main
from aft.estimates import Estimate, bound, estimate
from aft.machine import peak_bytes
from aft.memory_needs import activation_problems
from aft.pretraining_arguments import parse_arguments
from aft.run_log import read_log


MODELS = Path(__file__).resolve().parent.parent / "configuration" / "models"
LENGTH = 256
PRESETS = ("aft-conv-tiny", "aft-local-tiny", "aft-simple-tiny", "aft-full-tiny", "transformer-tiny")


def config_of(preset: str):
    """That of a model of two layers."""
    return AutoConfig.for_model(**{**json.loads((MODELS / f"{preset}.json").read_text()), "num_hidden_layers": 2})


@pytest.mark.parametrize("preset", [*PRESETS, "synthesizer-dense-tiny"])
def test_memory_is_about_what_a_step_takes(preset):
    """Within a third: it leaves out what an operator needs for itself."""
    config, windows = config_of(preset), 4
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.zeros(windows, LENGTH, dtype=torch.long)

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()

    step()  # whose gradients stay
    found = estimate(config, LENGTH)
    assert found.state_bytes == 16 * sum(parameter.numel() for parameter in model.parameters())
    assert found.needed(windows) <= bound(config, windows, LENGTH)
    kept = found.needed(windows) - found.state_bytes
    peaks = [peak_bytes(step, "cpu") for _ in range(3)]
    if None not in peaks:
        peak = min(peaks)  # what else the process does with its memory comes on top
        assert 0.65 * peak < kept < 1.35 * peak


@pytest.mark.parametrize("layers", [3, 60])
def test_layers_count_alike(layers):
    def of(number: int) -> Estimate:
        return estimate(AutoConfig.for_model("aft", hidden_size=32, num_hidden_layers=number, aft_type="conv"), 64)

    one, two, many = of(1), of(2), of(layers)
    for name in ("flops_per_token", "state_bytes", "window_bytes"):
        first, second = getattr(one, name), getattr(two, name)
        assert getattr(many, name) == pytest.approx(first + (layers - 1) * (second - first), rel=1e-6), name


def test_operations_are_six_for_a_weight_and_token_and_those_of_the_mixing():
    config = config_of("transformer-tiny")
    model = AutoModelForCausalLM.from_config(config)
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    mixing = 12 * config.num_hidden_layers * LENGTH * config.hidden_size  # two products of T x T, forward and backward
    assert 6 * weights <= estimate(config, LENGTH).flops_per_token <= 6 * weights + mixing


def test_a_model_that_cannot_be_traced_has_no_estimate(monkeypatch):
    def forward(*args, **kwargs):
        raise NotImplementedError("needs values")

    monkeypatch.setattr("transformers.GPT2LMHeadModel.forward", forward)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1)
    assert estimate(config, 8) is bound(config, 1, 8) is None


FOUND = Estimate(flops_per_token=1.0, state_bytes=1000, window_bytes=100, batch_bytes=50)


@pytest.mark.parametrize(
    "memory, windows, expected",
    [
        (2000, 8, None),
        (1850, 8, None),
        (1849, 8, "a step needs about 1,850 bytes of memory, the device has 1,849; 4 would do"),
        (1349, 8, "2 would do"),
        (1100, 8, "no size would do"),
        (900, 1, "no size would do"),
    ],
)
def test_the_size_that_would_do_is_named(tmp_path, memory, windows, expected):
    args = parse_arguments(flags(make_inputs(tmp_path), "run", batch_size=8, micro_batch_size=windows))
    problems = activation_problems(args, FOUND, memory)
    assert problems == [] if expected is None else expected in problems[0]


def test_with_mixed_precision_it_only_warns(tmp_path, capsys):
    args = parse_arguments(flags(make_inputs(tmp_path), "run", batch_size=8, mixed_precision="bf16"))
    args.micro_batch_size = 8
    assert activation_problems(args, FOUND, 1100) == []
    assert "a step needs about 1,850 bytes" in capsys.readouterr().err


def test_a_run_says_what_it_needs_and_one_that_needs_too_much_is_refused(tmp_path, monkeypatch, on_the_cpu):
    argv = flags(make_inputs(tmp_path), tmp_path / "run", max_steps=1)
    memory = psutil.virtual_memory()
    with monkeypatch.context() as patch:
        patch.setattr("aft.memory_needs.device_memory", lambda: 130_000)
        with pytest.raises(ValueError, match="--micro_batch_size 4 with --sequence_length 16: a step .* 130,000; "):
            main(argv)
    assert not (tmp_path / "run").exists() and memory.total > 130_000
    main(argv)
    config, *_ = read_log(tmp_path / "run" / "run.jsonl")
    assert config["flops_per_token"] > 6 * 16 * 16 and config["megabytes_per_window"] > 0
    assert config["tokens"] == 4 * 16
