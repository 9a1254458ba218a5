"""scripts/compare.py: plans, which runs are trained, and that the table says what the logs of the runs say."""

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from xml.etree import ElementTree

import launching
import numpy as np
import pytest
import small_runs
from comparisons import (
    check_that_changed_entries_are_refused,
    finish,
    in_this_process,
    no_training,
    plan_flags,
    table,
    without_processes,  # noqa: F401
)

from aft import comparison
from aft.checkpointing import complete_checkpoints
from aft.commands.compare import main
from aft.compare_plan import read_plan
from aft.compare_pretrained import Pretrained
from aft.compare_program import RESULT
from aft.compare_table import columns_of, score_at, value_at
from aft.comparison import describe_entries, plan_runs
from aft.model_configs import build_config
from aft.pretraining_arguments import check_arguments, parse_arguments
from aft.run_log import read_log
from aft.settings_files import read_json
from modeling_aft.configuration_aft import AFT_TYPES
from modeling_aft.configuration_synthesizer import SYNTHESIZER_TYPES


FOLDER = Path(__file__).resolve().parent.parent / "configuration" / "compare"
ELSEWHERE = {
    *("images", "pictures"),  # see test_compare_pictures.py
    *("translation", "summaries", "strings", "long-strings"),  # see test_compare_seq2seq.py
}
PLANS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem not in ELSEWHERE]
PLAN = """
training: {batch_size: 4, max_steps: 6, warmup_steps: 2, eval_every: 2, log_every: 1, save_every: 4, sample_bytes: 0}
seeds: [0, 1]
reference: local
runs:
  local: {model_preset: model.json}
  simple: {model_preset: model.json, model_override: {aft_type: simple}, training: {batch_size: 2}}
"""


NUMBERED = [(1, "local"), (2, "simple"), (3, "wrong")]


def make_inputs(folder: Path) -> Path:
    small_runs.make_inputs(folder)
    (folder / "plan.yaml").write_text(PLAN)
    return folder


def flags(folder: Path, *more: str, data: bool = True) -> list[str]:
    text = ["--dataset_path", str(folder / "text.bin")] if data else []
    return plan_flags(folder, *text, *more, data=data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a plan, of which all runs are finished."""
    folder = make_inputs(tmp_path_factory.mktemp("comparison"))
    return finish(folder, flags(folder))


@pytest.fixture
def inputs(tmp_path) -> Path:
    return make_inputs(tmp_path)


def events(folder: Path, name: str) -> list[dict]:
    return [event for event in read_log(folder / "run.jsonl") if event["event"] == name]


# Plans


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_shipped_plan(path, tmp_path, monkeypatch):
    monkeypatch.setattr("aft.memory_needs.bound", lambda *sizes: None)  # what a step takes, which takes long to find
    plan = read_plan(path)
    planned = plan_runs(plan, tmp_path, plan.seeds[:1], ["--cache_dir", str(tmp_path)])
    entries = describe_entries(Pretrained(), planned)
    assert [run.name for run in planned] == list(plan.runs) and plan.reference in plan.runs
    assert len({json.dumps(entry) for entry in entries}) == len(entries)
    for run, entry in zip(planned, entries, strict=True):
        steps = {"aft-local-32-longer": 9400}.get(run.name, 7500) if path.stem == "long" else 1500
        assert (entry["max_steps"], entry["batch_size"] * entry["sequence_length"]) == (steps, 2048)
        assert (entry["model_config"]["hidden_size"], entry["model_config"]["num_hidden_layers"]) == (128, 4)
        config = build_config(parse_arguments(run.flags))
        for name, value in plan.runs[run.name]["model_override"].items():
            assert getattr(config, name) == value


def arguments(name: str) -> dict:
    [path] = [path for path in PLANS if path.stem == name]
    plan = read_plan(path)
    runs = plan_runs(plan, Path("runs"), [0], [])
    return {run.name: parse_arguments(run.flags) for run in runs}


def configs(name: str) -> dict:
    return {name: build_config(args) for name, args in arguments(name).items()}


def test_plan_of_the_variants_has_all_of_them():
    found = configs("variants")
    assert {config.aft_type for config in found.values() if config.model_type == "aft"} == set(AFT_TYPES)
    types = {config.synthesizer_type for config in found.values() if config.model_type == "synthesizer"}
    assert types == set(SYNTHESIZER_TYPES)
    assert found["transformer"].components == ["dot_product"]
    assert [found[name].position_bias_rank for name in ("aft-full", "aft-full-table")] == [32, None]
    assert [found[name].num_attention_heads for name in ("aft-conv-32", "aft-conv-8")] == [32, 8]


def test_plans_of_windows_and_lengths():
    assert [config.window_size for config in configs("windows").values()] == [0, 1, 2, 4, 8, 32, 64, 128, 256]
    lengths = {name: args.sequence_length for name, args in arguments("lengths").items()}
    assert list(lengths.values()) == [256, 512, 1024, 512, 1024, 256, 512, 1024]
    assert all(f"t-{length}" in name for name, length in lengths.items())


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("- 1\n", "must be a mapping", id="no-mapping"),
        pytest.param("seeds: [0]\n", "runs must map names to runs", id="no-runs"),
        pytest.param("runs: {a: {model_override: {}}}\n", "run a must have a model_preset", id="no-preset"),
        pytest.param("run: {}\nruns: {a: {model_preset: m}}\n", "unknown keys run; allowed", id="unknown-key"),
        pytest.param(
            "runs: {a: {model_preset: m, wide: 1}}\n", "run a has unknown keys wide", id="unknown-key-of-run"
        ),
        pytest.param("training: {seed: 1}\nruns: {a: {model_preset: m}}\n", "unknown keys seed", id="flag-set-here"),
        pytest.param(
            "runs: {a: {model_preset: m, training: {dataset_path: x}}}\n", "dataset_path", id="data-of-a-run"
        ),
        pytest.param("runs: {a: {model_preset: m}, a: {model_preset: n}}\n", "key 'a' stands there twice", id="twice"),
        pytest.param("runs: {1: {model_preset: m}, '1': {model_preset: n}}\n", "of one run, got '1'", id="same-name"),
        *(
            pytest.param(f"runs: {{{name}: {{model_preset: m}}}}\n", "must be that of a folder", id=f"name-{number}")
            for number, name in enumerate(
                ("'../../x'", "/tmp/x", "..", "''", "'a\\b'", '"a\\nb"', "null", "2020-01-01")
            )
        ),
        pytest.param("runs: {a: {model_preset: m}\n", "plan .*plan.yaml: ", id="broken"),
        pytest.param("runs: \x07\n", "plan .*plan.yaml: ", id="control-character"),
        pytest.param("seconds: .nan\nruns: {a: {model_preset: m}}\n", "seconds must be a positive", id="nan"),
        pytest.param("seconds: .inf\nruns: {a: {model_preset: m}}\n", "seconds must be a positive", id="inf"),
        pytest.param("seconds: true\nruns: {a: {model_preset: m}}\n", "seconds must be a positive", id="true"),
        pytest.param("seconds: 0\nruns: {a: {model_preset: m}}\n", "seconds must be a positive", id="seconds"),
        pytest.param("seeds: 0\nruns: {a: {model_preset: m}}\n", "seeds must be a list", id="seeds"),
        pytest.param(
            "seeds: [2, 2]\nruns: {a: {model_preset: m}}\n", r"different .* got \[2, 2\]", id="one-seed-twice"
        ),
        pytest.param(
            "reference: b\nruns: {a: {model_preset: m}}\n", r"one of the runs \(a\), got 'b'", id="reference"
        ),
    ],
)
def test_wrong_plan_is_refused(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "more, message",
    [
        pytest.param(["--batch_size", "8"], "--batch_size must be left out: run simple", id="flag-of-a-run"),
        pytest.param(["--seed", "1"], "--seed must be left out", id="flag-set-here"),
        pytest.param(["--learning_rate", "0"], "run local: .*learning_rate must be positive", id="value"),
        pytest.param(["--steps", "8"], "run local: .*--steps", id="unknown-flag"),
        pytest.param(["--only", "full"], r"--only must name runs of the plan \(local, simple\), got full", id="only"),
        pytest.param(["--seeds", "-1"], "--seeds must be different whole numbers from 0", id="seeds"),
        pytest.param(["--seeds", "1", "1"], "--seeds must be different .* got \\[1, 1\\]", id="one-seed-twice"),
        pytest.param(["--max_hours", "0"], "--max_hours must be positive", id="hours"),
        pytest.param(["--max_hours", "nan"], "--max_hours must be positive", id="nan-hours"),
        pytest.param(["--seconds", "nan"], "--seconds must be positive and finite, got nan", id="nan-seconds"),
        pytest.param(["--seconds", "inf"], "--seconds must be positive and finite, got inf", id="inf-seconds"),
        pytest.param(["--output_dir", ""], "--output_dir must be a path, got ''", id="no-output"),
        pytest.param(["--runs_dir", ""], "--runs_dir must be a path, got ''", id="no-runs"),
        pytest.param(["--table_only"], "--table_only must stand without flags of training", id="table-only"),
    ],
)
def test_wrong_flags_are_refused_before_any_training(inputs, monkeypatch, more, message):
    monkeypatch.setattr(comparison, "run_process", no_training)
    with pytest.raises(ValueError, match=message):
        main(flags(inputs, *more))
    assert not (inputs / "runs").exists()


def test_explicit_flags_win_over_the_plan(inputs):
    plan = read_plan(inputs / "plan.yaml")
    runs = plan_runs(plan, inputs, [3], ["--max_steps", "9"])
    parsed = [parse_arguments(run.flags) for run in runs]
    assert [(args.max_steps, args.seed, args.batch_size) for args in parsed] == [(9, 3, 4), (9, 3, 2)]
    for args in parsed:
        check_arguments(args, num_processes=1)


# Runs


def test_table_says_what_the_logs_say(finished):
    rows = table(finished)
    assert list(rows) == ["local", "simple"] and tuple(rows["local"]) == columns_of(Pretrained())
    for name, batch_size in (("local", 4), ("simple", 2)):
        folders = [finished / "runs" / "plan" / f"{name}-seed{seed}" for seed in (0, 1)]
        row, scores = rows[name], {}
        for split in ("valid", "test"):
            found = [[event for event in events(f, "evaluation") if event["split"] == split] for f in folders]
            assert [len(each) for each in found] == [3 if split == "valid" else 1] * 2  # test is scored once
            scores[split] = [each[-1]["bits_per_byte"] for each in found]
            assert float(row[split]) == pytest.approx(fmean(scores[split]), rel=1e-5)
            assert float(row[f"{split}_std"]) == pytest.approx(stdev(scores[split]), rel=1e-5)
            assert found[0][-1]["bytes_scored"] == 160
        assert scores["valid"][0] != scores["valid"][1]
        last = [events(folder, "train")[-1] for folder in folders]  # of step 6, the only one in the last tenth
        assert float(row["train"]) == pytest.approx(fmean(event["bits_per_byte"] for event in last), rel=1e-5)
        (config,) = events(folders[0], "config")
        assert (row["parameters"], row["steps"], row["seeds"]) == (str(config["parameters"]), "6", "0 1")
        assert int(row["tokens"]) == 6 * batch_size * 16
        assert row["test_protocol"] == "segments, T = 16, 160 bytes, float32"
        speeds = [median(event["tokens_per_second"] for event in events(folder, "train")) for folder in folders]
        assert float(row["tokens_per_second"]) == pytest.approx(max(speeds), rel=1e-5)
        assert row["data_sha256"] == config["data_sha256"]
        assert "torch" in row["versions"] and "threads" in row["hardware"] and "plan.yaml" in row["command"]
    assert rows["local"]["parameters"] > rows["simple"]["parameters"]
    local = float(rows["local"]["tokens"]) / float(rows["local"]["tokens_per_second"])
    for row in rows.values():
        assert float(row["equal_seconds"]) == pytest.approx(local, rel=1e-4)
    assert rows["local"]["valid_at_equal_seconds"] == rows["local"]["valid"]  # the reference, as it ended


def test_document_and_picture(finished):
    text = (finished / "out" / "compare-plan.md").read_text(encoding="utf-8")
    rows = table(finished)
    for name, row in rows.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"{float(row['test']):.3f} ± {float(row['test_std']):.3f}" in line
    best = min(rows, key=lambda name: float(rows[name]["valid"]))
    (bold,) = [line for line in text.splitlines() if "**" in line]
    assert bold.startswith(f"| {best} |")
    assert "(compare-plan.svg)" in text and rows["local"]["versions"] in text and rows["local"]["command"] in text
    picture = "".join(ElementTree.parse(finished / "out" / "compare-plan.svg").getroot().itertext())
    assert "bits per byte" in picture
    assert all(f"{name} {float(row['valid']):.3f}" in picture for name, row in rows.items())


def test_finished_runs_are_skipped(finished, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", no_training)
    before = table(finished)
    main(flags(finished))
    assert table(finished) == before


def test_only_some_runs_are_trained(inputs):
    main(flags(inputs, "--only", "simple", "--seeds", "5"))
    assert [path.name for path in (inputs / "runs" / "plan").iterdir()] == ["simple-seed5"]
    assert list(table(inputs)) == ["simple"] and table(inputs)["simple"]["equal_seconds"] == ""
    assert "left out: local" in (inputs / "out" / "compare-plan.md").read_text(encoding="utf-8")


def test_table_only_needs_no_data(finished, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", no_training)
    before = table(finished)
    main(flags(finished, "--table_only", "--seconds", "1e-9", data=False))
    # Nothing was evaluated so early.
    assert [row["valid_at_equal_seconds"] for row in table(finished).values()] == ["", ""]
    main(flags(finished, "--table_only", data=False))
    assert table(finished) == before


def test_table_only_without_finished_runs_is_refused(inputs):
    with pytest.raises(ValueError, match="--table_only needs finished runs"):
        main(flags(inputs, "--table_only", data=False))


def other_data(folder: Path) -> None:
    (folder / "text.bin").write_bytes(b"other text\n" * 300)


def other_model(folder: Path) -> None:
    (folder / "plan.yaml").write_text(PLAN.replace("{aft_type: simple}", "{aft_type: simple, window_size: 2}"))


@pytest.mark.parametrize(
    "change, more, message",
    [
        pytest.param(None, ["--max_steps", "7"], "local-seed0: max_steps is 7 but was 6", id="flag"),
        pytest.param(other_data, [], "local-seed1: data is '[0-9a-f]{64}' but was", id="data"),
        pytest.param(other_model, [], "simple-seed0: model_config is .*'window_size': 2.* but was", id="model"),
        pytest.param(other_model, ["--table_only"], "simple-seed0: model_config is .* but was", id="model-of-table"),
    ],
)
def test_changed_entries_are_refused(finished, tmp_path, monkeypatch, change, more, message):
    check_that_changed_entries_are_refused(finished, tmp_path / "copy", monkeypatch, change, more, message, flags)


def test_seeds_that_cannot_be_joined_are_refused(inputs):
    main(flags(inputs, "--only", "simple", "--seeds", "0", "--max_steps", "2"))
    other_data(inputs)
    main(flags(inputs, "--only", "simple", "--seeds", "1", "--max_steps", "1", "--learning_rate", "1e-4"))
    sha256 = "'[0-9a-f]{64}'"
    changed = f"data is {sha256} and {sha256}; simple: learning_rate is .* and 0.0001; simple: max_steps is 2 and 1"
    with pytest.raises(ValueError, match=f"must have been trained alike, got simple: {changed}$"):
        main(flags(inputs, "--table_only", "--seeds", "0", "1", data=False))


def test_runs_of_other_data_do_not_stand_in_one_table(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    path = folder / "runs" / "plan" / "local-seed0" / "run.jsonl"
    [found] = {event["data_sha256"] for event in events(path.parent, "config")}
    path.write_text(path.read_text(encoding="utf-8").replace(found, "0" * 64), encoding="utf-8")
    with pytest.raises(ValueError, match=f"the same sha256, got local of seed 0 0+, simple of seed 0 {found}$"):
        main(flags(folder, "--table_only", "--seeds", "0", data=False))


def test_budget_of_the_plan_in_seconds(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "plan.yaml").write_text(f"{PLAN}\nseconds: 1000\n")
    main(flags(folder, "--table_only", data=False))
    for row in table(folder).values():  # all training ended before
        assert (row["equal_seconds"], row["valid_at_equal_seconds"]) == ("1000", row["valid"])
    assert (folder / "out" / "compare-plan.md").read_text(encoding="utf-8").count(" * |") == 2


def test_interrupted_run_continues(finished, tmp_path):
    inputs = shutil.copytree(finished, tmp_path / "copy")
    main(flags(inputs, "--table_only", "--seeds", "0", data=False))
    folder, before = inputs / "runs" / "plan" / "local-seed0", table(inputs)["local"]
    for path in (folder / RESULT, folder / "config.json"):
        path.unlink()
    last = complete_checkpoints(folder / "checkpoints")[-1]
    assert last.name == "step-6"
    last.rename(inputs / "elsewhere")
    main(flags(inputs, "--only", "local", "--seeds", "0"))
    assert [event["step"] for event in events(folder, "resume")] == [4]
    after = table(inputs)["local"]
    assert [after[name] for name in ("valid", "test", "steps")] == [
        before[name] for name in ("valid", "test", "steps")
    ]


def test_failed_runs_are_named_and_the_others_are_in_the_table(inputs, monkeypatch):
    def fail_one(run, command, seconds):
        return run.name != "local" and in_this_process(run, command, seconds)

    monkeypatch.setattr(comparison, "run_process", fail_one)
    with pytest.raises(RuntimeError, match="local-seed0$"):
        main(flags(inputs, "--seeds", "0"))
    assert list(table(inputs)) == ["simple"]


def test_time_limit(inputs, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", no_training)
    assert main(flags(inputs, "--max_hours", "1e-12")) == []


def test_process_of_its_own(inputs, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plan = read_plan(inputs / "plan.yaml")
    run = plan_runs(plan, inputs / "runs", [0], flags(inputs)[5:])[0]
    run.folder.mkdir(parents=True)
    assert comparison.run_process(run, "command", 0.01) and not run.finished
    assert comparison.run_process(run, "command", float("inf")) and run.finished
    result = json.loads((run.folder / RESULT).read_text())
    assert 0 < result["peak_bytes"] < 2**30 and result["command"] == "command"


def forked(monkeypatch) -> None:
    """Processes of runs take over the libraries, which takes ten seconds less than to import them."""
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launching.processes()  # which threads must not start at once
    monkeypatch.setattr(comparison, "get_context", lambda method: SimpleNamespace(Process=launching.fork))


def test_runs_beside_each_other(inputs, monkeypatch, capfd):
    """Two of three at once, one of which fails: each has its own output, and the table is that of the others."""
    forked(monkeypatch)
    plan = "  wrong: {model_preset: model.json, training: {learning_rate: 1.0e+20, lr_decay: constant}}\n"
    (inputs / "plan.yaml").write_text((inputs / "plan.yaml").read_text() + plan)
    with pytest.raises(RuntimeError, match="wrong-seed0$"):
        main(flags(inputs, "--seeds", "0", "--jobs", "2"))
    output = capfd.readouterr()
    assert sorted(output.out.splitlines()[:3]) == [f"{i}/3 {name}-seed0: trains" for i, name in NUMBERED]
    assert re.fullmatch("wrong-seed0: error: .*the run has diverged.*\n", output.err)
    assert set(table(inputs)) == {"local", "simple"}
    for _, name in NUMBERED:
        text = (inputs / "runs" / "plan" / f"{name}-seed0" / "output.txt").read_text()
        assert "parameters: " in text and ("diverged" in text) == (name == "wrong")
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    "visible, jobs, expected",
    [(None, 2, ["0", "1"]), (None, 3, ["0", "1", "0"]), ("4,7", 2, ["4", "7"]), ("GPU-a", 1, ["GPU-a"])],
)
def test_runs_share_the_gpus(monkeypatch, visible, jobs, expected):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert comparison.places(jobs) == [{"CUDA_VISIBLE_DEVICES": device} for device in expected]


@pytest.mark.parametrize("threads, jobs, expected", [(8, 3, "2"), (2, 4, "1")])
def test_runs_share_the_cores(monkeypatch, threads, jobs, expected):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert comparison.places(jobs) == [{"OMP_NUM_THREADS": expected}] * jobs


@pytest.mark.parametrize("tokens, expected", [(5, None), (10, 5.0), (15, 4.0), (20, 3.0)])
def test_value_at(tokens, expected):
    curve = np.array([[10, 5.0], [20, 3.0]])
    assert value_at(curve, tokens) == expected


@pytest.mark.parametrize("seconds, expected", [(None, None), (0.5, None), (1.5, 4.5), (2, 3.5), (9, 3.5)])
def test_score_at(seconds, expected):
    """Two seeds of 20 tokens at 10 tokens per second."""
    runs = [{"curve": np.array([[10, 5.0], [20, 3.0]])}, {"curve": np.array([[10, 6.0], [20, 4.0]])}]
    assert score_at(runs, seconds, speed=10) == expected


def test_table_lies_beside_the_runs_unless_told(inputs):
    more = ["--runs_dir", str(inputs / "runs"), "--only", "simple", "--seeds", "0", *flags(inputs)[5:]]
    written = main([str(inputs / "plan.yaml"), *more])
    assert {path.name for path in written} == {f"compare-plan.{suffix}" for suffix in ("csv", "md", "svg")}
    assert {path.parent for path in written} == {inputs / "runs" / "plan"}


def test_failed_process_says_why_in_one_line(inputs, monkeypatch, capfd):
    forked(monkeypatch)
    with pytest.raises(RuntimeError, match="these runs failed, see above: local-seed0$"):
        main(flags(inputs, "--only", "local", "--seeds", "0", "--learning_rate", "1e30"))
    printed = capfd.readouterr().err
    assert "Traceback" not in printed and "error: the loss is nan at step" in printed


def test_a_plan_names_presets_of_the_package(tmp_path):
    path, configuration = tmp_path / "plan.yaml", PLANS[0].parent.parent
    path.write_text("training_preset: small\nruns: {a: {model_preset: aft-conv-tiny}}", encoding="utf-8")
    plan = read_plan(path)
    assert Path(plan.training_preset) == configuration / "training" / "small.yaml"
    assert Path(plan.runs["a"]["model_preset"]) == configuration / "models" / "aft-conv-tiny.json"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("aft-conv-tinny", r"model_preset aft-conv-tinny: no such file or preset; did you mean aft-conv-tiny\?"),
        ("models/none.json", "model_preset: no such file: .*none.json"),
    ],
    ids=["name", "path"],
)
def test_a_preset_that_is_not_there_is_refused_at_once(tmp_path, value, message):
    path = tmp_path / "plan.yaml"
    path.write_text(f"runs: {{a: {{model_preset: {value}}}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        main([str(path)])


def test_a_run_that_is_older_than_a_flag_did_what_is_its_default(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", no_training)
    folder = shutil.copytree(finished, tmp_path / "copy")
    path = folder / "runs" / "plan" / "local-seed0" / "entry.json"
    entry = read_json(path, "run")
    assert entry.pop("objective") == "causal"
    path.write_text(json.dumps(entry), encoding="utf-8")
    main(flags(folder))
    assert list(table(folder)) == ["local", "simple"]


def test_names_of_runs_are_printed_as_they_are(inputs):
    names = ["_a$x$b|two", "\u043c\u043e\u0434\u0435\u043b\u044c"]
    runs = "\n".join(f"  '{name}': {{model_preset: model.json}}" for name in names)
    (inputs / "plan.yaml").write_text(f"{PLAN.partition('reference')[0]}runs:\n{runs}\n", encoding="utf-8")
    main(flags(inputs, "--seeds", "0"))
    assert list(table(inputs)) == names
    picture = "".join(ElementTree.parse(inputs / "out" / "compare-plan.svg").getroot().itertext())
    text = (inputs / "out" / "compare-plan.md").read_text(encoding="utf-8")
    for name, row in table(inputs).items():
        assert f"{name} {float(row['valid']):.3f}" in picture
        assert f"| {name.replace('|', chr(92) + '|')} |" in text
