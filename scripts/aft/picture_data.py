# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures of one size as sequences of sub-pixels: read in three splits, and as the batches of training."""

import argparse
import hashlib
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import Image as ImageFeature

from aft.image_data import (
    FOLDERS,
    ArrayPictures,
    FilePictures,
    Pictures,
    TablePictures,
    choose_tables,
    find_column,
    find_idx,
    in_memory,
    picture_files,
    read_idx_file,
)
from aft.model_configs import has_length_limit
from aft.redaction import readable
from aft.saved_models import objective_of
from aft.text_sources import SPLITS, DocumentText, FileText, draw_rows, load_text
from aft.token_data import TokenData
from aft.vocabulary import START_OF_PICTURE, PixelVocabulary


class PictureData:
    """
    Pictures of one size in three splits.

    Args:
        name (`str`): for the log and the card.
        splits (`dict`): for each name of `SPLITS` uint8 [N, H, W, C].
        hub_dataset (`str`, *optional*): the name on the Hub that they come from.
    """

    known = stream = None
    are_documents = False

    def __init__(self, name: str, splits: dict[str, np.ndarray], hub_dataset: str | None = None):
        self.name, self.splits, self.hub_dataset = name, splits, hub_dataset
        self.shape = splits["train"].shape[1:]  # height, width, channels
        digest = hashlib.sha256(repr(self.shape).encode())
        for split in SPLITS:
            digest.update(len(splits[split]).to_bytes(8, "little") + np.ascontiguousarray(splits[split]).data)
        self.sha256 = digest.hexdigest()

    def split_bytes(self, split: str) -> bytes:
        """The sub-pixels of a split, picture after picture."""
        return self.splits[split].tobytes()

    def describe(self) -> dict:
        """Facts for the log."""
        counts = {f"{split}_pictures": len(pictures) for split, pictures in self.splits.items()}
        return {"picture": " x ".join(map(str, self.shape)), **counts}


class PictureTokens(TokenData):
    """
    The sub-pixels of pictures, one picture after the other, each in raster order with the channels of a pixel beside
    each other; `start` stands before each picture, if there is such a token.
    """

    def __init__(self, data: PictureData, start: int | None = START_OF_PICTURE):
        ends = np.cumsum([len(data.splits[split]) for split in SPLITS]).tolist()
        self.shape, self.start = data.shape, start
        # uint8 [N, T] for each split
        self.pictures = {split: pictures.reshape(len(pictures), -1) for split, pictures in data.splits.items()}
        self.length = int(np.prod(data.shape))
        self.before = int(start is not None)  # tokens before a picture
        size = self.length + self.before
        ranges = zip([0, *ends[:-1]], ends, strict=True)
        splits = {split: (size * first, size * last) for split, (first, last) in zip(SPLITS, ranges, strict=True)}
        num_bytes = {split: pictures.size for split, pictures in self.pictures.items()}
        super().__init__(None, None, splits, num_bytes, data.sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids of the tokens [start, stop), which are of one split."""
        split = next(split for split, (_, end) in self.splits.items() if start < end)
        places = np.arange(start, stop) - self.splits[split][0]
        number, place = np.divmod(places, self.length + self.before)
        values = self.pictures[split][number, place - self.before].astype(np.int64)
        return np.where(place < self.before, self.start, values) if self.before else values

    def first_bytes(self, split: str, num_bytes: int) -> tuple[int, int]:
        """Where the labels of a split begin, after its first token, and where its first pictures end; 0 for all."""
        start, stop = self.splits[split]
        size = self.length + self.before
        return start + 1, stop if num_bytes == 0 else min(start + num_bytes // self.length * size, stop)


class PictureWindows:
    """
    The pictures of the train split in training order, each a window that begins with the start token. Each epoch
    visits them in a new order; what augments them is drawn for each row of each step. Everything is a pure function of
    the seed, the step and the row.

    Args:
        data (`PictureTokens`): with a start token.
        batch_size (`int`): pictures per step, over all processes and micro-batches.
        seed (`int`): decides orders and augmentation.
        flip (`bool`): mirror every second picture, pixel by pixel.
        shift (`int`): add one whole number from [-shift, shift] to all sub-pixels of a picture, and clip them.
    """

    def __init__(self, data: PictureTokens, batch_size: int, seed: int, flip: bool = False, shift: int = 0):
        self.pictures, self.shape, self.first = data.pictures["train"], data.shape, data.start
        self.batch_size, self.seed, self.flip, self.shift = batch_size, seed, flip, shift
        self.length = self.labels_per_window = data.length
        self.windows_per_epoch = len(self.pictures)
        # A batch touches two epochs at most, unless it is larger than an epoch.
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The numbers of the pictures in the order of training: int64 [windows_per_epoch]."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.windows_per_epoch)

    def picture(self, step: int, row: int) -> np.ndarray:
        """The sub-pixels of a row of the global batch of `step`, augmented: uint8 [T]."""
        epoch, index = divmod(step * self.batch_size + row, self.windows_per_epoch)
        values = self.pictures[self.epoch_order(epoch)[index]]
        generator = np.random.default_rng([self.seed, step, row])
        if self.flip and generator.random() < 0.5:
            values = values.reshape(self.shape)[:, ::-1].reshape(-1)
        if self.shift:
            moved = values.astype(np.int64) + generator.integers(-self.shift, self.shift, endpoint=True)
            values = np.clip(moved, 0, 255).astype(np.uint8)
        return values

    def batch(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows `rows` of the global batch of `step` (from 0).

        Returns:
            `tuple`: inputs and labels, int64 [len(rows), T]: all sub-pixels are labels, and the start token and all
            but the last are inputs.
        """
        labels = np.stack([self.picture(step, row) for row in rows]).astype(np.int64)
        return np.insert(labels[:, :-1], 0, self.first, axis=1), labels

    def sizes(self, step: int, rows: range) -> np.ndarray:
        """How many sub-pixels the labels of these rows stand for, int64 [len(rows), T]."""
        return np.ones((len(rows), self.length), dtype=np.int64)


def load_source(args: argparse.Namespace) -> PictureData | FileText | DocumentText:
    """
    The pictures, or the text, that the flags name, once they are complete and checked.

    Raises:
        ValueError: it cannot be read, or lacks what was asked for.
        OSError: a download failed.
    """
    return load_text(args) if args.pictures is None else load_pictures(args)


def check_picture_model(config, shape: tuple[int, int, int], name: str, starts: bool = True) -> None:
    """
    Checks that a configuration is that of a language model of pictures.

    Args:
        name: what errors call the model.
        starts: whether it must have a start token beside the 256 values of sub-pixels.

    Raises:
        ValueError: it is another, or its tables of positions are too short.
    """
    sizes = (257,) if starts else (256, 257)
    if objective_of(config) != "causal" or config.vocab_size not in sizes:
        found = f"a {objective_of(config)} one of {config.vocab_size}"
        allowed = " or ".join(map(str, sizes))
        raise ValueError(f"{name}: must be a causal language model of pictures, with {allowed} tokens, got {found}")
    length = math.prod(shape)
    if has_length_limit(config) and config.max_position_embeddings < length:
        raise ValueError(
            f"{name}: max_position_embeddings must be {length} or more, the sub-pixels of a picture of "
            f"{' x '.join(map(str, shape))}, got {config.max_position_embeddings}"
        )


def picture_shape(args: argparse.Namespace) -> tuple[int, int, int]:
    """Height, width and channels of the pictures; those are only read if the flags leave something open."""
    if args.image_size is not None and args.num_channels is not None:
        return args.image_size, args.image_size, args.num_channels
    return load_pictures(args).shape


def load_pictures(args: argparse.Namespace, shape: tuple[int, int, int] | None = None) -> PictureData:
    """
    The pictures of `PictureArguments`, in memory; of a model whose pictures have this shape, if it is given.

    Raises:
        ValueError: they are not there, or damaged, or have several sizes and none is asked for.
    """
    size = None if args.image_size is None else (args.image_size, args.image_size)
    channels = args.num_channels
    if shape is not None:
        asked = {"image_size": (size, shape[:2]), "num_channels": (channels, shape[2])}
        for name, (given, own) in asked.items():
            if given not in (None, own):
                raise ValueError(f"--{name} must be left out, or what the model has, {own}, got {getattr(args, name)}")
        size, channels = shape[:2], shape[2]
    return cached_pictures(
        args.pictures,
        args.dataset_config,
        args.image_column,
        args.validation_split,
        args.test_split,
        0.05 if args.test_size is None else args.test_size,
        size,
        channels,
    )


@lru_cache(maxsize=1)  # the flags of a run are checked, and then it reads
def cached_pictures(
    data: str,
    data_config: str | None,
    image_column: str | None,
    validation_split: str | None,
    test_split: str | None,
    test_size: float,
    size: tuple[int, int] | None,
    channels: int | None,
) -> PictureData:
    inputs = argparse.Namespace(data=data, data_config=data_config, image_column=image_column, train_split="train")
    inputs.validation_split, inputs.test_split = validation_split, test_split
    name = f"--pictures {readable(data)}"
    parts = read_parts(inputs, name)
    if channels is None:
        grey = all(is_grey(pictures) for pictures in parts.values())
        channels = 1 if grey else 3
    if size is None:
        shapes = {pictures.size(index) for pictures in parts.values() for index in range(len(pictures))}
        if len(shapes) > 1:
            (width, height), (other_width, other_height) = sorted(shapes)[:2]
            raise ValueError(
                f"--image_size must be given: {name} has pictures of several sizes, such as {width} x {height} and "
                f"{other_width} x {other_height}"
            )
        size = shapes.pop()[::-1]
    arrays = {part: as_array(pictures, size, channels) for part, pictures in parts.items()}
    splits = {{"validation": "valid"}.get(part, part): array for part, array in arrays.items()}
    if missing := [split for split in ("valid", "test") if split not in splits]:
        rows = draw_rows(len(splits["train"]), missing, test_size, "pictures")
        splits |= {split: splits["train"][drawn] for split, drawn in rows.items()}
    title, is_local = readable(Path(data).resolve().name), Path(data).exists()
    title = title if is_local else data if data_config is None else f"{data}, {data_config}"
    return PictureData(title, splits, None if is_local else data)


def read_parts(inputs: argparse.Namespace, name: str) -> dict[str, Pictures]:
    """The pictures of "train" and, where there are such, of "validation" and "test"; labels are not looked at."""
    path = Path(inputs.data)
    if path.is_dir() and (files := find_idx(path)):
        images = {part: file for (part, kind), file in files.items() if kind == "images"}
        if "train" not in images:
            raise ValueError(
                f"{name}: no file of train images beside {', '.join(file.name for file in files.values())}"
            )
        parts = {
            part: ArrayPictures(array := read_idx_file(file, 3), np.zeros(len(array))) for part, file in images.items()
        }
    elif path.is_dir() and (files := find_files(path)):
        parts = {part: in_memory(FilePictures(paths, np.zeros(len(paths)))) for part, paths in files.items()}
    else:
        tables, chosen = choose_tables(inputs, name)
        column = find_column(tables["train"].features, inputs.image_column, ImageFeature, "image", name)
        parts = {}
        for part, split in chosen.items():
            labels = np.zeros(len(tables[split]))
            parts[part] = in_memory(TablePictures(tables[split], column, labels, f"{name}, {split}"))
        return parts
    given = vars(inputs) | {"dataset_config": inputs.data_config}
    for flag in ("dataset_config", "image_column", "validation_split", "test_split"):
        if given[flag] is not None:
            raise ValueError(f"--{flag} must be left out with a folder of pictures, got {given[flag]!r}")
    return parts


def find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of pictures of each part, at any depth; all are train if no folder is called so."""
    parts = {}
    for part, names in FOLDERS.items():
        found = [folder / name for name in names if (folder / name).is_dir()]
        if found and (files := picture_files(found[0])):
            parts[part] = files
    if "train" in parts:
        return parts
    files = picture_files(folder)
    return {"train": files} if files else {}


def is_grey(pictures: Pictures) -> bool:
    """Whether no picture has colours."""
    if isinstance(pictures, ArrayPictures):
        return pictures.array.ndim == 3
    return {pictures.open(index).mode for index in range(len(pictures))} <= {"1", "L"}


def as_array(pictures: Pictures, size: tuple[int, int], channels: int) -> np.ndarray:
    """
    Pictures of one size, as the image processor of a model makes them: uint8 [N, H, W, C].

    Args:
        size: height and width.
    """
    if isinstance(pictures, ArrayPictures) and pictures.array.shape[1:] == (*size, *[3] * (channels == 3)):
        return pictures.array.reshape(len(pictures), *size, channels)
    processor = PixelVocabulary((*size, channels)).processor()
    made = np.empty((len(pictures), *size, channels), dtype=np.uint8)
    for index in range(len(pictures)):
        made[index] = np.asarray(processor.to_picture(pictures.decode(index))).reshape(made.shape[1:])
    return made
