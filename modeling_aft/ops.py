# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The operator of the Attention Free Transformer (arXiv 2105.14103), one function for its four forms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_chunks import windowed_bidirectional, windowed_chunks, windowed_export
from .ops_cpu import windowed_cpu
from .ops_full import full, has_table, on_table
from .ops_grid import by_convolution, by_pairs, convolution_pays, densely, on_grid, pair_bias
from .ops_kernels import Kernel, choose
from .ops_modes import can_read, is_exporting, is_static, is_transformed, without_autocast
from .ops_packing import pack
from .ops_panel import panel_average, panel_composed, panel_for_export
from .ops_reference import aft_attention_reference
from .ops_state import QUERY_ACTIVATIONS, AFTState, Call, compute_dtype, position_rows, position_tables
from .ops_step import can_step, step
from .ops_tokens import count_tokens, refused
from .ops_triton import windowed_triton
from .ops_triton_full import full_triton
from .ops_windows import Window, several_queries
from .triton_language import triton_can_run


def _has_window(call: Call) -> bool:
    return call.position_bias is None and call.grid is None


def _is_full(call: Call) -> bool:
    return call.position_bias is not None


def _has_grid(call: Call) -> bool:
    return call.grid is not None


def _has_operators(call: Call) -> bool:
    """Operators of this package have no rules for transforms, and mean nothing to other runtimes."""
    return not is_exporting() and not is_transformed()


def _has_triton(call: Call) -> bool:
    return triton_can_run(call.value.device)


def _gains_by_triton(call: Call) -> bool:
    """Whether a kernel can gain from tensor cores: on a GPU, but not in float64."""
    return call.value.device.type == "cuda" and compute_dtype(call.key, call.value) != torch.float64


def _has_even_heads(call: Call) -> bool:
    """Whether the channels that share a bias come in whole lines of memory."""
    tables = position_tables(call.position_bias)
    return call.value.shape[2] // tables.shape[0] % 16 == 0


def _composed(window: Window) -> Tensor:
    return windowed_chunks(window, panel_composed)


# In order of preference. "full" is AFT-full, "grid" AFT-conv of a picture, and all others but the reference are the
# three forms with a window, of which AFT-simple's has no bias.
KERNELS = (
    Kernel(
        "step",
        "a single query of a causal form with a window that goes on from a state",
        can_step,
        step,
    ),
    Kernel(
        "triton",
        "causal forms with a window on a CUDA device, with the package triton, outside of exports and transforms",
        lambda call: _has_window(call) and call.causal and _has_triton(call) and _has_operators(call),
        several_queries(windowed_triton),
        pays=_gains_by_triton,
    ),
    Kernel(
        "cpu",
        "causal forms with a window on a CPU, outside of exports and transforms",
        lambda call: _has_window(call) and call.causal and call.value.device.type == "cpu" and _has_operators(call),
        several_queries(windowed_cpu),
    ),
    Kernel(
        "bidirectional",
        "bidirectional forms with a window, outside of exports and transforms",
        lambda call: _has_window(call) and not call.causal and _has_operators(call),
        several_queries(windowed_bidirectional),
        pays=lambda call: torch.compiler.is_compiling(),
    ),
    Kernel(
        "chunks",
        "forms with a window, outside of exports and transforms",
        lambda call: _has_window(call) and _has_operators(call),
        several_queries(windowed_chunks),
    ),
    Kernel(
        "chunks_export", "forms with a window", _has_window, several_queries(windowed_export), lambda _: is_exporting()
    ),
    Kernel("chunks_composed", "forms with a window", _has_window, several_queries(_composed)),
    Kernel(
        "full_triton",
        "AFT-full at the positions 0, 1, ... on a CUDA device, with the package triton, outside of exports and "
        "transforms",
        lambda call: _is_full(call) and has_table(call) and _has_triton(call) and _has_operators(call),
        on_table(full_triton),
        pays=lambda call: _gains_by_triton(call) and _has_even_heads(call),
    ),
    Kernel(
        "full",
        "AFT-full, outside of exports and transforms",
        lambda call: _is_full(call) and _has_operators(call),
        full(panel_average),
    ),
    Kernel("full_export", "AFT-full", _is_full, full(panel_for_export), lambda _: is_exporting()),
    Kernel("full_composed", "AFT-full", _is_full, full(panel_composed)),
    Kernel(
        "grid_convolution",
        "calls with a grid, outside of exports and transforms",
        lambda call: _has_grid(call) and _has_operators(call),
        on_grid(by_convolution),
        pays=convolution_pays,
    ),
    Kernel(
        "grid_dense",
        "calls with a grid, outside of exports and transforms",
        lambda call: _has_grid(call) and _has_operators(call),
        on_grid(densely),
    ),
    Kernel(
        "grid_export", "calls with a grid", _has_grid, on_grid(by_pairs(panel_for_export)), lambda _: is_exporting()
    ),
    Kernel("grid_composed", "calls with a grid", _has_grid, on_grid(by_pairs(panel_composed))),
    Kernel(
        "reference", "calls outside of graphs and transforms", lambda call: not is_static(), aft_attention_reference
    ),
)
TABLES = {"auto": KERNELS, "torch": tuple(kernel for kernel in KERNELS if "triton" not in kernel.name)}


def aft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None = None,
    *,
    window_bias: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    initial_state: AFTState | None = None,
    return_state: bool = False,
    query_activation: str = "sigmoid",
    backend: str = "auto",
    seq_idx: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, AFTState]:
    r"""
    Attention without dot products (eq. 2 of arXiv 2105.14103), per channel:

        y_t = sigmoid(q_t) * sum_{t'} exp(k_{t'} + w_{t,t'}) v_{t'} / sum_{t'} exp(k_{t'} + w_{t,t'})

    with the sums over t' <= t if `causal`, else over all t'. The four forms differ in the bias w: `position_bias` is
    AFT-full, `window_bias` with a row per position AFT-local (eq. 4), with one row for all positions AFT-conv (eq. 6),
    and neither AFT-simple (eq. 5, w = 0). A `decay` r, which is not in the paper, adds - r |t - t'| to w, within the
    window and beyond: older keys fade, however long the text is. The result is exact for any keys and biases with
    finite sums, computed in float32, or in float64 if keys or values are, also under autocast. Simple, local and conv
    take O(T n D) time and O(T D) memory, full O(T^2 D) and O(T^2).

    With a `grid` the tokens are the places of a picture, and AFT-conv has two dimensions: eq. 6 for t and t' of two
    coordinates each, with w_{t,t'} the entry of `window_bias` at the offset t - t'. It takes O(T n D) time with
    kernels of n entries where convolutions pay, else O(T^2 D), and O(T D) memory, at times with O(h T^2).

    Args:
        query (`Tensor` [B, T, D]): floating point.
        key (`Tensor` [B, T, D] or [B, T, H]): with H columns, key i is shared by channels i D/H to (i + 1) D/H - 1.
        value (`Tensor` [B, T, D]): the values.
        position_bias (`Tensor` [N, N] or [B, T, N], or of heads [h, 1, N, N] or [h, B, T, N], *optional*):
            Bias of each query position (row) and key position (column), or the rows of the T queries. With h heads,
            bias i is that of key channels i H/h to (i + 1) H/h - 1; [h, 1, N, N] is a table for any T.
        window_bias (`Tensor` [H or 1, N or 1, n] or [H or 1, B, T, n], *optional*):
            `window_bias[h, t, j]` is the bias of query position t at the offset t - t' = j for causal use, and at
            t - t' = j - (n - 1) / 2, with n odd, for bidirectional use. Offsets count kept tokens. Outside the window
            the bias is 0. With 4 dimensions, the rows of the T queries. With a `grid` it is [h, kh, kw], kh and kw
            odd, and `window_bias[h, a, b]` is the bias where the query stands a - (kh - 1) / 2 rows below the key and
            b - (kw - 1) / 2 columns to the right of it.
        decay (`Tensor` [H], *optional*):
            What each key channel loses per kept token between a query and the key, at least 0 and finite; not with
            `position_bias`.
        causal (`bool`): whether a query sees only its own and earlier tokens.
        attention_mask (`Tensor` [B, T], *optional*):
            1 or True keeps a token, 0 or False makes it padding: no key to anybody, and 0 as its own output.
        position_ids (`LongTensor` [B or 1, T], *optional*):
            The row (and column) of the bias tables for each token; by default the number of kept tokens before it,
            those of `initial_state` included.
        initial_state (`AFTState`, *optional*): the state that an earlier call returned; causal only.
        return_state (`bool`): whether to return the state after the last token as well.
        query_activation (`str`): `"sigmoid"` (the paper's), `"tanh"`, `"relu"` or `"identity"`.
        backend (`str`):
            `"auto"` is the first kernel of the table `KERNELS` that supports the call and pays, `"torch"` the same
            without Triton. Any other is the name of a kernel, such as `"reference"`, the formula in plain loops, or
            `"triton"`.
        seq_idx (`Tensor` [B, T], *optional*):
            The document of each token, whole numbers: where it changes from one kept token of a row to the next, a
            document ends, and no other sees it. Positions are counted from its beginning. Without a state, and not
            under torch.compile or torch.export.
        grid (pair of `int`, *optional*):
            The rows and columns of pictures of T = rows * columns tokens, row by row. It needs `window_bias` and
            `causal=False`. Padded tokens keep their place. Not with positions, documents, a decay or a state.

    Returns:
        `Tensor` [B, T, D] in the dtype of `query`, or with `return_state` that tensor and an [`AFTState`]. The state
        of simple, local and conv has a fixed size; that of full holds every key and value. A query that sees no token
        gives 0.

    Raises:
        ValueError: if shapes do not fit together, if a position lies beyond the bias table, for an option with a value
            that is not allowed, or if the kernel asked for does not support the call.
    """
    call = Call(
        query,
        key,
        value,
        position_bias=position_bias,
        window_bias=window_bias,
        decay=decay,
        causal=causal,
        state=initial_state,
        return_state=return_state,
        query_activation=query_activation,
        seq_idx=seq_idx,
        grid=grid,
    )
    position_ids = _validate(call, attention_mask, position_ids)
    if query_activation not in QUERY_ACTIVATIONS:
        raise refused("query_activation", f"one of {', '.join(QUERY_ACTIVATIONS)}", repr(query_activation))
    if return_state and not causal:
        raise refused("return_state", "False when causal is False: there is no state to go on from", True)
    if seq_idx is not None:
        _validate_documents(seq_idx, value, return_state, initial_state)
    if window_bias is not None and window_bias.shape[-1] == 0:
        call = call._replace(window_bias=None)
    keep = None if attention_mask is None else attention_mask != 0
    if seq_idx is not None and backend != "reference":
        packing = pack([seq_idx], keep, position_ids, begin_again=False)
        if packing is not None:
            return _by_documents(packing, call, backend)
    tokens = count_tokens(keep, position_ids)
    if initial_state is not None and position_ids is None:
        places = torch.arange(value.shape[1], device=value.device) if keep is None else tokens.slot
        places = initial_state.position[:, None] + places
        tokens = tokens._replace(position_ids=places if keep is None else places.masked_fill(~keep, 0))
    if return_state:
        tokens = tokens.advanced(None if initial_state is None else initial_state.position, value)
    call = call._replace(tokens=tokens)
    out, state = attend(call, backend)
    return (out, state) if return_state else out


def attend(call: Call, backend: str = "auto") -> tuple[Tensor, AFTState | None]:
    """
    [`aft_attention`] for a call that is known to be sound, as the layers of a model make it: the output, and the state
    if one is wanted.

    Raises:
        ValueError: for a `backend` that does not exist, or does not support the call.
    """
    with without_autocast(call.value):
        out, state = choose(TABLES, call, backend).run(call)
    if call.tokens.keep is not None:
        out = out.masked_fill(~call.tokens.keep[..., None], 0)
    return out, state


def aft_attention_weights(
    key: Tensor,
    position_bias: Tensor | None = None,
    *,
    window_bias: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    r"""
    The attention that an average of [`aft_attention`] implies (eq. 3 of arXiv 2105.14103), for each key channel:

        a_{t,t'} = exp(k_{t'} + w_{t,t'}) / sum_{t''} exp(k_{t''} + w_{t,t''})

    To look at: it takes O(B T^2 K) time and memory. The arguments are those of [`aft_attention`].

    Returns:
        `Tensor` [B, K, T, T], query positions before key positions, float32, or float64 if the keys are. A padded
        query, and one that sees no token, has 0 everywhere.

    Raises:
        ValueError: as [`aft_attention`] does.
    """
    bias = {"position_bias": position_bias, "window_bias": window_bias, "decay": decay}
    call = Call(key, key, key, **bias, causal=causal, grid=grid)
    position_ids = _validate(call, attention_mask, position_ids)
    keep = None if attention_mask is None else attention_mask != 0
    return weights(call._replace(tokens=count_tokens(keep, position_ids)))


def weights(call: Call) -> Tensor:
    """[`aft_attention_weights`] for a call that is known to be sound, of which neither query nor value is read."""
    key, tokens, causal = call.key, call.tokens, call.causal
    position_bias, window_bias = call.position_bias, call.window_bias
    batch, length, keys = key.shape
    dtype = compute_dtype(key)
    keep, slots = tokens.keep, tokens.slot
    if keep is None:
        keep = torch.ones_like(key[..., 0], dtype=torch.bool)
        slots = torch.arange(length, device=key.device).expand(batch, -1)
    positions = (slots if tokens.position_ids is None else tokens.position_ids).masked_fill(~keep, 0)
    offsets = slots[:, :, None] - slots[:, None]  # [B, T, T]
    bias = key.new_zeros(1, 1, 1, 1, dtype=dtype)  # [heads, 1 or B, T, T]
    if call.grid is not None:
        bias = pair_bias(window_bias.to(dtype), *call.grid)[:, None]
    elif position_bias is not None:
        rows = position_rows(position_bias, positions)  # [heads, B, T, N]
        bias = rows.gather(3, positions[:, None].expand(len(rows), -1, length, -1)).to(dtype)
    elif window_bias is not None and window_bias.shape[-1] > 0:
        heads, taps = window_bias.shape[0], window_bias.shape[-1]
        rows = window_bias
        if rows.dim() == 3:
            rows = rows[:, None].expand(-1, batch, length, -1) if rows.shape[1] == 1 else rows[:, positions]
        tap = (offsets if causal else offsets + (taps - 1) // 2)[None].expand(heads, -1, -1, -1)
        inside = (tap >= 0) & (tap < taps)
        bias = rows.to(dtype).gather(3, tap.clamp(0, taps - 1)).masked_fill(~inside, 0)
    bias = bias.transpose(0, 1).repeat_interleave(keys // len(bias), 1)
    visible = (keep[:, None] & keep[:, :, None])[:, None]
    if causal:
        visible = visible & (offsets >= 0)[:, None]
    if call.decay is not None:
        bias = bias - call.decay.to(dtype)[:, None, None] * offsets.abs()[:, None]
    logits = key.to(dtype).transpose(1, 2)[:, :, None] + bias
    weights = logits.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1)
    return weights.masked_fill(~visible, 0)


def _by_documents(packing, call: Call, backend: str) -> Tensor:
    """The result [B, T, D] for packed documents, each of which is treated as a row of its own."""
    tensors, name = [call.query, call.key, call.value], "window_bias"
    bias = call.window_bias if call.window_bias is not None and call.window_bias.dim() == 4 else None
    if call.position_bias is not None and position_tables(call.position_bias) is None:
        name, bias = "position_bias", position_rows(call.position_bias, None)
        if len(bias) > 1:  # never square, which would make the rows of a document a table
            bias = F.pad(bias, (0, bias.shape[2]))
    if bias is not None:
        tensors.append(bias.permute(1, 2, 0, 3).flatten(2))  # [B, T, heads x n]

    def attend_documents(group, query, key, value, rows=None):
        part = call._replace(query=query, key=key, value=value, tokens=group.seen_by(call.causal))
        if rows is not None:
            rows = rows.unflatten(2, (len(bias), -1)).permute(2, 0, 1, 3)
            part = part._replace(**{name: rows[0] if name == "position_bias" and len(bias) == 1 else rows})
        return attend(part, backend)[0]

    return packing.map(attend_documents, *tensors)


def _validate_documents(seq_idx, value, return_state, initial_state):
    if seq_idx.shape != value.shape[:2] or seq_idx.is_floating_point():
        got = f"{seq_idx.dtype} {list(seq_idx.shape)}"
        raise refused("seq_idx", f"whole numbers [{value.shape[0]}, {value.shape[1]}]", got)
    if return_state or initial_state is not None:
        raise refused("seq_idx", "None with a state, which belongs to one document", "documents")
    if not can_read(seq_idx):
        raise refused("seq_idx", "None in a graph: how many documents there are depends on the data", "documents")


def _validate(call: Call, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Checks that all fits together, and gives the positions [B, T]."""
    query, key, value, position_bias, window_bias, decay, causal, initial_state = call[:8]
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[0] == 1:
        position_ids = position_ids.expand(value.shape[0], -1)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise refused(name, "a tensor of 3 dimensions [B, T, channels]", tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise refused(name, "a floating-point tensor", tensor.dtype)
    batch, length, channels = value.shape
    if batch < 1 or length < 1:
        raise refused("value", "of at least one row and one token", tuple(value.shape))
    if query.shape != value.shape:
        raise refused("query", f"of the shape of value {tuple(value.shape)}", tuple(query.shape))
    heads = key.shape[-1]
    if key.shape[:2] != value.shape[:2] or not 1 <= heads <= channels or channels % heads != 0:
        raise refused("key", f"[{batch}, {length}, H] with H a divisor of {channels}", tuple(key.shape))

    if call.grid is not None:
        _validate_grid(call, position_ids)
    if position_bias is not None and window_bias is not None:
        raise refused("position_bias", "None when window_bias is given (they belong to different forms)", "both")
    table = None
    if position_bias is not None:
        shape = position_bias.shape
        if len(shape) in (3, 4) and position_tables(position_bias) is None:
            fits = shape[-3] == batch and shape[-2] == length
        else:
            fits = len(shape) in (2, 4) and shape[-2] == shape[-1]
        if not fits or (len(shape) == 4 and (shape[0] < 1 or heads % shape[0] != 0)):
            allowed = f"[N, N], [{batch}, {length}, N], [h, 1, N, N] or [h, {batch}, {length}, N]"
            raise refused("position_bias", f"{allowed} with h a divisor of the {heads} key channels", tuple(shape))
        table = shape[-1]
    if window_bias is not None and call.grid is None:
        shape = window_bias.shape
        fits = len(shape) == 3 or (len(shape) == 4 and shape[1] == batch and shape[2] == length)
        if not fits or shape[0] < 1 or heads % shape[0] != 0:
            allowed = f"[h, N or 1, n] or [h, {batch}, {length}, n] with h a divisor of the {heads} key channels"
            raise refused("window_bias", allowed, tuple(shape))
        if not causal and shape[-1] > 0 and shape[-1] % 2 == 0:
            raise refused("window_bias", "of odd n when causal is False", tuple(shape))
        table = shape[1] if len(shape) == 3 and shape[1] > 1 and shape[2] > 0 else None
    if decay is not None:
        if position_bias is not None:
            raise refused("decay", "None when position_bias is given: AFT-full has no sums that could fade", "both")
        if decay.shape != (heads,) or not decay.is_floating_point():
            raise refused("decay", f"floating point, of shape [{heads}]", f"{decay.dtype} {list(decay.shape)}")
        if _is_cheap_to_read(decay) and not (decay.amin() >= 0 and decay.amax() < torch.inf):
            raise refused("decay", "at least 0 and finite", f"{float(decay.amin()):g} to {float(decay.amax()):g}")
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] != length):
            raise refused(name, f"[{batch}, {length}]", tuple(tensor.shape))
    if attention_mask is not None and attention_mask.dtype != torch.bool and _is_cheap_to_read(attention_mask):
        if (lowest := attention_mask.amin()) < 0:
            allowed = "1 or True for a token and 0 or False for padding"
            raise refused("attention_mask", allowed, float(lowest))
    if initial_state is not None:
        _validate_state(call)
    _validate_positions(table, length, attention_mask, position_ids, initial_state)
    return position_ids


def _validate_grid(call: Call, position_ids: Tensor | None) -> None:
    if call.causal:
        raise refused("causal", "False with a grid: all places of a picture see each other", True)
    others = {"position_bias": call.position_bias, "position_ids": position_ids, "decay": call.decay}
    for name, given in {**others, "seq_idx": call.seq_idx, "initial_state": call.state}.items():
        if given is not None:
            raise refused(name, "None with a grid", type(given).__name__)
    if call.return_state:
        raise refused("return_state", "False with a grid: there is no state to go on from", True)
    grid, length, heads = call.grid, call.value.shape[1], call.key.shape[2]
    sides = len(grid) == 2 and all(isinstance(side, int | torch.SymInt) and side > 0 for side in grid)
    if not sides or grid[0] * grid[1] != length:
        raise refused("grid", f"two positive ints, rows and columns, whose product is the {length} tokens", grid)
    shape = None if call.window_bias is None else tuple(call.window_bias.shape)
    fits = shape is not None and len(shape) == 3 and shape[0] >= 1 and heads % shape[0] == 0
    if not fits or shape[1] % 2 == 0 or shape[2] % 2 == 0:
        allowed = f"[h, kh, kw] with a grid, with h a divisor of the {heads} key channels, and kh and kw odd"
        raise refused("window_bias", allowed, shape)


def _validate_state(call: Call) -> None:
    _, key, value, position_bias, window_bias, _, causal, state = call[:8]
    if not causal:
        raise refused("initial_state", "None when causal is False", "a state")
    if (state.key_position is not None) != (position_bias is not None):
        raise refused("initial_state", "of the form it is given to", "another form's")
    for name, old, new in (("key", state.key, key), ("value", state.value, value)):
        if old.shape[0] != new.shape[0] or old.shape[2] != new.shape[2]:
            allowed = f"of batch {new.shape[0]} and {new.shape[2]} {name} channels"
            raise refused("initial_state", allowed, f"{old.shape[0]} and {old.shape[2]}")
    window = 0 if window_bias is None else max(window_bias.shape[-1] - 1, 0)
    if position_bias is None and state.key.shape[1] != window:
        raise refused("initial_state", f"of a window of {window} past tokens", state.key.shape[1])


def _is_cheap_to_read(tensor: Tensor) -> bool:
    """Whether what a tensor holds can be read without waiting for a device."""
    return tensor.device.type == "cpu" and can_read(tensor)


def _validate_positions(table, length, attention_mask, position_ids, initial_state):
    """Raises if a kept token has a negative position or lies beyond the bias table, if there is one."""
    given = [t for t in (attention_mask, position_ids, initial_state and initial_state.position) if t is not None]
    first = last = 0
    if not given:
        last = length - 1
    elif not all(map(_is_cheap_to_read, given)):
        return
    elif position_ids is not None:
        kept = position_ids if attention_mask is None else position_ids.masked_fill(attention_mask == 0, 0)
        first, last = (int(bound) for bound in kept.aminmax())
    elif table is not None:
        count = length if attention_mask is None else (attention_mask != 0).sum(1)
        last = int(torch.as_tensor(count + (0 if initial_state is None else initial_state.position)).max()) - 1
    if first < 0:
        raise refused("position_ids", "at least 0 where a token is kept", first)
    if table is not None and last >= table:
        raise ValueError(
            f"Position {last} lies beyond the bias table, which ends at position {table - 1} (N = {table})."
        )
