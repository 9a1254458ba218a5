# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Heads other than that of a causal language model: masked language model, sequence and token classifier."""

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from .modeling_common import MixerModel, MixerPreTrainedModel


class MixerForMaskedLM(MixerPreTrainedModel):
    """A bidirectional mixer model with a language-model head. Subclasses name the model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: type[MixerModel]

    def __init__(self, config):
        super().__init__(config)
        if config.is_decoder:
            raise ValueError("`is_decoder` must be False for a masked language model, got True.")
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        r"""
        Args:
            labels (`LongTensor` [B, T], *optional*): the token at each masked place, -100 elsewhere.

            The other arguments are those of the model without a head.

        Returns:
            `MaskedLMOutput` with `logits` [B, T, vocab_size] and, if labels are given, `loss` in nats.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MixerClassifier(MixerPreTrainedModel):
    """A mixer model with a linear layer to `config.num_labels`. Subclasses say what it is applied to."""

    model_class: type[MixerModel]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _encode(self, *inputs, **kwargs):
        """The outputs of the model, which has nothing to cache here."""
        return self.model(*inputs, **{**kwargs, "use_cache": False})


class MixerForSequenceClassification(MixerClassifier):
    """A mixer model with a linear layer on the mean over the kept tokens. Subclasses name the model."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            labels (`Tensor` [B] or [B, num_labels], *optional*): classes, or, as `config.problem_type` says, numbers.

            The other arguments are those of the model without a head.

        Returns:
            `SequenceClassifierOutput` with `logits` [B, num_labels] and, if labels are given, `loss`.
        """
        outputs = self._encode(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            kept = attention_mask[..., None].to(hidden_states.dtype)  # [B, T, 1]
            pooled = (hidden_states * kept).sum(1) / kept.sum(1).clamp_min(1)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            # Trainer gives the number of labels in all accumulated batches, of which this loss is the part of one.
            if (num_items := kwargs.get("num_items_in_batch")) is not None:
                loss = loss * (labels != -100).sum() / num_items
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MixerForTokenClassification(MixerClassifier):
    """A mixer model with a linear layer on every token. Subclasses name the model."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        r"""
        Args:
            labels (`LongTensor` [B, T], *optional*): class of each token, -100 where no loss is wanted.

            The other arguments are those of the model without a head.

        Returns:
            `TokenClassifierOutput` with `logits` [B, T, num_labels] and, if labels are given, `loss`.
        """
        outputs = self._encode(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
