# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Training of classifiers of pictures with `transformers.Trainer`: what `aft classify` does."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedConfig, set_seed

# Where it is in every version: 5.17 has a placeholder at the top that demands torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.classifying_flags import (
    PRESETS,
    SMALL,
    ClassifyingDefaults,
    PictureArguments,
    RecipeArguments,
    as_size,
    both_sides,
    picture_problems,
    read_flags,
)
from aft.classifying_trainer import ClassifyingTrainer
from aft.console import one_line, program
from aft.finetuning_arguments import FinetuningArguments, parse_dataclasses, training_problems
from aft.finetuning_flags import is_preset, read_preset
from aft.finetuning_run import (
    Task,
    accuracy_of_classes,
    identify_model,
    pipeline_command,
    prepare,
    report,
    split_rows,
    train_and_evaluate,
)
from aft.folder_lock import locked
from aft.image_data import MOST_PIXELS, ArrayPictures, ImageData, read_images
from aft.image_training import (
    IMAGENET,
    MODES,
    PictureCollator,
    ScoredPictures,
    TrainingPictures,
    kept_share,
    make_processor,
    measure,
)
from aft.model_configs import override
from aft.saved_models import load, load_config, load_model


METRICS = ("loss", "accuracy", "macro_f1")
FOR_SMALL, FOR_LARGE = "aft-conv-mini-5-24", "aft-conv-tiny-11-32"  # the models where none is named


@dataclass
class ClassifyingArguments(ClassifyingDefaults, FinetuningArguments):
    pass


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, ClassifyingArguments]:
    """
    All flags, checked as far as that goes without loading anything; `argv` has those of the recipe.

    Raises:
        ValueError: a flag is unknown or of the wrong type, or one error that lists every value that is not allowed.
    """
    *_, args = parse_dataclasses("classify", argv, PictureArguments, RecipeArguments, ClassifyingArguments)
    inputs = read_flags(argv)
    problems = picture_problems(inputs) + training_problems(inputs, args, METRICS)
    if args.remove_unused_columns:
        problems.append("--remove_unused_columns must be false, got True")
    if inputs.ema_decay is not None and (args.fsdp or args.deepspeed):
        problems.append(f"--ema_decay must be left out where the weights are sharded, got {inputs.ema_decay}")
    if inputs.repeated_augmentation > 1 and args.train_sampling_strategy != "random":
        allowed = f"random with --repeated_augmentation {inputs.repeated_augmentation}"
        problems.append(f"--train_sampling_strategy must be {allowed}, got {args.train_sampling_strategy!r}")
    if problems:
        raise ValueError("aft classify: " + "; ".join(problems))
    return inputs, args


# The model


def size_of_all(data: ImageData) -> tuple[int, int] | None:
    """Height and width of the pictures to train on, if they are small and have one size."""
    pictures = data.parts["train"]
    return pictures.array.shape[1:3] if isinstance(pictures, ArrayPictures) else None


def identify_data(data: ImageData) -> dict:
    """What pictures, and a recipe whose flags are known, are for the identity of a run."""
    parts = {part: pictures.sha256() for part, pictures in data.parts.items()}
    return {"data": parts, "classes": list(data.names), "recipe": None}


def named_labels(names: list[str]) -> dict:
    """The fields of a configuration that name the classes."""
    labels = dict(enumerate(names))
    return {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}


def preset_values(inputs: argparse.Namespace) -> dict:
    """
    The fields of the configuration that `--model` names, without those that the data say.

    Raises:
        ValueError: the file is no configuration, or `--model_override` changes what the data say.
    """
    values = read_preset(inputs.model, PRESETS)
    changed = {item.partition("=")[0] for item in inputs.model_override}
    if fixed := sorted(changed & {"num_labels", "id2label", "label2id", "problem_type"}):
        raise ValueError(f"--model_override {fixed[0]}: must be left out, --data says it")
    values.pop("num_labels", None)
    return values


def new_config(inputs: argparse.Namespace, data: ImageData) -> PreTrainedConfig:
    """
    The configuration of a model that begins from nothing.

    Raises:
        ValueError: the file is none of a classifier of pictures, or a field does not go with the pictures.
    """
    name, values = f"--model {inputs.model}", preset_values(inputs)
    values |= {**named_labels(data.names), "problem_type": "single_label_classification"}
    changed = {item.partition("=")[0] for item in inputs.model_override}
    if inputs.image_size and "image_size" in changed:
        raise ValueError(f"--image_size must be left out with --model_override image_size, got {inputs.image_size}")
    found = None if "image_size" in {*values, *changed} else size_of_all(data)
    size = inputs.image_size or (found and as_size(found))
    if size and hasattr(override(values, [], name), "image_size"):  # which models of convolutions do without
        values["image_size"] = size
    try:
        config = override(values, inputs.model_override, name)
        if found and not inputs.image_size and not isinstance(size, int):
            check_patches(config, size, name)
    except ValueError as error:
        if inputs.image_size or not found or "image_size" not in str(error):
            raise
        raise ValueError(f"--image_size must be given for pictures of {found[0]} x {found[1]}: {error}") from error
    if type(config) not in AutoModelForImageClassification._model_mapping:
        allowed = "one that has a AutoModelForImageClassification"
        raise ValueError(f"{name}: model_type must be {allowed}, got {config.model_type!r}")
    return config


def new_model(inputs: argparse.Namespace, data: ImageData) -> tuple[torch.nn.Module, set[str]]:
    """The model of a configuration, with random weights, and the names of its tensors, all of which are new."""
    model = AutoModelForImageClassification.from_config(new_config(inputs, data), dtype=torch.float32)
    return model, set(model.state_dict())


def check_patches(config: PreTrainedConfig, size: Sequence[int], name: str) -> None:
    """
    Raises:
        ValueError: the patches of the model would leave a margin of its images; begins with `name`.
    """
    patch = getattr(config, "patch_size", 1)
    if any(side % part for side, part in zip(size, both_sides(patch), strict=True)):
        raise ValueError(f"{name}: image_size must be a multiple of patch_size ({patch}), got {as_size(size)}")


def saved_model(inputs: argparse.Namespace, data: ImageData) -> tuple[torch.nn.Module, set[str]]:
    """
    A saved model, with a new head if it is no classifier of these labels, and the names of its tensors that are new.
    Where it is, `data` gets the labels of the model.

    Raises:
        ValueError: it does not load.
    """
    name, trust = f"--model {inputs.model}", {"trust_remote_code": inputs.trust_remote_code}
    config = load_config(inputs.model, **trust)
    if inputs.model_override:
        config = override(config.to_dict(), inputs.model_override, name)
    is_classifier = any("ForImageClassification" in head for head in config.architectures or ())
    own = [config.id2label[index] for index in range(config.num_labels)]
    if is_classifier and set(data.names) <= set(own):
        classes = np.array([own.index(label) for label in data.names])
        for pictures in data.parts.values():
            pictures.labels = classes[pictures.labels]
        data.names = own
        model, new = load_base(inputs, config)
    elif not is_classifier:
        model, new = load_base(inputs, with_labels(config, data.names))
    else:
        print(f"{name}: its labels are others, so it gets a new head for {len(data.names)}", flush=True)
        saved, _ = load_base(inputs, config)
        config = with_labels(saved.config, data.names)
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32, **trust)
        model.base_model.load_state_dict(saved.base_model.state_dict())
        new = {key for key in model.state_dict() if not key.startswith(f"{model.base_model_prefix}.")}
    model.config.problem_type = "single_label_classification"
    return model, new


def must_interpolate(inputs: argparse.Namespace, args: ClassifyingArguments, model: torch.nn.Module) -> bool:
    """
    Whether the tables of a saved model must be resampled for `--image_size`, which is for scoring alone. A model that
    takes any size gets this one.

    Raises:
        ValueError: it takes no images of this size, or has tables for another and is to be trained.
    """
    size, own = inputs.image_size, getattr(model.config, "image_size", None)
    if size is None:
        return False
    problem = problem_of_size(model, size)
    if problem is None:
        if own is not None:
            model.config.image_size = size
        return False
    name, wanted = f"--model {inputs.model}", " x ".join(map(str, both_sides(size)))
    if own is not None and not args.trains and "interpolate_pos_encoding" in signature(model.forward).parameters:
        check_patches(model.config, both_sides(size), name)
        problem = problem_of_size(model, size, interpolate_pos_encoding=True)
        if problem is None:
            tables = " x ".join(map(str, both_sides(own)))
            if args.process_index == 0:
                print(f"{name}: its tables, for {tables} pixels, are interpolated for {wanted}", flush=True)
            return True
    purpose = "trained" if args.trains else "scored"
    raise ValueError(f"--image_size must be one that {name} can be {purpose} at, got {wanted}: {problem}")


@torch.no_grad()
def problem_of_size(model: torch.nn.Module, size: int | list[int], **options) -> str | None:
    """Why a model does not take images of a size; None if it does."""
    pixels = torch.zeros(1, getattr(model.config, "num_channels", 3), *both_sides(size))
    try:
        model.eval()(pixel_values=pixels, **options)
    except Exception as error:  # of any model's own checks, or of torch for what they let through
        return one_line(error)
    return None


def with_labels(config: PreTrainedConfig, names: list[str]) -> PreTrainedConfig:
    for key, value in named_labels(names).items():
        setattr(config, key, value)
    return config


def load_base(inputs: argparse.Namespace, config: PreTrainedConfig) -> tuple[torch.nn.Module, set[str]]:
    options = {"config": config, "dtype": torch.float32, "trust_remote_code": inputs.trust_remote_code}
    return load_model(AutoModelForImageClassification, inputs.model, new_head=True, **options)


# Its pictures


def find_processor(inputs: argparse.Namespace):
    """The image processor that was saved with a model, None if there is none."""
    if is_preset(inputs.model, PRESETS) or (
        Path(inputs.model).is_dir() and not (Path(inputs.model) / "preprocessor_config.json").is_file()
    ):
        return None
    try:
        return load(AutoImageProcessor, inputs.model, trust_remote_code=inputs.trust_remote_code)
    except ValueError:
        if Path(inputs.model).is_dir():
            raise
        return None


def choose_processor(inputs: argparse.Namespace, data: ImageData, config, indices: np.ndarray):
    """
    The image processor of a saved model, or with `--image_size` or `--crop_ratio`, or where there is none, another;
    one for another size keeps the same share of a picture.

    Args:
        indices: of the pictures to train on, whose mean and deviation count where nothing else is known.
    """
    saved = find_processor(inputs)
    if saved is not None and inputs.image_size is None and inputs.crop_ratio is None:
        return saved
    channels = getattr(config, "num_channels", 3)
    if saved is not None:
        statistics = {"image_mean": saved.image_mean, "image_std": saved.image_std}
    elif channels == 3 and not is_preset(inputs.model, PRESETS):
        statistics = IMAGENET
    else:
        statistics = measure(data.parts["train"], indices, channels)
    found = size_of_all(data)
    size = both_sides(inputs.image_size or getattr(config, "image_size", None) or found or 224)
    if inputs.crop_ratio is not None:
        ratio = inputs.crop_ratio
    elif saved is not None:
        ratio = kept_share(saved)
    else:
        ratio = 1.0 if max(size) <= SMALL or found == size else 0.875
    return make_processor(size, ratio, channels, statistics)


# The run


@dataclass
class ImageTask(Task):
    """A `Task` whose trainer may average the weights, and give the model more than pictures."""

    ema_decay: float | None = None
    forward_options: dict = field(default_factory=dict)
    test: Dataset | None = None

    def make_trainer(self, model: torch.nn.Module, args, processor, callbacks=()) -> ClassifyingTrainer:
        own = {"ema_decay": self.ema_decay, "forward_options": self.forward_options}
        return ClassifyingTrainer(**self.options(model, args, processor, callbacks), **own)


def make_task(inputs: argparse.Namespace, args: ClassifyingArguments) -> tuple[ImageTask, object]:
    """The model, the pictures and what changes them, and the image processor."""
    data = read_images(inputs)
    if inputs.model is None:
        pixels = math.prod(both_sides(inputs.image_size or size_of_all(data) or 224))
        inputs.model = FOR_SMALL if pixels <= MOST_PIXELS else FOR_LARGE
    identity = identify_data(data)
    compute_metrics = accuracy_of_classes(inputs, args)
    set_seed(args.seed)  # the initial weights, or those of a new head
    model, new = (new_model if is_preset(inputs.model, PRESETS) else saved_model)(inputs, data)
    channels = getattr(model.config, "num_channels", 3)
    if channels not in MODES:
        raise ValueError(f"--model {inputs.model}: num_channels must be 1 or 3, got {channels}")
    interpolates = not is_preset(inputs.model, PRESETS) and must_interpolate(inputs, args, model)
    train, parts = data.parts["train"], data.parts
    if "validation" in parts:
        indices, validation = np.arange(len(train)), (parts["validation"], np.arange(len(parts["validation"])))
    else:
        indices, held_out = split_rows(len(train), inputs.validation_share, inputs.split_seed)
        validation = (train, held_out)
    processor = choose_processor(inputs, data, model.config, indices)
    task = ImageTask(
        model=model,
        train=TrainingPictures(train, indices, processor, channels, inputs, args.seed),
        validation=ScoredPictures(*validation, processor, channels),
        collator=PictureCollator(inputs, args.label_smoothing_factor, len(data.names), args.seed),
        compute_metrics=compute_metrics,
        identity={**identity, **identify_model(model, new), "processor": processor.to_dict()},
        ema_decay=inputs.ema_decay,
        forward_options={"interpolate_pos_encoding": True} if interpolates else {},
    )
    if "test" in parts:
        task.test = ScoredPictures(parts["test"], np.arange(len(parts["test"])), processor, channels)
    if args.process_index == 0:
        print(describe_task(task, len(data.names)), flush=True)
    return task, processor


def describe_task(task: ImageTask, num_labels: int) -> str:
    height, width = task.train.side
    counts = f"{len(task.train):,} pictures to train on, {len(task.validation):,} held out"
    counts += f", {len(task.test):,} to test" if task.test is not None else ""
    return f"{counts}; {num_labels} labels; {height} x {width} pixels; {task.model.num_parameters():,} parameters"


def next_commands(inputs: argparse.Namespace, args: ClassifyingArguments) -> str:
    """What to type when a run has ended."""
    folder = args.output_dir
    tuning = (
        f"{program()} classify --model {shlex.quote(folder)} --data FOLDER --output_dir {shlex.quote(folder)}-tuned"
    )
    return "\n  ".join(["next:", pipeline_command(folder, "picture.png"), tuning])


def classify(argv: list[str]) -> dict[str, float]:
    """
    Runs with the flags of `aft classify`; returns all metrics.

    Raises:
        ValueError: a flag, the data or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    inputs, args = parse_arguments(argv)
    prepare(inputs, args)
    task, processor = make_task(inputs, args)
    with locked(Path(args.output_dir), active=args.process_index == 0):
        trainer, metrics = train_and_evaluate(task, inputs, args, processor)
        if task.test is not None:
            report(trainer, metrics, "test", trainer.predict(task.test, metric_key_prefix="test").metrics, task.test)
        if args.process_index == 0:
            if task.test is not None:
                print(f"test: {metrics['test_accuracy']:.4f} accuracy, {len(task.test):,} pictures")
            if args.trains:
                print(next_commands(inputs, args), flush=True)
    return metrics
