# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Attention Free Transformer (arXiv 2105.14103): mixer, model, language model."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization

from .cache_state import GrowingStateLayer, NewTokens, StateLayer, commit_state, read_state
from .compatibility import list_in_library
from .configuration_aft import AFTConfig
from .modeling_causal_lm import MixerForCausalLM, StateGenerationMixin
from .modeling_heads import MixerForMaskedLM, MixerForSequenceClassification, MixerForTokenClassification
from .modeling_linear import activated, is_watched, make_linear, project
from .modeling_stack import Mixer, MixerBlock, MixerPreTrainedModel
from .modeling_text import MixerModel
from .modeling_tokens import read_tokens
from .ops import attend, weights
from .ops_modes import is_exporting, is_static, leading, without_autocast
from .ops_state import AFTState, Call, advance, compute_dtype
from .ops_step import AHEAD, ROOM, RecentTokens
from .ops_tokens import Tokens, refused
from .ops_windows import bias_rows


FACTOR_STD = 0.01  # of u and v in w = u v^T


class PositionBias(nn.Module):
    """The bias w of the keys. Hooks on modules, as tools for private training set them, see tensors alone.

    Attributes:
        argument: the name under which the operator takes the bias.
    """

    argument = "window_bias"

    def of_run(self, positions: torch.Tensor) -> torch.Tensor:
        """The same for positions [B, T], each of which is one of the T that begin with the first of its row. Nobody
        watches the module then."""
        return self(positions)


class TablePositionBias(PositionBias):
    """A bias per position and offset or key position: factors u, v [N, d'] with w = u v^T (eq. 7), or a table.

    Subclasses give the `table` [N, columns] where the config has no rank.
    """

    def __init__(self, config, columns: int):
        super().__init__()
        length, rank = config.max_position_embeddings, config.position_bias_rank
        self.table = nn.Parameter(torch.empty(length, columns)) if rank is None else None
        self.query_factors = nn.Parameter(torch.empty(length, rank)) if rank is not None else None
        self.key_factors = nn.Parameter(torch.empty(length, rank)) if rank is not None else None

    def draw_weights(self, std: float):
        if self.table is not None:
            initialization.zeros_(self.table)
        else:
            initialization.normal_(self.query_factors, mean=0.0, std=FACTOR_STD)
            initialization.normal_(self.key_factors, mean=0.0, std=FACTOR_STD)


class FullPositionBias(TablePositionBias):
    """The bias w_{t,t'} of AFT-full."""

    argument = "position_bias"

    def __init__(self, config):
        super().__init__(config, config.max_position_embeddings)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[T, T] for positions [T], of which only the number is read, for 0 to T - 1; [B, T, N] for those [B, T]."""
        shared, length = positions.dim() == 1, positions.shape[-1]
        if self.table is not None:
            return leading(leading(self.table, 0, length), 1, length) if shared else self.table[positions]
        if shared:
            return leading(self.query_factors, 0, length) @ leading(self.key_factors, 0, length).T
        return self.query_factors[positions] @ self.key_factors.T


class LocalPositionBias(TablePositionBias):
    """The bias of AFT-local (eq. 4): the entries of w inside the window, one row of `taps` offsets per position.

    With a rank, w = u v^T as in AFT-full, of which only the band of the window is ever computed, in O(N s d').
    """

    def __init__(self, config, left: int, right: int):
        super().__init__(config, left + 1 + right)
        self.left, self.right = left, right

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[1, T, taps] for positions [T], of which only the number is read, for 0 to T - 1; [1, B, T, taps] for those
        [B, T]."""
        shared, length = positions.dim() == 1, positions.shape[-1]
        if not shared and self.table is None and (length == 1 or (length <= ROOM and not is_static())):
            return self._few_rows(positions.reshape(-1, 1)).view(1, *positions.shape, -1)
        bias = self.table
        if bias is None:
            # In an exported program the number of blocks must not depend on the length.
            rows = slice(length if shared and not is_exporting() else None)
            bias = banded_product(self.query_factors[rows], self.key_factors[rows], self.left, self.right)
        return (leading(bias, 0, length) if shared else bias[positions])[None]

    def of_run(self, positions: torch.Tensor) -> torch.Tensor:
        return super().of_run(positions) if self.table is not None else self._few_rows(positions)[None]

    def _few_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """What decoding steps need of `banded_product`, without the rest: positions [B, T], as those of a run, to
        [B, T, taps]."""
        first, device = positions[:, :1] - self.left, positions.device
        keys = first + torch.arange(self.left + positions.shape[1] + self.right, device=device)
        existing = keys.clamp(0, len(self.key_factors) - 1)
        products = F.embedding(positions, self.query_factors) @ F.embedding(existing, self.key_factors).mT
        products = products.masked_fill((existing != keys)[:, None], 0)
        columns = (positions - first)[..., None] - torch.arange(-self.right, self.left + 1, device=device)
        return products.gather(2, columns)


def banded_product(u: torch.Tensor, v: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """[N, left + 1 + right] with entry [t, j] = u_t . v_{t'} at the offset t - t' = j - right; u, v [N, d'].

    Where t' lies outside [0, N) the entry is 0; no key stands there.
    """
    length, taps = u.shape[0], left + 1 + right
    block = max(taps, 32)
    blocks = -(-length // block)
    u = F.pad(u, (0, 0, 0, blocks * block - length)).unflatten(0, (blocks, block))
    v = F.pad(v, (0, 0, left, (blocks + 1) * block - length - left)).unflatten(0, (blocks + 1, block))
    reached = torch.cat([v[:-1], v[1:, : taps - 1]], 1)
    products = u @ reached.mT  # [blocks, block, block + left + right]
    row = torch.arange(block, device=u.device)[:, None]
    column = row + left + right - torch.arange(taps, device=u.device)
    return products.gather(2, column.expand(blocks, -1, -1)).flatten(0, 1)[:length]


class RelativePositionBias(PositionBias):
    """A bias per head and offset, learned as it is."""

    def __init__(self, config, left: int, right: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, left + 1 + right))
        self.initial = (config.position_bias_init_mean, config.position_bias_init_std)

    def draw_weights(self, std: float):
        mean, deviation = self.initial
        if deviation == 0:
            initialization.constant_(self.weight, mean)
        else:
            initialization.normal_(self.weight, mean=mean, std=deviation)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[H, 1, taps] for any positions."""
        # Not a view of a parameter, which would need a gradient where none is kept.
        return self.weight[:, None].to(compute_dtype(self.weight), copy=True)


class ConvPositionBias(RelativePositionBias):
    """The bias of AFT-conv (eq. 6): one per head and offset, standardised and then scaled and shifted (eq. 8)."""

    def __init__(self, config, left: int, right: int):
        super().__init__(config, left, right)
        self.gamma = nn.Parameter(torch.empty(config.num_attention_heads))
        self.beta = nn.Parameter(torch.empty(config.num_attention_heads))

    def draw_weights(self, std: float):
        mean, deviation = self.initial
        initialization.normal_(self.weight, mean=0.0, std=1.0)  # which must not be constant
        initialization.constant_(self.gamma, deviation)
        initialization.constant_(self.beta, mean)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[H, 1, taps] for any positions."""
        weight = self.weight.to(compute_dtype(self.weight))
        centred = weight - weight.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        # A single tap has no spread: what is left of it is beta.
        standardised = centred * torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()
        bias = self.gamma[:, None].to(weight.dtype) * standardised + self.beta[:, None].to(weight.dtype)
        return bias[:, None]


class Decay(nn.Module):
    """The rates at which keys fade: softplus of a weight, in fp32, so that none is negative. Where it is not trained,
    the weight is a buffer, which no optimizer sees and every checkpoint holds."""

    def __init__(self, config):
        super().__init__()
        self.half_lives = config.decay_min_half_life, config.decay_max_half_life
        weight = torch.empty(config.key_width)
        if config.decay == "learned":
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def draw_weights(self, std: float):
        first, last = (math.log(half_life) for half_life in self.half_lives)
        rates = math.log(2) / torch.linspace(first, last, len(self.weight), dtype=torch.float64).exp()
        initialization.copy_(self.weight, rates + (-(-rates).expm1()).log())  # the inverse of softplus

    def forward(self) -> torch.Tensor:
        """[K], for each key channel."""
        return F.softplus(self.weight.to(compute_dtype(self.weight)))


class AFTStateLayer(StateLayer):
    """State of one layer of AFT-simple, AFT-local or AFT-conv: sums, and the keys and values of the window."""

    _layer_type = "aft_state"
    state_class = AFTState
    advance = staticmethod(advance)
    can_wait = True

    @staticmethod
    def shapes(config, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        window = max(config.window_size - 1, 0) if config.aft_type in ("local", "conv") else 0
        width, keys = config.hidden_size, config.key_width
        return {
            "position": (batch,),
            "key": (batch, window, keys),
            "value": (batch, window, width),
            "maximum": (batch, keys),
            "normalizer": (batch, keys),
            "average": (batch, width),
        }


class AFTFullStateLayer(GrowingStateLayer):
    """State of one layer of AFT-full: every key and value so far, because each position weighs all of them anew."""

    _layer_type = "aft_full_state"
    state_class = AFTState
    advance = staticmethod(advance)
    per_token = {"key": (-2, -torch.inf), "value": (-2, 0), "key_position": (-1, 0)}

    @staticmethod
    def shapes(config, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        size = (batch, length, config.hidden_size)
        return {"position": (batch,), "key": size, "value": size, "key_position": (batch, length)}


class AFTMixer(Mixer):
    """
    y_t = W_o (sigmoid(q_t) * weighted average of the values), the weights being exp(k + w) (eq. 2 and 4 to 6), and w
    less by the decay for each token between them if there is one.

    It can be used in a model of one's own, and begins with the weights that a model of this package has.

    Args:
        config (`AFTConfig`): the form, and the sizes.
        layer_idx (`int`): which layer of a cache belongs to it.
        causal (`bool`): whether a token sees only itself and earlier ones.
        draw (`bool`): whether to draw the weights.
    """

    def __init__(self, config: AFTConfig, layer_idx: int = 0, causal: bool = True, draw: bool = True):
        super().__init__()
        self.layer_idx = layer_idx
        self.is_causal = causal
        width = config.hidden_size
        self.widths = [width, config.key_width, width]
        self.query_activation, self.key_activation = config.query_activation, config.key_activation
        self.linear_activation = config.linear_activation
        self.qkv_proj = make_linear(config, width, sum(self.widths), bias=config.qkv_bias)
        self.o_proj = make_linear(config, width, width)
        left = config.window_size - 1
        right = 0 if causal else left
        self.position_bias = self.make_position_bias(config, left, right)
        self.decay = None if config.decay is None else Decay(config)
        self.limit = None
        if isinstance(self.position_bias, TablePositionBias):
            self.limit = config.max_position_embeddings
        if draw:
            self.draw_all(config)

    def make_position_bias(self, config: AFTConfig, left: int, right: int) -> PositionBias | None:
        """
        The position biases of this form, which a variant of one's own overrides.

        Args:
            config (`AFTConfig`): the form, and the sizes.
            left, right (`int`): how many keys the window has before a query and after it.

        Returns:
            `PositionBias`, or None where the weights depend on keys alone.
        """
        if config.aft_type == "full":
            return FullPositionBias(config)
        if config.aft_type == "simple" or config.window_size == 0:
            return None
        if config.aft_type == "local":
            kind = RelativePositionBias if config.position_bias_type == "relative" else LocalPositionBias
        else:
            kind = ConvPositionBias if config.conv_reparameterization else RelativePositionBias
        return kind(config, left, right)

    def forward(
        self, hidden_states: torch.Tensor, tokens: Tokens | None = None, cache=None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`Tensor` [B, T, D]): what to mix.
            tokens (`Tokens`, *optional*):
                Which of them are kept, and where they stand, as `read_tokens` of modeling_tokens.py says it; by
                default all are, at 0, 1, ...
            cache (`Cache`, *optional*): holds the state of this layer, which the new one replaces; needs `tokens`.
            output_attentions: whether to return the weights of the average as well.

        Returns:
            [B, T, D], and the weights [B, D or H, T, T], which sum to 1 over the last dimension, or None.

        Raises:
            ValueError: weights are asked for, and keys that a state has summed up would have some; or there are more
                tokens than positions in the tables.
        """
        if tokens is None:
            tokens = read_tokens(hidden_states, limit=self.limit)
        if tokens.pairs is not None:
            raise refused("attention_mask", "[B, T]: the sums of AFT know no mask of pairs", list(tokens.pairs.shape))
        if output_attentions and cache is not None and not cache.layers[self.layer_idx].is_empty:
            raise ValueError(
                "`output_attentions` must be False where a cache holds tokens, got True: AFT keeps sums of them, and "
                "no weights. Give the whole text with `use_cache=False`."
            )
        query, key, value = self.split(project(self.qkv_proj, hidden_states))
        weights_of_keys = None
        if output_attentions:
            weights_of_keys = self._weights(key, tokens)
        if tokens.packing is not None:
            mixed = tokens.packing.map(self._mix_documents, query, key, value)
        elif cache is None:
            mixed, _ = attend(self._call(query, key, value, tokens))
        elif (recent := self._recent_tokens(cache, key, value, tokens)) is not None:
            mixed = recent.read(query, key, value, self.query_activation, tokens.next_position)
        else:
            call = self._call(query, key, value, tokens)
            state = read_state(cache, self.layer_idx)
            mixed, state = attend(call._replace(state=state, return_state=True))
            commit_state(cache, self.layer_idx, state, NewTokens(key, value, tokens, call.decay))
        return activated(project(self.o_proj, mixed), self.linear_activation), weights_of_keys

    def _recent_tokens(self, cache, key: torch.Tensor, value: torch.Tensor, tokens: Tokens) -> RecentTokens | None:
        """The tokens since the state of this layer, to which one more can be added; None where the state has to take
        it up at once. The biases are computed for several steps, so nobody may watch them, and they belong to the
        model: those that a variant computes are known for the token alone."""
        layer = cache.layers[self.layer_idx]
        if not (tokens.can_wait and layer.can_wait) or self.training:
            return None
        recent, made_of = layer.recent, self._what_biases_are_made_of(key)
        if made_of is None:
            return None
        if recent is not None and recent.made_of == made_of and recent.may_write:
            if recent.is_full:
                recent.fold()
            if recent.needs_biases:
                recent.take_biases(self._next_biases(key, tokens))
            return recent
        if type(self)._call is not AFTMixer._call or type(self).biases is not AFTMixer.biases:
            return None
        state = layer.state
        if state.normalizer.dtype != compute_dtype(key, value):
            return None
        decay = None if self.decay is None else self.decay()
        layer.recent = RecentTokens(state, self._next_biases(key, tokens), decay, made_of)
        return layer.recent

    def _next_biases(self, key: torch.Tensor, tokens: Tokens) -> torch.Tensor | None:
        """The window biases of the next AHEAD queries, of which `tokens` has the first."""
        if self.position_bias is None:
            return None
        positions = tokens.position_ids + torch.arange(AHEAD, device=tokens.position_ids.device)
        if self.limit is not None:
            positions = positions.clamp_max(self.limit - 1)  # none that is read lies beyond
        with without_autocast(key):
            return bias_rows(self.position_bias.of_run(positions), AHEAD, Tokens(position_ids=positions))

    def _what_biases_are_made_of(self, key: torch.Tensor) -> list | None:
        """The dtype of keys, and where the weights of biases stand, with their versions; None where these are not
        known, or somebody may watch the modules."""
        known = [key.dtype]
        for part in (self.position_bias, self.decay):
            if part is None:
                continue
            if part._modules or is_watched(part):
                return None
            for weight in (*part._parameters.values(), *part._buffers.values()):
                if weight is None:
                    continue
                if weight.is_inference():
                    return None
                known.append((weight.data_ptr(), weight._version))
        return known

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, T, D], keys [B, T, D or H] and values [B, T, D] for the operator, from what `qkv_proj` gives."""
        query, key, value = activated(projected, self.linear_activation).split_with_sizes(self.widths, -1)
        return query, activated(key, self.key_activation), value

    def _call(self, query, key, value, tokens: Tokens) -> Call:
        bias = {}
        if self.position_bias is not None:
            # The product of the factors goes into an exponential: half precision would not do.
            with without_autocast(key):
                bias = self.biases(key, tokens)
        return Call(
            query,
            key,
            value,
            **bias,
            decay=None if self.decay is None else self.decay(),
            causal=self.is_causal,
            query_activation=self.query_activation,
            tokens=tokens,
        )

    def biases(self, key: torch.Tensor, tokens: Tokens) -> dict:
        """The position biases for keys [B, T, K], as arguments of a call of the operator."""
        positions = tokens.position_ids
        if positions is None:
            positions = torch.arange(key.shape[1], device=key.device)
        return {self.position_bias.argument: self.position_bias(positions)}

    def _mix_documents(self, group, query, key, value):
        return attend(self._call(query, key, value, group.seen_by(self.is_causal)))[0]

    def _weights(self, key, tokens: Tokens):
        if tokens.packing is None:
            return weights(self._call(key, key, key, tokens))
        return tokens.packing.map_pairs(lambda group, key: weights(self._call(key, key, key, group.tokens)), key)


class AFTBlock(MixerBlock):
    mixer_class = AFTMixer


class AFTPreTrainedModel(MixerPreTrainedModel):
    config_class = AFTConfig
    _no_split_modules = ["AFTBlock"]
    _can_record_outputs = {"hidden_states": AFTBlock, "attentions": AFTMixer}


class AFTModel(AFTPreTrainedModel, MixerModel):
    """The Attention Free Transformer without a head: see [`AFTConfig`] for its forms."""

    block_class = AFTBlock


class AFTForCausalLM(AFTPreTrainedModel, MixerForCausalLM, StateGenerationMixin):
    """The Attention Free Transformer with a language-model head."""

    model_class = AFTModel


class AFTForMaskedLM(AFTPreTrainedModel, MixerForMaskedLM):
    """The bidirectional Attention Free Transformer with a language-model head; needs `is_decoder=False`."""

    model_class = AFTModel


class AFTForSequenceClassification(AFTPreTrainedModel, MixerForSequenceClassification):
    """The Attention Free Transformer with a classifier on the mean over the kept tokens."""

    model_class = AFTModel


class AFTForTokenClassification(AFTPreTrainedModel, MixerForTokenClassification):
    """The Attention Free Transformer with a classifier on every token."""

    model_class = AFTModel


list_in_library(AFTPreTrainedModel)

__all__ = ["AFTMixer", "AFTPreTrainedModel", *(head.__name__ for head in AFTPreTrainedModel.heads.values())]
