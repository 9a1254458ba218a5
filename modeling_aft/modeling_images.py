# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The image model: patches and their places below a stack of blocks, and what is checked before it runs; its head."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .compatibility import refuse_unknown
from .configuration_aft_vision import sides
from .modeling_stack import MixerBlock, MixerPreTrainedModel, MixerStack
from .ops_modes import can_read
from .ops_tokens import Tokens, count_tokens, mean_kept, refused


# What a forward pass knows beside its parameters.
KEYWORDS = frozenset(["output_hidden_states", "output_attentions"])


class PatchEmbeddings(nn.Module):
    """Cuts images into patches, and makes a vector of each."""

    def __init__(self, config):
        super().__init__()
        self.patch_size, self.num_channels = sides(config.patch_size), config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """
        The rows and columns of patches of images [B, C, H, W].

        Raises:
            ValueError: for another number of dimensions or channels, or sides that are no multiples of the patch.
        """
        rows, columns = self.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            allowed = f"[B, {self.num_channels}, height, width]: config.num_channels is {self.num_channels}"
            raise refused("pixel_values", allowed, list(pixel_values.shape))
        if not pixel_values.is_floating_point():
            raise refused("pixel_values", "floating point, as an image processor makes them", pixel_values.dtype)
        batch, _, height, width = pixel_values.shape
        if batch < 1 or height < 1 or width < 1 or height % rows or width % columns:
            allowed = f"images whose sides are multiples of {rows} x {columns}, the size of a patch"
            raise refused("pixel_values", allowed, list(pixel_values.shape))
        return height // rows, width // columns

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, N, D], in raster order, of images [B, C, H, W]."""
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).mT

    def kept(self, pixel_mask: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Which patches are there: [B, N] bool for a mask [B, H, W] of pixels.

        Raises:
            ValueError: the mask has another shape, or ends within a patch.
        """
        batch, _, height, width = pixel_values.shape
        if pixel_mask.shape != (batch, height, width):
            raise refused("pixel_mask", f"[{batch}, {height}, {width}]", list(pixel_mask.shape))
        rows, columns = self.patch_size
        pixels = (pixel_mask != 0).unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [B, R, rows, C, columns]
        keep = pixels.amax((2, 4))
        if pixel_mask.device.type == "cpu" and can_read(pixel_mask) and bool((keep != pixels.amin((2, 4))).any()):
            allowed = f"0 or 1 for whole patches of {rows} x {columns} pixels"
            raise refused("pixel_mask", allowed, "a mask that ends within a patch")
        return keep.flatten(1)


def resample(table: torch.Tensor, before: tuple[int, int], after: tuple[int, int], lead: int) -> torch.Tensor:
    """
    A table of places for another grid, as ViT does it: bicubic.

    Args:
        table (`Tensor` [lead + R x C, D]): a row per place, in raster order.
        before, after: rows and columns of the grid that it has, and of that which is wanted.
        lead: how many places stand before the grid, and stay what they are.
    """
    if tuple(before) == tuple(after):
        return table
    places = table[lead:].T.unflatten(1, before)[None]
    places = F.interpolate(places, size=tuple(after), mode="bicubic", align_corners=False)
    return torch.cat([table[:lead], places[0].flatten(1).T])


class DropPath(nn.Module):
    """Leaves out what a layer adds, for whole images at random, and scales the rest (arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, added: torch.Tensor) -> torch.Tensor:
        """[B, T, D]; as it is outside of training."""
        if not self.training or self.rate == 0:
            return added
        kept = torch.rand(added.shape[0], 1, 1, dtype=torch.float32, device=added.device) >= self.rate
        return added * (kept / (1 - self.rate)).to(added.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class ImageBlock(MixerBlock):
    """A block that training leaves out now and then, the deeper the more often. Subclasses name their mixer."""

    def __init__(self, config, layer_idx: int = 0, causal: bool = False, draw: bool = True):
        super().__init__(config, layer_idx, causal, draw)
        rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)
        self.dropout = nn.Sequential(self.dropout, DropPath(rate))


class ImageInputs:
    """By what transformers knows the input of a model of images, and the module that takes it."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embeddings"


class MixerImageModel(ImageInputs, MixerStack):
    """Patches, and their places, blocks, final norm, and what stands for the image. Subclasses name their block."""

    auto_class = "AutoModel"
    pipeline_tag = "image-feature-extraction"

    def __init__(self, config):
        super().__init__(config)
        config.validate_fields()
        self.lead = config.lead
        self.patch_embeddings = PatchEmbeddings(config)
        self.class_token = nn.Parameter(torch.empty(config.hidden_size)) if self.lead else None
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.add_blocks(causal=False)
        self.post_init()

    def draw_weights(self, std: float):
        for parameter in (self.class_token, self.position_embeddings):
            if parameter is not None:
                initialization.normal_(parameter, mean=0.0, std=std)

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`FloatTensor` [B, C, H, W]): images, as an image processor makes them.
            pixel_mask (`Tensor` [B, H, W], *optional*):
                1 or True for a pixel, 0 or False for what makes images of several sizes one batch; whole patches. A
                padded patch is seen by none, and does not count in the mean.
            interpolate_pos_encoding (`bool`):
                Whether to resample the tables of a model that has some for images of another size, bicubic, as ViT
                does it. Those of AFT-conv fit any.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `BaseModelOutputWithPooling` with `last_hidden_state` [B, T, D], the class token first if there is one, and
            `pooler_output` [B, D]: it, or the mean of the patches.

        Raises:
            ValueError: for images that do not fit together with their mask, the patches or the tables.
            TypeError: for a keyword that is not among these.
        """
        refuse_unknown(self, kwargs, KEYWORDS)
        if pixel_values is None:
            raise refused("pixel_values", "given", None)
        grid = self.patch_embeddings.grid(pixel_values)
        self._check_grid(grid, interpolate_pos_encoding)
        hidden_states = self.patch_embeddings(pixel_values)
        tokens = Tokens(grid=grid)
        if pixel_mask is not None:
            tokens = self._read(self.patch_embeddings.kept(pixel_mask, pixel_values), grid)
        if self.class_token is not None:
            token = self.class_token.to(hidden_states.dtype).expand(hidden_states.shape[0], 1, -1)
            hidden_states = torch.cat([token, hidden_states], 1)
        if self.position_embeddings is not None:
            table = resample(self.position_embeddings, self.config.grid, grid, self.lead)
            hidden_states = hidden_states + table.to(hidden_states.dtype)
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self.run_blocks(self.dropout(hidden_states), tokens, output_attentions=output_attentions)
        pooled = hidden_states[:, 0] if self.lead else mean_kept(hidden_states, tokens.keep)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _read(self, keep: torch.Tensor, grid: tuple[int, int]) -> Tokens:
        """The tokens of images of which some patches are there: each stays at its place of the grid."""
        keep = F.pad(keep, (self.lead, 0), value=True)
        places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        return count_tokens(keep, places)._replace(grid=grid)

    def _check_grid(self, grid: tuple[int, int], interpolate: bool) -> None:
        config = self.config
        if not config.has_position_table or grid == config.grid:
            return
        rows, columns = sides(config.patch_size)
        given = f"images of {grid[0] * rows} x {grid[1] * columns}"
        own = "images of {} x {}".format(*sides(config.image_size))
        if not interpolate:
            allowed = f"{own}, which the tables of this model are for, or interpolate_pos_encoding True"
            raise refused("pixel_values", allowed, given)
        if config.aft_type == "local":
            allowed = f"False for aft_type='local', whose table of biases is for {own}"
            raise refused("interpolate_pos_encoding", allowed, f"True for {given}")


class MixerForImageClassification(ImageInputs, MixerPreTrainedModel):
    """An image model with a linear layer on what stands for an image. Subclasses name the model."""

    auto_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    model_class: type[MixerImageModel]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        has_classes = config.num_labels > 0  # none: what stands for the image is the answer
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if has_classes else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            labels (`Tensor` [B] or [B, num_labels], *optional*):
                Classes, or, as `config.problem_type` says, numbers. Floating point [B, num_labels] with
                `"single_label_classification"` are probabilities of the classes, as mixup and cutmix make them.

            The other arguments are those of the model without a head, and `num_items_in_batch`, with which Trainer
            accumulates gradients.

        Returns:
            `ImageClassifierOutput` with `logits` [B, num_labels] and, if labels are given, `loss`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        refuse_unknown(self, kwargs, KEYWORDS)
        outputs = self.model(
            pixel_values, pixel_mask=pixel_mask, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.pooled_loss(logits, labels, num_items)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
