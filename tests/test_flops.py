"""Floating-point operations as torch counts them: those that a count by hand finds, in training and in decoding."""

import pytest
import torch
from families import VARIANTS, make_ids, make_model
from torch.utils.flop_counter import FlopCounterMode

from modeling_aft.compatibility import CACHE_NAME
from modeling_aft.ops_chunks import bidirectional
from modeling_aft.ops_state import nothing
from modeling_aft.ops_triton import windowed_triton
from modeling_aft.ops_triton_full import full_triton
from modeling_aft.ops_windows import Window


BATCH, LENGTH, WIDTH, HEADS, WINDOW, VOCABULARY = 2, 9, 16, 4, 5, 256
PAIRS = LENGTH * LENGTH
# Of a mixer, for a row: multiplications of its matrix products, how many times as many the backward pass does, and
# the multiplications of a decoding step after LENGTH - 1 tokens.
BY_HAND = {
    "full-dense": (PAIRS * 2 * WIDTH, 2, LENGTH * 2 * WIDTH),
    # All keys of a chunk and the window before it; a step does not take them in products of matrices.
    "local-dense": (LENGTH * (LENGTH + WINDOW - 1) * 2 * WIDTH, 2, 0),
    "conv": (LENGTH * (LENGTH + WINDOW - 1) * (HEADS + WIDTH), 2, 0),
    "simple": (PAIRS * 2 * WIDTH, 1, 0),
    "random": (PAIRS * WIDTH, 2, LENGTH * WIDTH),
    "random+dot_product": (PAIRS * 2 * WIDTH, 3, LENGTH * 2 * WIDTH),
}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_linear_layers(model, tokens):
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return 2 * tokens * sum(weight.numel() for weight in weights)


def small_model(variant):
    return make_model(variant, num_hidden_layers=1, vocab_size=VOCABULARY)


@pytest.mark.parametrize("variant", BY_HAND)
def test_forward_and_backward_pass_count_as_by_hand(variant):
    model, ids = small_model(variant), make_ids(LENGTH, BATCH)
    mixer, backward, _ = BY_HAND[variant]
    linear, mixer = of_linear_layers(model, BATCH * LENGTH), 2 * BATCH * mixer
    with torch.no_grad():
        assert counted(lambda: model(ids, use_cache=False)) == linear + mixer
    found = counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    assert found == 3 * linear + (1 + backward) * mixer


@pytest.mark.parametrize("variant", BY_HAND)
def test_decoding_step_counts_as_by_hand(variant):
    model, ids = small_model(variant), make_ids(LENGTH, BATCH)
    with torch.no_grad():
        cache = model(ids[:, :-1])[CACHE_NAME]
        found = counted(lambda: model(ids[:, -1:], cache=cache))
    assert found == of_linear_layers(model, BATCH) + 2 * BATCH * BY_HAND[variant][2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_without_gradients_what_the_forward_pass_does_with_them(variant):
    model, ids = small_model(variant), make_ids(LENGTH, BATCH)
    with torch.no_grad():
        found = counted(lambda: model(ids, use_cache=False))
    assert found == counted(lambda: model(ids, use_cache=False))


def test_operators_of_compiled_and_gpu_models_count_as_by_hand():
    """Of which the sizes alone are read."""
    query = torch.empty(BATCH, 70, WIDTH, device="meta", requires_grad=True)
    key, rows = query[..., :HEADS], torch.empty(HEADS, 1, 1, WINDOW, device="meta", requires_grad=True)
    past = key.new_empty(BATCH, WINDOW - 1, HEADS), query.new_empty(BATCH, WINDOW - 1, WIDTH)
    tiles, keys = 3, 32 + 32  # of 32 queries; those of the tile, and as many before it
    forward = 2 * BATCH * tiles * 32 * keys * 2 * WIDTH
    initial = nothing(key, query, query.dtype)
    window = Window(query, key, query, rows, past, initial, True, "sigmoid")
    assert counted(lambda: windowed_triton(window)) == forward
    assert counted(lambda: windowed_triton(window._replace(rows=None, past=None))) == forward / 2
    table = torch.empty(1, 70, 70, device="meta", requires_grad=True)
    tile = 2 * BATCH * 64 * 64 * 2 * WIDTH  # of 70 queries there are two
    assert counted(lambda: full_triton(query, query, table, False)) == 4 * tile
    assert counted(lambda: full_triton(query, query, table, True).sum().backward()) == 3 * 3 * tile
    # Two chunks of 64, with the four keys around each and two sums.
    forward = 2 * BATCH * 128 * (64 + WINDOW - 1 + 2) * (HEADS + WIDTH)
    none, decay = key.new_empty(0), key.new_empty(HEADS).requires_grad_()
    assert counted(lambda: bidirectional(key, query, rows, none)) == forward
    assert counted(lambda: bidirectional(key, query, rows, none).sum().backward()) == 4 * forward
    # Twice, with half of the window on one side, and one sum.
    forward = 2 * 2 * BATCH * 128 * (64 + (WINDOW - 1) // 2 + 1) * (HEADS + WIDTH)
    assert counted(lambda: bidirectional(key, query, rows, decay)) == forward
