"""Two processes on the CPU: DDP through the Trainer and the pre-training script, and sharding with fully_shard."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from distributed_worker import (
    BATCH,
    CARRIED,
    KINDS,
    SEQ2SEQ,
    STEPS,
    carry_steps,
    make_any,
    new_optimizer,
    train_steps,
    train_with_trainer,
)
from families import make_config, make_ids, make_model
from launching import run_on_two_processes
from safetensors.torch import load_file

import modeling_aft  # noqa: F401  (registers the model types)
from aft.commands.pretrain import main as pretrain


TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What distributed_worker.py has left behind: one start of the processes for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    models = {
        "windows": {**make_config("local", max_position_embeddings=16).to_diff_dict(), "hidden_dropout_prob": 0.1},
        "carried": make_config("conv-nopos").to_diff_dict(),
    }
    for name, model in models.items():
        (folder / f"{name}.json").write_text(json.dumps(model))
    (folder / "text.bin").write_bytes(bytes(range(256)) * 20)
    arguments = {"dataset_path": folder / "text.bin", "cache_dir": folder / "cache"}
    arguments |= {"batch_size": 4, "max_steps": 4, "save_every": 2, "log_every": 1, "warmup_steps": 1}
    arguments |= {"eval_every": 0, "sample_bytes": 0}
    carried = {
        "carry_state": True,
        "sequence_length": 64,
        "stream_length": 256,
        "micro_batch_size": 1,
        "eval_batch_size": 2,
    }
    runs = {
        name: [
            text
            for flag, value in {"model_preset": folder / f"{name}.json", **arguments, **more}.items()
            for text in (f"--{flag}", str(value))
        ]
        for name, more in {"windows": {}, "carried": carried}.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    run_on_two_processes(TESTS / "distributed_worker.py", [str(folder)])
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return torch.load(folder / "found.pt")


def assert_equal(variant, actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{variant}: {text}", **tolerance)


def test_sharded_training_equals_one_process(found):
    for variant in KINDS:
        model = make_any(variant).train()
        losses = train_steps(model, new_optimizer(model), range(STEPS))
        assert_equal(variant, found[variant]["losses"], losses)
        assert_equal(variant, found[variant]["weights"], dict(model.state_dict()))
        assert train_steps(model, new_optimizer(model), range(1)) < losses[0]  # it learns what it has seen


def test_sharded_run_that_is_resumed_ends_with_the_same_weights(found):
    for variant in KINDS:
        assert_equal(variant, found[variant]["resumed"], found[variant]["weights"], rtol=0, atol=0)


def test_weights_of_a_sharded_run_load_with_from_pretrained(found, folder):
    for variant in KINDS:
        trained, ids = make_any(variant), make_ids(20)
        loaded = type(trained).from_pretrained(folder / variant, dtype=torch.float64)
        trained.load_state_dict(found[variant]["weights"])
        assert_equal(variant, loaded.state_dict(), trained.state_dict(), rtol=0, atol=0)
        # The last bits of a product depend on how its operands lie in memory.
        logits = [model(input_ids=ids, labels=ids).logits for model in (loaded, trained)]
        assert_equal(variant, *logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", CARRIED)
def test_sharded_training_that_carries_its_state_equals_one_process(found, variant):
    model = make_model(variant).train()
    losses = carry_steps(model, new_optimizer(model), range(STEPS))
    assert_equal(variant, found[variant]["carried"]["losses"], losses)
    assert_equal(variant, found[variant]["carried"]["weights"], dict(model.state_dict()))


@pytest.mark.parametrize("variant", ["local", "full-dense", "dense+random+factorized_dense+dot_product", SEQ2SEQ])
def test_trainer_on_two_processes_equals_one(found, tmp_path, variant):
    assert_equal(variant, found[variant]["trainer"], train_with_trainer(make_any(variant).train(), tmp_path, BATCH))


def test_trainer_on_two_processes_needs_no_search_for_unused_parameters(found):
    """It has not raised for any variant, and every parameter has been trained."""
    for variant in KINDS:
        for name, parameter in make_any(variant).named_parameters():
            # A single tap, standardised, is 0 whatever weight and gamma are.
            idle = variant == "conv-1" and name.endswith(("position_bias.weight", "position_bias.gamma"))
            trained = not torch.equal(found[variant]["trainer"][name], parameter)
            assert trained != idle, f"{variant}: {name}"


@pytest.mark.parametrize("name", ["windows", "carried"])
def test_pretraining_on_two_processes_resumes_exactly(folder, name):
    whole, resumed = (load_file(folder / run / "model.safetensors") for run in (name, f"{name}-resumed"))
    assert_equal(name, resumed, whole, rtol=0, atol=0)
    log = [json.loads(line) for line in (folder / f"{name}-resumed" / "run.jsonl").read_text().splitlines()]
    assert [line["num_processes"] for line in log if line["event"] == "config"] == [2]
    assert [line["step"] for line in log if line["event"] == "resume"] == [2]


def test_carried_state_on_two_processes_equals_one(folder, monkeypatch):
    """Two processes with two micro-batches of one row each, and one process with one micro-batch of four."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = json.loads((folder / "runs.json").read_text())["carried"]
    pretrain([*arguments, "--micro_batch_size", "4", "--output_dir", str(folder / "one")])
    AcceleratorState._reset_state(reset_partial_state=True)
    two, one = (load_file(folder / name / "model.safetensors") for name in ("carried", "one"))
    assert_equal("carried", two, one, rtol=0, atol=1e-4)
    states = [path.name for path in (folder / "carried" / "checkpoints" / "step-2").glob("carried_state_*")]
    assert sorted(states) == [f"carried_state_{row}.safetensors" for row in range(4)]
