"""AFT-full with heads: every kernel against heads that stand alone."""

import pytest
import torch

from modeling_aft.ops import aft_attention, aft_attention_weights


BATCH, WIDTH = 3, 8
FULL_KERNELS = ["full", "full_export", "full_composed"]


def with_gradients(function, tensors, upstream=1.0):
    """What a function of tensors gives, and all gradients of a random sum of that."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weight * upstream).sum(), leaves)]


def assert_agree(actual, expected, tolerance=1e-9, scale=1.0):
    """Relative to the largest number of each tensor, or to that of what goes into the sums of gradients."""
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        size = max(float(e.abs().amax()), scale)
        torch.testing.assert_close(a.double() / size, e.double() / size, rtol=tolerance, atol=tolerance)


def make_tables(heads, keys, length=9, table=12):
    query, value = torch.randn(2, BATCH, length, WIDTH, dtype=torch.float64)
    key = torch.randn(BATCH, length, keys, dtype=torch.float64)
    return [query, key, value, torch.randn(heads, 1, table, table, dtype=torch.float64)]


def each_head(function, tensors, heads):
    """What heads that know nothing of each other give, with a table of one head for each."""
    *inputs, bias = tensors
    parts = zip(*(tensor.chunk(heads, -1) for tensor in inputs), bias, strict=True)
    return torch.cat([function(*part, bias.squeeze(0)) for *part, bias in parts], -1)


FULL_HEADS = {"one-head": (1, 4), "narrow-keys": (4, 4), "wide-keys": (2, 8), "head-for-each-channel": (8, 8)}
full_heads = pytest.mark.parametrize(("heads", "keys"), FULL_HEADS.values(), ids=FULL_HEADS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
FULL_MASK = torch.ones(BATCH, 9, dtype=torch.long)
FULL_MASK[0, :3], FULL_MASK[1, 4:6], FULL_MASK[2] = 0, 0, 0
CALLS = {
    "plain": {},
    "masked": {"attention_mask": FULL_MASK},
    "positions": {"position_ids": torch.arange(9)[None] + torch.tensor([[0], [3], [1]])},
    "documents": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0, 1, 2] + [3] * 6])},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kernel", ["reference", *FULL_KERNELS])
@directions
@full_heads
def test_heads_of_full_are_independent(heads, keys, causal, kernel, options):
    tensors = make_tables(heads, keys)
    options = {"causal": causal, **options}

    def attend_full(query, key, value, bias):
        return aft_attention(query, key, value, bias, **options, backend=kernel)

    expected = with_gradients(lambda t: each_head(attend_full, t, heads), tensors)
    assert_agree(with_gradients(lambda t: attend_full(*t), tensors), expected)
    if kernel == "reference":
        return
    by_reference = with_gradients(lambda t: aft_attention(*t, **options, backend="reference"), tensors)
    assert_agree(expected, by_reference)


@pytest.mark.parametrize("kernel", ["reference", *FULL_KERNELS])
def test_heads_of_full_go_on_from_a_state(kernel):
    """Also where the rows of the queries are given, with padding in both parts."""
    query, key, value, bias = make_tables(4, 4)
    mask, positions = FULL_MASK, (FULL_MASK.cumsum(1) - 1).clamp_min(0)
    whole = aft_attention(query, key, value, bias, attention_mask=mask, backend=kernel)
    for rows in (None, bias[:, 0, positions]):
        state, parts = None, []
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            own = bias if rows is None else rows[:, :, part]
            inputs = (tensor[:, part] for tensor in (query, key, value))
            options = {"attention_mask": mask[:, part], "initial_state": state, "return_state": True}
            out, state = aft_attention(*inputs, own, **options, backend=kernel)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_rows_of_heads_in_documents():
    """One of which is as long as the table is wide, at positions in another order."""
    query, key, value, bias = (tensor[:2] for tensor in make_tables(2, 4, table=9))
    positions = torch.arange(8, -1, -1).expand(2, -1).contiguous()
    options = {"seq_idx": torch.tensor([[0] * 9, [0] * 4 + [1] * 4 + [2]]), "position_ids": positions, "causal": False}
    expected = aft_attention(query, key, value, bias, **options, backend="reference")
    for rows in (bias, bias[:, 0, positions]):
        torch.testing.assert_close(aft_attention(query, key, value, rows, **options), expected)


@full_heads
def test_weights_of_full_with_heads(heads, keys):
    query, key, value, bias = make_tables(heads, keys)
    options = {"attention_mask": FULL_MASK, "causal": False}
    for own in (bias, bias[:, 0, (FULL_MASK.cumsum(1) - 1).clamp_min(0)]):
        weights = aft_attention_weights(key, own, **options).repeat_interleave(WIDTH // keys, 1)
        out = aft_attention(query, key, value, own, **options, query_activation="identity")
        torch.testing.assert_close(query * (weights @ value.mT[..., None]).squeeze(-1).mT, out)


@pytest.mark.parametrize(
    "shape", [(4, 1, 9, 8), (4, 2, 9, 9), (3, 1, 9, 9), (4, BATCH, 8, 9), (9,), (1, 4, 1, 9, 9)], ids=str
)
def test_tables_of_heads_that_do_not_fit_are_refused(shape):
    query, key, value, _ = make_tables(4, 8)
    with pytest.raises(ValueError, match=r"`position_bias` must be \[N, N\].*divisor of the 8 key channels"):
        aft_attention(query, key, value, torch.zeros(shape))
