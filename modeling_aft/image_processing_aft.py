# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures as sequences of sub-pixels, for causal language models of pictures, and such sequences as pictures."""

import math
from typing import TypedDict

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput, is_pil_image
from transformers.utils import is_vision_available, requires_backends


if is_vision_available():
    from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB"}  # of PIL, by the number of channels
NUM_VALUES = 256  # of a sub-pixel: they are its ids
# What else a saved processor has in its file, and the library passes on.
SERVICE_FIELDS = ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class")


class AFTImageProcessorFields(TypedDict, total=False):
    """What a saved [`AFTImageProcessor`] can be told anew when it is loaded."""

    size: dict[str, int]
    num_channels: int
    do_resize: bool
    resample: int
    add_bos_token: bool
    bos_token_id: int


class AFTImageProcessor(BaseImageProcessor):
    r"""
    Makes sequences of sub-pixels of pictures, and pictures of such sequences: the `input_ids` of a causal language
    model of pictures. The id of a sub-pixel is its value, 0 to 255, and the order is that of the raster: rows from the
    top, pixels from the left, and the channels of a pixel next to each other. Before the first stands a start token.
    Pictures of the size and the colours of the processor come back exactly as they were.

    A model of such sequences has `vocab_size=257` and `max_position_embeddings` of `height x width x num_channels`:
    it reads the start token and all but the last sub-pixel, and predicts every sub-pixel. `generation_config` tells
    its `generate` to make pictures.

    Args:
        size (`dict`, *optional*, defaults to `{"height": 32, "width": 32}`):
            The size of the pictures.
        num_channels (`int`, defaults to 3):
            3 for RGB, 1 for grey. Pictures of other colours are converted as PIL does it; transparency is left out.
        do_resize (`bool`, defaults to `True`):
            Whether a picture of another size is scaled until it covers `size`, and what is over cut off on both sides.
            Otherwise it is refused.
        resample (`int`, defaults to 3):
            How it is scaled, as a `PIL.Image.Resampling`; 3 is bicubic.
        add_bos_token (`bool`, defaults to `True`):
            Whether sequences begin with the start token.
        bos_token_id (`int`, defaults to 256):
            The id of the start token, beyond those of sub-pixels.

    Raises:
        ValueError: one error that lists every field with a value that is not allowed.
        TypeError: a field is unknown.

    Example:

    ```python
    >>> import numpy as np

    >>> from modeling_aft import AFTImageProcessor

    >>> processor = AFTImageProcessor(size={"height": 2, "width": 2}, num_channels=1)
    >>> input_ids = processor(np.array([[0, 10], [20, 255]], dtype=np.uint8)).input_ids
    >>> input_ids
    tensor([[256,   0,  10,  20, 255]])
    >>> processor.postprocess(input_ids)[0].getpixel((1, 1))
    255
    ```"""

    model_input_names = ["input_ids"]
    valid_kwargs = AFTImageProcessorFields

    def __init__(
        self,
        size: dict[str, int] | None = None,
        num_channels: int = 3,
        do_resize: bool = True,
        resample: int = 3,
        add_bos_token: bool = True,
        bos_token_id: int = NUM_VALUES,
        **kwargs,
    ):
        requires_backends(self, "vision")
        if unknown := sorted(name for name in kwargs if name not in SERVICE_FIELDS):
            allowed = ", ".join(AFTImageProcessorFields.__annotations__)
            raise TypeError(f"AFTImageProcessor() got unexpected fields {', '.join(unknown)}; allowed: {allowed}.")
        super().__init__(**kwargs)
        self.size = {"height": 32, "width": 32} if size is None else size
        self.num_channels = num_channels
        self.do_resize = do_resize
        self.resample = resample
        self.add_bos_token = add_bos_token
        self.bos_token_id = bos_token_id
        problems = []
        is_size = isinstance(self.size, dict) and set(self.size) == {"height", "width"}
        if not is_size or not all(is_count(side, 1) for side in self.size.values()):
            problems.append(f"`size` must be a dict of height and width, both at least 1, got {size!r}")
        if not is_count(num_channels, 1) or num_channels not in MODES:
            problems.append(f"`num_channels` must be 1 or 3, got {num_channels!r}")
        methods = [int(method) for method in Image.Resampling]
        if not is_count(resample, 0) or resample not in methods:
            problems.append(f"`resample` must be one of {', '.join(map(str, sorted(methods)))}, got {resample!r}")
        for name in ("do_resize", "add_bos_token"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        if not is_count(bos_token_id, NUM_VALUES):
            problems.append(f"`bos_token_id` must be at least {NUM_VALUES}, got {bos_token_id!r}")
        if problems:
            raise ValueError("AFTImageProcessor: " + "; ".join(problems) + ".")
        self.resample = int(resample)  # of an enumeration, in a file

    @property
    def shape(self) -> tuple[int, int, int]:
        """The height, width and channels of a picture."""
        return self.size["height"], self.size["width"], self.num_channels

    @property
    def num_subpixels(self) -> int:
        """How many sub-pixels a picture has, and so positions a model."""
        return math.prod(self.shape)

    def generation_config(self, **options) -> GenerationConfig:
        """
        How a model makes whole pictures, of nothing but the start token or of their upper rows: it draws sub-pixels
        from all 256, never the start token, until none is missing. It is saved with the model whose
        `generation_config` it becomes.

        Args:
            options: those of a [`GenerationConfig`] that are to be different.
        """
        drawing = {"do_sample": True, "top_k": 0, "bos_token_id": self.bos_token_id}
        ends = {"max_length": self.add_bos_token + self.num_subpixels, "suppress_tokens": [self.bos_token_id]}
        return GenerationConfig(**{**drawing, **ends, **options})

    def preprocess(
        self,
        images: ImageInput,
        num_rows: int | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        The sequences of pictures.

        Args:
            images:
                A picture or a list of them: of PIL; arrays or tensors, uint8, [H, W], [H, W, C] or [C, H, W]; paths or
                addresses. An array of four dimensions is a batch.
            num_rows (`int`, *optional*):
                How many rows, from the top, the sequences hold: a prompt that a model completes. None is all.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for tensors, `"np"` or None for arrays.

        Returns:
            `BatchFeature` with `input_ids` int64 [B, N], where N is the number of sub-pixels and 1 for the start.

        Raises:
            ValueError: for what is no picture of this processor, no count of its rows, or a batch of none.
        """
        if input_data_format not in (None, "channels_first", "channels_last"):
            allowed = "None, 'channels_first' or 'channels_last'"
            raise ValueError(f"`input_data_format` must be {allowed}, got {input_data_format!r}.")
        if num_rows is not None and (not is_count(num_rows, 0) or num_rows > self.size["height"]):
            raise ValueError(f"`num_rows` must be None or 0 to {self.size['height']}, the height, got {num_rows!r}.")
        is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        pictures = [self.to_picture(image, input_data_format) for image in (images if is_batch else [images])]
        if not pictures:
            raise ValueError("`images` must hold at least one picture, got none.")
        ids = np.stack([np.asarray(picture).reshape(-1) for picture in pictures]).astype(np.int64)
        if num_rows is not None:
            ids = ids[:, : num_rows * math.prod(self.shape[1:])]
        if self.add_bos_token:
            ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=self.bos_token_id)
        return BatchFeature({"input_ids": ids}, tensor_type=return_tensors)

    def to_picture(self, image: ImageInput, input_data_format: str | None = None) -> "Image.Image":
        """
        A picture of the size and the colours of this processor.

        Raises:
            ValueError: for what is no picture, has other values than 8 bits hold, or has another size if `do_resize`
                is False.
        """
        if isinstance(image, str):
            image = self.fetch_images(image)
        if not is_pil_image(image):
            image = array_to_picture(image, self.shape[:2], input_data_format)
        if image.mode[0] in "IF":
            raise ValueError(f"`images` must have channels of 8 bits, got a picture of mode {image.mode!r}.")
        image = image.convert(MODES[self.num_channels])
        height, width, _ = self.shape
        if image.size == (width, height):
            return image
        if not self.do_resize:
            allowed = f"{height} high and {width} wide, or `do_resize` True"
            raise ValueError(f"`images` must be {allowed}, got a picture {image.height} high and {image.width} wide.")
        return ImageOps.fit(image, (width, height), method=self.resample)

    def postprocess(self, input_ids, fill_value: int | None = None) -> "list[Image.Image]":
        """
        The pictures of sequences, as `generate` returns them.

        Args:
            input_ids (`LongTensor` [B, N] or [N], or arrays or lists of that shape):
                Sub-pixels, with or without a start token before them.
            fill_value (`int`, *optional*):
                The value of the sub-pixels that are missing at the end of the sequences. None: they have to be whole.

        Raises:
            ValueError: an id is no sub-pixel, or there are too few or too many.
        """
        if fill_value is not None and (not is_count(fill_value, 0) or fill_value >= NUM_VALUES):
            raise ValueError(f"`fill_value` must be None or 0 to {NUM_VALUES - 1}, got {fill_value!r}.")
        ids = np.asarray(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"`input_ids` must be integers [B, N] or [N], got {ids.dtype} {list(ids.shape)}.")
        return [self.sequence_to_picture(row, fill_value) for row in np.atleast_2d(ids)]

    def sequence_to_picture(self, ids: np.ndarray, fill_value: int | None) -> "Image.Image":
        """The picture of one sequence [N]; see `postprocess`."""
        if len(ids) and ids[0] == self.bos_token_id:
            ids = ids[1:]
        missing = self.num_subpixels - len(ids)
        if missing < 0 or (missing and fill_value is None):
            more = ", or a `fill_value` for those that are missing" if missing > 0 else ""
            raise ValueError(
                f"`input_ids` must be {self.num_subpixels} sub-pixels of a picture{more}, got {len(ids)}."
            )
        if wrong := sorted({int(i) for i in ids if not 0 <= i < NUM_VALUES}):
            allowed = f"0 to {NUM_VALUES - 1} after the start"
            raise ValueError(f"`input_ids` must be sub-pixels, {allowed}, got {', '.join(map(str, wrong))}.")
        values = np.pad(ids.astype(np.uint8), (0, missing), constant_values=fill_value or 0)
        return Image.fromarray(values.reshape(self.shape if self.num_channels > 1 else self.shape[:2]))


def array_to_picture(image, size: tuple[int, int], input_data_format: str | None) -> "Image.Image":
    """
    The picture in an array or a tensor. Where it could be [H, W, C] or [C, H, W], `size` (H, W) decides.

    Raises:
        ValueError: it is none, could be either, or its values are not uint8, so that what they mean is open.
    """
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"`images` must be pictures of PIL, arrays or tensors, got {type(image).__name__}.")
    if image.dtype != np.uint8:
        raise ValueError(f"`images` must be uint8, 0 to 255, where they are arrays, got {image.dtype}.")
    layouts = {}
    if image.ndim == 2:
        layouts = {None: image[..., None]}
    elif image.ndim == 3:
        layouts = {"channels_last": image, "channels_first": np.moveaxis(image, 0, -1)}
    layouts = {name: found for name, found in layouts.items() if found.size and found.shape[-1] in (1, 3, 4)}
    if len(layouts) == 2:
        named = {name: found for name, found in layouts.items() if name == input_data_format}
        layouts = named or {name: found for name, found in layouts.items() if found.shape[:2] == size}
    if len(layouts) != 1:
        raise ValueError(
            "`images` must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, or a batch of four dimensions, "
            f"where they are arrays, and `input_data_format` say which if both fit, got {list(image.shape)}."
        )
    (image,) = layouts.values()
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def is_count(value, least: int) -> bool:
    """Whether a value is an integer, and no bool, of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


__all__ = ["AFTImageProcessor"]
