"""aft compare with classifiers of pictures: plans, entries, and that the table says what the runs have left."""

import json
import shutil
from pathlib import Path
from statistics import fmean, median, stdev
from xml.etree import ElementTree

import pytest
import yaml
from comparisons import (
    check_that_changed_entries_are_refused,
    check_that_nothing_is_trained_again,
    finish,
    no_training,
    plan_flags,
    run_folder,
    table,
    without_processes,  # noqa: F401
)
from test_classify import save_idx

from aft import comparison
from aft.commands.compare import main
from aft.compare_classified import Classified
from aft.compare_plan import read_plan
from aft.compare_pretrained import Pretrained
from aft.compare_table import columns_of
from aft.comparison import describe_entries, plan_runs
from aft.finetuning_trainer import FinetuningTrainer, Stopwatch
from aft.flags import CONFIGURATION
from aft.settings_files import read_json


VIT = {
    **{"model_type": "vit", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "patch_size": 4},
}
PLAN = {
    "command": "classify",
    "training": {
        "data": "pictures",
        "recipe": "none",
        "class_names": ["columns", "flat", "rows"],
        "num_train_epochs": 2,
        "validation_share": 0.4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    },
    "seeds": [0, 1],
    "reference": "vit",
    "runs": {
        "vit": {"model": "vit.json", "training": {"per_device_train_batch_size": 9}},
        "simple": {
            "model": "aft-simple-mini",
            "model_override": {"hidden_size": 8, "num_hidden_layers": 1},
            "training": {"per_device_train_batch_size": 6},
        },
    },
}
SPLITS = {"valid": "eval_accuracy", "test": "test_accuracy"}


def make_inputs(folder: Path, **changes) -> Path:
    (folder / "vit.json").write_text(json.dumps(VIT))
    (folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    save_idx(folder / "pictures")
    return folder


@pytest.fixture
def inputs(tmp_path) -> Path:
    return make_inputs(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a plan, of which all runs are finished."""
    folder = make_inputs(tmp_path_factory.mktemp("comparison"))
    return finish(folder, plan_flags(folder))


def log(folder: Path) -> list[dict]:
    return read_json(folder / "trainer_state.json", "run")["log_history"]


# Plans


def test_shipped_plan(tmp_path):
    plan = read_plan(CONFIGURATION / "compare" / "images.yaml")
    save_idx(tmp_path / "pictures")
    data = ["--data", str(tmp_path / "pictures"), "--class_names", "columns", "flat", "rows"]
    planned = plan_runs(plan, tmp_path, plan.seeds[:1], data)
    entries = dict(zip(plan.runs, describe_entries(Classified(), planned), strict=True))
    models = {name: entry["model_config"] for name, entry in entries.items()}
    kernels = {name: models.pop(name) for name in list(models)[5:]}
    assert list(models) == ["aft-conv", "vit", "resnet", "aft-full", "aft-simple"] and plan.reference == "vit"
    for entry in entries.values():
        assert (entry["num_train_epochs"], entry["per_device_train_batch_size"]) == (2, 64)
        assert (entry["learning_rate"], entry["horizontal_flip"], entry["warmup_steps"]) == (0.002, True, 0.05)
        assert entry["classes"] == ["columns", "flat", "rows"]
    sizes = {name: model.get("hidden_size") for name, model in models.items()}
    assert sizes == {"aft-conv": 64, "vit": 64, "resnet": None, "aft-full": 64, "aft-simple": 64}
    assert models["resnet"]["hidden_sizes"] == [32, 48, 64]
    changes = {
        "aft-conv-4-heads": {"num_attention_heads": 4},
        "aft-conv-64-heads": {"num_attention_heads": 64},
        "aft-conv-plain-kernels": {"conv_reparameterization": False},
        "aft-conv-zero-kernels": {"position_bias_init_mean": 0.0, "position_bias_init_std": 0.0},
    }
    defaults = {"conv_reparameterization": True, "position_bias_init_mean": 0.0, "position_bias_init_std": 0.0}
    for name, change in changes.items():
        assert {**defaults, **kernels[name]} == {**defaults, **models["aft-conv"], **change}
    assert set(kernels) == set(changes)


def test_shipped_plan_of_sub_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("aft.memory_needs.bound", lambda *sizes: None)  # what a step takes, which takes long to find
    plan = read_plan(CONFIGURATION / "compare" / "pictures.yaml")
    save_idx(tmp_path / "pictures")
    planned = plan_runs(plan, tmp_path, [0], ["--pictures", str(tmp_path / "pictures"), "--test_size", "4"])
    entries = dict(zip(plan.runs, describe_entries(Pretrained(), planned), strict=True))
    assert plan.reference in entries and len({json.dumps(entry) for entry in entries.values()}) == len(entries)
    models = {name: entry["model_config"] for name, entry in entries.items()}
    for name, model in models.items():
        assert (entries[name]["max_steps"], entries[name]["batch_size"]) == (600, 4)
        sizes = [model[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")]
        assert sizes == [257, 128, 4, 784]
    windows = [models[f"aft-local-{size}"]["window_size"] for size in ("28", "112", "112-table")]
    assert windows == [28, 112, 112] and models["aft-local-112-table"]["position_bias_rank"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param(
            {"command": "finetune"}, "must be one of pretrain, classify, seq2seq, got 'finetune'", id="command"
        ),
        pytest.param({"training_preset": "small"}, "the plan has unknown keys training_preset", id="preset"),
        pytest.param({"training": {"batch_size": 2}}, "training has unknown keys batch_size", id="flag-of-pretrain"),
        pytest.param({"training": {"seed": 2}}, "training has unknown keys seed", id="flag-set-here"),
        pytest.param({"runs": {"a": {"model_preset": "vit-mini"}}}, "run a must have a model", id="no-model"),
        pytest.param({"runs": {"a": {"model": "vit-mimi"}}}, "did you mean vit-mini", id="unknown-model"),
        pytest.param(
            {"runs": {"a": {"model": "vit-mini", "training": {"split_seed": 1}}}}, "split_seed", id="data-of-a-run"
        ),
    ],
)
def test_wrong_plan_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(make_inputs(tmp_path, **{"reference": None, **changes}) / "plan.yaml")


@pytest.mark.parametrize(
    "more, message",
    [
        pytest.param(["--per_device_train_batch_size", "8"], "must be left out: run vit", id="flag-of-a-run"),
        pytest.param(["--model", "vit-mini"], "--model must be left out: run vit", id="flag-set-here"),
        pytest.param(["--learning_rate", "-1"], "run vit: .*learning_rate must be at least 0", id="value"),
        pytest.param(["--recipe", "tiny"], "run vit: .*--recipe tiny: no such file or preset", id="recipe"),
        pytest.param(["--num_train_epochs", "0"], "num_train_epochs must be positive, got 0", id="no-training"),
        pytest.param(["--early_stopping_patience", "1"], "early_stopping_patience must be left out", id="stops-early"),
        pytest.param(["--class_names", "a", "b"], "--class_names must be 3 names", id="classes"),
        pytest.param(["--image_size", "10"], "run simple: .*image_size", id="patches"),
    ],
)
def test_wrong_flags_are_refused_before_any_training(inputs, monkeypatch, more, message):
    monkeypatch.setattr(comparison, "run_process", no_training)
    with pytest.raises(ValueError, match=message):
        main(plan_flags(inputs, *more))
    assert not (inputs / "runs").exists()


# Runs


def test_table_says_what_the_runs_have_left(finished):
    rows = table(finished)
    assert list(rows) == ["vit", "simple"] and tuple(rows["vit"]) == columns_of(Classified())
    for name, steps in (("vit", 4), ("simple", 6)):
        folders, row = [run_folder(finished, name, seed) for seed in (0, 1)], rows[name]
        results = [read_json(folder / "all_results.json", "run") for folder in folders]
        for split, key in SPLITS.items():
            scores = [result[key] for result in results]
            assert float(row[split]) == pytest.approx(fmean(scores), rel=1e-5)
            assert float(row[f"{split}_std"]) == pytest.approx(stdev(scores), rel=1e-5)
        curves = [[line["eval_accuracy"] for line in log(folder) if "eval_accuracy" in line] for folder in folders]
        assert [max(curve) for curve in curves] == [result["eval_accuracy"] for result in results]  # of the best
        assert (row["epochs"], row["steps"], row["pictures"], row["seeds"]) == ("2", str(steps), "36", "0 1")
        assert row["parameters"] == str(results[0]["num_parameters"])
        speeds = [[line["samples_per_second"] for line in log(folder) if "loss" in line] for folder in folders]
        assert [len(each) for each in speeds] == [steps] * 2
        assert float(row["pictures_per_second"]) == pytest.approx(max(map(median, speeds)), rel=1e-5)
        assert float(row["seconds"]) == pytest.approx(36 / float(row["pictures_per_second"]), rel=1e-4)
        assert row["valid_protocol"] == "12 pictures, best of 2 checkpoints by accuracy"
        assert (row["test_protocol"], row["precision"], row["data"]) == ("6 pictures", "float32", "pictures")
        assert "threads" in row["hardware"] and "torch" in row["versions"] and "plan.yaml" in row["command"]
        assert int(row["peak_bytes"]) >= 0
        last = fmean(curve[-1] for curve in curves)
        if float(row["seconds"]) <= float(row["equal_seconds"]):
            assert float(row["valid_at_equal_seconds"]) == pytest.approx(last, rel=1e-5)
    assert rows["vit"]["equal_seconds"] == rows["simple"]["equal_seconds"] == rows["vit"]["seconds"]


def test_document_and_picture(finished):
    text, rows = (finished / "out" / "compare-plan.md").read_text(encoding="utf-8"), table(finished)
    best = max(float(row["valid"]) for row in rows.values())
    for name, row in rows.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"{float(row['test']):.4f} ± {float(row['test_std']):.4f}" in line
        assert ("**" in line) == (float(row["valid"]) == best)
    assert "Scores are accuracy" in text and "held out at equal wall-clock" in text
    picture = "".join(ElementTree.parse(finished / "out" / "compare-plan.svg").getroot().itertext())
    assert all(words in picture for words in ("accuracy, held out", "pictures", "training seconds"))
    assert all(f"{name} {float(row['valid']):.4f}" in picture for name, row in rows.items())


def test_finished_runs_are_skipped_and_a_table_needs_no_data(finished, tmp_path, monkeypatch):
    def lose_data(folder: Path) -> None:
        shutil.rmtree(folder / "pictures")

    check_that_nothing_is_trained_again(finished, tmp_path / "copy", monkeypatch, lose_data)


def other_data(folder: Path) -> None:
    shutil.rmtree(folder / "pictures")
    save_idx(folder / "pictures", num_train=33)


def other_model(folder: Path) -> None:
    (folder / "vit.json").write_text(json.dumps({**VIT, "hidden_size": 16}))


@pytest.mark.parametrize(
    "change, more, message",
    [
        pytest.param(None, ["--learning_rate", "0.02"], "vit-seed0: learning_rate is 0.02 but was 0.01", id="flag"),
        pytest.param(other_data, [], "simple-seed1: data is {'train': '[0-9a-f]{64}'.* but was", id="data"),
        pytest.param(other_model, ["--table_only"], "vit-seed1: model_config is .* but was", id="model-of-table"),
    ],
)
def test_changed_entries_are_refused(finished, tmp_path, monkeypatch, change, more, message):
    check_that_changed_entries_are_refused(finished, tmp_path / "copy", monkeypatch, change, more, message)


def test_an_entry_of_another_version_of_transformers(finished, tmp_path, monkeypatch):
    """A flag that it lacks, or has alone, does not count."""
    monkeypatch.setattr(comparison, "run_process", no_training)
    folder = shutil.copytree(finished, tmp_path / "copy")
    path = run_folder(folder, "vit", 0) / "entry.json"
    entry = read_json(path, "run")
    entry["gone"] = entry.pop("neftune_noise_alpha")
    path.write_text(json.dumps(entry), encoding="utf-8")
    main(plan_flags(folder))
    assert table(folder) == table(finished)


def test_interrupted_run_continues(finished, tmp_path):
    """After the first of two epochs: the weights are those of a run that never stopped, and the speed is known."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    run = run_folder(folder, "vit", 0)
    before = read_json(run / "all_results.json", "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    main(plan_flags(folder, "--only", "vit"))
    after = read_json(run / "all_results.json", "run")
    assert [after[key] for key in ("train_samples", "eval_loss", "test_loss")] == [
        before[key] for key in ("train_samples", "eval_loss", "test_loss")
    ]
    assert [line["step"] for line in log(run) if "loss" in line and "samples_per_second" in line] == [1, 2, 3, 4]
    assert table(folder)["vit"]["peak_bytes"] != ""


def test_a_run_that_only_scored_has_no_peak_of_training(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (run_folder(folder, "vit", 0) / "result.json").unlink()
    main(plan_flags(folder))
    assert read_json(run_folder(folder, "vit", 0) / "result.json", "run")["peak_bytes"] is None
    assert table(folder)["vit"]["peak_bytes"] == "" and table(folder)["simple"]["peak_bytes"] != ""


def test_speed_is_that_of_steps_alone(monkeypatch):
    """Two steps of a second each in a fifth of an epoch, between which an evaluation takes a minute."""
    watch, now = Stopwatch(), [0.0]
    monkeypatch.setattr("aft.finetuning_trainer.perf_counter", lambda: now[0])
    state = type("State", (), {"epoch": 3.0})()

    def after(seconds: float, event, epoch: float | None = None):
        now[0] += seconds
        state.epoch = epoch or state.epoch
        event(None, state, None)

    after(5, watch.on_epoch_begin)
    after(1, watch.on_step_end, epoch=3.1)
    after(60, watch.on_evaluate)
    after(1, watch.on_step_end, epoch=3.2)
    assert watch.seconds == 2 and watch.speed() == pytest.approx(0.1)
    assert watch.speed() is None


def test_failed_run_leaves_no_result(inputs, monkeypatch):
    def diverge(self, *args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(FinetuningTrainer, "training_step", diverge)
    with pytest.raises(FloatingPointError):
        main(plan_flags(inputs, "--only", "vit", "--seeds", "0"))
    assert not (run_folder(inputs, "vit", 0) / "result.json").exists()
