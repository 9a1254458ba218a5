"""Bits per byte: the metric, and the protocols that score every byte once."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from score import main

from modeling_aft import AFTConfig, AFTForCausalLM
from shared.bits_per_byte import METRIC, batches, evaluate_bits_per_byte, load_batch, streams, windows


TEXT = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
PROTOCOLS = ("segments", "sliding", "carried")


def read(start: int, stop: int) -> np.ndarray:
    assert 0 <= start < stop <= len(TEXT)
    return TEXT[start:stop]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(METRIC), keep_in_memory=True)


# The metric


@pytest.mark.parametrize(
    "nats, byte_counts, expected",
    [
        pytest.param([math.log(2)], [1], 1.0, id="one-bit"),
        pytest.param([math.log(256) * 10, 0.0], [10, 10], 4.0, id="bytes-not-segments-are-averaged"),
        pytest.param([math.log(2), 0.0], [1, 0], 1.0, id="empty-segment"),
    ],
)
def test_metric(metric, nats, byte_counts, expected):
    result = metric.compute(nats=nats, byte_counts=byte_counts)
    assert result == {"bits_per_byte": pytest.approx(expected, rel=1e-12), "bytes_scored": sum(byte_counts)}


def test_metric_sums_in_float64(metric):
    result = metric.compute(nats=[1e8] + [1e-3] * 1000, byte_counts=[1] * 1001)
    assert result["bits_per_byte"] == pytest.approx((1e8 + 1) / (math.log(2) * 1001), rel=1e-14)


@pytest.mark.parametrize("byte_counts", [[0, 0], [3, -1]], ids=["no-bytes", "negative"])
def test_metric_refuses_wrong_counts(metric, byte_counts):
    with pytest.raises(ValueError, match="byte_counts"):
        metric.compute(nats=[1.0, 1.0], byte_counts=byte_counts)


# Windows


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("start, stop", [(1, 1000), (90, 95), (90, 91), (500, 756)])
@pytest.mark.parametrize("length, stride", [(16, 8), (16, 16), (7, 3), (1, 1), (300, 1)])
@pytest.mark.parametrize("rows, num_processes", [(1, 1), (4, 1), (3, 2)])
def test_each_byte_is_scored_once(protocol, start, stop, length, stride, rows, num_processes):
    scored, num_batches = Counter(), set()
    for process in range(num_processes):
        parts = list(batches(protocol, start, stop, length, stride, rows, process, num_processes))
        num_batches.add(len(parts))
        for batch in parts:
            assert len(batch) == rows
            inputs, labels, is_scored = load_batch(lambda a, b: np.arange(a, b), batch, length)
            assert inputs.shape == labels.shape == is_scored.shape == (rows, length)
            assert (labels[is_scored] == inputs[is_scored] + 1).all()
            scored.update(labels[is_scored].tolist())
    assert scored == Counter(range(start, stop))
    assert len(num_batches) == 1  # else the processes of a sharded model would wait for each other


@pytest.mark.parametrize("length, stride", [(16, 8), (16, 5), (7, 1)])
def test_sliding_gives_every_byte_its_context(length, stride):
    first, *others = windows("sliding", 100, 400, length, stride)
    assert first == (100, 100, 100 + length)
    for first_label, first_scored, end in others:
        assert end - first_label == length
        assert first_scored - first_label >= length - stride


def test_streams_are_contiguous():
    ranges = streams(10, 33, 4)
    assert [first for first, _ in ranges[1:]] == [end for _, end in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (10, 33)
    assert {end - first for first, end in ranges} == {5, 6}


# Models


class Bigram(torch.nn.Module):
    """Predicts from the last byte alone, so that every protocol must give the same number."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, input_ids, use_cache, cache=None):
        return SimpleNamespace(logits=self.table(input_ids), cache="state")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("start, stop", [(1, 1000), (900, 950)])
def test_equals_the_sum_over_bytes(accelerator, protocol, start, stop):
    model = Bigram().train()
    result = evaluate_bits_per_byte(
        model, read, accelerator, start, stop, protocol=protocol, length=16, stride=5, batch_size=3
    )
    log_probabilities = model.table.weight.detach().double().log_softmax(dim=-1)
    text = torch.from_numpy(TEXT.astype(np.int64))
    nats = -log_probabilities[text[start - 1 : stop - 1], text[start:stop]].sum().item()
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (stop - start), rel=1e-6)
    assert (result["bytes_scored"], result["protocol"], result["length"]) == (stop - start, protocol, 16)
    assert result["dtype"] == "float32"
    assert model.training


@pytest.fixture(scope="module")
def recurrent_model():
    torch.manual_seed(0)
    config = AFTConfig(
        aft_type="simple", hidden_size=32, num_hidden_layers=2, position_embedding_type="none", initializer_range=0.5
    )
    return AFTForCausalLM(config).eval()


def bits_per_byte_of_one_forward(model, start: int, stop: int) -> float:
    text = torch.from_numpy(TEXT[start - 1 : stop].astype(np.int64))
    with torch.no_grad():
        log_probabilities = model(input_ids=text[None, :-1]).logits[0].double().log_softmax(dim=-1)
    return -log_probabilities.gather(1, text[1:, None]).mean().item() / math.log(2)


def test_segments_are_independent(accelerator, recurrent_model):
    result = evaluate_bits_per_byte(
        recurrent_model, read, accelerator, 100, 140, protocol="segments", length=16, stride=8, batch_size=2
    )
    parts = [(100, 116), (116, 132), (132, 140)]
    expected = sum(bits_per_byte_of_one_forward(recurrent_model, *part) * (part[1] - part[0]) for part in parts) / 40
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    whole = bits_per_byte_of_one_forward(recurrent_model, 100, 140)
    assert result["bits_per_byte"] != pytest.approx(whole, rel=1e-3)


def test_carried_equals_one_long_forward(accelerator, recurrent_model):
    result = evaluate_bits_per_byte(
        recurrent_model, read, accelerator, 100, 140, protocol="carried", length=7, stride=1, batch_size=1
    )
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte_of_one_forward(recurrent_model, 100, 140), rel=1e-5)
    assert result["streams"] == 1


@pytest.mark.parametrize("start, stop", [(0, 10), (10, 10)])
def test_wrong_range_is_refused(accelerator, start, stop):
    with pytest.raises(ValueError, match="begins at 1 or later"):
        evaluate_bits_per_byte(
            Bigram(), read, accelerator, start, stop, protocol="segments", length=4, stride=4, batch_size=1
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_larger_than_the_text_is_all_of_it(accelerator, recurrent_model, protocol):
    """No memory is spent on rows and columns that hold nothing."""
    score = [
        evaluate_bits_per_byte(
            recurrent_model, read, accelerator, 100, 140, protocol=protocol, length=length, stride=1, batch_size=rows
        )
        for length, rows in ((40, 40), (10**12, 10**12))
    ]
    assert score[1]["bits_per_byte"] == pytest.approx(score[0]["bits_per_byte"], rel=1e-6)
    assert score[1]["length"] == 10**12 and score[1].get("streams") == score[0].get("streams")


@pytest.mark.parametrize("rows, streams, longest", [(1, 1, 40), (3, 3, 14), (40, 40, 1), (50, 40, 1)])
def test_carried_names_the_length_of_its_streams(accelerator, recurrent_model, rows, streams, longest):
    result = evaluate_bits_per_byte(
        recurrent_model, read, accelerator, 100, 140, protocol="carried", length=7, stride=1, batch_size=rows
    )
    assert (result["streams"], result["bytes_per_stream"]) == (streams, longest)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(accelerator, number):
    model = Bigram()
    torch.nn.init.constant_(model.table.weight, number)
    with pytest.raises(FloatingPointError, match="the score is nan bits per byte"):
        evaluate_bits_per_byte(
            model, read, accelerator, 1, 50, protocol="segments", length=16, stride=16, batch_size=3
        )


# The command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory, recurrent_model) -> Path:
    """Saved models: one without a limit, one of 16 positions, one of 300 tokens; and a file of bytes."""
    folder = tmp_path_factory.mktemp("models")
    recurrent_model.save_pretrained(folder / "recurrent")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 16, "window_size": 4}
    AFTForCausalLM(AFTConfig(**sizes)).save_pretrained(folder / "limited")
    AFTForCausalLM(AFTConfig(**sizes, vocab_size=300)).save_pretrained(folder / "words")
    (folder / "data").write_bytes(TEXT.tobytes())
    return folder


@pytest.mark.parametrize("split, start, stop", [("train", 1, 900), ("valid", 900, 950), ("test", 950, 1000)])
def test_command_line_scores_a_split(folders, recurrent_model, capsys, split, start, stop):
    flags = ["--dataset_path", str(folders / "data"), "--split", split, "--protocol", "carried", "--batch_size", "1"]
    result = main([str(folders / "recurrent"), *flags, "--length", "64"])
    expected = bits_per_byte_of_one_forward(recurrent_model, start, stop)
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert result["bytes_scored"] == stop - start
    line = f"{split}: {result['bits_per_byte']:.4f} bits per byte (carried, T = 64, 1 streams, {stop - start} bytes, "
    assert line + f"float32); {stop - start} bytes per stream\n" in capsys.readouterr().out


def test_command_line_takes_length_and_stride_from_the_model(folders):
    result = main([str(folders / "limited"), "--dataset_path", str(folders / "data"), "--protocol", "sliding"])
    assert (result["length"], result["stride"]) == (16, 8)


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("limited", "--split half", "--split must be one of train, valid, test, got 'half'"),
        ("limited", "--batch_size 0 --dtype int8", "--batch_size must be at least 1, got 0; --dtype must be one of"),
        ("limited", "--length 17", r"--length must be at most max_position_embeddings \(16\), got 17"),
        ("limited", "--protocol carried", "--protocol must be segments or sliding, got 'carried'"),
        ("limited", "--stride 4", "--stride must be left out without --protocol sliding, got 4"),
        ("limited", "--protocol sliding --stride 17", r"--stride must be at most --length \(16\), got 17"),
        ("words", "", "must be a model of 256 bytes, got 300 tokens"),
    ],
    ids=["split", "two", "length", "carried", "stride", "long-stride", "tokens"],
)
def test_command_line_refuses(folders, model, flags, message):
    with pytest.raises(ValueError, match=message):
        main([str(folders / model), "--dataset_path", str(folders / "data"), *flags.split()])
