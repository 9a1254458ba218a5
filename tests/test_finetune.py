"""scripts/finetune.py: both modes end to end on real text, their metrics, accumulation, resumption, wrong input."""

import csv
import inspect
import json
import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from families import LIMIT, make_config, model_classes
from launching import run_on_two_processes
from safetensors.torch import load_file
from test_remote_code import run_without_package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers import trainer as trainer_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aft.commands.finetune import main
from aft.finetuning import TokenWindows, split_text
from aft.finetuning_arguments import default_learning_rate
from aft.finetuning_run import CLASSIFICATION
from aft.learning_rate_search import FACTORS
from aft.raw_files import pydoc_bytes
from modeling_aft import ByteTokenizer


ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"aft": "conv", "synthesizer": "dense"}
families = pytest.mark.parametrize("family", FAMILIES)
IS_CODE = {True: "code", False: "prose"}


@pytest.fixture(scope="module", autouse=True)
def leave_no_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def finetune(output_dir: Path, run: Callable = main, **values) -> dict:
    """A run on the CPU with small batches; `values` are further flags."""
    values = {
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        **values,
    }
    return run([text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def evaluations(folder: Path, metric: str) -> list[float]:
    return [entry[metric] for entry in state(folder)["log_history"] if metric in entry]


# Inputs


def save_model(folder: Path, family: str, tokenizer=None, **changes) -> Path:
    torch.manual_seed(0)
    config = make_config(FAMILIES[family], **{"hidden_size": 32, **changes})
    model_classes(FAMILIES[family])[1](config).save_pretrained(folder)
    (tokenizer or ByteTokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A language model of each family, without dropout."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """English text, and in the part that is held out also every byte: NUL is one, and not all are UTF-8."""
    path = tmp_path_factory.mktemp("text") / "text.bin"
    path.write_bytes(pydoc_bytes()[:12_000] + bytes(range(256)))
    return path


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Lines of Python code and of English prose about it, in random order."""
    prose = [line.strip() for line in pydoc_bytes().decode().splitlines() if not line.startswith("   ")]
    code = [line.strip() for module in (random, csv, inspect) for line in inspect.getsource(module).splitlines()]
    kinds = (
        (False, [line for line in prose if line[:1].isalpha()]),
        (True, [line for line in code if "#" not in line]),
    )
    rows = [
        {"text": line[:LIMIT], "label": IS_CODE[is_code]}
        for is_code, lines in kinds
        for line in [line for line in lines if len(line) > 10 and line.isascii()][:300]
    ]
    random.Random(0).shuffle(rows)
    return rows


def write_table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# Language model


def bits_per_byte(model, windows: list[tuple[torch.Tensor, int]], num_bytes: int) -> float:
    """By hand: of each window of ids only the last so many are scored."""
    nats = 0.0
    for ids, scored in windows:
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nats += losses[len(losses) - scored :].sum().item()
    return nats / math.log(2) / num_bytes


def windows_of(ids: list[int], length: int) -> list[tuple[torch.Tensor, int]]:
    """Windows of `length` that overlap by one; the last one ends with the ids."""
    found, done = [], 1
    while done < len(ids):
        end = min(done + length - 1, len(ids))
        found.append((torch.tensor(ids[end - length : end]), end - done))
        done = end
    return found


@families
def test_text_lowers_the_bits_per_byte_of_the_held_out_end(family, bases, text_file, tmp_path):
    metrics = finetune(tmp_path / "run", model=bases[family], text_file=text_file, eval_on_start=True)
    content = text_file.read_bytes()
    held_out = list(content[len(content) - len(content) // 10 :])
    before, after = (
        bits_per_byte(
            AutoModelForCausalLM.from_pretrained(folder).eval(), windows_of(held_out, LIMIT), len(held_out) - 1
        )
        for folder in (bases[family], tmp_path / "run")
    )
    history = evaluations(tmp_path / "run", "eval_bits_per_byte")
    assert history[0] == pytest.approx(before, rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(after, rel=1e-5)
    assert metrics["eval_bytes_scored"] == len(held_out) - 1
    assert after < before - 1
    assert json.loads((tmp_path / "run" / "all_results.json").read_text()) == metrics


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@families
def test_smoothed_labels_are_those_of_the_next_byte(family, known, bases, text_file, tmp_path, monkeypatch):
    """A model that learned to repeat its input would get worse; a class that Trainer does not know would, too."""
    name = {"aft": "AFTForCausalLM", "synthesizer": "SynthesizerForCausalLM"}[family]
    if not known:
        monkeypatch.setattr("aft.finetuning.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
        with pytest.raises(ValueError, match=f"--label_smoothing_factor must be 0 for {name}, .* got 0.1"):
            finetune(tmp_path / "run", model=bases[family], text_file=text_file, label_smoothing_factor=0.1)
        assert not (tmp_path / "run").exists()
        return
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        pytest.skip("the package does not name its classes to Trainer yet")
    values = {"model": bases[family], "text_file": text_file, "eval_on_start": True}
    smoothed = finetune(tmp_path / "run", **values, label_smoothing_factor=0.1)
    plain = finetune(tmp_path / "plain", **values)
    history = evaluations(tmp_path / "run", "eval_bits_per_byte")
    assert smoothed["eval_bits_per_byte"] < history[0] - 1
    assert smoothed["eval_bits_per_byte"] == pytest.approx(plain["eval_bits_per_byte"], abs=0.3)


TEXT = pydoc_bytes()[:6000].decode() + "naïve café, Größe 3 µm → 漢字\n" * 5


def test_a_learning_rate_is_found(bases, text_file, tmp_path, capsys):
    """The run is that of the rate that is told, which has the least loss of those that are told."""
    options = {"model": bases["aft"], "text_file": text_file, "max_steps": 3, "max_length": 32}
    finetune(tmp_path / "found", **options, learning_rate=None, search_steps=3)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("learning rate "))
    losses = {float(rate): float(loss) for rate, loss in re.findall(r"([\d.]+e-\d+): ([\d.]+)", line)}
    found = float(line.split()[2].rstrip(","))
    assert sorted(losses) == pytest.approx([3e-3 / 9, 1e-3, 3e-3, 9e-3], rel=0.02)
    assert losses[found] == min(losses.values())
    exact = next(3e-3 * factor for factor in FACTORS if f"{3e-3 * factor:.1e}" == f"{found:.1e}")
    finetune(tmp_path / "given", **options, learning_rate=exact)
    found, given = weights(tmp_path / "found"), weights(tmp_path / "given")
    assert all(torch.equal(found[name], given[name]) for name in given)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"search_steps": 0}, "--search_steps must be at least 1, got 0"),
        ({"search_steps": 1, "learning_rate": 0.1}, "--search_steps must be left out with --learning_rate"),
    ],
    ids=["none", "with-a-rate"],
)
def test_a_search_that_makes_no_sense_is_refused(bases, text_file, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path, model=bases["aft"], text_file=text_file, **{"learning_rate": None, **changes})


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A tokenizer of 320 pieces of words, without a padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_tokenizer_of_the_model_is_used_and_bytes_are_scored(bpe, tmp_path):
    base = save_model(tmp_path / "base", "aft", bpe, vocab_size=320)
    (tmp_path / "train.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "validation.txt").write_text("Größe\n\n" + TEXT[-800:], encoding="utf-8")
    metrics = finetune(
        tmp_path / "run",
        model=base,
        text_file=tmp_path / "train.txt",
        validation_file=tmp_path / "validation.txt",
        max_length=20,
    )
    content = (tmp_path / "validation.txt").read_bytes()
    ids = [id_ for line in content.decode().splitlines(keepends=True) for id_ in bpe(line).input_ids]
    scored = len(content) - len(bpe.convert_ids_to_tokens(ids[0]))  # a character of a token is a byte
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert metrics["eval_bytes_scored"] == scored
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits_per_byte(model, windows_of(ids, 20), scored), rel=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("Größe").input_ids == bpe("Größe").input_ids


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 15, 16, 50])
def test_windows_predict_each_token_but_the_first_once(tokens):
    ids = np.arange(tokens) + 1
    windows = list(TokenWindows(ids, 8))
    predicted = [label for window in windows for label in window["labels"][1:] if label != -100]
    assert predicted == list(range(2, tokens + 1))
    assert {len(window["input_ids"]) for window in windows} == {min(tokens, 8)}
    for window in windows:
        kept = window["labels"] != -100
        assert (window["labels"][kept] == window["input_ids"][kept]).all()


def test_the_split_of_a_text_parts_no_character():
    content = ("é" * 50 + "a").encode()
    for share in (0.1, 0.11, 0.5, 0.9):
        first, second = split_text(content, share)
        assert first + second == content
        assert abs(len(second) - share * len(content)) < 2
        assert first.decode() + second.decode() == content.decode()


# Classifier


@pytest.fixture(scope="module")
def classifiers(bases, rows, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Folder and metrics of a classifier of each family: one from names in a csv, one from numbers in a jsonl file."""
    folder, finished = tmp_path_factory.mktemp("classifiers"), {}
    numbered = [{"line": row["text"], "is_code": 7 if row["label"] == "code" else 12} for row in rows]
    for family, suffix, table, columns in (
        ("aft", ".csv", rows, {}),
        ("synthesizer", ".jsonl", numbered, {"text_column": "line", "label_column": "is_code"}),
    ):
        files = {
            name: write_table(folder / f"{family}-{name}{suffix}", part)
            for name, part in (("labelled_file", table[:-150]), ("predict_file", table[-150:]))
        }
        metrics = finetune(
            folder / family,
            model=bases[family],
            **files,
            **columns,
            metric_for_best_model="macro_f1",
            learning_rate=0.006,
            num_train_epochs=3,
        )
        finished[family] = (folder / family, metrics)
    return finished


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def label_of(row: dict, family: str) -> str:
    return row["label"] if family == "aft" else {"code": "7", "prose": "12"}[row["label"]]


@families
def test_a_table_teaches_to_tell_code_from_prose(family, classifiers, rows):
    folder, metrics = classifiers[family]
    truth, found = [label_of(row, family) for row in rows[-150:]], [line["label"] for line in predictions(folder)]
    f1 = []
    for name in set(truth):
        right = sum(a == b == name for a, b in zip(truth, found, strict=True))
        precision, recall = right / found.count(name), right / truth.count(name)
        f1.append(2 * precision * recall / (precision + recall))
    assert metrics["predict_accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(truth, found, strict=True)]))
    assert metrics["predict_macro_f1"] == pytest.approx(np.mean(f1))
    assert metrics["predict_accuracy"] > 0.7  # of 150; by chance it would be 0.5, give or take 0.04
    # Larger is better of this metric, and the best is what remains.
    assert metrics["eval_macro_f1"] == pytest.approx(max(evaluations(folder, "eval_macro_f1")))


@families
def test_predictions_of_padded_batches_are_those_of_each_row_alone(family, classifiers, rows):
    folder, _ = classifiers[family]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), ByteTokenizer()
    lines = predictions(folder)
    assert [line["text"] for line in lines] == [row["text"] for row in rows[-150:]]
    assert len({len(line["text"]) for line in lines}) > 5
    for line in lines[:40]:
        with torch.no_grad():
            alone = model(**tokenizer(line["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert [line["scores"][name] for name in model.config.id2label.values()] == pytest.approx(
            alone.tolist(), abs=1e-5
        )
        assert line["label"] == max(line["scores"], key=line["scores"].get)


@families
def test_the_config_names_the_labels_in_order(family, classifiers):
    config = AutoModelForSequenceClassification.from_pretrained(classifiers[family][0]).config
    names = ["code", "prose"] if family == "aft" else ["7", "12"]
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: index for index, name in enumerate(names)}
    assert config.problem_type == "single_label_classification" and config.use_cache


@families
def test_only_the_head_of_a_classifier_is_new(family, bases, rows, tmp_path):
    loading = AutoModelForSequenceClassification.from_pretrained(bases[family], output_loading_info=True)[1]
    assert set(loading["missing_keys"]) == {"score.weight", "score.bias"} and not loading["unexpected_keys"]
    table = write_table(tmp_path / "table.csv", rows[:40])
    finetune(tmp_path / "run", model=bases[family], labelled_file=table, learning_rate=0, num_train_epochs=1)
    before, after = weights(bases[family]), weights(tmp_path / "run")
    assert after.keys() == before.keys() | {"score.weight", "score.bias"}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_classifier_only_evaluates_and_predicts_without_epochs(classifiers, rows, tmp_path):
    folder, metrics = classifiers["aft"]
    labelled = write_table(tmp_path / "labelled.jsonl", rows[-150:])
    unlabelled = write_table(tmp_path / "unlabelled.csv", [{"text": text} for text in ("null", "007", "a, b", "1.50")])
    found = finetune(
        tmp_path / "run",
        model=folder,
        labelled_file=labelled,
        validation_file=labelled,
        predict_file=unlabelled,
        num_train_epochs=0,
    )
    assert found["eval_accuracy"] == pytest.approx(metrics["predict_accuracy"])
    assert [line["text"] for line in predictions(tmp_path / "run")] == ["null", "007", "a, b", "1.50"]
    assert "predict_accuracy" not in found and not (tmp_path / "run" / "model.safetensors").exists()


def test_predictions_stand_beside_their_texts_however_batches_are_made(classifiers, rows, tmp_path):
    table = write_table(tmp_path / "labelled.jsonl", rows[-40:])
    values = {"model": classifiers["aft"][0], "labelled_file": table, "predict_file": table, "num_train_epochs": 0}
    for strategy in ("random", "group_by_length"):
        finetune(tmp_path / strategy, **values, train_sampling_strategy=strategy, per_device_eval_batch_size=3)
    found = predictions(tmp_path / "group_by_length")
    for line, expected in zip(found, predictions(tmp_path / "random"), strict=True):
        assert line["text"] == expected["text"]
        assert line["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert len({max(line["scores"].values()) for line in found}) > 30


@pytest.mark.parametrize(("side", "kept"), [("right", slice(None, LIMIT)), ("left", slice(-LIMIT, None))])
def test_truncation_keeps_the_other_side(side, kept, classifiers, rows, tmp_path):
    folder, _ = classifiers["aft"]
    texts = [first["text"] + second["text"] * 2 for first, second in zip(rows[:20], rows[20:40], strict=True)]
    tables = {
        name: write_table(tmp_path / f"{name}.jsonl", [{"text": text, "label": "code"} for text in part])
        for name, part in (("cut", [text[kept] for text in texts]), ("whole", texts))
    }
    for name, table in tables.items():
        flags = {"truncation": side} if name == "whole" else {}
        flags |= {"labelled_file": table, "predict_file": table, "num_train_epochs": 0}
        finetune(tmp_path / name, model=folder, **flags)
    cut, whole = predictions(tmp_path / "cut"), predictions(tmp_path / "whole")
    assert [line["scores"] for line in cut] == [line["scores"] for line in whole]
    assert [line["text"] for line in whole] == texts


@pytest.mark.parametrize(
    ("predicted", "true", "accuracy", "macro_f1"),
    [
        pytest.param([0, 0, 1, 1], [0, 1, 1, 1], 3 / 4, (2 / 3 + 4 / 5) / 2, id="two-classes"),
        pytest.param([2, 2, 2], [0, 1, 2], 1 / 3, (0 + 0 + 1 / 2) / 3, id="always-the-same"),
        pytest.param([5, 0], [0, 0], 1 / 2, (2 / 3 + 0) / 2, id="class-that-is-not-there"),
        pytest.param([3], [3], 1.0, 1.0, id="one-class"),
    ],
)
def test_accuracy_and_macro_f1(predicted, true, accuracy, macro_f1):
    scores = evaluate.load(str(CLASSIFICATION)).compute(predictions=predicted, references=true)
    assert scores == pytest.approx({"accuracy": accuracy, "macro_f1": macro_f1})


LOAD_CLASSIFIER = """
import torch
from transformers import pipeline
classify = pipeline("text-classification", sys.argv[1], trust_remote_code=True, top_k=None)
assert "transformers_modules" in type(classify.model).__module__
torch.save(classify(["return self._value", "The value"]), sys.argv[2] + "/result.pt")
"""


def test_a_classifier_loads_without_the_package(classifiers, tmp_path):
    folder, _ = classifiers["synthesizer"]
    result = run_without_package(folder, tmp_path, LOAD_CLASSIFIER)
    assert result.returncode == 0, result.stderr
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for text, found in zip(("return self._value", "The value"), torch.load(tmp_path / "result.pt"), strict=True):
        scores = model(**ByteTokenizer()(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
        expected = dict(zip(model.config.id2label.values(), scores, strict=True))
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)


# Training


@pytest.fixture(scope="module")
def few(rows, text_file, tmp_path_factory) -> dict[str, dict]:
    """The data flags of both modes, with so little data that the last batch of an epoch is not full."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "text.txt").write_bytes(text_file.read_bytes()[: 22 * (LIMIT - 1) + 9])
    (folder / "validation.txt").write_bytes(text_file.read_bytes()[-400:])
    table, validation = (write_table(folder / f"{start}.csv", rows[start : start + 23]) for start in (0, 23))
    return {
        "text": {"text_file": folder / "text.txt", "validation_file": folder / "validation.txt"},
        "table": {"labelled_file": table, "validation_file": validation},
    }


# A factor on all gradients changes the steps of SGD, and hardly those of Adam.
SGD = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1, "num_train_epochs": 2}


@pytest.mark.parametrize(("mode", "family"), [("text", "aft"), ("table", "synthesizer")])
def test_four_accumulated_batches_of_one_equal_one_batch_of_four(family, mode, bases, few, tmp_path):
    for size in (1, 4):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        values = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        finetune(tmp_path / str(size), model=bases[family], **few[mode], **SGD, **batches, **values)
    one, four, base = (weights(folder) for folder in (tmp_path / "1", tmp_path / "4", bases[family]))
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
    assert max((four[name] - base[name]).abs().max() for name in base) > 0.001


class Interrupt(TrainerCallback):
    """Ends a run in the middle, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(output_dir: Path, step: int, **values) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module, "DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, Interrupt(step)])
        finetune(output_dir, **values)


@pytest.mark.parametrize(("mode", "resume"), [("text", "auto"), ("table", "path")])
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(mode, resume, few, tmp_path):
    base = save_model(tmp_path / "base", "aft", hidden_dropout_prob=0.2)
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 14}
    values = {"model": base, **few[mode], **steps, "per_device_train_batch_size": 4, "load_best_model_at_end": False}
    values["save_total_limit"] = 4
    interrupted(tmp_path / "run", 11, **values)  # an epoch has 6 steps
    first = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / "checkpoint-12").mkdir()  # what an interrupted save leaves behind
    checkpoint = str(tmp_path / "run" / "checkpoint-8") if resume == "path" else resume
    finetune(tmp_path / "run", **values, resume_from_checkpoint=checkpoint)
    assert first.stat().st_mtime_ns == written  # it did not start again
    finetune(tmp_path / "whole", **values)
    resumed, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert resumed == whole
    losses = [evaluations(tmp_path / name, "eval_loss") for name in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("resumed", [False, True], ids=["whole", "resumed"])
def test_a_run_that_gets_worse_stops_early_and_ends_with_the_best(resumed, bases, few, tmp_path):
    (tmp_path / "one-sided.txt").write_bytes(b"a" * 2000)  # the more of it, the worse is the English text
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 100}
    values = {"model": bases["aft"], "validation_file": few["text"]["validation_file"], **steps}
    values |= {"text_file": tmp_path / "one-sided.txt", "metric_for_best_model": "bits_per_byte"}
    values |= {"early_stopping_patience": 2}
    if resumed:  # one evaluation of the two that patience has was used up
        interrupted(tmp_path / "run", 5, **values)
        values["resume_from_checkpoint"] = "true"
    metrics = finetune(tmp_path / "run", **values)
    history = evaluations(tmp_path / "run", "eval_bits_per_byte")
    assert state(tmp_path / "run")["global_step"] == 6
    assert history[0] < history[1] < history[2]
    assert metrics["eval_bits_per_byte"] == history[0]
    best = weights(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(tmp_path / "run").items())


def test_two_processes_equal_one(bases, rows, tmp_path):
    tables = {"labelled_file": rows[:24], "validation_file": rows[24:47], "predict_file": rows[47:58]}
    tables = {name: write_table(tmp_path / f"{name}.csv", part) for name, part in tables.items()}
    values = {"model": bases["aft"], **tables, **SGD}
    one = finetune(tmp_path / "one", **values, per_device_train_batch_size=4)

    def launch(flags):
        run_on_two_processes(ROOT / "scripts" / "finetune.py", flags)
        return json.loads((tmp_path / "two" / "all_results.json").read_text())

    two = finetune(tmp_path / "two", launch, **values, per_device_train_batch_size=2)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    for metric in ("eval_accuracy", "eval_macro_f1", "predict_accuracy", "predict_macro_f1"):
        assert two[metric] == pytest.approx(one[metric])
    for line, expected in zip(predictions(tmp_path / "two"), predictions(tmp_path / "one"), strict=True):
        assert line["text"] == expected["text"]
        assert line["scores"] == pytest.approx(expected["scores"], abs=1e-4)


# Wrong input


@pytest.fixture(scope="module")
def wrong(few, tmp_path_factory) -> dict[str, Path]:
    """Files by name, most of them wrong in one way."""
    folder = tmp_path_factory.mktemp("wrong")
    contents = {
        "good.csv": "text,label\n" + "a b,x\nc,y\n" * 5,
        "empty.csv": "",
        "header.csv": "text,label\n",
        "ragged.csv": "text,label\na,x\na,x,y\n",
        "columns.csv": "sentence,class\na,x\n",
        "no-text.csv": "text,label\na,x\n,y\n",
        "no-label.jsonl": '{"text": "a", "label": "x"}\n{"text": "b"}\n',
        "one-label.csv": "text,label\na,x\nb,x\n",
        "unknown-label.csv": "text,label\na,x\nb,z\n",
        "long.csv": f"text,label\na,x\n{'b' * (LIMIT + 1)},y\n",
        "numbers.jsonl": '{"text": 1, "label": "x"}\n',
        "real.jsonl": '{"text": "a", "label": 0.5}\n',
        "broken.jsonl": '{"text": "a", "label"\n',
        "table.tsv": "text\tlabel\na\tx\n",
        "one.txt": "a",
        "latin-1.txt": "Größe",
        "broken.gz": "no gzip",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="latin-1")
    return {"good.txt": few["text"]["text_file"], **{name: folder / name for name in contents}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({}, "--text_file must be given, or else --labelled_file or --chat_file, got None", id="no-mode"),
        pytest.param(
            {"text_file": "good.txt", "labelled_file": "good.csv"}, "--labelled_file must be left out", id="both-modes"
        ),
        pytest.param({"text_file": "nowhere.txt"}, "--text_file must be a file, got 'nowhere.txt'", id="no-file"),
        pytest.param({"text_file": "good.txt", "model": "nowhere"}, "--model nowhere: ", id="no-model"),
        pytest.param({"text_file": "one.txt"}, "--text_file .*one.txt: must have at least 2 tokens", id="short-text"),
        pytest.param(
            {"text_file": "good.txt", "validation_file": "empty.csv"},
            "--validation_file .*: must have at least 2 tokens, got 0",
            id="empty-validation-text",
        ),
        pytest.param({"text_file": "broken.gz"}, "broken.gz: not a whole .gz file", id="broken-archive"),
        pytest.param(
            {"text_file": "good.txt", "predict_file": "good.csv"}, "--predict_file must be left out", id="prediction"
        ),
        pytest.param(
            {"text_file": "good.txt", "label_smoothing_factor": 1},
            r"--label_smoothing_factor must be in \[0, 1\), got 1",
            id="smoothing",
        ),
        pytest.param(
            {"text_file": "good.txt", "max_length": 49}, r"--max_length must be at most .*\(48\), got 49", id="window"
        ),
        pytest.param({"labelled_file": "table.tsv"}, "table.tsv: must end in .csv, .jsonl or .parquet", id="suffix"),
        pytest.param({"labelled_file": "empty.csv"}, "empty.csv: must have at least one row", id="empty-table"),
        pytest.param({"labelled_file": "header.csv"}, "header.csv: no .csv table with rows", id="no-rows"),
        pytest.param({"labelled_file": "ragged.csv"}, "ragged.csv: .*Expected 2 fields in line 3, saw 3", id="ragged"),
        pytest.param({"labelled_file": "broken.jsonl"}, "broken.jsonl: no .jsonl table", id="broken-table"),
        pytest.param(
            {"labelled_file": "columns.csv", "label_column": "class"},
            "columns.csv: no column 'text', only 'sentence', 'class'; --text_column",
            id="text-column",
        ),
        pytest.param(
            {"labelled_file": "columns.csv", "text_column": "sentence"},
            "no column 'label', .*--label_column",
            id="column",
        ),
        pytest.param(
            {"labelled_file": "good.csv", "label_column": "text"}, "--label_column must be another", id="same-column"
        ),
        pytest.param({"labelled_file": "no-text.csv"}, "'text' must not be empty, got '' in row 2", id="no-text"),
        pytest.param(
            {"labelled_file": "no-label.jsonl"}, "'label' must not be empty, got None in row 2", id="no-label"
        ),
        pytest.param({"labelled_file": "numbers.jsonl"}, "'text' must have strings, has int64", id="text-of-numbers"),
        pytest.param({"labelled_file": "real.jsonl"}, "'label' must have strings or integers, has", id="real-labels"),
        pytest.param(
            {"labelled_file": "one-label.csv"}, r"'label' must have at least 2 labels, has \['x'\]", id="1-label"
        ),
        pytest.param(
            {"labelled_file": "good.csv", "validation_file": "unknown-label.csv"},
            r"--validation_file .*: unknown label 'z' in row 2; known: \['x', 'y'\]",
            id="unknown-label",
        ),
        pytest.param(
            {"labelled_file": "long.csv"}, "row 2 has 49 tokens; allowed: 1 to 48 .*--truncation", id="long-row"
        ),
        pytest.param(
            {"labelled_file": "good.csv", "max_length": 2}, "row 1 has 3 tokens; allowed: 1 to 2 ", id="max_length"
        ),
        pytest.param(
            {"labelled_file": "good.csv", "truncation": "middle"}, "--truncation must be none, ", id="truncation"
        ),
        pytest.param(
            {"labelled_file": "good.csv", "validation_share": 0.05},
            "--validation_share 0.05 of 10 rows",
            id="small-share",
        ),
        pytest.param(
            {"labelled_file": "good.csv", "validation_share": 1}, r"--validation_share must be in \(0, 1\)", id="share"
        ),
        pytest.param(
            {"labelled_file": "good.csv", "metric_for_best_model": "bits_per_byte"},
            "--metric_for_best_model must be one of loss, accuracy, macro_f1, got 'bits_per_byte'",
            id="metric",
        ),
        pytest.param(
            {"text_file": "good.txt", "early_stopping_patience": 0},
            "patience must be at least 1, got 0",
            id="patience",
        ),
        pytest.param(
            {"text_file": "good.txt", "early_stopping_patience": 1, "load_best_model_at_end": False},
            "--load_best_model_at_end must be true with --early_stopping_patience, got False",
            id="patience-without-best",
        ),
        pytest.param(
            {"text_file": "good.txt", "resume_from_checkpoint": "true"}, "--resume_from_checkpoint true: ", id="resume"
        ),
        pytest.param(
            {"text_file": "good.txt", "resume_from_checkpoint": "nowhere"},
            "--resume_from_checkpoint nowhere",
            id="path",
        ),
        pytest.param(
            {"text_file": "good.txt", "eval_strategy": "steps"}, "load_best_model_at_end requires", id="strategy"
        ),
        pytest.param(
            {"text_file": "good.txt", "dataloader_drop_last": True}, "drop_last must be false", id="drop-last"
        ),
        pytest.param({"text_file": "good.txt", "max_steps": "few"}, "max_steps.*few", id="type"),
        pytest.param({"text_files": "good.txt"}, "--text_files", id="unknown-flag"),
    ],
)
def test_wrong_input_is_refused_before_training(values, message, bases, wrong, tmp_path):
    values = {"model": bases["aft"], **values}
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "run", **{name: wrong.get(value, value) for name, value in values.items()})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("vocab_size", "values", "message"),
    [
        pytest.param(256, {"text_file": "good.txt"}, "vocab_size must be at least .* 320, got 256", id="vocabulary"),
        pytest.param(320, {"text_file": "latin-1.txt"}, "latin-1.txt: must be UTF-8", id="not-utf-8"),
        pytest.param(320, {"labelled_file": "good.csv"}, "tokenizer must have a padding token", id="no-padding"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(vocab_size, values, message, bpe, wrong, tmp_path):
    base = save_model(tmp_path / "base", "aft", bpe, vocab_size=vocab_size)
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "run", model=base, **{name: wrong[value] for name, value in values.items()})
    assert not (tmp_path / "run").exists()


def test_a_classifier_refuses_labels_that_it_does_not_have(classifiers, wrong, tmp_path):
    with pytest.raises(ValueError, match=r"good.csv: unknown label 'x' in row 1; known: \['code', 'prose'\]"):
        finetune(tmp_path / "run", model=classifiers["aft"][0], labelled_file=wrong["good.csv"])


@pytest.mark.parametrize("resume", [{}, {"resume_from_checkpoint": "auto"}], ids=["without-resume", "auto"])
def test_a_run_is_not_replaced(resume, classifiers, wrong, tmp_path):
    folder, _ = classifiers["aft"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="--output_dir .* holds a run"):
        finetune(tmp_path / "run", model=folder, labelled_file=wrong["good.csv"], **resume)
    assert os.listdir(tmp_path / "run") == ["config.json"]


# What is learned by default


def test_the_learning_rate_follows_the_size_of_the_model(bases, text_file, tmp_path):
    assert [default_learning_rate(n) for n in (1000, 2_000_000)] == [3e-3, 3e-3]
    assert default_learning_rate(8_000_000) == pytest.approx(1.5e-3)
    assert default_learning_rate(124_000_000) == pytest.approx(3.8e-4, rel=0.01)
    assert default_learning_rate(70_000_000_000) == 5e-5
    finetune(
        tmp_path / "run",
        model=bases["aft"],
        text_file=text_file,
        learning_rate=None,
        num_train_epochs=1,
        logging_steps=1,
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    rates = [event["learning_rate"] for event in state["log_history"] if "learning_rate" in event]
    assert 2e-3 < max(rates) <= 3e-3


def test_the_last_lines_tell_the_gain_and_what_to_type(bases, text_file, tmp_path, capsys):
    metrics = finetune(tmp_path / "run", model=bases["aft"], text_file=text_file, num_train_epochs=1)
    *_, line, model, _, command = capsys.readouterr().out.splitlines()
    assert model == f"model: {tmp_path / 'run'}" and command.endswith(
        f'generate --model {tmp_path / "run"} --prompt "The "'
    )
    found = re.fullmatch(r"held out: (\S+) before, (\S+) bits per byte", line)
    assert float(found[2]) == pytest.approx(metrics["eval_bits_per_byte"], abs=1e-4)
    values = {"model": bases["aft"], "text_file": text_file, "num_train_epochs": 0}
    assert float(found[1]) == pytest.approx(finetune(tmp_path / "none", **values)["eval_bits_per_byte"], abs=1e-4)
