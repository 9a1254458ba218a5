"""scripts/finetune.py: nothing that was trained is lost, nothing else is continued, and no NaN passes for a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_finetune import finetune, interrupted, leave_no_state, save_model, state, weights, write_table  # noqa: F401
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from aft import finetuning_arguments
from aft.finetuning_trainer import FinetuningTrainer
from aft.folder_lock import locked
from aft.seq2seq_flags import Seq2SeqInputs


ROOT = Path(__file__).resolve().parent.parent
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
ROWS = [{"text": text, "label": label} for text, label in zip("abcdefghijklmnop", ["x", "y"] * 8, strict=True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", "aft", hidden_dropout_prob=0.2)


@pytest.fixture
def text(tmp_path) -> dict[str, Path]:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 9)
    return {"text_file": tmp_path / "text.txt", "per_device_train_batch_size": 4}


@pytest.fixture
def table(tmp_path) -> dict[str, Path]:
    return {"labelled_file": write_table(tmp_path / "table.csv", ROWS), "validation_share": 0.25}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def scores(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in state(folder)["log_history"] if "eval_loss" in line]


# Evaluations


def fail_at(step: int, error: Exception):
    """`Trainer.evaluate` that fails in the middle of training."""
    evaluate = Trainer.evaluate

    def evaluate_or_fail(self, *args, **options):
        if self.state.global_step == step and self.is_in_train:
            raise error
        return evaluate(self, *args, **options)

    return evaluate_or_fail


@pytest.mark.parametrize("strategy, step", [("steps", 6), ("best", 4), ("epoch", 10)])
def test_an_evaluation_that_fails_costs_nothing(base, text, tmp_path, monkeypatch, strategy, step):
    values = {"model": base, **text, **STEPS, "save_strategy": strategy, "metric_for_best_model": "bits_per_byte"}
    if strategy == "epoch":  # an epoch has 5 steps
        values |= {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Trainer, "evaluate", fail_at(step, MemoryError()))
        finetune(tmp_path / "run", **values)
    assert f"checkpoint-{step}" in checkpoints(tmp_path / "run")
    finetune(tmp_path / "run", **values, resume_from_checkpoint="auto")
    finetune(tmp_path / "whole", **values)
    assert scores(tmp_path / "run") == scores(tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole")
    run, whole = (state(tmp_path / name) for name in ("run", "whole"))
    for name in ("best_metric", "best_global_step", "global_step"):
        assert run[name] == whole[name]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_failed_last_evaluation_leaves_the_model(base, text, tmp_path, monkeypatch):
    evaluate = FinetuningTrainer.evaluate

    def fail_after_training(self, *args, **options):
        if not self.is_in_train:
            raise OSError("no space")
        return evaluate(self, *args, **options)

    monkeypatch.setattr(FinetuningTrainer, "evaluate", fail_after_training)
    with pytest.raises(OSError, match="no space"):
        finetune(tmp_path / "run", model=base, **text, **STEPS)
    assert (tmp_path / "run" / "model.safetensors").is_file() and (tmp_path / "run" / "config.json").is_file()


def test_the_result_of_an_evaluation_that_cannot_be_written_costs_nothing(base, text, tmp_path, monkeypatch):
    save = TrainerState.save_to_json

    def fill_the_disk(self, path):
        if any("eval_loss" in line for line in self.log_history):
            Path(path).write_text("{")
            raise OSError("No space left on device")
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", fill_the_disk)
    values = {"model": base, **text, **STEPS}
    with pytest.raises(OSError, match="checkpoint-2 cannot be written: No space left on device"):
        finetune(tmp_path / "run", **values)
    monkeypatch.undo()
    finetune(tmp_path / "run", **values, resume_from_checkpoint="true")
    finetune(tmp_path / "whole", **values)
    assert scores(tmp_path / "run") == scores(tmp_path / "whole")


def test_a_metric_that_cannot_be_loaded_ends_the_run_before_training(base, text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((OSError, ValueError)):
        finetune(tmp_path / "run", model=base, **text, **STEPS, cache_dir=tmp_path / "file")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_leaves_the_random_state_alone(base, text, tmp_path):
    values = {"model": base, **text, "max_steps": 6, "save_strategy": "no", "load_best_model_at_end": False}
    for name, strategy in (
        ("with", {"eval_strategy": "steps", "eval_steps": 1}),
        ("without", {"eval_strategy": "no"}),
    ):
        finetune(tmp_path / name, **values, **strategy)
    assert all(torch.equal(w, weights(tmp_path / "with")[n]) for n, w in weights(tmp_path / "without").items())


# Resumption


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory) -> dict[str, Path]:
    """Runs of both modes that ended at step 3, and beside each the files that it was made of."""
    folder = tmp_path_factory.mktemp("stopped")
    files = {"text": {"text_file": folder / "text.txt"}, "table": {"labelled_file": folder / "table.csv"}}
    (folder / "text.txt").write_bytes(bytes(range(32, 127)) * 9)
    write_table(folder / "table.csv", ROWS)
    for mode, data in files.items():
        interrupted(folder / mode, 3, model=base, **data, **STEPS, per_device_train_batch_size=4)
    return folder


def resume(stopped: Path, tmp_path: Path, mode: str, base: Path, **changes):
    """Continues a copy of a run, if it is not there yet, with other files or flags."""
    if not (tmp_path / "run").exists():
        shutil.copytree(stopped / mode, tmp_path / "run")
    data = {"text": {"text_file": "text.txt"}, "table": {"labelled_file": "table.csv"}}[mode]
    values = {"model": base, **STEPS, "per_device_train_batch_size": 4, "resume_from_checkpoint": "auto"}
    values |= {name: stopped / file for name, file in data.items()}
    return finetune(tmp_path / "run", **{**values, **changes})


@pytest.mark.parametrize("mode", ["text", "table"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.02}, "learning_rate is 0.02 but was 0.01"),
        ({"seed": 1}, "seed is 1 but was 42"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size is 8 but was 4"),
        ({"max_steps": 8}, "max_steps is 8 but was 6"),
        ({"max_length": 20}, "max_length is 20 but was None"),
        ({"validation_share": 0.3}, "validation_share is 0.3 but was 0.1"),
        ({"weight_decay": 0.1, "seed": 2}, "seed is 2 but was 42; weight_decay is 0.1 but was 0.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_not_continued(base, stopped, tmp_path, mode, changes, message):
    with pytest.raises(ValueError, match=f"checkpoint-2: cannot resume: {message}$"):
        resume(stopped, tmp_path, mode, base, **changes)
    assert not (tmp_path / "run" / "config.json").exists()


SHA256 = "'[0-9a-f]{64}'"


def test_other_data_or_weights_are_not_continued(base, stopped, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "text.txt").write_bytes((stopped / "text.txt").read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"cannot resume: text_file is {SHA256} but was {SHA256}$"):
        resume(stopped, other, "text", base, text_file=other / "text.txt")
    shutil.rmtree(other / "run")
    with pytest.raises(ValueError, match=f"cannot resume: validation_file is {SHA256} but was None$"):
        resume(stopped, other, "text", base, validation_file=stopped / "text.txt")
    shutil.rmtree(other / "run")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.bias"] += 1
    shutil.copytree(base, other / "model")
    save_file(tensors, other / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"cannot resume: model_weights is {SHA256} but was {SHA256}$"):
        resume(stopped, other, "text", other / "model")


def test_renamed_labels_are_not_continued(base, stopped, tmp_path):
    renamed = [{**row, "label": {"x": "z", "y": "y"}[row["label"]]} for row in ROWS]
    table = write_table(tmp_path / "table.csv", renamed)
    with pytest.raises(
        ValueError, match="model_config.id2label.0 is 'y' but was 'x'; .*id2label.1 is 'z' but was 'y'"
    ):
        resume(stopped, tmp_path, "table", base, labelled_file=table)


def test_what_changes_no_weights_may_change(base, stopped, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(stopped / "table.csv", tmp_path / "moved.csv")
    changes = {"labelled_file": tmp_path / "moved.csv", "predict_file": tmp_path / "moved.csv", "logging_steps": 1}
    changes |= {"per_device_eval_batch_size": 2, "save_total_limit": 5, "dataloader_num_workers": 0}
    resume(stopped, tmp_path, "table", tmp_path / "moved", **changes)
    assert state(tmp_path / "run")["global_step"] == 6 and checkpoints(tmp_path / "run")[0] == "checkpoint-2"


def test_flags_that_may_change_exist():
    known = set(vars(finetuning_arguments.parse_arguments(["--model", "m", "--text_file", __file__])[1]))
    for inputs in (finetuning_arguments.InputArguments, Seq2SeqInputs):
        known |= set(inputs.__dataclass_fields__)
    assert finetuning_arguments.MAY_DIFFER_ON_RESUME <= known


def without_identity(text: str) -> str:
    content = json.loads(text)
    del content["stateful_callbacks"]["RunIdentity"]
    return json.dumps(content)


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(without_identity, "checkpoint-2: it does not say what its run is made of", id="older-version"),
        pytest.param(lambda text: "{}", "checkpoint-2: it does not say what its run is made of", id="empty-object"),
        pytest.param(lambda text: "[1]", "checkpoint-2: it does not say what its run is made of", id="list"),
        pytest.param(lambda text: text[:100], "no whole checkpoint", id="cut"),
        pytest.param(lambda text: "", "no whole checkpoint", id="empty"),
    ],
)
def test_a_checkpoint_of_an_unknown_run_is_refused(base, stopped, tmp_path, change, message):
    shutil.copytree(stopped / "text", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        resume(stopped, tmp_path, "text", base, resume_from_checkpoint=path.parent)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "is damaged: it has another sha256 than it was saved with"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: it has another sha256"),
    "gone": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named(base, stopped, tmp_path, capsys, damage, name):
    change, message = DAMAGES[damage]
    shutil.copytree(stopped / "text", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / name
    change(path)
    with pytest.raises(ValueError, match=f"no checkpoint is whole: {path} {message}"):
        resume(stopped, tmp_path, "text", base)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*checkpoint-2: {path} {message}"):
        resume(stopped, tmp_path, "text", base, resume_from_checkpoint=path.parent)


def test_a_run_goes_back_past_a_damaged_checkpoint(base, text, tmp_path, capsys):
    values = {"model": base, **text, **STEPS, "save_total_limit": 5}
    interrupted(tmp_path / "run", 5, **values)
    flip(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    finetune(tmp_path / "run", **values, resume_from_checkpoint="auto")
    assert (
        f"damaged: it has another sha256 than it was saved with: going on from {tmp_path}" in capsys.readouterr().err
    )
    finetune(tmp_path / "whole", **values)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert scores(tmp_path / "run") == scores(tmp_path / "whole")


def test_the_best_checkpoint_is_not_loaded_if_it_is_damaged(base, text, tmp_path):
    values = {"model": base, **text, **STEPS, "save_total_limit": 5}
    finetune(tmp_path / "whole", **values)
    best = state(tmp_path / "whole")["best_global_step"]
    interrupted(tmp_path / "run", 5, **values)
    assert best == 6 or (tmp_path / "run" / f"checkpoint-{best}").is_dir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="best checkpoint cannot be loaded: "):
        patch.setattr("aft.finetuning_trainer.find_damage", lambda path: f"{path} is damaged")
        finetune(tmp_path / "run", **values, resume_from_checkpoint="auto")


def test_an_older_checkpoint_of_the_folder_does_not_mix_with_newer_ones(base, text, tmp_path):
    values = {"model": base, **text, **STEPS, "save_total_limit": 5}
    interrupted(tmp_path / "run", 5, **values)
    before = checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has newer checkpoints \(checkpoint-4\)"):
        finetune(tmp_path / "run", **values, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert checkpoints(tmp_path / "run") == before == ["checkpoint-2", "checkpoint-4"]
    values["resume_from_checkpoint"] = tmp_path / "run" / "checkpoint-2"
    finetune(tmp_path / "branch", **values)
    assert state(tmp_path / "branch")["global_step"] == 6


def test_two_runs_do_not_share_a_folder(base, text, tmp_path):
    values = {"model": base, **text, **STEPS}
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match=f"--output_dir .*run is in use by process {os.getpid()} on "):
            finetune(tmp_path / "run", **values)
    finetune(tmp_path / "run", **values)


# Numbers that are none


@pytest.mark.parametrize("mode", ["text", "table"])
def test_a_run_that_diverges_fails_and_saves_nothing(base, text, table, tmp_path, mode):
    data = text if mode == "text" else table
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        finetune(tmp_path / "run", model=base, **data, learning_rate=1e30, num_train_epochs=3, max_grad_norm=0)
    for path in (tmp_path / "run").rglob("model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_last_step_that_diverges_fails(base, text, tmp_path):
    """Its loss is a number, what it leaves is none."""
    values = {"learning_rate": 1e38, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "optim": "sgd"}
    with pytest.raises(FloatingPointError, match="after step 1, .* is not finite: lower --learning_rate"):
        finetune(tmp_path / "run", model=base, **text, **values, weight_decay=1e38, load_best_model_at_end=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_fails(base, text, tmp_path, monkeypatch, number):
    monkeypatch.setattr("aft.finetuning.sum_nats", lambda logits, labels: logits[:, 0, 0] * number)
    with pytest.raises(FloatingPointError, match="eval_bits_per_byte is (nan|inf|-inf)"):
        finetune(tmp_path / "run", model=base, **text, **STEPS)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("mode", ["text", "table"])
def test_an_incomplete_model_is_refused(base, text, table, tmp_path, mode):
    shutil.copytree(base, tmp_path / "model")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.bias"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="--model .*model: its tensors .*; missing: model.norm.bias$"):
        finetune(tmp_path / "run", model=tmp_path / "model", **(text if mode == "text" else table))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, value",
    [
        *[(name, "nan") for name in ("learning_rate", "validation_share", "early_stopping_threshold", "adam_beta1")],
        *[("learning_rate", "inf"), ("learning_rate", "-1"), ("weight_decay", "nan"), ("num_train_epochs", "nan")],
        *[("seed", "1000000000000"), ("seed", "-1"), ("split_seed", "-1"), ("output_dir", ""), ("cache_dir", "")],
        *[("resume_from_checkpoint", ""), ("prediction_loss_only", "true"), ("logging_nan_inf_filter", "true")],
        ("batch_eval_metrics", "true"),
    ],
)
def test_wrong_values_are_refused_by_name(base, text, tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    values = {"output_dir": tmp_path / "run", **text, flag: value}
    argv = [word for name, given in values.items() for word in (f"--{name}", str(given))]
    with pytest.raises(ValueError, match=f"--{flag} must be "):
        finetuning_arguments.parse_arguments(["--model", str(base), *argv])


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left"), RuntimeError("PytorchStreamWriter failed\nC++ frames")]
)
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_full_disk_is_one_line_and_leaves_no_model(base, text, tmp_path, monkeypatch, error, strategy):
    save = Trainer._save

    def fill_the_disk(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        (Path(output_dir) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(Trainer, "_save", fill_the_disk)
    values = {"model": base, **text, "num_train_epochs": 1, "save_strategy": strategy}
    values |= {"eval_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(OSError, match="run/(checkpoint-5|.model-.*) cannot be written: .*(No space left|failed)$"):
        finetune(tmp_path / "run", **values)
    assert not {"config.json", "model.safetensors"} & {path.name for path in (tmp_path / "run").glob("*")}
    monkeypatch.undo()
    finetune(tmp_path / "run", **values, resume_from_checkpoint="auto")
    assert load_file(tmp_path / "run" / "model.safetensors")


def test_a_file_is_no_output_folder(base, text, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="--output_dir must be a folder"):
        finetune(tmp_path / "run", model=base, **text)


def test_the_program_prints_labels_anywhere_and_errors_in_one_line(base, tmp_path):
    rows = [{**row, "label": {"x": "\u0441\u043f\u0430\u043c", "y": "caf\u00e9"}[row["label"]]} for row in ROWS]
    files = {"labelled_file": write_table(tmp_path / "\u043f\u0438\u0441\u044c\u043c\u0430.csv", rows)}
    files["predict_file"] = files["labelled_file"]
    flags = {"model": base, **files, "output_dir": tmp_path / "run", "num_train_epochs": 1, "use_cpu": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py")]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "labels: caf\\xe9 (8 rows), \\u0441\\u043f\\u0430\\u043c (8 rows)" in done.stdout
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_bytes().splitlines()]
    assert {line["label"] for line in found} <= {"caf\u00e9", "\u0441\u043f\u0430\u043c"}
    again = launching.run(launching.program(Path(command[1])), *command[2:])
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.splitlines()[-1].startswith("error: --output_dir ")
