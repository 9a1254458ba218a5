# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The text model: embeddings of tokens and positions below a stack of blocks, and what is checked before it runs."""

import math

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.output_capturing import capture_outputs

from .cache_files import check_kind
from .compatibility import CACHE_NAME, BaseModelOutputWithPast, one_cache, refuse_unknown
from .modeling_stack import MixerPreTrainedModel, MixerStack, thinned
from .modeling_tokens import infer_mask, read_tokens
from .ops_modes import can_read, is_static, is_transformed, widest_dtype
from .ops_tokens import Tokens


# What `MixerModel.forward` knows beside its parameters. The longest documents need not be known here.
MODEL_KEYWORDS = frozenset(
    ["output_hidden_states", "output_attentions", "cu_seq_lens_k", "max_length_q", "max_length_k", "tokens"]
)

# Those of a model with a head, which has read the tokens itself.
HEAD_KEYWORDS = MODEL_KEYWORDS - {"tokens"} | {"token_type_ids", "seq_idx", "cu_seq_lens_q"}

logger = logging.get_logger(__name__)


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] float64, where the device has it, for positions [...]: sine and cosine in turn, their wavelengths
    from 2 pi to 2 pi 10^4."""
    channel = torch.arange(width, dtype=widest_dtype(positions.device), device=positions.device)
    frequency = torch.exp(-math.log(1e4) * 2 / width * (channel // 2))
    return torch.sin(positions[..., None] * frequency + math.pi / 2 * (channel % 2))


def head_input(hidden_states: torch.Tensor, config, tied: bool) -> torch.Tensor:
    """What a language-model head is applied to: less than what a model gives, where the head shares the weight of
    embeddings that are large (`config.scaling`)."""
    return hidden_states * config.hidden_size**-0.5 if tied and config.scaling == "weights" else hidden_states


class MixerModel(MixerStack):
    """Token (and position) embeddings, blocks, final norm. Subclasses name their block."""

    auto_class = "AutoModel"
    pipeline_tag = "feature-extraction"

    def __init__(self, config, **block_sizes):
        super().__init__(config)
        config.validate_fields()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.add_blocks(causal=config.is_decoder, **block_sizes)
        self._state_kind = config.state_kind
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`LongTensor` [B, T], *optional*): token ids; either these or `inputs_embeds`.
            attention_mask (`Tensor` [B, T or past + T], *optional*):
                1 keeps a token, 0 makes it padding, wherever it stands; larger numbers number packed documents. Only
                the last T columns are read: what was padded before is part of the cache. The Synthesizer also takes
                [B or 1, 1 or H, T, past + T], bool (True: seen) or what is added to the logits.
            position_ids (`LongTensor` [B or 1, T], *optional*):
                By default the number of kept tokens before each. Where they begin again, the next document begins.
            cache (`Cache`, *optional*): the state after earlier tokens; it is updated in place.
            inputs_embeds (`FloatTensor` [B, T, D], *optional*): vectors in place of token embeddings.
            use_cache (`bool`, *optional*): whether to return the state; `config.use_cache` outside of training.
            token_type_ids (`LongTensor` [B, T], *optional*): all 0, as tokenizers of other models make them.
            seq_idx (`LongTensor` [B, T], *optional*): which of its row's packed documents a token belongs to.
            cu_seq_lens_q (`LongTensor` [N + 1], *optional*): where packed documents begin, in a batch of one row.
            past_key_values (`Cache`, *optional*): the older name of `cache`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`; and as the collators of packed
                documents give them, `cu_seq_lens_k` (the same as `cu_seq_lens_q`), `max_length_q`, `max_length_k`.
                Heads pass what `read` has given them as `tokens`.

        Returns:
            `BaseModelOutputWithPast` with `last_hidden_state` [B, T, D]. Packed documents have no state to return.

        Raises:
            ValueError: for inputs that do not fit together, or a position beyond `max_position_embeddings`.
            TypeError: for a keyword that is not among these.
        """
        refuse_unknown(self, kwargs, MODEL_KEYWORDS)
        cache = one_cache(cache, past_key_values)
        tokens = kwargs.get("tokens")
        if tokens is None:
            tokens = self.read(
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                cache,
                token_type_ids=token_type_ids,
                seq_idx=seq_idx,
                cu_seq_lens_q=cu_seq_lens_q,
                cu_seq_lens_k=kwargs.get("cu_seq_lens_k"),
            )
        cache = self._prepare_cache(cache, use_cache, tokens)
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self._encode(input_ids, inputs_embeds, tokens, cache, output_attentions)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _encode(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        tokens: Tokens,
        cache: Cache | None,
        output_attentions: bool,
        *block_inputs,
    ) -> torch.Tensor:
        """[B, T, D] from what has been read and checked."""
        hidden_states = self._embed(input_ids, tokens) if inputs_embeds is None else inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(tokens.positions)
        elif self.config.position_embedding_type == "sinusoidal":
            table = sinusoids(tokens.positions, hidden_states.shape[-1])
            hidden_states = hidden_states + table.to(hidden_states.dtype)
        hidden_states = thinned(self.dropout, hidden_states)
        if cache is not None:
            first = cache.layers[0]
            tokens = tokens.advanced(None if first.is_empty else first.position, hidden_states)
            if tokens.can_wait:
                tokens = tokens._replace(can_wait=_can_wait(hidden_states, cache))
        return self.run_blocks(hidden_states, tokens, cache, output_attentions, *block_inputs)

    def read(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None = None,
        *,
        token_type_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        cu_seq_lens_k: torch.LongTensor | None = None,
        infer_padding: bool = False,
    ) -> Tokens:
        """
        What the layers need to know of the tokens, checked; the arguments are those of `forward`.

        Args:
            infer_padding: whether `config.pad_token_id` at the ends of a row is padding where no mask is given. An id
                beyond the vocabulary is in any case.

        Raises:
            ValueError: for inputs that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs.dim() != (2 if inputs_embeds is None else 3):
            name, shape = ("input_ids", "[B, T]") if inputs_embeds is None else ("inputs_embeds", "[B, T, D]")
            raise ValueError(f"`{name}` must be {shape}, got {list(inputs.shape)}.")
        if token_type_ids is not None and can_read(token_type_ids) and bool(token_type_ids.any()):
            raise ValueError("`token_type_ids` must all be 0, got others: these models know no types of tokens.")
        if (cu_seq_lens_q is None) != (cu_seq_lens_k is None) or (
            cu_seq_lens_q is not None and can_read(cu_seq_lens_q) and not torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        ):
            raise ValueError("`cu_seq_lens_q` and `cu_seq_lens_k` must be the same: a document sees itself alone.")
        pad, size = self.config.pad_token_id, self.embed_tokens.num_embeddings
        if attention_mask is None and input_ids is not None and pad is not None and (infer_padding or pad >= size):
            attention_mask = infer_mask(input_ids, pad, at_ends=pad < size)
        seen, seen_at_most = self._seen_tokens(cache, inputs.shape[0])
        return read_tokens(
            inputs,
            attention_mask,
            position_ids,
            seen=seen,
            seen_at_most=seen_at_most,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens_q,
            limit=self.config.position_limit,
        )

    def _embed(self, input_ids: torch.LongTensor, tokens: Tokens) -> torch.Tensor:
        # Whatever stands for padding, be it beyond the vocabulary, needs no vector of its own.
        if tokens.keep is not None:
            input_ids = input_ids.masked_fill(~tokens.keep, 0)
        pad = self.config.pad_token_id
        if pad is not None and pad >= self.embed_tokens.num_embeddings:
            input_ids = input_ids.masked_fill(input_ids == pad, 0)
        return self.embed_tokens(input_ids)

    def _seen_tokens(self, cache: Cache | None, batch: int) -> tuple[torch.Tensor | None, int | None]:
        """[B], the number of kept tokens in a cache, or None if it is empty; and what it does not exceed, if that is
        known. After a check that the cache fits the model."""
        if cache is None:
            return None, None
        found = [getattr(layer, "_layer_type", None) for layer in getattr(cache, "layers", [])]
        if found != self.config.layer_types:
            raise ValueError(
                f"`cache` must be a cache made for this model, e.g. DynamicCache(config=model.config), with "
                f"layers of type {self.config.layer_types[0]!r}; got {type(cache).__name__} with {found}."
            )
        first = cache.layers[0]
        if first.unfinished:
            raise ValueError(
                "`cache` must be that of a forward pass that ended; this one was interrupted between two layers. Its "
                "`reset()` makes it an empty one."
            )
        if first.kind is not None:
            check_kind("`cache`", first.kind, self._state_kind)
        if first.is_empty:
            return None, None
        if first.position.shape[0] != batch:
            raise ValueError(f"`cache` must hold a batch of {batch}, got {first.position.shape[0]}.")
        # A graph would be bound to a number.
        return first.position, None if torch.compiler.is_compiling() else first.known_length

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, tokens: Tokens) -> Cache | None:
        if not self.config.is_decoder:
            if use_cache or cache is not None:
                raise ValueError("`use_cache` and `cache` need `config.is_decoder=True`, got False.")
            return None
        wanted = use_cache or (use_cache is None and cache is not None)
        if tokens.packing is not None:
            if wanted:
                raise ValueError("`use_cache` must be False for packed documents, which have no one state, got True.")
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and wanted:
            if cache is not None and not cache.layers[0].is_empty:
                raise ValueError("`cache` must be empty under gradient checkpointing, which would read it twice.")
            logger.warning_once("Gradient checkpointing goes without a cache: `use_cache` is False.")
            return None
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if not use_cache:
            if cache is not None and not cache.layers[0].is_empty:
                raise ValueError("`use_cache` must not be False where `cache` holds tokens to go on from.")
            return None
        cache = DynamicCache(config=self.config) if cache is None else cache
        cache.layers[0].kind = self._state_kind
        return cache


def _can_wait(hidden_states: torch.Tensor, cache: Cache) -> bool:
    """Whether states may take up a token later: where no gradient is recorded, no graph made, and none of it may have
    to be taken back."""
    if torch.is_grad_enabled() or is_static() or is_transformed():
        return False
    is_plain = type(hidden_states) is torch.Tensor and hidden_states.device.type in ("cpu", "cuda")
    return is_plain and not cache.layers[0].record_past and not getattr(cache, "offloading", False)


class MixerWithHead(MixerPreTrainedModel):
    """A mixer model below a head. Subclasses name the model."""

    model_class: type[MixerModel]
    # Whether the padding id at the ends of a row is padding where no mask is given, though it is in the vocabulary.
    infers_padding = False
    # What the head itself knows of the keywords of a forward pass.
    loss_keywords = frozenset(["num_items_in_batch"])

    def _run(self, input_ids, attention_mask, position_ids, inputs_embeds, keywords: dict, **cached):
        """What is known of the tokens, the outputs of the model, and those of the keywords that are the head's."""
        if keywords.pop("use_cache", None):
            raise ValueError("`use_cache` must be False, got True: this head returns no cache.")
        refuse_unknown(self, keywords, HEAD_KEYWORDS | self.loss_keywords)
        of_head = {name: value for name, value in keywords.items() if name in self.loss_keywords}
        of_tokens = ("token_type_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
        tokens = self.model.read(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cached.get("cache"),
            infer_padding=self.infers_padding,
            **{name: keywords[name] for name in of_tokens if name in keywords},
        )
        recorded = {name: keywords[name] for name in ("output_hidden_states", "output_attentions") if name in keywords}
        outputs = self.model(input_ids, inputs_embeds=inputs_embeds, tokens=tokens, **cached, **recorded)
        return tokens, outputs, of_head
