"""`scripts/gpu.py`: which steps run, what becomes of them, and which goals its page says are met."""

import sys
import time

import benchmark
import compile_triton
import gpu
import pytest

from aft import gpu_plan
from aft.benchmark_rows import COLUMNS, STEP_COLUMNS, add_rows, read_rows
from aft.gpu_plan import PARTS, PLANNED_MINUTES, Step, make_plan
from aft.gpu_report import STEPS_FILE, write_page


CUDA = {
    "device": "cuda",
    "processor": "a GPU",
    "dtype": "bfloat16",
    "torch": "2",
    "transformers": "5",
    "date": "today",
}


@pytest.fixture
def processes(monkeypatch):
    """Steps that run, in order. Each ends at once with the status of its first word in `ends`, 0 without one."""
    ran, ends = [], {}

    def call(arguments, log, seconds):
        ran.append(arguments[1])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"first line of {arguments[1]}\nlast line of {arguments[1]}\n")
        return ends.get(arguments[1], 0)

    steps = [Step("compile", "one", 1, "compile-it"), Step("tests", "two", 1, "test-it")]
    steps += [
        Step("tune", "three", 1, "tune-it {seconds}", restores="restore-it"),
        Step("train", "of fla", 1, "x", ("flx",)),
    ]
    steps += [Step("report", "pictures", 1, "draw-it")]
    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr(gpu, "find_processor", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "make_plan", lambda device, folder: steps)
    return ran, ends


def run(folder, *flags, status=0):
    """Runs the program; the statuses of its steps."""
    try:
        gpu.main([*flags, "--output_dir", str(folder)])
        found = 0
    except SystemExit as ending:
        found = ending.code
    assert found == status
    return {row["step"]: row["status"] for row in read_rows(folder / STEPS_FILE, STEP_COLUMNS)}


def test_what_has_finished_is_not_run_again_unless_it_is_named(processes, tmp_path, monkeypatch):
    ran, _ = processes
    statuses = run(tmp_path)
    assert statuses == {**dict.fromkeys(("one", "two", "three", "pictures"), "finished"), "of fla": "left out"}
    assert ran == ["compile-it", "test-it", "tune-it", "draw-it"]
    for flags, expected in (
        ([], ["restore-it", "draw-it"]),
        (["tests"], ["restore-it", "test-it"]),
        (["report", "tune"], ["tune-it", "draw-it"]),
        (["--again"], ["compile-it", "test-it", "tune-it", "draw-it"]),
    ):
        ran.clear()
        run(tmp_path, *flags)
        assert ran == expected, flags
    monkeypatch.setattr(gpu, "find_processor", lambda device: "another GPU")
    ran.clear()
    run(tmp_path)
    assert ran == ["compile-it", "test-it", "tune-it", "draw-it"]


def test_what_fails_or_has_no_time_is_said_and_tried_again(processes, tmp_path, capsys):
    ran, ends = processes
    ends.update({"compile-it": 1, "test-it": None})
    statuses = run(tmp_path, status=1)
    assert (statuses["one"], statuses["two"], statuses["three"]) == ("failed", "out of time", "finished")
    printed = capsys.readouterr().out
    assert (
        "    | last line of compile-it\n" in printed and "failed: compile: one\nout of time: tests: two\n" in printed
    )
    page = (tmp_path / "README.md").read_text()
    assert "| tests | two | out of time | 0 | last line of test-it | `python test-it` |" in page
    ends.clear()
    ran.clear()
    assert run(tmp_path)["two"] == "finished"
    assert ran == ["restore-it", "compile-it", "test-it", "draw-it"]


def test_a_step_without_time_is_not_begun(processes, tmp_path, capsys):
    ran, _ = processes
    assert set(run(tmp_path, "--minutes", "0.05", status=1).values()) == {"no time left", "left out"}
    assert ran == [] and "no time left: tests: two" in capsys.readouterr().out


def test_time_that_is_left_goes_to_later_steps(processes, tmp_path, monkeypatch):
    limits = []

    def call(arguments, log, seconds):
        limits.append(round(seconds))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        return 0

    monkeypatch.setattr(gpu, "call", call)
    run(tmp_path, "--minutes", "12")
    assert limits == [180, 240, 360, 720]  # of what is left, by the steps that are left and not missing
    limits.clear()
    run(tmp_path, "--again", "--minutes", "1.5")
    assert limits == [60, 60, 60, 90]  # at least what is planned for it, and no more than is left


def test_a_process_is_ended_with_all_that_it_started(tmp_path):
    program = (
        "import subprocess, sys, time; print('begun', flush=True); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    child = f"import time; time.sleep(2); open({str(tmp_path / 'survived')!r}, 'w')"
    began = time.monotonic()
    assert gpu.call([sys.executable, "-c", program, child], tmp_path / "logs" / "log.txt", 1.0) is None
    assert time.monotonic() - began < 2 and "begun" in (tmp_path / "logs" / "log.txt").read_text()
    assert gpu.call([sys.executable, "-c", "import aft.gpu_plan; raise SystemExit(3)"], tmp_path / "log.txt", 60) == 3
    time.sleep(max(0, began + 2.3 - time.monotonic()))
    assert not (tmp_path / "survived").exists()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_has_commands_that_the_programs_take(device, tmp_path):
    plan = make_plan(device, tmp_path)
    parts = list(dict.fromkeys(step.part for step in plan))
    assert parts == [part for part in PARTS if device == "cuda" or part not in ("tests", "tune")]
    assert sum(step.minutes for step in plan) <= PLANNED_MINUTES
    assert len({(step.part, step.name) for step in plan}) == len(plan)
    for step in plan:
        _, program, *flags = step.arguments(100)
        assert "{seconds}" not in flags
        if program == "scripts/compile_triton.py" and not step.missing:
            compile_triton.parse_arguments(flags)
        elif program == "scripts/benchmark.py" and "fla" not in step.needs:
            on_cpu = ["cpu" if flag == "cuda" else flag for flag in flags if flag != "--compile"]
            args = benchmark.parse_arguments(on_cpu)
            assert args.output_dir == tmp_path
            assert args.suite == "pictures" or args.dtype == "bfloat16" or (args.suite, device) == ("ceiling", "cpu")
            models = {*gpu_plan.AFT_MODELS, "gpt2", "llama"}
            assert args.suite != "train" or models == set(args.models)
    if device == "cuda":
        assert {"tests/test_gpu.py", "tests/test_static_cache.py"} <= set(gpu_plan.marked_files())


def write_rows(folder, suite, rows):
    """Made-up rows: contestant, length, batch_size, seconds of a call, and what else is given."""
    whole = []
    for contestant, length, batch, seconds, more in rows:
        row = {**dict.fromkeys(COLUMNS, ""), **CUDA, "suite": suite, "contestant": contestant, "length": length}
        whole.append({**row, "batch_size": batch, "p50": seconds, "width": 100, **more})
    add_rows(folder / f"{suite}-cuda.csv", whole)


def verdicts(folder):
    """Figure, goal and verdict of each goal on the page."""
    page = write_page(folder, "cuda", [], "python scripts/gpu.py").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| aft-")]
    return {what: tuple(more) for what, *more in cells}, page


def test_the_page_says_which_goals_are_met(tmp_path):
    found, page = verdicts(tmp_path)
    assert "Of 43 goals 0 are met, 0 are not, and 43 are not measured." in page
    assert set(found.values()) >= {("", "80 %", "not measured"), ("", "50 %", "not measured")} and len(found) == 43
    (tmp_path / STEPS_FILE).write_text(f"{','.join(STEP_COLUMNS)}\ntrain,one,finished,1,cuda,a GPU,today,,\n")
    speeds = [("copy", 1, 1, 1, {"rate": 1000}), ("matmul-1024", 1, 1, 1, {"rate": 1e3})]
    write_rows(tmp_path, "ceiling", [*speeds, ("matmul-8192", 1, 1, 1, {"rate": 1e6})])
    # 1024 x 100 numbers of two bytes, five of each forward and seven backward, at 1e12 bytes a second.
    bound = 1024 * 100 * 2 / 1e12
    write_rows(tmp_path, "forward", [("aft-simple", 1024, 1, 5 * bound / 0.81, {})])
    rows = [
        ("aft-simple", 1024, 1, 12 * bound / 0.69, {}),
        ("aft-full", 1024, 2, 12 * 1025 * 1024 * 100 / 1e15 / 0.51, {}),
    ]
    # 32 numbers of a key in the place of 100: of forward 3 x 100 + 64, of backward 5 x 100 + 64.
    write_rows(tmp_path, "operator", [*rows, ("aft-conv-32-32", 1024, 1, 9.28 * bound / 0.625, {})])
    train = [("gpt2-compiled", 8192, 4, 3.3, {}), ("aft-simple-compiled", 8192, 4, 1.0, {})]
    train += [
        ("aft-local-32-compiled", 8192, 4, 1.2, {}),
        ("gla-fla", 8192, 4, 1.1, {}),
        ("hgrn-fla", 8192, 4, 1.15, {}),
    ]
    write_rows(tmp_path, "train", train)
    decode = [("llama", 16384, 1, 1, {"rate": 50}), ("llama-static", 16384, 128, 1, {"rate": 100})]
    decode += [("aft-simple-static", 16384, 4096, 1, {"rate": 1200}), ("aft-simple", 1024, 1, 1, {"rate": 9e9})]
    write_rows(tmp_path, "decode", decode)
    found, page = verdicts(tmp_path)
    measured = {what: cells for what, cells in found.items() if cells[0]}
    assert measured == {
        "aft-simple, forward, T = 1,024, of the copy bandwidth": ("81 %", "80 %", "met"),
        "aft-simple, forward + backward, T = 1,024, of the copy bandwidth": ("69 %", "70 %", "**not met**"),
        "aft-conv-32-32, forward + backward, T = 1,024, of the copy bandwidth": ("62.5 %", "60 %", "met"),
        "aft-full, forward + backward, T = 1,024, of the bf16 matrix rate": ("51 %", "50 %", "met"),
        "aft-simple, training step against GPT-2, T = 8,192": ("3.3", "3", "met"),
        "aft-local-32, training step against GPT-2, T = 8,192": ("2.75", "3", "**not met**"),
        "aft-simple, training step against fla's fastest, T = 8,192": ("1.1 (gla-fla)", "1", "met"),
        "aft-local-32, training step against fla's fastest, T = 8,192": ("0.917 (gla-fla)", "1", "**not met**"),
        "aft-simple, decoding against Llama, context 16,384": ("12 (batches of 4,096 and 128)", "10", "met"),
    }
    assert "Of 43 goals 6 are met, 3 are not, and 34 are not measured." in page
    assert "a GPU; torch 2, transformers 5; today." in page


def test_rows_of_another_processor_do_not_count(tmp_path):
    header = f"{','.join(STEP_COLUMNS)}\n"
    write_rows(tmp_path, "decode", [(name, 16384, 1, 1, {"rate": 1}) for name in ("llama", "aft-simple")])
    (tmp_path / STEPS_FILE).write_text(f"{header}train,one,finished,1,cuda,another GPU,today,,\n")
    found, page = verdicts(tmp_path)
    assert not any(figure for figure, *_ in found.values()) and "another GPU; nothing is measured yet." in page


def test_a_dry_run_goes_all_the_way_to_the_page(tmp_path, monkeypatch):
    """Of the forward passes, in this process."""

    def call(arguments, log, seconds):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        return arguments[2] == "operator" or not benchmark.main([*arguments[2:], "--seconds", "0.1"])

    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr(gpu, "find_processor", lambda device: benchmark.processor_name(device))
    assert run(tmp_path, "ceiling", "operator", "--device", "cpu", status=1)["forward"] == "finished"
    page = (tmp_path / "README.md").read_text()
    figures = [line.split(" | ")[1] for line in page.splitlines() if " of the copy bandwidth" in line]
    assert [figure.endswith(" %") for figure in figures] == [True] * 9 + [False] * 9
    assert page.startswith("# A dry run on a CPU\n") and "| compile | kernels for sm_90 | has not run |" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tuna", "tests"], "PART must be of compile, .*, report, got tuna"),
        (["--minutes", "0", "--output_dir", ""], r"--minutes must be in \(0, 1440\], got 0.0; --output_dir must be"),
        (["--minutes", "nan"], "--minutes must be in .* got nan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        gpu.main(flags)


def test_a_machine_without_a_gpu_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "false")
    with pytest.raises(ValueError, match="--device must be cpu, or cuda where there is a GPU, got cuda"):
        gpu.main(["--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
