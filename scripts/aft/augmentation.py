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
from PIL import Image, ImageEnhance


def random_crop_box(width: int, height: int, least: float, generator: np.random.Generator) -> tuple[int, ...]:
    """
    A part of a picture, (left, top, right, bottom): between `least` and all of its area, its sides as 3:4 to 4:3.
    After ten that do not fit, the largest in the middle of such sides.
    """
    for _ in range(10):
        area = width * height * generator.uniform(least, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(
    picture: Image.Image, side: tuple[int, int], least: float, generator: np.random.Generator
) -> Image.Image:
    """A random part of a picture, made to a height and a width."""
    box = random_crop_box(*picture.size, least, generator)
    return picture.resize(side[::-1], Image.Resampling.BICUBIC, box=box)


def padded_crop(pixels: np.ndarray, padding: int, generator: np.random.Generator) -> np.ndarray:
    """A picture [C, H, W] shifted by up to `padding` pixels each way; black comes in."""
    top, left = generator.integers(2 * padding + 1, size=2)
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
    return padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]]


def jitter(picture: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast and colour, in random order, by factors in 1 - share to 1 + share."""
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in generator.permutation(len(changes)):
        picture = changes[index](picture).enhance(generator.uniform(1 - share, 1 + share))
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
