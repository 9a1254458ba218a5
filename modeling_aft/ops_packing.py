# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Packed documents: rows that hold several texts, none of which may see another.

Every document becomes a row of its own, so that all operators treat it as if it stood alone. Documents are put
together in groups whose lengths differ by less than a factor of two: at most half of a group is padding, and there are
few groups. How many there are depends on the data, so this is not for compiled or exported programs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_tokens import Tokens, count_tokens


class DocumentGroup(NamedTuple):
    """Documents of similar length, [n, L].

    Attributes:
        places: [n, L] int64, where each token stands in the batch, b * T + t; B * T behind the end of a document.
        tokens: those of the documents, all of which are kept if all are of length L.
    """

    places: Tensor
    tokens: Tokens

    def seen_by(self, causal: bool) -> Tokens:
        """What matters of them: behind the end of a document there is nothing that a causal query sees."""
        return Tokens(position_ids=self.tokens.position_ids) if causal else self.tokens


class Packing(NamedTuple):
    """How the documents of a batch [B, T] are taken apart and put together again.

    Attributes:
        groups: all documents; what is in none of them is padding.
        position_ids: [B, T] int64, the position of each token in its document, 0 for padding.
        same_document: [B, T] bool, whether a token continues the document of the token before it in its row.
    """

    groups: tuple[DocumentGroup, ...]
    position_ids: Tensor
    same_document: Tensor

    def map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """
        `function(group, *rows)` of every group, put together again.

        Args:
            function: takes a group and of each tensor the part [n, L, .] that belongs to it; gives [n, L, .].
            tensors: [B, T, .].

        Returns:
            [B, T, .], 0 for padding.
        """
        batch, length = tensors[0].shape[:2]
        flat = [F.pad(tensor.flatten(0, 1), (0, 0, 0, 1)) for tensor in tensors]
        parts = []
        for group in self.groups:
            rows = (t.index_select(0, group.places.flatten()).unflatten(0, group.places.shape) for t in flat)
            parts.append(function(group, *rows).flatten(0, 1))
        places = torch.cat([group.places.flatten() for group in self.groups])
        parts = torch.cat(parts)
        out = parts.new_zeros(batch * length + 1, parts.shape[1])
        return out.index_copy(0, places, parts)[:-1].unflatten(0, (batch, length))

    def map_pairs(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """The same for functions that give a matrix [n, C, L, L] of pairs: [B, C, T, T], 0 between documents."""
        batch, length = tensors[0].shape[:2]
        flat = [F.pad(tensor.flatten(0, 1), (0, 0, 0, 1)) for tensor in tensors]
        out = None
        for group in self.groups:
            pairs = function(group, *(t[group.places] for t in flat)).expand(len(group.places), -1, -1, -1)
            if out is None:  # with one more row and column, for what is behind the end of a document
                out = pairs.new_zeros(batch, length + 1, length + 1, pairs.shape[1])
            beyond = group.places == batch * length
            row = (group.places // length).masked_fill(beyond, 0)[:, :, None]
            place = (group.places % length).masked_fill(beyond, length)
            out = out.index_put((row, place[:, :, None], place[:, None]), pairs.permute(0, 2, 3, 1))
        return out[:, :-1, :-1].permute(0, 3, 1, 2)


def pack(
    numbers: list[Tensor], attention_mask: Tensor | None, position_ids: Tensor | None, begin_again: bool = True
) -> Packing | None:
    """
    Finds the documents of a batch. One ends where the next kept token of its row has another number, or a position
    that is not greater, if that is what positions that `begin_again` mean.

    Args:
        numbers (list of `Tensor` [B, T]): the document of each token, any integers; one of these or positions.
        attention_mask (`Tensor` [B, T], *optional*): False or 0 for padding.
        position_ids (`LongTensor` [B, T], *optional*): the position of each token.

    Returns:
        None if no row holds more than one document.
    """
    given = position_ids if position_ids is not None else numbers[0]
    batch, length = given.shape
    if attention_mask is None:
        kept = torch.arange(batch * length, device=given.device)
    else:
        kept = attention_mask.flatten().nonzero().squeeze(1)
    row = kept // length
    starts = torch.ones_like(kept, dtype=torch.bool)
    starts[1:] = row[1:] != row[:-1]
    rows = int(starts.sum())
    ends = [(tensor, torch.ne) for tensor in numbers]
    if position_ids is not None and begin_again:
        ends.append((position_ids, torch.le))
    for tensor, comparison in ends:
        values = tensor.flatten()[kept]
        starts[1:] |= comparison(values[1:], values[:-1])
    first = starts.nonzero().squeeze(1)
    if len(first) == rows:
        return None
    return _packing(kept, starts, first, position_ids, batch, length)


def _packing(kept, starts, first, position_ids, batch, length) -> Packing:
    """From the places of the kept tokens in the batch, [M], which of them start a document, and where those are."""
    lengths = torch.diff(first, append=first.new_tensor([len(kept)]))
    within = torch.arange(len(kept), device=kept.device) - first.repeat_interleave(lengths)
    positions = within if position_ids is None else position_ids.flatten()[kept]
    counted = torch.equal(positions, within)
    sizes = lengths.tolist()
    by_size = {}
    for document, size in enumerate(sizes):
        by_size.setdefault((size - 1).bit_length(), []).append(document)
    groups = []
    nowhere = F.pad(kept, (0, 1), value=batch * length)
    for _, documents in sorted(by_size.items()):
        longest = max(sizes[document] for document in documents)
        index = torch.tensor(documents, device=kept.device)
        offset = torch.arange(longest, device=kept.device)
        inside = offset < lengths[index, None]
        token = torch.where(inside, first[index, None] + offset, len(kept))
        full = all(sizes[document] == longest for document in documents)
        groups.append(
            DocumentGroup(
                places=nowhere[token],
                tokens=count_tokens(
                    keep=None if full else inside,
                    position_ids=None if counted else F.pad(positions, (0, 1))[token],
                ),
            )
        )
    shape = (batch, length)
    out = kept.new_zeros(batch * length).index_copy(0, kept, positions).view(shape)
    # The token before, in the row: a document that goes on after padding is not continued by the token behind it.
    document = kept.new_full((batch * length,), -1).index_copy(0, kept, starts.long().cumsum(0)).view(shape)
    same = torch.zeros(shape, dtype=torch.bool, device=kept.device)
    same[:, 1:] = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    return Packing(tuple(groups), out, same)
