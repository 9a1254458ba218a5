# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Many prompts with one batch that stays full: where a text has ended, the next prompt takes its row. A state of fixed
size is a row of a few tensors, so nothing is padded, paged or moved but that."""

import copy
import math
from collections import deque
from collections.abc import Sequence

import torch
from transformers import (
    DynamicCache,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


# What looks at the scores of each row alone, and not at its ids.
WARPERS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# Options of `generate` that would mean something else here, with the values that they may have.
NEUTRAL = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "return_dict_in_generate": (None, False),
    "guidance_scale": (None, 1),
    **dict.fromkeys(
        (
            "assistant_early_exit",
            "max_time",
            "penalty_alpha",
            "dola_layers",
            "prefill_chunk_size",
            "prompt_lookup_num_tokens",
            "stop_strings",
        ),
        (None,),
    ),
}
READ_AT_ONCE = 4096  # tokens of prompts, with their padding


class Request:
    """
    A prompt, and what is written after it.

    Args:
        ids (`list[int]`): the prompt.
        asked (`int`): how many tokens to write at most.
        room (`int`): how many there are positions for.
        processors (`LogitsProcessorList`): what is done to the scores of its next token.
    """

    def __init__(self, ids: list[int], asked: int, room: int | float, processors: LogitsProcessorList):
        self.ids, self.asked, self.room, self.processors = ids, asked, room, processors
        self.written: list[int] = []

    @property
    def is_full(self) -> bool:
        return len(self.written) >= min(self.asked, self.room)

    @property
    def is_cut_short(self) -> bool:
        """Whether it was the end of the tables that ended the text."""
        return self.room < self.asked and len(self.written) == self.room

    @property
    def length(self) -> int:
        """Tokens that the model has read, or is about to."""
        return len(self.ids) + len(self.written)


class ContinuousBatch:
    """
    A batch of rows, each with a request or at rest.

    Args:
        model: a causal language model of this package with states of fixed size.
        config (`GenerationConfig`): how tokens are chosen, and which end a text; prepared by the model.
        size (`int`): the number of rows.
    """

    def __init__(self, model, config: GenerationConfig, size: int):
        self.model, self.config, self.size = model, config, size
        ends = config.eos_token_id
        self.ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request | None] = []
        self.next_ids: list[int] = []  # of each row, which the model has not read
        self.cache: DynamicCache | None = None
        self.longest = 0  # tokens of a row, at rest or not

    def run(self, requests: Sequence[Request]) -> None:
        """Writes all of them. Prompts of like length are read together, the longest first."""
        self.waiting.extend(sorted(requests, key=lambda request: len(request.ids), reverse=True))
        self._refill()
        while self.rows:
            ids = torch.tensor(self.next_ids, device=self.model.device)
            logits = self.model(ids[:, None], cache=self.cache).logits[:, -1]
            self.next_ids = self._write(self.rows, logits)
            self.longest += 1
            self.rows = [row if row is not None and not self._has_ended(row) else None for row in self.rows]
            if self._is_refill_due():
                self._refill()

    def _is_refill_due(self) -> bool:
        """Whether so many rows are at rest that it pays to take others in, or to go on without them; or one of them
        would leave the tables of positions."""
        resting = self.rows.count(None)
        limit = self.model.config.position_limit
        ends = limit is not None and self.longest > limit
        return resting > 0 and (ends or resting >= max(1, len(self.rows) // (8 if self.waiting else 4)))

    def _refill(self) -> None:
        """Leaves out the rows at rest, and gives their places to requests that wait."""
        kept = [number for number, row in enumerate(self.rows) if row is not None]
        self.cache = self._rows_of(self.cache, kept, len(self.rows))
        self.rows, self.next_ids = [self.rows[number] for number in kept], [self.next_ids[number] for number in kept]
        while self.waiting and len(self.rows) < self.size:
            self._read(self._next_group())
        self.longest = max((row.length for row in self.rows), default=0)
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.count_from(self.longest - 1)  # the last one written is not read yet

    def _next_group(self) -> list[Request]:
        """Requests that are read at once: those that wait first, as the free rows and the padded tokens allow."""
        group = [self.waiting.popleft()]
        while self.waiting and len(self.rows) + len(group) < self.size:
            if (len(group) + 1) * len(group[0].ids) > READ_AT_ONCE:
                break
            group.append(self.waiting.popleft())
        return group

    def _read(self, group: list[Request]) -> None:
        """Puts requests into rows behind the others, with the first token of each. Some may have ended with it."""
        length, device = max(len(request.ids) for request in group), self.model.device
        ids = torch.tensor([[0] * (length - len(r.ids)) + r.ids for r in group], device=device)
        lengths = torch.tensor([len(r.ids) for r in group], device=device)
        mask = torch.arange(length, device=device) >= length - lengths[:, None]
        cache = DynamicCache(config=self.model.config)
        logits = self.model(ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1]
        next_ids = self._write(group, logits)
        kept = [number for number, request in enumerate(group) if not self._has_ended(request)]
        cache = self._rows_of(cache, kept, len(group))
        self.rows += [group[number] for number in kept]
        self.next_ids += [next_ids[number] for number in kept]
        if self.cache is None:
            self.cache = cache
        elif cache is not None:
            for layer, new in zip(self.cache.layers, cache.layers, strict=True):
                layer.batch_append(new)

    def _rows_of(self, cache: DynamicCache | None, kept: list[int], rows: int) -> DynamicCache | None:
        """A cache of so many rows with those that are kept; None if there are none."""
        if kept and len(kept) < rows:
            cache.batch_select_indices(torch.tensor(kept, device=self.model.device))
        return cache if kept else None

    def _write(self, requests: list[Request | None], logits: torch.Tensor) -> list[int]:
        """Chooses a token for each request by logits [B, V], and adds it to it."""
        scores = logits.to(torch.float32, copy=True)
        writing = [request for request in requests if request is not None]
        if all(isinstance(processor, WARPERS) for processor in writing[0].processors):
            scores = writing[0].processors(None, scores)  # the same for all
        else:
            for number, request in enumerate(requests):
                if request is not None:
                    ids = torch.tensor([request.ids + request.written], device=scores.device)
                    scores[number] = request.processors(ids, scores[number : number + 1])[0]
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        tokens = tokens.tolist()
        for request, token in zip(requests, tokens, strict=True):
            if request is not None:
                request.written.append(token)
        return tokens

    def _has_ended(self, request: Request) -> bool:
        return request.is_full or request.written[-1] in self.ends


def can_stay_full(config) -> bool:
    """Whether the states of a model, of this package or another, have a fixed size, so that a row is all of one."""
    return set(getattr(config, "layer_types", None) or ()) == {"aft_state"}


def check_options(config: GenerationConfig) -> None:
    """
    Checks that a batch of requests can do what a config asks for.

    Raises:
        ValueError: names what it cannot do.
    """
    for name, allowed in NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))} in `generate_batch`, got {value!r}.")


def make_request(model, config: GenerationConfig, ids: Sequence[int], asked: int) -> Request:
    """The request of a prompt, with the processors that `generate` would have for it alone."""
    limit = model.config.position_limit
    room = math.inf if limit is None else limit + 1 - len(ids)  # the last token is never read
    config = copy.copy(config)
    config.max_length = len(ids) + min(asked, room)
    prompt = torch.tensor([list(ids)], device=model.device)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=len(ids), encoder_input_ids=prompt, device=model.device, model_kwargs={}
    )
    return Request(list(ids), asked, room, processors)


def outputs_of(requests: Sequence[Request]) -> dict:
    """What the library's `generate_batch` returns for them."""
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

    status = RequestStatus.FINISHED
    names = [f"req_{number}" for number in range(len(requests))]
    return {
        name: GenerationOutput(name, prompt_ids=request.ids, generated_tokens=request.written, status=status)
        for name, request in zip(names, requests, strict=True)
    }
