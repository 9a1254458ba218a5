# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures that a language model of sub-pixels draws: samples, and completions of what is given of a picture."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM

from aft.atomic_files import replacing
from aft.generation import find_device
from aft.picture_data import check_picture_model, load_pictures
from aft.saved_models import load_config, load_model, shape_of_model
from aft.vocabulary import START_OF_PICTURE, PixelVocabulary


TRIES = 4  # completions of each picture
GAP = 2  # pixels between two pictures of a grid


@torch.no_grad()
def draw_pictures(
    model, shape: tuple[int, int, int], prompts: np.ndarray, seed: int, batch_size: int, **sampling
) -> np.ndarray:
    """
    Pictures that begin with what is given of them, and are sampled from there on.

    Args:
        model: a causal language model of sub-pixels with a start token.
        shape: height, width and channels.
        prompts (`ndarray` [N, P]): the first sub-pixels of each, uint8; P may be 0.
        seed (`int`): of the samples.
        batch_size (`int`): how many are drawn at once, which changes them.
        sampling: options of `generate`, as `temperature`; by default the distribution of the model as it is.

    Returns:
        uint8 [N, H, W, C].
    """
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    options = {"temperature": 1.0, "top_p": 1.0, "pad_token_id": 0, **sampling}
    config, made = PixelVocabulary(shape).processor().generation_config(**options), []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size].astype(np.int64)
        ids = torch.from_numpy(np.insert(rows, 0, START_OF_PICTURE, axis=1)).to(model.device)
        made.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, 1:].cpu().numpy()
        )
    model.train(was_training)
    return np.concatenate(made).astype(np.uint8).reshape(len(prompts), *shape)


def draw_samples(model, shape: tuple[int, int, int], count: int, seed: int, batch_size: int, **sampling) -> np.ndarray:
    """A grid of `count` pictures from nothing, uint8 [H, W, C]; the arguments are those of `draw_pictures`."""
    made = draw_pictures(model, shape, np.zeros((count, 0), dtype=np.uint8), seed, batch_size, **sampling)
    columns = math.ceil(math.sqrt(count))
    blank = np.full((-count % columns, *shape), 255, dtype=np.uint8)
    return as_grid(np.concatenate([made, blank]).reshape(-1, columns, *shape))


def draw_completions(model, pictures: np.ndarray, rows: int, seed: int, batch_size: int, **sampling) -> np.ndarray:
    """
    A grid of pictures that the model completes: in each row what is given, `TRIES` samples, and the picture itself.

    Args:
        pictures (`ndarray` [N, H, W, C]): uint8.
        rows (`int`): how many rows of pixels are given.

    Returns:
        uint8 [H, W, C].
    """
    shape = pictures.shape[1:]
    prompts = np.repeat(pictures[:, :rows].reshape(len(pictures), -1), TRIES, axis=0)
    made = draw_pictures(model, shape, prompts, seed, batch_size, **sampling).reshape(-1, TRIES, *shape)
    given = pictures.copy()
    given[:, rows:] = 128  # grey
    return as_grid(np.concatenate([given[:, None], made, pictures[:, None]], axis=1))


def as_grid(pictures: np.ndarray) -> np.ndarray:
    """One picture of many: uint8 [rows, columns, H, W, C] to [H, W, C]."""
    rows, columns, height, width, channels = pictures.shape
    grid = np.full((rows, height + GAP, columns, width + GAP, channels), 255, dtype=np.uint8)
    grid[:, :height, :, :width] = pictures.transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * (height + GAP), columns * (width + GAP), channels)[:-GAP, :-GAP]


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Writes uint8 [H, W, C] as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(temporary, format="PNG")


def paint(args: argparse.Namespace) -> None:
    """
    Draws pictures with the flags of `aft paint`.

    Raises:
        ValueError: the device is not there, or the model is none of pictures, whole and finite, or the pictures to
            complete cannot be read.
    """
    device = find_device(args.device, "aft paint")
    transformers.utils.logging.disable_progress_bar()
    trust = {"trust_remote_code": args.trust_remote_code}
    config, name = load_config(args.model, **trust), f"--model {args.model}"
    shape = shape_of_model(args.model)
    if shape is None:
        raise ValueError(f"{name}: must be a model of pictures, with a preprocessor_config.json that has their size")
    check_picture_model(config, shape, name)
    pictures, rows = None, shape[0] // 2 if args.rows is None else args.rows
    if args.pictures is not None:
        if not 1 <= rows < shape[0]:
            raise ValueError(f"--rows must be in [1, {shape[0] - 1}] for pictures of {shape[0]} rows, got {rows}")
        pictures = load_pictures(args, shape).splits[args.split][: args.samples]
    model, _ = load_model(AutoModelForCausalLM, args.model, dtype=getattr(torch, args.dtype), **trust)
    model.to(device)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    options = {"seed": args.seed, "batch_size": args.batch_size, **sampling}
    if pictures is None:
        grid = draw_samples(model, shape, args.samples, **options)
    else:
        grid = draw_completions(model, pictures, rows, **options)
    save_picture(grid, args.output)
    print(f"wrote {args.output}")
