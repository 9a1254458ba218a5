# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The door of a text model: what stands at each place of a batch is read, checked and counted here, once."""

import torch
from torch import Tensor

from .ops_modes import can_read, is_exporting
from .ops_packing import Packing, pack
from .ops_tokens import Tokens, count_tokens, refused


def read_tokens(
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seen: Tensor | None = None,
    seen_at_most: int | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    limit: int | None = None,
) -> Tokens:
    """
    Checks what a forward pass is given beside its tokens, and counts positions.

    Args:
        inputs (`Tensor` [B, T] or [B, T, D]): the new tokens, of which only the sizes and the device are read.
        attention_mask (`Tensor` [B, T or past + T] or 4-dimensional, *optional*):
            0 or False is padding, 1 or True a token; larger whole numbers number documents. Of two dimensions only the
            last T columns are read. What is 4-dimensional is passed on.
        position_ids (`Tensor` [B or 1, T], *optional*): by default the number of kept tokens before each.
        seen (`Tensor` [B], *optional*): the number of kept tokens in the cache, None if there is no past.
        seen_at_most (`int`, *optional*): what no number of `seen` exceeds, if that is known without reading it.
        seq_idx (`Tensor` [B, T], *optional*): the document of each token, any whole numbers.
        cu_seq_lens (`Tensor` [N + 1], *optional*): where the documents of a batch of one row begin, and the end.
        limit (`int`, *optional*): the number of positions that there are tables for.

    Raises:
        ValueError: names the argument that does not fit, its value, and what is allowed.
    """
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"The input must have at least one row and one token, got {batch} rows of {length} tokens.")
    numbers = []
    if seq_idx is not None:
        numbers.append(_check_numbers("seq_idx", seq_idx, inputs))
    if cu_seq_lens is not None:
        numbers.append(_documents_of(cu_seq_lens, inputs))
    is_matrix = attention_mask is not None and attention_mask.dim() == 4
    if attention_mask is not None and not is_matrix:
        attention_mask, numbered = _check_mask(attention_mask, inputs)
        numbers += [] if numbered is None else [numbered]
    if position_ids is not None:
        if position_ids.dim() == 1 or position_ids.shape[:1] == (1,):
            position_ids = position_ids.expand(batch, *position_ids.shape[-1:])
        position_ids = _check_numbers("position_ids", position_ids, inputs)
    mask = None if is_matrix else attention_mask

    tokens = count_tokens(mask)
    counted = _counted(inputs, tokens, seen)
    packing = None
    if not is_matrix:
        given = None if position_ids is None or _is_counted(position_ids, counted, mask) else position_ids
        packing = _find_documents(numbers, mask, given, inputs, seen)
        position_ids = given
    if packing is not None:
        positions, position_ids = packing.position_ids, None
    else:
        if position_ids is not None and mask is not None:
            position_ids = position_ids.masked_fill(~mask, 0)
        positions = counted if position_ids is None else position_ids
        if position_ids is None and seen is not None:
            position_ids = counted  # the layers need not count again
    if seen is None:
        seen_at_most = 0
    is_within = positions is counted and None not in (limit, seen_at_most) and seen_at_most + length <= limit
    if not is_within:  # which is known without a look at the device
        check_positions(positions, mask, seen, limit)
    if packing is not None:
        return Tokens(positions=positions, packing=packing)
    pairs = attention_mask if is_matrix else None
    can_wait = length == 1 and tokens.keep is None and seen is not None and positions is position_ids is counted
    return tokens._replace(position_ids=position_ids, positions=positions, pairs=pairs, can_wait=can_wait)


def infer_mask(input_ids: Tensor, pad_token_id: int, at_ends: bool) -> Tensor | None:
    """
    A mask from the ids, for a batch that comes without one.

    Args:
        input_ids (`LongTensor` [B, T]): with `pad_token_id` where there is padding.
        pad_token_id (`int`): the id of padding.
        at_ends (`bool`): whether only what stands before the first or after the last other id of a row is padding.

    Returns:
        [B, T] bool, False for padding, or None if there is none, or of a single token.
    """
    if input_ids.shape[1] <= 1:
        return None
    token = input_ids != pad_token_id
    if at_ends:
        seen = token.long()
        token = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1) > 0).flip(1)
    return None if can_read(token) and bool(token.all()) else token


def _check_numbers(name: str, tensor: Tensor, inputs: Tensor) -> Tensor:
    if tensor.shape != inputs.shape[:2]:
        raise refused(name, f"of shape {list(inputs.shape[:2])}", list(tensor.shape))
    if tensor.is_floating_point() or tensor.is_complex():
        raise refused(name, "whole numbers", tensor.dtype)
    return tensor


def _documents_of(cu_seq_lens: Tensor, inputs: Tensor) -> Tensor:
    """[1, T]: the document of each token, from where the documents begin and the last one ends."""
    batch, length = inputs.shape[:2]
    allowed = f"[0, ..., {length}], rising, for a batch of one row of {length} tokens"
    if batch != 1 or cu_seq_lens.dim() != 1 or len(cu_seq_lens) < 2 or cu_seq_lens.is_floating_point():
        raise refused("cu_seq_lens", allowed, f"{list(cu_seq_lens.shape)} for {batch} rows")
    if can_read(cu_seq_lens):
        borders = cu_seq_lens.tolist()
        if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in zip(borders, borders[1:], strict=False)):
            raise refused("cu_seq_lens", allowed, borders)
    places = torch.arange(length, device=inputs.device)
    return torch.searchsorted(cu_seq_lens.to(places), places, right=True)[None]


def _check_mask(attention_mask: Tensor, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the new tokens, [B, T] bool or None, and if it numbers documents those numbers, [B, T]."""
    batch, length = inputs.shape[:2]
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch and attention_mask.shape[1] >= length
    if not fits:
        allowed = f"[{batch}, {length} or more] (1 keeps a token, 0 is padding)"
        raise refused("attention_mask", allowed, list(attention_mask.shape))
    attention_mask = attention_mask[:, -length:]
    keep = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if not can_read(attention_mask):
        return keep, None
    if length == 1:  # a decoding step: no wait for a GPU, and nothing to tell apart
        return (None if attention_mask.device.type == "cpu" and bool(keep.all()) else keep), None
    if attention_mask.dtype == torch.bool:
        return (None if bool(keep.all()) else keep), None
    lowest, highest = attention_mask.aminmax()
    whole = not attention_mask.is_floating_point() or bool((attention_mask == attention_mask.round()).all())
    lowest, highest = float(lowest), float(highest)
    if not whole or not 0 <= lowest <= highest < float("inf"):
        raise refused(
            "attention_mask",
            "whole numbers of at least 0 (0 is padding, 1 a token, more than 1 numbers documents)",
            f"numbers from {lowest:g} to {highest:g}",
        )
    return (None if lowest >= 1 else keep), (attention_mask if highest > 1 else None)


def _counted(inputs: Tensor, tokens: Tokens, seen: Tensor | None) -> Tensor:
    """[B or 1, T]: the number of kept tokens before each token, those of the cache included, and 0 for padding."""
    if inputs.shape[1] == 1 and tokens.keep is None and seen is not None:
        return seen.to(inputs.device, copy=True)[:, None]  # the cache goes on counting in its own tensor
    positions = tokens.slot
    if positions is None:
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    if seen is not None:
        positions = positions + seen[:, None].to(positions.device)
    return positions if tokens.keep is None else positions.masked_fill(~tokens.keep, 0)


def _is_counted(position_ids: Tensor, counted: Tensor, mask: Tensor | None) -> bool:
    """Whether positions are what the model counts by itself, as those that `generate` makes are: the mixers are faster
    where a batch shares its positions. A single token is not worth the comparison."""
    if position_ids.shape[1] == 1 or not can_read(position_ids):
        return False
    if mask is not None:
        position_ids = position_ids.masked_fill(~mask, 0)
    return torch.equal(position_ids, counted.expand_as(position_ids).to(position_ids.dtype))


def _find_documents(numbers: list[Tensor], mask, position_ids, inputs, seen) -> Packing | None:
    if not numbers and position_ids is None:
        return None
    if not can_read(inputs):
        if numbers:
            raise ValueError(
                "Packed documents (`seq_idx`, `cu_seq_lens_q` or numbers in `attention_mask`) need a model that is "
                "neither compiled nor exported: how many there are depends on the data."
            )
        if torch.compiler.is_compiling() and not is_exporting() and mask is None and inputs.shape[1] > 1:
            rising = (position_ids[:, 1:] > position_ids[:, :-1]).all()
            torch._assert_async(
                rising, "`position_ids` must rise in a compiled model: packed documents need eager mode"
            )
        return None
    if inputs.shape[1] == 1 and (seen is None or inputs.device.type != "cpu"):
        return None  # no wait for a GPU in a decoding step
    packing = pack(numbers, mask, position_ids) if inputs.shape[1] > 1 else None
    if seen is None:
        return packing
    begins_again = False
    if position_ids is not None:
        earlier = position_ids < seen[:, None].to(position_ids.device)
        begins_again = bool((earlier if mask is None else earlier & mask).any())
    if packing is not None or begins_again:
        raise ValueError(
            "Packed documents (`position_ids` that begin again, `seq_idx`, `cu_seq_lens_q` or numbers in "
            "`attention_mask`) must be given without a past, got a cache that holds tokens."
        )
    return None


def check_positions(positions: Tensor, mask: Tensor | None, seen: Tensor | None, limit: int | None) -> None:
    """
    Checks that there is a row of the tables for every position [B or 1, T].

    Raises:
        ValueError: a position is negative, or there is none such (limit).
    """
    length = positions.shape[1]
    if not can_read(positions):
        # A compiled model cannot raise for what stands in a tensor, but for what follows from its shape.
        last = length - 1 if mask is None and seen is None and torch.compiler.is_compiling() else None
        first = 0
    elif limit is None and (length == 1 or positions.device.type != "cpu"):
        return  # nothing is looked up there
    else:
        first, last = (int(bound) for bound in positions.aminmax())
    if first < 0:
        raise refused("position_ids", "at least 0 where a token is kept", first)
    if limit is not None and last is not None and last >= limit:
        raise ValueError(
            f"Position {last} lies beyond the learned tables of this model, which end at max_position_embeddings="
            f"{limit} (the largest position is {limit - 1}). Feed at most {limit} tokens, or use AFT-simple, AFT-conv "
            "or AFT-local with position_bias_type='relative', which with position_embedding_type='none' have no limit."
        )
