"""Training with --carry_state: what is learned, exact resumption, and the models and flags that it is for."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_runs
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import load_file
from small_runs import STEPS, checkpoints, history
from transformers import AutoModelForCausalLM, DynamicCache

from aft import pretraining
from aft.commands.pretrain import main
from aft.optimization import create_optimizers, learning_rate, set_learning_rate
from aft.pretraining_arguments import check_arguments, parse_arguments
from aft.run_log import read_log
from aft.text_sources import split_ranges
from aft.training_windows import TrainingWindows


LENGTH, BATCH, STEPS_PER_STREAM = 16, 4, 5  # so that the second streams begin between two checkpoints
MODEL = {
    "model_type": "aft",
    "aft_type": "conv",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "window_size": 4,
    "position_embedding_type": "none",
    "hidden_dropout_prob": 0.1,
}


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.bin").write_bytes(np.random.default_rng(0).integers(97, 105, 400, dtype=np.uint8).tobytes())
    return folder


def flags(inputs: Path, output_dir: Path | str, **changes) -> list[str]:
    carried = {"carry_state": True, "sequence_length": LENGTH, "stream_length": STEPS_PER_STREAM * LENGTH}
    carried |= {"batch_size": BATCH, "micro_batch_size": 2}
    return small_runs.flags(inputs, output_dir, **{**carried, **changes})


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The folder of a run that saves, evaluates and samples every two steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main(flags(inputs, folder))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def streams_of(inputs: Path) -> tuple[np.ndarray, TrainingWindows]:
    """The text of the train split, and the streams of the runs."""
    content = np.frombuffer((inputs / "text.bin").read_bytes(), np.uint8)
    text = content[slice(*split_ranges(len(content))["train"])]
    stream_length = STEPS_PER_STREAM * LENGTH
    streams = TrainingWindows(lambda start, stop: text[start:stop], len(text), LENGTH, BATCH, 0, stream_length)
    return text, streams


def losses(folder: Path) -> list[float]:
    """The bits per byte of every step."""
    return [event["bits_per_byte"] for event in read_log(folder / "run.jsonl") if event["event"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# What is learned


@pytest.mark.parametrize("aft_type", ["conv", "simple"])
def test_a_row_is_read_as_one_text(inputs, tmp_path, aft_type):
    """The losses of weights that stay what they are: those of whole streams, each in one forward pass."""
    fixed = {"learning_rate": 1e-30, "weight_decay": 0}
    override = ["hidden_dropout_prob=0", "initializer_range=0.5", f"aft_type={aft_type}"]
    main([*flags(inputs, tmp_path / "run", **fixed), "--model_override", *override])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    text, streams = streams_of(inputs)
    expected = []
    for stream in range(2):
        starts = [streams.start(stream * STEPS_PER_STREAM, row) for row in range(BATCH)]
        ids = torch.tensor(np.stack([text[start : start + STEPS_PER_STREAM * LENGTH + 1] for start in starts])).long()
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        expected += [(part.mean() / math.log(2)).item() for part in nats.split(LENGTH, 1)]
    assert losses(tmp_path / "run") == pytest.approx(expected[:STEPS], rel=1e-5)


def train_plainly(inputs: Path, argv: list[str], carry: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses in bits per byte and the weights of a plain loop with the flags of a run."""
    args = parse_arguments(argv)
    config = check_arguments(args, num_processes=1)
    _, streams = streams_of(inputs)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizers = create_optimizers(model, args)
    found, states = [], None
    for step in range(args.max_steps):
        ids, labels = map(torch.from_numpy, streams.batch(step, range(BATCH)))
        cache = DynamicCache(config=config)
        if carry and step % STEPS_PER_STREAM:
            for layer, state in zip(cache.layers, states, strict=True):
                layer.load_state_dict(state)
        logits = model(input_ids=ids, cache=cache).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        set_learning_rate(optimizers, learning_rate(step, args))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        states = [layer.state_dict() for layer in cache.layers]  # copies without gradients
        found.append(loss.item() / math.log(2))
    return found, model.state_dict()


@pytest.mark.parametrize("optimizer, micro_batch_size", [("adamw", 2), ("muon", 4)])  # Muon rounds to bf16
def test_a_run_is_a_plain_loop_with_a_detached_state(inputs, tmp_path, optimizer, micro_batch_size):
    changes = {"optimizer": optimizer, "micro_batch_size": micro_batch_size}
    override = ["--model_override", "hidden_dropout_prob=0", "initializer_range=0.3"]
    argv = [*flags(inputs, tmp_path / "run", **changes), *override]
    main(argv)
    expected, trained = train_plainly(inputs, argv, carry=True)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-4, msg=lambda text, name=name: name + text)
    assert train_plainly(inputs, argv, carry=False)[0] != pytest.approx(expected, rel=1e-3)


def test_a_state_keeps_no_graph_and_does_not_grow(inputs, tmp_path, monkeypatch):
    train_step, sizes = pretraining.train_step, []

    def train(*args):
        nats, carried = train_step(*args), args[-1]
        assert list(carried.caches) == [0, 2]
        layers = [layer for cache in carried.caches.values() for layer in cache.layers]
        tensors = [tensor for layer in layers for tensor in layer.state if tensor is not None]
        assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert sizes[-1] == sum(tensor.nbytes for tensor in tensors)
        return nats

    monkeypatch.setattr(pretraining, "train_step", train)
    main(flags(inputs, tmp_path / "run"))
    assert len(sizes) == STEPS and len(set(sizes)) == 1


# Checkpoints


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_is_the_one_that_was_not_stopped(inputs, whole, tmp_path, step):
    main(flags(inputs, tmp_path / "run", resume=whole / "checkpoints" / f"step-{step}"))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert history(tmp_path / "run")[-7:] == history(whole)[-7:]


def test_what_happens_between_steps_leaves_the_state_alone(inputs, whole, tmp_path):
    """Checkpoints, evaluations and samples; but for those, the runs are the same."""
    main(flags(inputs, tmp_path / "run", eval_every=0, save_every=0, sample_bytes=0))
    assert losses(tmp_path / "run") == losses(whole)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("first_row", [0, 2])
@pytest.mark.parametrize(
    "damage, words", [(Path.unlink, "is missing"), (lambda path: path.write_bytes(b""), "is damaged")]
)
def test_a_checkpoint_without_its_states_is_none(inputs, whole, tmp_path, capsys, first_row, damage, words):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-8" / f"carried_state_{first_row}.safetensors")
    main(flags(inputs, tmp_path / "run", resume="auto"))
    error = capsys.readouterr().err
    assert f"step-8/carried_state_{first_row}.safetensors {words}" in error and "going on from" in error
    assert history(tmp_path / "run") == history(whole)
    assert checkpoints(tmp_path / "run") == checkpoints(whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"carry_state": False, "stream_length": None}, "carry_state is False but was", id="not-carried"),
        pytest.param({"stream_length": 32}, "stream_length is 32 but was 80", id="other-streams"),
        pytest.param({"micro_batch_size": 4}, "micro_batch_size is 4 but was 2", id="other-micro-batches"),
    ],
)
def test_resume_refuses_another_way_of_carrying(inputs, whole, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, whole, resume="auto", **changes))


def test_log_and_card_say_that_the_state_was_carried(whole):
    config, *_ = read_log(whole / "run.jsonl")
    assert config["arguments"]["carry_state"] is True
    assert config["arguments"]["stream_length"] == STEPS_PER_STREAM * LENGTH
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "| carry_state | `True` |" in card and f"| stream_length | `{STEPS_PER_STREAM * LENGTH}` |" in card


def test_compiled_run_is_the_same(inputs, tmp_path, monkeypatch):
    changes = {"save_every": 0, "sample_bytes": 0, "eval_every": 0}
    override = ["--model_override", "hidden_dropout_prob=0", "num_hidden_layers=1"]
    main([*flags(inputs, tmp_path / "eager", **changes), *override])
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as --compile, without the time that inductor takes
    main([*flags(inputs, tmp_path / "compiled", **changes), *override])
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=0, atol=1e-4)


# Models and flags


TABLES = "carry_state must be left out: this model's position tables end, got True"
GROWING = "carry_state must be left out: this model, .*, has no state of fixed size, got True"
GRADIENTS = "gradient_checkpointing must be left out with --carry_state"
SHORT = "--stream_length must be at most 179, as a train split of 360 tokens .* got"
MULTIPLE = r"--stream_length must be 2 sequence_length or more, a multiple of it \(16\), got"


@pytest.mark.parametrize(
    "config, changes, message",
    [
        pytest.param({"position_embedding_type": "learned"}, {}, TABLES, id="learned-positions"),
        pytest.param({"aft_type": "local"}, {}, TABLES, id="local"),
        pytest.param({"aft_type": "full"}, {}, GROWING, id="full"),
        pytest.param({"model_type": "synthesizer", "synthesizer_type": "dense"}, {}, GROWING, id="synthesizer"),
        pytest.param({"model_type": "gpt2", "n_embd": 8, "n_head": 1, "n_layer": 1}, {}, GROWING, id="gpt2"),
        pytest.param({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}, {}, GROWING, id="mamba"),
        pytest.param({}, {"gradient_checkpointing": True}, GRADIENTS, id="gradient-checkpointing"),
        pytest.param({}, {"stream_length": 192}, f"{SHORT} 192", id="short-text"),
        pytest.param({}, {"stream_length": None, "sequence_length": 60}, f"{SHORT} 240", id="short-text-by-default"),
        pytest.param({}, {"stream_length": 40}, f"{MULTIPLE} 40", id="no-multiple"),
        pytest.param({}, {"stream_length": 16}, f"{MULTIPLE} 16", id="nothing-to-carry"),
        pytest.param({}, {"stream_length": 0}, "--stream_length must be at least 1, got 0", id="no-length"),
        pytest.param({}, {"carry_state": False}, "stream_length must be left out without --carry_state", id="windows"),
    ],
)
def test_what_cannot_carry_a_state_is_refused(inputs, tmp_path, config, changes, message):
    fields = {**MODEL, **config} if config.get("model_type", "aft") == "aft" else {"vocab_size": 256, **config}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, tmp_path / "run", model_preset=tmp_path / "model.json", **changes))
    assert not (tmp_path / "run").exists()


def test_activation_checkpointing_of_a_launch_file_is_refused(inputs, tmp_path, monkeypatch):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        mixed_precision="no",
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=True)),
    )
    monkeypatch.setattr(pretraining, "Accelerator", lambda **options: accelerator)
    with pytest.raises(ValueError, match="--carry_state must be left out with fsdp_activation_checkpointing"):
        pretraining.make_accelerator(parse_arguments(flags(inputs, tmp_path / "run")))
    assert (
        pretraining.make_accelerator(parse_arguments(flags(inputs, "", carry_state=False, stream_length=None)))
        is accelerator
    )
