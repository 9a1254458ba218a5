# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The Synthesizer (arXiv 2005.00743): its logits, mixer, model, language model."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from .cache_state import GrowingStateLayer, NewTokens, commit_state, read_state
from .compatibility import list_in_library
from .configuration_synthesizer import SynthesizerConfig
from .modeling_causal_lm import MixerForCausalLM, StateGenerationMixin
from .modeling_heads import MixerForMaskedLM, MixerForSequenceClassification, MixerForTokenClassification
from .modeling_linear import activated, make_linear, project
from .modeling_stack import Mixer, MixerBlock, MixerPreTrainedModel, scale_queries
from .modeling_text import MixerModel
from .modeling_tokens import read_tokens
from .ops_modes import leading
from .ops_synthesizer import Logits, SynthesizerState, advance, attend, attend_fused, columns, outer, product_by_head
from .ops_tokens import Tokens, compact, expand, refused


def _rows(table: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """Rows of table [H, N, .] at the positions [B, T], or the first `length` for None: [1 or B, H, T, .]."""
    if positions is None:
        return leading(table, 1, length)[None]
    return table[:, positions.clamp_min(0)].transpose(0, 1)


class ComponentLogits(nn.Module):
    """The logits of one component, from the query [B, H, T, d] and the positions [B, T] (None for 0 to T - 1).

    Both forms are had by calling the module: hooks on it, such as those that fetch offloaded weights, see only calls.
    """

    def forward(self, query: Tensor, *, positions: Tensor | None = None, by_parts: bool = False) -> Tensor | Logits:
        """Logits over all N key positions, [1 or B, H, T, N], or with `by_parts` those over the T keys, by parts."""
        return self.parts(query, positions) if by_parts else self.whole(query, positions)


class DenseLogits(ComponentLogits):
    """relu(q) W2 + b2: every token gives one logit per position. W2 [H, d, N], b2 [H, N]."""

    def __init__(self, config):
        super().__init__()
        heads, length = config.num_attention_heads, config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(heads, config.hidden_size // heads, length))
        self.bias = nn.Parameter(torch.empty(heads, length))

    def draw_weights(self, std: float):
        initialization.normal_(self.weight, mean=0.0, std=std)
        initialization.zeros_(self.bias)

    def whole(self, query: Tensor, positions: Tensor | None) -> Tensor:
        return product_by_head(query.relu(), self.weight) + self.bias[:, None]

    def parts(self, query: Tensor, positions: Tensor | None) -> Logits:
        table = torch.cat([self.weight.transpose(1, 2), self.bias[..., None]], -1)  # [H, N, d + 1]
        ones = torch.ones_like(query[..., :1])
        return Logits(query=torch.cat([query.relu(), ones], -1), key=_rows(table, positions, query.shape[2]))


class RandomLogits(ComponentLogits):
    """R [H, N, N]: the logits of a pair of positions, whatever stands there."""

    trainable = True

    def __init__(self, config):
        super().__init__()
        heads, length = config.num_attention_heads, config.max_position_embeddings
        table = torch.empty(heads, length, length)
        if self.trainable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def draw_weights(self, std: float):
        initialization.normal_(self.table, mean=0.0, std=std)

    def whole(self, query: Tensor, positions: Tensor | None) -> Tensor:
        return _rows(self.table, positions, query.shape[2])

    def parts(self, query: Tensor, positions: Tensor | None) -> Logits:
        return Logits(bias=columns(self.whole(query, positions), positions, query.shape[2]))


class FixedRandomLogits(RandomLogits):
    """R [H, N, N] as it was drawn: a buffer, which no optimizer sees and every checkpoint holds."""

    trainable = False


class FactorizedRandomLogits(ComponentLogits):
    """R1 R2^T with R1, R2 [H, N, k]."""

    def __init__(self, config):
        super().__init__()
        size = (config.num_attention_heads, config.max_position_embeddings, config.factorized_rank)
        self.query_factors = nn.Parameter(torch.empty(size))
        self.key_factors = nn.Parameter(torch.empty(size))

    def draw_weights(self, std: float):
        # The product, a sum of k terms, then has the deviation `std`.
        factor_std = math.sqrt(std / math.sqrt(self.key_factors.shape[-1]))
        initialization.normal_(self.query_factors, mean=0.0, std=factor_std)
        initialization.normal_(self.key_factors, mean=0.0, std=factor_std)

    def whole(self, query: Tensor, positions: Tensor | None) -> Tensor:
        rows = _rows(self.query_factors, positions, query.shape[2])
        return product_by_head(rows, self.key_factors.transpose(1, 2))

    def parts(self, query: Tensor, positions: Tensor | None) -> Logits:
        length = query.shape[2]
        return Logits(
            query=_rows(self.query_factors, positions, length), key=_rows(self.key_factors, positions, length)
        )


class FactorizedDenseLogits(ComponentLogits):
    """All N = a * b products of two dense rows, A repeated and B tiled: the logits are A[n // b] B[n % b]."""

    def __init__(self, config):
        super().__init__()
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.sizes = config.dense_factors
        self.weight_a, self.weight_b = (nn.Parameter(torch.empty(heads, size, n)) for n in self.sizes)
        self.bias_a, self.bias_b = (nn.Parameter(torch.empty(heads, n)) for n in self.sizes)

    def draw_weights(self, std: float):
        initialization.normal_(self.weight_a, mean=0.0, std=std)
        initialization.normal_(self.weight_b, mean=0.0, std=std)
        # Around 1, where the product of two values learns as fast as each of them.
        initialization.ones_(self.bias_a)
        initialization.zeros_(self.bias_b)

    def whole(self, query: Tensor, positions: Tensor | None) -> Tensor:
        return outer(*self._factors(query))

    def parts(self, query: Tensor, positions: Tensor | None) -> Logits:
        return Logits(product=self._factors(query), key_position=positions)

    def _factors(self, query: Tensor) -> tuple[Tensor, Tensor]:
        query = query.relu()
        return query @ self.weight_a + self.bias_a[:, None], query @ self.weight_b + self.bias_b[:, None]


LOGITS = {
    "dense": DenseLogits,
    "random": RandomLogits,
    "fixed_random": FixedRandomLogits,
    "factorized_dense": FactorizedDenseLogits,
    "factorized_random": FactorizedRandomLogits,
}


class RelativeAttentionBias(nn.Module):
    """What every head adds to the logits for the distance and direction of a key, by intervals, as in T5."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_attention_heads))
        self.std = config.hidden_size**-0.5 if config.scaling == "weights" else None
        self.max_distance, self.is_causal = config.relative_attention_max_distance, config.is_decoder

    def draw_weights(self, std: float):
        initialization.normal_(self.weight, mean=0.0, std=std if self.std is None else self.std)

    def forward(self) -> Tensor:
        """[H, 2 M + 1], for keys from M = `max_distance` places before the query to M behind it."""
        offset = torch.arange(-self.max_distance, self.max_distance + 1, device=self.weight.device)
        return F.embedding(self._buckets(offset), self.weight).T

    def _buckets(self, offset: Tensor) -> Tensor:
        """The interval of each offset of a key: half of them for single distances, the others ever wider."""
        number, first = len(self.weight), 0
        if self.is_causal:
            distance = (-offset).clamp_min(0)
        else:
            number, distance = number // 2, offset.abs()
            first = number * (offset > 0).long()
        exact = number // 2
        scale = (number - exact) / math.log(self.max_distance / exact)
        wider = exact + ((distance.clamp_min(1) / exact).log() * scale).long().clamp_min(0)
        return first + torch.where(distance < exact, distance, wider.clamp_max(number - 1))


def by_places(relative: Tensor, length: int) -> Tensor:
    """[1, H, T, T] of what is known by offset, [H, 2 M + 1], for queries and keys at 0 to T - 1."""
    largest = relative.shape[1] // 2
    offset = torch.arange(1 - length, length, device=relative.device).clamp(-largest, largest)
    return relative[:, offset + largest].unfold(1, length, 1).flip(1)[None]


def by_offsets(relative: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
    """[B, H, T, S] of the same for queries at the positions [B, T] and keys at those [B, S]."""
    largest = relative.shape[1] // 2
    offset = (key_position[:, None] - query_position[:, :, None]).clamp(-largest, largest)
    return relative[:, offset + largest].transpose(0, 1)


class SynthesizerStateLayer(GrowingStateLayer):
    """State of one layer of the Synthesizer: all values so far, and keys only where it mixes in dot products."""

    _layer_type = "synthesizer_state"
    state_class = SynthesizerState
    advance = staticmethod(advance)
    per_token = {"key": (-2, 0), "value": (-2, 0), "key_position": (-1, -1)}

    @staticmethod
    def shapes(config, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        heads = config.num_attention_heads
        size = (batch, heads, length, config.hidden_size // heads)
        keys = {"key": size} if "dot_product" in config.components else {}
        return {"position": (batch,), **keys, "value": size, "key_position": (batch, length)}


class SynthesizerMixer(Mixer):
    """
    softmax(sum_i alpha_i S_i(X)) X W_v W_o: one or several kinds of logits, mixed before the softmax.

    It can be used in a model of one's own, and begins with the weights that a model of this package has.

    Args:
        config (`SynthesizerConfig`): the type, and the sizes.
        layer_idx (`int`): which layer of a cache belongs to it.
        causal (`bool`): whether a token sees only itself and earlier ones.
        draw (`bool`): whether to draw the weights.
    """

    def __init__(self, config: SynthesizerConfig, layer_idx: int = 0, causal: bool = True, draw: bool = True):
        super().__init__()
        self.layer_idx = layer_idx
        self.is_causal = causal
        self.heads = config.num_attention_heads
        self.limit = config.position_limit
        self.names = list(config.components)
        width = config.hidden_size
        # The query is the dot product's, and the first layer of the dense types.
        self.has_query = bool({"dense", "factorized_dense", "dot_product"} & set(self.names))
        self.has_key = "dot_product" in self.names
        self.linear_activation = config.linear_activation
        parts = self.has_query + self.has_key + 1
        self.qkv_proj = make_linear(config, width, parts * width, bias=config.qkv_bias)
        self.o_proj = make_linear(config, width, width)
        if self.has_key:
            self.scaling = scale_queries(config, self.qkv_proj, width, width // self.heads)
        self.logits = nn.ModuleDict({name: LOGITS[name](config) for name in self.names if name in LOGITS})
        self.mixture_logits = None
        if len(self.names) > 1:
            self.mixture_logits = nn.Parameter(torch.empty(self.heads, len(self.names)))
        if draw:
            self.draw_all(config)

    def draw_weights(self, std: float):
        if self.mixture_logits is not None:
            initialization.zeros_(self.mixture_logits)

    def mixture_weights(self) -> dict[str, Tensor | None]:
        """alpha of each component, [H, 1, 1]; they sum to 1 for each head."""
        if self.mixture_logits is None:
            return dict.fromkeys(self.names)
        return dict(zip(self.names, self.mixture_logits.softmax(1)[..., None, None].unbind(1), strict=True))

    def forward(
        self,
        hidden_states: Tensor,
        tokens: Tokens | None = None,
        cache=None,
        output_attentions: bool = False,
        relative: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states (`Tensor` [B, T, D]): what to mix.
            tokens (`Tokens`, *optional*):
                Which of them are kept, and where they stand, or which pairs see each other, as `read_tokens` of
                modeling_tokens.py says it; by default all are kept, at 0, 1, ...
            cache (`Cache`, *optional*): holds the state of this layer, which the new one replaces; needs `tokens`.
            output_attentions: whether to return the attention weights as well.
            relative (`Tensor` [H, 2 M + 1], *optional*):
                What is added to the logits of a key that stands M or more places before the query, ..., M or more
                behind it.

        Returns:
            The output [B, T, D], and the attention weights [B, H, T, S] or None. S is the number of tokens so far, or
            that which a static cache has room for.

        Raises:
            ValueError: there are more tokens than positions in the tables.
        """
        if tokens is None:
            tokens = read_tokens(hidden_states, limit=self.limit)
        mixture = self.mixture_weights()  # here, as hooks that fetch offloaded weights do so for `forward` alone
        projected = activated(project(self.qkv_proj, hidden_states), self.linear_activation)
        if tokens.packing is not None:
            mix = partial(self._mix_documents, mixture, relative)
            weights = tokens.packing.map_pairs(partial(mix, True), projected) if output_attentions else None
            out = tokens.packing.map(partial(mix, False), projected)
            return activated(project(self.o_proj, out), self.linear_activation), weights
        state = read_state(cache, self.layer_idx)
        if state is not None or output_attentions or tokens.pairs is not None:
            query, key, value = self._split(projected)
            new = NewTokens(key, value, tokens)
            state = advance(state, new)
            out, weights = self._explicit(mixture, relative, query, state, tokens)
        else:
            out, weights = self._fused(mixture, relative, projected, tokens), None
            if cache is not None:
                _, key, value = self._split(projected)
                new = NewTokens(key, value, tokens)
                state = advance(None, new)
        if cache is not None:
            commit_state(cache, self.layer_idx, state, new)
            weights = None if weights is None else cache.layers[self.layer_idx].columns(weights)
        return activated(project(self.o_proj, out), self.linear_activation), weights

    def _mix_documents(self, mixture, relative, output_attentions, group, projected):
        if not output_attentions:
            return self._fused(mixture, relative, projected, group.seen_by(self.is_causal))
        query, key, value = self._split(projected)
        state = advance(None, NewTokens(key, value, group.tokens))
        return self._explicit(mixture, relative, query, state, group.tokens)[1]

    def _fused(self, mixture, relative, projected, tokens: Tokens) -> Tensor:
        """[B, T, D] from the projections [B, T, n D], without a past, and without weights."""
        slot, position_ids = tokens.slot, tokens.position_ids
        if slot is not None:
            # Behind the tables there can be nothing but padding, which `expand` takes from nowhere.
            projected, slot = compact(projected, slot)[:, : self.limit], slot.clamp_max(self.limit or slot.shape[1])
            if position_ids is not None:
                position_ids = compact(position_ids[..., None], slot, -1).squeeze(-1)[:, : self.limit]
        query, key, value = self._split(projected)
        out = attend_fused(
            self._parts(mixture, relative, query, key, position_ids), value, self.is_causal, tokens.count
        )
        out = out.transpose(1, 2).flatten(2)
        return out if slot is None else expand(out, slot)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Query, key (None without dot products) and value, [B, H, T, d]."""
        width = self.o_proj.in_features
        *others, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.split(width, -1))
        query = others[0] if self.has_query else value  # of which only the length is read
        return query, others[-1] if self.has_key else None, value

    def _explicit(self, mixture, relative, query, state: SynthesizerState, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The definition: logits over all positions, of which those of the present keys are taken. The output
        [B, T, D], and the weights."""
        length, pairs = query.shape[2], tokens.pairs
        positions = state.key_position[:, -length:]
        logits = 0
        for name, alpha in mixture.items():
            if name == "dot_product":
                part = self.scaling * query @ state.key.transpose(2, 3)
            else:
                part = columns(self.logits[name](query, positions=positions), state.key_position, length)
            logits = logits + (part if alpha is None else alpha * part)
        if relative is not None:
            logits = logits + by_offsets(relative, positions, state.key_position)
        visible = (state.key_position >= 0)[:, None, None]  # [B, 1, 1, S]
        if pairs is not None:
            if pairs.shape[-2:] != logits.shape[-2:]:
                raise refused("attention_mask", f"[.., {length}, {logits.shape[-1]}]", list(pairs.shape))
            if pairs.dtype == torch.bool:
                visible = visible & pairs
            else:
                visible = visible & (pairs > torch.finfo(pairs.dtype).min)
                logits = logits + pairs.masked_fill(~visible, 0)
        elif self.is_causal and length > 1:  # a single token stands behind all others
            places = torch.arange(state.key_position.shape[1], device=query.device)
            visible = visible & (places <= places[-length:, None])
        out, weights = attend(logits, state.value, visible.expand(-1, -1, length, -1))
        return out.transpose(1, 2).flatten(2), weights

    def _parts(self, mixture, relative, query, key, positions) -> Logits:
        """The weighted sum of the components' logits, by parts."""
        queries, keys, biases, product = [], [], [], None
        for name, alpha in mixture.items():
            if name == "dot_product":
                part = Logits(query=self.scaling * query, key=key)
            else:
                part = self.logits[name](query, positions=positions, by_parts=True)
            alpha = 1 if alpha is None else alpha
            if part.query is not None:
                queries.append(alpha * part.query)
                keys.append(part.key)
            if part.bias is not None:
                biases.append(alpha * part.bias)
            if part.product is not None:
                product = (alpha * part.product[0], part.product[1])
        if relative is not None:
            length = query.shape[2]
            shared = positions is None
            biases.append(by_places(relative, length) if shared else by_offsets(relative, positions, positions))
        bias = sum(biases) if biases else None
        return Logits(_concatenate(queries), _concatenate(keys), bias, product, positions)


def _concatenate(parts: list[Tensor]) -> Tensor | None:
    """Along the last dimension, with the batch dimension (1 or B) made equal; None of nothing."""
    if not parts:
        return None
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, -1, -1, -1) for part in parts], -1)


class SynthesizerBlock(MixerBlock):
    mixer_class = SynthesizerMixer


class SynthesizerPreTrainedModel(MixerPreTrainedModel):
    config_class = SynthesizerConfig
    _no_split_modules = ["SynthesizerBlock"]
    _can_record_outputs = {"hidden_states": SynthesizerBlock, "attentions": SynthesizerMixer}


class SynthesizerModel(SynthesizerPreTrainedModel, MixerModel):
    """The Synthesizer without a head: see [`SynthesizerConfig`] for its types."""

    block_class = SynthesizerBlock

    def add_blocks(self, causal: bool, **block_sizes) -> None:
        super().add_blocks(causal, **block_sizes)
        self.relative_attention_bias = None
        if self.config.relative_attention_num_buckets is not None:
            self.relative_attention_bias = RelativeAttentionBias(self.config)

    def shared_inputs(self) -> dict:
        return {} if self.relative_attention_bias is None else {"relative": self.relative_attention_bias()}


class SynthesizerForCausalLM(SynthesizerPreTrainedModel, MixerForCausalLM, StateGenerationMixin):
    """The Synthesizer with a language-model head."""

    model_class = SynthesizerModel


class SynthesizerForMaskedLM(SynthesizerPreTrainedModel, MixerForMaskedLM):
    """The bidirectional Synthesizer with a language-model head; needs `is_decoder=False`."""

    model_class = SynthesizerModel


class SynthesizerForSequenceClassification(SynthesizerPreTrainedModel, MixerForSequenceClassification):
    """The Synthesizer with a classifier on the mean over the kept tokens."""

    model_class = SynthesizerModel


class SynthesizerForTokenClassification(SynthesizerPreTrainedModel, MixerForTokenClassification):
    """The Synthesizer with a classifier on every token."""

    model_class = SynthesizerModel


list_in_library(SynthesizerPreTrainedModel)

__all__ = [
    "SynthesizerMixer",
    "SynthesizerPreTrainedModel",
    *(head.__name__ for head in SynthesizerPreTrainedModel.heads.values()),
]
