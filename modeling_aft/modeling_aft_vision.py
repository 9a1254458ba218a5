# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Attention Free Transformer for images: mixer, model, classifier, and its weights from those of a ViT or DeiT."""

import copy

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .compatibility import list_in_library
from .configuration_aft_vision import AFTVisionConfig
from .modeling_attention_free import AFTMixer, ConvPositionBias, PositionBias, RelativePositionBias
from .modeling_images import ImageBlock, MixerForImageClassification, MixerImageModel, resample
from .modeling_stack import MixerPreTrainedModel
from .ops_tokens import Tokens, refused


logger = logging.get_logger(__name__)
SOURCES = ("vit", "deit")  # model types whose weights can be taken over


class KernelPositionBias(RelativePositionBias):
    """A bias per head and offset in the grid, learned as it is."""

    def __init__(self, config):
        super().__init__(config, 0, config.kernel_size**2 - 1)
        self.side = config.kernel_size

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[H, k, k] for any positions."""
        return super().forward(positions).reshape(-1, self.side, self.side)


class ConvKernelPositionBias(KernelPositionBias, ConvPositionBias):
    """The bias of AFT-conv on a grid (eq. 6), standardised over all of a head's kernel and then scaled and shifted
    (eq. 8)."""


class AFTVisionMixer(AFTMixer):
    """[`AFTMixer`] over the patches of images, bidirectional; that of conv knows the grid in which they stand."""

    def __init__(self, config: AFTVisionConfig, layer_idx: int = 0, causal: bool = False, draw: bool = True):
        super().__init__(config, layer_idx, causal, draw)
        self.grid, self.lead = config.grid, config.lead

    def make_position_bias(self, config: AFTVisionConfig, left: int, right: int) -> PositionBias | None:
        if config.aft_type != "conv":
            return super().make_position_bias(config, left, right)
        return (ConvKernelPositionBias if config.conv_reparameterization else KernelPositionBias)(config)

    def biases(self, key: torch.Tensor, tokens: Tokens) -> dict:
        bias = self.position_bias
        if isinstance(bias, KernelPositionBias):
            return {"window_bias": bias(None), "grid": tokens.grid}
        if bias.argument == "position_bias" and tokens.grid != self.grid:
            return {"position_bias": self._resampled(tokens.grid)}
        return super().biases(key, tokens)

    def _resampled(self, grid: tuple[int, int]) -> torch.Tensor:
        """[N, N] of AFT-full for another grid than that of its tables."""

        def resampled(table: torch.Tensor) -> torch.Tensor:
            return resample(table, self.grid, grid, self.lead)

        bias = self.position_bias
        if bias.table is not None:
            return resampled(resampled(bias.table).T).T
        return resampled(bias.query_factors) @ resampled(bias.key_factors).T


class AFTVisionBlock(ImageBlock):
    mixer_class = AFTVisionMixer


class AFTVisionPreTrainedModel(MixerPreTrainedModel):
    config_class = AFTVisionConfig
    _no_split_modules = ["AFTVisionBlock"]
    _can_record_outputs = {"hidden_states": AFTVisionBlock, "attentions": AFTVisionMixer}


class AFTVisionModel(AFTVisionPreTrainedModel, MixerImageModel):
    """The Attention Free Transformer for images without a head: see [`AFTVisionConfig`] for its forms."""

    block_class = AFTVisionBlock


class AFTForImageClassification(AFTVisionPreTrainedModel, MixerForImageClassification):
    """The Attention Free Transformer with a classifier of images."""

    model_class = AFTVisionModel

    @classmethod
    def from_vit(
        cls, vit: PreTrainedModel, *, gate_bias: float | None = None, output_loading_info: bool = False, **changes
    ) -> "AFTForImageClassification | tuple[AFTForImageClassification, dict[str, list[str]]]":
        r"""
        An AFT that begins with the weights of a ViT or DeiT, as the paper does it (table 8): all but queries, keys,
        class token and position embeddings. With `aft_type="full"` or another that has them, the latter too.

        It must be trained before it says anything: its keys and biases are new, and its head, made for a class token,
        sees the mean of patches.

        Args:
            vit (`PreTrainedModel`):
                A loaded model of type vit or deit, with a classifier or without; of the two of a distilled DeiT, that
                of the class token is taken.
            gate_bias (`float`, *optional*):
                The bias that all queries begin with, 0 by default, where their gate halves what each layer adds.
            output_loading_info (`bool`): whether to return what became of the weights as well.
            changes: fields of [`AFTVisionConfig`], as `kernel_size` and `num_attention_heads`. The sizes are those of
                `vit`.

        Returns:
            The model in evaluation mode, in the dtype and on the device of `vit`; and, if wanted, the names "copied"
            and "new" of its weights, and "left_out" of those of `vit`.

        Raises:
            ValueError: `vit` is another model, or a field does not go with its weights.
        """
        model_type = getattr(getattr(vit, "config", None), "model_type", None)
        if model_type not in SOURCES:
            raise refused("vit", f"a loaded model of type {' or '.join(SOURCES)}", type(vit).__name__)
        if fixed := [name for name in changes if name in (*TAKEN_FIELDS, *OTHER_LAYERS)]:
            raise refused(fixed[0], "left out: it is that of `vit`", repr(changes[fixed[0]]))
        width = vit.config.num_attention_heads * getattr(vit.config, "head_dim", 0)
        if width not in (0, vit.config.hidden_size):
            raise refused("vit", f"one whose heads share out its hidden_size of {vit.config.hidden_size}", width)
        fields = {name: copy.deepcopy(getattr(vit.config, name)) for name in TAKEN_FIELDS}
        config = AFTVisionConfig(**fields, **changes)
        if gate_bias is not None and not config.qkv_bias:
            raise refused("gate_bias", "None for a `vit` whose projections have no bias", gate_bias)
        model = cls(config).to(vit.device, vit.dtype).eval()
        found = _take_over(model, vit)
        if gate_bias is not None:
            for layer in model.model.layers:
                layer.mixer.qkv_proj.bias.data[: config.hidden_size] = gate_bias
        logger.warning(
            f"{len(found['copied'])} weights of {cls.__name__} come from {type(vit).__name__}. Queries, keys and "
            f"{len(found['new'])} others are new and must be trained, and {len(found['left_out'])} were left out "
            "(output_loading_info=True names them)."
        )
        return (model, found) if output_loading_info else model


# The fields of a ViT's configuration that its weights decide, or that mean the same here.
TAKEN_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "hidden_act",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "layer_norm_eps",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
)
# Those of layers that a ViT has not.
OTHER_LAYERS = ("norm_type", "linear_fan_in", "linear_activation", "num_labels")
# The parts of a block, here and there; of the first, values are the last rows.
PARTS = {
    "mixer.qkv_proj": "attention.v_proj",
    "mixer.o_proj": "attention.o_proj",
    "mixer_norm": "layernorm_before",
    "feed_forward_norm": "layernorm_after",
    "feed_forward.up_proj": "mlp.fc1",
    "feed_forward.down_proj": "mlp.fc2",
}


@torch.no_grad()
def _take_over(model: AFTForImageClassification, vit: PreTrainedModel) -> dict[str, list[str]]:
    """Copies what there is a place for, and says what became of all weights."""
    target, source = dict(model.named_parameters()), dict(vit.named_parameters())
    body = f"{vit.base_model_prefix}." if hasattr(vit, vit.base_model_prefix) else ""
    parts = {"model.patch_embeddings.projection": f"{body}embeddings.patch_embeddings.projection"}
    parts |= {"model.norm": f"{body}layernorm", "classifier": "classifier"}
    if "cls_classifier.weight" in source:  # a distilled DeiT
        parts["classifier"] = "cls_classifier"
    for i in range(model.config.num_hidden_layers):
        parts |= {f"model.layers.{i}.{here}": f"{body}layers.{i}.{there}" for here, there in PARTS.items()}
    names = {f"{here}.{kind}": f"{there}.{kind}" for here, there in parts.items() for kind in ("weight", "bias")}
    names["model.class_token"] = f"{body}embeddings.cls_token"
    names["model.position_embeddings"] = f"{body}embeddings.position_embeddings"
    names = {here: there for here, there in names.items() if here in target and there in source}
    rows, columns = model.config.grid
    for here, there in names.items():
        place, values = target[here], source[there]
        if here == "model.class_token":
            values = values.flatten()
        elif here == "model.position_embeddings":  # a distilled DeiT has one more place before the patches
            values = torch.cat([values[0, : model.config.lead], values[0, -rows * columns :]])
        place[len(place) - len(values) :].copy_(values)
    used = set(names.values())
    return {
        "copied": list(names),
        "new": [name for name in target if name not in names],
        "left_out": [name for name in source if name not in used],
    }


list_in_library(AFTVisionPreTrainedModel)

_heads = [head.__name__ for head in AFTVisionPreTrainedModel.heads.values()]
__all__ = ["AFTVisionMixer", "AFTVisionPreTrainedModel", *_heads]
