# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The suite serving: many prompts of mixed length, whose texts end at different times."""

import random
from functools import cache, partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from aft.benchmark_contestants import BYTES, Contestant, Contestants, about_model, make_model
from modeling_aft.continuous_batching import READ_AT_ONCE, can_stay_full
from modeling_aft.modeling_causal_lm import EndOfTables


def draw_requests(count: int, length: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 1 to `length` random bytes, and after how many tokens each text ends, 1 to length / 2."""
    generator = random.Random(0)
    prompts = [[generator.randrange(BYTES) for _ in range(generator.randint(1, length))] for _ in range(count)]
    return prompts, [generator.randint(1, max(1, length // 2)) for _ in prompts]


def padded_batches(model, prompts: list[list[int]], numbers: list[int], size: int) -> int:
    """The tokens that `generate` writes, in batches padded on the left, each until its last row has ended."""
    written = 0
    for start in range(0, len(prompts), size):
        part, rooms = prompts[start : start + size], torch.tensor(numbers[start : start + size], device=model.device)
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in part], device=model.device)
        lengths = torch.tensor([len(ids) for ids in part], device=model.device)
        mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
        ends = [EndOfTables(longest + rooms)]  # of each row at a column of its own
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=int(rooms.max()),
            stopping_criteria=ends,
            pad_token_id=0,
            eos_token_id=None,
        )
        written += int(rooms.sum())
    return written


def full_batch(model, prompts: list[list[int]], numbers: list[int], size: int) -> int:
    """The tokens that `generate_batch` of this package writes."""
    outputs = model.generate_batch(
        prompts, max_new_tokens=numbers, max_batch_size=size, do_sample=False, eos_token_id=None
    )
    return sum(len(output.generated_tokens) for output in outputs.values())


def library_batch(model, prompts: list[list[int]], numbers: list[int], size: int) -> int:
    """The same by continuous batching of the library, with pages for `size` texts as long as the longest may be."""
    from transformers import ContinuousBatchingConfig

    config, page = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0), 32
    blocks = size * (1 + -(-(max(map(len, prompts)) + max(numbers)) // page))
    sizes = {"page_size": page, "num_blocks": blocks, "max_requests_per_batch": size, "max_batch_tokens": READ_AT_ONCE}
    batching = {"continuous_batching_config": ContinuousBatchingConfig(**sizes), "warmup": False}
    with model.continuous_batching_context_manager(config, **batching) as manager:
        for ids, number in zip(prompts, numbers, strict=True):
            manager.add_request(ids, max_new_tokens=number)
        written = finished = 0
        while finished < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("the manager of continuous batching has ended")
            if result is not None and result.is_finished():
                finished, written = finished + 1, written + len(result.generated_tokens)
    return written


def serving_contestants(args, batch: int, length: int) -> Contestants:
    """`args.prompts` requests of up to `length` tokens by each model, `batch` of them at once: in padded batches, and
    by continuous batching, that of this package or of the library."""
    prompts, numbers = draw_requests(args.prompts, length)

    @cache
    def prepared(name):
        return make_model(args, name, 2 * length, "none").eval()

    def make(name, padded):
        model = prepared(name)
        continuous = full_batch if can_stay_full(model.config) else library_batch
        write = padded_batches if padded else continuous

        @torch.inference_mode()
        def run():
            assert write(model, prompts, numbers, batch) == sum(numbers)

        return Contestant(run, sum(numbers), about=about_model(model))

    parts = {"padded": True, "continuous": False}
    return {f"{Path(n).stem}-{part}": partial(make, n, padded) for n in args.models for part, padded in parts.items()}
