"""The benchmark script: it runs, writes whole rows, and its plain form is the same function as ours."""

import csv

import benchmark
import pytest
import torch

from modeling_aft.ops import aft_attention


def test_operator_suite_writes_a_row_per_contestant_and_length(tmp_path):
    flags = ["--lengths", "8", "16", "--width", "8", "--heads", "2", "--window", "3", "--repeats", "2"]
    flags += ["--longest_table", "8", "--device", "cpu", "--output_dir", str(tmp_path)]
    path = benchmark.main(["operator", *flags])
    rows = list(csv.DictReader(path.open()))
    names = ["sdpa-h2", "aft-simple", "aft-local-3", "aft-conv-2-3"]
    assert [r["contestant"] for r in rows] == [*names, "aft-full", "plain-aft-full", *names]
    assert all(float(r["p20"]) <= float(r["p50"]) <= float(r["p80"]) for r in rows)
    assert {r["torch"] for r in rows} == {torch.__version__}


def test_dense_suite_measures_time_and_memory(tmp_path):
    flags = ["--lengths", "512", "--width", "16", "--heads", "4", "--repeats", "1", "--output_dir", str(tmp_path)]
    rows = {r["contestant"]: r for r in csv.DictReader(benchmark.main(["dense", *flags, "--device=cpu"]).open())}
    # The logits alone are 2 x 4 x 512 x 512 numbers of 4 bytes.
    assert int(rows["dense-plain"]["peak_bytes"]) > 8 * 2**20 > int(rows["dense"]["peak_bytes"])


def test_train_suite_measures_the_presets(tmp_path):
    presets = [f"configuration/models/aft-{name}-tiny.json" for name in ("simple", "conv")]
    flags = [
        "--lengths",
        "16",
        "--batch_size",
        "1",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
    ]
    rows = list(csv.DictReader(benchmark.main(["train", "--models", *presets, *flags]).open()))
    assert [r["contestant"] for r in rows] == ["aft-simple-tiny", "aft-conv-tiny"]


def test_the_plain_form_that_is_measured_is_the_same_function():
    query, key, value = torch.randn(3, 2, 20, 8)
    bias = torch.randn(20, 20)
    torch.testing.assert_close(
        benchmark.plain_aft(query, key, value, bias), aft_attention(query, key, value, bias), rtol=1e-4, atol=1e-5
    )


def test_wrong_flags_are_refused_together():
    with pytest.raises(ValueError, match="--heads must divide --width 10, got 4"):
        benchmark.parse_arguments(["operator", "--width", "10", "--heads", "4"])
    with pytest.raises(ValueError, match="--batch_size .* at least 1, got 0; .*--lengths .* at least 1, got 0"):
        benchmark.parse_arguments(["operator", "--batch_size", "0", "--lengths", "0"])
