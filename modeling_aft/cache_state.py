# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a model has read so far, as layers of the caches of transformers: one of fixed size, and one that grows.

A mixer reads the state of its layer (`read_state`), lets its operator go on from there, and puts the new state in its
place (`commit_state`), with the tokens that it was fed, from which a part of them can be taken back. A model names its
layers in `config.layer_types`; the caches look the classes up by those names.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from .ops_tokens import Tokens


class NewTokens(NamedTuple):
    """What a layer was fed in one forward pass.

    Attributes:
        key: [B, .., T, K], or None where a state has no keys.
        value: [B, .., T, V].
        tokens: which of them are kept, and where they stand.
        decay: [K], by how much what is older fades with each of them; None if it does not.
    """

    key: torch.Tensor | None
    value: torch.Tensor
    tokens: Tokens
    decay: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.value.shape[-2]

    def first(self, length: int) -> "NewTokens":
        """The first `length` of them."""
        key, value = (None if t is None else t.narrow(-2, 0, length) for t in (self.key, self.value))
        return self._replace(key=key, value=value, tokens=self.tokens.first(length))


class StateLayer(CacheLayerMixin):
    """
    The state of one layer. Its size does not depend on the number of tokens.

    The tensors take their sizes from the first forward pass. Without autograd, later ones write in place, so that a
    compiled decoding step finds them where they were. Subclasses have a `_layer_type`, `state_class`, and the two
    functions below.
    """

    state_class: type[tuple]
    is_croppable = True
    supports_early_init = False
    can_wait = False  # whether it can take up single tokens later, with others
    has_fixed_size = True  # whether its tensors stay as large as they are, however many tokens there are

    @staticmethod
    def advance(before: tuple | None, new: NewTokens, like: tuple) -> tuple:
        """The state after `new`, given that before (None at the start) and any state of the same layer."""
        raise NotImplementedError

    @staticmethod
    def shapes(config, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the state of a model, after `length` tokens in each of `batch` rows."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls._layer_type is not None:  # the library fills this table by itself only with its own StaticLayers
            STATIC_LAYER_TYPE_MAPPING[cls._layer_type] = cls

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.tensors: dict[str, torch.Tensor | None] | None = None
        # The tokens read since, one at a time, which the state has not taken up yet; they can be `taken_up` by it.
        self.recent = None
        # Where the state stood before `reset`: the next one goes there, if it fits.
        self.spare: tuple | None = None
        self.record_past = False
        # (state before, new tokens) of each forward pass since the last `crop`, while recording.
        self.history: list[tuple[tuple | None, NewTokens]] = []
        self.device: torch.device | None = None
        # Tokens seen, padding included. A tensor, because a compiled step would be specialised on a number.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)
        # The same as a number, where it is known without a look at the device: a compiled step does not tell. Both are
        # without the recent tokens.
        self.known_before: int | None = 0
        # Whether autograd may need the tensors as they are.
        self.in_graph = False
        # Of the first layer: whether a forward pass has begun and not ended, and what kind of model it belongs to.
        self.unfinished = False
        self.kind: str | None = None

    @property
    def is_compileable(self) -> bool:
        return not self.record_past

    @property
    def state(self) -> tuple | None:
        """The state after the tokens so far, None at the start. It is kept as a dict, because what takes caches apart
        and puts them together again (the exporters of transformers) cannot do that with a named tuple."""
        self._take_up()
        return None if self.tensors is None else self.state_class(**self.tensors)

    @state.setter
    def state(self, state: tuple | None) -> None:
        self.tensors, self.recent = None if state is None else state._asdict(), None

    def _take_up(self) -> None:
        """Makes the state that after the recent tokens as well, if there are any."""
        if self.recent is None:
            return
        recent, self.recent = self.recent, None
        with torch.no_grad():
            self._write(recent.taken_up(self.state))
            self._count(recent.length)

    @property
    def known_length(self) -> int | None:
        """Tokens seen, padding included, where that is known without a look at the device."""
        recent = 0 if self.recent is None else self.recent.length
        return None if self.known_before is None else self.known_before + recent

    @property
    def is_empty(self) -> bool:
        """Whether there is no state yet."""
        return self.tensors is None

    @property
    def position(self) -> torch.Tensor:
        """[B] int64, the position that the next kept token of each row will have; not of an empty one."""
        return self.tensors["position"] if self.recent is None else self.recent.position

    def read(self) -> tuple | None:
        """The state, for an operator to go on from."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.in_graph = True
            # Autograd cannot save what was made in inference mode.
            if self.state is not None and any(t is not None and t.is_inference() for t in self.state):
                self.state = self._mapped(torch.clone)
        return self.state

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = value_states.device
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._keep_address(self.cumulative_length)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, state: tuple, new: NewTokens) -> tuple:
        """
        Takes over a state.

        Args:
            key_states, value_states: the new keys (or the values in their place) and values; their device is read.
            state: the one after the new tokens.
            new: those tokens.

        Returns:
            `(None, None)`, as `Cache.update` unpacks two.

        Raises:
            ValueError: a static layer has no room for the tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_room(new.length)
        state = self._placed(state, new.length)
        if self.record_past:
            self.history.append((self.state, new))
            self.state = state
        else:
            self._write(state)
        self._count(new.length)
        return None, None

    def _count(self, length: int) -> None:
        compiling = torch.compiler.is_compiling()
        self.known_before = None if compiling or self.known_before is None else self.known_before + length
        # In place also under autograd, which never needs it.
        if compiling or self._may_count_in_place():
            self.cumulative_length.add_(length)
        else:
            self.cumulative_length = self.cumulative_length + length

    def _may_count_in_place(self) -> bool:
        """Not, outside of inference mode, what was made inside."""
        return torch.is_inference_mode_enabled() or not self.cumulative_length.is_inference()

    def _check_room(self, length: int) -> None:
        """Raises a ValueError if the state has no room for `length` more tokens."""

    def _placed(self, state: tuple, length: int) -> tuple:
        """The state as it is kept, from the one that an operator has returned for `length` more tokens."""
        return state

    def columns(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights [.., T, S] over the keys of the last operator, in the order of the keys of this layer."""
        return weights

    def activate_past_recording(self) -> None:
        """From now on, what is fed between one `crop` and the next can be taken back."""
        self._take_up()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, and that those before them could have been forgotten.

        Args:
            tokens_to_remove (`int`): 0 or negative.

        Raises:
            ValueError: if it is positive, or if that many tokens have not been recorded since the last call.
        """
        recorded = sum(new.length for _, new in self.history)
        if not -recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be between {-recorded} and 0, got {tokens_to_remove}: a state can give "
                "back only the tokens that were fed after `activate_past_recording()` and the last `crop`."
            )
        remaining, like = -tokens_to_remove, self.state
        while remaining > 0:
            state, new = self.history.pop()
            kept = max(new.length - remaining, 0)
            remaining -= new.length - kept
            self.cumulative_length = self.cumulative_length - new.length
            self.state = state
            if kept > 0:
                self.state = self._placed(self.advance(state, new.first(kept), like), kept)
                self.cumulative_length = self.cumulative_length + kept
        if self.known_before is not None:
            self.known_before += tokens_to_remove
        self.history.clear()

    def _write(self, state: tuple) -> None:
        """Into the tensors of the last state where that can be, so that a compiled step finds them in their place."""
        old = self.spare if self.state is None else self.state
        if old is not None and all(map(self._can_take, old, state)):
            for o, n in zip(old, state, strict=True):
                if o is not n:
                    o.copy_(n)
            self.state = old
        else:
            self.state = state
            self.in_graph = torch.is_grad_enabled()
            if self.has_fixed_size:
                for tensor in filter(torch.is_tensor, state):
                    self._keep_address(tensor)
        self.spare = None

    @staticmethod
    def _keep_address(tensor: torch.Tensor) -> None:
        """Lets CUDA graphs write into it where it stands."""
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor, guard=False)

    def _can_take(self, old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
        if old is None or new is None:
            return old is new
        same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
        return old is new or (same and self._may_write(old))

    def _may_write(self, tensor: torch.Tensor) -> bool:
        """Not what autograd may still need, nor views of it, nor, outside of inference mode, what was made inside."""
        if torch.is_grad_enabled() or self.in_graph:
            return False
        if torch.compiler.is_compiling():  # which knows nothing of inference mode
            return True
        if tensor.requires_grad or tensor._is_view():
            return False
        return torch.is_inference_mode_enabled() or not tensor.is_inference()

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
        return type(self.state)(*(None if t is None else function(t) for t in self.state))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = self._mapped(function)
        self.history.clear()  # of other rows, or on another device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors of the state, by name, and `cumulative_length`; without the room of a static cache."""
        state = self.state
        tensors = {} if state is None else {n: t for n, t in state._asdict().items() if t is not None}
        tensors = {"cumulative_length": self.cumulative_length, **tensors}
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `state_dict` has returned."""
        tensors = dict(tensors)
        self.reset()
        self.cumulative_length = tensors.pop("cumulative_length")
        self.known_before = int(self.cumulative_length)
        self.device = self.cumulative_length.device
        self.is_initialized = bool(tensors)
        self.state = self.state_class(**{"key": None, **tensors}) if tensors else None

    def forget_length(self) -> None:
        """Begins to count tokens at 0. The state stays: what comes next goes on from it."""
        self.count_from(0)

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens seen, padding included."""
        if not self.is_initialized:
            return 0
        return self.cumulative_length if self.recent is None else self.cumulative_length + self.recent.length

    def get_max_length(self) -> int:
        """-1: the state itself has no maximum length (position tables may; the model checks them)."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forgets every token, but not where the state stood."""
        self.recent = None
        self.spare, self.state = self.state or self.spare, None
        self.unfinished, self.kind, self.known_before = False, None, 0
        self.history.clear()
        if self._may_count_in_place():
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = torch.zeros_like(self.cumulative_length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        recent, self.recent = self.recent, None
        if self.state is not None:
            self._write(self._mapped(lambda t: t.index_select(0, beam_idx.to(t.device))))
        if recent is not None:
            recent.reorder(beam_idx)
            self.recent = recent
        self.history.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def batch_append(self, other: "StateLayer") -> None:
        """Puts the rows of another layer, with a state of fixed size too, behind those of this one."""
        self.state = self.state_class(
            *(None if a is None else torch.cat([a, b]) for a, b in zip(self.state, other.state, strict=True))
        )
        self.count_from(max(int(self.get_seq_length()), int(other.get_seq_length())))
        self.history.clear()

    def count_from(self, length: int) -> None:
        """Says that the longest row has read so many tokens."""
        self._take_up()
        self.cumulative_length, self.known_before = torch.full_like(self.cumulative_length, length), length

    def detach(self) -> None:
        """
        Cuts the state off from the graph that led to it, whose memory is set free: no gradient goes back beyond here.
        What was recorded before cannot be taken back any longer.
        """
        self._map(torch.Tensor.detach)

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))


class GrowingStateLayer(StateLayer):
    """
    A state with one entry per token. In a static cache its tensors have room for `max_cache_len` tokens from the
    start, and keep their place.
    """

    # Of each tensor that has one entry per token: the dimension of the tokens, and what stands where there is none.
    per_token: dict[str, tuple[int, float]]

    @property
    def has_fixed_size(self) -> bool:
        return self.max_cache_len is not None

    @property
    def is_compileable(self) -> bool:
        return self.has_fixed_size and super().is_compileable

    def get_max_length(self) -> int:
        """The number of tokens that a static cache has room for; -1 if it grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def _check_room(self, length: int) -> None:
        if self.max_cache_len is None or torch.compiler.is_compiling() or self.device.type != "cpu":
            return  # no wait for the device: there, writing beyond the end is refused by `index_copy_`
        needed = int(self.cumulative_length) + length
        if needed > self.max_cache_len:
            raise ValueError(f"`max_cache_len` of this static cache is {self.max_cache_len}, but {needed} are needed.")

    def _next_places(self, length: int) -> torch.Tensor:
        return torch.arange(length, device=self.device) + self.cumulative_length

    def _placed(self, state: tuple, length: int) -> tuple:
        if self.max_cache_len is None:
            return state
        past, places, placed = self.state or self._empty(state), self._next_places(length), {}
        for name, (dim, _) in self.per_token.items():
            tensor, old = getattr(state, name), getattr(past, name)
            if tensor is None:
                continue
            tokens = tensor.narrow(dim, tensor.shape[dim] - length, length)
            in_place = self._may_write(old) and not self.record_past
            placed[name] = (old.index_copy_ if in_place else old.index_copy)(dim, places, tokens)
        return state._replace(**placed)

    def columns(self, weights: torch.Tensor) -> torch.Tensor:
        if self.max_cache_len is None:
            return weights
        length = weights.shape[-2]
        past, own = weights.split([weights.shape[-1] - length, length], -1)
        past = torch.nn.functional.pad(past, (0, self.max_cache_len - past.shape[-1]))
        # The operator's new keys are those that were counted last.
        return past.index_copy(-1, self._next_places(length) - length, own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        tensors, length = super().state_dict(), int(self.cumulative_length)
        for name in self.per_token.keys() & tensors.keys():
            tensors[name] = tensors[name].narrow(self.per_token[name][0], 0, length).contiguous()
        return tensors

    def _empty(self, state: tuple) -> tuple:
        """Room for `max_cache_len` tokens such as those of `state`, whose other tensors are not taken over."""
        tensors = {}
        for name, (dim, nothing) in self.per_token.items():
            tensor, spare = getattr(state, name), getattr(self.spare, name, None)
            if tensor is None:
                continue
            shape = list(tensor.shape)
            shape[dim] = self.max_cache_len
            if spare is not None and list(spare.shape) == shape and self._may_write(spare) and not self.record_past:
                tensors[name] = spare.fill_(nothing)
            else:
                tensors[name] = tensor.new_full(shape, nothing)
        return state._replace(**tensors)


def read_state(cache: Cache | None, layer_idx: int) -> tuple | None:
    """The state of a layer before the new tokens; None at the start, and without a cache."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    if getattr(cache, "offloading", False) and layer.state is not None:
        # The layer may still be on its way from the CPU, in another stream.
        torch.cuda.default_stream(layer.device).wait_stream(cache.prefetch_stream)
    return layer.read()


def commit_state(cache: Cache, layer_idx: int, state: tuple, new: NewTokens) -> None:
    """Puts the state after the new tokens in the place of the one before."""
    key_states = new.value if new.key is None else new.key
    cache.update(key_states, new.value, layer_idx, state, new)
