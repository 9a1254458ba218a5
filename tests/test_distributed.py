"""Two processes on the CPU: DDP through the Trainer and the pre-training script, and sharding with fully_shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import BATCH, STEPS, new_optimizer, train_steps, train_with_trainer
from families import VARIANTS, make_config, make_ids, make_model
from launching import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_aft  # noqa: F401  (registers the model types)


TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What distributed_worker.py has left behind: one start of the processes for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    model = {**make_config("local", max_position_embeddings=16).to_diff_dict(), "hidden_dropout_prob": 0.1}
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "text.bin").write_bytes(bytes(range(256)) * 20)
    arguments = {"model_preset": "model.json", "dataset_path": "text.bin", "cache_dir": "cache"}
    arguments = {name: folder / path for name, path in arguments.items()}
    arguments |= {"batch_size": 4, "max_steps": 4, "save_every": 2, "log_every": 1, "warmup_steps": 1}
    arguments |= {"eval_every": 0, "sample_bytes": 0}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launch += [str(TESTS / "distributed_worker.py"), str(folder)]
    paths = [str(TESTS.parent), str(TESTS.parent / "scripts")]
    result = subprocess.run(
        [*launch, *(text for name, value in arguments.items() for text in (f"--{name}", str(value)))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return torch.load(folder / "found.pt")


def assert_equal(variant, actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{variant}: {text}", **tolerance)


def test_sharded_training_equals_one_process(found):
    for variant in VARIANTS:
        model = make_model(variant).train()
        losses = train_steps(model, new_optimizer(model), range(STEPS))
        assert losses[-1] < losses[0]
        assert_equal(variant, found[variant]["losses"], losses)
        assert_equal(variant, found[variant]["weights"], dict(model.state_dict()))


def test_sharded_run_that_is_resumed_ends_with_the_same_weights(found):
    for variant in VARIANTS:
        assert_equal(variant, found[variant]["resumed"], found[variant]["weights"], rtol=0, atol=0)


def test_weights_of_a_sharded_run_load_with_from_pretrained(found, folder):
    for variant in VARIANTS:
        loaded = AutoModelForCausalLM.from_pretrained(folder / variant, dtype=torch.float64)
        trained = make_model(variant)
        trained.load_state_dict(found[variant]["weights"])
        assert_equal(variant, loaded.state_dict(), trained.state_dict(), rtol=0, atol=0)
        # The last bits of a product depend on how its operands lie in memory.
        assert_equal(variant, loaded(make_ids(20)).logits, trained(make_ids(20)).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["local", "full-dense", "dense+random+factorized_dense+dot_product"])
def test_trainer_on_two_processes_equals_one(found, tmp_path, variant):
    assert_equal(variant, found[variant]["trainer"], train_with_trainer(make_model(variant).train(), tmp_path, BATCH))


def test_trainer_on_two_processes_needs_no_search_for_unused_parameters(found):
    """It has not raised for any variant, and every parameter has been trained."""
    for variant in VARIANTS:
        for name, parameter in make_model(variant).named_parameters():
            # A single tap, standardised, is 0 whatever weight and gamma are.
            idle = variant == "conv-1" and name.endswith(("position_bias.weight", "position_bias.gamma"))
            trained = not torch.equal(found[variant]["trainer"][name], parameter)
            assert trained != idle, f"{variant}: {name}"


def test_pretraining_on_two_processes_resumes_exactly(folder):
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    assert_equal("local", resumed, whole, rtol=0, atol=0)
    log = [json.loads(line) for line in (folder / "resumed" / "run.jsonl").read_text().splitlines()]
    assert [line["num_processes"] for line in log if line["event"] == "config"] == [2]
    assert [line["step"] for line in log if line["event"] == "resume"] == [2]
