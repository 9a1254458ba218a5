# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The AFT operator as the paper writes it: one query at a time, in plain sums. All other backends are tested on it."""

import torch

from .ops_state import AFTState, Call, compute_dtype, falling, gated, position_tables


def _tap_bias(row: torch.Tensor, offset: torch.Tensor, causal: bool) -> torch.Tensor:
    """Bias [J, heads] at the offsets [J] for the query whose window bias is `row` [heads, n]; 0 outside the window."""
    taps = row.shape[-1]
    tap = offset if causal else offset + (taps - 1) // 2
    inside = (tap >= 0) & (tap < taps)
    bias = row[:, tap.clamp(0, taps - 1)].T  # [J, heads]
    return torch.where(inside[:, None], bias, torch.zeros_like(bias))


def _attend(keys, values, bias, state_of_row, decay, past):
    """Weighted average [D] of `values` [J, D] under exp(keys + bias) [J, H], one of the terms of eq. 2; the sum of the
    keys before them has decayed by decay [H] for each of the `past` tokens since."""
    logits, terms = keys + bias, values
    if state_of_row is not None:
        maximum, normalizer, average = state_of_row
        logits = torch.cat([(maximum + normalizer.log() - decay * past)[None], logits])
        terms = torch.cat([average[None], terms])
    weights = logits.softmax(0)  # [J, H]
    weights = weights.repeat_interleave(terms.shape[-1] // weights.shape[-1], dim=-1)  # [J, D]
    return (weights * terms).sum(0)


def aft_attention_reference(call: Call) -> tuple[torch.Tensor, AFTState]:
    """Eq. 2, 4, 5 or 6, with w_{t,t'} less by decay |t - t'| if there is one, [B, T, D] in the dtype of the query, and
    the state after the last token. O(B T^2 D) time, slow on purpose."""
    average, state = _average(call) if call.grid is None else (_average_of_grid(call), None)
    return gated(call.query, average, call.query_activation), state


def _average(call: Call) -> tuple[torch.Tensor, AFTState]:
    """The average without the query gate, and the state."""
    key, value, position_bias, window_bias = call.key, call.value, call.position_bias, call.window_bias
    causal, state, tokens, seq_idx = call.causal, call.state, call.tokens, call.seq_idx
    position_ids = tokens.position_ids
    dtype = torch.promote_types(compute_dtype(key), compute_dtype(value))
    batch, length, _ = key.shape
    decay = torch.zeros_like(key[0, 0], dtype=dtype) if call.decay is None else call.decay.to(dtype)
    kept = torch.ones(batch, length, dtype=torch.bool) if tokens.keep is None else tokens.keep
    rows, states = [], []
    for b in range(batch):
        index = kept[b].nonzero().squeeze(-1).to(key.device)
        first = 0 if state is None else int(state.position[b])
        document = torch.zeros_like(index)  # number of the document in this row
        if seq_idx is not None:
            document[1:] = (seq_idx[b, index[1:]] != seq_idx[b, index[:-1]]).cumsum(0)
        if position_ids is None:
            starts = torch.searchsorted(document, document)
            position = torch.arange(len(index), device=key.device) - starts + first
        else:
            position = position_ids[b, index]
        keys, values, key_position = key[b, index], value[b, index], position
        past = 0
        if state is not None:
            seen = (state.key[b] > -torch.inf).any(-1)
            if position_bias is not None:
                key_position = torch.cat([state.key_position[b, seen], key_position])
            keys = torch.cat([state.key[b, seen], keys])
            values = torch.cat([state.value[b, seen], values])
            past = int(seen.sum())
        state_of_row = None
        if state is not None and state.normalizer is not None and bool((state.normalizer[b] > 0).all()):
            state_of_row = (state.maximum[b].to(dtype), state.normalizer[b].to(dtype), state.average[b].to(dtype))

        keys_c, values_c = keys.to(dtype), values.to(dtype)
        out = [
            torch.zeros_like(values_c[0]) if len(values_c) else value.new_zeros(value.shape[-1], dtype=dtype)
        ] * length
        document = torch.cat([document.new_zeros(past), document])  # of each key
        for i, t in enumerate(index.tolist()):
            visible = document == document[past + i]
            if causal:
                visible[past + i + 1 :] = False
            visible = visible.nonzero().squeeze(-1)
            bias = torch.zeros(len(visible), 1, dtype=dtype, device=key.device)
            if position_bias is not None:
                tables = position_tables(position_bias)
                row = position_bias[..., b, t, :] if tables is None else tables[:, position[i]]  # [N] or [heads, N]
                bias = row.reshape(-1, row.shape[-1])[:, key_position[visible]].T.to(dtype)
                bias = bias.repeat_interleave(keys.shape[-1] // bias.shape[-1], dim=-1)
            elif window_bias is not None:
                offset = past + i - visible
                table_row = int(position[i]) if window_bias.shape[1] > 1 else 0
                row = window_bias[:, table_row] if window_bias.dim() == 3 else window_bias[:, b, t]
                bias = _tap_bias(row, offset, causal).to(dtype)
                bias = bias.repeat_interleave(keys.shape[-1] // bias.shape[-1], dim=-1)
            bias = bias - decay * (past + i - visible).abs()[:, None]
            # The sum is that of what stands before the keys of the state.
            out[t] = _attend(keys_c[visible], values_c[visible], bias, state_of_row, decay, past + i + 1)
        rows.append(torch.stack(out))
        next_position = torch.tensor(max([first, *(position + 1).tolist()]), device=key.device)
        window = 0 if window_bias is None else max(window_bias.shape[-1] - 1, 0)
        states.append((next_position, keys, values, state_of_row, window))
    average = torch.stack(rows)
    if position_bias is not None:
        return average, _full_state(key, value, kept, position_ids, state, [s[0] for s in states])
    new = _window_state(states, decay, dtype)
    return average, new._replace(maximum=falling(new.maximum, call.decay))


def _average_of_grid(call: Call) -> torch.Tensor:
    """Eq. 6 in two dimensions without the query gate: one place after the other."""
    rows, columns = call.grid
    kernel_rows, kernel_columns = call.window_bias.shape[1:]
    dtype = compute_dtype(call.key, call.value)
    key, value, kernel = (tensor.to(dtype) for tensor in (call.key, call.value, call.window_bias))
    place = torch.arange(rows * columns, device=key.device)
    y, x = place // columns, place % columns
    out = []
    for query in range(rows * columns):
        a, b = y[query] - y + kernel_rows // 2, x[query] - x + kernel_columns // 2  # [T] each
        inside = (a >= 0) & (a < kernel_rows) & (b >= 0) & (b < kernel_columns)
        taps = kernel[:, a.clamp(0, kernel_rows - 1), b.clamp(0, kernel_columns - 1)]
        bias = torch.where(inside, taps, 0.0).T.repeat_interleave(key.shape[2] // len(kernel), dim=-1)  # [T, H]
        for row in range(len(key)):
            kept = slice(None) if call.tokens.keep is None else call.tokens.keep[row]
            out.append(_attend(key[row, kept], value[row, kept], bias[kept], None, None, 0))
    return torch.stack(out).unflatten(0, (rows * columns, -1)).transpose(0, 1)


def _window_state(states, decay, dtype) -> AFTState:
    """Splits the tokens of each batch row into the last n - 1 and the sum of those before, as they are where the last
    of those stands."""
    position, key, value, maximum, normalizer, average = [], [], [], [], [], []
    for next_position, keys, values, older, window in states:
        split = max(len(keys) - window, 0)
        missing = window - (len(keys) - split)
        position.append(next_position)
        key.append(torch.nn.functional.pad(keys[split:], (0, 0, missing, 0), value=-torch.inf))
        value.append(torch.nn.functional.pad(values[split:], (0, 0, missing, 0)))
        logits, terms = keys[:split].to(dtype), values[:split].to(dtype)
        logits = logits - decay * torch.arange(split - 1, -1, -1, device=keys.device)[:, None]
        counts = torch.ones_like(logits)
        if older is not None:
            logits = torch.cat([(older[0] - decay * split)[None], logits])
            counts = torch.cat([older[1][None], counts])
            terms = torch.cat([older[2][None], terms])
        if len(logits) == 0:
            maximum.append(logits.new_full(keys.shape[1:], -torch.inf))
            normalizer.append(logits.new_zeros(keys.shape[1:]))
            average.append(terms.new_zeros(values.shape[1:]))
            continue
        maximum.append(logits.amax(0))
        weights = counts * (logits - maximum[-1]).exp()
        normalizer.append(weights.sum(0))
        weights = (weights / normalizer[-1]).repeat_interleave(terms.shape[-1] // weights.shape[-1], dim=-1)
        average.append((weights * terms).sum(0))
    stack = torch.stack
    return AFTState(stack(position), stack(key), stack(value), None, stack(maximum), stack(normalizer), stack(average))


def _full_state(key, value, kept, position_ids, state, next_position) -> AFTState:
    """All keys and values so far, in their place, with the padded ones made invisible."""
    batch = key.shape[0]
    kept = kept.to(key.device)
    first = torch.zeros(batch, dtype=torch.long, device=key.device) if state is None else state.position
    key_position = first[:, None] + kept.long().cumsum(1) - 1 if position_ids is None else position_ids
    key = key.masked_fill(~kept[..., None], -torch.inf)
    value = value.masked_fill(~kept[..., None], 0)
    key_position = key_position.masked_fill(~kept, 0)
    if state is not None:
        key, value = torch.cat([state.key, key], 1), torch.cat([state.value, value], 1)
        key_position = torch.cat([state.key_position, key_position], 1)
    return AFTState(torch.stack(next_position), key, value, key_position)
