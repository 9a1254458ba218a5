"""aft compare with encoder-decoders: plans, entries, and that the table says what the runs have left."""

import json
from pathlib import Path
from statistics import fmean, median, stdev

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
from test_finetune import leave_no_state  # noqa: F401
from test_seq2seq_program import COLUMNS, MODEL, T5, make_rows, write_jsonl

from aft import comparison
from aft.commands.compare import main
from aft.compare_plan import read_plan
from aft.compare_seq2seq import EncoderDecoders
from aft.compare_table import columns_of
from aft.comparison import describe_entries, plan_runs
from aft.flags import CONFIGURATION
from aft.settings_files import read_json


PLAN = {
    "command": "seq2seq",
    "training": {
        **{"pairs_file": "pairs.jsonl", "validation_file": "valid.jsonl", "test_file": "test.jsonl", **COLUMNS},
        **{"tokenizer": "bytes", "metrics": ["bleu", "chrf"], "truncation": "right", "max_target_length": 20},
        **{"num_train_epochs": 2, "learning_rate": 0.01, "per_device_train_batch_size": 8, "logging_steps": 1},
        **{"use_cpu": True, "disable_tqdm": True},
    },
    "seeds": [0, 1],
    "reference": "t5",
    "runs": {
        "t5": {"model": "t5.json", "training": {"per_device_train_batch_size": 4}},
        "random": {"model": "model.json", "model_override": {"decoder.synthesizer_type": "random"}},
    },
}
TEXT = {
    "command": "seq2seq",
    "training": {"text_file": "text.txt", "tokenizer": "bytes", "max_source_length": 24, "max_steps": 1},
    "runs": {"random": {"model": "model.json"}},
}


def make_inputs(folder: Path, plan: dict = PLAN) -> Path:
    (folder / "t5.json").write_text(json.dumps(T5))
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for seed, (name, count) in enumerate({"pairs": 20, "valid": 6, "test": 5}.items()):
        write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a plan, of which all runs are finished."""
    folder = make_inputs(tmp_path_factory.mktemp("comparison"))
    return finish(folder, plan_flags(folder))


@pytest.mark.parametrize("name", ["translation", "summaries", "strings", "long-strings"])
def test_shipped_plan(name, tmp_path):
    plan = read_plan(CONFIGURATION / "compare" / f"{name}.yaml")
    columns = [plan.training.get(f"{role}_column", role) for role in ("source", "target")]
    texts = dict(zip(columns, ("a tool", "ein Werkzeug"), strict=True))
    path = str(write_jsonl(tmp_path / "pairs.jsonl", [texts] * 2))
    data = ["--pairs_file", path, "--validation_file", path, "--test_file", path]
    planned = plan_runs(plan, tmp_path, plan.seeds, data)
    entries = describe_entries(EncoderDecoders(), planned)
    assert len(entries) == len(plan.runs) * len(plan.seeds)
    assert len({entry["data"]["tokenizer"] for entry in entries}) == 1
    models = {json.dumps(entry["model_config"]) for entry in entries}
    assert len(models) == len(plan.runs) and plan.reference in plan.runs


def test_table_says_what_the_runs_have_left(finished):
    rows = table(finished)
    assert list(rows) == ["t5", "random"] and tuple(rows["t5"]) == columns_of(EncoderDecoders())
    pairs = [row["translation"] for row in make_rows(20, 0)]
    tokens = 2 * sum(len(row["en"]) + 1 + min(len(row["de"]) + 1, 20) for row in pairs)
    for name, steps in (("t5", 10), ("random", 6)):
        folders, row = [run_folder(finished, name, seed) for seed in (0, 1)], rows[name]
        results = [read_json(folder / "all_results.json", "run") for folder in folders]
        for column, key in (
            *(("valid", "eval_log_perplexity"), ("test", "test_log_perplexity")),
            *((name, f"test_{name}") for name in ("bleu", "chrf", "exact_match")),
        ):
            scores = [result[key] for result in results]
            assert float(row[column]) == pytest.approx(fmean(scores), rel=1e-5)
            assert float(row[f"{column}_std"]) == pytest.approx(stdev(scores), rel=1e-5)
        assert row["rougeL"] == row["rougeL_std"] == ""
        speed = max(result["test_generated_tokens_per_second"] for result in results)
        assert float(row["generated_tokens_per_second"]) == pytest.approx(speed, rel=1e-5)
        assert (row["epochs"], row["steps"], row["tokens"]) == ("2", str(steps), str(tokens))
        logs = [read_json(folder / "trainer_state.json", "run")["log_history"] for folder in folders]
        speeds = [[line["tokens_per_second"] for line in log if "tokens_per_second" in line] for log in logs]
        assert [len(each) for each in speeds] == [steps] * 2
        assert float(row["tokens_per_second"]) == pytest.approx(max(map(median, speeds)), rel=1e-5)
        assert row["parameters"] == str(results[0]["num_parameters"])
        assert row["valid_protocol"] == "6 rows, best of 2 checkpoints by loss" and row["test_protocol"] == "5 rows"
        assert row["data"] == "pairs.jsonl" and row["data_sha256"].count(", ") == 3
    text = (finished / "out" / "compare-plan.md").read_text(encoding="utf-8")
    assert "Scores are nats per token of the targets" in text and "generated tokens/s" in text and "| bleu |" in text
    assert f"{float(rows['t5']['bleu']):.2f} ± {float(rows['t5']['bleu_std']):.2f}" in text and "rouge1" not in text
    best = min(float(row["valid"]) for row in rows.values())
    assert f"**{best:.3f} ± " in text


def test_finished_runs_are_skipped_and_a_table_needs_no_data(finished, tmp_path, monkeypatch):
    def lose_data(folder: Path) -> None:
        (folder / "pairs.jsonl").unlink()

    check_that_nothing_is_trained_again(finished, tmp_path / "copy", monkeypatch, lose_data)


def other_test(folder: Path) -> None:
    write_jsonl(folder / "test.jsonl", make_rows(5, 9))


def other_model(folder: Path) -> None:
    (folder / "t5.json").write_text(json.dumps({**T5, "d_model": 32}))


@pytest.mark.parametrize(
    "change, more, message",
    [
        pytest.param(None, ["--truncation", "none"], "truncation is 'none' but was 'right'", id="flag"),
        pytest.param(None, ["--tokenizer", "bpe"], "data is .*BPE of .* but was", id="tokenizer"),
        pytest.param(other_test, [], "random-seed1: data is {'train': '[0-9a-f]{64}'.* but was", id="data"),
        pytest.param(other_model, ["--table_only"], "t5-seed1: model_config is .* but was", id="model-of-table"),
    ],
)
def test_changed_entries_are_refused(finished, tmp_path, monkeypatch, change, more, message):
    check_that_changed_entries_are_refused(finished, tmp_path / "copy", monkeypatch, change, more, message)


@pytest.mark.parametrize(
    "more, message",
    [
        pytest.param(["--num_train_epochs", "0"], "run random: --num_train_epochs must be positive", id="untrained"),
        pytest.param(["--max_target_length", "99"], "must be at most the tables of the model, 32, got 99", id="long"),
        pytest.param(["--seed", "3"], "--seed must be left out: run t5 of plan has its own", id="seed"),
        pytest.param(["--source_column", "x"], "run t5: .*pairs.jsonl: .*x", id="column"),
    ],
)
def test_wrong_flags_are_refused_before_any_training(tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(comparison, "run_process", no_training)
    with pytest.raises(ValueError, match=message):
        main(plan_flags(make_inputs(tmp_path), *more))


def test_runs_have_no_data_of_their_own(tmp_path):
    plan = {**PLAN, "runs": {"t5": {"model": "t5.json", "training": {"pairs_file": "other.jsonl"}}}}
    with pytest.raises(ValueError, match="run t5: training has unknown keys pairs_file"):
        read_plan(make_inputs(tmp_path, plan) / "plan.yaml")


def test_span_corruption_is_compared_without_written_texts(tmp_path):
    main(plan_flags(make_inputs(tmp_path, TEXT)))
    row = table(tmp_path)["random"]
    assert row["bleu"] == row["generated_tokens_per_second"] == row["test"] == ""
    assert float(row["valid"]) > 0 and row["data"] == "text.txt" and row["seeds"] == "0"
