"""A model of any tokenizer on any text, from training to what is handed out: scores, text, cards, tables."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from comparisons import in_this_process
from datasets import Dataset
from small_runs import history
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from aft import comparison
from aft.commands.compare import main as compare
from aft.commands.draw import main as draw
from aft.commands.evaluate import main as evaluate
from aft.commands.finetune import main as finetune
from aft.commands.generate import main as generate
from aft.commands.pretrain import main as pretrain
from aft.commands.push import main as push
from aft.commands.release import main as release
from aft.commands.stream import main as stream
from aft.run_log import read_log
from aft.vocabulary import train_bpe


WORDS = "the cat and dog sat on a mat; né 中文 was there before it came".split()
DOCUMENTS = [" ".join(np.random.default_rng(i).choice(WORDS, 40)) + "\n" for i in range(60)]
LENGTH = 16
MODELS = {
    "aft": {"model_type": "aft", "aft_type": "conv", "window_size": 4, "num_attention_heads": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "position_embedding_type": "none", "hidden_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with documents as parquet and jsonl, models, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    Dataset.from_dict({"text": DOCUMENTS, "number": list(range(60))}).to_parquet(folder / "a.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    for name, fields in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(fields | (SIZES if name == "aft" else {})))
    train_bpe([DOCUMENTS], 280).save_pretrained(folder / "tokenizer")
    return folder


def flags(inputs: Path, output_dir: Path, *more, **changes) -> list[str]:
    values = {
        "dataset": inputs / "a.parquet",
        "model": inputs / "aft.json",
        "cache_dir": inputs / "cache",
        "output_dir": output_dir,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "max_steps": 6,
        "warmup_steps": 2,
        "learning_rate": 0.01,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 2,
        "sample_every": 0,
        "sample_bytes": 5,
        **changes,
    }
    words = [text for name, value in values.items() for text in (f"--{name}", str(value)) if value is not None]
    return [*words, *more]


BPE = ("--tokenizer", "bpe", "--vocab_size", "270")
TOKENS = {
    "bpe": lambda inputs: BPE,
    "saved": lambda inputs: ("--tokenizer", str(inputs / "tokenizer")),
    "bytes": lambda inputs: (),
}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> Path:
    """A folder of finished runs, one for each entry of TOKENS, and one of GPT-2."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name, more in TOKENS.items():
            pretrain(flags(inputs, folder / name, *more(inputs)))
            AcceleratorState._reset_state(reset_partial_state=True)
        pretrain(flags(inputs, folder / "gpt2", *BPE, model=inputs / "gpt2.json"))
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(autouse=True)
def cpu(on_the_cpu):
    yield


def text_flags(inputs: Path) -> list[str]:
    return ["--dataset", str(inputs / "a.parquet"), "--cache_dir", str(inputs / "cache")]


def held_out() -> list[str]:
    """The documents of test: a twentieth of all, drawn by NumPy's generator of seed 0 after those of valid."""
    order = np.random.default_rng(0).permutation(len(DOCUMENTS))
    return [DOCUMENTS[i] for i in sorted(order[3:6])]


def plain_score(folder: Path) -> tuple[float, float, int]:
    """Bits per byte and perplexity of the documents of test in windows, and their bytes, without any code of `aft`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    end, ids = tokenizer.eos_token_id, []
    for text in held_out():
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, end]
    nats, inputs = 0.0, [end, *ids[:-1]]  # each document ends with this token, the one before the first too
    for start in range(0, len(ids), LENGTH):
        window = torch.tensor([inputs[start : start + LENGTH]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0].double()
        labels = torch.tensor(ids[start : start + LENGTH])
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    num_bytes = sum(len(text.encode()) for text in held_out())
    return nats / math.log(2) / num_bytes, math.exp(nats / len(ids)), num_bytes


@pytest.mark.parametrize("name", [*TOKENS, "gpt2"])
def test_bits_per_byte_are_those_of_a_plain_loop(inputs, runs, name):
    expected, perplexity, num_bytes = plain_score(runs / name)
    logged = [event for event in read_log(runs / name / "run.jsonl") if event.get("split") == "test"][-1]
    assert logged["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert logged["perplexity"] == pytest.approx(perplexity, rel=1e-5) and logged["bytes_scored"] == num_bytes
    again = evaluate([str(runs / name), *text_flags(inputs), "--length", str(LENGTH), "--dtype", "float32"])
    assert again["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert again["tokens_scored"] == logged["tokens_scored"]


@pytest.mark.parametrize("name", [*TOKENS, "gpt2"])
def test_what_a_run_says_of_its_tokens(inputs, runs, name):
    config, *events = read_log(runs / name / "run.jsonl")
    assert sum(config[f"{split}_bytes"] for split in ("train", "valid", "test")) == len("".join(DOCUMENTS).encode())
    size = {"bytes": 256, "saved": 280}.get(name, 270)
    assert config["model_config"]["vocab_size"] == size
    assert config["model_config"]["eos_token_id"] == (255 if name == "bytes" else 0)
    assert ("tokenizer" in config) == (name != "bytes")
    card = (runs / name / "README.md").read_text()
    assert ("A token is a byte" in card) == (name == "bytes") and "bytes of train" in card
    train = [event for event in events if event["event"] == "train"]
    assert all(0 < event["bits_per_byte"] < 12 for event in train)
    assert str(inputs) not in card + (runs / name / "run.jsonl").read_text()


@pytest.mark.parametrize("name", ["bpe", "gpt2", "bytes"])
def test_text_is_generated(runs, tmp_path, capsys, name):
    out = tmp_path / "out.txt"
    generate(["--model", str(runs / name), "--prompt", "the né", "--max_new_tokens", "9", "--output_file", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith("the né") and out.read_bytes().startswith("the né".encode())
    tokenizer = AutoTokenizer.from_pretrained(runs / name)
    ids = tokenizer("the né", return_tensors="pt", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[0]) == "the né"


def test_a_prompt_that_is_no_text_is_refused_for_a_tokenizer(runs, tmp_path):
    (tmp_path / "prompt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="prompt must be text in UTF-8 for a tokenizer, and is not at byte 1"):
        generate(["--model", str(runs / "bpe"), "--prompt_file", str(tmp_path / "prompt")])


def test_a_release_repeats_its_scores(inputs, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release([str(runs / "bpe"), "my-bpe", *text_flags(inputs), "--dtype", "float32"])
    card = Path("my-bpe/README.md").read_text()
    assert "Its tokenizer is\na byte-level BPE, trained on the train split, with 270 tokens." in card
    command = re.search(r"^aft evaluate (my-bpe .*) --split test --protocol segments.*$", card, re.M)[0]
    argv = [word if word != "a.parquet" else str(inputs / "a.parquet") for word in shlex.split(command)[2:]]
    result = evaluate([*argv, "--cache_dir", str(inputs / "cache")])
    assert f"| test | {result['bits_per_byte']:.4f} | segments, T = {LENGTH}" in card
    assert result["bits_per_byte"] == pytest.approx(plain_score(runs / "bpe")[0], rel=1e-5)
    push(["my-bpe", "me/bpe", "--dry_run"])


def test_the_data_of_a_release_are_those_of_the_run(inputs, runs, tmp_path):
    Dataset.from_dict({"text": DOCUMENTS[1:]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="--dataset_path must be the data of the run, of sha256"):
        release([str(runs / "bpe"), str(tmp_path / "out"), "--dataset", str(tmp_path / "other.parquet")])
    release([str(runs / "bpe"), str(tmp_path / "out"), "--dataset", str(inputs / "a.jsonl"), *text_flags(inputs)[2:]])


def test_pictures_of_models_of_several_tokenizers(inputs, runs, tmp_path):
    draw([str(runs / "bpe"), str(runs / "bytes"), "--output_dir", str(tmp_path), *text_flags(inputs)])
    assert (tmp_path / "receptive-field.svg").is_file() or (tmp_path / "receptive-field.png").is_file()


def test_a_stream_is_one_of_bytes(runs):
    with pytest.raises(ValueError, match="must be a model of bytes, which a stream consists of"):
        stream([str(runs / "bpe"), str(runs / "bpe" / "config.json")])


def test_a_model_is_fine_tuned_with_its_tokenizer(runs, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(DOCUMENTS))
    argv = ["--model", str(runs / "bpe"), "--text_file", str(tmp_path / "text.txt"), "--output_dir"]
    finetune([*argv, str(tmp_path / "tuned"), "--max_steps", "2", "--max_length", "16", "--report_to", "none"])
    tuned = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert isinstance(tuned, PreTrainedTokenizerFast) and len(tuned) == 270
    generate(["--model", str(tmp_path / "tuned"), "--prompt", "the", "--max_new_tokens", "3"])


def test_tokenizers_are_compared_in_bits_per_byte(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "run_process", in_this_process)
    runs = {
        "bytes": {"model_preset": str(inputs / "aft.json")},
        "bpe": {"model_preset": str(inputs / "aft.json"), "training": {"tokenizer": "bpe", "vocab_size": 270}},
        "gpt2": {"model_preset": str(inputs / "gpt2.json"), "training": {"tokenizer": str(inputs / "tokenizer")}},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"runs": runs, "seeds": [0], "reference": "gpt2"}))
    training = flags(inputs, None, max_steps=2, save_every=0, sample_bytes=0, model=None)
    compare([str(tmp_path / "plan.yaml"), "--runs_dir", str(tmp_path / "runs"), *training])
    table = (tmp_path / "runs" / "plan" / "compare-plan.md").read_text()
    for name in runs:
        [log] = (tmp_path / "runs" / "plan" / f"{name}-seed0").glob("run.jsonl")
        assert f"{read_log(log)[-1]['test_bits_per_byte']:.3f}" in table, name


# What is refused


WRONG = {
    "bytes": (("--model_override", "vocab_size=300"), "vocab_size must be 256 for --tokenizer bytes, got 300"),
    "bpe": ((*BPE, "--model_override", "vocab_size=300"), "vocab_size must be 270 for --tokenizer bpe, got 300"),
    "less": ((*BPE, "--model_override", "vocab_size=269"), "vocab_size must be 270 for --tokenizer bpe, got 269"),
    "saved": (
        ("--tokenizer", "tokenizer", "--model_override", "vocab_size=279"),
        "vocab_size must be 280 for --tokenizer tokenizer, or with padding up to 1303, got 279; left out, it is 280",
    ),
    "much": (("--tokenizer", "tokenizer", "--model_override", "vocab_size=5000"), "up to 1303, got 5000"),
    "no-size": (("--tokenizer", "bpe"), "--vocab_size must be at least 257 with --tokenizer bpe, got None"),
    "small": (("--tokenizer", "bpe", "--vocab_size", "256"), "--vocab_size must be at least 257"),
    "size": (("--vocab_size", "300"), "--vocab_size must be left out without --tokenizer bpe, got 300"),
    "text": (("--tokenizer", "bpe", "--vocab_size", "50000"), "--vocab_size must be at most [0-9]+, the tokens that"),
    "nowhere": (("--tokenizer", "./nowhere"), "--tokenizer ./nowhere: no such folder"),
    "no-tokenizer": (("--tokenizer", "cache"), "--tokenizer cache: must be a folder with a saved tokenizer"),
    "buffer": (("--shuffle_buffer", "3"), "--shuffle_buffer must be left out without --streaming, got 3"),
    "epochs": (("--streaming", "--num_epochs", "1"), "--num_epochs must be left out with --streaming"),
    "carried": (("--streaming", "--carry_state"), "--carry_state must be left out with --streaming, got True"),
    "empty": (("--tokenizer", ""), "--tokenizer must be given, or left out, got ''"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tokens_that_do_not_fit_are_refused(inputs, tmp_path, monkeypatch, case):
    monkeypatch.chdir(inputs)
    (inputs / "cache").mkdir(exist_ok=True)
    more, message = WRONG[case]
    steps = {"max_steps": None} if case == "epochs" else {}
    with pytest.raises(ValueError, match=message):
        pretrain(flags(inputs, tmp_path / "run", *more, **steps))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_may_be_padded(inputs, tmp_path):
    more = ("--tokenizer", str(inputs / "tokenizer"), "--model_override", "vocab_size=320")
    pretrain(flags(inputs, tmp_path / "run", *more, max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 320
    generate(["--model", str(tmp_path / "run"), "--prompt", "the", "--max_new_tokens", "2"])


# Streams


@pytest.mark.parametrize("tokenizer", [(), BPE], ids=["bytes", "bpe"])
def test_a_streamed_run_goes_on_where_it_was(inputs, tmp_path, tokenizer):
    more = (*tokenizer, "--streaming", "--test_size", "5", "--shuffle_buffer", "7")
    pretrain(flags(inputs, tmp_path / "whole", *more, micro_batch_size=2))
    pretrain(flags(inputs, tmp_path / "part", *more, micro_batch_size=2))
    (tmp_path / "part" / "config.json").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = flags(inputs, tmp_path / "part", *more, micro_batch_size=2)
    pretrain([*resumed, "--resume", str(tmp_path / "part" / "checkpoints" / "step-4")])
    assert history(tmp_path / "part") == history(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "train is a stream" in card and "None" not in card


def test_a_stream_trains_as_the_same_text_in_memory_would(inputs, tmp_path):
    """One window after the other: the first step's loss is that of the first documents after those held out."""
    pretrain(flags(inputs, tmp_path / "run", "--streaming", "--test_size", "5", "--shuffle_buffer", "0", max_steps=1))
    [event] = [event for event in read_log(tmp_path / "run" / "run.jsonl") if event["event"] == "train"]
    content = b"\xff".join(text.encode() for text in DOCUMENTS[10:20])[: 4 * LENGTH + 1]
    set_seed(0)
    config = AutoConfig.for_model(**MODELS["aft"], **SIZES)
    config.eos_token_id = 255
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.tensor(list(content))
    with torch.no_grad():
        logits = model(input_ids=ids[:-1].view(4, LENGTH)).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:], reduction="sum").item()
    assert event["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(ids[1:] != 255).item(), rel=1e-5)


def test_nothing_worries_when_a_model_has_tokens_of_its_own(inputs, tmp_path, capfd):
    """GPT-2's end of texts is 50256, which no tokenizer here has."""
    pretrain(flags(inputs, tmp_path / "run", model=inputs / "gpt2.json", max_steps=1, sample_bytes=0))
    error = capfd.readouterr().err
    assert "token_id" not in error and "Generating" not in error
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.bos_token_id is None
