# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Cache layers that hold the states of the models, for the caches of transformers (dynamic, static, offloaded).

A model names its layers in `config.layer_types`; the caches of transformers look the classes below up by those names.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin

from .ops_reference import AFTState
from .ops_synthesizer import SynthesizerState


class AFTCacheLayer(CacheLayerMixin):
    """State of one layer of AFT-simple, AFT-local or AFT-conv: its size does not depend on the number of tokens.

    The tensors take their sizes from the first update. Without autograd, later ones write in place, so that a compiled
    decoding step finds them where they were.
    """

    _layer_type = "aft"
    _state_class: type[tuple] = AFTState
    is_compileable = True
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.tensors: dict[str, torch.Tensor | None] | None = None
        # Where the state stood before `reset`: the next one goes there, if it fits.
        self.spare: tuple | None = None
        self.record_past = False
        # (state before, mix, number of tokens) of each update since the last `crop`, while recording.
        self.history: list[tuple[tuple | None, Callable, int]] = []
        self.device: torch.device | None = None
        # Tokens seen, padding included. A tensor, because a compiled step would be specialised on a number.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    @property
    def state(self) -> tuple | None:
        """The state after the tokens so far, None at the start. It is kept as a dict, because what takes caches apart
        and puts them together again (the exporters of transformers) cannot do that with a named tuple."""
        return None if self.tensors is None else self._state_class(**self.tensors)

    @state.setter
    def state(self, state: tuple | None) -> None:
        self.tensors = None if state is None else state._asdict()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._keep_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        mix: Callable[[tuple | None, int | None], tuple[torch.Tensor, tuple]],
    ) -> tuple[torch.Tensor, None]:
        """Runs `mix` on the state so far and keeps the state that it returns.

        Args:
            key_states (`Tensor` [B, T, D or H]): the new keys; only their device and length are read.
            value_states (`Tensor` [B, T, D]): the new values.
            mix: takes the state before these tokens (None at the start) and how many of them to read (None for all);
                gives their output and the state after them.

        Returns:
            The output of `mix` and None.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[1]
        self._check_room(length)
        out, state = mix(self.state, None)
        state = self._placed(state, length)
        if self.record_past:
            self.history.append((self.state, mix, length))
            self.state = state
        else:
            self._write(state)
        if self._may_write(self.cumulative_length):
            self.cumulative_length.add_(length)
        else:
            self.cumulative_length = self.cumulative_length + length
        return out, None

    def _check_room(self, length: int) -> None:
        """Raises a ValueError if the state has no room for `length` more tokens."""

    def _placed(self, state: tuple, length: int) -> tuple:
        """The state as it is kept, from the one that `mix` has returned for `length` more tokens."""
        return state

    def activate_past_recording(self) -> None:
        """From now on, what is fed between one `crop` and the next can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, and that those before them could have been forgotten.

        Args:
            tokens_to_remove (`int`): 0 or negative.

        Raises:
            ValueError: if it is positive, or if that many tokens have not been recorded since the last call.
        """
        recorded = sum(length for _, _, length in self.history)
        if not -recorded <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be between {-recorded} and 0, got {tokens_to_remove}: a state can give "
                "back only the tokens that were fed after `activate_past_recording()` and the last `crop`."
            )
        remaining = -tokens_to_remove
        while remaining > 0:
            state, mix, length = self.history.pop()
            kept = max(length - remaining, 0)
            remaining -= length - kept
            self.cumulative_length = self.cumulative_length - length
            self.state = state
            if kept > 0:
                self.state = self._placed(mix(state, kept)[1], kept)
                self.cumulative_length = self.cumulative_length + kept
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
            for tensor in filter(torch.is_tensor, state):
                self._keep_address(tensor)
        self.spare = None

    @staticmethod
    def _keep_address(tensor: torch.Tensor) -> None:
        """Lets CUDA graphs write into it where it stands."""
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor, guard=False)

    @classmethod
    def _can_take(cls, old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
        if old is None or new is None:
            return old is new
        same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
        return old is new or (same and cls._may_write(old))

    @staticmethod
    def _may_write(tensor: torch.Tensor) -> bool:
        """Not what autograd may still need, nor, outside of inference mode, what was made inside."""
        if torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():  # which knows nothing of inference mode
            return True
        return torch.is_inference_mode_enabled() or not tensor.is_inference()

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
        return type(self.state)(*(None if t is None else function(t) for t in self.state))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = self._mapped(function)
        self.history.clear()  # of other rows, or on another device

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors of the state, by name, and `cumulative_length`; without the room of a static cache."""
        tensors = {} if self.state is None else {n: t for n, t in self.state._asdict().items() if t is not None}
        tensors = {"cumulative_length": self.cumulative_length, **tensors}
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what `state_dict` has returned."""
        tensors = dict(tensors)
        self.reset()
        self.cumulative_length = tensors.pop("cumulative_length")
        self.device = self.cumulative_length.device
        self.is_initialized = bool(tensors)
        self.state = self._state_class(**{"key": None, **tensors}) if tensors else None

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens seen, padding included."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: the state itself has no maximum length (position tables may; the model checks them)."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forgets every token, but not where the state stood."""
        self.spare, self.state = self.state or self.spare, None
        self.history.clear()
        if self._may_write(self.cumulative_length):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = torch.zeros_like(self.cumulative_length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        if self.state is not None:
            self._write(self._mapped(lambda t: t.index_select(0, beam_idx.to(t.device))))
        self.history.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))


class AFTFullCacheLayer(AFTCacheLayer):
    """State of one layer of AFT-full: every key and value so far, because each position weighs all of them anew.

    In a static cache the tensors have room for `max_cache_len` tokens from the start, and keep their place.
    """

    _layer_type = "aft_full"
    # Of each tensor that has one entry per token: the dimension of the tokens, and what stands where there is none.
    _per_token = {"key": (-2, -torch.inf), "value": (-2, 0), "key_position": (-1, 0)}

    @property
    def is_compileable(self) -> bool:
        return self.max_cache_len is not None

    def get_max_length(self) -> int:
        """The number of tokens that a static cache has room for; -1 if it grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def _check_room(self, length: int) -> None:
        if self.max_cache_len is None or torch.compiler.is_compiling() or self.device.type != "cpu":
            return  # no wait for the device: there, writing beyond the end is refused by `index_copy_`
        needed = int(self.cumulative_length) + length
        if needed > self.max_cache_len:
            raise ValueError(f"`max_cache_len` of this static cache is {self.max_cache_len}, but {needed} are needed.")

    def _placed(self, state: tuple, length: int) -> tuple:
        if self.max_cache_len is None:
            return state
        past = self.state or self._empty(state)
        index = torch.arange(length, device=self.device) + self.cumulative_length
        placed = {}
        for name, (dim, _) in self._per_token.items():
            tensor, old = getattr(state, name), getattr(past, name)
            if tensor is None:
                continue
            tokens = tensor.narrow(dim, tensor.shape[dim] - length, length)
            in_place = self._may_write(old) and not self.record_past
            placed[name] = (old.index_copy_ if in_place else old.index_copy)(dim, index, tokens)
        return state._replace(**placed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        tensors, length = super().state_dict(), int(self.cumulative_length)
        for name in self._per_token.keys() & tensors.keys():
            tensors[name] = tensors[name].narrow(self._per_token[name][0], 0, length).contiguous()
        return tensors

    def _empty(self, state: tuple) -> tuple:
        """Room for `max_cache_len` tokens such as those of `state`, whose other tensors are not taken over."""
        tensors = {}
        for name, (dim, nothing) in self._per_token.items():
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


class SynthesizerCacheLayer(AFTFullCacheLayer):
    """State of one layer of the Synthesizer: all values so far, and keys only where it mixes in dot products."""

    _layer_type = "synthesizer"
    _state_class = SynthesizerState
    _per_token = {"key": (-2, 0), "value": (-2, 0), "key_position": (-1, -1)}


# The library fills this table by itself only with subclasses of its own StaticLayer.
for _layer_class in (AFTCacheLayer, AFTFullCacheLayer, SynthesizerCacheLayer):
    STATIC_LAYER_TYPE_MAPPING[_layer_class._layer_type] = _layer_class


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Writes a cache to a safetensors file, from which `load_cache` goes on.

    Args:
        cache (`Cache`): a cache of one of these models.
        path: the file; one that exists is replaced once the new one is complete.

    Raises:
        ValueError: if the cache is not of one of these models.
    """
    foreign = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, AFTCacheLayer)]
    if foreign or not cache.layers:
        raise ValueError(f"`cache` must be a cache of AFT or of the Synthesizer, got layers {foreign or 'none'}.")
    tensors = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.state_dict().items()
    }
    layer_types = json.dumps([layer._layer_type for layer in cache.layers])
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata={"format": "pt", "layer_types": layer_types})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike, config, device: str | torch.device = "cpu") -> DynamicCache:
    """The cache that `save_cache` has written.

    Args:
        path: the file.
        config (`AFTConfig` or `SynthesizerConfig`): that of the model which filled the cache and is to go on.
        device: where to put the tensors.

    Raises:
        ValueError: if the file holds the cache of another kind of model.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        found = json.loads((file.metadata() or {}).get("layer_types", "null"))
        if found != config.layer_types:
            raise ValueError(f"`path` must hold a cache with layers {config.layer_types}, {path} has {found}.")
        cache = DynamicCache(config=config)
        for index, layer in enumerate(cache.layers):
            prefix = f"layers.{index}."
            layer.load_state_dict(
                {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}
            )
    return cache
