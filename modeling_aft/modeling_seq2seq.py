# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Encoder-decoders of two stacks of mixers: attention to what the encoder gives, models, head, `generate`."""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .compatibility import (
    CACHE_NAME,
    DecoderOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    one_cache,
    refuse_unknown,
)
from .modeling_causal_lm import MixerGenerationMixin
from .modeling_linear import activated, make_linear, project
from .modeling_stack import (
    MixerBlock,
    MixerPreTrainedModel,
    draw_weights,
    make_norm,
    scale_queries,
    thinned,
)
from .modeling_text import MixerModel, head_input
from .modeling_tokens import read_tokens
from .ops_tokens import Tokens, refused


# What forward passes know beside their parameters.
RECORDED = frozenset(["output_hidden_states", "output_attentions"])
LOSS_KEYWORDS = frozenset(["num_items_in_batch", "ignore_index"])


class CrossAttention(nn.Module):
    """
    Attention of dot products from the tokens of a decoder to those of its encoder.

    Args:
        config: of the decoder.
        layer_idx (`int`): which layer of a cache belongs to it.
        heads (`int`): a divisor of `config.hidden_size`.
        encoder_size (`int`): how wide the states of the encoder are.
    """

    def __init__(self, config, layer_idx: int, heads: int, encoder_size: int):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, heads
        width = config.hidden_size
        self.q_proj = make_linear(config, width, width, bias=config.qkv_bias)
        self.k_proj = make_linear(config, encoder_size, width, bias=config.qkv_bias)
        self.v_proj = make_linear(config, encoder_size, width, bias=config.qkv_bias)
        self.o_proj = make_linear(config, width, width)
        self.linear_activation = config.linear_activation
        self.scaling = scale_queries(config, self.q_proj, width, width // heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_keep: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`Tensor` [B, T, D]): those of the decoder.
            encoder_hidden_states (`Tensor` [B, S, E]): those of the encoder; with a cache they are read once.
            encoder_keep (`Tensor` [B, S], *optional*): bool, False for padding; all are kept by default.
            cache (`EncoderDecoderCache`, *optional*): holds keys and values of the encoder's states.
            output_attentions: whether to return the weights as well.

        Returns:
            [B, T, D], and the weights [B, H, T, S] or None. Where no state is kept both are 0.

        Raises:
            ValueError: the cache holds keys of other states, by their number.
        """
        query = self._heads(self.q_proj, hidden_states)
        key, value = self._keys_and_values(encoder_hidden_states, cache)
        visible = None if encoder_keep is None else encoder_keep[:, None, None]
        weights = None
        if output_attentions:
            logits = self.scaling * query @ key.mT
            if visible is not None:
                logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
            weights = logits.softmax(-1)
            weights = weights if visible is None else weights.masked_fill(~visible, 0)
            mixed = weights @ value
        else:
            mask = None if visible is None else visible.expand(-1, -1, query.shape[2], -1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        mixed = mixed.transpose(1, 2).flatten(2)
        return activated(project(self.o_proj, mixed), self.linear_activation), weights

    def _heads(self, projection: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, H, T, d] of [B, T, D]."""
        projected = activated(project(projection, hidden_states), self.linear_activation)
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _keys_and_values(self, states: torch.Tensor, cache: EncoderDecoderCache | None):
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = self._heads(self.k_proj, states), self._heads(self.v_proj, states)
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        if key.shape[0] != states.shape[0] or key.shape[2] != states.shape[1]:
            allowed = f"{key.shape[0]} rows of {key.shape[2]}, as `cache` holds or has room for"
            raise refused("encoder_outputs", allowed, f"{states.shape[0]} rows of {states.shape[1]}")
        return key, value


class CrossBlock(MixerBlock):
    """A block that attends to the states of an encoder, between mixer and feed-forward layer. Subclasses name their
    mixer; the arguments are those of [`MixerBlock`] and [`CrossAttention`]."""

    def __init__(
        self, config, layer_idx: int = 0, causal: bool = True, draw: bool = True, *, heads: int, encoder_size: int
    ):
        super().__init__(config, layer_idx, causal, draw)
        self.cross_attention_norm = make_norm(config)
        self.cross_attention = CrossAttention(config, layer_idx, heads, encoder_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_keep: torch.Tensor | None = None,
        cross_cache: EncoderDecoderCache | None = None,
        **mixer_inputs,
    ) -> torch.Tensor:
        """hidden_states [B, T, D], encoder_hidden_states [B, S, E], encoder_keep [B, S]; `mixer_inputs` as in
        [`MixerBlock`]."""
        hidden_states = self._mixed(hidden_states, **mixer_inputs)
        attended, _ = self.cross_attention(
            self.cross_attention_norm(hidden_states),
            encoder_hidden_states,
            encoder_keep,
            cross_cache,
            mixer_inputs.get("output_attentions", False),
        )
        return self._fed_forward(hidden_states + thinned(self.dropout, attended))


class MixerDecoder(MixerModel):
    """A causal mixer model whose blocks attend to the states of an encoder. Subclasses name their block.

    Args:
        config: of the decoder.
        heads (`int`): of the attention to the encoder.
        encoder_size (`int`): how wide the states of the encoder are.
    """

    auto_class = None
    pipeline_tag = None
    block_class: type[CrossBlock]

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_keep: torch.BoolTensor | None = None,
        **kwargs,
    ) -> DecoderOutput:
        r"""
        Args:
            cache (`EncoderDecoderCache`, *optional*): the state after earlier tokens, and what the encoder gave.
            encoder_hidden_states (`FloatTensor` [B, S, E]): what the encoder gives.
            encoder_keep (`BoolTensor` [B, S], *optional*): which of them are no padding.
            kwargs: `output_hidden_states`, `output_attentions`.

            The other arguments are those of [`MixerModel`], without packed documents.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions` with `last_hidden_state` [B, T, D].
        """
        refuse_unknown(self, kwargs, RECORDED)
        own_cache = None if cache is None else _prepared(cache).self_attention_cache
        tokens = self.read(input_ids, inputs_embeds, attention_mask, position_ids, own_cache)
        _refuse_documents(tokens, "decoder_attention_mask")
        own_cache = self._prepare_cache(own_cache, use_cache, tokens)
        if own_cache is None:
            cache = None
        elif cache is None:
            cache = EncoderDecoderCache(own_cache, DynamicCache())
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self._encode(
            input_ids,
            inputs_embeds,
            tokens,
            own_cache,
            output_attentions,
            encoder_hidden_states,
            encoder_keep,
            cache,
        )
        return DecoderOutput(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


def _prepared(cache: EncoderDecoderCache) -> EncoderDecoderCache:
    """
    A cache whose side of the encoder holds plain keys and values: where a user or `generate` has made it as for the
    decoder, of layers for states, others take their place.

    Raises:
        ValueError: it is another kind of cache, or those layers hold something.
    """
    if not isinstance(cache, EncoderDecoderCache):
        allowed = "an EncoderDecoderCache, e.g. EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())"
        raise refused("cache", allowed, type(cache).__name__)
    layers = cache.cross_attention_cache.layers
    # By what it has, not by its class: another copy of this code, of a repository, may have made the layer.
    if any(hasattr(layer, "state_class") for layer in layers):
        if any(layer.is_initialized for layer in layers):
            raise refused("cache.cross_attention_cache", "empty, or of keys and values", "one of states")
        if layers[0].max_cache_len is None:
            cache.cross_attention_cache = DynamicCache()
        else:
            cache.cross_attention_cache = Cache(layers=[StaticLayer(layer.max_cache_len) for layer in layers])
    return cache


def _refuse_documents(tokens: Tokens, name: str) -> None:
    if tokens.packing is not None:
        raise refused(name, "that of one document per row, at rising positions", "several documents in a row")


class MixerEncoderDecoder(MixerPreTrainedModel):
    """What the classes of an encoder-decoder share. The base class of a family names the classes of its stacks."""

    encoder_class: type[MixerModel]
    decoder_class: type[MixerDecoder]

    @torch.no_grad()
    def _init_weights(self, module):
        """Of what is in neither stack."""
        draw_weights(module, self.config.decoder)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As the library's; the tables of both stacks get the same size, also where they are not tied."""
        decoder = getattr(self.base_model, "decoder", None)
        if decoder is not None and not self.config.tie_word_embeddings:
            decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def _shifted(self, ids: torch.LongTensor, of: str) -> torch.LongTensor:
        """What a decoder reads to say ids [B, T]: each one place later, behind `config.decoder_start_token_id`. The
        error says that inputs are made `of` them."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise refused("config.decoder_start_token_id", f"an id where inputs are made of {of}", None)
        shifted = ids.roll(1, 1)
        shifted[:, 0] = start
        return shifted


class MixerSeq2SeqModel(MixerEncoderDecoder):
    """Encoder and decoder. Subclasses belong to a family."""

    auto_class = "AutoModel"
    pipeline_tag = "feature-extraction"
    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        config.validate_fields()
        self.encoder = self.encoder_class(config.encoder)
        self.decoder = self.decoder_class(
            config.decoder, heads=config.num_cross_attention_heads, encoder_size=config.encoder.hidden_size
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.decoder.set_input_embeddings(value)

    def read_source(self, *args, **kwargs) -> Tokens:
        """
        What is known of the tokens of the encoder; the arguments are those of [`MixerModel.read`].

        Raises:
            ValueError: for what the encoder cannot read, or the decoder not attend to.
        """
        tokens = self.encoder.read(*args, **kwargs)
        _check_source(tokens)
        return tokens

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        r"""
        Args:
            input_ids (`LongTensor` [B, S], *optional*):
                What the encoder reads; these, or `inputs_embeds` [B, S, E], or `encoder_outputs`.
            attention_mask (`Tensor` [B, S], *optional*): 1 keeps a token of the encoder, 0 makes it padding.
            decoder_input_ids (`LongTensor` [B, T], *optional*): these, or `decoder_inputs_embeds` [B, T, D].
            decoder_attention_mask (`Tensor` [B, T or past + T], *optional*): the same for the decoder.
            position_ids, decoder_position_ids (`LongTensor` [B or 1, S or T], *optional*):
                By default the number of kept tokens before each.
            encoder_outputs (`BaseModelOutput` or `tuple`, *optional*): what the encoder has given for this batch.
            cache (`EncoderDecoderCache`, *optional*): the state of the decoder; it is updated in place.
            use_cache (`bool`, *optional*): whether to return it; `config.decoder.use_cache` outside of training.
            token_type_ids (`LongTensor` [B, S], *optional*): all 0, as tokenizers of other models make them.
            past_key_values (`EncoderDecoderCache`, *optional*): the older name of `cache`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. Heads pass what `read_source` has given
                them as `tokens`.

        Returns:
            `Seq2SeqModelOutput` with `last_hidden_state` [B, T, D].

        Raises:
            ValueError: for inputs that do not fit together, or positions beyond `max_position_embeddings` of a stack.
            TypeError: for a keyword that is not among these.
        """
        refuse_unknown(self, kwargs, RECORDED | {"tokens"})
        cache = one_cache(cache, past_key_values)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("Specify exactly one of `decoder_input_ids` and `decoder_inputs_embeds`.")
        recorded = {name: kwargs.get(name, getattr(self.config, name)) for name in RECORDED} | {"return_dict": True}
        of_encoder = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
        }
        if encoder_outputs is None:
            tokens = kwargs.get("tokens")
            if tokens is None:
                tokens = self.read_source(attention_mask=attention_mask, **of_encoder)
            encoder_outputs = self.encoder(input_ids, inputs_embeds=inputs_embeds, tokens=tokens, **recorded)
        else:
            if given := [name for name, value in of_encoder.items() if value is not None]:
                raise refused(given[0], "None where `encoder_outputs` are given", "something to encode")
            if not isinstance(encoder_outputs, BaseModelOutput):
                encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
            tokens = read_tokens(encoder_outputs[0], attention_mask)
            _check_source(tokens)
        outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            cache,
            decoder_inputs_embeds,
            use_cache,
            encoder_hidden_states=encoder_outputs[0],
            encoder_keep=tokens.keep,
            **recorded,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )


def _check_source(tokens: Tokens) -> None:
    """Raises a ValueError for what a decoder cannot attend to: several documents, or a mask of pairs."""
    _refuse_documents(tokens, "attention_mask")
    if tokens.pairs is not None:
        raise refused("attention_mask", "[B, S], which the decoder reads too", list(tokens.pairs.shape))


class Seq2SeqGenerationMixin(MixerGenerationMixin):
    """`generate` for encoder-decoders, whose decoder's tables of positions may end."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, **kwargs):
        self._settle_arguments(kwargs)
        result = super().generate(inputs, generation_config, **kwargs)
        if getattr(result, "sequences", result).shape[1] == self._longest:
            self._warn_of_end()
        return result

    @property
    def _longest(self) -> int | None:
        """How long the ids of the decoder may become: the last is never read."""
        config = self.config.decoder
        return config.max_position_embeddings + 1 if config.has_position_table else None

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        if self._longest is not None:
            generation_config.max_length = min(generation_config.max_length, self._longest)
        return generation_config

    def prepare_inputs_for_generation(self, input_ids, tokenizer=None, assistant_tokenizer=None, **kwargs):
        """The arguments of the next forward pass, as the library makes them, without those of the encoder, which has
        run, and the tokenizers."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("position_ids", "token_type_ids")}


class MixerForConditionalGeneration(MixerEncoderDecoder):
    """An encoder-decoder with a language-model head. Subclasses name the model, and add `Seq2SeqGenerationMixin`."""

    auto_class = "AutoModelForSeq2SeqLM"
    model_class: type[MixerSeq2SeqModel]
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.loss_type = "ForMaskedLM"  # that which does not shift labels
        width, bias = config.decoder.hidden_size, config.decoder.lm_head_bias
        self.lm_head = nn.Linear(width, config.decoder.vocab_size, bias=bias)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """
        What the decoder reads to say the labels: these, one place later, behind `config.decoder_start_token_id`.

        Args:
            labels (`LongTensor` [B, T]): ids, and -100 where no loss is wanted.

        Raises:
            ValueError: the configuration names no first id, or none for what stands in the place of -100.
        """
        shifted, pad = self._shifted(labels, "labels"), self.config.pad_token_id
        if pad is None:
            if bool((shifted == -100).any()):
                raise refused("config.pad_token_id", "an id, which takes the place of labels -100", None)
            return shifted
        return shifted.masked_fill(shifted == -100, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            labels (`LongTensor` [B, T], *optional*):
                Token ids, -100 where no loss is wanted. They are not shifted: the output at t is scored on the label
                at t. Where the decoder has no input, it is made of them.
            kwargs: those of the model without a head, and `num_items_in_batch` (the number of labels in all
                accumulated batches, by which the loss is divided) and `ignore_index` (in place of -100).

            The other arguments are those of the model without a head.

        Returns:
            `Seq2SeqLMOutput` with `logits` [B, T, vocab_size] and, if labels are given, `loss` in nats.
        """
        refuse_unknown(self, kwargs, RECORDED | LOSS_KEYWORDS)
        of_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS & kwargs.keys()}
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            position_ids,
            decoder_position_ids,
            encoder_outputs,
            one_cache(cache, past_key_values),
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            token_type_ids,
            return_dict=True,
            **kwargs,
        )
        states = head_input(outputs.last_hidden_state, self.config.decoder, self.config.tie_word_embeddings)
        logits = project(self.lm_head, states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **rest)


class MixerEncoderModel(MixerEncoderDecoder):
    """The encoder of an encoder-decoder alone. Subclasses belong to a family."""

    auto_class = "AutoModelForTextEncoding"
    pipeline_tag = "feature-extraction"
    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config):
        super().__init__(config)
        config.validate_fields()
        self.encoder = self.encoder_class(config.encoder)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """As that of the encoder, a bidirectional [`MixerModel`]."""
        recorded = {name: getattr(self.config, name) for name in RECORDED} | {"return_dict": True}
        return self.encoder(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            **{**recorded, **kwargs},
        )
