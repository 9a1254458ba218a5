"""What a run may do beside training: average its weights, keep the best, end early, begin with weights, and report."""

import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_runs import STEPS, checkpoints, flags, history, make_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from aft import pretraining
from aft.averaging import WeightAverage
from aft.commands.pretrain import main
from aft.pretraining import next_commands
from aft.pretraining_arguments import parse_arguments
from aft.run_log import read_log


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def cpu(on_the_cpu):
    yield


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    """The folder of a run without options."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main(flags(inputs, folder))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def scores(folder: Path, split: str = "valid") -> list[tuple[int, float]]:
    events = [event for event in read_log(folder / "run.jsonl") if event.get("split") == split]
    return [(event["step"], event["bits_per_byte"]) for event in events]


@pytest.fixture
def valid(monkeypatch):
    """A function that makes the scores on valid, one after the other, those of a list."""

    def give(values: list[float]) -> None:
        score, left = pretraining.evaluate_split, iter(values)

        def given(model, data, split, *args):
            result = score(model, data, split, *args)
            return result | ({"bits_per_byte": next(left)} if split == "valid" else {})

        monkeypatch.setattr(pretraining, "evaluate_split", given)

    return give


# The average


def test_an_average_is_that_of_the_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone().double()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    latest = model.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(model.weight.double(), expected)
    assert torch.equal(model.weight, latest)
    again = WeightAverage(torch.nn.Linear(3, 2), 0.5)
    again.load_state_dict(average.state_dict())
    assert again.num_steps == 20 and torch.equal(again.averages[0], average.averages[0])


def test_the_average_is_scored_and_saved_and_trains_nothing(inputs, trained, tmp_path):
    main(flags(inputs, tmp_path / "run", ema_decay=0.9))
    losses = [
        [event["bits_per_byte"] for event in read_log(folder / "run.jsonl") if event["event"] == "train"]
        for folder in (trained, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    assert scores(trained) != scores(tmp_path / "run")
    plain, averaged = weights(trained), weights(tmp_path / "run")
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    saved = torch.load(tmp_path / "run" / "checkpoints" / f"step-{STEPS}" / "custom_checkpoint_0.pkl")
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(trained).named_parameters()]
    for name, average in zip(names, saved["averages"], strict=True):
        assert torch.equal(averaged[name], average), name


def test_an_averaged_run_goes_on_exactly(inputs, tmp_path):
    for name in ("whole", "part"):
        main(flags(inputs, tmp_path / name, ema_decay=0.9))
    (tmp_path / "part" / "config.json").unlink()
    main(flags(inputs, tmp_path / "part", ema_decay=0.9, resume=tmp_path / "part" / "checkpoints" / "step-4"))
    assert history(tmp_path / "part") == history(tmp_path / "whole")
    assert (tmp_path / "part/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="ema_decay"):
        main(flags(inputs, tmp_path / "part", resume=tmp_path / "part" / "checkpoints" / "step-4"))


# The best


def test_the_best_is_kept_beside_the_newest(inputs, tmp_path, valid):
    valid([3.0, 1.0, 2.0, 2.5])
    main(flags(inputs, tmp_path / "run", keep_checkpoints=1))
    assert checkpoints(tmp_path / "run") == ["step-4", "step-8"]
    assert read_log(tmp_path / "run" / "run.jsonl")[-1]["step"] == 8


@pytest.mark.parametrize("interrupted", [False, True], ids=["whole", "interrupted"])
def test_a_run_may_end_with_the_best(inputs, trained, tmp_path, valid, interrupted):
    valid([3.0, 1.0, 2.0, 2.5] + ([2.5] if interrupted else []))
    best = {"load_best_model_at_end": True, "keep_checkpoints": 1}
    main(flags(inputs, tmp_path / "run", **best))
    if interrupted:
        (tmp_path / "run" / "config.json").unlink()
        main(flags(inputs, tmp_path / "run", **best, resume="auto"))
    final = read_log(tmp_path / "run" / "run.jsonl")[-1]
    assert final["step"] == 4 and checkpoints(tmp_path / "run") == ["step-4", "step-8"]
    found = weights(tmp_path / "run")
    saved = AutoModelForCausalLM.from_pretrained(trained)
    state = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert any(not torch.equal(found[name], weight) for name, weight in saved.state_dict().items())


@pytest.mark.parametrize(
    "values, patience, last",
    [
        ([3.0, 2.0, 1.0, 0.5], 1, 8),
        ([1.0, 2.0], 1, 4),
        ([1.0, 1.0], 1, 4),
        ([1.0, 2.0, 0.5, 2.0], 2, 8),
        ([2.0, 1.0, 1.5, 1.2], 2, 8),
        ([1.0, 2.0, 3.0], 2, 6),
    ],
)
def test_a_run_ends_when_its_patience_does(inputs, tmp_path, valid, values, patience, last):
    valid(values)
    main(flags(inputs, tmp_path / "run", early_stopping_patience=patience))
    events = read_log(tmp_path / "run" / "run.jsonl")
    assert [event["step"] for event in events if event["event"] == "train"][-1] == last
    assert events[-1]["event"] == "final" and events[-1]["step"] == last
    assert [step for step, _ in scores(tmp_path / "run")] == list(range(2, last + 1, 2))


def test_a_run_that_has_ended_early_has_ended(inputs, tmp_path, valid):
    valid([1.0, 2.0, 2.0])
    main(flags(inputs, tmp_path / "run", early_stopping_patience=1))
    (tmp_path / "run" / "config.json").unlink()
    main(flags(inputs, tmp_path / "run", early_stopping_patience=1, resume="auto"))
    assert read_log(tmp_path / "run" / "run.jsonl")[-1]["step"] == 4


# Weights to begin with


def test_a_run_begins_with_saved_weights(inputs, trained, tmp_path):
    more = {"model_preset": None, "init_from": trained, "max_steps": 2, "learning_rate": 1e-9}
    main(flags(inputs, tmp_path / "run", **more))
    found, expected = weights(tmp_path / "run"), weights(trained)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)
    assert scores(tmp_path / "run")[0][1] == pytest.approx(scores(trained)[-1][1], abs=1e-4)
    config, *_ = read_log(tmp_path / "run" / "run.jsonl")
    assert config["init_from"] == "trained" and config["arguments"]["tokenizer"] == "trained"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained further, from the weights of `trained`, on the data below." in card and "scratch" not in card
    assert "A token is a byte" in card


def test_fields_of_a_model_to_begin_with_may_change(inputs, trained, tmp_path):
    more = {"model_preset": None, "init_from": trained, "max_steps": 1, "model_override": "hidden_dropout_prob=0.3"}
    main(flags(inputs, tmp_path / "run", **more))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.hidden_dropout_prob == 0.3
    with pytest.raises(ValueError, match="--init_from .*its tensors are not those"):
        main(flags(inputs, tmp_path / "other", **{**more, "model_override": "hidden_size=32"}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_a_saved_model_gains_a_decay(inputs, trained, tmp_path, capsys, kind):
    # At rates of nothing it is the model that it was; the rates are those that a new model has.
    slow = ["--model_override", f"decay={kind}", "decay_min_half_life=1e8", "decay_max_half_life=1e8"]
    more = {"model_preset": None, "init_from": trained, "max_steps": 1, "learning_rate": 1e-9}
    main([*flags(inputs, tmp_path / "run", **more), *slow])
    assert f"not in {trained}, so new: model.layers.0.mixer.decay.weight" in capsys.readouterr().out
    assert scores(tmp_path / "run")[0][1] == pytest.approx(scores(trained)[-1][1], abs=1e-4)
    rates = AutoModelForCausalLM.from_pretrained(tmp_path / "run").model.layers[0].mixer.decay()
    torch.testing.assert_close(rates, torch.full_like(rates, math.log(2) / 1e8))


def test_a_preset_gives_way_to_a_model_to_begin_with(inputs, trained, tmp_path):
    (tmp_path / "preset.yaml").write_text("model_preset: nowhere.json\n")
    more = {"model_preset": None, "init_from": trained, "max_steps": 1, "training_preset": tmp_path / "preset.yaml"}
    main(flags(inputs, tmp_path / "run", **more))


# What is said at the end


@pytest.mark.parametrize(
    "text, expected",
    [([], "aft evaluate runs/a"), (["--dataset_path", "notes.txt"], "aft evaluate runs/a --dataset_path notes.txt")],
    ids=["text-at-hand", "file"],
)
def test_the_next_commands_score_the_same_text(text, expected):
    commands = next_commands(parse_arguments(["--output_dir", "runs/a", *text])).splitlines()
    assert any(line.endswith(expected) for line in commands)


# Trackers


def test_numbers_go_to_trackers(inputs, tmp_path):
    main(flags(inputs, tmp_path / "run", report_to="tensorboard"))
    [file] = (tmp_path / "run" / "tensorboard" / "aft").glob("events.out.tfevents.*")
    found = EventAccumulator(str(file)).Reload()
    points = [(event.step, event.value) for event in found.Scalars("valid/bits_per_byte")]
    assert points == [(step, pytest.approx(score, rel=1e-6)) for step, score in scores(tmp_path / "run")]
    assert [event.step for event in found.Scalars("train/bits_per_byte")] == list(range(1, STEPS + 1))


# What is refused


WRONG = {
    "decay": ({"ema_decay": 1}, "--ema_decay must be in \\(0, 1\\), got 1.0"),
    "patience": ({"early_stopping_patience": 0}, "--early_stopping_patience must be at least 1, got 0"),
    "no-evaluations": (
        {"early_stopping_patience": 1, "eval_every": 0},
        "--eval_every must be at least 1 with",
    ),
    "best-no-evaluations": ({"load_best_model_at_end": True, "eval_every": 0}, "at least 1 with --load_best"),
    "best-not-saved": ({"load_best_model_at_end": True, "save_every": 3}, "--save_every must be a divisor"),
    "both": ({"init_from": "{trained}"}, "--model_preset must be left out with --init_from"),
    "nowhere": ({"init_from": "runs/nowhere", "model_preset": None}, "--init_from runs/nowhere: no such folder"),
    "tracker": ({"report_to": "wanbd"}, "--report_to must be of those that are installed \\(.*\\), got \\['wanbd'\\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(inputs, trained, tmp_path, case):
    changes, message = WRONG[case]
    changes = {name: str(trained) if value == "{trained}" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
