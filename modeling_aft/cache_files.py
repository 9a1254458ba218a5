# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Caches in files, so that what a model has read can wait on the disk."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import DynamicCache
from transformers.cache_utils import Cache


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Writes a cache to a safetensors file, from which `load_cache` goes on.

    Args:
        cache (`Cache`): a cache that a model of this package has filled.
        path: the file; one that exists is replaced once the new one is complete and on the disk.

    Raises:
        ValueError: the cache is empty, not of one of these models, or of a forward pass that was interrupted.
    """
    tensors = cache_tensors(cache)
    write_tensors(path, tensors, {"kind": cache.layers[0].kind})


def cache_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    """
    The tensors of a cache as `save_cache` names them.

    Raises:
        ValueError: as `save_cache` does.
    """
    layers = getattr(cache, "layers", [])
    # By what they can do: the code of a model from the Hub has classes of its own.
    foreign = [type(layer).__name__ for layer in layers if not hasattr(layer, "state_dict")]
    if foreign or not layers:
        raise ValueError(f"`cache` must be a cache of AFT or of the Synthesizer, got layers {foreign or 'none'}.")
    if layers[0].kind is None or layers[0].unfinished:
        problem = "an empty one" if layers[0].kind is None else "one of a forward pass that was interrupted"
        raise ValueError(f"`cache` must be one that a model has filled, got {problem}.")
    return {f"layers.{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.state_dict().items()}


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file; one that exists is replaced once the new one is complete and on the disk."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp", delete=False) as file:
        try:
            file.write(save(tensors, metadata={"format": "pt", **metadata}))
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load_cache(path: str | os.PathLike, config, device: str | torch.device = "cpu") -> DynamicCache:
    """The cache that `save_cache` has written.

    Args:
        path: the file.
        config (`AFTConfig` or `SynthesizerConfig`): that of the model which filled the cache and is to go on.
        device: where to put the tensors.

    Raises:
        ValueError: the file holds no cache, a damaged one, or that of another kind of model.
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = read_tensors(path, "save_cache", device)
    check_kind(f"`path` {path}", metadata["kind"], config.state_kind)
    return restore_cache(path, tensors, config)


def read_tensors(
    path: str | os.PathLike, writer: str, device: str | torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    The tensors and the metadata of a file that the function `writer` has written.

    Raises:
        ValueError: it is damaged, or does not say of what kind of model it is.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file that {writer} wrote, but there is none: {path}")
    try:
        with safe_open(path, framework="pt") as file:  # which does not know every device of torch by its name
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`path` must be a file that {writer} wrote, {path} is not: {error}") from error
    if "kind" not in metadata:
        raise ValueError(f"`path` must be a file that {writer} wrote, {path} does not say of what model it is.")
    return tensors, metadata


def restore_cache(path: str | os.PathLike, tensors: dict[str, torch.Tensor], config) -> DynamicCache:
    """
    The cache of a model whose tensors, in the file `path`, are those of `cache_tensors`.

    Raises:
        ValueError: they are not those of a cache of such a model.
    """
    cache = DynamicCache(config=config)
    states = _states_by_layer(path, tensors, len(cache.layers))
    length, batch = _check_sizes(path, states)
    for index, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        _check_state(f"layer {index} of {path}", state, layer.shapes(config, batch, length), length)
        layer.load_state_dict(state)
    cache.layers[0].kind = config.state_kind
    return cache


def check_kind(name: str, found: str, expected: str) -> None:
    """
    Checks that a state belongs to a kind of model.

    Args:
        name: what the state is called.
        found: the `state_kind` of the config that it belongs to.
        expected: that of the model which is to go on from it.

    Raises:
        ValueError: they differ; names the fields, with both values.
    """
    if found == expected:
        return
    try:
        theirs = dict(json.loads(found))
    except (TypeError, ValueError):
        theirs = {}
    ours = json.loads(expected)
    fields = [*ours, *(theirs.keys() - ours.keys())]
    differing = [
        f"{field} {ours.get(field)!r}, not {theirs.get(field)!r}"
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]
    raise ValueError(f"{name} must be a cache of a model with " + "; ".join(differing) + ".")


def _states_by_layer(path, tensors: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    states = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        match name.split(".", 2):
            case ["layers", index, field] if index.isdecimal() and int(index) < count:
                states[int(index)][field] = tensor
            case _:
                raise ValueError(f"{path} has a tensor {name!r} that no cache of this model has.")
    return states


def _check_sizes(path, states: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """The number of tokens and of rows, which all layers must share."""
    lengths, batches = set(), set()
    for state in states:
        length, position = state.get("cumulative_length"), state.get("position")
        if length is None or length.shape != () or length.dtype != torch.long:
            raise ValueError(f"{path} must have a whole number `cumulative_length` in each layer.")
        if position is None or position.dim() != 1 or position.dtype != torch.long or len(position) == 0:
            raise ValueError(f"{path} must have whole numbers `position` [batch] in each layer.")
        lengths.add(int(length))
        batches.add(len(position))
    if len(lengths) != 1 or len(batches) != 1 or min(lengths) < 1:
        raise ValueError(f"{path} must have the same tokens in all layers, got lengths {lengths}, batches {batches}.")
    return lengths.pop(), batches.pop()


def _check_state(name: str, state: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], length: int) -> None:
    """Raises a ValueError if tensors are missing, have other sizes or types, or hold what no forward pass leaves."""
    expected = {"cumulative_length": (), **shapes}
    found = {field: tuple(tensor.shape) for field, tensor in state.items()}
    if found != expected:
        raise ValueError(f"{name} must have tensors of the shapes {expected}, got {found}.")
    for field, tensor in state.items():
        if field in ("cumulative_length", "position", "key_position"):
            fits = tensor.dtype == torch.long and bool((tensor >= -1).all())
            allowed = "whole numbers of at least -1"
        else:
            lowest = tensor.masked_fill(tensor == -torch.inf, 0) if field in ("key", "maximum") else tensor
            fits = tensor.is_floating_point() and bool(lowest.isfinite().all())
            allowed = "finite numbers"
        if not fits:
            raise ValueError(f"{name} must have {allowed} in {field!r}.")
    if bool((state["position"] < 0).any()):
        raise ValueError(f"{name} must have at least 0 in 'position'.")
