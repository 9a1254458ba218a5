# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The tokens of a batch: which are kept, and where they stand. It is counted once, and read by all layers.

Padding is dealt with by moving the kept tokens to the front, so that what follows meets padding only at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Tokens(NamedTuple):
    """
    What a mixer and its operator need to know of the tokens of a batch. `Tokens()`: all are kept, at 0, 1, ...

    Attributes:
        keep: [B, T] bool, False for padding; None if all are kept.
        slot: [B, T] int64, the number of kept tokens before each kept token, and T for padding; None where `keep` is.
        count: [B] int64, the number of kept tokens; None where `keep` is.
        position_ids: [B, T] int64, 0 for padding; None where they are the slots. With a past they are always given.
        positions: the same, [1 or B, T], of what has been read from a batch, for embeddings of positions.
        next_position: [B] int64, the position that the next kept token will have; None where no state is kept.
        pairs: [B or 1, 1 or H, T, S], which keys a query sees, bool, or what is added to their logits, in place of
            causality and padding; None where those decide.
        packing: the `Packing` of rows that hold several documents; None where each is one.
        grid: the rows and columns of patches that the tokens are, in raster order, after a class token if there is
            one; None of a text.
        can_wait: whether they are one token of each row, kept, in the middle of a text, at the positions that follow,
            so that the state of a layer may take it up later, with others.
    """

    keep: Tensor | None = None
    slot: Tensor | None = None
    count: Tensor | None = None
    position_ids: Tensor | None = None
    positions: Tensor | None = None
    next_position: Tensor | None = None
    pairs: Tensor | None = None
    packing: tuple | None = None
    grid: tuple[int, int] | None = None
    can_wait: bool = False

    @property
    def continues(self) -> Tensor | None:
        """[B, T] bool: whether a token follows on the one before it, in its row and document, so that the output there
        can predict it. None if all do but the first."""
        if self.packing is not None:
            return self.packing.same_document
        if self.keep is None:
            return None
        return torch.cat([torch.zeros_like(self.keep[:, :1]), self.keep[:, 1:] & self.keep[:, :-1]], 1)

    def advanced(self, position: Tensor | None, like: Tensor) -> "Tokens":
        """With the next position, after tokens before which it was `position` [B], None at the start. like [B, T, ...]
        has the batch and the device."""
        if position is None:
            position = torch.zeros(like.shape[0], dtype=torch.long, device=like.device)
        if self.can_wait:
            following = position + 1
        elif self.position_ids is None:
            following = position + (like.shape[1] if self.count is None else self.count)
        else:
            last = self.position_ids if self.keep is None else self.position_ids.masked_fill(~self.keep, -1)
            following = torch.maximum(position, last.amax(1) + 1)
        return self._replace(next_position=following)

    def first(self, length: int) -> "Tokens":
        """The first `length` of them, without the next position."""
        keep, position_ids = (None if t is None else t[:, :length] for t in (self.keep, self.position_ids))
        return count_tokens(keep, position_ids)


def count_tokens(keep: Tensor | None, position_ids: Tensor | None = None) -> Tokens:
    """Tokens of which keep [B, T] is known, bool, and their positions [B, T]; None as in [`Tokens`]."""
    if keep is None:
        return Tokens(position_ids=position_ids)
    number = keep.long().cumsum(1)
    slot = torch.where(keep, number - 1, keep.shape[1])
    position_ids = None if position_ids is None else position_ids.masked_fill(~keep, 0)
    return Tokens(keep, slot, count=number[:, -1], position_ids=position_ids)


def compact(tensor: Tensor, slot: Tensor, fill: float = 0.0) -> Tensor:
    """Moves the kept tokens of [B, T, .] to the front, in order, with `fill` behind them."""
    out = tensor.new_full((tensor.shape[0], tensor.shape[1] + 1, tensor.shape[2]), fill)
    index = slot[..., None].expand_as(tensor)
    return out.scatter(1, index, tensor)[:, :-1]


def expand(tensor: Tensor, slot: Tensor) -> Tensor:
    """Undoes `compact`, with 0 at padded places."""
    return F.pad(tensor, (0, 0, 0, 1)).gather(1, slot[..., None].expand(-1, -1, tensor.shape[2]))


def mean_kept(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The mean [B, D] of [B, T, D] over the tokens that keep [B, T] names, all if it is None; 0 of none."""
    if keep is None:
        return tensor.mean(1)
    kept = keep[..., None].to(tensor.dtype)
    return (tensor * kept).sum(1) / kept.sum(1).clamp_min(1)


def refused(name: str, allowed: str, got) -> ValueError:
    """The error for an argument. Made only for what is wrong: to format a size under torch.compile would bind the
    graph to it."""
    return ValueError(f"`{name}` must be {allowed}, got {got}.")
