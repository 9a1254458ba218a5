# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures of what saved models have learned about positions; `aft draw --help` says which there are."""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModel

from aft.drawing import COLOURS, label, line_styles, save_figure, tidy
from aft.flags import check_model_name
from aft.saved_models import load, load_model, shape_of_model
from aft.text_sources import load_text
from aft.token_data import TokenData, tokens_at_hand
from aft.vocabulary import vocabulary_of_model


FAMILIES = ("aft", "synthesizer", "aft_vision")
BLOCK = 2**24  # numbers in the largest tensor of the receptive field
STATIC = ("random", "fixed_random", "factorized_random")  # components whose logits depend on positions only


@torch.no_grad()
def position_bias(mixer, length: int) -> tuple[str, np.ndarray] | None:
    """
    What a mixer adds to its weights' exponents for positions alone, without a decay.

    Returns:
        "pairs" and float [H, T, T], rows are queries; or "window" and float [H, T or 1, offsets] in the order of
        `modeling_aft.ops.aft_attention`; or None if there is nothing.
    """
    if hasattr(mixer, "mixture_weights"):
        weights = mixer.mixture_weights()
        # Of the queries, these components read the length alone.
        query = torch.zeros(1, mixer.heads, length, 1)
        parts = [
            mixer.logits[name](query)[0, :, :, :length] * (1 if weights[name] is None else weights[name])
            for name in STATIC
            if name in weights
        ]
        return ("pairs", sum(parts).float().numpy()) if parts else None
    if mixer.position_bias is None:
        return None
    bias = mixer.position_bias(torch.arange(length)).float().numpy()
    return ("pairs", bias[None]) if mixer.position_bias.argument == "position_bias" else ("window", bias)


def by_offset(kind: str, bias: np.ndarray, length: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    A bias of `position_bias` in rows over the offset.

    Returns:
        The offsets t - t', int [n], and the bias at each, float [H, T or 1, n], NaN where no key stands.
    """
    if kind == "pairs":
        offsets = np.arange(0 if causal else 1 - length, length)
    else:
        taps = bias.shape[2]
        offsets = np.arange(taps) - (0 if causal else (taps - 1) // 2)
        if bias.shape[1] == 1:  # the same for every position
            return offsets, bias
    keys = np.arange(length)[:, None] - offsets  # [T, n]
    exists = (keys >= 0) & (keys < length)
    if kind == "pairs":
        bias = np.take_along_axis(bias, np.where(exists, keys, 0)[None], axis=2)
    return offsets, np.where(exists, bias, np.nan)


def as_pairs(kind: str, bias: np.ndarray, length: int, causal: bool) -> np.ndarray:
    """A bias of `position_bias` as float [H, T, T], 0 outside of its window."""
    if kind == "pairs":
        return bias
    offsets, rows = by_offset(kind, bias, length, causal)
    rows = np.broadcast_to(rows, (len(rows), length, len(offsets)))
    pairs = np.zeros((len(rows), length, length), dtype=rows.dtype)
    for index, offset in enumerate(offsets):
        first, last = max(offset, 0), length + min(offset, 0)
        queries = np.arange(first, last)
        pairs[:, queries, queries - offset] = rows[:, queries, index]
    return pairs


@torch.no_grad()
def receptive_field(model, windows: torch.Tensor) -> np.ndarray:
    """
    Where the attention of an AFT model goes.

    Args:
        windows (`Tensor` [B, T]): token ids.

    Returns:
        `np.ndarray` [layers, T]: the share of the attention weight softmax(k + w) at each distance |t - t'|, mean over
        windows, channels, and queries of the second half, all of which have T / 2 keys or more behind them.
    """
    keys = {}

    def keep(index):
        def hook(projection, inputs, output):
            keys[index] = model.layers[index].mixer.split(output)[1].float()

        return hook

    hooks = [layer.mixer.qkv_proj.register_forward_hook(keep(index)) for index, layer in enumerate(model.layers)]
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()

    length = windows.shape[1]
    places = torch.arange(length)
    queries = places[length // 2 :]
    distance = (queries[:, None] - places).abs()  # [T / 2, T]
    shares = torch.zeros(len(model.layers), length, dtype=torch.float64)
    for index, layer in enumerate(model.layers):
        causal, found = layer.mixer.is_causal, position_bias(layer.mixer, length)
        bias = np.zeros((1, length, length)) if found is None else as_pairs(*found, length, causal)
        bias = torch.from_numpy(bias).float()[:, queries]  # [1 or H, T / 2, T]
        if causal:
            bias = bias.masked_fill(places > queries[:, None], -torch.inf)
        channels = keys[index].shape[2]
        decay = torch.zeros(channels) if layer.mixer.decay is None else layer.mixer.decay()
        block = max(1, BLOCK // keys[index][0].numel())  # queries at a time: [block, T, channels]
        for window in keys[index]:
            for part in range(0, len(queries), block):
                rows = slice(part, part + block)
                of_keys = bias[:, rows].permute(1, 2, 0)
                of_keys = of_keys.repeat_interleave(channels // of_keys.shape[2], 2) - decay * distance[rows, :, None]
                weights = (window + of_keys).softmax(1).mean(2)  # [block, T]
                shares[index].index_add_(0, distance[rows].flatten(), weights.double().flatten())
    return (shares / (len(windows) * len(queries))).numpy()


def panels(count: int, width: float, height: float, **options):
    """A figure with `count` axes in rows of six at most, one per layer."""
    columns = min(count, 6)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for unused in axes[count:]:
        unused.remove()
    for index, one in enumerate(axes[:count]):
        one.set_title(f"layer {index}", fontsize=9)
    return figure, axes[:count]


def draw_maps(name: str, biases: list[tuple[str, np.ndarray]], length: int, causal: bool) -> Figure:
    """Heat maps, a panel per layer, with one scale of colours, white at 0; grey where there is no pair."""
    images = []
    for kind, bias in biases:
        if kind == "pairs":
            image = bias.mean(0)
            extent, labels = (-0.5, length - 0.5, length - 0.5, -0.5), ("key position t'", "query position t")
            if causal:
                image = np.where(np.tri(length, dtype=bool), image, np.nan)
        else:
            offsets, rows = by_offset(kind, bias, length, causal)
            per_head = rows.shape[1] == 1
            image = rows[:, 0] if per_head else rows[0]
            extent = (offsets[0] - 0.5, offsets[-1] + 0.5, len(image) - 0.5, -0.5)
            labels = ("offset t - t'", "head" if per_head else "query position t")
        images.append((image, extent, labels))
    largest = max(float(np.nanmax(np.abs(image))) for image, _, _ in images) or 1.0
    figure, axes = panels(len(images), 2.4, 2.2)
    for one, (image, extent, _) in zip(axes, images, strict=True):
        picture = one.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest, extent=extent, aspect="auto")
        one.set_facecolor("#BBBBBB")  # where there is no pair
        one.tick_params(labelsize=7)
    axes[0].set_xlabel(images[0][2][0], fontsize=8)
    axes[0].set_ylabel(images[0][2][1], fontsize=8)
    figure.colorbar(picture, ax=list(axes), fraction=0.03)
    figure.suptitle(f"{label(name)}: position biases", fontsize=10)
    return figure


def draw_kernels(name: str, kernels: list[np.ndarray]) -> Figure:
    """
    What the kernels of AFT-conv add to the weights of all patches alike, exp(w) - 1, as figure 1 of the paper has it:
    a row for each of six layers at most, a square for each of 16 heads at most, a scale of colours for each row.

    Args:
        kernels: of each layer, float [H, k, k].
    """
    layers = spaced(len(kernels), 6)
    figure = Figure(figsize=(9, 0.75 * len(layers) + 0.6), layout="constrained")
    rows = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(rows, layers, strict=True):
        added = np.expm1(kernels[layer][spaced(len(kernels[layer]), 16)])
        side, largest = added.shape[1], float(np.abs(added).max()) or 1.0
        strip = np.pad(added, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)  # a gap behind each
        strip = strip.transpose(1, 0, 2).reshape(side, -1)[:, :-1]
        picture = axes.imshow(strip, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(f"layer {layer}", fontsize=8, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
        figure.colorbar(picture, ax=axes, fraction=0.02, pad=0.01).ax.tick_params(labelsize=6)
    figure.suptitle(f"{label(name)}: exp(w) - 1 of each head, the query in the middle", fontsize=10)
    return figure


def spaced(count: int, most: int) -> np.ndarray:
    """The numbers below `count`, or `most` of them at equal distances, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def draw_bias_curves(name: str, biases: list[tuple[str, np.ndarray]], length: int, causal: bool) -> Figure:
    """Bias over the offset, a panel per layer: mean and 10 to 90 % over positions, or a line per head."""
    figure, axes = panels(len(biases), 2.4, 2.0, sharey=True)
    for one, (kind, bias) in zip(axes, biases, strict=True):
        offsets, rows = by_offset(kind, bias, length, causal)
        enough = np.isfinite(rows[0]).sum(0) >= min(rows.shape[1], 8)  # far offsets have few positions
        chosen = thinned(offsets) & enough
        offsets, rows = offsets[chosen], rows[..., chosen]
        lines = np.nanmean(rows, axis=1)  # [H, n]
        one.axhline(0, color="#888888", linewidth=0.6)
        for line in lines:
            one.plot(offsets, line, color=COLOURS[0], linewidth=1.2 if len(lines) == 1 else 0.7)
        if len(rows) == 1 and rows.shape[1] > 1:
            low, high = np.nanpercentile(rows[0], (10, 90), axis=0)
            one.fill_between(offsets, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
        elif len(rows) > 1:
            one.plot(offsets, lines.mean(0), color=COLOURS[1], linewidth=1.6)
        if np.abs(offsets).max() > 64:
            one.set_xscale("symlog", base=2, linthresh=4)
        tidy(one)
        one.tick_params(labelsize=7)
    axes[0].set_xlabel("offset t - t'", fontsize=8)
    axes[0].set_ylabel("bias w", fontsize=8)
    legend = "a line per head, and their mean" if len(lines) > 1 else "mean and 10 to 90 % over positions"
    figure.suptitle(f"{label(name)}: position biases ({legend})", fontsize=10)
    return figure


def thinned(offsets: np.ndarray, most: int = 48) -> np.ndarray:
    """Which of the offsets are drawn: those near 0, and ever fewer farther away."""
    distances = np.unique(np.geomspace(1, np.abs(offsets).max() + 1, most).round().astype(int)) - 1
    return np.isin(np.abs(offsets), [*range(17), *distances])


def draw_mixture(name: str, mixtures: list[dict[str, np.ndarray]]) -> Figure:
    """Bars of the mixture weights, a group per layer: mean over the heads, and a dot for each."""
    figure = Figure(figsize=(1.1 * len(mixtures) + 2.5, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(mixtures[0])
    width = 0.8 / len(names)
    for index, component in enumerate(names):
        places = np.arange(len(mixtures)) + (index - (len(names) - 1) / 2) * width
        heads = np.stack([mixture[component] for mixture in mixtures])  # [layers, H]
        axes.bar(places, heads.mean(1), width * 0.9, label=component, color=COLOURS[index])
        axes.plot(places, heads, ".", color="#444444", markersize=3)
    axes.set_xticks(range(len(mixtures)))
    axes.set(xlabel="layer", ylabel="mixture weight", ylim=(0, None))
    tidy(axes)
    axes.set_title(f"{label(name)}: weights of the mixture, mean and each head", fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_fields(fields: dict[str, np.ndarray]) -> Figure:
    """Share of the weight on the nearest keys over their number, a panel per layer and a line per model.

    The grey line is that of equal weights on all keys of a causal model.
    """
    figure, axes = panels(max(map(len, fields.values())), 2.4, 2.0, sharey=True, sharex=True)
    length = next(iter(fields.values())).shape[1]
    nearest = np.unique(np.geomspace(1, length, 48).round().astype(int))
    uniform = np.minimum(nearest / np.arange(length // 2 + 1, length + 1)[:, None], 1).mean(0)
    styles = line_styles(fields)
    for layer, one in enumerate(axes):
        one.plot(nearest, uniform, label=None if layer else "all keys alike", color="#888888", linewidth=1)
        for name, shares in fields.items():
            if layer < len(shares):
                shown = None if layer else label(name)
                one.plot(nearest, shares[layer].cumsum()[nearest - 1], label=shown, linewidth=1.4, **styles[name])
        one.set_xscale("log", base=2)
        one.set_ylim(0, 1.02)
        tidy(one)
        one.tick_params(labelsize=7)
    axes[0].set_xlabel("distance |t - t'| below", fontsize=8)
    axes[0].set_ylabel("share of the weight", fontsize=8)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(f"Share of the attention weight exp(k + w) by distance, T = {length}", fontsize=10)
    return figure


def draw_receptive_fields(
    models: dict, data: dict[str, TokenData], length: int | None = None, num_windows: int = 4
) -> Figure:
    """
    The receptive fields of AFT models over the same windows, if their tokens are the same.

    Args:
        data: the tokens of the text for each of the models.
        length: tokens of a window; the least max_position_embeddings of the models by default.
    """
    length = length or min(model.config.max_position_embeddings for model in models.values())
    windows = {name: read_windows(data[name], length, num_windows) for name in models}
    return draw_fields({name: receptive_field(model, windows[name]) for name, model in models.items()})


def read_windows(data: TokenData, length: int, count: int) -> torch.Tensor:
    """
    The first windows of the valid split, int64 [at most `count`, `length`].

    Raises:
        ValueError: the split is shorter than one window.
    """
    start, stop = data.splits["valid"]
    count = min(count, (stop - start) // length)
    if count < 1:
        raise ValueError(
            f"--dataset_path needs a valid split of one window, {length} tokens, or more, got {stop - start}"
        )
    return torch.from_numpy(data.read(start, start + count * length).astype(np.int64)).view(count, length)


def data_of_model(model, text, cache_dir: str) -> TokenData:
    """The tokens of a text for a model that was loaded from a folder."""
    name = model.config.name_or_path
    return tokens_at_hand(text, vocabulary_of_model(name, model.config, trust_remote_code=False), cache_dir)


def draw_model(name: str, model) -> dict[str, Figure]:
    """What one model has by itself, biases and mixture weights, by the names of the files; empty if it has neither."""
    mixers = [layer.mixer for layer in model.layers]
    length, causal = model.config.max_position_embeddings, mixers[0].is_causal
    figures = {}
    if model.config.model_type == "aft_vision" and model.config.aft_type == "conv":
        with torch.no_grad():
            kernels = [mixer.position_bias(None).float().numpy() for mixer in mixers]
        return {f"{name}-kernels.png": draw_kernels(name, kernels)}
    biases = [bias for mixer in mixers if (bias := position_bias(mixer, length)) is not None]
    if biases:
        figures[f"{name}-bias-map.png"] = draw_maps(name, biases, length, causal)
        figures[f"{name}-bias-curve.svg"] = draw_bias_curves(name, biases, length, causal)
    if getattr(mixers[0], "mixture_logits", None) is not None:
        mixtures = [
            {
                component: weight.detach().float().flatten().numpy()
                for component, weight in mixer.mixture_weights().items()
            }
            for mixer in mixers
        ]
        figures[f"{name}-mixture.svg"] = draw_mixture(name, mixtures)
    return figures


def load_models(folders: list[Path], flag: str = "models:") -> dict[str, torch.nn.Module]:
    """
    The models without their heads, by the names of their folders (by their paths where two have one name).

    Args:
        flag: what names the folders on the command line.

    Raises:
        ValueError: a folder holds no model of this package, or not all of it.
    """
    paths = [folder.resolve() for folder in folders]
    unique = len({path.name for path in paths}) == len(paths)
    models = {}
    for folder, path in zip(folders, paths, strict=True):
        check_model_name(folder, flag, hub=False)
        config = load(AutoConfig, path, flag, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ValueError(f"{flag} {folder} must hold one of {', '.join(FAMILIES)}, got {config.model_type}")
        model, _ = load_model(AutoModel, path, flag, new_head=True, trust_remote_code=False)
        models[path.name if unique else "-".join(path.parts[-2:])] = model
    return models


def draw_models(args: argparse.Namespace) -> list[Path]:
    """
    Writes the pictures of models with the flags of `aft draw`; returns the files.

    Raises:
        ValueError: a model has nothing that could be drawn.
    """
    transformers.utils.logging.disable_progress_bar()
    models = load_models(args.models)
    figures = {}
    afts = {
        name: model
        for name, model in models.items()
        if model.config.model_type == "aft" and shape_of_model(model.config.name_or_path) is None
    }
    for name, model in models.items():
        drawn = draw_model(name, model)
        if not drawn and name not in afts:
            found = getattr(model.config, "components", None) or [model.config.aft_type]
            raise ValueError(
                f"{name} has nothing to draw: neither AFT of text, nor a mixture, nor any of {', '.join(STATIC)}, nor "
                f"position biases, but {', '.join(found)}"
            )
        figures |= drawn
    if afts:
        text = load_text(args)
        data = {name: data_of_model(model, text, args.cache_dir) for name, model in afts.items()}
        fields = draw_receptive_fields(afts, data, args.length, args.num_windows)
        figures["receptive-field.svg"] = fields
    written = [save_figure(figure, args.output_dir / name) for name, figure in figures.items()]
    for path in written:
        print(f"wrote {path}")
    return written
