# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Heads of encoder-decoders other than that of a language model: sequence classifier."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqSequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .compatibility import refuse_unknown
from .modeling_seq2seq import RECORDED, MixerEncoderDecoder, MixerSeq2SeqModel
from .ops_modes import can_read
from .ops_tokens import Tokens, compact, expand, refused


class MixerSeq2SeqForSequenceClassification(MixerEncoderDecoder):
    """An encoder-decoder with a linear layer on what its decoder says at the end. Subclasses name the model."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    model_class: type[MixerSeq2SeqModel]
    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.dropout = nn.Dropout(config.decoder.hidden_dropout_prob)
        self.score = nn.Linear(config.decoder.hidden_size, config.num_labels)
        self.post_init()

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
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> Seq2SeqSequenceClassifierOutput:
        r"""
        Args:
            input_ids (`LongTensor` [B, S], *optional*):
                What the encoder reads. Where the decoder has no input of its own, it reads the same, one place later,
                and what it says at the last `config.eos_token_id` of each row is classified.
            attention_mask (`Tensor` [B, S], *optional*):
                Without one, `config.pad_token_id` at the beginning and the end of a row is padding.
            decoder_input_ids (`LongTensor` [B, T], *optional*):
                Another text for the decoder, or `decoder_inputs_embeds` [B, T, D]. What it says at the last kept token
                of each row is classified.
            labels (`Tensor` [B] or [B, num_labels], *optional*): classes, or, as `config.problem_type` says, numbers.
            kwargs: those of the model without a head, and `num_items_in_batch` (the number of labels in all
                accumulated batches, by which the loss is divided).

            The other arguments are those of the model without a head.

        Returns:
            `Seq2SeqSequenceClassifierOutput` with `logits` [B, num_labels] and, if labels are given, `loss`.

        Raises:
            ValueError: a row has no end, or the decoder has neither an input nor ids to make one of.
        """
        refuse_unknown(self, kwargs, RECORDED | {"num_items_in_batch"})
        number = kwargs.pop("num_items_in_batch", None)
        tokens = None
        if encoder_outputs is None:
            tokens = self.model.read_source(
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                token_type_ids=token_type_ids,
                infer_padding=True,
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None or encoder_outputs is not None:
                raise refused("decoder_input_ids", "given where there are no `input_ids` to make them of", None)
            if decoder_attention_mask is not None:
                raise refused("decoder_attention_mask", "None where the decoder reads `input_ids`", "one")
            place = self._ends(input_ids, tokens)
            decoder_input_ids = self._shifted_kept(input_ids, tokens)
            decoder_attention_mask = tokens.keep
        else:
            given = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
            place = _last_kept(given, decoder_attention_mask)
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            position_ids,
            decoder_position_ids,
            encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=False,
            token_type_ids=token_type_ids,
            tokens=tokens,
            return_dict=True,
            **kwargs,
        )
        states = outputs.last_hidden_state
        pooled = states.gather(1, place[:, None, None].expand(-1, -1, states.shape[2]))[:, 0]
        logits = self.score(self.dropout(pooled))
        loss = None if labels is None else self.pooled_loss(logits, labels, number)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **rest)

    def _ends(self, input_ids: torch.LongTensor, tokens: Tokens) -> torch.LongTensor:
        """[B]: the place of the last end of each row."""
        ends = self.config.eos_token_id
        if ends is None:
            raise refused("config.eos_token_id", "an id, which ends the rows that are classified", None)
        is_end = torch.isin(input_ids, torch.tensor(ends, device=input_ids.device))
        if tokens.keep is not None:
            is_end = is_end & tokens.keep
        return _last_place(is_end, "input_ids", f"ids with an end (config.eos_token_id={ends}) in every row")

    def _shifted_kept(self, input_ids: torch.LongTensor, tokens: Tokens) -> torch.LongTensor:
        """[B, S]: at each kept place the id at the one before it."""
        if tokens.slot is None:
            return self._shifted(input_ids, "those of the encoder")
        shifted = self._shifted(compact(input_ids[..., None], tokens.slot)[..., 0], "those of the encoder")
        return expand(shifted[..., None], tokens.slot)[..., 0]


def _last_kept(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.LongTensor:
    """[B]: the place of the last kept token of each row of inputs [B, T] or [B, T, D]."""
    if mask is None:
        mask = torch.ones(inputs.shape[:2], device=inputs.device)
    if mask.shape != inputs.shape[:2]:
        raise refused("decoder_attention_mask", f"of shape {list(inputs.shape[:2])}", list(mask.shape))
    return _last_place(mask != 0, "decoder_attention_mask", "1 at a token of every row")


def _last_place(marked: torch.Tensor, name: str, allowed: str) -> torch.LongTensor:
    """
    The last place [B] that is marked in each row of [B, T] bool.

    Raises:
        ValueError: names the argument, what is allowed, and the rows in which none is.
    """
    place = torch.where(marked, torch.arange(marked.shape[1], device=marked.device), -1).amax(1)
    if can_read(place) and bool((place < 0).any()):
        raise refused(name, allowed, f"none in rows {(place < 0).nonzero().flatten().tolist()}")
    return place
