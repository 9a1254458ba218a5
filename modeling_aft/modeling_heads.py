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

from .modeling_text import MixerWithHead, head_input
from .ops_tokens import mean_kept


class MixerForMaskedLM(MixerWithHead):
    """A bidirectional mixer model with a language-model head. Subclasses name the model."""

    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "fill-mask"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    loss_keywords = frozenset(["num_items_in_batch", "ignore_index"])

    def __init__(self, config):
        super().__init__(config)
        if config.is_decoder:
            raise ValueError("`is_decoder` must be False for a masked language model, got True.")
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
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
        _, outputs, keywords = self._run(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        logits = self.lm_head(head_input(outputs.last_hidden_state, self.config, self.config.tie_word_embeddings))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **keywords)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MixerClassifier(MixerWithHead):
    """A mixer model with a linear layer to `config.num_labels`. Subclasses say what it is applied to."""

    infers_padding = True

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _encode(self, *inputs):
        """What is known of the tokens, the outputs of the model, without a cache, and the keywords of the loss."""
        return self._run(*inputs, use_cache=False)


class MixerForSequenceClassification(MixerClassifier):
    """A mixer model with a linear layer on the mean over the kept tokens. Subclasses name the model."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"

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
            attention_mask (`Tensor` [B, T], *optional*):
                Without one, `config.pad_token_id` at the beginning and the end of a row is padding.
            labels (`Tensor` [B] or [B, num_labels], *optional*): classes, or, as `config.problem_type` says, numbers.

            The other arguments are those of the model without a head.

        Returns:
            `SequenceClassifierOutput` with `logits` [B, num_labels] and, if labels are given, `loss`.

        Raises:
            ValueError: the rows hold several documents each, but there is one class for a row.
        """
        tokens, outputs, keywords = self._encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        if tokens.packing is not None:
            raise ValueError(
                "Packed documents (`position_ids` that begin again, `seq_idx`, `cu_seq_lens_q` or numbers in "
                "`attention_mask`) must be rows of their own here: a row gets one class."
            )
        logits = self.score(self.dropout(mean_kept(outputs.last_hidden_state, tokens.keep)))
        loss = None
        if labels is not None:
            loss = self.pooled_loss(logits, labels, keywords.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MixerForTokenClassification(MixerClassifier):
    """A mixer model with a linear layer on every token. Subclasses name the model."""

    auto_class = "AutoModelForTokenClassification"
    pipeline_tag = "token-classification"

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
        _, outputs, keywords = self._encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **keywords)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
