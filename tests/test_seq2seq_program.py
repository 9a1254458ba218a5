"""aft seq2seq: pairs, tokenizers, the loss, what is written and its scores, span corruption, resumption, mistakes."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import sacrebleu
import torch
from launching import ROOT, run_on_two_processes
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from test_finetune import leave_no_state  # noqa: F401
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from aft.commands.finetune import main as finetune
from aft.commands.generate import main as generate
from aft.commands.seq2seq import main
from aft.length_groups import ShuffledLengthGroups
from aft.seq2seq_flags import Seq2SeqInputs
from aft.seq2seq_models import fit_config, make_tokenizer, read_config, sentinel_ids
from aft.seq2seq_trainer import mean_loss
from aft.span_corruption import SENTINELS, CorruptedText, SpanCorruption
from aft.text_pairs import read_pairs
from aft.vocabulary import train_bpe


STACK = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
MODEL = {
    "model_type": "synthesizer_seq2seq",
    "num_cross_attention_heads": 2,
    "encoder": {**STACK, "synthesizer_type": "random"},
    "decoder": {**STACK, "synthesizer_type": "dense"},
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40


def seq2seq(output_dir: Path, *flags: str, **values) -> dict:
    """A run on the CPU; `values` are further flags."""
    values = {
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        **values,
    }
    return main([*flags, *(word for name, value in values.items() for word in (f"--{name}", str(value)))])


def make_rows(count: int, seed: int) -> list[dict]:
    """Letters, and what they begin with."""
    generator = np.random.default_rng(seed)
    texts = ["".join(generator.choice(list("abcde"), generator.integers(2, 9))) for _ in range(count)]
    return [{"translation": {"en": text, "de": f"it begins so: {text[: 1 + len(text) % 2]}"}} for text in texts]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


COLUMNS = {"source_column": "translation.en", "target_column": "translation.de"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "pairs.jsonl", make_rows(40, 0))
    write_jsonl(folder / "test.jsonl", make_rows(10, 1))
    write_jsonl(folder / "new.jsonl", [{"translation": {"en": row["translation"]["en"]}} for row in make_rows(5, 2)])
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "t5.json").write_text(json.dumps(T5))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, dict]:
    """A model of bytes that has learned a little, and its metrics."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--predict_with_generate", "--metrics", "bleu", "chrf", "rouge"]
    files = {"pairs_file": inputs / "pairs.jsonl", "test_file": inputs / "test.jsonl", **COLUMNS}
    files |= {"model": inputs / "model.json", "predict_file": inputs / "new.jsonl", "tokenizer": "bytes"}
    small = {"per_device_train_batch_size": 2, "generation_max_length": 20}
    more = {"source_prefix": "first: ", "generation_num_beams": 2, "metric_for_best_model": "chrf"}
    return folder, seq2seq(folder, *flags, **files, **more, learning_rate=0.02, num_train_epochs=2, **small)


def longest_written(folder: Path) -> int:
    return json.loads((folder / "generation_config.json").read_text())["max_length"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# What is written, and its scores


def test_scores_are_those_of_the_saved_model(finished, inputs):
    """Text by text, without a batch, and each score by the library itself."""
    folder, metrics = finished
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["translation"] for line in (inputs / "test.jsonl").read_text().splitlines()]
    texts, nats, count = [], 0.0, 0
    for row in rows:
        source = torch.tensor([[*f"first: {row['en']}".encode(), 255]])
        target = torch.tensor([[*row["de"].encode(), 255]])
        with torch.no_grad():
            logits = model(source, decoder_input_ids=torch.cat([torch.tensor([[256]]), target[:, :-1]], 1)).logits
            made = model.generate(source, num_beams=2, max_length=20)
        nats, count = nats + F.cross_entropy(logits[0], target[0], reduction="sum").item(), count + target.shape[1]
        texts.append(tokenizer.decode(made[0], skip_special_tokens=True))
        assert tokenizer(f"first: {row['en']}").input_ids == source[0].tolist()
    references = [row["de"] for row in rows]
    assert metrics["test_log_perplexity"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["test_exact_match"] == np.mean([a == b for a, b in zip(texts, references, strict=True)])
    assert metrics["test_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    assert metrics["test_chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
    rouge = RougeScorer(["rougeL"])
    found = [rouge.score(b, a)["rougeL"].fmeasure for a, b in zip(texts, references, strict=True)]
    assert metrics["test_rougeL"] == pytest.approx(100 * np.mean(found))
    assert metrics["test_bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert metrics["test_bleu"] > 10 and metrics["eval_log_perplexity"] < 3 < np.log(257)
    assert min(metrics[name] for name in ("train_tokens_per_second", "test_generated_tokens_per_second")) > 0
    assert json.loads((folder / "all_results.json").read_text()) == metrics


def test_predictions_are_written_for_sources_alone(finished, inputs):
    lines = [json.loads(line) for line in (finished[0] / "predictions.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [row["translation"]["en"] for row in make_rows(5, 2)]
    assert all(set(line) == {"source", "prediction"} and line["prediction"] for line in lines)
    assert "predict_loss" not in finished[1] and "predict_generated_tokens_per_second" in finished[1]


def test_predictions_stand_beside_their_sources_however_batches_are_made(inputs, tmp_path):
    """By a model of large weights, which writes something else for each source."""
    files = {"model": inputs / "model.json", "pairs_file": inputs / "pairs.jsonl", **COLUMNS, "tokenizer": "bytes"}
    files |= {"predict_file": inputs / "pairs.jsonl", "test_file": inputs / "pairs.jsonl"}
    values = {**files, "learning_rate": 1e-12, "num_train_epochs": 1, "generation_max_length": 8}
    large = ["--model_override", "encoder.initializer_range=1.0", "decoder.initializer_range=1.0"]
    found = {}
    for strategy in ("random", "group_by_length"):
        scores = seq2seq(tmp_path / strategy, *large, **values, train_sampling_strategy=strategy)
        lines = (tmp_path / strategy / "predictions.jsonl").read_text().splitlines()
        found[strategy] = lines, [scores[f"test_{name}"] for name in ("exact_match", "log_perplexity")]
    assert len({json.loads(line)["prediction"] for line in found["random"][0]}) > 10
    assert found["random"][0] == found["group_by_length"][0]
    assert found["random"][1] == pytest.approx(found["group_by_length"][1])


def test_generate_needs_no_flags(finished, capsys):
    """`generate` of the library, and the command that is named at the end."""
    folder = finished[0]
    config = json.loads((folder / "generation_config.json").read_text())
    values = {"decoder_start_token_id": 256, "pad_token_id": 256, "max_length": 20, "num_beams": 2}
    assert {name: config[name] for name in values} == values and 255 in np.atleast_1d(config["eos_token_id"])
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["encoder"]["vocab_size"], saved["decoder"]["vocab_size"]) == (257, 257)
    assert "use_cache" not in saved and saved["decoder"]["use_cache"]
    capsys.readouterr()
    generate(["--model", str(folder), "--greedy", "--prompt", "first: abc"])
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = model.generate(**tokenizer("first: abc", return_tensors="pt"), num_beams=1)
    assert capsys.readouterr().out == tokenizer.decode(made[0], skip_special_tokens=True) + "\n"
    with pytest.raises(ValueError, match="--batch_file must be left out .* aft seq2seq --predict_file"):
        generate(["--model", str(folder), "--batch_file", str(folder / "config.json")])
    with pytest.raises(ValueError, match="prompt must have at most 32 tokens"):
        generate(["--model", str(folder), "--prompt", "a" * 40])


def test_a_saved_model_is_scored_and_goes_on(finished, inputs, tmp_path):
    finished[0].with_name("run.json").write_text("{}")  # beside the folder, and not what is meant
    files = {"model": finished[0], "pairs_file": inputs / "pairs.jsonl", "test_file": inputs / "test.jsonl", **COLUMNS}
    scored = seq2seq(tmp_path / "scored", **files, source_prefix="first: ", num_train_epochs=0)
    for name in ("test_log_perplexity", "test_exact_match", "eval_log_perplexity"):
        assert scored[name] == pytest.approx(finished[1][name], rel=1e-5)
    assert not (tmp_path / "scored/model.safetensors").exists()
    override = ["--model_override", "decoder.hidden_dropout_prob=0.0"]
    seq2seq(tmp_path / "on", *override, **files, max_steps=1, generation_num_beams=1)
    assert json.loads((tmp_path / "on/config.json").read_text())["decoder"]["hidden_dropout_prob"] == 0.0
    assert weights(tmp_path / "on").keys() == weights(finished[0]).keys()
    assert longest_written(tmp_path / "on") == 20


def test_two_processes_score_as_one(finished, inputs, tmp_path):
    """Each row once, in order, also of parts that do not fill the batches of both."""
    values = {
        "model": finished[0],
        "pairs_file": inputs / "pairs.jsonl",
        "test_file": inputs / "test.jsonl",
        **COLUMNS,
    }
    values |= {"predict_file": inputs / "new.jsonl", "num_train_epochs": 0, "per_device_eval_batch_size": 2}
    values |= {"output_dir": tmp_path / "run", "source_prefix": "first: ", "use_cpu": True, "metrics": "bleu"}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    run_on_two_processes(ROOT / "scripts" / "seq2seq.py", flags)
    metrics = json.loads((tmp_path / "run/all_results.json").read_text())
    for name in ("eval_log_perplexity", "test_log_perplexity", "test_bleu", "test_exact_match"):
        assert metrics[name] == pytest.approx(finished[1][name], rel=1e-5)
    assert (tmp_path / "run/predictions.jsonl").read_text() == (finished[0] / "predictions.jsonl").read_text()


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed_at_their_places(smoothing):
    logits, labels = torch.randn(2, 4, 7, dtype=torch.float64), torch.tensor([[1, 2, 3, -100], [4, -100, -100, -100]])
    total = 0.0
    for row, places in ((0, 3), (1, 1)):
        for place in range(places):
            wanted = torch.full((7,), smoothing / 7, dtype=torch.float64)
            wanted[labels[row, place]] += 1 - smoothing
            total -= (wanted * logits[row, place].log_softmax(-1)).sum().item()
    outputs = {"logits": logits}
    assert mean_loss(outputs, labels, smoothing=smoothing).item() == pytest.approx(total / 4, rel=1e-6)
    assert mean_loss(outputs, labels, 10, smoothing).item() == pytest.approx(total / 10, rel=1e-6)


@pytest.mark.parametrize("model", ["model", "t5"])
def test_accumulated_batches_equal_one(model, inputs, tmp_path):
    """With targets of different lengths, and smoothed labels; also of models whose own loss does not know of it."""
    files = {"model": inputs / f"{model}.json", "pairs_file": inputs / "pairs.jsonl", **COLUMNS, "tokenizer": "bytes"}
    override = (
        [] if model == "t5" else ["--model_override", *(f"{s}.hidden_dropout_prob=0" for s in MODEL if s[-1:] == "r")]
    )
    values = {**files, "max_steps": 2, "logging_steps": 1, "label_smoothing_factor": 0.1, "eval_strategy": "no"}
    values |= {"load_best_model_at_end": False, "save_strategy": "no", "learning_rate": 0.01}
    logs = []
    for size, parts in ((8, 1), (4, 2)):
        folder = tmp_path / str(size)
        seq2seq(folder, *override, **values, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        logs.append([entry[name] for entry in history if "grad_norm" in entry for name in ("loss", "grad_norm")])
    assert longest_written(folder) == {"model": 32, "t5": len("it begins so: ab") + 1}[model]
    assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder)).__name__.startswith({"t5": "T5"}.get(model, "Synth"))


# Span corruption


def test_sizes_are_those_of_t5():
    t5 = SpanCorruption(0.15, 3.0, range(100), 1)
    assert t5.raw_length(512) == 568 and t5.sizes(568) == (512, 114) and t5.number(568) == 28


@pytest.mark.parametrize("density", [0.1, 0.15, 0.5])
@pytest.mark.parametrize("mean", [1.0, 3.0, 20.0])
def test_source_and_target_make_the_text_again(density, mean):
    corruption = SpanCorruption(density, mean, range(1000, 1100), 1)
    for limit in (3, 8, 33, 100):
        length = corruption.raw_length(limit)
        for seed in range(5):
            text = np.random.default_rng(seed).integers(2, 1000, length)
            source, target = corruption.corrupt(text, np.random.default_rng([seed, limit]))
            assert (len(source), len(target)) == (limit, corruption.sizes(length)[1])
            assert source[-1] == target[-1] == 1
            spans = {}
            for token in target[:-1]:
                if token >= 1000:
                    spans[token] = []
                else:
                    spans[list(spans)[-1]].append(token)
            again = [token for place in source[:-1] for token in spans.get(place, [place])]
            assert again == text.tolist() and list(spans) == [*range(1000, 1000 + len(spans))]
            assert all(spans.values()) and sum(map(len, spans.values())) == max(1, round(density * length))


def test_spans_follow_from_seed_epoch_and_row():
    def windows(seed, epoch):
        made = CorruptedText(np.arange(2, 212), SpanCorruption(0.15, 3.0, range(1000, 1100), 1), 50, seed)
        made.set_epoch(epoch)
        assert made.num_tokens == sum(len(row["input_ids"]) + len(row["labels"]) for row in made)
        return [row["input_ids"] for row in made]

    first = windows(0, 0)
    assert len(first) == 5 and first == windows(0, 0)
    assert all(a != b for other in (windows(1, 0), windows(0, 1)) for a, b in zip(first[:4], other, strict=False))
    assert np.diff(first[0]).tolist() != np.diff(first[1]).tolist()
    with pytest.raises(ValueError, match="--mean_span_length must be so long .* at most 2 spans.* got 3.0: 3 spans"):
        CorruptedText(np.arange(50), SpanCorruption(0.15, 3.0, range(2), 1), 60, 0)


def test_a_resumed_run_on_text_is_the_same(inputs, tmp_path, capsys):
    """In the middle of its second epoch, with dropout, from a checkpoint; with a BPE that knows sentinels."""
    files = {"model": inputs / "model.json", "text_file": inputs / "text.txt", "vocab_size": 370}
    values = {**files, "max_steps": 10, "save_strategy": "steps", "save_steps": 8, "save_total_limit": 9}
    values |= {"eval_strategy": "no", "load_best_model_at_end": False, "learning_rate": 0.01}
    whole = seq2seq(tmp_path / "whole", **values)
    assert whole["train_samples"] / 8 < 7 and "windows of text: " in capsys.readouterr().out
    (tmp_path / "part").mkdir()
    (tmp_path / "whole/checkpoint-8").rename(tmp_path / "part/checkpoint-8")
    again = seq2seq(tmp_path / "part", **values, resume_from_checkpoint="auto", dataloader_num_workers=1)
    assert again["eval_log_perplexity"] == whole["eval_log_perplexity"]
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert longest_written(tmp_path / "part") == 32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "part")
    assert len(tokenizer) == 370 and tokenizer.convert_tokens_to_ids(SENTINELS[7]) == 9
    assert tokenizer("the dog").input_ids[-1] == tokenizer.eos_token_id == 1 and tokenizer.padding_side == "right"
    with pytest.raises(ValueError, match="cannot resume: .*noise_density is 0.2 but was None"):
        seq2seq(tmp_path / "part", **{**values, "noise_density": 0.2}, resume_from_checkpoint="auto")


def test_batches_of_like_length_come_in_any_order():
    """All rows once; what differs little in length together, but the lengths do not fall from batch to batch."""
    lengths = np.random.default_rng(0).integers(1, 65, 1003).tolist()
    sampler = ShuffledLengthGroups(10, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and list(sampler) == first
    batches = np.array([lengths[row] for row in first[:1000]]).reshape(100, 10)
    assert np.ptp(batches, axis=1).mean() < 4
    falls = np.diff(batches.mean(1)) < 0
    assert 35 < falls.sum() < 65
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(ShuffledLengthGroups(10, lengths[:4], seed=3)) == [0, 1, 2, 3]


def test_a_resumed_run_on_batches_of_like_length_is_the_same(inputs, tmp_path):
    """In the middle of its second epoch."""
    files = {"model": inputs / "model.json", "pairs_file": inputs / "pairs.jsonl", "tokenizer": "bytes", **COLUMNS}
    values = {**files, "train_sampling_strategy": "group_by_length", "max_steps": 10, "learning_rate": 0.01}
    values |= {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 9, "load_best_model_at_end": False}
    values |= {"eval_strategy": "no", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = seq2seq(tmp_path / "whole", **values)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole/checkpoint-7").rename(tmp_path / "part/checkpoint-7")
    again = seq2seq(tmp_path / "part", **values, resume_from_checkpoint="auto")
    assert again["eval_log_perplexity"] == whole["eval_log_perplexity"]
    other = seq2seq(tmp_path / "other", **{**values, "data_seed": 5})
    assert other["eval_log_perplexity"] != whole["eval_log_perplexity"]


def test_a_saved_tokenizer_learns_to_end_texts_and_gets_sentinels(inputs, tmp_path):
    """One for causal models, which has one token for ends and padding."""
    train_bpe([[TEXT]], 270).save_pretrained(tmp_path / "saved")
    flags = {"model": str(inputs / "model.json"), "tokenizer": str(tmp_path / "saved"), "text_file": "text.txt"}
    config = read_config(Seq2SeqInputs(**flags))
    made = make_tokenizer(Seq2SeqInputs(**flags), config, [])
    fit_config(config, made, Seq2SeqInputs(**flags))
    assert config.vocab_size == config.encoder.vocab_size == 370 and config.decoder_start_token_id == made.pad_token_id
    made.save_pretrained(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert sentinel_ids(tokenizer, "") == [*range(270, 370)]
    ids = tokenizer("the fox").input_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == "the fox" and ids[-2] != ids[-1]
    with pytest.raises(ValueError, match=r"--model m: its tokenizer must have sentinels \(<extra_id_0>, ...\)"):
        sentinel_ids(AutoTokenizer.from_pretrained(tmp_path / "saved"), "--model m")


@pytest.mark.parametrize("model", [MODEL, {"model_type": "bart"}], ids=["synthesizer", "bart"])
@pytest.mark.parametrize("said", ["nowhere", "in the file", "by a flag"])
def test_the_first_id_of_a_decoder_is_that_of_padding_unless_it_is_said(model, said, tmp_path):
    (tmp_path / "m.json").write_text(
        json.dumps({**model, **({"decoder_start_token_id": 7} if "file" in said else {})})
    )
    override = ["decoder_start_token_id=7"] if "flag" in said else []
    inputs = Seq2SeqInputs(model=str(tmp_path / "m.json"), model_override=override)
    config, tokenizer = read_config(inputs), train_bpe([[TEXT]], 270, {"pad_token": "<pad>", "eos_token": "</s>"})
    fit_config(config, tokenizer, inputs)
    assert config.decoder_start_token_id == (tokenizer.pad_token_id if said == "nowhere" else 7)


# Pairs


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "dataset"])
def test_pairs_are_read_from(kind, tmp_path):
    rows = make_rows(6, 0)
    plain = [{"en": "007", "de": "null"}, *(row["translation"] for row in rows)]
    flags = {"source_column": "en", "target_column": "de"} if kind == "csv" else COLUMNS
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        pandas.DataFrame(plain).to_csv(path, index=False)
    elif kind == "jsonl":
        write_jsonl(path, [{"translation": row} for row in plain])
    elif kind == "parquet":
        datasets.Dataset.from_list([{"translation": row} for row in plain]).to_parquet(path)
    else:
        splits = {"train": plain, "validation": plain[:3], "test": plain[:2]}
        tables = {
            name: datasets.Dataset.from_list([{"translation": row} for row in split]) for name, split in splits.items()
        }
        datasets.DatasetDict(tables).save_to_disk(path)
    pairs = read_pairs(Seq2SeqInputs(**{"dataset" if kind == "dataset" else "pairs_file": str(path)}, **flags))
    assert {part: len(found) for part, found in pairs.items()} == (
        {"train": 7, "validation": 3, "test": 2} if kind == "dataset" else {"train": 7}
    )
    assert pairs["train"].sources == [row["en"] for row in plain]
    assert pairs["train"].targets == [row["de"] for row in plain]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"source_prefix": "a long prefix that fills the table "}, "the source of row 1 has .* tokens; allowed: 32 "),
        ({"max_target_length": 4}, r"the target of row 1 has 1\d tokens; allowed: 4 \(--max_target_length"),
        ({"max_source_length": 33}, "--max_source_length must be at most the tables of the model, 32, got 33"),
        ({"source_column": "en"}, "no column 'en', only 'translation', 'translation.en', .*--source_column says"),
        ({"tokenizer": "bpe"}, "--vocab_size must be at least 258, all bytes and special tokens, got 256"),
        ({"tokenizer": "bpe", "vocab_size": 5000}, "--vocab_size must be at most \\d+, the tokens that this text"),
        ({"length_penalty": 0.6}, "--length_penalty must be left out without beams, got 0.6"),
        ({"model_override": "decoder.vocab_size=9"}, "--model_override vocab_size: must be left out, the tokenizer"),
        ({"model_override": "decoder.nothing=9"}, "--model_override 'decoder.nothing=9': must be key=value with a"),
        ({"metric_for_best_model": "bleu"}, "--metric_for_best_model must be one of loss, log_perplexity, got 'bleu'"),
        ({"generation_num_beams": 0}, "--generation_num_beams must be at least 1, got 0"),
        ({"generation_max_length": 34}, "--generation_max_length must be at most 33, the tables of the .*, got 34"),
        ({"truncation": "left"}, "--truncation must be none or right, got 'left'"),
        ({"metrics": "bleu meteor"}, "--metrics must be among bleu, chrf, rouge, got"),
        ({"validation_share": 0.01}, "--validation_share 0.01 of 40 rows is not a single one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_before_anything_is_written(values, message, inputs, tmp_path):
    files = {"model": inputs / "model.json", "pairs_file": inputs / "pairs.jsonl", **COLUMNS, "tokenizer": "bytes"}
    metrics = ["--metrics", *values.pop("metrics").split()] if "metrics" in values else []
    with pytest.raises(ValueError, match=message):
        seq2seq(tmp_path / "run", *metrics, **{**files, **values})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_target_length": 5}, "--max_target_length must be at least 7 for sources of 32 tokens, got 5"),
        ({"predict_with_generate": True}, "--predict_with_generate must be left out with --text_file, got True"),
        ({"source_prefix": "a"}, "--source_prefix must be left out with --text_file, got 'a'"),
        ({"pairs_file": "text.txt"}, "--text_file must be left out with --pairs_file"),
        ({"noise_density": 1.0}, r"--noise_density must be in \(0, 1\), got 1.0"),
        ({"model": "t5.json"}, "--max_source_length must be given for a model without tables of positions, got None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_with_a_text_are_told(values, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    files = {"model": "model.json", "text_file": "text.txt", "tokenizer": "bytes"}
    with pytest.raises(ValueError, match=message):
        seq2seq(tmp_path / "run", **{**files, **values})


def test_long_texts_are_cut_before_their_end(inputs, tmp_path):
    files = {"model": inputs / "model.json", "pairs_file": inputs / "pairs.jsonl", **COLUMNS, "tokenizer": "bytes"}
    lengths = {"max_source_length": 4, "max_target_length": 3, "truncation": "right"}
    metrics = seq2seq(tmp_path / "run", **files, **lengths, predict_file=inputs / "test.jsonl", num_train_epochs=0)
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == [row["translation"]["de"] for row in make_rows(10, 1)]
    assert max(len(line["prediction"].encode()) for line in lines) <= 6  # two bytes, each shown as U+FFFD
    assert metrics["predict_exact_match"] == 0.0


# What other programs do with such a model


@pytest.mark.parametrize("kind", ["ours", "t5"])
def test_finetune_makes_a_classifier_of_it(kind, finished, tmp_path):
    """Of which Trainer gets more than the scores of the classes; --max_length ends at the shorter table."""
    base = finished[0]
    if kind == "t5":
        ids = {"vocab_size": 257, "eos_token_id": 255, "pad_token_id": 256, "decoder_start_token_id": 256}
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**T5, **ids)).save_pretrained(tmp_path / "t5")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "t5")
        base = tmp_path / "t5"
    table = write_jsonl(tmp_path / "table.jsonl", [{"text": letter * 3, "label": letter} for letter in "ab" * 10])
    flags = {"model": base, "labelled_file": table, "validation_file": table, "predict_file": table, "use_cpu": True}
    flags |= {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "num_train_epochs": 5}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    metrics = finetune([*words, "--learning_rate", "0.02", "--disable_tqdm", "true"])
    found = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    right = [line["label"] == line["text"][0] for line in found]
    assert metrics["eval_accuracy"] == np.mean(right) == 1 and set(found[0]["scores"]) == {"a", "b"}
    if kind == "ours":
        with pytest.raises(ValueError, match=r"--max_length must be at most max_position_embeddings \(32\), got 40"):
            finetune([*words, "--max_length", "40", "--output_dir", str(tmp_path / "other")])
