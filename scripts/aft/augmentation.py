# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How a picture is changed for training: each time another way, which its seed, its epoch and its number decide."""

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


Fill = int | tuple[int, ...]  # a colour of PIL: of what comes in from outside of a picture


def random_crop_box(
    width: int, height: int, least: float, generator: np.random.Generator, shape: float = 1.0
) -> tuple[int, ...]:
    """
    A part of a picture, (left, top, right, bottom): between `least` and all of its area, its width by its height 3/4
    to 4/3 of `shape`. After ten that do not fit, the largest in the middle of such sides.
    """
    for _ in range(10):
        area = width * height * generator.uniform(least, 1)
        ratio = shape * math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3 * shape)), min(height, round(width * 4 / 3 / shape))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(
    picture: Image.Image, side: tuple[int, int], least: float, generator: np.random.Generator
) -> Image.Image:
    """A random part of a picture, made to a height and a width."""
    box = random_crop_box(*picture.size, least, generator, side[1] / side[0])
    return picture.resize(side[::-1], Image.Resampling.BICUBIC, box=box)


def padded_crop(picture: Image.Image, padding: int, generator: np.random.Generator) -> Image.Image:
    """A picture shifted by up to `padding` pixels each way; black comes in."""
    top, left = (int(start) - padding for start in generator.integers(2 * padding + 1, size=2))
    return picture.crop((left, top, left + picture.width, top + picture.height))


def jitter(picture: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast and colour, in random order, by factors in 1 - share to 1 + share."""
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in generator.permutation(len(changes)):
        picture = changes[index](picture).enhance(generator.uniform(1 - share, 1 + share))
    return picture


def enhance(kind: type, picture: Image.Image, level: float) -> Image.Image:
    return kind(picture).enhance(1 + 0.9 * level)


def move(picture: Image.Image, fill: Fill, *rows: float) -> Image.Image:
    """The picture at other places: (x, y) gets what is at (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC, fillcolor=fill)


def lighten_dark(picture: Image.Image, level: float) -> Image.Image:
    return picture.point(lambda value: min(255, value + int(110 * level)) if value < 128 else value)


# The changes of RandAugment, with the strengths that DeiT gives them: of a picture, a level in -1 to 1, and a colour.
RAND_AUGMENT = {
    "auto_contrast": lambda picture, level, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, fill: ImageOps.equalize(picture),
    "invert": lambda picture, level, fill: ImageOps.invert(picture),
    "posterize": lambda picture, level, fill: ImageOps.posterize(picture, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda picture, level, fill: ImageOps.solarize(picture, 256 - int(256 * abs(level))),
    "solarize_add": lambda picture, level, fill: lighten_dark(picture, abs(level)),
    "color": lambda picture, level, fill: enhance(ImageEnhance.Color, picture, level),
    "contrast": lambda picture, level, fill: enhance(ImageEnhance.Contrast, picture, level),
    "brightness": lambda picture, level, fill: enhance(ImageEnhance.Brightness, picture, level),
    "sharpness": lambda picture, level, fill: enhance(ImageEnhance.Sharpness, picture, level),
    "rotate": lambda picture, level, fill: picture.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=fill),
    "shear_x": lambda picture, level, fill: move(picture, fill, 1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda picture, level, fill: move(picture, fill, 1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda picture, level, fill: move(picture, fill, 1, 0, 0.45 * level * picture.width, 0, 1, 0),
    "translate_y": lambda picture, level, fill: move(picture, fill, 1, 0, 0, 0, 1, 0.45 * level * picture.height),
}


def rand_augment(picture: Image.Image, magnitude: float, fill: Fill, generator: np.random.Generator) -> Image.Image:
    """
    A picture after two random changes of `RAND_AUGMENT` (arXiv 1909.13719) as DeiT makes them: each half of the time,
    one way or the other, at a level of a tenth of N(magnitude, 0.5), cut to 0 to 1.
    """
    changes = list(RAND_AUGMENT.values())
    for index in generator.integers(len(changes), size=2):
        if generator.random() < 0.5:
            level = np.clip(generator.normal(magnitude, 0.5) / 10, 0, 1)
            picture = changes[index](picture, float(level * generator.choice((-1, 1))), fill)
    return picture


def erase(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """
    Normalised pixels [C, H, W], of which a rectangle of a fiftieth to a third of the area is noise N(0, 1), its sides
    as 3:10 to 10:3 (arXiv 1708.04896).
    """
    channels, height, width = values.shape
    for _ in range(10):
        area = height * width * generator.uniform(0.02, 1 / 3)
        ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            values = values.copy()
            values[:, top : top + h, left : left + w] = generator.standard_normal((channels, h, w), dtype=np.float32)
            return values
    return values


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A batch of which each picture is mixed with its counterpart from the other end: by mixup (arXiv 1710.09412) or by
    cutmix (arXiv 1905.04899), a toss of a coin if both have an alpha.

    Args:
        images (`Tensor` [B, C, H, W]): normalised pixels.
        targets (`Tensor` [B, K]): probabilities of the classes.
        mixup, cutmix: alpha of the Beta distribution of the share that a picture keeps; 0 is never.
    """
    if not mixup and not cutmix:
        return images, targets
    cut = bool(cutmix) and (not mixup or generator.random() < 0.5)
    kept = generator.beta(cutmix, cutmix) if cut else generator.beta(mixup, mixup)
    if cut:
        height, width = images.shape[2:]
        h, w = int(height * math.sqrt(1 - kept)), int(width * math.sqrt(1 - kept))
        y, x = int(generator.integers(height)), int(generator.integers(width))
        top, bottom = max(y - h // 2, 0), min(y + h // 2, height)
        left, right = max(x - w // 2, 0), min(x + w // 2, width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = images * kept + images.flip(0) * (1 - kept)
    return mixed, targets * kept + targets.flip(0) * (1 - kept)


def smooth_targets(labels: torch.Tensor, num_labels: int, smoothing: float) -> torch.Tensor:
    """[B] to [B, num_labels]: 1 - smoothing for the class, and smoothing shared by all."""
    return torch.nn.functional.one_hot(labels, num_labels) * (1 - smoothing) + smoothing / num_labels
