"""Masked language models: what is hidden from them, how they are trained, scored and handed out."""

import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from comparisons import in_this_process
from safetensors.torch import load_file
from small_runs import STEPS, flags, make_inputs
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from aft import comparison
from aft.bits_per_byte import evaluate_bits_per_byte
from aft.commands.compare import main as compare
from aft.commands.evaluate import main as evaluate
from aft.commands.pretrain import main
from aft.commands.release import main as release
from aft.masking import IGNORED, MaskedWindows, Masking, make_masking, spans
from aft.protocols import Protocol
from aft.run_log import read_log
from aft.token_data import TokenData
from aft.training_windows import TrainingWindows
from aft.vocabulary import ENDS, MASK_TOKEN, ByteVocabulary, TokenizerVocabulary, train_bpe
from modeling_aft import AFTConfig, AFTForMaskedLM


MASK = 256
TEXT = b"a line of text, and another one\n" * 100
UNITS = ("token", "word", "span")

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def masking(unit: str = "token", probability: float = 0.25, mean: float | None = None, never: int | None = None):
    vocabulary = ByteVocabulary(masks=True)
    mean = 3.0 if unit == "span" and mean is None else mean
    return Masking(probability, unit, mean, MASK, vocabulary.text_ids, vocabulary.word_starts, never)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lengths(chosen: np.ndarray) -> list[int]:
    """Of the runs of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


# What is hidden


@pytest.mark.parametrize(
    "length, count, mean, number",
    [(64, 16, 4, 4), (512, 77, 20, 4), (10, 1, 20, 1), (10, 9, 3, 2), (10, 10, 3, 1), (8, 4, 1, 4), (5, 0, 3, 0)],
)
def test_spans_are_as_many_and_as_long_as_they_should(length, count, mean, number):
    found = [spans(length, count, mean, rng(seed)) for seed in range(50)]
    assert all(chosen.shape == (length,) and chosen.sum() == count for chosen in found)
    assert {len(lengths(chosen)) for chosen in found} == {number}
    if 0 < count < length:  # the first token and the last are hidden as others are, now and then
        assert len({chosen.tobytes() for chosen in found}) >= 5
        assert any(chosen[0] for chosen in found) and any(chosen[-1] for chosen in found)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 0.99])
def test_the_share_of_what_is_hidden_is_exact(unit, probability):
    ids = np.frombuffer(TEXT[:100], dtype=np.uint8).astype(np.int64)
    for seed in range(20):
        assert masking(unit, probability).choose(ids, rng(seed)).sum() == max(1, round(100 * probability))


@pytest.mark.parametrize("unit", UNITS)
def test_every_place_is_hidden_as_often_as_any_other(unit):
    ids = np.frombuffer(TEXT[:32], dtype=np.uint8).astype(np.int64)
    share = np.mean([masking(unit).choose(ids, rng(seed)) for seed in range(2000)], 0)
    # Spans near the ends have fewer neighbours that could reach there, and words are cut at their ends.
    assert np.abs(share - 0.25).max() < 0.15 and (unit != "token" or np.abs(share - 0.25).max() < 0.04)


def test_words_are_hidden_whole():
    ids = np.frombuffer(b"one two  three\nfour five, six seven", dtype=np.uint8).astype(np.int64)
    words = [b"one", b" two", b"  three", b"\nfour", b" five,", b" six", b" seven"]
    assert np.diff(np.flatnonzero([1, *masking("word").word_starts(ids)[1:], 1])).tolist() == [len(w) for w in words]
    ends = np.cumsum([len(word) for word in words])
    for seed in range(30):
        chosen = masking("word", 0.4).choose(ids, rng(seed))
        cut = sum(0 < chosen[end - len(word) : end].sum() < len(word) for word, end in zip(words, ends, strict=True))
        assert cut <= 1  # the last one


def test_words_of_tokens_begin_where_their_text_has_a_space():
    tokenizer = train_bpe([["the cat sat on the mat, the cat sat\n"] * 9], 270, ENDS | {"mask_token": MASK_TOKEN})
    vocabulary = TokenizerVocabulary(tokenizer, "--tokenizer")
    [(ids, _)] = vocabulary.encode([" the cats mat,\nthe"])
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert [piece[0] in "ĠĊ" for piece in pieces] == vocabulary.word_starts(ids).tolist()
    assert vocabulary.mask == tokenizer.mask_token_id and vocabulary.mask not in vocabulary.text_ids
    assert vocabulary.end not in vocabulary.text_ids and len(vocabulary.text_ids) == 268


def test_words_of_word_pieces_end_before_one_that_does_not_go_on(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "sat"]))
    from transformers import BertTokenizerFast

    vocabulary = TokenizerVocabulary(BertTokenizerFast(str(tmp_path / "vocab.txt")), "--tokenizer")
    [(ids, _)] = vocabulary.encode(["cats sat"])
    assert vocabulary.word_starts(ids).tolist() == [True, False, True]


def test_the_end_of_a_document_is_not_hidden():
    ids = np.array([1, 2, 255, 3, 255, 4, 5, 6])
    for unit in UNITS:
        for seed in range(20):
            chosen = masking(unit, 0.9, never=255).choose(ids, rng(seed))
            assert chosen.sum() == 6 and not chosen[ids == 255].any()
    assert masking(never=255).choose(np.full(8, 255), rng()).sum() == 0


def test_what_is_hidden_is_replaced_as_in_bert():
    ids, chosen = np.full(20_000, 7), np.arange(20_000) % 2 == 0
    read = masking().hide(ids, chosen, rng())
    assert (read[~chosen] == 7).all()
    shares = [(read[chosen] == MASK).mean(), (read[chosen] == 7).mean()]
    assert (
        shares == pytest.approx([0.8, 0.1], abs=0.02)
        and {*read.tolist()} <= {*range(257)}
        and len({*read.tolist()}) > 200
    )
    assert (masking().hide(ids, chosen)[chosen] == MASK).all()  # without a generator, as in a score


# Windows


@pytest.mark.parametrize("unit", UNITS)
def test_windows_are_a_pure_function_of_seed_step_and_row(unit):
    data = np.frombuffer(TEXT, dtype=np.uint8)

    def windows(seed=0):
        plain = TrainingWindows(lambda start, stop: data[start:stop], len(data), 32, 4, 0)
        return plain, MaskedWindows(plain, masking(unit), seed)

    plain, masked = windows()
    inputs, labels = masked.batch(3, range(4))
    text, hidden = plain.batch(3, range(4))[1], labels != IGNORED
    assert (labels[hidden] == text[hidden]).all() and (inputs[~hidden] == text[~hidden]).all()
    assert hidden.sum(1).tolist() == [masked.labels_per_window] * 4 == [8] * 4
    assert (masked.sizes(3, range(4)) == hidden).all()
    for row in range(4):
        alone = windows()[1].batch(3, range(row, row + 1))
        assert (alone[0][0] == inputs[row]).all() and (alone[1][0] == labels[row]).all()
    for other in (masked.batch(4, range(4)), windows(seed=1)[1].batch(3, range(4))):
        assert ((other[1] != IGNORED) != hidden).any()


# Scores


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("stop", [97, 80], ids=["short-last-window", "whole-windows"])
def test_a_score_is_the_formula_in_any_batch(unit, stop):
    torch.manual_seed(0)
    config = AFTConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1, aft_type="simple", is_decoder=False)
    model, data = AFTForMaskedLM(config).eval(), TokenData.of_bytes(TEXT)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    hides, protocol = masking(unit), Protocol("masked", 16)
    arguments = (model, data, Accelerator(cpu=True), 1, stop, protocol)
    found = [evaluate_bits_per_byte(*arguments, size, masking=hides) for size in (1, 3, 64)]
    nats, count = 0.0, 0
    for first in range(1, stop, 16):
        ids = data.read(first, min(first + 16, stop)).astype(np.int64)
        chosen = hides.choose(ids, np.random.default_rng([first, len(ids)]))
        with torch.no_grad():
            logits = model(torch.from_numpy(hides.hide(ids, chosen))[None]).logits[0]
        nats -= logits.log_softmax(-1)[chosen, ids[chosen]].sum().item()
        count += chosen.sum()
    for result in found:
        assert result["bytes_scored"] == count
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)


# Whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def masked(inputs: Path, folder: Path, *more: str, **changes) -> list[str]:
    changes = {"objective": "masked", "sample_bytes": None, **changes}
    return [*flags(inputs, folder, **changes), *more]


def test_a_run_learns_and_is_handed_out(inputs, tmp_path, capsys):
    fields = ["aft_type=conv", "hidden_size=64", "num_hidden_layers=2", "num_attention_heads=8", "window_size=16"]
    larger = ["--model_override", *fields, "hidden_dropout_prob=0", "position_embedding_type=none"]
    longer = {"max_steps": 100, "batch_size": 16, "sequence_length": 32, "optimizer": "muon", "eval_every": 0}
    main(masked(inputs, tmp_path / "run", "--mask_unit", "word", *larger, **longer, save_every=0))
    printed = capsys.readouterr().out
    assert "finetune --model" in printed and "--labelled_file" in printed and "generate" not in printed
    events = read_log(tmp_path / "run" / "run.jsonl")
    [test] = [event for event in events if event.get("split") == "test"]
    assert test["bits_per_byte"] < 1.5  # the text is one line over and over; at first it is 8
    assert test["protocol"] == "masked" and test["mask_unit"] == "word" and test["mlm_probability"] == 0.15

    # From its folder it scores the same, and fills in what is hidden.
    score = ["--dataset_path", str(inputs / "text.bin"), "--cache_dir", str(inputs / "cache"), "--mask_unit", "word"]
    assert evaluate([str(tmp_path / "run"), *score])["bits_per_byte"] == pytest.approx(test["bits_per_byte"], 1e-6)
    model, tokenizer = (kind.from_pretrained(tmp_path / "run") for kind in (AutoModelForMaskedLM, AutoTokenizer))
    assert not model.config.is_decoder and model.config.vocab_size == 257 == len(tokenizer) - 1
    filled = pipeline("fill-mask", model=model, tokenizer=tokenizer)("ine of te[MASK]t, a")
    assert filled[0]["token_str"] == "x" and filled[0]["sequence"] == "ine of text, a"

    # A release has the score by the same protocol, with the command that repeats it.
    release([str(tmp_path / "run"), str(tmp_path / "card"), *score[:4], "--dtype", "float32"])
    card = (tmp_path / "card" / "README.md").read_text()
    assert "byte-level masked language model" in card and "pipeline_tag: fill-mask" in card and "- masked-lm" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card and "generate" not in card and "A sample" not in card
    [command] = [line for line in card.splitlines() if line.startswith("aft evaluate") and "--split test" in line]
    assert "--protocol masked --length 32 --mlm_probability 0.15 --mask_unit word" in command
    again = evaluate(shlex.split(command)[2:] + score[2:4])
    assert f"| test | {again['bits_per_byte']:.4f} | masked, T = 32, P = 0.15, unit = word" in card


@pytest.mark.parametrize("unit", UNITS)
def test_micro_batches_change_nothing_but_rounding(inputs, tmp_path, unit):
    still = {"model_override": "hidden_dropout_prob=0"}
    for size in (4, 1):
        main(masked(inputs, tmp_path / str(size), "--mask_unit", unit, micro_batch_size=size, max_steps=3, **still))
    one, other = (load_file(tmp_path / str(size) / "model.safetensors") for size in (4, 1))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(inputs, tmp_path):
    main(masked(inputs, tmp_path / "run"))
    main(masked(inputs, tmp_path / "again", resume=tmp_path / "run" / "checkpoints" / f"step-{STEPS // 2}"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "synthesizer", "synthesizer_type": "dense", "hidden_size": 16, "num_hidden_layers": 1},
        {
            **{"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "intermediate_size": 16,
        },
    ],
    ids=["synthesizer", "bert"],
)
@pytest.mark.parametrize("tokens", ["bytes", "bpe"])
def test_any_bidirectional_model_and_tokenizer(inputs, tmp_path, model, tokens):
    (tmp_path / "model.json").write_text(json.dumps({**model, "max_position_embeddings": 16}))
    more = ["--tokenizer", "bpe", "--vocab_size", "262"] if tokens == "bpe" else []
    run = {"model_preset": tmp_path / "model.json", "max_steps": 2}
    main(masked(inputs, tmp_path / "run", "--mask_unit", "span", *more, **run))
    config, *_ = read_log(tmp_path / "run" / "run.jsonl")
    assert config["arguments"]["mean_span_length"] == (20 if tokens == "bytes" else 3)
    result = evaluate([str(tmp_path / "run"), "--dataset_path", str(inputs / "text.bin"), "--length", "16"])
    assert math.isfinite(result["bits_per_byte"]) and result["protocol"] == "masked"


def test_training_goes_on_with_a_saved_model(inputs, tmp_path):
    main(masked(inputs, tmp_path / "run", max_steps=2))
    main(masked(inputs, tmp_path / "further", init_from=tmp_path / "run", model_preset=None, max_steps=1))
    assert AutoTokenizer.from_pretrained(tmp_path / "further").mask_token_id == MASK


def test_models_are_compared_by_what_they_fill_in(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", in_this_process)
    (tmp_path / "plan.yaml").write_text(
        "training: {objective: masked, batch_size: 4, max_steps: 2, warmup_steps: 1, eval_every: 1, log_every: 1}\n"
        f"seeds: [0]\nreference: one\nruns: {{one: {{model_preset: {inputs / 'model.json'}}}}}\n"
    )
    data = ["--dataset_path", str(inputs / "text.bin"), "--cache_dir", str(inputs / "cache")]
    compare([str(tmp_path / "plan.yaml"), *data, "--runs_dir", str(tmp_path / "runs")])
    assert "masked, T = 16, P = 0.15, unit = token" in (tmp_path / "runs/plan/compare-plan.md").read_text()


# What is refused


REFUSED = {
    "unit": ({"mask_unit": "line"}, "--mask_unit must be one of token, word, span, got 'line'"),
    "share": ({"mlm_probability": 1}, r"--mlm_probability must be in \(0, 1\), got 1"),
    "span": ({"mean_span_length": 3}, "--mean_span_length must be left out without --mask_unit span, got 3"),
    "causal": (
        {"objective": "causal", "mlm_probability": 0.2},
        "--mlm_probability must be left out without --objective masked, got 0.2",
    ),
    "objective": ({"objective": "span"}, "--objective must be one of causal, masked, got 'span'"),
    "protocol": ({"eval_protocol": "sliding"}, "--eval_protocol must be masked with --objective masked, got 'sl"),
    "causal-protocol": ({"objective": "causal", "eval_protocol": "masked"}, "--eval_protocol must be segments or"),
    "samples": ({"sample_bytes": 5}, "--sample_bytes must be 0 with --objective masked"),
    "carried": ({"carry_state": True}, "--carry_state must be left out with --objective masked"),
    "bpe": ({"tokenizer": "bpe", "vocab_size": 257}, "--vocab_size must be at least 258 with --tokenizer bpe"),
    "short": ({"sequence_length": 1}, "--sequence_length must be at least 2 with --objective masked, got 1"),
    "decoder": ({"model_override": "is_decoder=true"}, "`is_decoder` must be False for a masked language model"),
    "gpt2": ({"model_preset": "{gpt2}"}, "model_type must be one that has a AutoModelForMaskedLM .* got 'gpt2'"),
    "tokenizer": ({"tokenizer": "{maskless}"}, "--tokenizer .*maskless: must have a mask token for --objective"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(inputs, tmp_path, name):
    changes, message = REFUSED[name]
    (tmp_path / "gpt2.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}))
    train_bpe([["the cat sat on the mat"] * 9], 260).save_pretrained(tmp_path / "maskless")
    places = {"{gpt2}": tmp_path / "gpt2.json", "{maskless}": tmp_path / "maskless"}
    changes = {key: places.get(value, value) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main(masked(inputs, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "run.jsonl").exists()


def test_a_vocabulary_without_a_mask_is_refused():
    settings = SimpleNamespace(mlm_probability=0.15, mask_unit="token", mean_span_length=None)
    with pytest.raises(ValueError, match="bytes: must have a mask token for a masked language model"):
        make_masking(settings, ByteVocabulary(), separated=False)
