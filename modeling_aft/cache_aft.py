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

from collections.abc import Callable

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin


class AFTCacheLayer(CacheLayerMixin):
    """State of one layer of AFT-simple, AFT-local or AFT-conv: its size does not depend on the number of tokens.

    The tensors take their sizes from the first update. Without autograd, later ones write in place, so that a compiled
    decoding step finds them where they were.
    """

    _layer_type = "aft"
    is_compileable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.state: tuple | None = None
        self.record_past = False
        # (state before, mix, number of tokens) of each update since the last `crop`, while recording.
        self.history: list[tuple[tuple | None, Callable, int]] = []
        self.device: torch.device | None = None
        # Tokens seen, padding included. A tensor, because a compiled step would be specialised on a number.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.cumulative_length = self.cumulative_length.to(self.device)
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
        out, state = mix(self.state, None)
        if self._may_write(self.cumulative_length):
            self.cumulative_length.add_(key_states.shape[1])
        else:
            self.cumulative_length = self.cumulative_length + key_states.shape[1]
        if self.record_past:
            self.history.append((self.state, mix, key_states.shape[1]))
            self.state = state
        else:
            self._write(state)
        return out, None

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
            self.cumulative_length = self.cumulative_length - (length - kept)
            self.state = state if kept == 0 else mix(state, kept)[1]
        self.history.clear()

    def _write(self, state: tuple) -> None:
        old = [] if self.state is None else [t for t in self.state if t is not None]
        new = [t for t in state if t is not None]
        same_shapes = len(old) == len(new) and all(o.shape == n.shape for o, n in zip(old, new, strict=True))
        if same_shapes and all(map(self._may_write, old)):
            for o, n in zip(old, new, strict=True):
                o.copy_(n)
        else:
            self.state = state

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

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens seen, padding included."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: the state itself has no maximum length (position tables may; the model checks them)."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forgets every token."""
        self.state = None
        self.history.clear()
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
    """State of one layer of AFT-full: every key and value so far, because each position weighs all of them anew."""

    _layer_type = "aft_full"
    is_compileable = False


class SynthesizerCacheLayer(AFTFullCacheLayer):
    """State of one layer of the Synthesizer: all values so far, and keys only where it mixes in dot products."""

    _layer_type = "synthesizer"


# The library fills this table by itself only with subclasses of its own StaticLayer.
for _layer_class in (AFTCacheLayer, AFTFullCacheLayer, SynthesizerCacheLayer):
    STATIC_LAYER_TYPE_MAPPING[_layer_class._layer_type] = _layer_class
