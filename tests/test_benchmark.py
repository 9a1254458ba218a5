"""The benchmark script: each suite writes whole rows, keeps earlier ones, and measures the same work on both sides."""

import contextlib
import csv
import io
import os
import shutil
from xml.etree import ElementTree

import benchmark
import pytest
import roofline
import torch
from launching import processes
from transformers import DynamicCache, StaticCache

from aft import benchmark_contestants, benchmark_rows
from aft.benchmark_serving import draw_requests
from modeling_aft.compatibility import CACHE_NAME
from modeling_aft.ops import aft_attention


TINY = ["--device=cpu", "--layers=2", "--width=16", "--heads=2", "--conv_heads=4", "--window=3", "--rank=2"]
TINY += ["--repeats=2", "--steps=2"]
AFT = ["aft-simple", "aft-local-3", "aft-conv-4-3", "aft-full"]
AFT_MODELS = [*AFT[:3], *(f"{name}-decay" for name in AFT[:3]), "aft-full"]
PEERS = ["gpt2", "llama", "mamba", "rwkv"]


def arguments(suite, *flags):
    return benchmark.parse_arguments([suite, *TINY, *flags])


def rows_of(folder, suite, *flags):
    [path] = benchmark.main([suite, *TINY, "--output_dir", str(folder), *flags])
    assert path == folder / f"{suite}-cpu.csv"
    with path.open() as file:
        return list(csv.DictReader(file))


def names(rows, length):
    return [row["contestant"] for row in rows if row["length"] == str(length)]


def check_whole(rows, suite, unit):
    for row in rows:
        assert set(row) == set(benchmark_rows.COLUMNS) and row["suite"] == suite
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["turns"] == "2" and row["unit"] == unit and float(row["rate"]) > 0
        assert row["torch"] == torch.__version__ and row["dtype"] == "float32"


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """A folder with rows of operators and ceilings, the rows of operators, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("operators"), io.StringIO()
    limits = ["--longest", "aft-full=8", "plain-aft-full=8"]
    with contextlib.redirect_stdout(printed):
        rows = rows_of(folder, "operator", "--lengths", "8", "16", "--tokens", "32", *limits)
    rows_of(folder, "ceiling", "--lengths", "4096")
    return folder, rows, printed.getvalue()


def test_operator_suite_writes_a_row_per_contestant_and_length(operators):
    _, rows, printed = operators
    check_whole(rows, "operator", "tokens/s")
    assert names(rows, 8) == ["sdpa-h2", *AFT, "plain-aft-full"]
    assert names(rows, 16) == ["sdpa-h2", *AFT[:3]]
    assert [(row["length"], row["batch_size"]) for row in rows] == [("8", "4")] * 6 + [("16", "2")] * 4
    assert "T=    16  left out by --longest: aft-full, plain-aft-full" in printed


def test_dense_suite_measures_time_and_memory(tmp_path):
    rows = rows_of(tmp_path, "dense", "--lengths", "512", "--heads", "4", "--batch_size", "2", "--repeats", "1")
    peaks = {row["contestant"]: int(row["peak_bytes"]) for row in rows}
    # The logits alone are 2 x 4 x 512 x 512 numbers of 4 bytes.
    assert peaks["dense-plain"] > 8 * 2**20 > peaks["dense"]


def test_train_suite_measures_models_of_equal_size(tmp_path):
    limits = ["--longest", "mamba=8", "rwkv=8"]
    rows = rows_of(tmp_path, "train", "--lengths", "8", "16", "--batch_size", "1", "--width", "256", *limits)
    check_whole(rows, "train", "tokens/s")
    ours = [*AFT_MODELS, "synthesizer-dense", "transformer"]
    assert names(rows, 8) == [*ours, *PEERS]
    assert names(rows, 16) == [*ours, *PEERS[:2]]
    assert {row["layers"] for row in rows if row["contestant"] != "mamba"} == {"2"}
    parameters = {row["contestant"]: int(row["parameters"]) for row in rows if row["length"] == "8"}
    for name, count in parameters.items():
        assert count == pytest.approx(parameters["gpt2"], rel=0.15), name


def test_train_suite_measures_presets(tmp_path):
    presets = [f"configuration/models/aft-{name}-tiny.json" for name in ("simple", "conv")]
    rows = rows_of(tmp_path, "train", "--models", *presets, "gpt2", "--lengths", "16", "--batch_size", "1")
    assert names(rows, 16) == ["aft-simple-tiny", "aft-conv-tiny", "gpt2"]
    assert [row["width"] for row in rows] == ["128", "128", "16"]


def test_decode_suite_measures_a_step_after_each_context(tmp_path):
    rows = rows_of(tmp_path, "decode", "--lengths", "5", "1030")
    check_whole(rows, "decode", "tokens/s")
    assert names(rows, 5) == names(rows, 1030) == [*AFT_MODELS, "gpt2", "llama"]
    assert {row["batch_size"] for row in rows} == {"1"}


def test_forward_suite_measures_the_operators_alone(tmp_path):
    rows = rows_of(tmp_path, "forward", "--lengths", "8", "--batch_size", "2")
    check_whole(rows, "forward", "tokens/s")
    assert names(rows, 8) == ["sdpa-h2", *AFT, "plain-aft-full"]


def test_the_largest_batch_of_each_is_the_last_that_fits(tmp_path, monkeypatch, capsys):
    take_turn, tried = benchmark.take_turn, []

    def with_little_memory(contestant, device):
        tried.append((contestant.about["parameters"], contestant.work))
        if contestant.work > 4:
            raise torch.OutOfMemoryError("no")
        return take_turn(contestant, device)

    monkeypatch.setattr(benchmark, "take_turn", with_little_memory)
    flags = ["--lengths", "6", "--models", "aft-conv-4-3", "llama", "--repeats", "1"]
    rows = rows_of(tmp_path, "decode", "--largest_batch", "16", *flags)
    assert names(rows, 6) == ["aft-conv-4-3", "aft-conv-4-3-static", "llama", "llama-static"]
    assert {row["batch_size"] for row in rows} == {"4"}
    assert [work for _, work in tried[:3]] == [4, 16, 8]
    assert "left out for want of memory: llama-static, batch 8" in capsys.readouterr().out
    assert {row["batch_size"] for row in rows_of(tmp_path, "decode", "--largest_batch", "2", *flags)} == {"2", "4"}


def test_serving_suite_measures_padded_and_full_batches(tmp_path):
    flags = ["--models", "aft-conv-4-3", "llama", "--prompts", "5", "--batch_size", "2", "--repeats", "1"]
    rows = rows_of(tmp_path, "serving", "--lengths", "9", *flags)
    parts = [f"{model}-{part}" for model in ("aft-conv-4-3", "llama") for part in ("padded", "continuous")]
    assert names(rows, 9) == parts
    written = sum(draw_requests(5, 9)[1])
    assert all(float(row["rate"]) * float(row["p50"]) == pytest.approx(written, rel=1e-2) for row in rows)


def test_images_suite_measures_classifiers_and_vit(tmp_path):
    models = ["--models", "aft-conv-tiny-11-32", "vit-tiny"]
    rows = rows_of(tmp_path, "images", "--lengths", "32", "--batch_size", "1", *models)
    check_whole(rows, "images", "images/s")
    parts = [f"{model}-{part}" for part in ("forward", "training") for model in models[1:]]
    assert names(rows, 32) == parts
    assert {row["width"] for row in rows} == {"192"}


def test_seq2seq_suite_measures_training_and_writing_of_models_of_equal_size(tmp_path):
    rows = rows_of(tmp_path, "seq2seq", "--lengths", "6", "--repeats", "1")
    models = ["synthesizer-random", "synthesizer-factorized-random", "synthesizer-dense"]
    models += ["synthesizer-random-dot-product", "transformer", "aft-conv-4-3", "t5", "bart"]
    assert names(rows, 6) == [f"{model}-{part}" for part in ("training", "generation") for model in models]
    assert {row["batch_size"] for row in rows} == {"4"}
    sizes = [int(row["parameters"]) for row in rows]
    assert max(sizes) < 1.05 * min(sizes)
    for row in rows:
        tokens = 4 * 6 * (2 if row["contestant"].endswith("training") else 1)
        assert float(row["rate"]) * float(row["p50"]) == pytest.approx(tokens, rel=1e-2)


def test_memory_suite_measures_each_model_in_its_own_process(tmp_path):
    flags = ["--models", "aft-simple", "gpt2", "--longest", "gpt2=1024", "--width", "64"]
    [row] = rows_of(tmp_path, "memory", "--lengths", "2048", *flags)
    assert (row["contestant"], row["length"], row["p50"], row["rate"]) == ("aft-simple", "2048", "", "")
    # Weights, gradients and two averages of AdamW; the feed-forward layers alone keep 2 x 2 x T x 4D numbers.
    assert int(row["peak_bytes"]) > 4 * 4 * int(row["parameters"]) + 4 * 4 * 2048 * 4 * 64


def test_a_process_of_its_own_is_another_one(monkeypatch):
    monkeypatch.setattr(benchmark, "get_context", lambda method: processes())
    assert benchmark.in_own_process(os.getpid) != os.getpid()


def test_ceiling_suite_measures_copies_exp_and_products(tmp_path):
    rows = rows_of(tmp_path, "ceiling", "--lengths", "100000", "--repeats", "1")
    units = {row["contestant"]: row["unit"] for row in rows}
    assert set(units.values()) == {"GB/s", "Gexp/s", "GFLOP/s"}
    assert {"copy", "copy-in-cache", "exp-in-cache", "matmul-1024"} < set(units)
    [copy] = [row for row in rows if row["contestant"] == "copy"]
    assert copy["length"] == "100000"
    assert float(copy["rate"]) == pytest.approx(2 * 4 * 1e5 / 1e9 / float(copy["p50"]), rel=1e-2)


def test_roofline_sets_the_floor_beside_what_was_measured(operators, tmp_path):
    folder, measured, _ = operators
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with roofline.main(["--output_dir", str(tmp_path)]).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == [*AFT, *AFT[:3]]
    times = {(row["contestant"], row["length"]): float(row["p50"]) for row in measured}
    for row in rows:
        floor = sum(float(row[f"{part}_ms"]) for part in ("products", "exponentials", "bytes"))
        assert float(row["floor_ms"]) == pytest.approx(floor, rel=1e-2) and floor > 0
        assert float(row["measured_ms"]) == pytest.approx(times[row["contestant"], row["length"]] * 1e3, rel=1e-3)
        assert sum(float(row[kind]) for kind in roofline.SHARES) == pytest.approx(1, abs=0.01)
        assert float(row["products"]) > 0 and float(row["exponentials"]) > 0


def test_operations_of_a_windowed_form_are_linear_in_length_and_those_of_full_are_not():
    for name, growth in {"aft-simple": 4, "aft-local-32": 4, "aft-conv-8-32": 4, "aft-full": 16}.items():
        short, long = (roofline.counts(name, 2, length, 64)[0] for length in (256, 1024))
        assert long == growth * short


def test_a_row_replaces_its_predecessor_and_leaves_the_others(tmp_path):
    rows_of(tmp_path, "operator", "--lengths", "4", "8", "--batch_size", "1", "--repeats", "1")
    before = rows_of(tmp_path, "operator", "--lengths", "4", "--batch_size", "3", "--repeats", "1")
    after = rows_of(tmp_path, "operator", "--lengths", "4", "--batch_size", "1", "--longest", "aft-full=2")
    assert len(before) == len(after) == 18
    again = [r for r in after if r["turns"] == "2"]
    assert {(r["contestant"], r["length"], r["batch_size"]) for r in again} == {
        (name, "4", "1") for name in ("sdpa-h2", *AFT[:3], "plain-aft-full")
    }
    kept = [r for r in before if (r["length"], r["batch_size"]) != ("4", "1") or r["contestant"] == "aft-full"]
    assert [r for r in after if r["turns"] == "1"] == kept
    assert [int(r["length"]) for r in after] == sorted(int(r["length"]) for r in after)


def test_what_was_measured_survives_a_failure(tmp_path, monkeypatch):
    measure_time = benchmark.measure_time

    def failing(args, makers, batch, length):
        if length == 8:
            raise KeyboardInterrupt
        return measure_time(args, makers, batch, length)

    monkeypatch.setattr(benchmark, "measure_time", failing)
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path, "operator", "--lengths", "4", "8")
    monkeypatch.undo()
    assert len(benchmark_rows.read_rows(tmp_path / "operator-cpu.csv")) == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_those_that_need_too_much_memory_are_named(capsys):
    def too_large():
        raise torch.OutOfMemoryError("no")

    assert benchmark.those_that_fit({"large": too_large, "small": lambda: 3}, 16) == {"small": 3}
    assert "T=    16  left out for want of memory: large" in capsys.readouterr().out


def test_pictures_show_every_contestant(operators, tmp_path):
    shutil.copytree(operators[0], tmp_path, dirs_exist_ok=True)
    rows_of(tmp_path, "decode", "--lengths", "4", "--models", "aft-simple", "gpt2")
    paths = benchmark.main(["pictures", "--output_dir", str(tmp_path)])
    assert [path.name for path in paths] == ["decode-cpu.svg", "operator-cpu.svg"]
    for path, expected in zip(paths, (["aft-simple", "gpt2"], ["sdpa-h2", *AFT]), strict=True):
        assert path.stat().st_size < 100_000
        texts = {element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
        assert {*expected, "tokens/s"} <= texts
    written = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in benchmark.main(["pictures", "--output_dir", str(tmp_path)])] == written


def test_the_plain_form_that_is_measured_is_the_same_function():
    query, key, value = torch.randn(3, 2, 20, 8)
    bias = torch.randn(20, 20)
    torch.testing.assert_close(
        benchmark_contestants.plain_aft(query, key, value, bias),
        aft_attention(query, key, value, bias),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["aft-conv-4-3", "aft-full", "gpt2"])
def test_compiled_and_uncompiled_steps_do_the_same_work(name, monkeypatch):
    """Their contexts are equally long, and so are the logits of a step after it; the compiler itself is left out."""
    original, steps = torch.compile, []

    def compile_without_code(function, **options):
        compiled = original(function, backend="eager")

        def called(**inputs):
            steps.append((compiled(**inputs).logits, inputs[CACHE_NAME]))

        return called

    monkeypatch.setattr(torch, "compile", compile_without_code)
    args = arguments("decode", "--compile", "--models", name)
    makers = benchmark_contestants.decode_contestants(args, 2, 9)
    assert list(makers) == [name, f"{name}-compiled"]
    eager, compiled = (make() for make in makers.values())
    models = []
    hook = torch.nn.Module.__call__

    def noted(module, *inputs, **options):
        output = hook(module, *inputs, **options)
        if CACHE_NAME in options and hasattr(output, "logits"):
            models.append((output.logits, options[CACHE_NAME]))
        return output

    monkeypatch.setattr(torch.nn.Module, "__call__", noted)
    eager.run()
    monkeypatch.undo()
    compiled.run()
    [(logits, past)], [(compiled_logits, compiled_past)] = models, steps
    assert type(past) is DynamicCache and type(compiled_past) is StaticCache
    assert int(past.get_seq_length()) == int(compiled_past.get_seq_length()) == 10
    torch.testing.assert_close(compiled_logits, logits)


def test_compiled_models_train_under_names_of_their_own(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    rows = rows_of(tmp_path, "train", "--compile", "--models", "aft-conv-4-3", "rwkv", "--lengths", "32", "128")
    assert names(rows, 32) == ["aft-conv-4-3-compiled", "rwkv-compiled"]
    assert names(rows, 128) == ["aft-conv-4-3-compiled"]  # RWKV's unrolled loop has a limit of its own
    assert len(compiled) == 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_attention_is_causal_without_a_mask(name, monkeypatch):
    """With a mask, SDPA has no FlashAttention."""
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*tensors, **options):
        calls.append((options["attn_mask"], options["is_causal"]))
        return attend(*tensors, **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="eager"))
    args = arguments("train", "--models", name)
    args.compile = True
    [make] = benchmark_contestants.train_contestants(args, 1, 8).values()
    contestant = make()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    torch._dynamo.reset()
    contestant.run()
    assert calls == [(None, True)] * args.layers


def test_a_file_of_other_columns_is_refused_before_the_work(tmp_path):
    (tmp_path / "operator-cpu.csv").write_text("contestant,length\naft-simple,8\n")
    with pytest.raises(ValueError, match="operator-cpu.csv must have the columns suite, contestant, .*remove it"):
        rows_of(tmp_path, "operator", "--lengths", "4")
    with pytest.raises(ValueError, match="--output_dir must hold csv files of operator, .*, got .*nothing"):
        benchmark.main(["pictures", "--output_dir", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["operator", "--width", "10", "--heads", "4", "--conv_heads", "5"], "--heads must divide --width 10, got 4"),
        (["operator", "--conv_heads", "3"], "--conv_heads must divide --width 256, got 3"),
        (["train", "--batch_size", "0", "--lengths", "0"], "--batch_size .* least 1, got 0; --lengths .* 1, got 0"),
        (["train", "--models", "gpt3"], "--models must be files or of aft-simple, .*, got gpt3"),
        (["serving", "--models", "aft-full"], "--models must be files or of aft-simple, .*, got aft-full"),
        (["decode", "--models", "mamba"], "--models must be files or of aft-simple, .*, llama, got mamba"),
        (
            ["operator", "--models", "gpt2"],
            "--models must go with train, decode, memory, serving, images, seq2seq, got operator",
        ),
        (["train", "--dropout", "0.1"], r"--dropout must be in \[0, 1\), and go with seq2seq, got 0.1 with train"),
        (["seq2seq", "--dropout", "1"], r"--dropout must be in \[0, 1\), and go with seq2seq, got 1.0 with seq2seq"),
        (["operator", "--compile"], "--compile must go with train, decode, .*, got operator on cpu"),
        (
            ["operator", "--largest_batch", "0"],
            "--largest_batch .* least 1, got 0; --largest_batch must go with decode",
        ),
        (["memory", "--compile"], "--compile must go with .* memory on cuda, got memory on cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_refused_together(flags, message):
    with pytest.raises(ValueError, match=message):
        benchmark.parse_arguments([*flags, "--device=cpu"])


def test_wrong_limits_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--longest must name contestants of operator .*sdpa-h2.*, got mamba"):
        rows_of(tmp_path, "operator", "--lengths", "4", "--longest", "mamba=8")
    with pytest.raises(SystemExit):
        arguments("operator", "--longest", "aft-full")
    assert "must be NAME=LENGTH, got aft-full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "cuda:7"], "--device must be cpu, or cuda where there is a GPU, got cuda:7"),
        (["--device", "abacus"], "--device must be cpu, or cuda where there is a GPU, got abacus"),
        (["--seconds", "nan"], "--seconds must be positive, got nan"),
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["--output_dir", ""], "--output_dir must be a path, got ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ValueError, match=f"benchmark.py: {message}"):
        benchmark.parse_arguments(["operator", *flags])


@pytest.mark.parametrize("suite", ["train", "memory"])
def test_what_no_memory_holds_is_left_out(tmp_path, capsys, monkeypatch, suite):
    monkeypatch.setattr(benchmark, "get_context", lambda method: processes())
    flags = ["--models", "aft-simple", "--lengths", "1000000000000", "--batch_size", "1", "--width", "1024"]
    assert rows_of(tmp_path, suite, *flags) == []
    assert "left out for want of memory: aft-simple" in capsys.readouterr().out
