"""Language models of pictures: data, training, bits per dimension, and what they draw."""

import json
import math
import shutil
import struct
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from PIL import ExifTags, Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.bits_per_byte import evaluate_split
from aft.commands.draw import main as draw
from aft.commands.evaluate import main as evaluate
from aft.commands.finetune import main as finetune
from aft.commands.generate import main as generate
from aft.commands.paint import main as paint
from aft.commands.pretrain import main as pretrain
from aft.commands.stream import main as stream
from aft.painting import GAP, TRIES, draw_completions, draw_pictures
from aft.picture_arguments import SplitArguments
from aft.picture_data import PictureData, PictureTokens, PictureWindows, load_pictures
from aft.protocols import Protocol
from aft.run_log import read_log
from aft.text_arguments import flag_words


pytestmark = pytest.mark.usefixtures("on_the_cpu")
GREY, COLOUR = (4, 4, 1), (2, 3, 3)
START = 256
COUNTS = {"train": 10, "valid": 3, "test": 4}


def make_pictures(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Pictures whose pixels are alike, uint8 [N, H, W, C]."""
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 200, (count, 1, 1, shape[2]))
    return (base + generator.integers(0, 30, (count, *shape))).astype(np.uint8)


def save_pngs(folder: Path, pictures: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(folder / f"{number:03}.png")


def make_data(shape: tuple[int, int, int]) -> PictureData:
    splits = {split: make_pictures(count, shape, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    return PictureData("made", splits)


def make_model(length: int, vocab_size: int = 257, **fields) -> torch.nn.Module:
    values = {**small_runs.MODEL, "max_position_embeddings": length, "vocab_size": vocab_size, **fields}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()


def source(data: Path | str, **changes) -> Namespace:
    """The flags that name pictures."""
    names = ("dataset_config", "image_column", "validation_split", "test_split", "test_size", "image_size")
    return Namespace(**{"pictures": str(data), "num_channels": None, **dict.fromkeys(names), **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with presets, with grey pictures in parts, and with colour pictures of a class."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, length in (("model", math.prod(GREY)), ("short", math.prod(GREY) - 1)):
        values = {**small_runs.MODEL, "max_position_embeddings": length}
        (folder / f"{name}.json").write_text(json.dumps(values))
    for split, pictures in make_data(GREY).splits.items():
        save_pngs(folder / "grey" / split, pictures)
    save_pngs(folder / "colour" / "class", make_pictures(40, COLOUR))
    return folder


def flags(inputs: Path, output_dir: Path, **changes) -> list[str]:
    of_text = {"dataset_path": None, "sample_bytes": None, "sample_every": 4, "eval_every": 4, "save_every": 4}
    values = {**of_text, "pictures": inputs / "grey", "sample_pictures": 2, "horizontal_flip": True, "color_shift": 10}
    return small_runs.flags(inputs, output_dir, **{**values, **changes})


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    """A finished run, which nothing changes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain(flags(inputs, folder))
    return folder


# Data


def test_folders_with_parts_are_read_exactly(inputs):
    data, expected = load_pictures(source(inputs / "grey")), make_data(GREY)
    assert data.shape == GREY and data.sha256 == expected.sha256
    assert all(np.array_equal(data.splits[split], expected.splits[split]) for split in COUNTS)


def test_valid_and_test_are_drawn_from_a_folder_without_parts(inputs):
    data, pictures = load_pictures(source(inputs / "colour", test_size=4)), make_pictures(40, COLOUR)
    assert [len(data.splits[split]) for split in COUNTS] == [32, 4, 4]
    rows = np.concatenate([data.splits[split] for split in COUNTS]).reshape(40, -1).tolist()
    assert sorted(rows) == sorted(pictures.reshape(40, -1).tolist())


def test_idx_files_need_no_labels(tmp_path):
    pictures = make_pictures(40, GREY)
    head = struct.pack(">4B3I", 0, 0, 8, 3, *pictures.shape[:3])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head + pictures.tobytes())
    data = load_pictures(source(tmp_path, test_size=1))
    assert data.shape == GREY and [len(data.splits[split]) for split in COUNTS] == [38, 1, 1]


def test_whole_numbers_of_flags_are_written_as_such():
    """In the commands of a card: --test_size is a share or a number."""
    for size, words in ((4.0, ["--test_size", "4"]), (0.25, ["--test_size", "0.25"])):
        assert flag_words(source("photos", test_size=size, cache_dir=""), SplitArguments) == words


def test_columns_of_a_data_set_need_no_labels(tmp_path):
    pictures = {split: make_pictures(count, COLOUR) for split, count in COUNTS.items()}
    tables = {
        split: Dataset.from_dict({"img": [Image.fromarray(one) for one in each]}) for split, each in pictures.items()
    }
    DatasetDict(tables).save_to_disk(tmp_path / "data")
    data = load_pictures(source(tmp_path / "data"))
    assert all(np.array_equal(data.splits[split], pictures[split]) for split in COUNTS)


@pytest.mark.parametrize("size, channels", [(4, 1), (2, 3)])
def test_pictures_of_other_sizes_are_what_the_image_processor_makes_of_them(inputs, size, channels):
    from modeling_aft import AFTImageProcessor

    data = load_pictures(source(inputs / "colour", image_size=size, num_channels=channels))
    processor = AFTImageProcessor(size={"height": size, "width": size}, num_channels=channels)
    made = processor(list(make_pictures(40, COLOUR))).input_ids[:, 1:].tolist()
    assert data.shape == (size, size, channels)
    assert all(row.reshape(-1).tolist() in made for row in data.splits["train"])


def test_pictures_are_turned_as_their_cameras_say(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned to the left
    pictures = make_pictures(20, COLOUR)
    tmp_path.joinpath("all").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(np.rot90(picture)).save(tmp_path / "all" / f"{number}.png", exif=exif)
    data = load_pictures(source(tmp_path / "all"))
    rows = np.concatenate([data.splits[split] for split in COUNTS]).reshape(20, -1).tolist()
    assert data.shape == COLOUR and sorted(rows) == sorted(pictures.reshape(20, -1).tolist())
    Image.fromarray(np.rot90(pictures[0])).save(tmp_path / "all" / "0.png")
    with pytest.raises(ValueError, match="--image_size must be given: .* several sizes, such as 2 x 3 and 3 x 2"):
        load_pictures(source(tmp_path / "all", test_size=2))


# Windows


def test_a_window_is_a_picture_after_the_start_token():
    data = PictureTokens(make_data(GREY))
    inputs, labels = PictureWindows(data, 4, seed=0).batch(0, range(4))
    assert inputs.shape == labels.shape == (4, 16)
    assert (inputs[:, 0] == START).all() and np.array_equal(inputs[:, 1:], labels[:, :-1])
    pictures = data.pictures["train"].tolist()
    assert all(row in pictures for row in labels.tolist())


def test_an_epoch_has_every_picture_once_and_the_next_another_order():
    data = PictureTokens(make_data(GREY))
    windows = PictureWindows(data, 5, seed=0)
    seen = [windows.picture(step, row).tolist() for step in range(4) for row in range(5)]
    epochs = seen[:10], seen[10:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(data.pictures["train"].tolist())
    assert epochs[0] != epochs[1]


def test_augmentation_flips_pixels_and_shifts_all_sub_pixels_of_a_picture():
    data = PictureTokens(make_data(COLOUR))
    plain = PictureWindows(data, 10, seed=3)
    changed = PictureWindows(data, 10, seed=3, flip=True, shift=10)
    flips, shifts = set(), set()
    for step in range(20):
        for row in range(10):
            before, after = (each.picture(step, row).reshape(COLOUR).astype(int) for each in (plain, changed))
            found = [
                (flipped, shift)
                for flipped in (False, True)
                for shift in range(-10, 11)
                if np.array_equal(after, ((before[:, ::-1] if flipped else before) + shift).clip(0, 255))
            ]
            assert found
            flips.add(found[0][0])
            shifts.add(found[0][1])
    assert flips == {False, True} and {-10, 10} <= shifts and len(shifts) == 21


def test_augmentation_depends_on_the_step_and_the_row_alone():
    windows = PictureWindows(PictureTokens(make_data(COLOUR)), 8, seed=0, flip=True, shift=10)
    whole, _ = windows.batch(7, range(8))
    parts = [windows.batch(7, range(first, first + 2))[0] for first in (0, 2, 4, 6)]
    assert np.array_equal(whole, np.concatenate(parts))


# Bits per dimension


def plain_bits(model, pictures: np.ndarray, start: int | None) -> float:
    """Bits per dimension, picture by picture and sub-pixel by sub-pixel."""
    scores = []
    for picture in pictures.reshape(len(pictures), -1).astype(int).tolist():
        bits = 0.0
        for place, value in enumerate(picture):
            before = ([] if start is None else [start]) + picture[:place]
            if not before:
                bits += 8
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
            bits -= float(torch.log_softmax(logits, -1)[value]) / math.log(2)
        scores.append(bits / len(picture))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("start", [START, None], ids=["start", "no-start"])
def test_bits_per_dimension_are_those_of_the_plain_formula(shape, start):
    length, data = math.prod(shape), make_data(shape)
    model = make_model(length, 256 if start is None else 257)
    protocol = Protocol("pictures", length, first_bits=8.0 if start is None else None)
    for split, most in (("train", 0), ("valid", 0), ("test", 2)):
        tokens = PictureTokens(data, start)
        result = evaluate_split(model, tokens, split, Accelerator(), protocol, 3, most * length)
        pictures = data.splits[split][: most or None]
        assert result["bits_per_byte"] == pytest.approx(plain_bits(model, pictures, start), rel=1e-6)
        assert result["bytes_scored"] == pictures.size
    assert result["by_position"][0]["first"] == 1


# Runs


def test_a_run_leaves_all_that_draws(run):
    names = {"samples.png", "samples-completed.png", "samples-4.png", "preprocessor_config.json", "training_curve.png"}
    assert names <= {path.name for path in run.iterdir()}
    with Image.open(run / "samples-completed.png") as grid:
        assert grid.mode == "L" and grid.size == ((TRIES + 2) * (4 + GAP) - GAP, 4)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "| split | bits per dimension | protocol |" in card and "byte" not in card.partition("## Training")[0]
    model = AutoModelForCausalLM.from_pretrained(run)
    ids = model.generate()
    assert ids.shape == (1, 17) and ids[0, 0] == START and ids[0, 1:].max() < START
    assert AutoImageProcessor.from_pretrained(run).postprocess(ids)[0].size == (4, 4)


def test_the_score_of_a_run_is_that_of_its_model(run, inputs, capsys):
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    expected = plain_bits(model, make_data(GREY).splits["test"], START)
    assert read_log(run / "run.jsonl")[-1]["test_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    again = evaluate([str(run), "--pictures", str(inputs / "grey")])
    assert again["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4f} bits per dimension (pictures, T = 16, 64 sub-pixels" in capsys.readouterr().out
    less = evaluate([str(run), "--pictures", str(inputs / "grey"), "--split", "valid", "--max_pictures", "2"])
    assert less["bytes_scored"] == 32


def test_a_model_without_a_start_token_is_charged_for_the_first_sub_pixel(inputs, tmp_path):
    model = make_model(16, 256)
    model.save_pretrained(tmp_path)
    found = evaluate([str(tmp_path), "--pictures", str(inputs / "grey")])
    expected = plain_bits(model, make_data(GREY).splits["test"], None)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_is_the_whole_one(run, inputs, tmp_path):
    checkpoint = run / "checkpoints" / "step-4"
    pretrain(flags(inputs, tmp_path / "resumed", resume=checkpoint))
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (run / "samples.png").read_bytes() == (tmp_path / "resumed" / "samples.png").read_bytes()


def test_micro_batches_change_nothing(inputs, tmp_path):
    found = []
    for size in (4, 1):
        changes = {"micro_batch_size": size, "max_steps": 3, "sample_pictures": 0}
        pretrain([*flags(inputs, tmp_path / str(size), **changes), "--model_override", "hidden_dropout_prob=0"])
        found.append(load_file(tmp_path / str(size) / "model.safetensors"))
    for name, weights in found[0].items():
        torch.testing.assert_close(found[1][name], weights, rtol=0, atol=1e-4)


# Drawing


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_completions_keep_what_is_given(shape):
    model, pictures = make_model(math.prod(shape)), make_pictures(3, shape)
    prompts = pictures.reshape(3, -1)[:, : math.prod(shape) // 2]
    made = draw_pictures(model, shape, prompts, seed=0, batch_size=2).reshape(3, -1)
    assert np.array_equal(made[:, : prompts.shape[1]], prompts)
    grid = draw_completions(model, pictures, 1, seed=0, batch_size=2)
    assert np.array_equal(grid[: shape[0], -shape[1] :], pictures[0])
    assert np.array_equal(grid[:1, : shape[1]], pictures[0, :1])
    prompts = pictures[:, :1].reshape(3, -1).repeat(TRIES, axis=0)
    made = draw_pictures(model, shape, prompts, seed=0, batch_size=2)
    tries = [grid[: shape[0], start : start + shape[1]] for start in range(0, grid.shape[1], shape[1] + GAP)][1:-1]
    assert np.array_equal(tries, made[:TRIES])


def test_samples_are_drawn_from_the_whole_distribution():
    model = make_model(2, window_size=2, lm_head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[START] += 50
    made = draw_pictures(model, (2, 1, 1), np.zeros((3000, 0), dtype=np.uint8), seed=0, batch_size=3000)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[START]])).logits[0, 0, :START]
    seen = np.bincount(made[:, 0, 0, 0], minlength=256) / 3000
    assert np.abs(seen - logits.softmax(-1).numpy()).sum() / 2 < 0.2
    assert (seen > 0).sum() > 200


def test_paint_writes_a_grid(run, inputs, tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, seed in zip(paths, "001", strict=True):
        paint([str(run), "--output", str(path), "--samples", "5", "--batch_size", "2", "--seed", seed])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    with Image.open(paths[0]) as grid:
        assert grid.size == (3 * 6 - GAP, 2 * 6 - GAP)
    paint([str(run), "--output", str(paths[0]), "--pictures", str(inputs / "grey"), "--samples", "2", "--rows", "1"])
    grid, expected = np.asarray(Image.open(paths[0])), make_data(GREY).splits["test"][..., 0]
    assert np.array_equal(grid[:4, -4:], expected[0]) and np.array_equal(grid[6:7, :4], expected[1, :1])


# Faults


PRETRAIN_FAULTS = {
    "tokenizer": ({"tokenizer": "bpe"}, "--tokenizer must be left out with --pictures, got 'bpe'"),
    "carry": ({"carry_state": True}, "--carry_state must be left out with --pictures, got True"),
    "masked": ({"objective": "masked"}, "--objective must be causal with --pictures, got 'masked'"),
    "protocol": ({"eval_protocol": "segments"}, "--eval_protocol must be pictures with --pictures, got 'segments'"),
    "bytes": ({"eval_bytes": 5}, "--eval_bytes must be left out with --pictures, got 5"),
    "prompt": ({"sample_prompt": "A"}, "--sample_prompt must be left out with --pictures, got 'A'"),
    "dataset": ({"dataset": "pydoc"}, "--dataset must be left out with --pictures, got 'pydoc'"),
    "streaming": ({"streaming": True}, "--streaming must be left out with --pictures, got True"),
    "length": (
        {"sequence_length": 8},
        "--sequence_length must be left out, or 16, the sub-pixels of 4 x 4 x 1, got 8",
    ),
    "shift": ({"color_shift": 256}, "--color_shift must be at most 255, got 256"),
    "channels": ({"num_channels": 2}, "--num_channels must be 1 or 3, got 2"),
    "column": ({"image_column": "img"}, "--image_column must be left out with a folder of pictures, got 'img'"),
    "share": ({"test_size": 0.7}, "--test_size must be a share below 0.5, or a whole number of pictures, got 0.7"),
    "vocabulary": ({"model_override": "vocab_size=300"}, "vocab_size must be 257 for --pictures, got 300"),
    "no-pictures": ({"pictures": None}, "--color_shift must be left out without --pictures, got 10"),
}


@pytest.mark.parametrize("changes, message", PRETRAIN_FAULTS.values(), ids=PRETRAIN_FAULTS)
def test_wrong_flags_are_named(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        pretrain(flags(inputs, tmp_path / "run", **changes))
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_a_model_that_is_too_short_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="max_position_embeddings must be 16 or more, .* got 15"):
        pretrain(flags(inputs, tmp_path / "run", model_preset=inputs / "short.json"))


def test_pictures_of_several_sizes_need_one(inputs, tmp_path):
    save_pngs(tmp_path / "data" / "a", make_pictures(2, GREY))
    save_pngs(tmp_path / "data" / "b", make_pictures(2, COLOUR))
    with pytest.raises(ValueError, match="--image_size must be given: .* several sizes, such as 3 x 2 and 4 x 4"):
        pretrain(flags(inputs, tmp_path / "run", pictures=tmp_path / "data"))


EVALUATE_FAULTS = {
    "no-folder": (["--pictures", "tests/nowhere"], "--pictures tests/nowhere: no such folder"),
    "length": (["--length", "8"], "--length must be left out with --pictures, got 8"),
    "protocol": (["--protocol", "segments"], "--protocol must be pictures with --pictures, got 'segments'"),
    "size": (["--image_size", "5"], r"--image_size must be left out, or what the model has, (4, 4), got 5"),
    "none": (["--max_pictures", "0"], "--max_pictures must be at least 1, got 0"),
}


@pytest.mark.parametrize("words, message", EVALUATE_FAULTS.values(), ids=EVALUATE_FAULTS)
def test_evaluate_names_wrong_flags(run, inputs, words, message):
    with pytest.raises(ValueError) as error:
        evaluate([str(run), "--pictures", str(inputs / "grey"), *words])
    assert message in str(error.value)


def test_programs_name_models_of_something_else(run, inputs, tmp_path):
    make_model(16, vocab_size=300).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a causal language model of pictures, with 256 or 257 tokens, got a"):
        evaluate([str(tmp_path / "other"), "--pictures", str(inputs / "grey")])
    with pytest.raises(ValueError, match="must be a model of pictures, with a preprocessor_config.json"):
        paint([str(tmp_path / "other"), "--output", str(tmp_path / "a.png")])
    with pytest.raises(ValueError, match=r"--rows must be in \[1, 3\] for pictures of 4 rows, got 4"):
        paint([str(run), "--output", str(tmp_path / "a.png"), "--pictures", str(inputs / "grey"), "--rows", "4"])


@pytest.mark.parametrize("program", [evaluate, finetune, generate, stream], ids=lambda main: main.__module__)
@pytest.mark.parametrize("vocab_size", [257, 256], ids=["start", "no-start"])
def test_programs_of_text_say_what_a_model_of_pictures_is_for(program, vocab_size, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    make_model(16, vocab_size).save_pretrained(folder)
    (tmp_path / "text").write_text("a text")
    words = {
        evaluate: [str(folder)],
        finetune: [
            "--model",
            str(folder),
            "--text_file",
            str(tmp_path / "text"),
            "--output_dir",
            str(tmp_path / "out"),
        ],
        generate: ["--model", str(folder), "--prompt", "A"],
        stream: [str(folder), str(tmp_path / "text")],
    }
    with pytest.raises(ValueError, match="must be a model of text, got one of pictures: aft paint draws with it"):
        program(words[program])


def test_biases_of_a_model_of_pictures_are_drawn_without_a_text(run, tmp_path):
    files = draw([str(run), "--output_dir", str(tmp_path)])
    assert [path.name for path in files] == ["run-bias-map.png", "run-bias-curve.svg"]
