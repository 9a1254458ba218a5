# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Padding at the door: kept tokens are moved to the front, so that what follows meets padding only at the end."""

import torch
from torch import Tensor
from torch.nn import functional as F


def kept_rank(attention_mask: Tensor) -> Tensor:
    """[B, T] int64: the number of kept tokens before each kept token, and T for padding. attention_mask [B, T]."""
    keep = attention_mask.bool()
    return torch.where(keep, keep.long().cumsum(1) - 1, keep.shape[1])


def compact(tensor: Tensor, rank: Tensor, fill: float = 0.0) -> Tensor:
    """Moves the kept tokens of [B, T, .] to the front, in order, with `fill` behind them."""
    out = tensor.new_full((tensor.shape[0], tensor.shape[1] + 1, tensor.shape[2]), fill)
    index = rank[..., None].expand_as(tensor)
    return out.scatter(1, index, tensor)[:, :-1]


def expand(tensor: Tensor, rank: Tensor) -> Tensor:
    """Undoes `compact`, with 0 at padded places."""
    return F.pad(tensor, (0, 0, 0, 1)).gather(1, rank[..., None].expand(-1, -1, tensor.shape[2]))
