# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A stack of blocks that mix and feed forward, and what transformers asks of a model. It knows nothing of tokens."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .compatibility import CACHE_NAMES
from .modeling_linear import activate, activated, draw_rows, make_linear, project
from .ops_tokens import Tokens


def draw_weights(module: nn.Module, config) -> None:
    """The weights that a module begins with, without those of its parts; its own `draw_weights(std)` if it has one."""
    std = config.initializer_range
    if getattr(config, "scaling", "logits") == "weights":
        if isinstance(module, nn.Embedding):
            std = 1.0
        elif hasattr(module, "in_features"):
            std = module.in_features**-0.5
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        draw_rows(module, std)
        if module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        initialization.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, nn.LayerNorm):
        initialization.ones_(module.weight)
        initialization.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        initialization.ones_(module.weight)
    elif hasattr(module, "draw_weights"):
        module.draw_weights(std)


def scale_queries(config, projection: nn.Module, rows: int, head_size: int) -> float:
    """The factor of dot products of queries, which are the first `rows` outputs of a projection, and keys
    [.., head_size]. Where there is none, the initial weights of these rows get it."""
    if config.scaling == "logits":
        return head_size**-0.5
    projection.smaller_rows = rows, head_size**-0.5
    return 1.0


class DynamicTanh(nn.Module):
    """weight * tanh(alpha * x) + bias in the place of a norm, with one alpha (arXiv 2503.10622)."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def draw_weights(self, std: float):
        initialization.constant_(self.alpha, 0.5)
        initialization.ones_(self.weight)
        initialization.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(self.alpha * hidden_states) + self.bias


def make_norm(config) -> nn.Module:
    """What stands before mixers, feed-forward layers and heads."""
    if config.norm_type == "dyt":
        return DynamicTanh(config.hidden_size)
    if config.norm_type == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def thinned(dropout: nn.Dropout, update: torch.Tensor) -> torch.Tensor:
    """After dropout, which costs time in a decoding step even where it changes nothing."""
    return dropout(update) if dropout.training else update


class Mixer(nn.Module):
    """What stands where attention stood. Subclasses say how tokens are mixed."""

    def draw_all(self, config) -> None:
        """The weights that a mixer has in a model of one's own; other random numbers stay what they were."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for module in self.modules():
                draw_weights(module, config)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, `intermediate_size` wide."""

    def __init__(self, config):
        super().__init__()
        intermediate_size = config.intermediate_size or 4 * config.hidden_size
        self.up_proj = make_linear(config, config.hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = make_linear(config, intermediate_size, config.hidden_size)
        self.linear_activation = config.linear_activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = activated(project(self.up_proj, hidden_states), self.linear_activation)
        hidden_states = activate(self.act_fn, hidden_states)
        return activated(project(self.down_proj, hidden_states), self.linear_activation)


class MixerBlock(GradientCheckpointingLayer):
    """
    Pre-norm residual block: x + mixer(norm(x)), then x + feed_forward(norm(x)). Subclasses name their mixer.

    Args:
        config: of the family.
        layer_idx (`int`): which layer of a cache belongs to it.
        causal (`bool`): whether a token sees only itself and earlier ones.
        draw (`bool`): whether the mixer draws its weights; a model of this package draws all of its own in one go.
    """

    mixer_class: type[Mixer]

    def __init__(self, config, layer_idx: int = 0, causal: bool = True, draw: bool = True):
        super().__init__()
        self._checkpoints = False
        self.mixer_norm = make_norm(config)
        self.mixer = self.mixer_class(config, layer_idx, causal, draw)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def gradient_checkpointing(self) -> bool:
        """Where no gradient is recorded, nothing is computed again, and the cache is needed."""
        return self._checkpoints and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._checkpoints = value

    def forward(self, hidden_states: torch.Tensor, **mixer_inputs) -> torch.Tensor:
        """hidden_states [B, T, D]; `mixer_inputs`: tokens, cache, output_attentions, as mixers take them."""
        return self._fed_forward(self._mixed(hidden_states, **mixer_inputs))

    def _mixed(self, hidden_states: torch.Tensor, **mixer_inputs) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), **mixer_inputs)
        return hidden_states + thinned(self.dropout, mixed)

    def _fed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + thinned(self.dropout, self.feed_forward(self.feed_forward_norm(hidden_states)))


class MixerPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the flags by which transformers knows what these models can do."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    # The name of the Auto class that loads a class, which is so declared to be one of the heads of its family; and the
    # task that the Hub lists it under.
    auto_class: str | None = None
    pipeline_tag: str | None = None
    # Of a family: its classes, by the names of their Auto classes.
    heads: dict[str, type] = {}

    def __init_subclass__(cls, **kwargs):
        is_family = "config_class" in cls.__dict__
        super().__init_subclass__(**kwargs)
        if is_family:
            cls.heads = cls.config_class.heads = {}
        elif cls.config_class is not None and cls.auto_class is not None:
            cls.heads.setdefault(cls.auto_class, cls)  # not what a user derives from one of them

    @torch.no_grad()
    def _init_weights(self, module):
        draw_weights(module, self.config)

    def pooled_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items: int | None = None) -> torch.Tensor:
        """
        The loss of a head that says one thing of each row of a batch.

        Args:
            logits (`Tensor` [B, num_labels]): what it says.
            labels (`Tensor` [B] or [B, num_labels]):
                Classes, or, as `config.problem_type` says, numbers. With `"single_label_classification"` floating
                point [B, num_labels] are probabilities of the classes, as mixtures of images have them.
            num_items: the number of labels in all accumulated batches, where the loss of one is its part of theirs.
        """
        if self.config.problem_type == "single_label_classification" and labels.is_floating_point():
            loss = F.cross_entropy(logits, labels.to(logits.dtype))
        else:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return loss if num_items is None else loss * (labels != -100).sum() / num_items


class MixerStack(MixerPreTrainedModel):
    """A model that has blocks and a final norm. Subclasses name their block, and make what goes in."""

    block_class: type[MixerBlock]

    def add_blocks(self, causal: bool, **block_sizes) -> None:
        """Makes `layers` and `norm`; behind what is before them in the order of parameters. `block_sizes` are what
        the blocks need to know that `config` does not say."""
        config, number = self.config, self.config.num_hidden_layers
        blocks = (self.block_class(config, i, causal, draw=False, **block_sizes) for i in range(number))
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(config)
        self.gradient_checkpointing = False

    def shared_inputs(self) -> dict:
        """What all mixers get besides, computed once. Subclasses say it."""
        return {}

    def run_blocks(
        self,
        hidden_states: torch.Tensor,
        tokens: Tokens | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        *block_inputs,
    ) -> torch.Tensor:
        """[B, T, D] through all blocks and the norm. The other arguments are those of the mixers; `block_inputs` are
        what the blocks take besides."""
        if cache is not None:
            cache.layers[0].unfinished = True
        shared = self.shared_inputs()
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                *block_inputs,
                tokens=tokens,
                cache=cache,
                output_attentions=output_attentions,
                **shared,
            )
        if cache is not None:
            cache.layers[0].unfinished = False
        return self.norm(hidden_states)
