"""scripts/pretrain_enwik8.py under faults: kills, damage, full disks, divergence, two runs, and other locales."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from small_runs import ROOT, SCRIPT, STEPS, checkpoints, flags, history, make_inputs, run_script

from aft import checkpointing, pretraining, text_sources
from aft.bits_per_byte import load_metric
from aft.checkpointing import STATE_FILE, find_checkpoint
from aft.commands.pretrain import main
from aft.console import run_program
from aft.optimization import all_finite
from aft.raw_files import KnownFile
from aft.run_log import read_log


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main(flags(inputs, folder))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of its folder."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def assert_same_run(folder: Path, whole: Path):
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert history(folder) == history(whole)
    assert "bits per byte" in (folder / "README.md").read_text(encoding="utf-8")
    assert [event["event"] for event in read_log(folder / "run.jsonl")].count("config") == 1


class Killed(BaseException):
    """In place of the end of the process."""


def kill_at(monkeypatch, step: int):
    """Ends runs when they begin this step, counted from 0."""
    train_step = pretraining.train_step

    def train(*args):
        if args[4] == step:
            raise Killed
        return train_step(*args)

    monkeypatch.setattr(pretraining, "train_step", train)


# Resuming


@pytest.mark.parametrize("killed_at", [3, 4, 7], ids=["before-a-checkpoint", "after-one", "near-the-end"])
def test_run_from_an_older_checkpoint_is_the_one_that_goes_on(inputs, whole, run, monkeypatch, killed_at):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, killed_at)
        main(flags(inputs, run, resume=run / "checkpoints" / "step-2"))
    saved = [f"step-{step}" for step in range(2, killed_at + 1, 2)]
    aside = [f"step-{step}.abandoned" for step in range(4, STEPS + 1, 2)]
    assert checkpoints(run) == (saved if len(saved) > 1 else sorted(saved + aside))
    assert [event["step"] for event in read_log(run / "run.jsonl") if event["event"] == "train"][-1] == killed_at
    main(flags(inputs, run, resume="auto"))
    resumed = [event["step"] for event in read_log(run / "run.jsonl") if event["event"] == "resume"]
    assert resumed == sorted({2, int(saved[-1][5:])})
    assert_same_run(run, whole)
    assert checkpoints(run) == checkpoints(whole)


def test_abandoned_checkpoints_do_not_push_out_new_ones(inputs, run):
    main(flags(inputs, run, resume=run / "checkpoints" / "step-2", keep_checkpoints=2))
    assert checkpoints(run) == ["step-6", "step-8"]


def flip_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_number(path: Path):
    path.write_text(re.sub(r'("training_seconds": )\d', r"\g<1>9", path.read_text()))


DAMAGES = {
    "bit-of-weights": ("model.safetensors", flip_bit, "is damaged"),
    "bit-of-optimizer": ("optimizer.bin", flip_bit, "is damaged"),
    "bit-of-random-state": ("random_states_0.pkl", flip_bit, "is damaged"),
    "truncated-weights": ("model.safetensors", lambda path: os.truncate(path, 1000), "is damaged"),
    "empty-optimizer": ("optimizer.bin", lambda path: os.truncate(path, 0), "is damaged"),
    "no-weights": ("model.safetensors", os.remove, "is missing"),
    "bit-of-state": (STATE_FILE, flip_bit, "is damaged"),
    "number-of-state": (STATE_FILE, change_number, "is damaged"),
    "empty-state": (STATE_FILE, lambda path: os.truncate(path, 0), "is damaged"),
    "part-of-state": (STATE_FILE, lambda path: os.truncate(path, 100), "is damaged"),
    "other-state": (STATE_FILE, lambda path: path.write_text("[]"), "is damaged"),
    "binary-state": (STATE_FILE, lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, damage, capsys):
    name, do, words = DAMAGES[damage]
    folder = run / "checkpoints"
    do(folder / "step-8" / name)
    assert find_checkpoint("auto", folder) == folder / "step-6"
    error = capsys.readouterr().err
    assert f"step-8/{name} {words}" in error and error.endswith("step-6\n") and error.count("\n") == 1
    with pytest.raises(ValueError, match=f"step-8/{name} {words}"):
        find_checkpoint(str(folder / "step-8"), folder)
    assert find_checkpoint("auto", folder) == folder / "step-6" and capsys.readouterr().err == error


def test_no_whole_checkpoint_is_an_error_that_names_all(inputs, run):
    for step in (2, 4, 6, 8):
        flip_bit(run / "checkpoints" / f"step-{step}" / "optimizer.bin")
    before = checkpoints(run), (run / "run.jsonl").read_bytes()
    with pytest.raises(ValueError, match="no checkpoint is whole: .*step-8/optimizer.bin.*step-2/optimizer.bin"):
        main(flags(inputs, run, resume="auto"))
    assert (checkpoints(run), (run / "run.jsonl").read_bytes()) == before


def test_run_goes_on_past_a_damaged_checkpoint(inputs, whole, run):
    flip_bit(run / "checkpoints" / "step-8" / "model.safetensors")
    main(flags(inputs, run, resume="auto", keep_checkpoints=1))
    assert_same_run(run, whole)
    assert checkpoints(run) == ["step-8"] and find_checkpoint("auto", run / "checkpoints")


def forget_checksums(checkpoint: Path):
    content = json.loads((checkpoint / STATE_FILE).read_text())
    content = {name: value for name, value in content.items() if name not in ("files", "sha256", "measured")}
    del content["identity"]["carry_state"], content["identity"]["stream_length"]
    (checkpoint / STATE_FILE).write_text(json.dumps(content, indent=2))


def test_checkpoint_of_an_earlier_version_is_continued(inputs, whole, run):
    """Those had no checksums, carried no state, and were saved after the evaluation of their step."""
    forget_checksums(run / "checkpoints" / "step-4")
    state = run / "checkpoints" / "step-4" / STATE_FILE
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "log_lines": content["log_lines"] + 2}))
    main(flags(inputs, run, resume=run / "checkpoints" / "step-4"))
    assert_same_run(run, whole)


def test_damaged_checkpoint_of_an_earlier_version_is_named(inputs, run):
    forget_checksums(run / "checkpoints" / "step-8")
    os.truncate(run / "checkpoints" / "step-8" / "optimizer.bin", 1000)
    with pytest.raises(ValueError, match="step-8 does not load: "):
        main(flags(inputs, run, resume="auto"))


@pytest.mark.parametrize("kept", [0, 3], ids=["none", "some"])
def test_lost_log_does_not_lose_the_run(inputs, whole, run, kept, capsys):
    lines = (run / "run.jsonl").read_text().splitlines(keepends=True)
    (run / "run.jsonl").write_text("".join(lines[:kept]))
    if not kept:
        os.remove(run / "run.jsonl")
    main(flags(inputs, run, resume=run / "checkpoints" / "step-4"))
    count = json.loads((whole / "checkpoints" / "step-4" / STATE_FILE).read_text())["log_lines"]
    assert f"has {count - kept} lines less than when that was saved" in capsys.readouterr().err
    assert history(run)[-8:] == history(whole)[-8:]
    assert [event["event"] for event in read_log(run / "run.jsonl")][0] == "config"
    assert "bits per byte" in (run / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[]"], ids=["part", "binary", "list"])
def test_damaged_line_of_the_log_is_named_before_the_training(inputs, run, line):
    lines = (run / "run.jsonl").read_bytes().splitlines(keepends=True)
    (run / "run.jsonl").write_bytes(b"".join([*lines[:3], line + b"\n", *lines[4:]]))
    with pytest.raises(ValueError, match="run.jsonl: line 4 is damaged"):
        main(flags(inputs, run, resume="auto"))


def test_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(inputs, tmp_path, monkeypatch):
    calls = []

    def save(accelerator, folder, state):
        calls.append(state["log_lines"])
        checkpointing.save_checkpoint(accelerator, folder, state)

    monkeypatch.setattr("aft.run_log.sync", lambda path: calls.append((path.name, len(read_log(path)))))
    monkeypatch.setattr(pretraining, "save_checkpoint", save)
    main(flags(inputs, tmp_path / "run"))
    saves = [index for index, call in enumerate(calls) if isinstance(call, int)]
    assert len(saves) == 4 and all(calls[index - 1] == ("run.jsonl", calls[index]) for index in saves)
    assert calls[-1] == ("run.jsonl", len(read_log(tmp_path / "run" / "run.jsonl")))


# Faults after a step


def fail_at(call: int, error: BaseException, function):
    """`function`, which raises `error` the n-th time that it is called."""
    calls = iter(range(1, 1000))

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise error
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize(
    "name, call, step",
    [
        ("evaluate_split", 1, 2),
        ("evaluate_split", 3, 6),
        ("evaluate_split", 4, 8),
        ("evaluate_split", 5, 8),
        ("sample_text", 2, 4),
        ("sample_text", 4, 8),
        ("save_model", 1, 8),
        ("plot_training_curve", 1, 8),
        ("fill_model_card", 1, 8),
    ],
    ids=["valid", "valid-later", "valid-last", "test", "sample", "last-sample", "model", "curve", "card"],
)
def test_fault_after_a_step_does_not_lose_it(inputs, whole, tmp_path, monkeypatch, name, call, step):
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(pretraining, name, fail_at(call, PermissionError("no"), getattr(pretraining, name)))
        main(flags(inputs, tmp_path / "run"))
    assert checkpoints(tmp_path / "run")[-1] == f"step-{step}"
    assert not (tmp_path / "run" / "README.md").exists()
    main(flags(inputs, tmp_path / "run", resume="auto"))
    assert_same_run(tmp_path / "run", whole)


def test_old_checkpoints_stay_until_the_new_one_is_measured(inputs, tmp_path, monkeypatch):
    function = fail_at(3, MemoryError(), pretraining.evaluate_split)
    monkeypatch.setattr(pretraining, "evaluate_split", function)
    with pytest.raises(MemoryError):
        main(flags(inputs, tmp_path / "run", keep_checkpoints=1))
    assert checkpoints(tmp_path / "run") == ["step-4", "step-6"]


def test_metric_is_loaded_before_the_training(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "train_step", lambda *args: pytest.fail("trained"))
    load_metric.cache_clear()
    monkeypatch.setattr(evaluate, "load", fail_at(1, PermissionError("no such folder"), evaluate.load))
    with pytest.raises(PermissionError, match="no such folder"):
        main(flags(inputs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Divergence


def assert_no_model(folder: Path):
    assert not {"config.json", "README.md", "model.safetensors"} & set(os.listdir(folder))
    text = (folder / "run.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and '"final"' not in text


@pytest.mark.parametrize(
    "changes", [{"max_steps": 1}, {"max_steps": 2, "save_every": 1}, {"optimizer": "muon"}], ids=str
)
def test_rate_without_measure_ends_with_an_error(inputs, tmp_path, changes):
    rate = {"learning_rate": 1e20, "warmup_steps": 0, "lr_decay": "constant", **changes}
    with pytest.raises(
        FloatingPointError, match="the run has diverged, lower --learning_rate; there is no checkpoint"
    ):
        main(flags(inputs, tmp_path / "run", **rate))
    assert_no_model(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("eval_every", [2, 0], ids=["evaluated", "not-evaluated"])
@pytest.mark.parametrize("step", [4, 5], ids=["checkpoint", "next"])
def test_last_good_checkpoint_stays(inputs, tmp_path, monkeypatch, eval_every, step):
    rate = pretraining.learning_rate
    monkeypatch.setattr(pretraining, "learning_rate", lambda at, args: 1e20 if at == step - 1 else rate(at, args))
    with pytest.raises(FloatingPointError, match="(is|not) .*step-[24]$"):
        main(flags(inputs, tmp_path / "run", keep_checkpoints=1, eval_every=eval_every, log_every=100))
    assert checkpoints(tmp_path / "run") == (["step-2"] if step == 4 else ["step-4"])
    assert_no_model(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("call, split, step", [(2, "valid", 4), (4, "valid", 8), (5, "test", 8)])
def test_score_that_is_no_number_ends_the_run(inputs, whole, tmp_path, monkeypatch, value, call, split, step):
    evaluate_split, calls = pretraining.evaluate_split, iter(range(1, 100))

    def score(*args, **kwargs):
        result = evaluate_split(*args, **kwargs)
        return result | ({"bits_per_byte": value} if next(calls) == call else {})

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "evaluate_split", score)
        with pytest.raises(
            FloatingPointError, match=f"score is {value} bits per byte on {split} at step {step}.*step-{step - 2}$"
        ):
            main(flags(inputs, tmp_path / "run", keep_checkpoints=2))
    assert_no_model(tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-2:] == [f"step-{step - 2}", f"step-{step}.abandoned"]
    main(flags(inputs, tmp_path / "run", resume="auto"))  # whatever it was, it is over
    assert_same_run(tmp_path / "run", whole)


def test_what_an_optimizer_remembers_is_finite():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert all_finite(model, [optimizer])
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = torch.inf
    assert not all_finite(model, [optimizer])


def test_diverged_program_ends_with_one_line(inputs, tmp_path, capsys):
    argv = flags(inputs, tmp_path / "run", learning_rate=1e20, warmup_steps=0, max_steps=1)
    with pytest.raises(SystemExit) as ending:
        run_program(lambda: main(argv))
    assert ending.value.code == 1
    assert re.fullmatch("error: .* at step 1: the run has diverged.*", capsys.readouterr().err.splitlines()[-1])


# Two runs


HOLD = """
import pathlib, sys, time
from aft.folder_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("changes", [{"resume": "auto"}, {"overwrite": True}, {}], ids=str)
def test_second_run_in_a_folder_is_refused(inputs, run, changes):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on \S+, since 20"):
            main(flags(inputs, run, **changes))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."} == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    main(flags(inputs, run, resume="auto"))  # the lock was that of the process


def test_what_a_killed_process_left_is_removed(inputs, run):
    (run / ".README.md.0123.tmp").touch()
    (run / ".model-abc").mkdir()
    (run / "checkpoints" / "step-3.tmp").mkdir()
    (run / ".mine").touch()
    main(flags(inputs, run, resume=run / "checkpoints" / "step-6"))
    assert [path.name for path in run.glob(".*")] == [".mine"]
    assert checkpoints(run) == ["step-2", "step-4", "step-6", "step-8"]


def test_failed_start_leaves_an_earlier_run_alone(inputs, run, monkeypatch):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    monkeypatch.setattr(pretraining, "create_optimizers", fail_at(1, MemoryError(), None))
    with pytest.raises(MemoryError):
        main([*flags(inputs, run), "--overwrite"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."} == before


# Logs and cards


@pytest.fixture
def enwik8(inputs, monkeypatch) -> Path:
    """The text of the inputs as if it were the published file, at its address."""
    content = (inputs / "text.bin").read_bytes()
    sums = hashlib.md5(content).hexdigest(), hashlib.sha1(content).hexdigest()
    known = KnownFile("enwik8", "http://127.0.0.1:9/dc/enwik8", len(content), *sums)
    monkeypatch.setattr(text_sources, "ENWIK8", known)
    return inputs / "text.bin"


def card(folder: Path) -> tuple[dict, str]:
    _, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), body


def test_no_secret_and_no_folder_of_the_machine_is_told(inputs, enwik8, tmp_path, monkeypatch):
    class Answer(io.BytesIO):
        headers = {"Content-Length": str(enwik8.stat().st_size)}

    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Answer(enwik8.read_bytes()))
    url = "http://user:s3cret@127.0.0.1:9/dc/enwik8?token=t0ken#part"
    for more in (["--overwrite"], ["--resume", str(tmp_path / "run" / "checkpoints" / "step-4")]):
        argv = flags(inputs, tmp_path / "run", dataset="enwik8", dataset_path=None, dataset_url=url, sample_bytes=0)
        argv = [*argv, "--cache-dir", str(tmp_path / "cache"), *more]
        monkeypatch.setattr("sys.argv", ["pretrain_enwik8.py", *argv])
        main()
    files = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix in (".md", ".json", ".jsonl")
    ]
    assert {path.name for path in files} >= {"README.md", "run.jsonl", "config.json", STATE_FILE}
    for path in files:
        for secret in ("user", "s3cret", "t0ken", str(tmp_path), str(inputs), str(ROOT), str(Path.home())):
            assert secret not in path.read_text(encoding="utf-8").replace("users", ""), (path, secret)
    config, *_ = read_log(tmp_path / "run" / "run.jsonl")
    assert config["arguments"]["dataset_url"] == "http://127.0.0.1:9/dc/enwik8"
    assert (config["arguments"]["output_dir"], config["arguments"]["model_preset"]) == ("run", "model.json")
    assert "--dataset_url http://127.0.0.1:9/dc/enwik8 " in config["command"]
    assert "--output_dir run " in config["command"] and "--cache-dir cache " in config["command"]
    header, body = card(tmp_path / "run")
    assert header["datasets"] == ["LTCB/enwik8"] and 'name = "run"' in body


def test_log_of_an_earlier_version_keeps_no_secret(inputs, run):
    config, *events = read_log(run / "run.jsonl")
    config["arguments"] |= {"dataset_url": "http://user:s3cret@host/x?t0ken", "output_dir": str(run)}
    config["command"] += f" --dataset_url 'http://user:s3cret@host/x?t0ken' --output_dir '{run}'"
    (run / "run.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (config, *events)))
    main(flags(inputs, run, resume=run / "checkpoints" / "step-6"))
    for path in (run / "run.jsonl", run / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert "http://host/x" in text and not any(secret in text for secret in ("s3cret", "t0ken", str(run)))


@pytest.mark.parametrize("real", [True, False], ids=["real", "other"])
def test_file_is_called_enwik8_by_its_checksums(inputs, enwik8, tmp_path, real):
    path = tmp_path / ("anything" if real else "enwik8")
    path.write_bytes(enwik8.read_bytes() if real else enwik8.read_bytes()[::-1])
    main(flags(inputs, tmp_path / "run", dataset_path=path, max_steps=1))
    header, body = card(tmp_path / "run")
    assert header.get("datasets") == (["LTCB/enwik8"] if real else None)
    [result] = header["model-index"][0]["results"]
    assert result["dataset"]["type"] == ("LTCB/enwik8" if real else "bytes")
    assert "\nenwik8: " in body  # the name of the file, or of what it is


# Disks, pipes and locales


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files")
def test_full_disk_in_a_checkpoint_is_one_line(inputs, whole, tmp_path):
    size = (whole / "checkpoints" / "step-2" / "optimizer.bin").stat().st_size // 2
    result = run_script(flags(inputs, tmp_path / "run"), before=LIMIT.format(size))
    last = result.stderr.decode().splitlines()[-1]
    assert result.returncode == 1 and b"Traceback" not in result.stderr
    assert (
        re.match("error: the checkpoint .*step-2 cannot be written, [0-9,]+ bytes are free: .", last)
        and len(last) < 500
    )
    assert checkpoints(tmp_path / "run") == []
    main(flags(inputs, tmp_path / "run", resume="auto"))
    assert_same_run(tmp_path / "run", whole)


def test_full_disk_at_the_end_leaves_no_half_model(inputs, whole, run, monkeypatch):
    model = (run / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        save = fail_at(1, SafetensorError("I/O error: No space left on device"), None)
        patch.setattr("transformers.modeling_utils.safe_save_file", save)
        with pytest.raises(OSError, match="the model cannot be written to .*run: I/O error: No space left"):
            main(flags(inputs, run, resume="auto"))
    assert (run / "model.safetensors").read_bytes() == model and not list(run.glob(".model*"))
    main(flags(inputs, run, resume="auto"))
    assert_same_run(run, whole)


def test_reader_that_goes_away_costs_no_checkpoint(inputs, whole, tmp_path, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody_reads, monkeypatch.context() as patch, pytest.raises(SystemExit) as ending:
        patch.setattr(sys, "stdout", nobody_reads)
        patch.setattr(pretraining.Accelerator, "print", lambda *args: None)  # so that the sample is what breaks it
        run_program(lambda: main(flags(inputs, tmp_path / "run")))
    assert ending.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 32] Broken pipe"
    assert checkpoints(tmp_path / "run")[-1] in ("step-2", "step-8")
    main(flags(inputs, tmp_path / "run", resume="auto"))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the C locale")
def test_run_in_a_locale_of_ascii(inputs, tmp_path):
    """Paths and prompts that its Python cannot read, and text of the model that it cannot print."""
    shutil.copy(inputs / "text.bin", tmp_path / "données")
    argv = flags(inputs, "run", dataset_path="données", sample_prompt="é", max_steps=2)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    result = run_script(argv, before=f"import os; os.chdir({str(tmp_path)!r})", **locale)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    config, *_, final = read_log(tmp_path / "run" / "run.jsonl")
    assert (config["data"], config["arguments"]["sample_prompt"], final["sample"][0]) == ("données", "é", "é")
    assert "--sample_prompt é" in config["command"].replace("'", "")
    assert "données: " in card(tmp_path / "run")[1]


@pytest.mark.parametrize("name", ["output_dir", "cache_dir"])
def test_path_that_no_library_can_write_is_refused(inputs, tmp_path, name):
    with pytest.raises(ValueError, match=rf"--{name} must be text that Python's locale can read .*dcc3"):
        main([*flags(inputs, tmp_path / "run"), f"--{name}", str(tmp_path / "mod\udcc3\udca8le")])
    assert list(tmp_path.iterdir()) == []
