# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A text without end, read piece by piece: how surprising each token is, and what would come next."""

import copy
import json
import os

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from .cache_files import cache_tensors, check_kind, read_tensors, restore_cache, write_tensors
from .refresh import check_refresh


LONGEST_PIECE = 1024  # tokens of each row in one forward pass
FIELDS = ("refresh_every", "refresh_overlap", "num_tokens", "notes")  # what a file has beside the tensors


class TokenStream:
    """
    What a causal language model makes of a stream of tokens. Its memory does not grow with the stream, and nothing
    depends on the sizes of the pieces in which the tokens come.

    Without refresh the model carries its state along, which must be one of fixed size without position tables. With it
    the model, any of this package, starts anew: before it would read more than `refresh_every` tokens it forgets them
    and reads the last `refresh_overlap` again. It reads R / (R - O) times the tokens of the stream.

    Args:
        model (`AFTForCausalLM` or `SynthesizerForCausalLM`): put into eval mode.
        refresh_every (`int`, *optional*): R, how many tokens the model reads between one start and the next.
        refresh_overlap (`int`, *optional*): O, how many of them it had read before; with `refresh_every`, and less.

    Attributes:
        num_tokens (`int`): tokens of each row so far. One less of them had a surprise.
        notes (`dict`): what its user wants to be saved along, of the types of JSON.

    Raises:
        ValueError: the model is none of this package, R and O do not fit it or each other, or it needs them.

    Example:

    ```python
    >>> stream = TokenStream(model)
    >>> bits = stream.read(torch.tensor([list(b"The history of ")])).sum() / math.log(2)
    >>> bytes(stream.expect(20, do_sample=False)[0].tolist())
    ```
    """

    def __init__(self, model, refresh_every: int | None = None, refresh_overlap: int | None = None):
        config = model.config
        if not hasattr(config, "state_kind") or not hasattr(model, "lm_head"):
            raise ValueError(f"`model` must be a causal language model of this package, got {type(model).__name__}.")
        check_refresh(config, refresh_every, refresh_overlap)
        cache = DynamicCache(config=config)
        # By what it has: the code of a model from the Hub has classes of its own.
        grows = hasattr(cache.layers[0], "per_token")
        if refresh_every is None and (grows or config.has_position_table):
            reason = f"end at max_position_embeddings ({config.max_position_embeddings})"
            raise ValueError(
                "`refresh_every` and `refresh_overlap` must be given, got None: "
                + (f"the position tables of the model {reason}." if config.has_position_table else "its state grows.")
            )
        self.model, self.refresh_every, self.refresh_overlap = model.eval(), refresh_every, refresh_overlap
        self.num_tokens, self.notes = 0, {}
        # The last token waits: the model reads it when the next one has come.
        self._cache, self._num_read = cache, 0
        # [B, n], the tokens of the window that waits included, or without refresh that one alone.
        self._window: torch.Tensor | None = None

    @torch.no_grad()
    def read(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """
        Reads the next tokens.

        Args:
            input_ids (`LongTensor` [B, T]): any number of them; B as in the first call.

        Returns:
            [B, T] float32: the surprise of each token in nats, -ln of its probability after all before it, or after
            those since the last start. That of the very first token of the stream is 0, as nothing had predicted it.

        Raises:
            ValueError: the ids have another shape, or are not in the vocabulary.
        """
        input_ids = self._check(input_ids)
        surprise = torch.zeros(input_ids.shape, device=input_ids.device)
        start = 0
        if self._window is None and input_ids.shape[1]:
            self._window, start = input_ids[:, :1].clone(), 1
        while start < input_ids.shape[1]:
            room = LONGEST_PIECE
            if self.refresh_every is not None:
                if self._num_read == self.refresh_every:
                    self._start_anew()
                room = min(room, self.refresh_every - self._num_read)
            labels = input_ids[:, start : start + room]
            logits = self._feed(torch.cat([self._window[:, -1:], labels[:, :-1]], dim=1))
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            surprise[:, start : start + room] = losses.view_as(labels)
            known = self._window[:, :0] if self.refresh_every is None else self._window
            kept = labels[:, -1:] if self.refresh_every is None else labels
            self._window = torch.cat([known, kept], dim=1)
            start += room
        self.num_tokens += input_ids.shape[1]
        return surprise

    def expect(self, max_new_tokens: int, **options) -> torch.LongTensor:
        """
        What the model would write next. The stream stays where it is.

        Args:
            max_new_tokens (`int`): the most tokens to write.
            options: those of `generate`, such as `do_sample` or `temperature`.

        Returns:
            `LongTensor` [B, up to max_new_tokens].

        Raises:
            ValueError: nothing has been read yet, or `generate` refuses an option.
        """
        if self._window is None:
            raise ValueError("`read` must have read at least one token before `expect`, got none.")
        if self.refresh_every is None:
            cache = copy.deepcopy(self._cache)
            for layer in cache.layers:  # else `generate` would need a mask as long as the stream
                layer.forget_length()
            options |= {"cache": cache}
        else:
            options |= {"refresh_every": self.refresh_every, "refresh_overlap": self.refresh_overlap}
        mask = torch.ones_like(self._window)
        made = self.model.generate(self._window, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
        return made[:, self._window.shape[1] :]

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the stream to a safetensors file, from which `load` goes on.

        Args:
            path: the file; one that exists is replaced once the new one is complete and on the disk.

        Raises:
            ValueError: nothing has been read yet.
        """
        if self._window is None:
            raise ValueError("`read` must have read at least one token before `save`, got none.")
        values = {name: getattr(self, name) for name in FIELDS}
        tensors = {"window": self._window} | (cache_tensors(self._cache) if self._num_read else {})
        write_tensors(path, tensors, {"kind": self.model.config.state_kind, "stream": json.dumps(values)})

    @classmethod
    def load(cls, path: str | os.PathLike, model) -> "TokenStream":
        """
        The stream that `save` has written, with the refresh that it had.

        Args:
            path: the file.
            model: the model that has read the stream, or another of its kind, which is to go on.

        Raises:
            ValueError: the file holds no stream, a damaged one, or that of another kind of model.
            FileNotFoundError: there is no such file.
        """
        tensors, metadata = read_tensors(path, "TokenStream.save", model.device)
        check_kind(f"`path` {path}", metadata["kind"], model.config.state_kind)
        try:
            values, window = json.loads(metadata["stream"]), tensors.pop("window")
            every, overlap, num_tokens, notes = (values[name] for name in FIELDS)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must be a file that TokenStream.save wrote, {path} is not: {error}") from error
        stream = cls(model, every, overlap)
        if tensors:
            stream._cache = restore_cache(path, tensors, model.config)
            stream._num_read = int(stream._cache.get_seq_length())
        batch = len(stream._cache.layers[0].position) if tensors else window.shape[0]
        width = 1 if stream.refresh_every is None else stream._num_read + 1
        if tuple(window.shape) != (batch, width) or window.dtype != torch.long:
            raise ValueError(f"{path} must have whole numbers `window` [{batch}, {width}], got {list(window.shape)}.")
        stream._window, stream.num_tokens, stream.notes = stream._check(window), num_tokens, notes
        return stream

    def _check(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids on the device of the model, after a check of their shape and values."""
        rows = "B" if self._window is None else len(self._window)
        if input_ids.dim() != 2 or (self._window is not None and len(input_ids) != rows) or not len(input_ids):
            raise ValueError(f"`input_ids` must be [{rows}, T], got {list(input_ids.shape)}.")
        if input_ids.is_floating_point() or input_ids.is_complex():
            raise ValueError(f"`input_ids` must be whole numbers, got {input_ids.dtype}.")
        input_ids, size = input_ids.to(self.model.device, torch.long), self.model.config.vocab_size
        if bool(((input_ids < 0) | (input_ids >= size)).any()):
            wrong = input_ids[(input_ids < 0) | (input_ids >= size)][0].item()
            raise ValueError(f"`input_ids` must be at least 0 and less than vocab_size ({size}), got {wrong}.")
        return input_ids

    def _feed(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """The logits of a forward pass that goes on from the cache."""
        logits = self.model(input_ids, cache=self._cache, use_cache=True, logits_to_keep=logits_to_keep).logits
        self._num_read += input_ids.shape[1]
        return logits

    def _start_anew(self) -> None:
        """Forgets the window, and reads its last tokens, without the one that waits, as the beginning of the next."""
        self._cache, self._num_read = DynamicCache(config=self.model.config), 0
        self._window = self._window[:, -self.refresh_overlap - 1 :]
        for piece in self._window[:, :-1].split(LONGEST_PIECE, dim=1):
            self._feed(piece, logits_to_keep=1)
