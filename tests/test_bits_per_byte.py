"""Bits per byte: the metric, and the protocols that score every byte once."""

import csv
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from draw_positions import main as draw_positions
from launching import ROOT, run_on_two_processes
from transformers import GPT2Config, GPT2LMHeadModel

from aft.bits_per_byte import METRIC, batches, evaluate_bits_per_byte, load_batch
from aft.commands.evaluate import main
from aft.protocols import Protocol, Window
from aft.token_data import TokenData
from modeling_aft import AFTConfig, AFTForCausalLM


TEXT = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
PROTOCOLS = {
    "segments": Protocol("segments", 16),
    "sliding": Protocol("sliding", 16, stride=5),
    "carried": Protocol("carried", 7, stream_length=40),
    "carried-one-stream": Protocol("carried", 16),
    "refreshed": Protocol("refreshed", 7, refresh_every=20, refresh_overlap=6),
}
by_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


class Bytes(TokenData):
    """A text of bytes, no part of which is read that is not there."""

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self.ids)
        return super().read(start, stop)


DATA = Bytes.of_bytes(TEXT.tobytes())
NUMBERS = TokenData(np.arange(len(TEXT)), None, {}, {}, "")


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


def test_metric_of_pictures_divides_by_subpixels():
    metric = evaluate.load(str(METRIC.parents[1] / "bits_per_dim" / "bits_per_dim.py"), keep_in_memory=True)
    found = metric.compute(nats=[math.log(256) * 12, math.log(4) * 12], subpixel_counts=[12, 12])
    assert found == {"bits_per_dim": pytest.approx((8 + 2) / 2, rel=1e-12), "subpixels_scored": 24}
    with pytest.raises(ValueError, match="subpixel_counts"):
        metric.compute(nats=[1.0], subpixel_counts=[0])


# Windows


@pytest.mark.parametrize(
    "protocol",
    [
        *(Protocol("segments", length) for length in (16, 7, 1, 300)),
        *(Protocol("sliding", *sizes) for sizes in ((16, 8), (16, 16), (7, 3), (1, 1), (300, 1))),
        *(Protocol("carried", length, stream_length=stream) for length, stream in ((16, None), (7, 100), (300, 9))),
        *(
            Protocol("refreshed", length, refresh_every=every, refresh_overlap=overlap)
            for length, every, overlap in ((16, 64, 8), (7, 10, 9), (300, 20, 1))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("start, stop", [(1, 1000), (90, 95), (90, 91), (500, 756)])
@pytest.mark.parametrize("rows, num_processes", [(1, 1), (4, 1), (3, 2)])
def test_each_byte_is_scored_once(protocol, start, stop, rows, num_processes):
    scored, calls = Counter(), []
    for process in range(num_processes):
        parts = list(batches(protocol, start, stop, rows, process, num_processes))
        calls.append([longest for _, longest in parts])
        for batch, longest in parts:
            assert len(batch) == rows
            for offset in range(0, longest, protocol.length):
                inputs, labels, positions, _ = load_batch(NUMBERS, batch, offset, protocol.length)
                assert inputs.shape == labels.shape == positions.shape == (rows, protocol.length)
                is_scored = positions > 0
                assert (labels[is_scored] == inputs[is_scored] + 1).all()
                scored.update(labels[is_scored].tolist())
    assert scored == Counter(range(start, stop))
    assert calls[0] == calls[-1]  # else the processes of a sharded model would wait for each other


@pytest.mark.parametrize("length, stride", [(16, 8), (16, 5), (7, 1)])
def test_sliding_gives_every_byte_its_context(length, stride):
    first, *others = Protocol("sliding", length, stride).windows(100, 400)
    assert first == Window(100, 100, 100 + length, 100)
    for window in others:
        assert window.end - window.first == length
        assert window.scored - window.first >= length - stride


def test_streams_are_side_by_side():
    windows = list(Protocol("carried", 4, stream_length=10).windows(5, 33))
    assert windows == [Window(5, 5, 15, 5), Window(15, 15, 25, 15), Window(25, 25, 33, 25)]


def test_a_refreshed_stream_starts_anew():
    windows = list(Protocol("refreshed", 4, refresh_every=10, refresh_overlap=3).windows(5, 33))
    assert windows == [Window(5, 5, 15, 5), Window(12, 15, 22, 5), Window(19, 22, 29, 5), Window(26, 29, 33, 5)]


@pytest.mark.parametrize(
    "protocol, limit, message",
    [
        (Protocol("segments", 16, stride=4), None, "--stride must be left out without --protocol sliding, got 4"),
        (
            Protocol("sliding", 16, 4, stream_length=4),
            None,
            "--stream_length must be left out without --protocol carried",
        ),
        (Protocol("carried", 16, refresh_every=4), None, "--refresh_every must be left out without --protocol refre"),
        (Protocol("sliding", 16), None, "--stride must be given with --protocol sliding, got None"),
        (Protocol("sliding", 16, stride=17), None, "--stride must be at most T (16), got 17"),
        (Protocol("sliding", 16, stride=0), None, "--stride must be at least 1, got 0"),
        (Protocol("carried", 16, stream_length=-1), None, "--stream_length must be at least 1, got -1"),
        (Protocol("carried", 16), 16, "--stream_length must be at most max_position_embeddings (16), where the posit"),
        (
            Protocol("refreshed", 16, refresh_every=8),
            None,
            "--refresh_overlap must be given with --protocol refreshed",
        ),
        (Protocol("refreshed", 16, None, None, 8, 8), None, "--refresh_overlap must be less than R (8), got 8"),
        (Protocol("refreshed", 16, None, None, 17, 8), 16, "--refresh_every must be at most max_position_embeddings"),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
def test_protocols_that_cannot_be_are_refused(protocol, limit, message):
    [problem] = protocol.problems(limit)
    assert problem.startswith(message)


# Models


class Bigram(torch.nn.Module):
    """Predicts from the last byte alone, so that every protocol must give the same number."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, input_ids, use_cache, cache=None):
        return SimpleNamespace(logits=self.table(input_ids), cache="state")


@by_protocol
@pytest.mark.parametrize("start, stop", [(1, 1000), (900, 950)])
def test_equals_the_sum_over_bytes(accelerator, protocol, start, stop):
    model = Bigram().train()
    result = evaluate_bits_per_byte(model, DATA, accelerator, start, stop, protocol, batch_size=3)
    log_probabilities = model.table.weight.detach().double().log_softmax(dim=-1)
    text = torch.from_numpy(TEXT.astype(np.int64))
    nats = -log_probabilities[text[start - 1 : stop - 1], text[start:stop]].sum().item()
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (stop - start), rel=1e-6)
    assert (result["bytes_scored"], result["protocol"]) == (stop - start, protocol.protocol)
    assert result["length"] == protocol.length
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
    result = evaluate_bits_per_byte(recurrent_model, DATA, accelerator, 100, 140, PROTOCOLS["segments"], 2)
    parts = [(100, 116), (116, 132), (132, 140)]
    expected = sum(bits_per_byte_of_one_forward(recurrent_model, *part) * (part[1] - part[0]) for part in parts) / 40
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    whole = bits_per_byte_of_one_forward(recurrent_model, 100, 140)
    assert result["bits_per_byte"] != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("stream, streams", [(None, [(100, 140)]), (16, [(100, 116), (116, 132), (132, 140)])])
def test_carried_equals_one_long_forward_for_each_stream(accelerator, recurrent_model, stream, streams):
    protocol = Protocol("carried", 7, stream_length=stream)
    result = evaluate_bits_per_byte(recurrent_model, DATA, accelerator, 100, 140, protocol, batch_size=2)
    expected = sum(bits_per_byte_of_one_forward(recurrent_model, *part) * (part[1] - part[0]) for part in streams) / 40
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result["stream_length"] == stream or 40


@pytest.mark.parametrize("family", ["aft", "gpt2"])
def test_refreshed_is_sliding_over_windows_as_long_as_one_start(accelerator, recurrent_model, family):
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=256, n_positions=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = recurrent_model if family == "aft" else GPT2LMHeadModel(gpt2)
    scores = [
        evaluate_bits_per_byte(model, DATA, accelerator, 100, 400, protocol, 3)["bits_per_byte"]
        for protocol in (Protocol("refreshed", 7, None, None, 60, 12), Protocol("sliding", 60, 48))
    ]
    assert scores[0] == pytest.approx(
        scores[1], rel=1e-6
    )  # (400 - 100 - 60) / 48 is whole: the last window ends there


@by_protocol
def test_no_score_depends_on_the_batch_size(accelerator, recurrent_model, protocol):
    first, *others = (
        evaluate_bits_per_byte(recurrent_model, DATA, accelerator, 100, 400, protocol, batch_size)
        for batch_size in (1, 2, 7, 10**12)
    )
    for other in others:
        assert other["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=1e-6)
        assert [row["bytes_scored"] for row in other["by_position"]] == [
            row["bytes_scored"] for row in first["by_position"]
        ]


@by_protocol
def test_scores_by_position_are_those_of_the_bytes_there(accelerator, recurrent_model, protocol):
    result = evaluate_bits_per_byte(recurrent_model, DATA, accelerator, 100, 400, protocol, batch_size=2)
    nats, counts = Counter(), Counter()
    for window in protocol.windows(100, 400):
        text = torch.from_numpy(TEXT[window.first - 1 : window.end].astype(np.int64))
        with torch.no_grad():
            log_probabilities = recurrent_model(input_ids=text[None, :-1]).logits[0].log_softmax(dim=-1)
        losses = -log_probabilities.gather(1, text[1:, None])[:, 0]
        for label in range(window.scored, window.end):
            bucket = int(math.log2(label - window.origin + 1))
            nats[bucket] += losses[label - window.first].item()
            counts[bucket] += 1
    assert [(row["first"], row["last"]) for row in result["by_position"]] == [(2**b, 2 ** (b + 1) - 1) for b in counts]
    assert [row["bytes_scored"] for row in result["by_position"]] == [*counts.values()]
    found = [row["bits_per_byte"] for row in result["by_position"]]
    assert found == pytest.approx([nats[b] / counts[b] / math.log(2) for b in counts], rel=1e-4)


@pytest.mark.parametrize("start, stop", [(0, 10), (10, 10)])
def test_wrong_range_is_refused(accelerator, start, stop):
    with pytest.raises(ValueError, match="begins at 1 or later"):
        evaluate_bits_per_byte(Bigram(), DATA, accelerator, start, stop, Protocol("segments", 4), batch_size=1)


@pytest.mark.parametrize(
    "protocol",
    [Protocol(name, *sizes) for name, *sizes in (("segments", 10**12), ("sliding", 10**12, 1), ("carried", 10**12))],
    ids=lambda protocol: protocol.protocol,
)
def test_a_window_larger_than_the_text_is_all_of_it(accelerator, recurrent_model, protocol):
    """No memory is spent on rows and columns that hold nothing."""
    result = evaluate_bits_per_byte(recurrent_model, DATA, accelerator, 100, 140, protocol, batch_size=10**12)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte_of_one_forward(recurrent_model, 100, 140), rel=1e-6)
    assert result["length"] == 10**12 and result.get("stream_length", 40) == 40


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(accelerator, number):
    model = Bigram()
    torch.nn.init.constant_(model.table.weight, number)
    with pytest.raises(FloatingPointError, match="the score is nan bits per byte"):
        evaluate_bits_per_byte(model, DATA, accelerator, 1, 50, PROTOCOLS["segments"], batch_size=3)


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
    flags = ["--dataset_path", str(folders / "data"), "--split", split, "--protocol", "carried"]
    result = main([str(folders / "recurrent"), *flags, "--length", "64"])
    expected = bits_per_byte_of_one_forward(recurrent_model, start, stop)
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert result["bytes_scored"] == stop - start
    protocol = f"carried, T = 64, L = {stop - start}, {stop - start} bytes, float32"
    assert f"{split}: {result['bits_per_byte']:.4f} bits per byte ({protocol})\n" in capsys.readouterr().out


def test_two_processes_give_the_score_of_one(folders, recurrent_model, tmp_path):
    flags = [str(folders / "recurrent"), "--dataset_path", str(folders / "data"), "--protocol", "carried"]
    flags += ["--length", "8", "--stream_length", "20", "--batch_size", "1", "--by_position"]
    main([*flags, str(tmp_path / "one.csv")])
    run_on_two_processes(ROOT / "scripts" / "score.py", [*flags, str(tmp_path / "two.csv")])
    one, two = (list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("one.csv", "two.csv"))
    scores = [[float(row.pop("bits_per_byte")) for row in rows] for rows in (one, two)]
    assert one == two and scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_command_line_writes_the_scores_by_position(folders, tmp_path):
    flags = [
        "--dataset_path",
        str(folders / "data"),
        "--protocol",
        "refreshed",
        "--by_position",
        str(tmp_path / "a.csv"),
    ]
    result = main([str(folders / "recurrent"), *flags, "--refresh_every", "20", "--refresh_overlap", "5"])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["bits_per_byte"]) for row in rows] == [row["bits_per_byte"] for row in result["by_position"]]
    assert {row["protocol"] for row in rows} == {"refreshed, T = 1024, R = 20, O = 5, 50 bytes, float32"}
    assert {(row["model"], row["split"]) for row in rows} == {(str(folders / "recurrent"), "test")}
    picture = draw_positions([str(tmp_path / "a.csv")] * 2 + ["--output", str(tmp_path / "a.svg")])
    assert picture.read_text().count(">recurrent<") == 2
    with pytest.raises(ValueError, match="files: must be 6 at most, .* got 7"):
        draw_positions([str(tmp_path / "a.csv")] * 7 + ["--output", str(tmp_path / "a.svg")])
    (tmp_path / "b.csv").write_text("first,last\n1,1\n")
    with pytest.raises(ValueError, match=r"b.csv must be a file that score.py --by_position wrote: .*'first', 'last'"):
        draw_positions([str(tmp_path / "b.csv"), "--output", str(tmp_path / "b.svg")])


def test_command_line_takes_length_and_stride_from_the_model(folders):
    result = main([str(folders / "limited"), "--dataset_path", str(folders / "data"), "--protocol", "sliding"])
    assert (result["length"], result["stride"]) == (16, 8)


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("limited", "--split half", "--split must be one of train, valid, test, got 'half'"),
        ("limited", "--batch_size 0 --dtype int8", "--batch_size must be at least 1, got 0; --dtype must be one of"),
        ("limited", "--length 17", r"--length must be at most max_position_embeddings \(16\), got 17"),
        ("limited", "--protocol carried", "--stream_length must be at most max_position_embeddings"),
        ("limited", "--stride 4", "--stride must be left out without --protocol sliding, got 4"),
        ("limited", "--protocol sliding --stride 17", r"--stride must be at most T \(16\), got 17"),
        ("words", "", "must be a folder with a saved tokenizer, and has no tokenizer_config.json"),
    ],
    ids=["split", "two", "length", "carried", "stride", "long-stride", "tokens"],
)
def test_command_line_refuses(folders, model, flags, message):
    with pytest.raises(ValueError, match=message):
        main([str(folders / model), "--dataset_path", str(folders / "data"), *flags.split()])
