"""Deliberate faults, each put in the place of a function of the package or of
the programs, to show that the tests notice every one.

    python tests/faults.py              # all of them; exit status 1 if one survives
    python tests/faults.py crop static  # those whose name contains one of the words
    python tests/faults.py --list

A fault names a function, and gives one that is wrong in its place, made from the original. It also names the file of
tests that must catch it, and the table that is printed says which test did, first of all: one that passes without it.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter

import torch
from fault_runner import ROOT, Fault, check, try_fault
from torch.nn import functional as F


GENERATION, STATIC, FEATURES = "test_generation.py", "test_static_cache.py", "test_generate_features.py"
MODELING, HEADS, OPS, SYNTHESIZER = "test_modeling.py", "test_heads.py", "test_ops.py", "test_synthesizer.py"
REMOTE, MODES, PACKING = "test_remote_code.py", "test_ops_modes.py", "test_packing.py"
GRID = "test_ops_grid.py"
INPUTS, CACHE, COMPATIBILITY = "test_model_inputs.py", "test_cache.py", "test_compatibility.py"
ECOSYSTEM, STREAMING = "test_ecosystem.py", "test_streaming.py"
LINEAR, CONVERTER = "test_linear.py", "test_convert_z1t.py"
PICTURES, PROCESSOR = "test_pictures.py", "test_image_processing.py"
SEQ2SEQ_HEADS, PAIRS = "test_seq2seq_heads.py", "test_build_pairs.py"
SEQ2SEQ_PROGRAM, BATCHING = "test_seq2seq_program.py", "test_continuous_batching.py"

FAULTS: list[Fault] = []


def fault(name: str, where: str, tests: str) -> Callable:
    """Puts a fault on the list: a function that makes the wrong function, or constant, from the original."""

    def register(change):
        FAULTS.append(Fault(name, where, change, tests))
        return change

    return register


# The cache


@fault("decoding ignores the state", "cache_state.read_state", GENERATION)
def _(original):
    return lambda cache, layer_idx: None


@fault("the state is never replaced", "cache_state.StateLayer._write", GENERATION)
def _(original):
    def _write(self, state):
        if self.state is None:
            original(self, state)

    return _write


@fault("reordering beams does nothing", "cache_state.StateLayer.reorder_cache", GENERATION)
def _(original):
    return lambda self, beam_idx: self.history.clear()


@fault("selecting rows does nothing", "cache_state.StateLayer.batch_select_indices", GENERATION)
def _(original):
    return lambda self, indices: None


@fault("repeating rows tiles them", "cache_state.StateLayer.batch_repeat_interleave", GENERATION)
def _(original):
    return lambda self, repeats: self._map(lambda t: t.repeat(repeats, *[1] * (t.dim() - 1)))


@fault("detaching the state leaves it in its graph", "cache_state.StateLayer.detach", CACHE)
def _(original):
    return lambda self: None


@fault("detaching the state forgets it", "cache_state.StateLayer.detach", CACHE)
def _(original):
    return lambda self: self._map(torch.zeros_like)


@fault("crop removes one token less", "cache_state.StateLayer.crop", GENERATION)
def _(original):
    return lambda self, tokens_to_remove: original(self, tokens_to_remove + (tokens_to_remove < 0))


@fault("crop keeps the length", "cache_state.StateLayer.crop", GENERATION)
def _(original):
    def crop(self, tokens_to_remove):
        length = self.cumulative_length.clone()
        original(self, tokens_to_remove)
        self.cumulative_length = length

    return crop


@fault("crop forgets the tokens it should keep", "cache_state.StateLayer.crop", GENERATION)
def _(original):
    def crop(self, tokens_to_remove):
        self.advance = lambda before, new, like: before
        self._placed = lambda state, length: state
        try:
            original(self, tokens_to_remove)
        finally:
            del self.advance, self._placed

    return crop


@fault("recording writes over what it recorded", "cache_state.StateLayer.update", GENERATION)
def _(original):
    def update(self, key_states, value_states, state, new):
        result = original(self, key_states, value_states, state, new)
        if self.record_past:
            after, self.state = self.state, self.history[-1][0]
            self._write(after)
        return result

    return update


@fault("autograd's tensors are overwritten", "cache_state.StateLayer._may_write", GENERATION)
def _(original):
    def _may_write(self, tensor):
        in_graph, self.in_graph = self.in_graph, False
        try:
            with torch.no_grad():
                return original(self, tensor)
        finally:
            self.in_graph = in_graph

    return _may_write


@fault("states made in inference mode are overwritten outside", "cache_state.StateLayer._may_write", GENERATION)
def _(original):
    def _may_write(self, tensor):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(self, tensor)
        with torch.inference_mode():
            return original(self, tensor)

    return _may_write


@fault("states are replaced instead of written into", "cache_state.StateLayer._can_take", STATIC)
def _(original):
    return lambda self, old, new: False


@fault("a static cache writes at its beginning", "cache_state.GrowingStateLayer._next_places", STATIC)
def _(original):
    return lambda self, length: torch.arange(length, device=self.device)


@fault("a reset static cache keeps old keys", "cache_state.GrowingStateLayer._empty", STATIC)
def _(original):
    def _empty(self, state):
        spare = self.spare
        old = None if spare is None else {name: t.clone() for name, t in spare._asdict().items() if t is not None}
        empty = original(self, state)
        for name in self.per_token:
            if spare is not None and getattr(empty, name) is getattr(spare, name) is not None:
                getattr(empty, name).copy_(old[name])
        return empty

    return _empty


@fault("the room of a static cache counts as tokens", "modeling_attention_free.AFTFullStateLayer.per_token", STATIC)
def _(original):
    return {**original, "key": (-2, 0)}


@fault(
    "the room of a Synthesizer's static cache counts as tokens",
    "modeling_synthesizer.SynthesizerStateLayer.per_token",
    STATIC,
)
def _(original):
    return {**original, "key_position": (-1, 0)}


@fault("a reset keeps the length", "cache_state.StateLayer.reset", STATIC)
def _(original):
    def reset(self):
        length = self.cumulative_length.clone()
        original(self)
        self.cumulative_length = length

    return reset


@fault("a saved cache starts counting anew", "cache_state.StateLayer.load_state_dict", FEATURES)
def _(original):
    def load_state_dict(self, tensors):
        original(self, {**tensors, "cumulative_length": torch.zeros_like(tensors["cumulative_length"])})

    return load_state_dict


@fault("a prefetched state stays on the CPU", "cache_state.StateLayer.prefetch", FEATURES)
def _(original):
    return lambda self: None


@fault("the number of tokens that may be known stays at none", "cache_state.StateLayer._count", MODELING)
def _(original):
    def _count(self, length):
        known = self.known_before
        original(self, length)
        self.known_before = known

    return _count


# Single tokens, and rows of a batch


@fault("recent tokens stay where they are when rows change", "ops_step.RecentTokens.reorder", CACHE)
def _(original):
    return lambda self, rows: None


@fault("a state that takes up recent tokens keeps its position", "ops_step.RecentTokens.taken_up", CACHE)
def _(original):
    return lambda self, state: original(self, state)._replace(position=state.position.clone())


@fault("room is made once, with the window of then", "ops_step.RecentTokens.fold", CACHE)
def _(original):
    def fold(self):
        window = self.rows.narrow(1, 1, self.window).clone()
        original(self)
        self._make_room(window)

    return fold


@fault("biases of positions are not renewed", "ops_step.RecentTokens.take_biases", CACHE)
def _(original):
    def take_biases(self, bias):
        original(self, bias if not hasattr(self, "biases") or bias is None else bias.roll(1, 2))

    return take_biases


@fault("weights that change are not seen", "modeling_attention_free.AFTMixer._what_biases_are_made_of", CACHE)
def _(original):
    return lambda self, key: [key.dtype]


@fault("a change of the dtype is not seen", "modeling_attention_free.AFTMixer._what_biases_are_made_of", CACHE)
def _(original):
    return lambda self, key: None if (made_of := original(self, key)) is None else made_of[1:]


@fault("rows that are added stand in front", "cache_state.StateLayer.batch_append", BATCHING)
def _(original):
    def batch_append(self, other):
        own = self.state
        original(self, other)
        self.state = self.state_class(
            *(None if a is None else torch.cat([b, a]) for a, b in zip(own, other.state, strict=True))
        )

    return batch_append


@fault("a text goes on behind its end", "continuous_batching.ContinuousBatch._has_ended", BATCHING)
def _(original):
    return lambda self, request: request.is_full


# Streams and refresh


@fault("a window begins one token late", "streaming.TokenStream._start_anew", STREAMING)
def _(original):
    def _start_anew(self):
        self.refresh_overlap -= 1
        original(self)
        self.refresh_overlap += 1

    return _start_anew


@fault("the state that expects next keeps its length", "cache_state.StateLayer.forget_length", STREAMING)
def _(original):
    return lambda self: None


@fault("a long prompt is read whole", "modeling_causal_lm.StateGenerationMixin._find_windows", STREAMING)
def _(original):
    def _find_windows(input_ids, attention_mask, cache, *sizes):
        return None if cache is None else original(input_ids, attention_mask, cache, *sizes)

    return staticmethod(_find_windows)


@fault(
    "what was read before a start is not forgotten", "modeling_causal_lm.StateGenerationMixin._read_anew", STREAMING
)
def _(original):
    def _read_anew(self, input_ids, attention_mask, cache):
        cache.reset = lambda: None
        try:
            original(self, input_ids, attention_mask, cache)
        finally:
            del cache.reset

    return _read_anew


# The operator's state and padding


@fault("the sum of old tokens is dropped in a step", "ops_step.step", GENERATION)
def _(original):
    def step(call):
        state = call.state
        nothing = {
            "maximum": torch.full_like(state.maximum, -torch.inf),
            "normalizer": torch.zeros_like(state.normalizer),
            "average": torch.zeros_like(state.average),
        }
        return original(call._replace(state=state._replace(**nothing)))[0], original(call)[1]

    return step


@fault("the window of the state is one token stale", "ops_state.window_state", GENERATION)
def _(original):
    def window_state(key, value, left, count, initial, decay):
        state, first = original(key, value, left, count, initial, decay), key.shape[1] - left
        if count is not None:
            return state
        return state._replace(key=key[:, first - 1 : -1].clone(), value=value[:, first - 1 : -1].clone())

    return window_state


@fault("the sums leak the future within a chunk", "ops_chunks._exclusive_scan", OPS)
def _(original):
    def _exclusive_scan(sums, initial, decay=None):
        from modeling_aft.ops_state import merge

        return merge(original(sums, initial, decay), sums)

    return _exclusive_scan


@fault("AFT-full sees one token of the future", "ops_full._average", MODELING)
def _(original):
    return lambda panel, key, value, bias, causal, past: original(panel, key, value, bias, causal, past + 1)


@fault("the window sees one token of the future", "ops_chunks._panel_bias", OPS)
def _(original):
    def _panel_bias(rows, length, chunk, chunks, left, right, causal):
        bias = original(rows, length, chunk, chunks, left, right, causal)
        if not causal:
            return bias
        tap = torch.arange(chunk)[:, None] + left + right - torch.arange(left + chunk + right)
        return bias.masked_fill(F.pad(tap == -1, (1, 0)), 0)

    return _panel_bias


@fault("the sums of the CPU's chunks leak the future", "ops_cpu._older", MODELING)
def _(original):
    def _older(plan, columns, carry, chunks):
        older, total = original(plan, columns, carry, chunks)
        return older + columns[:, : chunks * plan.chunk].unflatten(1, (chunks, -1)).sum(2), total

    return _older


@fault("the CPU's window is turned around", "ops_cpu._Plan.weights", OPS)
def _(original):
    def weights(self, factors, time, batch, of_keys):
        weights = original(self, factors, time, batch, of_keys)
        if not of_keys:
            band = self.band(weights)
            band.copy_(band.flip(-1))
        return weights

    return weights


@fault("what is older than a block is lost on the CPU", "ops_cpu._older", OPS)
def _(original):
    return lambda plan, columns, carry, chunks: (original(plan, columns, carry, chunks)[0], carry)


@fault("what is newer than a block gives no gradient on the CPU", "ops_cpu._newer", OPS)
def _(original):
    return lambda plan, columns, carry, chunks: (original(plan, columns, carry, chunks)[0], carry)


@fault("nothing fades from chunk to chunk on the CPU", "ops_cpu._running_sum", OPS)
def _(original):
    return lambda sums, fall: original(sums, None)


@fault("the gradient of the decay is half of what it is", "ops_cpu.moment", OPS)
def _(original):
    return lambda gradients, start: original(gradients, start) / 2


@fault("a step does not let the state fade", "ops_step.falling", GENERATION)
def _(original):
    return lambda maximum, decay: maximum + (0 if decay is None else decay)


@fault("the decay of a model is that of its first key channel", "modeling_attention_free.Decay.forward", GENERATION)
def _(original):
    return lambda self: original(self)[:1].expand_as(self.weight).detach() * 2


@fault("older keys keep their weight beside large biases on the CPU", "ops_cpu._Plan.older_of", OPS)
def _(original):
    return lambda self, start, count, batch: torch.ones_like(original(self, start, count, batch))


@fault("the CPU takes any exponential as it is", "ops_cpu._LARGEST_SUM", MODES)
def _(original):
    return math.inf


@fault("the CPU trusts sums that have vanished", "ops_cpu._SMALLEST_TOTAL", OPS)
def _(original):
    return 0.0


@fault("padding enters the keys", "ops_state.without_padding", MODELING)
def _(original):
    return lambda key, value, tokens: (key, value)


@fault("padding enters the state", "ops_state.window_state", GENERATION)
def _(original):
    def window_state(key, value, left, count, initial, decay):
        from modeling_aft.ops_state import merge, summarize

        length = key.shape[1] - left
        sums = merge(initial, summarize(key[:, :length], value[:, :length], dim=1))
        state = original(key, value, left, count, initial, decay)
        return state._replace(maximum=sums[0], normalizer=sums[1], average=sums[2])

    return window_state


@fault("padding takes the place of a token in the window", "ops_state.window_state", GENERATION)
def _(original):
    def window_state(key, value, left, count, initial, decay):
        return original(key, value, left, count, initial, decay)._replace(key=key[:, key.shape[1] - left :].clone())

    return window_state


@fault("a chunk after the first starts from nothing", "ops_chunks._exclusive_scan", OPS)
def _(original):
    def _exclusive_scan(sums, initial, decay=None):
        return tuple(torch.cat([i[:, None], t[:, :-1]], 1) for i, t in zip(initial, sums, strict=True))

    return _exclusive_scan


@fault("rows that underflow are not computed again", "ops_panel._exact_rows", OPS)
def _(original):
    return lambda total, bias, visible, channels: []


@fault("exponentials without the row maximum", "ops_panel._pair_weights", OPS)
def _(original):
    def _pair_weights(bias, rows, seen, visible):
        weights, row_maximum = original(bias, rows, seen, visible)
        return weights * row_maximum.exp(), torch.zeros_like(row_maximum)

    return _pair_weights


@fault("a picture's row goes on in the next", "ops_grid._taps", GRID)
def _(original):
    def _taps(rows, columns, kernel_rows, kernel_columns, device):
        place = torch.arange(rows * columns, device=device)
        down, right = place // columns, place % columns
        down, right = (t[:, None] - t + n // 2 for t, n in ((down, kernel_rows), (right, kernel_columns)))
        taps = down * kernel_columns + right
        size = kernel_rows * kernel_columns
        return torch.where((taps >= 0) & (taps < size), taps, size)

    return _taps


@fault("a convolution takes steep biases", "ops_grid._LOWEST", GRID)
def _(original):
    return -math.inf


@fault("a convolution takes values of any size", "ops_grid._LARGEST", GRID)
def _(original):
    return math.inf


@fault("a convolution is turned around", "ops_grid._filtered", GRID)
def _(original):
    return lambda terms, kernel, rows, columns: original(terms, kernel.flip(1, 2), rows, columns)


@fault("the parts of steep heads stay at the end", "ops_grid._by_heads", GRID)
def _(original):
    def _by_heads(convolution, dense, steep, tensors, rows, columns):
        ordered = steep.sort().values
        return original(convolution, dense, ordered, tensors, rows, columns)

    return _by_heads


@fault("the rows of heads are a table", "ops_state.position_tables", GRID)
def _(original):
    return lambda position_bias: position_bias[:, 0] if position_bias.dim() == 4 else original(position_bias)


@fault("position biases in the dtype of autocast", "modeling_attention_free.AFTMixer._call", MODELING)
def _(original):
    def _call(self, query, key, value, tokens):
        call, device = original(self, query, key, value, tokens), query.device.type
        if not torch.is_autocast_enabled(device):
            return call
        low = torch.get_autocast_dtype(device)
        biases = {name: getattr(call, name) for name in ("position_bias", "window_bias")}
        return call._replace(**{name: None if b is None else b.to(low).to(b.dtype) for name, b in biases.items()})

    return _call


@fault("a step reads the bias of the wrong offset", "modeling_attention_free.LocalPositionBias._few_rows", GENERATION)
def _(original):
    def _few_rows(self, positions):
        self.left, self.right = self.left + 1, self.right - 1
        try:
            return original(self, positions)
        finally:
            self.left, self.right = self.left - 1, self.right + 1

    return _few_rows


@fault("a token's slot counts the token itself", "ops_tokens.count_tokens", OPS)
def _(original):
    def count_tokens(keep, position_ids=None):
        tokens = original(keep, position_ids)
        return tokens if keep is None else tokens._replace(slot=(tokens.slot + 1).clamp_max(keep.shape[1]))

    return count_tokens


@fault("the next position is that of the last token", "ops_tokens.Tokens.advanced", GENERATION)
def _(original):
    def advanced(self, position, like):
        tokens = original(self, position, like)
        return tokens._replace(next_position=tokens.next_position - 1)

    return advanced


@fault("the window's biases stay where the padding was", "ops_windows.bias_rows", OPS)
def _(original):
    return lambda window_bias, length, tokens: original(window_bias, length, tokens._replace(slot=None))


@fault("the state of AFT-full counts padding", "ops_state.full_state", GENERATION)
def _(original):
    return lambda key, value, tokens, before: original(key, value, tokens._replace(keep=None), before)


@fault("a kernel is taken that does not support the call", "ops_kernels.choose", OPS)
def _(original):
    def choose(tables, call, backend="auto"):
        if backend not in tables:
            return original(tables, call, backend)
        return next(kernel for kernel in tables[backend] if kernel.pays(call))

    return choose


@fault("a kernel asked for by its name need not support the call", "ops_kernels.choose", OPS)
def _(original):
    def choose(tables, call, backend="auto"):
        named = (kernel for kernel in tables["auto"] if kernel.name == backend)
        return next(named, None) or original(tables, call, backend)

    return choose


@fault("a kernel is taken that does not pay", "ops_kernels.choose", MODES)
def _(original):
    def choose(tables, call, backend="auto"):
        paying = {
            name: [kernel._replace(pays=lambda call: True) for kernel in kernels] for name, kernels in tables.items()
        }
        return original(paying, call, backend)

    return choose


# The Synthesizer


@fault("the Synthesizer sees one token of the future", "ops_synthesizer._visible", MODELING)
def _(original):
    def _visible(rows, value, causal, count):
        if not causal:
            return original(rows, value, causal, count)
        places = torch.arange(value.shape[2], device=value.device)
        return (places[: rows.stop] <= places[rows, None] + 1)[None, None]

    return _visible


@fault(
    "the Synthesizer's cached prefill sees the future", "modeling_synthesizer.SynthesizerMixer._explicit", GENERATION
)
def _(original):
    def _explicit(self, mixture, relative, query, state, tokens):
        causal, self.causal = self.causal, False
        try:
            return original(self, mixture, relative, query, state, tokens)
        finally:
            self.causal = causal

    return _explicit


@fault("the Synthesizer's state holds padding", "ops_synthesizer.advance", GENERATION)
def _(original):
    def advance(before, new, like=None):
        state = original(before, new, like)
        old, own = state.key_position.tensor_split([-new.value.shape[2]], 1)
        return state._replace(key_position=torch.cat([old, own.clamp_min(0)], 1))

    return advance


@fault(
    "mixture weights over heads instead of components",
    "modeling_synthesizer.SynthesizerMixer.mixture_weights",
    SYNTHESIZER,
)
def _(original):
    def mixture_weights(self):
        if self.mixture_logits is None:
            return original(self)
        return dict(zip(self.names, self.mixture_logits.softmax(0)[..., None, None].unbind(1), strict=True))

    return mixture_weights


@fault("dot products without their scale in decoding", "modeling_synthesizer.SynthesizerMixer._explicit", GENERATION)
def _(original):
    def _explicit(self, mixture, relative, query, state, tokens):
        scaling, self.scaling = getattr(self, "scaling", None), 1.0
        try:
            return original(self, mixture, relative, query, state, tokens)
        finally:
            self.scaling = scaling

    return _explicit


@fault("fixed random logits that no checkpoint holds", "modeling_synthesizer.RandomLogits.__init__", MODELING)
def _(original):
    def __init__(self, config):
        original(self, config)
        if not self.trainable:
            table = self.table
            del self.table
            self.register_buffer("table", table, persistent=False)

    return __init__


# Model and heads


@fault("positions count padding", "modeling_tokens._counted", MODELING)
def _(original):
    return lambda inputs, tokens, seen: original(inputs, type(tokens)(), seen)


@fault("positions begin again with every call", "modeling_tokens._counted", GENERATION)
def _(original):
    return lambda inputs, tokens, seen: original(inputs, tokens, None)


@fault("the first columns of the mask are read", "modeling_tokens._check_mask", GENERATION)
def _(original):
    return lambda attention_mask, inputs: original(attention_mask[:, : inputs.shape[1]], inputs)


@fault("the mask is read on the first call only", "modeling_tokens.read_tokens", GENERATION)
def _(original):
    def read_tokens(inputs, attention_mask=None, position_ids=None, seen=None, *args, **kwargs):
        is_matrix = attention_mask is not None and attention_mask.dim() == 4
        attention_mask = attention_mask if seen is None or is_matrix else None
        return original(inputs, attention_mask, position_ids, seen, *args, **kwargs)

    return read_tokens


@fault("packed documents see those before them", "ops_packing.pack", PACKING)
def _(original):
    return lambda numbers, attention_mask, position_ids, begin_again=True: None


@fault("positions that begin again are of one document", "ops_packing.pack", PACKING)
def _(original):
    def pack(numbers, attention_mask, position_ids, begin_again=True):
        return original(numbers, attention_mask, position_ids, begin_again=False)

    return pack


@fault("the first token of a document is predicted from another", "ops_tokens.Tokens.continues", PACKING)
def _(original):
    return lambda self: None if self.packing is not None else original(self)


@fault("what is predicted from padding counts", "ops_tokens.Tokens.continues", INPUTS)
def _(original):
    def continues(self):
        if self.packing is not None or self.keep is None:
            return original(self)
        return torch.cat([torch.zeros_like(self.keep[:, :1]), self.keep[:, 1:]], 1)

    return continues


@fault("a mask of twos is added up", "modeling_tokens._check_mask", INPUTS)
def _(original):
    def _check_mask(attention_mask, inputs):
        keep, numbers = original(attention_mask, inputs)
        own = attention_mask[:, -inputs.shape[1] :]
        if own.dtype != torch.bool and (keep is not None or inputs.shape[1] == 1):
            keep = own == 1
        return keep, numbers

    return _check_mask


@fault("negative positions are rows of the tables", "modeling_tokens.check_positions", INPUTS)
def _(original):
    return lambda positions, mask, seen, limit: original(positions.clamp_min(0), mask, seen, limit)


@fault("a padding id inside of a text is padding to classifiers", "modeling_tokens.infer_mask", INPUTS)
def _(original):
    return lambda input_ids, pad_token_id, at_ends: original(input_ids, pad_token_id, at_ends=False)


@fault(
    "a cache reads its prompt again",
    "modeling_causal_lm.StateGenerationMixin.prepare_inputs_for_generation",
    CACHE,
)
def _(original):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        for cache in (kwargs.get("cache"), kwargs.get("past_key_values")):
            if cache is not None:
                cache.layers[0].columns_read = None
        return original(self, *args, **kwargs)

    return prepare_inputs_for_generation


@fault("an interrupted forward pass leaves a cache like others", "modeling_text.MixerModel._seen_tokens", CACHE)
def _(original):
    def _seen_tokens(self, cache, batch):
        for layer in getattr(cache, "layers", []):
            layer.unfinished = False
        return original(self, cache, batch)

    return _seen_tokens


@fault("a cache of another kind of model is taken", "modeling_text.MixerModel._seen_tokens", CACHE)
def _(original):
    def _seen_tokens(self, cache, batch):
        layers = getattr(cache, "layers", [])
        kinds = [getattr(layer, "kind", None) for layer in layers]
        for layer in layers:
            layer.kind = None
        try:
            return original(self, cache, batch)
        finally:
            for layer, kind in zip(layers, kinds, strict=True):
                layer.kind = kind

    return _seen_tokens


@fault("checkpointing where nothing is recorded loses the cache", "modeling_text.MixerModel._prepare_cache", CACHE)
def _(original):
    def _prepare_cache(self, cache, use_cache, tokens):
        with torch.enable_grad():
            return original(self, cache, use_cache, tokens)

    return _prepare_cache


@fault("unknown keywords are swallowed", "compatibility.refuse_unknown", COMPATIBILITY)
def _(original):
    return lambda model, keywords, known: None


@fault("a release that renames the cache is taken", "compatibility.cache_name", COMPATIBILITY)
def _(original):
    def cache_name(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        except ImportError:
            return original()

    return cache_name


@fault("the trainer does not know what the classes are", "compatibility.list_in_library", ECOSYSTEM)
def _(original):
    return lambda family: None


@fault("logits_to_keep is ignored", "modeling_causal_lm.MixerForCausalLM.forward", MODELING)
def _(original):
    return lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "logits_to_keep": 0})


@fault("the loss forgets how many tokens a step has", "modeling_text.MixerWithHead._run", MODELING)
def _(original):
    def _run(self, input_ids, attention_mask, position_ids, inputs_embeds, keywords, **cached):
        result = original(self, input_ids, attention_mask, position_ids, inputs_embeds, keywords, **cached)
        result[-1].pop("num_items_in_batch", None)
        return result

    return _run


@fault("embeddings are not tied", "modeling_causal_lm.MixerForCausalLM._tied_weights_keys", MODELING)
def _(original):
    return {}


@fault("training builds a cache", "modeling_text.MixerModel._prepare_cache", MODELING)
def _(original):
    def _prepare_cache(self, cache, use_cache, tokens):
        if self.config.is_decoder and tokens.packing is None and use_cache is None and not self.gradient_checkpointing:
            use_cache = cache is not None or self.config.use_cache
        return original(self, cache, use_cache, tokens)

    return _prepare_cache


@fault("a parameter keeps what memory held", "modeling_attention_free.ConvPositionBias.draw_weights", MODELING)
def _(original):
    def draw_weights(self, std):
        original(self, std)
        with torch.no_grad():
            self.gamma.fill_(math.nan)  # as it may be

    return draw_weights


@fault("pooling averages over padding", "modeling_heads.MixerClassifier._encode", HEADS)
def _(original):
    def _encode(self, *inputs):
        tokens, *rest = original(self, *inputs)
        return tokens._replace(keep=None), *rest

    return _encode


@fault(
    "an end in padding is classified",
    "modeling_seq2seq_heads.MixerSeq2SeqForSequenceClassification._ends",
    SEQ2SEQ_HEADS,
)
def _(original):
    return lambda self, input_ids, tokens: original(self, input_ids, tokens._replace(keep=None))


@fault("the first end is classified, not the last", "modeling_seq2seq_heads._last_place", SEQ2SEQ_HEADS)
def _(original):
    return lambda marked, *names: original(marked & (marked.cumsum(1) == 1), *names)


@fault(
    "a decoder reads padding in place of what is before it",
    "modeling_seq2seq_heads.MixerSeq2SeqForSequenceClassification._shifted_kept",
    SEQ2SEQ_HEADS,
)
def _(original):
    return lambda self, input_ids, tokens: original(self, input_ids, tokens._replace(slot=None))


@fault("a masked language model sees the past only", "modeling_stack.MixerStack.add_blocks", MODELING)
def _(original):
    return lambda self, causal, **block_sizes: original(self, True, **block_sizes)


@fault("a saved model names one Auto class only", "configuration_common.CheckedConfig.save_pretrained", REMOTE)
def _(original):
    def save_pretrained(self, save_directory, **kwargs):
        from transformers import PreTrainedConfig

        PreTrainedConfig.save_pretrained(self, save_directory, **kwargs)

    return save_pretrained


@fault("a saved model does not name one of its heads", "configuration_common.CheckedConfig.save_pretrained", REMOTE)
def _(original):
    def save_pretrained(self, save_directory, **kwargs):
        head = self.heads.pop("AutoModelForTokenClassification")
        try:
            original(self, save_directory, **kwargs)
        finally:
            self.heads["AutoModelForTokenClassification"] = head

    return save_pretrained


@fault(
    "a class that a user derives takes the place of a head",
    "modeling_stack.MixerPreTrainedModel.__init_subclass__",
    HEADS,
)
def _(original):
    def __init_subclass__(cls, **kwargs):
        original(cls, **kwargs)
        if cls.__dict__.get("heads") is None and cls.config_class is not None and cls.auto_class is not None:
            cls.heads[cls.auto_class] = cls

    return __init_subclass__


@fault("an output may have one input twice", "modeling_linear.SparseLinear._draw_indices", LINEAR)
def _(original):
    return lambda self: torch.randint_like(self.indices, self.in_features)


@fault("a tanh behind linear layers and keys is left out", "modeling_linear.activated", CONVERTER)
def _(original):
    return lambda tensor, activation: tensor


@fault("dynamic tanh scales behind the tanh", "modeling_stack.DynamicTanh.forward", MODELING)
def _(original):
    return lambda self, hidden_states: self.weight * self.alpha * torch.tanh(hidden_states) + self.bias


@fault("sinusoids are sines first and cosines behind them", "modeling_text.sinusoids", MODELING)
def _(original):
    def sinusoids(positions, width):
        table = original(positions, width)
        return torch.cat([table[..., ::2], table[..., 1::2]], -1)

    return sinusoids


# Pairs of texts


@fault("a package is its own source", "aft.package_descriptions.read_descriptions", PAIRS)
def _(original):
    def read_descriptions(*args):
        found, sums = original(*args)
        return [replace(one, source=one.package) for one in found], sums

    return read_descriptions


@fault("a synopsis is a paragraph", "aft.package_descriptions.split_paragraphs", PAIRS)
def _(original):
    return lambda text: original(text.replace("\n", " ", 1))


# Pictures, pixel by pixel


@fault("the first sub-pixel of a picture is not scored", "aft.protocols.Protocol.windows", PICTURES)
def _(original):
    def windows(self, start, stop):
        skipped = int(self.protocol == "pictures")
        return (window._replace(scored=window.scored + skipped) for window in original(self, start, stop))

    return windows


@fault("without a start token the first sub-pixel is free", "aft.scoring.read_pictures", PICTURES)
def _(original):
    def read_pictures(args, config):
        data, protocol, masking = original(args, config)
        return data, replace(protocol, first_bits=protocol.first_bits and 0.0), masking

    return read_pictures


@fault("flipping mirrors sub-pixels, not pixels", "aft.picture_data.PictureWindows.picture", PICTURES)
def _(original):
    def picture(self, step, row):
        height, width, channels = shape = self.shape
        self.shape = (height, width * channels, 1)
        made = original(self, step, row)
        self.shape = shape
        return made

    return picture


@fault("generate may draw the start token", "image_processing_aft.AFTImageProcessor.generation_config", PROCESSOR)
def _(original):
    return lambda self, **options: original(self, **{"suppress_tokens": None, **options})


@fault("samples may have the start token", "aft.painting.draw_pictures", PICTURES)
def _(original):
    def draw_pictures(model, *arguments, **sampling):
        generate = model.generate

        def without_suppression(ids, generation_config, **options):
            generation_config.suppress_tokens = None
            return generate(ids, generation_config=generation_config, **options)

        model.generate = without_suppression
        made = original(model, *arguments, **sampling)
        del model.generate
        return made

    return draw_pictures


@fault("what is drawn below the given rows is lost", "aft.painting.draw_completions", PICTURES)
def _(original):
    def draw_completions(model, pictures, rows, *arguments, **sampling):
        grid = original(model, pictures, rows, *arguments, **sampling)
        height, width = pictures.shape[1:3]
        grid[rows:height, width : grid.shape[1] - width] = 128
        return grid

    return draw_completions


@fault("completions do not keep what is given", "aft.painting.draw_pictures", PICTURES)
def _(original):
    def draw_pictures(model, shape, prompts, *arguments, **sampling):
        made = original(model, shape, prompts, *arguments, **sampling)
        made.reshape(len(made), -1)[:, : prompts.shape[1]] = 0
        return made

    return draw_pictures


# Training of encoder-decoders


@fault("a part of a step is divided by its own labels", "aft.seq2seq_trainer.mean_loss", SEQ2SEQ_PROGRAM)
def _(original):
    return lambda outputs, labels, num_items_in_batch=None, smoothing=0.0: original(outputs, labels, None, smoothing)


@fault("written texts have special tokens", "aft.seq2seq_trainer.Seq2SeqFinetuningTrainer.decode", SEQ2SEQ_PROGRAM)
def _(original):
    return lambda self, tokens: self.processing_class.batch_decode(tokens)


@fault("sources of a new tokenizer do not end", "aft.seq2seq_models.end_texts", SEQ2SEQ_PROGRAM)
def _(original):
    return lambda tokenizer: None


@fault("every epoch takes out the same spans", "aft.span_corruption.CorruptedText.set_epoch", SEQ2SEQ_PROGRAM)
def _(original):
    return lambda self, epoch: None


@fault("the end of a text is not counted", "aft.span_corruption.SpanCorruption.sizes", SEQ2SEQ_PROGRAM)
def _(original):
    return lambda self, length: tuple(size - 1 for size in original(self, length))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many to try at once")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not options.words or any(word in fault.name for word in options.words)]
    if options.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return 0
    import conftest  # noqa: F401  (the settings of all tests, which the processes inherit)

    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for fault in chosen:
        check(fault)
    caught, broken, started = 0, [], perf_counter()
    print("| fault | function | caught by |\n|---|---|---|")
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(try_fault, chosen):
            result = outcome.caught_by or "**nothing**"
            if outcome.broken is not None:
                broken.append(f"{outcome.fault.name!r}, in {outcome.caught_by}: {outcome.broken}")
                result = "**broken**"
            elif outcome.caught_by is not None:
                caught += 1
            print(f"| {outcome.fault.name} | {outcome.fault.where} | {result} |", flush=True)
    print(f"\n{caught} of {len(chosen)} faults were caught in {perf_counter() - started:.0f} s.", *broken, sep="\n\n")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    from faults import main  # as a module, by whose name other processes find the list

    sys.exit(main())
