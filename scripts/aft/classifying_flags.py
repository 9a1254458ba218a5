# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The flags of `aft classify`, as far as they can be read without transformers, and the recipes that set them."""

import argparse
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aft.finetuning_flags import (
    FinetuningDefaults,
    find_model,
    is_preset,
    make_parser,
    names_of_training_arguments,
    pick,
)
from aft.flags import (
    HUB_NAME,
    IMPORT_HELP,
    did_you_mean,
    find_preset,
    flag,
    like_path,
)
from aft.settings_files import read_yaml


PRESETS = "images"  # where those of --model are
MAYBE_PATHS = ("data", "recipe")  # which may be names too
CROPS = ("none", "auto", "padded", "resized")
SMALL = 32  # pixels of a side: up to here pictures are cropped with a margin, and not resized


@dataclass
class PictureArguments:
    _argument_group_name = "model and data"

    model: str | None = flag(
        None,
        "Folder of a saved model, or its name on the Hub; or, to begin from nothing, a JSON file of a configuration, "
        "or the name of a preset. None is the preset aft-conv-mini-5-24, and for larger pictures than 64 x 64 "
        "aft-conv-tiny-11-32.",
    )
    model_override: list[str] = field(
        default_factory=list, metadata={"help": "Fields of the configuration to change, as key=value."}
    )
    imports: list[str] = field(default_factory=list, metadata={"help": IMPORT_HELP, "aliases": ["--import"]})
    trust_remote_code: bool = flag(False, "Run the code that comes with a model of an unknown type.")
    data: str | None = flag(
        None,
        "Folder with a folder of pictures per class, or with train/, valid/ and test/ of such; folder with the files "
        "of MNIST or Fashion-MNIST; or what datasets.load_dataset reads, a path or a name on the Hub.",
    )
    data_config: str | None = flag(None, "Configuration of a data set that has several.", "--config")
    image_column: str | None = flag(None, "Column of the pictures of a data set; None is the only one there is.")
    label_column: str | None = flag(None, "Column of its labels; None is the only one of classes, or else label.")
    class_names: list[str] = field(
        default_factory=list, metadata={"help": "Names of the classes, in order, where the data have numbers."}
    )
    train_split: str = flag("train", "Part of a data set to train on.")
    validation_split: str | None = flag(None, "Part to validate on; None is validation if there is one, else a share.")
    test_split: str | None = flag(None, "Part to score once at the end; None is test if there is one.")
    validation_share: float = flag(0.1, "Share of the training pictures that is held out if there is no such part.")
    split_seed: int = flag(0, "Seed of which pictures are held out.")
    image_size: list[int] | None = flag(
        None,
        "Pixels that a picture is made to: of the side of a square, or height and width; None is that of the model, "
        "and from nothing that of the pictures, if all have one of at most 64 x 64.",
    )
    crop_ratio: float | None = flag(
        None,
        "Share of a side that evaluation keeps; None is that of a saved model, and else 0.875, and 1 for up to 32 "
        "pixels and for pictures that have image_size already.",
    )
    search_steps: int | None = flag(
        None, "Try four learning rates around the default for so many steps each, and take the best on held-out data."
    )
    cache_dir: str | None = flag(None, "Folder for what `evaluate` writes; None is its default.")


@dataclass
class RecipeArguments:
    _argument_group_name = "recipe"

    recipe: str | None = flag(
        None,
        "YAML file of flags, or the name of a preset: small, deit or finetune; none for none. An explicit flag wins. "
        "None is small from nothing, and finetune for a saved model.",
    )
    random_crop: str = flag(
        "none",
        "none; padded: shifted by up to crop_padding pixels; resized: a part of at least crop_scale of the area; "
        "auto: padded for up to 32 pixels, else resized.",
    )
    crop_padding: int | None = flag(
        None,
        "Pixels of the black margin of a padded crop; None is an eighth of the shorter side, rounded up: 4 for 32.",
    )
    crop_scale: float = flag(0.08, "Least share of the area of a resized crop.")
    horizontal_flip: bool = flag(False, "Mirror every second picture; wrong for digits and letters.")
    color_jitter: float = flag(0.0, "Change brightness, contrast and colour by up to this share.")
    rand_augment: float | None = flag(
        None,
        "Magnitude, 0 to 10, of RandAugment as DeiT has it: two changes of colours or places; None is none of it.",
    )
    repeated_augmentation: int = flag(
        1, "How often a picture stands in a row, changed each time; an epoch of as many steps then sees fewer of them."
    )
    random_erasing: float = flag(0.0, "Share of pictures of which a rectangle becomes noise.")
    mixup: float = flag(0.0, "Alpha of the shares in which two pictures are mixed; 0 is never.")
    cutmix: float = flag(0.0, "Alpha of the size of the part that comes from another picture; 0 is never.")
    ema_decay: float | None = flag(None, "Score and save an average of the weights with this decay, as 0.999.")


@dataclass
class ClassifyingDefaults(FinetuningDefaults):
    output_dir: str = flag("runs/images", "Folder of the results.")
    per_device_train_batch_size: int = flag(64, "Pictures of a step, or of a part of it.")
    per_device_eval_batch_size: int = flag(128, "Pictures that are scored at a time.")
    metric_for_best_model: str | None = flag("accuracy", "What the best checkpoint is best in.")
    remove_unused_columns: bool = flag(False, "Must be false: what a picture needs to be changed is in its columns.")


GROUPS = (PictureArguments, RecipeArguments, ClassifyingDefaults)
RANGES = {  # of a number, and whether its lower and its upper end belong to it
    "validation_share": (0, 1, False, False),
    "crop_ratio": (0, 1, False, True),
    "crop_scale": (0, 1, False, True),
    "color_jitter": (0, 1, True, True),
    "rand_augment": (0, 10, True, True),
    "random_erasing": (0, 1, True, True),
    "ema_decay": (0, 1, False, False),
}


def both_sides(size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width of a size: one number means both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def as_size(sides: Sequence[int]) -> int | list[int]:
    """A size as configurations have it: one number for a square."""
    return sides[0] if len(sides) <= 2 and len({*sides}) == 1 else [*sides]


def picture_problems(inputs: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the model, the data and the recipe by themselves."""
    problems = []

    def check(ok: bool, name: str, allowed: str):
        if not ok:
            problems.append(f"--{name} must be {allowed}, got {getattr(inputs, name)!r}")

    for name, (low, high, with_low, with_high) in RANGES.items():
        value = getattr(inputs, name)
        inside = value is None or low < value < high or (value == low and with_low) or (value == high and with_high)
        check(inside, name, f"in {'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}")
    for name in ("mixup", "cutmix", "crop_padding"):
        check(getattr(inputs, name) is None or getattr(inputs, name) >= 0, name, "at least 0")
    size = both_sides(1 if inputs.image_size is None else inputs.image_size)
    check(len(size) == 2 and min(size) >= 1, "image_size", "one number of pixels or two, height and width, at least 1")
    for name in ("repeated_augmentation", "search_steps"):
        check(getattr(inputs, name) is None or getattr(inputs, name) >= 1, name, "at least 1")
    check(inputs.random_crop in CROPS, "random_crop", f"one of {', '.join(CROPS)}")
    check(0 <= inputs.split_seed < 2**32, "split_seed", "in [0, 2**32)")
    check(inputs.cache_dir != "", "cache_dir", "a path")
    check(len(set(inputs.class_names)) == len(inputs.class_names), "class_names", "different from each other")
    check(bool(inputs.data), "data", "given")
    if inputs.data and not (path := Path(inputs.data)).exists():
        is_local = path.parent != Path() and path.parent.is_dir()
        if is_local or not re.fullmatch(HUB_NAME, inputs.data, re.ASCII):
            problems.append(f"--data {inputs.data}: no such folder{like_path(path)}")
    try:
        if inputs.model is not None:
            find_model(inputs.model, PRESETS)
    except ValueError as error:
        problems.append(str(error))
    return problems


def add_recipe(argv: list[str]) -> list[str]:
    """
    A command line with the flags of its recipe before its own.

    Raises:
        ValueError: there is no such recipe, or it has an unknown key, or a value that is no text.
    """
    parser = make_parser("classify", "", GROUPS)
    found, _ = parser.parse_known_args([item for item in argv if item not in ("-h", "--help")])
    name = found.recipe or ("small" if is_preset(found.model, PRESETS) else "finetune")
    if name == "none":
        return argv
    path = find_preset(name, "recipes", "--recipe")
    known = {
        *vars(pick(RecipeArguments, found)),
        *vars(pick(ClassifyingDefaults, found)),
        *names_of_training_arguments(),
    }
    known -= {"recipe", "output_dir", "resume_from_checkpoint"}
    values = read_yaml(path, "--recipe", plain=True)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"--recipe {path}: unknown key {key!r}{did_you_mean(str(key), known)}")
        if not isinstance(value, str):
            raise ValueError(f"--recipe {path}: {key} must be one value, got {reprlib.repr(value)}")
    return [*(f"--{key}={value}" for key, value in values.items()), *argv]


def read_flags(argv: list[str], description: str = "") -> argparse.Namespace:
    """
    The flags of the model, the data and the recipe, after a look at the names of all others; `argv` has the recipe.

    Raises:
        ValueError: a flag is unknown.
    """
    found = make_parser("classify", description, GROUPS).parse_args(argv)
    if found.image_size is not None:
        found.image_size = as_size(found.image_size)
    return argparse.Namespace(**vars(pick(PictureArguments, found)), **vars(pick(RecipeArguments, found)))
