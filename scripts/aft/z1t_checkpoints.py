# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Checkpoints of the Z1T family, which are AFT-conv: the arrays in a file of either format, and the model they make.

Equinox writes the arrays of a tree one after another, each as a .npy, without names; they follow from their order.
A conversion to safetensors has the names.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aft.atomic_files import check_file
from aft.console import one_line
from aft.saved_models import first_of
from modeling_aft import AFTConfig, AFTForCausalLM
from modeling_aft.modeling_text import sinusoids


MAGIC = b"\x93NUMPY"
OF_MODEL = {"embedding": "model.embed_tokens", "pe": "model.embed_positions", "norm": "model.norm", "clf": "lm_head"}
OF_BLOCK = {
    "norm1": "mixer_norm",
    "attn.qkv_proj": "mixer.qkv_proj",
    "attn.out_proj": "mixer.o_proj",
    "attn": "mixer.position_bias",
    "norm2": "feed_forward_norm",
    "mlp.proj1": "feed_forward.up_proj",
    "mlp.proj2": "feed_forward.down_proj",
}
# In the order of a block of the tree, and of the whole but for the blocks, which stand between `pe` and `norm`.
LINEAR = ("weight", "bias")
NORM = ("alpha", "weight", "bias")
INTEGERS = (torch.int32, torch.int64)
NO_POSITIONS = 1e-6  # a table with nothing larger adds nothing: it was trained away


def open_arrays(path: Path) -> dict[str, Tensor]:
    """
    The arrays of a file by the names of the Z1T tree. They are mapped to the file, and read when they are used.

    Raises:
        ValueError: the file is of neither format, or ends too early or too late.
    """
    check_file(path, "checkpoint")
    with path.open("rb") as file:
        is_tree = file.read(len(MAGIC)) == MAGIC
    if is_tree:
        return name_arrays(read_tree(path))
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: must be .npy arrays or safetensors: {one_line(error)}") from error


def read_tree(path: Path) -> list[Tensor]:
    """The arrays that stand in a file one after another, each as a .npy."""
    arrays, size = [], path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            where = f"{path}: array {len(arrays) + 1}, at byte {file.tell()}"
            try:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("its version is not 1.0")
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                array = np.memmap(path, dtype, "c", file.tell(), shape, "F" if is_fortran else "C")
                arrays.append(torch.from_numpy(array))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: must be a whole .npy of numbers: {one_line(error)}") from error
            file.seek(array.nbytes, 1)
    return arrays


def name_arrays(arrays: list[Tensor]) -> dict[str, Tensor]:
    """
    The arrays of a tree by name, as their order says. A linear layer is sparse where whole numbers follow on it.

    Raises:
        ValueError: there are too few, or more than a whole number of blocks.
    """
    named = {}

    def take(part: str, names: tuple[str, ...]) -> None:
        for name in names:
            if len(named) == len(arrays):
                raise ValueError(f"the tree must go on with {part}.{name}, and ends after {len(arrays)} arrays")
            named[f"{part}.{name}"] = arrays[len(named)]

    def take_linear(part: str) -> None:
        take(part, LINEAR)
        if len(named) < len(arrays) and arrays[len(named)].dtype in INTEGERS:
            take(part, ("indices",))

    take("embedding", ("weight",))
    take("pe", ("pe",))
    block, behind = 0, len(NORM) + len(LINEAR)
    while len(arrays) - len(named) > behind:
        of_block = f"blocks.{block}"
        take(f"{of_block}.norm1", NORM)
        take_linear(f"{of_block}.attn.qkv_proj")
        take_linear(f"{of_block}.attn.out_proj")
        take(f"{of_block}.attn", ("w_conv",))
        take(f"{of_block}.norm2", NORM)
        take_linear(f"{of_block}.mlp.proj1")
        take_linear(f"{of_block}.mlp.proj2")
        block += 1
    take("norm", NORM)
    take("clf", LINEAR)
    return named


def our_name(name: str) -> str | None:
    """The name in [`AFTForCausalLM`] of an array of the tree; None if there is none such."""
    part, _, kind = name.rpartition(".")
    kind = {"w_conv": "weight", "pe": "weight"}.get(kind, kind)
    if part in OF_MODEL:
        return f"{OF_MODEL[part]}.{kind}"
    blocks, _, rest = part.partition(".")
    number, _, rest = rest.partition(".")
    if blocks != "blocks" or not number.isdecimal() or rest not in OF_BLOCK:
        return None
    return f"model.layers.{number}.{OF_BLOCK[rest]}.{kind}"


def make_config(arrays: dict[str, Tensor], tanh_linear: bool, tanh_mlp: bool) -> AFTConfig:
    """
    The configuration of a checkpoint: what the shapes of its arrays say, and the two things that they do not.

    Args:
        arrays: by the names of the tree.
        tanh_linear: whether a tanh stands behind every linear layer inside of blocks.
        tanh_mlp: whether tanh is the activation of the feed-forward layers, in the place of SiLU.

    Raises:
        ValueError: an array that says a size is not there or has not two of them, or the sizes do not fit.
    """

    def sizes_of(name: str) -> tuple[int, int]:
        if name not in arrays:
            raise ValueError(f"the checkpoint must have {name}, got {first_of(set(arrays)) or 'nothing'}")
        array = arrays[name]
        if array.dim() != 2 or not array.numel() or not array.is_floating_point():
            raise ValueError(
                f"{name} must be a matrix of floating-point numbers, got {list(array.shape)}, {array.dtype}"
            )
        return array.shape

    vocab_size, width = sizes_of("embedding.weight")
    length, _ = sizes_of("pe.pe")
    heads, window = sizes_of("blocks.0.attn.w_conv")
    # The sparse layers of a model have equally many inputs: one that has others will not fit this configuration.
    sparse = [name.removesuffix("indices") + "weight" for name in arrays if name.endswith(".indices")]
    return AFTConfig(
        aft_type="conv",
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=len([name for name in arrays if name.endswith(".attn.w_conv")]),
        intermediate_size=sizes_of("blocks.0.mlp.proj1.weight")[0],
        hidden_act="tanh" if tanh_mlp else "silu",
        max_position_embeddings=length,
        window_size=window,
        num_attention_heads=heads,
        query_activation="tanh",
        key_activation="tanh",
        conv_reparameterization=False,
        position_embedding_type=position_type(arrays["pe.pe"]),
        hidden_dropout_prob=0.0,
        norm_type="dyt",
        linear_fan_in=min((sizes_of(name)[1] for name in sparse), default=None),
        linear_activation="tanh" if tanh_linear else "none",
        qkv_bias=True,
        lm_head_bias=True,
        tie_word_embeddings=False,
        dtype=str(arrays["embedding.weight"].dtype).removeprefix("torch."),
    )


def position_type(table: Tensor) -> str:
    """What a table of positions [T, d] is: "none" if it is all but 0, "sinusoidal", or another, which is "learned"."""
    if table.abs().max() < NO_POSITIONS:
        return "none"
    expected = sinusoids(torch.arange(len(table)), table.shape[1])
    # The angles were products in float32, and the table has its own precision.
    tolerance = 2e-6 * len(table) + torch.finfo(table.dtype).eps
    return "sinusoidal" if torch.allclose(table.double(), expected, rtol=0, atol=tolerance) else "learned"


def check_arrays(arrays: dict[str, Tensor], config: AFTConfig) -> None:
    """
    Checks that the arrays are those of the model that a configuration makes.

    Raises:
        ValueError: lists the arrays that are missing, unexpected, or of another shape or dtype, or have an index of no
            input.
    """
    with torch.device("meta"):
        expected = AFTForCausalLM(config).state_dict()
    # A table that the model computes, or does without, has its place in the file.
    table = torch.empty(config.max_position_embeddings, config.hidden_size, device="meta")
    expected.setdefault(our_name("pe.pe"), table)
    ours = {name: our_name(name) for name in arrays}
    problems = [f"{name} is unexpected" for name, other in ours.items() if other not in expected]
    problems += [f"there is none that becomes {name}" for name in expected.keys() - set(ours.values())]
    dtype = arrays["embedding.weight"].dtype
    for name, other in ours.items():
        if other not in expected:
            continue
        array, shape = arrays[name], expected[other].shape
        if (array.shape or (1,)) != shape:
            problems.append(f"{name} must be {list(shape)}, got {list(array.shape)}")
        elif other.endswith("indices"):
            inputs = config.intermediate_size if "down_proj" in other else config.hidden_size
            if array.dtype not in INTEGERS:
                problems.append(f"{name} must be whole numbers, got {array.dtype}")
            elif not 0 <= array.min() <= array.max() < inputs:
                problems.append(f"{name} must be in [0, {inputs})")
        elif array.dtype != dtype:
            problems.append(f"{name} must be {dtype}, got {array.dtype}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"the arrays must be those of a Z1T: {'; '.join(sorted(problems)[:10])}{more}")


def make_model(arrays: dict[str, Tensor], config: AFTConfig) -> AFTForCausalLM:
    """
    The model that a checkpoint is. Most of its tensors are mapped to the file, and read when they are used.

    Args:
        arrays: by the names of the tree, checked.
        config: that of `make_config`.
    """
    width, weights = config.hidden_size, {}
    for name, array in arrays.items():
        if name == "pe.pe" and config.position_embedding_type != "learned":
            continue
        tensor = array.reshape(array.shape or (1,))
        if ".qkv_proj." in name:  # query, value, key
            query, value, key = tensor.split([width, width, config.num_attention_heads])
            tensor = torch.cat([query, key, value])
        elif name.endswith(".w_conv"):  # the last tap is that of offset 0
            tensor = tensor.flip(1)
        weights[our_name(name)] = tensor.to(torch.int32) if name.endswith(".indices") else tensor
    with torch.device("meta"):
        model = AFTForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()
