# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""From pictures to what a model of images takes: image processors, and data sets for training and for scoring."""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from aft.augmentation import erase, jitter, mix, padded_crop, rand_augment, resized_crop, smooth_targets
from aft.classifying_flags import SMALL, both_sides
from aft.image_data import ArrayPictures, Pictures


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MODES = {1: "L", 3: "RGB"}  # of PIL, by num_channels
MOST_MEASURED = 1000  # pictures that are decoded for a mean


def measure(pictures: Pictures, indices: np.ndarray, channels: int) -> dict[str, list[float]]:
    """
    Mean and standard deviation of the channels of pixels in [0, 1]: of all pictures in memory, else of some.

    Raises:
        ValueError: all pixels are the same.
    """
    if not isinstance(pictures, ArrayPictures):
        indices = indices[np.linspace(0, len(indices) - 1, min(len(indices), MOST_MEASURED)).astype(int)]
    counts = np.zeros((channels, 256))
    for index in indices:
        pixels = np.asarray(pictures.decode(index).convert(MODES[channels])).reshape(-1, channels)
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    values = np.arange(256) / 255
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    if not std.all():
        raise ValueError("--data: the pictures to train on must have more than one colour in every channel")
    return {"image_mean": mean.tolist(), "image_std": std.tolist()}


def make_processor(size: int | Sequence[int], ratio: float, channels: int, statistics: dict) -> DeiTImageProcessorPil:
    """
    Makes pixels as DeiT does: the shorter side to size / ratio, bicubic, and a square of `size` in the middle. Of a
    size that is no square, both sides are resized, so that nothing outside of a picture is seen.
    """
    height, width = both_sides(size)
    resized = {"height": int(height / ratio), "width": int(width / ratio)}
    return DeiTImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": resized["height"]} if height == width else resized,
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        do_convert_rgb=channels == 3,
        **statistics,
    )


def kept_share(processor) -> float:
    """The share of a side of a resized picture that an image processor leaves: what is `ratio` in `make_processor`."""
    values = processor.to_dict()
    resized, crop = values.get("size") or {}, values.get("crop_size") or {}
    if not (values.get("do_resize") and values.get("do_center_crop")):
        return 1.0
    before = [resized[name] for name in ("shortest_edge", "height", "width") if resized.get(name)]
    after = [crop[name] for name in ("height", "width") if crop.get(name)]
    return min(1.0, min(after) / min(before)) if before and after else 1.0


class ScoredPictures(Dataset):
    """
    Pictures as they are scored: as a pipeline of transformers would make them.

    Args:
        indices (`ndarray` [N]): which of the pictures.
        channels (`int`): 1 or 3.
    """

    def __init__(self, pictures: Pictures, indices: np.ndarray, processor, channels: int):
        self.pictures, self.indices, self.processor, self.channels = pictures, indices, processor, channels

    def __len__(self) -> int:
        return len(self.indices)

    def picture(self, index: int) -> Image.Image:
        return self.pictures.decode(self.indices[index]).convert(MODES[self.channels])

    def __getitem__(self, index: int) -> dict:
        pixels = self.processor(self.picture(index), return_tensors="np")["pixel_values"][0]
        return {"pixel_values": pixels.astype(np.float32), "labels": self.pictures.labels[self.indices[index]]}


class TrainingPictures(ScoredPictures):
    """
    Pictures that are changed each time, as a function of seed, epoch and number. Of N, the index i + r N is picture i
    once more, in the r-th other way.

    Args:
        recipe: the flags that say how.
        seed (`int`): of all changes.
    """

    def __init__(self, pictures, indices, processor, channels, recipe: argparse.Namespace, seed: int):
        super().__init__(pictures, indices, processor, channels)
        self.recipe, self.seed = recipe, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with workers that outlive an epoch
        self.side = super().__getitem__(0)["pixel_values"].shape[1:]
        self.crop = recipe.random_crop
        if self.crop == "auto":
            self.crop = "padded" if max(self.side) <= SMALL else "resized"
        self.padding = -(-min(self.side) // 8) if recipe.crop_padding is None else recipe.crop_padding
        self.scale = processor.rescale_factor if processor.do_rescale else 1.0
        normalizes = processor.do_normalize
        self.mean = np.float32(processor.image_mean if normalizes else [0.0] * channels)[:, None, None]
        self.std = np.float32(processor.image_std if normalizes else [1.0] * channels)[:, None, None]
        colour = tuple(min(255, round(float(value / self.scale))) for value in self.mean.flat)
        self.fill = colour if channels == 3 else colour[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        turn, index = divmod(index, len(self))
        number, epoch = int(self.indices[index]), int(self.epoch)
        generator = np.random.default_rng((self.seed, epoch, number, turn))
        pixels = self.change(self.picture(index), generator)
        label = self.pictures.labels[number]
        return {"pixel_values": pixels, "labels": label, "number": number, "epoch": epoch}

    def change(self, picture: Image.Image, generator: np.random.Generator) -> np.ndarray:
        """Normalised pixels [C, H, W]."""
        recipe = self.recipe
        if self.crop == "resized":
            picture = resized_crop(picture, self.side, recipe.crop_scale, generator)
        elif picture.size[::-1] != self.side:
            picture = self.fit(picture)
        if recipe.color_jitter:
            picture = jitter(picture, recipe.color_jitter, generator)
        if self.crop == "padded":
            picture = padded_crop(picture, self.padding, generator)
        if recipe.rand_augment is not None:
            picture = rand_augment(picture, recipe.rand_augment, self.fill, generator)
        pixels = np.asarray(picture).reshape(*self.side, self.channels).transpose(2, 0, 1)
        if recipe.horizontal_flip and generator.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        values = (pixels * np.float32(self.scale) - self.mean) / self.std
        if generator.random() < recipe.random_erasing:
            values = erase(values, generator)
        return values

    def fit(self, picture: Image.Image) -> Image.Image:
        """The part that is scored, in its size, not normalised yet."""
        made = self.processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        pixels = np.asarray(made).astype(np.uint8).transpose(1, 2, 0)
        return Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)


class RepeatedSampler(Sampler[int]):
    """
    The order of an epoch in which each picture stands several times in a row, changed each time (arXiv 1902.05509): as
    many places as there are pictures, so that some are not seen.

    Args:
        pictures (`TrainingPictures`): knows the epoch.
        times (`int`): how often a picture stands in a row.
        seed (`int`): of the order, which is a function of it and the epoch.
    """

    def __init__(self, pictures: TrainingPictures, times: int, seed: int):
        self.pictures, self.times, self.seed = pictures, times, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, int(self.pictures.epoch))).permutation(len(self))
        for place in range(len(self)):
            index, turn = divmod(place, self.times)
            yield int(order[index]) + turn * len(self)


class PictureCollator:
    """
    Batches of pictures; those of `TrainingPictures` are mixed, as a function of seed, epoch and numbers.

    Args:
        recipe: its flags.
        smoothing (`float`): of the labels to train on.
        num_labels, seed (`int`): as they are called.
    """

    def __init__(self, recipe: argparse.Namespace, smoothing: float, num_labels: int, seed: int):
        self.recipe, self.smoothing, self.num_labels, self.seed = recipe, smoothing, num_labels, seed

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
        labels = torch.tensor([int(row["labels"]) for row in rows])
        mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
        if "number" in rows[0] and (mixup or cutmix or self.smoothing):
            labels = smooth_targets(labels, self.num_labels, self.smoothing)
            generator = np.random.default_rng((self.seed, rows[0]["epoch"], *(row["number"] for row in rows)))
            images, labels = mix(images, labels, mixup, cutmix, generator)
        return {"pixel_values": images, "labels": labels}
