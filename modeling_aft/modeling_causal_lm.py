# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Causal language models: the head, its loss, and what `generate` needs to know of states and tables of positions."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compatibility import CACHE_NAME, CausalLMOutputWithPast, one_cache
from .continuous_batching import ContinuousBatch, can_stay_full, check_options, make_request, outputs_of
from .modeling_linear import project
from .modeling_text import MixerWithHead, head_input
from .ops_tokens import refused
from .refresh import check_refresh, window_start


# What looks up the scores of the ids in a text.
LOOK_UP_IDS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

logger = logging.get_logger(__name__)


class MixerForCausalLM(MixerWithHead):
    """A mixer model with a language-model head. Subclasses name the model, and add `StateGenerationMixin`."""

    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    loss_keywords = frozenset(["num_items_in_batch", "shift_labels", "ignore_index"])

    def __init__(self, config):
        super().__init__(config)
        if not config.is_decoder:
            raise ValueError("`is_decoder` must be True for a causal language model, got False.")
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.LongTensor | None = None,
        seq_idx: torch.LongTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`LongTensor` [B, T], *optional*):
                Token ids, -100 where no loss is wanted. They are shifted inside: the output at t is scored on the
                label at t + 1. A label does not count where the token before it is padding or ends another document.
            logits_to_keep (`int` or `LongTensor`, defaults to 0):
                How many of the last positions get logits (0: all of them), or the indices of those that do.
            kwargs: those of the model without a head, and `num_items_in_batch` (the number of labels in all
                accumulated batches, by which the loss is divided), `shift_labels` (labels in the place of the token
                before them, scored as they are) and `ignore_index` (in place of -100).

            The other arguments are those of the model without a head.

        Returns:
            `CausalLMOutputWithPast` with `logits` [B, T, vocab_size] and, if labels are given, `loss` in nats.
        """
        keywords = {"token_type_ids": token_type_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, **kwargs}
        cache = one_cache(cache, past_key_values)
        tokens, outputs, loss_keywords = self._run(
            input_ids, attention_mask, position_ids, inputs_embeds, keywords, cache=cache, use_cache=use_cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = head_input(outputs.last_hidden_state[:, kept], self.config, self.config.tie_word_embeddings)
        logits = project(self.lm_head, states)
        loss = None
        if labels is not None:
            if tokens.continues is not None:
                ignored = loss_keywords.get("ignore_index", -100)
                labels = labels.masked_fill(~tokens.continues.to(labels.device), ignored)
            if loss_keywords.get("shift_labels") is not None:  # which the library takes whole, but not as a slice
                loss_keywords["shift_labels"] = loss_keywords["shift_labels"].contiguous()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_keywords)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )


class EndOfTables(StoppingCriteria):
    """
    Ends each row where the tables of positions end.

    Args:
        columns (`LongTensor` [B]): how long the ids of each row may become.
    """

    eos_token_id = None  # by having one, a criterion asks for padding behind the end of a row

    def __init__(self, columns: torch.Tensor):
        self.columns = columns

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        columns = self.columns.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.columns))
        return input_ids.shape[1] >= columns


class BeyondVocabulary(LogitsProcessor):
    """
    Shows a processor that looks up the score of each id in a text scores for those beyond the vocabulary too, such as
    that of padding may be: minus infinity.

    Args:
        processor (`LogitsProcessor`): the one to show them to.
        size (`int`): the number of ids.
    """

    def __init__(self, processor: LogitsProcessor, size: int):
        self.processor, self.size = processor, size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        vocab_size = scores.shape[-1]
        scores = nn.functional.pad(scores, (0, self.size - vocab_size), value=-math.inf)
        return self.processor(input_ids, scores)[..., :vocab_size]


class MixerGenerationMixin(GenerationMixin):
    """What `generate` has to know of every model whose cache is a state, and whose padding may be beyond the
    vocabulary."""

    @staticmethod
    def create_masks_for_generate(
        attention_mask=None, inputs_embeds=None, cache=None, past_key_values=None, is_first_iteration=True, **kwargs
    ):
        """
        Keeps `generate` from making [T, T] masks: padding is all that a mixer needs to know of its input. A step that
        may be compiled sees nothing of the padding before it, whose mask would grow; what is written is never padding.
        """
        # A dynamic cache is never compiled. Exporters join the masks of its steps to that of several tokens.
        if attention_mask is None or type(one_cache(cache, past_key_values)) is DynamicCache:
            return attention_mask
        if inputs_embeds.shape[1] == 1 and not is_first_iteration:
            return None
        # A copy, because a compiled step is specialised on strides, and those of a slice change with every token.
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        """Without the warning of a text beyond `max_position_embeddings`: if it ends there, `generate` says so."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria

    def init_continuous_batching(self, *args, **kwargs):
        """Raises a ValueError, for `generate_batch` and all others that begin here."""
        raise ValueError(
            "Continuous batching keeps the keys and values of attention in pages, which these models do not have. "
            "AFT-simple, AFT-local and AFT-conv have a `generate_batch` of their own. Use `generate` with a padded "
            "batch for others: the state of a row does not depend on its padding."
        )

    @staticmethod
    def _settle_arguments(kwargs: dict) -> Cache | None:
        """Gives the cache among the arguments of `generate` its name in the installed release, and leaves one limit
        of the length; returns the cache."""
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        # Of itself the library prefers new tokens of a config, and warns where a config has a length.
        if kwargs.get("max_length") is not None:
            kwargs.setdefault("max_new_tokens", None)
        elif kwargs.get("max_new_tokens") is not None:
            kwargs["max_length"] = None
        return cache

    def _warn_of_end(self) -> None:
        logger.warning(
            f"A text has reached the end of the model's tables, max_position_embeddings="
            f"{self.config.get_text_config(decoder=True).max_position_embeddings}, and ends there. Fewer "
            "`max_new_tokens`, or a shorter prompt, would do."
        )

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        """The library's, whose candidates, which are all read, may go beyond the end of the tables."""
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        get_candidates, longest = generator.get_candidates, generation_config.max_length

        def get_candidates_within(input_ids, **kwargs):
            candidates, logits = get_candidates(input_ids, **kwargs)
            room = max(longest - 1 - input_ids.shape[1], 0)
            candidates = candidates[:, : input_ids.shape[1] + room]
            return candidates, None if logits is None else logits[:, :room]

        generator.get_candidates = get_candidates_within
        return generator

    def _get_logits_processor(self, generation_config, *args, encoder_input_ids=None, **kwargs):
        processors = super()._get_logits_processor(
            generation_config, *args, encoder_input_ids=encoder_input_ids, **kwargs
        )
        last = -1 if generation_config.pad_token_id is None else generation_config.pad_token_id
        if encoder_input_ids is not None and encoder_input_ids.dim() == 2:  # those of the prompt
            last = max(last, int(encoder_input_ids.max()))
        if last < self.config.vocab_size:
            return processors
        return LogitsProcessorList(
            BeyondVocabulary(processor, last + 1) if isinstance(processor, LOOK_UP_IDS) else processor
            for processor in processors
        )

    @functools.wraps(GenerationMixin.compute_transition_scores)
    def compute_transition_scores(self, sequences, *args, **kwargs):
        padding = sequences >= self.config.vocab_size
        scores = super().compute_transition_scores(sequences.masked_fill(padding, 0), *args, **kwargs)
        return scores.masked_fill(padding[:, padding.shape[1] - scores.shape[1] :], 0)


class StateGenerationMixin(MixerGenerationMixin):
    """`generate` for causal language models, whose tables of positions may end."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, **kwargs):
        cache = self._settle_arguments(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["keeps_positions"] = True
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            kwargs["attention_mask"] = mask = self._check_prompt_mask(mask)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if prompt is None:
            return super().generate(inputs, generation_config, **kwargs)
        start = 0 if ids is None else ids.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        total = prompt.shape[1] if mask is None else mask.shape[1]
        if past:
            assisted = self._is_assisted(generation_config, kwargs)
            self._check_what_is_left(prompt, past, total, whole=assisted or prompt is not ids)
            read = past - total + prompt.shape[1]  # columns of the prompt
            size = self._option("prefill_chunk_size", generation_config, kwargs)
            if size is not None:  # not all releases begin where the cache is
                self._read_in_chunks(prompt[:, read:-1], mask, kwargs.get("position_ids"), cache, past, size)
                past, read, kwargs["prefill_chunk_size"] = total - 1, prompt.shape[1] - 1, None
            # Of itself the library would give all of the prompt to the cache again.
            cache.layers[0].columns_read = read if assisted or size is not None else None
        every, overlap = kwargs.get("refresh_every"), kwargs.get("refresh_overlap")
        check_refresh(self.config, every, overlap)
        if every is not None:
            self._check_refreshed(prompt, ids, mask, past, generation_config, kwargs)
        if every is not None or not self.config.has_position_table:
            return super().generate(inputs, generation_config, **kwargs)
        kept = self._count_kept(prompt, mask, cache, past, total)
        room = (self.config.max_position_embeddings + 1 - kept).clamp_min(1)  # the last token is never read
        longest = int(room.max())
        asked = self._new_tokens_asked(generation_config, kwargs, start)
        if asked > longest:
            kwargs |= {"max_length": None, "max_new_tokens": longest}
        if int(room.min()) < min(asked, longest):
            criteria = kwargs.get("stopping_criteria") or []
            kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, EndOfTables(start + room)])
            kwargs["last_column"] = total + room - 1
            padding = self._padding_id(generation_config, kwargs)
            kwargs["pad_token_id"] = padding = 0 if padding is None else padding  # something has to stand there
        result = super().generate(inputs, generation_config, **kwargs)
        if "last_column" in kwargs:  # beam search knows of padding only where there is an end of text
            sequences = getattr(result, "sequences", result)
            sequences.masked_fill_(sequences < 0, padding)
        written = getattr(result, "sequences", result).shape[1] - start
        if written >= int(room.min()) and asked > int(room.min()):
            self._warn_of_end()
        return result

    @torch.no_grad()
    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        max_batch_size: int = 32,
        **kwargs,
    ) -> dict:
        """
        Continues many prompts in a batch that stays full: where a text has ended, the next prompt takes its row. Each
        text is what `generate` writes for its prompt alone, but for rounding; with `do_sample` tokens are drawn from
        the generator of torch in the order of the steps.

        Args:
            inputs (`Sequence[Sequence[int]]`): the ids of each prompt, without padding.
            generation_config (`GenerationConfig`, *optional*): the model's by default.
            max_new_tokens (`int` or one for each prompt, *optional*): how many tokens to write at most; the config
                says it by default. A text ends where the model's tables of positions do.
            max_batch_size (`int`): how many rows the batch has.
            kwargs: fields of the config, such as `do_sample`, `temperature` and `eos_token_id`.

        Returns:
            `dict[str, GenerationOutput]`: by `"req_0"`, `"req_1"`, ..., in the order of the prompts, as the library's
            `generate_batch` gives them: `prompt_ids` and `generated_tokens`, which end with the token that ends texts
            if there is one.

        Raises:
            ValueError: the state grows with the text, as that of AFT-full and of the Synthesizer; a prompt is empty,
                or longer than the model's tables; or for an option that a batch of requests cannot follow.
            TypeError: for an option that does not exist.
        """
        if not can_stay_full(self.config):
            self.init_continuous_batching()
        if not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise refused("max_batch_size", "a whole number of at least 1", max_batch_size)
        config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        if unknown:
            raise TypeError(f"generate_batch() knows no option `{next(iter(unknown))}`.")
        check_options(config)
        self._prepare_special_tokens(config, True, device=self.device)
        if max_new_tokens is None or isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(inputs)
        if len(max_new_tokens) != len(inputs):
            raise refused("max_new_tokens", f"one number, or {len(inputs)}, one for each prompt", len(max_new_tokens))
        for number, ids in enumerate(inputs):
            self._check_prompt(f"inputs[{number}]", ids)
        numbers = [
            self._new_tokens_asked(config, {"max_new_tokens": asked}, len(ids))
            for asked, ids in zip(max_new_tokens, inputs, strict=True)
        ]
        if min(numbers, default=1) < 1:
            raise refused("max_new_tokens", "at least 1", min(numbers))
        requests = [make_request(self, config, ids, asked) for ids, asked in zip(inputs, numbers, strict=True)]
        ContinuousBatch(self, config, max_batch_size).run(requests)
        if any(request.is_cut_short for request in requests):
            self._warn_of_end()
        return outputs_of(requests)

    def _check_prompt(self, name: str, ids: Sequence[int]) -> None:
        limit = self.config.position_limit
        if len(ids) == 0 or (limit is not None and len(ids) > limit):
            allowed = "at least 1 id" if limit is None else f"1 to {limit} ids, as max_position_embeddings says"
            raise refused(name, allowed, f"{len(ids)} of them")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise refused(name, f"ids from 0 to {self.config.vocab_size - 1}", f"{min(ids)} to {max(ids)}")

    @torch.no_grad()
    def _read_in_chunks(self, prompt, mask, position_ids, cache: Cache, past: int, size: int) -> None:
        """Gives a prompt, ids or vectors, to a cache that has read `past` tokens, `size` tokens at a time."""
        for start in range(0, prompt.shape[1], size):
            part = prompt[:, start : start + size]
            end = past + start + part.shape[1]
            self(
                **{"input_ids" if part.dim() == 2 else "inputs_embeds": part},
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if position_ids is None else position_ids[:, :end][:, -part.shape[1] :],
                cache=cache,
                logits_to_keep=1,
            )

    @staticmethod
    def _check_prompt_mask(mask: torch.Tensor) -> torch.Tensor:
        """The mask of a prompt as 0 and 1. What numbers documents would number what is written, too."""
        number = mask.amax(1, keepdim=True)
        if bool(((mask != 0) & (mask != number)).any()) or bool((mask < 0).any()):
            raise ValueError("`attention_mask` must be 0 and 1 in `generate`, got several numbers in a row.")
        return mask if mask.dtype == torch.bool else (mask != 0).long()

    @staticmethod
    def _check_what_is_left(prompt: torch.Tensor, past: int, total: int, whole: bool) -> None:
        """
        Checks that a prompt fits a cache that has read `past` tokens, of a text of `total` tokens.

        Raises:
            ValueError: nothing is left to read, or the prompt is neither the whole text nor what is left of it.
        """
        name, length, left = "input_ids" if prompt.dim() == 2 else "inputs_embeds", prompt.shape[1], total - past
        if left < 1:
            raise ValueError(
                f"`cache` has read {past} tokens, and `{name}` with `attention_mask` are {total}: nothing is left to "
                "read. Give the whole text with at least one token more, or what is new and an `attention_mask` of "
                "the whole text."
            )
        if length not in ((total,) if whole else (total, left)):
            raise ValueError(
                f"`{name}` must be {total} tokens (the whole text)"
                + ("" if whole else f" or the last {left} of them (which `cache` has not read)")
                + f", got {length}."
            )

    def _check_refreshed(self, prompt, ids, mask, past: int, generation_config, kwargs: dict) -> None:
        """Raises a ValueError if a call of `generate` cannot start anew."""
        problem = None
        if past:
            problem = f"an empty `cache`, got one that has read {past} tokens"
        elif prompt is not ids:
            problem = "`input_ids`, got `inputs_embeds`"
        elif mask is not None and mask.dim() != 2:
            problem = f"an `attention_mask` [B, T], got {list(mask.shape)}"
        elif kwargs.get("position_ids") is not None:
            problem = "positions that the model counts, got `position_ids`"
        elif self._is_assisted(generation_config, kwargs):
            problem = "a model alone, got assisted decoding"
        elif self._option("prefill_chunk_size", generation_config, kwargs) is not None:
            problem = "no `prefill_chunk_size`: of a long prompt it reads the last window alone"
        if problem is not None:
            raise ValueError(f"`refresh_every` needs {problem}.")

    def _count_kept(self, prompt, mask, cache, past: int, total: int) -> torch.Tensor:
        """[B]: the kept tokens of each row of the prompt, those in the cache included."""
        rows = len(prompt)
        if mask is None:
            pad = self.generation_config.pad_token_id
            new = torch.full((rows,), total - past, device=prompt.device)
            if past == 0 and pad is not None and prompt.dim() == 2:
                new = (prompt != pad).sum(1)  # as `generate` makes a mask of it
        else:
            new = (mask[:, past:] != 0).sum(1)
        return (new + cache.layers[0].position.to(new.device) if past else new).cpu()

    def _option(self, name: str, generation_config, kwargs: dict):
        """What a call of `generate` says of an option, or the config that it is given, or the model's."""
        config = self.generation_config if generation_config is None else generation_config
        value = kwargs.get(name)
        return getattr(config, name, None) if value is None else value

    def _is_assisted(self, generation_config, kwargs: dict) -> bool:
        """Whether candidates for the next tokens come from elsewhere."""
        options = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        return any(self._option(name, generation_config, kwargs) is not None for name in options)

    def _padding_id(self, generation_config, kwargs: dict):
        """What stands behind the end of a row; None if there is nothing."""
        values = (self._option(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        value = next((value for value in values if value is not None), None)
        return value[0] if isinstance(value, list) else value

    def _new_tokens_asked(self, generation_config, kwargs: dict, start: int) -> int:
        """How many tokens a call of `generate` may write, by its arguments, the given config, or the model's."""
        config = self.generation_config if generation_config is None else generation_config
        for source in (kwargs.get, lambda name: getattr(config, name, None)):
            if (value := source("max_new_tokens")) is not None:
                return value
            if (value := source("max_length")) is not None:
                return value - start
        return 20  # what the library falls back on

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        attention_mask=None,
        last_column=None,
        keeps_positions=False,
        refresh_every=None,
        refresh_overlap=None,
        tokenizer=None,
        assistant_tokenizer=None,
        **kwargs,
    ):
        """
        The arguments of the next forward pass, as the library makes them. It passes the tokenizers, which find strings
        to stop at, this far.

        Args:
            last_column (`LongTensor` [B], *optional*):
                How many columns of the mask each row may read: a row that has come to the end of the tables goes on as
                padding while others are written.
            keeps_positions (`bool`):
                Whether `position_ids` are the user's own. Those that the library makes begin again behind padding at
                the end of a prompt; the model counts its tokens by itself.
            refresh_every, refresh_overlap (`int`, *optional*):
                R and O: before the model would read more than R tokens it forgets them and reads the last O again.
        """
        if not keeps_positions:
            kwargs.pop("position_ids", None)
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and getattr(cache.layers[0], "columns_read", None) is not None:
            prompt = input_ids if inputs_embeds is None else inputs_embeds
            kwargs["next_sequence_length"] = prompt.shape[1] - cache.layers[0].columns_read
            cache.layers[0].columns_read = None
        if refresh_every is not None:
            windows = self._find_windows(input_ids, attention_mask, cache, refresh_every, refresh_overlap)
            if windows is not None and cache is None:
                input_ids, attention_mask = windows
            elif windows is not None:
                self._read_anew(*windows, cache)
                kwargs["next_sequence_length"] = 1
        if last_column is not None and attention_mask is not None and attention_mask.shape[1] > int(last_column.min()):
            columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            within = columns < last_column[:, None].to(columns.device)
            attention_mask = attention_mask * within
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
        ids = inputs.get("input_ids")
        if ids is not None and not kwargs.get("is_first_iteration"):
            # Rows that have ended are filled with a padding id, which need not be in the vocabulary.
            inputs["input_ids"] = ids.masked_fill(ids >= self.config.vocab_size, 0)
            if last_column is not None and attention_mask is not None:
                inputs.setdefault("attention_mask", attention_mask[:, -ids.shape[1] :].clone())
        return inputs

    @staticmethod
    def _find_windows(input_ids, attention_mask, cache: Cache | None, refresh_every: int, refresh_overlap: int):
        """
        What to read anew where a window begins at the last column, or the cache has read nothing of the one that it is
        in: ids [B, n] and their mask, up to that column. None where no row needs it; where one does, all rows are read
        again, as padding lets each of them start anew at a column of its own.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        index = attention_mask.cumsum(1) - 1  # of each token in its row
        start, start_before = (window_start(index[:, -1:] - n, refresh_every, refresh_overlap) for n in (0, 1))
        if cache is None or cache.layers[0].is_empty:
            start_before = torch.zeros_like(start)
        if torch.equal(start, start_before):
            return None
        within = attention_mask * (index >= start)
        first = int(within.amax(0).nonzero()[0])
        return input_ids[:, first:], within[:, first:]

    def _read_anew(self, input_ids, attention_mask, cache: Cache) -> None:
        """Reads windows, but for their last column, into a cache that forgets what it holds."""
        cache.reset()
        ids = input_ids[:, :-1]
        ids = ids.masked_fill(ids >= self.config.vocab_size, 0)  # padding behind the end of a row
        self._read_in_chunks(ids, attention_mask[:, :-1], None, cache, past=0, size=ids.shape[1])
