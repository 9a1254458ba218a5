# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Batches of rows of like length, in random order."""

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ShuffledLengthGroups(LengthGroupedSampler):
    """
    The sampler of `--train_sampling_strategy group_by_length`. That of the library begins with the longest rows of
    some fifty batches and ends with the shortest, over and over: what a model learns of long texts it forgets with the
    short ones. Here the batches are shuffled, all but the last, which may be smaller. The order follows from seed and
    epoch alone, so that a run that continues in the middle of an epoch sees the rows that it has not seen.

    Args:
        batch_size (`int`): rows of one step.
        lengths (`list[int]`): of all rows.
        seed (`int`): of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        *groups, last = torch.tensor(list(super().__iter__())).split(self.batch_size)
        order = torch.randperm(len(groups), generator=self.generator).tolist()
        return iter(torch.cat([*(groups[i] for i in order), last]).tolist())
