"""aft classify: data, recipes, models, resumption, averages, and that a pipeline gives what was scored."""

import argparse
import gzip
import io
import json
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import ExifTags, Image
from safetensors.torch import load_file
from test_finetune import leave_no_state  # noqa: F401
from torch.utils.data import BatchSampler
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from aft.augmentation import RAND_AUGMENT, erase, mix, padded_crop, rand_augment, random_crop_box, smooth_targets
from aft.classifying_flags import add_recipe
from aft.classifying_trainer import TRAINED
from aft.commands.classify import main
from aft.image_data import ArrayPictures, FilePictures, TablePictures, in_memory, read_images
from aft.image_training import PictureCollator, RepeatedSampler, TrainingPictures, kept_share, make_processor
from modeling_aft import AFTForImageClassification, AFTVisionConfig


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CLASSES = ("columns", "flat", "rows")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "kernel_size": 3, "patch_size": 4}
TINY = ["--model_override", *(f"{name}={value}" for name, value in SMALL.items())]


def draw(label: int, seed: int, shape=(12, 12, 3)) -> np.ndarray:
    """Bright columns, everything, or rows, on dark noise."""
    pixels = np.random.default_rng((label, seed)).integers(0, 60, shape).astype(np.uint8)
    bright = (pixels[:, ::2], pixels, pixels[::2])[label]
    bright += 150
    return pixels


def save_tree(folder: Path, count: int, shape=(12, 12, 3), first: int = 0) -> Path:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for seed in range(first, first + count):
            Image.fromarray(draw(label, seed, shape)).save(folder / name / f"{seed}.png")
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def save_idx(folder: Path, suffix: str = ".gz", num_train: int = 30) -> Path:
    folder.mkdir()
    for part, count in (("train", num_train), ("t10k", 6)):
        labels = np.arange(count) % 3
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        pictures = np.stack([draw(label, number, (12, 12)) for number, label in enumerate(labels)])
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", pictures)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folders of pictures to train on and to test."""
    folder = tmp_path_factory.mktemp("pictures")
    save_tree(folder / "train", 16)
    save_tree(folder / "test", 4, first=100)
    return folder


def classify(output_dir: Path, *extra: str, **values) -> dict:
    """A short run on the CPU; `values` are further flags."""
    values = {
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        **values,
    }
    flags = [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]
    return main([*flags, *extra])


def inputs(**values) -> argparse.Namespace:
    """The flags that data and recipes read."""
    defaults = {
        **dict.fromkeys(["data_config", "image_column", "label_column", "validation_split", "test_split"]),
        **{"class_names": [], "train_split": "train"},
        **{"random_crop": "none", "crop_padding": None, "crop_scale": 0.5, "horizontal_flip": False},
        **{"color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
        **{"rand_augment": None, "repeated_augmentation": 1},
    }
    return argparse.Namespace(**{**defaults, **{name: str(v) if name == "data" else v for name, v in values.items()}})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# A run


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, classify(folder, *TINY, data=pictures, num_train_epochs=30, crop_padding=1)


def test_a_model_learns_and_is_scored(finished, pictures):
    folder, metrics = finished
    assert metrics["eval_accuracy"] > 0.7 and metrics["test_accuracy"] > 0.8
    assert json.loads((folder / "all_results.json").read_text()) == metrics
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is AFTForImageClassification
    assert list(model.config.id2label.values()) == list(CLASSES) and model.config.image_size == 12


def test_a_pipeline_gives_what_was_scored(finished, pictures):
    """Of the picture's file, and so the accuracy of the test part as well."""
    folder, metrics = finished
    classifier = pipeline("image-classification", model=str(folder))
    paths = sorted((pictures / "test").rglob("*.png"))
    found = classifier([str(path) for path in paths], top_k=3)
    right = [answers[0]["label"] == path.parent.name for answers, path in zip(found, paths, strict=True)]
    assert np.mean(right) == pytest.approx(metrics["test_accuracy"])
    scores = {answer["label"]: answer["score"] for answer in found[0]}
    losses = [
        -np.log(next(answer["score"] for answer in answers if answer["label"] == path.parent.name))
        for answers, path in zip(found, paths, strict=True)
    ]
    assert sum(scores.values()) == pytest.approx(1)
    assert np.mean(losses) == pytest.approx(metrics["test_loss"], rel=1e-4)


def test_the_image_processor_has_every_field(finished, pictures):
    saved = json.loads((finished[0] / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DeiTImageProcessor"
    assert saved["size"] == {"shortest_edge": 12} and saved["crop_size"] == {"height": 12, "width": 12}
    assert saved["resample"] == 3 and saved["rescale_factor"] == pytest.approx(1 / 255)
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        assert saved[name] is True
    assert len(saved["image_mean"]) == len(saved["image_std"]) == 3
    held_in = np.random.default_rng(0).permutation(48)[4:]
    pixels = read_images(inputs(data=pictures)).parts["train"].array[held_in] / 255
    assert saved["image_mean"] == pytest.approx(pixels.mean((0, 1, 2)))
    assert saved["image_std"] == pytest.approx(pixels.std((0, 1, 2)))


def test_a_saved_model_goes_on(finished, pictures, tmp_path, capsys):
    metrics = classify(tmp_path / "run", model=finished[0], data=pictures, num_train_epochs=0)
    assert metrics["test_loss"] == pytest.approx(finished[1]["test_loss"], rel=1e-5)
    assert "new head" not in capsys.readouterr().out


def test_other_labels_get_a_new_head(finished, tmp_path, capsys):
    other = save_tree(tmp_path / "other", 6)
    for name in CLASSES[:2]:
        (other / name).rename(other / f"new-{name}")
    classify(tmp_path / "run", model=finished[0], data=other, num_train_epochs=1, learning_rate=0.0)
    assert "a new head for 3" in capsys.readouterr().out
    before, after = weights(finished[0]), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) == ("classifier" not in name) for name in before)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert list(model.config.id2label.values()) == ["new-columns", "new-flat", "rows"]


@pytest.mark.parametrize("ema_decay", [0.9, None], ids=["average", "plain"])
def test_a_resumed_run_is_the_same(pictures, tmp_path, ema_decay):
    """In the middle of an epoch, with all that is random, and with another number of workers."""
    values = {"data": pictures, "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "color_jitter": 0.2}
    values |= {"recipe": "none", "ema_decay": ema_decay, "random_crop": "resized", "save_strategy": "steps"}
    values |= {"rand_augment": 9, "repeated_augmentation": 3 if ema_decay else 1}
    values |= {"eval_strategy": "steps", "save_steps": 4, "eval_steps": 4, "max_steps": 12}
    values |= {"save_total_limit": 9, "load_best_model_at_end": False}
    override = [*TINY, "drop_path_rate=0.2", "num_hidden_layers=2"]
    override.remove("num_hidden_layers=1")
    whole = classify(tmp_path / "whole", *override, **values)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole/checkpoint-8").rename(tmp_path / "part/checkpoint-8")
    again = classify(tmp_path / "part", *override, **values, resume_from_checkpoint="auto", dataloader_num_workers=1)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    assert again["test_loss"] == whole["test_loss"]
    with pytest.raises(ValueError, match="cannot resume: mixup is 0.5 but was 0.8"):
        classify(tmp_path / "part", *override, **values | {"mixup": 0.5}, resume_from_checkpoint="auto")


def test_the_average_is_scored_and_saved(pictures, tmp_path):
    """That of a checkpoint is its model; training goes on with the other weights."""
    values = {"data": pictures, "recipe": "none", "num_train_epochs": 1, "save_steps": 1, "save_strategy": "steps"}
    values |= {"save_total_limit": 9, "load_best_model_at_end": False, "eval_strategy": "no"}
    classify(tmp_path / "run", *TINY, **values, ema_decay=0.5)
    folders = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    trained = [load_file(folder / TRAINED) for folder in folders]
    first = weights(folders[0])
    for number, (folder, after) in enumerate(zip(folders[1:], trained[1:], strict=True), start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        first = {name: decay * first[name] + (1 - decay) * after[name] for name in first}
        for name, value in weights(folder).items():
            torch.testing.assert_close(value, first[name])
    assert_same(weights(tmp_path / "run"), weights(folders[-1]))
    classify(tmp_path / "plain", *TINY, **values)
    assert_same(weights(tmp_path / "plain"), trained[-1])


def test_biases_and_positions_do_not_decay(pictures, tmp_path, monkeypatch):
    from aft.classifying_trainer import ClassifyingTrainer

    found = []
    original = ClassifyingTrainer.get_decay_parameter_names
    monkeypatch.setattr(
        ClassifyingTrainer,
        "get_decay_parameter_names",
        lambda self, model: found.append(original(self, model)) or found[-1],
    )
    classify(tmp_path / "run", *TINY, data=pictures, recipe="none", max_steps=1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    matrices = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    assert {name for name in matrices if "position_bias" in name} == matrices - set(found[0])
    assert set(found[0]) < matrices


# Sizes


def pipeline_loss(folder: Path, pictures: Path) -> float:
    """The mean loss on the pictures of a folder, as a pipeline scores their files."""
    paths = sorted(pictures.rglob("*.png"))
    classifier = pipeline("image-classification", model=str(folder))
    scores = [{answer["label"]: answer["score"] for answer in classifier(str(path), top_k=3)} for path in paths]
    return np.mean([-np.log(found[path.parent.name]) for found, path in zip(scores, paths, strict=True)])


@pytest.mark.parametrize("asked", [(), ("--image_size", "8", "12")], ids=["as-they-are", "made-smaller"])
def test_pictures_need_not_be_square(asked, tmp_path):
    save_tree(tmp_path / "data/train", 4, (12, 16, 3))
    save_tree(tmp_path / "data/test", 2, (12, 16, 3), first=100)
    changes = {"random_crop": "resized" if asked else "padded", "horizontal_flip": True, "rand_augment": 9}
    metrics = classify(tmp_path / "run", *TINY, *asked, data=tmp_path / "data", max_steps=2, **changes)
    size = [8, 12] if asked else [12, 16]
    assert AFTVisionConfig.from_pretrained(tmp_path / "run").image_size == size
    saved = json.loads((tmp_path / "run/preprocessor_config.json").read_text())
    assert saved["size"] == saved["crop_size"] == dict(zip(("height", "width"), size, strict=True))
    assert pipeline_loss(tmp_path / "run", tmp_path / "data/test") == pytest.approx(metrics["test_loss"], rel=1e-4)
    again = classify(tmp_path / "again", model=tmp_path / "run", data=tmp_path / "data", num_train_epochs=0)
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize("model_type", ["aft_vision", "vit"])
def test_patches_must_divide_pictures_that_are_not_square(model_type, tmp_path):
    save_tree(tmp_path / "data", 4, (10, 12, 3))
    fields = {"model_type": model_type, "patch_size": 4}
    fields |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    wanted = (
        r"--image_size must be given for pictures of 10 x 12: .*image_size\W+must be a multiple of patch_size \(4\)"
    )
    with pytest.raises(ValueError, match=wanted):
        classify(tmp_path / "run", model=tmp_path / "model.json", data=tmp_path / "data")


def save_classifier(folder: Path, kind: str, size: int = 12) -> torch.nn.Module:
    """A classifier of each kind with random weights, and its image processor."""
    torch.manual_seed(0)
    sizes = {"image_size": size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4}
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, **labels))
    elif kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels)
        model = ResNetForImageClassification(config)
    else:
        config = AFTVisionConfig(aft_type=kind, kernel_size=3, window_size=3, position_bias_rank=None, **sizes)
        config.id2label, config.label2id = labels.values()
        model = AFTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # so that scores depend on the pictures
    model.eval().save_pretrained(folder)
    make_processor(size, 1.0, 3, {"image_mean": [0.3] * 3, "image_std": [0.2] * 3}).save_pretrained(folder)
    return model


SCORED = {
    "conv-up": ("conv", (16, 16), {}),
    "conv-down": ("conv", (8, 8), {}),
    "resnet": ("resnet", (15, 15), {}),
    "full": ("full", (8, 16), {"interpolate_pos_encoding": True}),
    "vit": ("vit", (16, 16), {"interpolate_pos_encoding": True}),
}


@pytest.mark.parametrize("name", SCORED)
def test_a_saved_model_is_scored_at_other_sizes(name, pictures, tmp_path, capsys):
    """On the whole picture, resized, as at its own size."""
    kind, (height, width), options = SCORED[name]
    model = save_classifier(tmp_path / "model", kind)
    size = ["--image_size", str(height), str(width)]
    metrics = classify(tmp_path / "run", *size, model=tmp_path / "model", data=pictures, num_train_epochs=0)
    paths = sorted((pictures / "test").rglob("*.png"))
    made = [Image.open(path).resize((width, height), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.float32(np.stack(made)).transpose(0, 3, 1, 2) / 255 - 0.3) / 0.2
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    with torch.no_grad():
        logits = model(pixel_values=pixels, **options).logits
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["test_loss"] == pytest.approx(expected, rel=1e-4)
    said = f"its tables, for 12 x 12 pixels, are interpolated for {height} x {width}"
    assert (said in capsys.readouterr().out) == bool(options)


def test_sizes_that_a_saved_model_does_not_take_are_told(pictures, tmp_path):
    for kind, size, epochs, message in (
        ("conv", 14, 0, r"image_size must be a multiple of patch_size \(4\), got 14"),
        ("vit", 14, 0, r"image_size must be a multiple of patch_size \(4\), got 14"),
        ("local", 16, 0, r"can be scored at, got 16 x 16: .*must be False for aft_type='local'"),
        ("full", 16, 1, r"can be trained at, got 16 x 16: .*must be images of 12 x 12"),
    ):
        save_classifier(tmp_path / kind, kind)
        with pytest.raises(ValueError, match=message):
            values = {"model": tmp_path / kind, "image_size": size, "num_train_epochs": epochs}
            classify(tmp_path / "run", data=pictures, **values)
    assert not (tmp_path / "run").exists()


def test_another_size_keeps_the_share_of_a_saved_image_processor():
    for size, ratio in ((28, 1.0), (224, 0.875), ((24, 32), 1.0), ((224, 448), 0.875)):
        processor = make_processor(size, ratio, 3, {"image_mean": [0.3] * 3, "image_std": [0.2] * 3})
        assert kept_share(processor) == ratio
    assert kept_share(ViTImageProcessorPil()) == 1.0  # which makes a square of all of a picture


# Models of others


def test_a_configuration_of_a_vit_and_one_channel(pictures, tmp_path):
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "patch_size": 4, "num_channels": 1}
    (tmp_path / "vit.json").write_text(json.dumps(config))
    metrics = classify(
        tmp_path / "run", model=tmp_path / "vit.json", data=pictures, mixup=0.8, num_train_epochs=1, ema_decay=0.9
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert type(model) is ViTForImageClassification and model.config.image_size == 12
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert len(processor.image_mean) == 1 and not processor.do_convert_rgb
    right = []
    for path in (pictures / "test").rglob("*.png"):
        with torch.no_grad():
            logits = model(**processor(Image.open(path).convert("L"), return_tensors="pt")).logits
        right.append(model.config.id2label[int(logits.argmax())] == path.parent.name)
    assert np.mean(right) == pytest.approx(metrics["test_accuracy"])


@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "distilled"])
def test_a_vit_becomes_an_aft_and_is_trained(distilled, pictures, tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 16, "patch_size": 4, "num_labels": 5}
    model = (
        DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))
        if distilled
        else ViTForImageClassification(ViTConfig(**sizes))
    )
    model.save_pretrained(tmp_path / "vit")
    processor = make_processor(16, 0.875, 3, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    processor.save_pretrained(tmp_path / "vit")
    convert = runpy.run_path(str(SCRIPTS / "convert_vit.py"))["main"]
    convert(
        [str(tmp_path / "vit"), str(tmp_path / "aft"), "--model_override", "kernel_size=3", "num_attention_heads=4"]
    )
    assert "cls_token" in capsys.readouterr().out
    assert AutoImageProcessor.from_pretrained(tmp_path / "aft").to_dict() == processor.to_dict()
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "aft")
    assert torch.equal(made.model.norm.weight, model.base_model.layernorm.weight)
    assert (made.config.kernel_size, made.config.num_attention_heads) == (3, 4)
    classify(tmp_path / "run", model=tmp_path / "aft", data=pictures, num_train_epochs=1)
    assert (tmp_path / "run/preprocessor_config.json").read_text() == (
        tmp_path / "aft/preprocessor_config.json"
    ).read_text()
    with pytest.raises(ValueError, match="output_dir must be a new or an empty folder"):
        convert([str(tmp_path / "vit"), str(tmp_path / "aft")])
    with pytest.raises(ValueError, match="--model_override 'kernel=3': must be key=value with a field of AFTVision"):
        convert([str(tmp_path / "vit"), str(tmp_path / "other"), "--model_override", "kernel=3"])
    assert not (tmp_path / "other").exists()


# Data


def test_folders_are_read(pictures, tmp_path):
    data = read_images(inputs(data=pictures))
    assert data.names == list(CLASSES) and set(data.parts) == {"train", "test"}
    assert isinstance(data.parts["train"], ArrayPictures) and data.parts["train"].array.shape == (48, 12, 12, 3)
    flat = read_images(inputs(data=pictures / "train"))
    assert flat.parts["train"].sha256() == data.parts["train"].sha256()
    Image.fromarray(draw(0, 1, (20, 30, 3))).save(tmp_path / "one.jpg")
    for name in CLASSES:
        (tmp_path / "mixed" / name).mkdir(parents=True)
        for number, size in enumerate(((20, 30), (30, 20))):
            Image.new("RGB", size).save(tmp_path / "mixed" / name / f"{number}.jpg")
    mixed = read_images(inputs(data=tmp_path / "mixed")).parts["train"]
    assert len(mixed) == 6 and mixed.decode(1).size == (30, 20)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_the_files_of_mnist_are_read(suffix, tmp_path):
    folder = save_idx(tmp_path / "mnist", suffix)
    data = read_images(inputs(data=folder, class_names=["a", "b", "c"]))
    assert data.names == ["a", "b", "c"]
    assert (data.parts["train"].array[4] == draw(1, 4, (12, 12))).all()
    assert data.parts["test"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    classify(tmp_path / "run", *TINY, data=folder, max_steps=1)
    classifier = pipeline("image-classification", model=str(tmp_path / "run"))
    Image.fromarray(draw(1, 4, (12, 12))).save(tmp_path / "grey.png")
    assert len(classifier(str(tmp_path / "grey.png"))) == 3


@pytest.mark.parametrize("kind", ["classes", "strings", "saved"])
def test_data_sets_are_read(kind, tmp_path):
    rows = [(draw(label, seed), label) for seed in range(4) for label in range(3)]
    features = {"picture": datasets.Image()}
    features["kind"] = datasets.Value("string") if kind == "strings" else datasets.ClassLabel(names=[*CLASSES])
    values = [CLASSES[label] if kind == "strings" else label for _, label in rows]
    table = datasets.Dataset.from_dict(
        {"picture": [Image.fromarray(pixels) for pixels, _ in rows], "kind": values},
        features=datasets.Features(features),
    )
    folder = tmp_path / "table"
    if kind == "saved":
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder)
    else:
        folder.mkdir()
        table.to_parquet(folder / "train.parquet")
    column = {"label_column": "kind"} if kind == "strings" else {}
    data = read_images(inputs(data=folder, **column))
    assert data.names == list(CLASSES) and ("test" in data.parts) == (kind == "saved")
    assert (data.parts["train"].array[5] == rows[5][0]).all()
    assert data.parts["train"].labels.tolist() == [label for _, label in rows]
    if kind == "strings":
        with pytest.raises(ValueError, match="no column 'label' of labels, .*; --label_column says which to take"):
            read_images(inputs(data=folder))


def test_a_look_at_the_head_of_a_row_does_not_decode_it():
    buffer = io.BytesIO()
    Image.fromarray(draw(0, 0, (30, 40, 3))).save(buffer, "png")
    rows = {"image": [{"bytes": buffer.getvalue()[:-100], "path": None}]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    found = TablePictures(table, "image", [0], "table")
    assert found.size(0) == (40, 30)
    with pytest.raises(ValueError, match="table, row 0: no whole picture"):
        found.decode(0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "late.png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_before_its_size_is_compared(suffix, orientation, tmp_path):
    """As `ImageOps.exif_transpose` turns it; of a late.png, the orientation stands behind the pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    paths = [tmp_path / f"turned.{suffix}", tmp_path / "plain.png"]
    for path, options in zip(paths, ({"exif": exif, "quality": 100}, {}), strict=True):
        Image.fromarray(draw(0, seed=0, shape=(6, 4, 3))).save(path, **options)
    if suffix == "late.png":
        content = paths[0].read_bytes()
        start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
        paths[0].write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    pictures, turns = FilePictures(paths, [0, 1]), orientation in (6, 8)
    decoded = [pictures.decode(index).size for index in range(2)]
    assert decoded == [(6, 4) if turns else (4, 6), (4, 6)]
    assert suffix == "late.png" or [pictures.size(index) for index in range(2)] == decoded
    assert (in_memory(pictures) is pictures) == turns
    assert in_memory(FilePictures(paths[:1], [0])).array.shape[1:3] == decoded[0][::-1]


# Recipes


def test_targets_are_mixed_as_the_formulas_say():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    targets = smooth_targets(labels, 3, 0.1)
    assert targets[0].tolist() == pytest.approx([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    mixed, soft = mix(images, targets, 0.8, 0.0, np.random.default_rng(0))
    kept = np.random.default_rng(0).beta(0.8, 0.8)
    torch.testing.assert_close(mixed, kept * images + (1 - kept) * images.flip(0))
    torch.testing.assert_close(soft, kept * targets + (1 - kept) * targets.flip(0))
    for seed in range(20):
        mixed, soft = mix(images, targets, 0.0, 1.0, np.random.default_rng(seed))
        own = (mixed == images).all(1).double().mean((1, 2))
        assert (((mixed == images) | (mixed == images.flip(0))).all()).item()
        expected = own[:, None] * targets + (1 - own[:, None]) * targets.flip(0)
        torch.testing.assert_close(soft.double(), expected.double())
    assert mix(images, targets, 0.0, 0.0, np.random.default_rng(0))[0] is images


def test_crops_and_erasing_keep_to_their_bounds():
    pixels = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5) + 1
    padded = np.pad(pixels, 2)
    for seed in range(30):
        generator = np.random.default_rng(seed)
        top, left = np.random.default_rng(seed).integers(5, size=2)
        cropped = padded_crop(Image.fromarray(pixels), 2, generator)
        assert (np.asarray(cropped) == padded[top : top + 6, left : left + 5]).all()
        left, top, right, bottom = random_crop_box(40, 30, 0.25, generator)
        assert 0 <= left < right <= 40 and 0 <= top < bottom <= 30
        assert 0.24 * 1200 - 40 <= (right - left) * (bottom - top) <= 1200
        left, top, right, bottom = random_crop_box(400, 200, 0.25, generator, shape=2.0)
        assert 1.48 < (right - left) / (bottom - top) < 2.7
        values = np.zeros((3, 16, 16), np.float32)
        erased = erase(values, generator)
        rows, columns = np.nonzero(erased[0])
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert (erased != 0).all(0).sum() == area and area < 0.45 * 256
        assert not values.any()


# What RandAugment makes of grey values, each in 51 rows, at level -1, 0 and 1, by hand; None is what they are.
GREY = [0, 40, 100, 127, 128, 250]
BY_HAND = {
    "auto_contrast": ([0, 40, 102, 129, 130, 255], [0, 40, 102, 129, 130, 255], [0, 40, 102, 129, 130, 255]),
    "equalize": ([0, 51, 102, 153, 204, 255],) * 3,
    "invert": ([255, 215, 155, 128, 127, 5],) * 3,
    "posterize": ([0, 0, 0, 0, 128, 128], [0, 32, 96, 112, 128, 240], [0, 0, 0, 0, 128, 128]),
    "solarize": ([255, 215, 155, 128, 127, 5], None, [255, 215, 155, 128, 127, 5]),
    "solarize_add": ([110, 150, 210, 237, 128, 250], None, [110, 150, 210, 237, 128, 250]),
    "color": (None, None, None),
    "brightness": ([0, 4, 10, 12, 12, 25], None, [0, 76, 190, 241, 243, 255]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_colours_change_as_by_hand(name):
    picture = Image.fromarray(np.uint8([GREY] * 51))
    for mode in ("L", "RGB"):
        for level, expected in zip((-1.0, 0.0, 1.0), BY_HAND[name], strict=True):
            found = np.asarray(RAND_AUGMENT[name](picture.convert(mode), level, 7)).reshape(51, 6, -1)
            assert (found == np.reshape(expected or GREY, (6, 1))).all(), (mode, level, found[0, :, 0])


def test_colours_of_a_picture_change_as_by_hand():
    """Away from, or beyond, its grey, its mean and its blurred self, by nine tenths of the distance."""
    pixels = np.uint8([[[90, 120, 30], [100, 100, 100], [150, 110, 70]]] * 3)
    grey = np.floor(pixels @ [0.299, 0.587, 0.114] + 0.5)[..., None]
    mean = np.floor(grey.mean() + 0.5)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    blurred = pixels.astype(float)
    blurred[1, 1] = (pixels * kernel[..., None]).sum((0, 1))  # PIL leaves the border as it is
    for name, other in (("color", grey), ("contrast", mean), ("sharpness", blurred)):
        for level in (-1.0, -0.5, 0.0, 0.5, 1.0):
            found = np.asarray(RAND_AUGMENT[name](Image.fromarray(pixels), level, (0, 0, 0)))
            expected = np.clip(other + (1 + 0.9 * level) * (pixels - other), 0, 255)
            np.testing.assert_allclose(found, expected, atol=1.01, err_msg=f"{name} {level}")
        assert (np.asarray(RAND_AUGMENT[name](Image.fromarray(pixels), 0.0, (0, 0, 0))) == pixels).all()


@pytest.mark.parametrize("axis", ["x", "y"])
def test_places_change_as_by_hand(axis):
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10) + 100

    def made(name: str, level: float) -> np.ndarray:
        """With the axis that moves last."""
        picture = Image.fromarray(pixels if axis == "x" else pixels.T)
        found = np.asarray(RAND_AUGMENT[f"{name}_{axis}"](picture, level, 7))
        return found if axis == "x" else found.T

    # Nine tenths of the ten pixels that level 1 moves by 4.5 are four, of which there is no part.
    right, left = made("translate", -8 / 9), made("translate", 8 / 9)
    assert (right[:, 4:] == pixels[:, :6]).all() and (right[:, :4] == 7).all()
    assert (left[:, :6] == pixels[:, 4:]).all() and (left[:, 6:] == 7).all()
    sheared = made("shear", 1.0)  # row y, whose middle is at y + 1/2, comes from 0.3 (y + 1/2) further on
    assert (sheared[9, 8:] == 7).all() and (sheared[0, :9] == pixels[0, :9]).all()
    assert sheared[5, 2] == pytest.approx(pixels[5, 2] + 0.3 * 5.5, abs=1)
    assert all((made(name, 0.0) == pixels).all() for name in ("translate", "shear"))


def test_rotation_is_by_up_to_thirty_degrees():
    pixels = np.zeros((31, 31), np.uint8)
    pixels[15, 16:] = 200  # a line from the centre to the right
    for level, degrees in ((1.0, 30), (-1.0, -30), (0.5, 15)):
        turned = np.asarray(RAND_AUGMENT["rotate"](Image.fromarray(pixels), level, 7)).astype(float)
        y, x = 15 - 12 * np.sin(np.radians(degrees)), 15 + 12 * np.cos(np.radians(degrees))
        assert turned[round(y), round(x)] > 100 and turned[15, 28] < 50 and turned[0, 0] == 7
    assert (np.asarray(RAND_AUGMENT["rotate"](Image.fromarray(pixels), 0.0, 7)) == pixels).all()


def test_rand_augment_makes_two_changes_each_half_of_the_time(monkeypatch):
    calls = []
    for name in RAND_AUGMENT:
        change = lambda picture, level, fill, name=name: calls.append((name, level, fill)) or picture  # noqa: E731
        monkeypatch.setitem(RAND_AUGMENT, name, change)
    counts = []
    for seed in range(2000):
        before = len(calls)
        rand_augment(None, 9, 7, np.random.default_rng(seed))
        counts.append(len(calls) - before)
    assert np.bincount(counts) / 2000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    names, levels, fills = zip(*calls, strict=True)
    assert set(names) == set(RAND_AUGMENT) and set(fills) == {7}
    assert max(names.count(name) for name in set(names)) < 2 * 2000 / len(RAND_AUGMENT)
    assert np.mean(np.sign(levels)) == pytest.approx(0, abs=0.1)
    assert np.mean(np.abs(levels)) == pytest.approx(0.9, abs=0.01) and np.max(np.abs(levels)) <= 1
    assert np.std(np.abs(levels)) == pytest.approx(0.05, abs=0.01)


def pictures_of(recipe: argparse.Namespace, count: int = 6, seed: int = 0) -> TrainingPictures:
    array = np.stack([draw(number % 3, number) for number in range(count)])
    processor = make_processor(12, 1.0, 3, {"image_mean": [0.3] * 3, "image_std": [0.2] * 3})
    return TrainingPictures(ArrayPictures(array, [0] * count), np.arange(count), processor, 3, recipe, seed)


def test_repeated_pictures_stand_in_a_row_and_differ():
    pictures = pictures_of(inputs(rand_augment=9, horizontal_flip=True, random_crop="padded"), 10)
    sampler = RepeatedSampler(pictures, 3, seed=5)
    orders = []
    for epoch in (1, 2):
        pictures.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == list(sampler) and len(orders[-1]) == len(sampler) == 10
        assert [place // 10 for place in orders[-1]] == [0, 1, 2] * 3 + [0]
        seen = [place % 10 for place in orders[-1]]
        assert seen == [number for number in dict.fromkeys(seen) for _ in range(3)][:10] and len(set(seen)) == 4
    assert orders[0] != orders[1]
    rows = [pictures[place] for place in orders[1][:3]]
    assert len({row["number"] for row in rows}) == 1
    assert len({row["pixel_values"].tobytes() for row in rows}) == 3


def test_processes_share_the_order_of_repeated_pictures():
    batches = BatchSampler(RepeatedSampler(pictures_of(inputs(), 8), 3, seed=5), 2, drop_last=False)
    parts = [list(BatchSamplerShard(batches, num_processes=2, process_index=index)) for index in range(2)]
    assert [batch for both in zip(*parts, strict=True) for batch in both] == list(batches)


def test_a_picture_is_a_function_of_seed_epoch_and_number():
    recipe = inputs(random_crop="auto", horizontal_flip=True, random_erasing=0.5, color_jitter=0.3, cutmix=1.0)
    recipe.rand_augment = 9

    def rows(seed: int, epoch: int, order) -> list[dict]:
        found = pictures_of(recipe, seed=seed)
        found.set_epoch(epoch)
        return [found[index] for index in order]

    first, again = rows(0, 1, range(6)), rows(0, 1, reversed(range(6)))[::-1]
    assert all((a["pixel_values"] == b["pixel_values"]).all() for a, b in zip(first, again, strict=True))
    for seed, epoch in ((0, 2), (1, 1)):
        other = rows(seed, epoch, range(6))
        assert any((a["pixel_values"] != b["pixel_values"]).any() for a, b in zip(first, other, strict=True))
    collator = PictureCollator(recipe, 0.1, 3, 0)
    batches = [collator(found) for found in (first, again)]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert batches[0]["labels"].sum(1).tolist() == pytest.approx([1] * 6)


def test_nothing_is_changed_without_a_recipe():
    plain = pictures_of(inputs())
    expected = (draw(1, 1).transpose(2, 0, 1) / 255 - 0.3) / 0.2
    np.testing.assert_allclose(plain[1]["pixel_values"], expected, rtol=1e-5, atol=1e-6)
    scored = super(TrainingPictures, plain).__getitem__(1)["pixel_values"]
    np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-6)


def test_an_explicit_flag_wins_over_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mixup: 0.5\nnum_train_epochs: 7\n")
    assert add_recipe(["--recipe", str(path), "--mixup", "0.1"])[:2] == ["--mixup=0.5", "--num_train_epochs=7"]
    assert add_recipe(["--recipe", "none"]) == ["--recipe", "none"]
    assert "--num_train_epochs=300" in add_recipe(["--recipe", "deit"])
    path.write_text("mixop: 0.5\n")
    with pytest.raises(ValueError, match="unknown key 'mixop'; did you mean mixup?"):
        add_recipe(["--recipe", str(path)])
    path.write_text("mixup: [1]\n")
    with pytest.raises(ValueError, match="mixup must be one value"):
        add_recipe(["--recipe", str(path)])


# Mistakes


WRONG = {
    "range": ({"mixup": -1, "crop_scale": 0}, "--crop_scale must be in (0, 1], got 0.0; --mixup must be at least 0"),
    "crop": ({"random_crop": "centre"}, "--random_crop must be one of none, auto, padded, resized, got 'centre'"),
    "augment": (
        {"rand_augment": 11, "repeated_augmentation": 0},
        "--rand_augment must be in [0, 10], got 11.0; --repeated_augmentation must be at least 1, got 0",
    ),
    "order": (
        {"repeated_augmentation": 3, "train_sampling_strategy": "sequential"},
        "--train_sampling_strategy must be random with --repeated_augmentation 3, got 'sequential'",
    ),
    "metric": ({"metric_for_best_model": "f1"}, "--metric_for_best_model must be one of loss, accuracy, macro_f1"),
    "columns": ({"remove_unused_columns": True}, "--remove_unused_columns must be false"),
    "names": ({"class_names": "a"}, "--class_names must be 3 names"),
    "preset": ({"model": "aft-conv-tiny-11-31"}, "did you mean aft-conv-tiny-11-32?"),
    "recipe": ({"recipe": "diet"}, "--recipe diet: no such file or preset; did you mean deit?"),
    "size": ({"image_size": 30}, "image_size"),
    "no-size": ({"image_size": 0}, "--image_size must be one number of pixels or two, height and width, at least 1"),
    "share": ({"validation_share": 0.001}, "--validation_share 0.001 of 48 rows is not a single one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flag_is_told(name, pictures, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        classify(tmp_path / "run", *TINY, data=pictures, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_wrong_models_are_told(pictures, tmp_path):
    for values, message in (
        ({"model_type": "aft"}, "model_type must be one that has a AutoModelForImageClassification, got 'aft'"),
        ({}, "must be a JSON object with a model_type"),
        ({"model_type": "aft_vision", "num_channels": 2}, "num_channels must be 1 or 3, got 2"),
    ):
        (tmp_path / "model.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            classify(tmp_path / "run", data=pictures, model=tmp_path / "model.json", image_size=32)
    with pytest.raises(ValueError, match="--model_override num_labels: must be left out"):
        classify(tmp_path / "run", "--model_override", "num_labels=4", data=pictures)
    assert not (tmp_path / "run").exists()


def test_wrong_data_are_told(pictures, tmp_path):
    folder = save_tree(tmp_path / "data" / "train", 3)
    (tmp_path / "data/test/colums").mkdir(parents=True)
    Image.new("RGB", (12, 12)).save(tmp_path / "data/test/colums/1.png")
    with pytest.raises(
        ValueError, match="the class colums of test is not among those of train; did you mean columns?"
    ):
        read_images(inputs(data=tmp_path / "data"))
    whole = (folder / "columns/1.png").read_bytes()
    for damaged in (b"no picture", whole[: len(whole) // 2]):
        (folder / "columns/1.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"columns/1.png: no (whole )?picture"):
            read_images(inputs(data=folder))
    with pytest.raises(ValueError, match="must have at least 2 labels"):
        (tmp_path / "one/only").mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(tmp_path / "one/only/1.png")
        read_images(inputs(data=tmp_path / "one"))
    with pytest.raises(ValueError, match="no pictures in folders of classes, no IDX files, and no data set"):
        (tmp_path / "empty").mkdir()
        read_images(inputs(data=tmp_path / "empty"))
    idx = save_idx(tmp_path / "idx", "")
    path = idx / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: must be a whole IDX file of bytes with 3 axes"):
        read_images(inputs(data=idx))
    path.unlink()
    with pytest.raises(ValueError, match="no file of train images beside"):
        read_images(inputs(data=idx))
    with pytest.raises(ValueError, match=f"--data {pictures}x: no such folder; did you mean"):
        classify(tmp_path / "run", data=f"{pictures}x")


def test_the_processor_makes_squares_of_pictures_of_several_sizes(tmp_path):
    for label, name in enumerate(CLASSES):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = draw(label, number, (12 + number, 12 + 2 * number, 3))
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    metrics = classify(
        tmp_path / "run", *TINY, data=tmp_path / "data", image_size=8, validation_share=0.3, max_steps=2
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    config = AFTVisionConfig.from_pretrained(tmp_path / "run")
    assert config.image_size == 8
    saved = json.loads((tmp_path / "run/preprocessor_config.json").read_text())
    assert saved["crop_size"] == {"height": 8, "width": 8}
