# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The parts that do not depend on how tokens are mixed: block, language model, checks of positions, cache handling."""

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .ops_export import is_exporting


class Linear(nn.Linear):
    """`torch.nn.Linear`, which is bound by reading its weight for a single vector on a CPU, and often does so with one
    thread: this one uses all."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or is_exporting() or not self._is_product_with_vector(hidden_states):
            return super().forward(hidden_states)
        out = torch.linalg.vecdot(self.weight, hidden_states.reshape(-1))
        out = out if self.bias is None else out + self.bias
        return out.view(*hidden_states.shape[:-1], -1)

    def _is_product_with_vector(self, hidden_states: torch.Tensor) -> bool:
        weight = self.weight  # of another type where it is quantized or sharded
        plain = type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float64)
        single = hidden_states.numel() == self.in_features and hidden_states.dtype == weight.dtype
        return plain and single and weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, `intermediate_size` wide."""

    def __init__(self, config):
        super().__init__()
        intermediate_size = config.intermediate_size or 4 * config.hidden_size
        self.up_proj = Linear(config.hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = Linear(intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MixerBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: x + mixer(norm(x)), then x + feed_forward(norm(x)). Subclasses name their mixer."""

    mixer_class: type[nn.Module]

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = self.mixer_class(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, **mixer_inputs) -> torch.Tensor:
        """hidden_states [B, T, D]; `mixer_inputs`: attention_mask, position_ids, past_key_values and the like."""
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), **mixer_inputs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))


class MixerPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the flags by which transformers knows what these models can do."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    # Every Auto class that a saved folder serves, whichever class saved it.
    _auto_map: dict[str, str] = {}

    def save_pretrained(self, save_directory, **kwargs):
        if self._auto_class is not None:
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self._auto_map}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            initialization.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)


class MixerModel(MixerPreTrainedModel):
    """Token (and position) embeddings, blocks, final norm. Subclasses name their block and their cache layers."""

    block_class: type[MixerBlock]

    def __init__(self, config):
        super().__init__(config)
        config.validate_fields()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(self.block_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`LongTensor` [B, T], *optional*): token ids; either these or `inputs_embeds`.
            attention_mask (`Tensor` [B, T or past + T], *optional*):
                1 keeps a token, 0 makes it padding, wherever it stands. Only the last T columns are read: what was
                padded before is part of the cache.
            position_ids (`LongTensor` [B, T], *optional*): by default the number of kept tokens before each.
            past_key_values (`Cache`, *optional*): the state after earlier tokens; it is updated in place.
            inputs_embeds (`FloatTensor` [B, T, D], *optional*): vectors in place of token embeddings.
            use_cache (`bool`, *optional*): whether to return the state; `config.use_cache` outside of training.

        Returns:
            `BaseModelOutputWithPast` with `last_hidden_state` [B, T, D].

        Raises:
            ValueError: for inputs that do not fit together, or a position beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past_key_values = self._prepare_cache(past_key_values, use_cache)
        attention_mask = self._last_columns(attention_mask, inputs_embeds)
        seen = self._seen_tokens(past_key_values)
        if seen is not None and seen.shape[0] != inputs_embeds.shape[0]:
            raise ValueError(f"`past_key_values` must hold a batch of {len(inputs_embeds)}, got {len(seen)}.")
        positions = self._default_positions(inputs_embeds, attention_mask, seen)
        if position_ids is not None:
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            position_ids = self._unless_default(position_ids, positions, attention_mask)
        if position_ids is None and seen is not None:
            position_ids = positions  # the mixers need not count again
        positions = positions if position_ids is None else position_ids
        self._check_positions(positions, attention_mask, past_key_values)

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        hidden_states = self.dropout(hidden_states)
        mixer_inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if "attentions" in self._can_record_outputs:
            mixer_inputs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **mixer_inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _prepare_cache(self, past_key_values, use_cache) -> Cache | None:
        if not self.config.is_decoder:
            if use_cache or past_key_values is not None:
                raise ValueError("`use_cache` and `past_key_values` need `config.is_decoder=True`, got False.")
            return None
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        if not use_cache:
            return None
        if past_key_values is None:
            return DynamicCache(config=self.config)
        found = [getattr(layer, "_layer_type", None) for layer in getattr(past_key_values, "layers", [])]
        if found != self.config.layer_types:
            raise ValueError(
                f"`past_key_values` must be a cache made for this model, e.g. DynamicCache(config=model.config), with "
                f"layers of type {self.config.layer_types[0]!r}; got {type(past_key_values).__name__} with {found}."
            )
        return past_key_values

    @staticmethod
    def _last_columns(attention_mask, inputs_embeds) -> torch.Tensor | None:
        """The mask of the new tokens, [B, T], or None if it keeps them all."""
        if attention_mask is None:
            return None
        batch, length = inputs_embeds.shape[:2]
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"`attention_mask` must be [{batch}, {length} or more] (1 keeps a token, 0 is padding), "
                f"got {list(attention_mask.shape)}."
            )
        attention_mask = attention_mask[:, -length:]
        if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and attention_mask.all():
            return None
        return attention_mask

    @staticmethod
    def _seen_tokens(past_key_values) -> torch.Tensor | None:
        """[B]: the number of kept tokens in the cache, or None if it is empty."""
        state = None if past_key_values is None else past_key_values.layers[0].state
        return None if state is None else state.position

    @staticmethod
    def _default_positions(inputs_embeds, attention_mask, seen) -> torch.Tensor:
        """[B or 1, T]: the number of kept tokens before each token, those of the cache included, and 0 for padding."""
        if attention_mask is None:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        else:
            positions = attention_mask.long().cumsum(1) - 1
        if seen is not None:
            positions = positions + seen[:, None].to(positions.device)
        return positions if attention_mask is None else positions.masked_fill(attention_mask == 0, 0)

    @staticmethod
    def _unless_default(position_ids, positions, attention_mask) -> torch.Tensor | None:
        """[B, T] with 0 for padding, or None if they are what the model counts by itself, as those that `generate`
        makes are: the mixers are faster where a batch shares its positions. A single token is not worth the
        comparison."""
        if attention_mask is not None:
            position_ids = position_ids.masked_fill(attention_mask == 0, 0)
        if position_ids.shape[1] == 1 or torch.compiler.is_compiling() or position_ids.device.type == "meta":
            return position_ids
        return None if torch.equal(position_ids, positions.expand_as(position_ids)) else position_ids

    def _check_positions(self, positions, attention_mask, past_key_values) -> None:
        if not self.config.has_position_table:
            return
        limit, length = self.config.max_position_embeddings, positions.shape[1]
        if attention_mask is None and past_key_values is None and torch.compiler.is_compiling():
            last = length - 1  # a compiled model cannot raise for what stands in a tensor
        elif torch.compiler.is_compiling() or positions.device.type == "meta":
            return
        else:
            last = int(positions.max())
        if last < limit:
            return
        raise ValueError(
            f"Position {last} lies beyond the learned tables of this model, which end at max_position_embeddings="
            f"{limit} (the largest position is {limit - 1}). Feed at most {limit} tokens, or use AFT-simple or "
            "AFT-conv with position_embedding_type='none', which have no limit."
        )

    @staticmethod
    def create_masks_for_generate(attention_mask=None, inputs_embeds=None, **kwargs):
        """Keeps `generate` from making [T, T] masks: padding is all that a mixer needs to know of its input."""
        if attention_mask is None:
            return None
        # A copy, because a compiled step is specialised on strides, and those of a slice change with every token.
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)


class MixerForCausalLM(MixerPreTrainedModel):
    """A mixer model with a language-model head. Subclasses name the model, and add GenerationMixin."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: type[MixerModel]

    def __init__(self, config):
        super().__init__(config)
        if not config.is_decoder:
            raise ValueError("`is_decoder` must be True for a causal language model, got False.")
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    create_masks_for_generate = staticmethod(MixerModel.create_masks_for_generate)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises a ValueError, for `generate_batch` and all others that begin here."""
        raise ValueError(
            "Continuous batching keeps the keys and values of attention in pages, which these models do not have. "
            "Use `generate` with a padded batch: the state of a row does not depend on its padding."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`LongTensor` [B, T], *optional*):
                Token ids, -100 where no loss is wanted. They are shifted inside: the output at t is scored on the
                label at t + 1.
            logits_to_keep (`int` or `LongTensor`, defaults to 0):
                How many of the last positions get logits (0: all of them), or the indices of those that do.

            The other arguments are those of the model without a head.

        Returns:
            `CausalLMOutputWithPast` with `logits` [B, T, vocab_size] and, if labels are given, `loss` in nats.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
