"""The operator: the fast path against the plain formula, in outputs, gradients and states, for any finite input."""

import math

import pytest
import torch
from memory import LargestTensor

from modeling_aft import AFTConfig, AFTModel, ops, ops_chunks, ops_cpu, ops_panel
from modeling_aft.ops import aft_attention


WINDOWED = ["local", "simple", "conv", "local-decay", "simple-decay", "conv-decay"]
FORMS = ["full", *WINDOWED]
BATCH, WIDTH, HEADS, WINDOW = 2, 8, 4, 5


def make_bias(form, length, causal=True, window=WINDOW, dtype=torch.float64, scale=1.0, heads=HEADS, width=WIDTH):
    taps = window if causal else 2 * window - 1
    if form == "full":
        return {"position_bias": torch.randn(length, length, dtype=dtype) * scale}
    bias, keys = {}, HEADS if "conv" in form else width
    if "local" in form:
        bias["window_bias"] = torch.randn(1, length, taps, dtype=dtype) * scale
    if "conv" in form:
        bias["window_bias"] = torch.randn(heads, 1, taps, dtype=dtype) * scale
    if "decay" in form:  # half-lives from 2 tokens to 700
        bias["decay"] = torch.logspace(-3, -0.5, keys, dtype=dtype)
    return bias


def make_inputs(form, length, dtype=torch.float64, batch=BATCH, width=WIDTH):
    query, value = torch.randn(2, batch, length, width, dtype=dtype)
    key = torch.randn(batch, length, HEADS if "conv" in form else width, dtype=dtype)
    return query, key, value


def make_mask(kind, length):
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if kind == "left":
        mask[0, : length // 3], mask[1, : length // 2] = 0, 0
    elif kind == "right":
        mask[0, -(length // 3) :] = 0
    elif kind == "interior":
        mask[0, 1:3], mask[1, length // 2] = 0, 0
    elif kind == "everything":
        mask[0] = 0
    return mask


def formula(query, key, value, position_bias=None, window_bias=None, decay=None, causal=True):
    """Eq. 2 with a [T, T] bias for every form: an oracle that shares no code with the package."""
    length, width = value.shape[1:]
    bias = torch.zeros(1, length, length, dtype=key.dtype)
    if position_bias is not None:
        bias = position_bias[None]
    if window_bias is not None:
        bias = torch.zeros(window_bias.shape[0], length, length, dtype=key.dtype)
        shift = 0 if causal else (window_bias.shape[2] - 1) // 2
        for head in range(bias.shape[0]):
            for t in range(length):
                for tap in range(window_bias.shape[2]):
                    if 0 <= t - tap + shift < length:
                        row = t if window_bias.shape[1] > 1 else 0
                        bias[head, t, t - tap + shift] = window_bias[head, row, tap]
    if causal:
        bias = bias.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    bias = bias.repeat_interleave(width // bias.shape[0], 0).permute(1, 2, 0)  # [T, T', D]
    if decay is not None:
        offset = torch.arange(length)[:, None] - torch.arange(length)
        bias = bias - offset.abs()[..., None] * decay.repeat_interleave(width // len(decay))
    logits = key.repeat_interleave(width // key.shape[-1], -1)[:, None] + bias
    return torch.sigmoid(query) * (logits.softmax(2) * value[:, None]).sum(2)


def run(backend, inputs, bias, seed=0, weights_of_state=True, **options):
    """Outputs, state and every gradient of a random function of both."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    bias = {name: t.detach().clone().requires_grad_() for name, t in bias.items()}
    result = aft_attention(*inputs, **bias, backend=backend, **options)
    out, state = result if isinstance(result, tuple) else (result, ())
    generator = torch.Generator().manual_seed(seed)

    def weighted(tensor):
        finite = tensor.masked_fill(tensor.detach().isinf(), 0).double()
        return (finite * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).sum()

    loss = weighted(out)
    leaves = [t for t in state if t is not None]
    if weights_of_state:
        loss = loss + sum(weighted(t) for t in leaves if t.is_floating_point())
    grads = torch.autograd.grad(loss, [*inputs, *bias.values()], allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, [*inputs, *bias.values()], strict=True)]
    return [out.detach(), *(t.detach() for t in leaves), *grads]


def assert_agree(actual, expected, rtol=1e-9, atol=1e-9):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.to(e.dtype), e, rtol=rtol, atol=atol)


def kernels_of(form, causal=True):
    """All that are for several queries, each of which the table may choose, here or elsewhere."""
    if form == "full":
        return ["full", "full_export", "full_composed"]
    names = ["chunks", "chunks_export", "chunks_composed"]
    return ["cpu", *names] if causal else ["bidirectional", *names]


forms_and_kernels = pytest.mark.parametrize(
    ("form", "kernel"), [(form, kernel) for form in FORMS for kernel in kernels_of(form)]
)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_formula_of_the_paper(backend, form, causal):
    inputs, bias = make_inputs(form, 23), make_bias(form, 23, causal)
    torch.testing.assert_close(
        aft_attention(*inputs, **bias, causal=causal, backend=backend), formula(*inputs, **bias, causal=causal)
    )


@pytest.mark.parametrize("length", [1, 2, 7, 63, 150])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_matches_the_reference(form, causal, length):
    inputs, bias = make_inputs(form, length), make_bias(form, length + 3, causal)
    options = {"causal": causal, "return_state": causal}
    expected = run("reference", inputs, bias, **options)
    for kernel in ("auto", *kernels_of(form, causal)):
        assert_agree(run(kernel, inputs, bias, **options), expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_answers_what_it_supports_and_refuses_the_rest(form, causal):
    inputs, bias = make_inputs(form, 9), make_bias(form, 9, causal)
    supported = {"reference", *kernels_of(form, causal)}
    for kernel in ops.KERNELS:
        if kernel.name in supported:
            aft_attention(*inputs, **bias, causal=causal, backend=kernel.name)
        else:
            with pytest.raises(ValueError, match=f"`backend` .* '{kernel.name}' is for"):
                aft_attention(*inputs, **bias, causal=causal, backend=kernel.name)


@pytest.mark.parametrize("form", WINDOWED)
def test_a_step_agrees_with_kernels_for_several_queries(form):
    inputs, bias = make_inputs(form, 9), make_bias(form, 20)
    _, state = aft_attention(*inputs, **bias, return_state=True)
    step = run("step", [t[:, :1] for t in inputs], bias, initial_state=state, return_state=True)
    for kernel in ("auto", "cpu", "chunks", "reference"):
        other = run(kernel, [t[:, :1] for t in inputs], bias, initial_state=state, return_state=True)
        assert_agree(other, step)


@pytest.mark.parametrize("form", FORMS)
def test_torch_matches_reference_at_length_1000(form):
    inputs, bias = make_inputs(form, 1000, batch=1), make_bias(form, 1000, window=32)
    assert_agree(
        run("torch", inputs, bias, return_state=True), run("reference", inputs, bias, return_state=True), 1e-8, 1e-8
    )


@pytest.mark.parametrize("heads", [1, HEADS], ids=["one-head", "heads"])
@pytest.mark.parametrize("rows", [64, 128, 512])
@pytest.mark.parametrize("form", WINDOWED)
def test_blocks_of_time_and_batch_fit_together(form, rows, heads, monkeypatch):
    """On the CPU: blocks of one or more chunks, and of one or more rows of the batch, that end within a chunk."""
    monkeypatch.setattr(ops_cpu, "_ROWS", rows)
    inputs, bias = make_inputs(form, 150, batch=5), make_bias(form, 150, heads=heads)
    assert_agree(run("torch", inputs, bias, return_state=True), run("reference", inputs, bias, return_state=True))
    by_row = {**bias, "window_bias": torch.randn(heads if "conv" in form else 1, 5, 150, WINDOW, dtype=torch.float64)}
    assert_agree(run("torch", inputs, by_row), run("reference", inputs, by_row))


def count_exact_calls(monkeypatch):
    """A list that each call of the CPU's exact and slower way adds to."""
    taken = []
    monkeypatch.setattr(
        ops_cpu, "windowed_chunks", lambda window: taken.append(1) or ops_chunks.windowed_chunks(window)
    )
    return taken


LARGE = {
    "high-keys": lambda key, bias: (4 * key + 50, bias),
    "low-keys": lambda key, bias: (key - 60, bias),
    "sequences-apart": lambda key, bias: (key + torch.tensor([80.0, -80.0])[:, None, None], bias),
    "high-biases": lambda key, bias: (4 * key, 5 * bias + 80),
    "low-biases": lambda key, bias: (key, 2 * bias - 35),
    "wide-biases": lambda key, bias: (5 * key + 20, 12 * bias),
}


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("form", WINDOWED)
def test_large_inputs_go_the_fast_way(form, large, monkeypatch):
    """As runs with large learning rates have them: on the CPU, of one head and of several."""
    taken = count_exact_calls(monkeypatch)
    query, key, value = make_inputs(form, 150)
    bias = make_bias(form, 150)
    name = "window_bias"
    key, rows = large(key, bias.get(name, key))
    if name in bias:
        bias[name] = rows
    expected = run("reference", (query, key, value), bias, return_state=True)
    assert_agree(run("torch", (query, key, value), bias, return_state=True), expected)
    for dtype in (torch.float64, torch.float32):
        inputs, halves = [t.to(dtype) for t in (query, key, value)], {n: t.to(dtype) for n, t in bias.items()}
        expected = run("reference", [t.double() for t in inputs], {n: t.double() for n, t in halves.items()})
        tolerance = 1e-9 if dtype == torch.float64 else 2e-4
        assert_agree([t.double() for t in run("torch", inputs, halves)], expected, tolerance, 10 * tolerance)
    assert not taken


def test_ordinary_inputs_go_the_fast_way_and_others_the_exact_one(monkeypatch):
    taken = count_exact_calls(monkeypatch)
    query, key, value = make_inputs("local", 100)
    for scale in (1, 5):
        run("torch", (query, scale * key, value), make_bias("local", 100))
        run("torch", (query, scale * key, value), make_bias("local-decay", 100, window=32))
    assert not taken
    taken.clear()
    run("torch", (query, key, value), {"decay": torch.full_like(key[0, 0], 10)})
    assert len(taken) == 2  # forward and backward
    wide = torch.zeros(100, 1, dtype=key.dtype)
    wide[50:] = 70  # a range that no plain exponential covers, around 0 or not
    for others in ((query, 100 * key, value), (query, key + wide - 60, value), (query, key, 1e34 * value)):
        taken.clear()
        run("torch", others, make_bias("local", 100))
        assert len(taken) == 2  # forward and backward


@pytest.mark.parametrize("window", [1, 2, 64, 65, 100, 200])
@pytest.mark.parametrize("form", ["local", "conv"])
def test_any_window(form, window):
    inputs, bias = make_inputs(form, 150), make_bias(form, 150, window=window)
    expected = formula(*inputs, **bias)
    for kernel in ("cpu", "chunks"):
        torch.testing.assert_close(aft_attention(*inputs, **bias, backend=kernel), expected)
    bias = make_bias(form, 150, causal=False, window=window)
    torch.testing.assert_close(
        aft_attention(*inputs, **bias, causal=False), formula(*inputs, **bias, causal=False), rtol=1e-6, atol=1e-9
    )


def test_window_of_no_taps_is_simple():
    inputs = make_inputs("local", 30)
    assert torch.equal(aft_attention(*inputs, window_bias=torch.zeros(1, 30, 0)), aft_attention(*inputs))


def test_outside_the_window_the_weight_is_one_not_zero():
    query, key, value = make_inputs("local", 40)
    bias = torch.zeros(1, 40, 3, dtype=key.dtype)
    torch.testing.assert_close(aft_attention(query, key, value, window_bias=bias), aft_attention(query, key, value))


@pytest.mark.parametrize("kind", ["left", "right", "interior", "everything"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_changes_nothing(backend, form, causal, kind):
    """Whatever stands at padded places, each row equals the same row without its padding; padded queries give 0."""
    length = 19
    (query, key, value), bias = make_inputs(form, length), make_bias(form, length, causal)
    mask = make_mask(kind, length)
    key[mask == 0], value[mask == 0], query[mask == 0] = 1e4, math.nan, math.nan
    out = aft_attention(query, key, value, **bias, causal=causal, attention_mask=mask, backend=backend)
    assert (out[mask == 0] == 0).all()
    for b in range(BATCH):
        kept = mask[b].bool()
        if kept.any():
            alone = formula(query[b : b + 1, kept], key[b : b + 1, kept], value[b : b + 1, kept],
                            **_cut(bias, int(kept.sum())), causal=causal)  # fmt: skip
            torch.testing.assert_close(out[b : b + 1, kept], alone)


def _cut(bias, length):
    return {name: t[:length, :length] if name == "position_bias" else t for name, t in bias.items()}


@pytest.mark.parametrize("kind", ["left", "right", "interior", "everything"])
@pytest.mark.parametrize("form", FORMS)
def test_padded_gradients_and_states_match_reference(form, kind):
    inputs, bias, mask = make_inputs(form, 19), make_bias(form, 25), make_mask(kind, 19)
    options = {"attention_mask": mask, "return_state": True}
    expected = run("reference", inputs, bias, **options)
    for kernel in kernels_of(form):
        assert_agree(run(kernel, inputs, bias, **options), expected)


@pytest.mark.parametrize("splits", [[1], [20], [39], [3, 4, 5], [1] * 39, [7, 1, 20]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_continuing_from_a_state_equals_one_call(form, splits):
    """Any split, with left padding in the first part and a padded token in the middle of a later one."""
    length = 40
    (query, key, value), bias = make_inputs(form, length), make_bias(form, length)
    mask = make_mask("left", length)
    mask[:, 25] = torch.tensor([0, 1])
    whole, whole_state = aft_attention(query, key, value, **bias, attention_mask=mask, return_state=True)
    for backend in ("torch", "reference"):
        parts, state = [], None
        for q, k, v, m in zip(
            *(t.split(splits + [length - sum(splits)], 1) for t in (query, key, value, mask)), strict=True
        ):
            part, state = aft_attention(
                q, k, v, **bias, attention_mask=m, initial_state=state, return_state=True, backend=backend
            )
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        if form != "full":
            assert_agree([t for t in state if t is not None], [t for t in whole_state if t is not None])


@forms_and_kernels
@pytest.mark.parametrize("length", [1, 30])
def test_gradients_through_the_initial_state(form, kernel, length):
    (query, key, value), bias = make_inputs(form, 70 + length), make_bias(form, 70 + length)

    def two_calls(backend, *inputs):
        first, second = ([t[:, :70] for t in inputs], [t[:, 70:] for t in inputs])
        _, state = aft_attention(*first, **bias, return_state=True, backend=backend)
        return aft_attention(*second, **bias, initial_state=state, backend=backend)

    weight = torch.randn(BATCH, length, WIDTH, dtype=torch.float64)
    grads = []
    for call in (
        lambda *i: two_calls(kernel, *i),
        lambda *i: two_calls("reference", *i),
        lambda *i: formula(*i, **bias),
    ):
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        grads.append(torch.autograd.grad((call(*inputs)[:, -length:] * weight).sum(), inputs))
    assert_agree(grads[0], grads[2])
    assert_agree(grads[1], grads[2])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, causal):
    torch.manual_seed(1)
    inputs = make_inputs(form, 9, batch=2, width=4)
    bias = make_bias(form, 9, causal, window=3, width=4)
    mask = torch.ones(2, 9)
    mask[0, :2] = 0
    names = list(bias)

    def call(*tensors):
        return aft_attention(
            *tensors[:3], **dict(zip(names, tensors[3:], strict=True)), causal=causal, attention_mask=mask
        )

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (*inputs, *bias.values())])


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_state(form, length):
    torch.manual_seed(2)
    bias = make_bias(form, 20, window=3, width=4)
    _, start = aft_attention(*make_inputs(form, 8, width=4), **bias, return_state=True)
    inputs = [t.requires_grad_() for t in make_inputs(form, length, width=4)]
    floats = [i for i, t in enumerate(start) if t is not None and t.is_floating_point()]

    def call(*tensors):
        state = start._replace(**{start._fields[i]: t for i, t in zip(floats, tensors[3:], strict=True)})
        out, state = aft_attention(*tensors[:3], **bias, initial_state=state, return_state=True)
        return out, *(t for t in state if t is not None and t.is_floating_point())

    assert torch.autograd.gradcheck(call, [*inputs, *(start[i].clone().requires_grad_() for i in floats)])


def hard_keys(kind, length, width):
    key = torch.randn(BATCH, length, width, dtype=torch.float64)
    if kind == "scaled-1e4":
        return key * 1e4
    if kind == "jumps-200":
        return key + 200 * torch.randint(-1, 2, key.shape)
    if kind == "rising-jump":
        return key + 300 * (torch.arange(length) >= length // 2 + 5)[:, None]
    if kind == "falling-jump":
        return key - 300 * (torch.arange(length) >= length // 2 + 5)[:, None]
    if kind == "all-equal":
        return torch.full_like(key, 1e4)
    if kind == "all-very-low":
        return key - 1e4
    return key


HARD_KEYS = ["scaled-1e4", "jumps-200", "rising-jump", "falling-jump", "all-equal", "all-very-low"]


@pytest.mark.parametrize("bias_kind", ["small", "low-1e4", "high-1e4", "mixed-200"])
@pytest.mark.parametrize("key_kind", [*HARD_KEYS, "plain"])
@pytest.mark.parametrize("form", FORMS)
def test_exact_for_any_finite_input(form, key_kind, bias_kind):
    """float32 against the float64 reference, outputs and gradients: no overflow, no underflow, no epsilon."""
    length = 100
    query, key, value = make_inputs(form, length)
    key = hard_keys(key_kind, length, key.shape[-1])
    bias = make_bias(form, length)
    for name, tensor in bias.items():
        if name == "decay":
            continue
        if bias_kind == "mixed-200":
            bias[name] = tensor + 200 * torch.randint(-1, 2, tensor.shape)
        elif bias_kind != "small":
            bias[name] = tensor + (-1e4 if bias_kind == "low-1e4" else 1e4)
    single = [t.float() for t in (query, key, value)], {name: t.float() for name, t in bias.items()}
    expected = run("reference", [t.double() for t in single[0]], {n: t.double() for n, t in single[1].items()})
    # k + w itself is rounded where both are large: at 2e4 a float32 has steps of 2e-3.
    large = key.abs().max() > 1e3 and bias_kind != "small" or bias_kind.endswith("1e4")
    tolerance = 1e-2 if large else 2e-4
    for kernel in kernels_of(form):
        for a, e in zip(run(kernel, *single), expected, strict=True):
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("key_kind", HARD_KEYS)
@pytest.mark.parametrize("form", FORMS)
def test_exact_across_states(form, key_kind):
    """The state carries hard keys as exactly as a single call."""
    query, key, value = make_inputs(form, 90)
    key = hard_keys(key_kind, 90, key.shape[-1])
    bias = {name: t.float() for name, t in make_bias(form, 90).items()}
    query, key, value = (t.float() for t in (query, key, value))
    expected = formula(query.double(), key.double(), value.double(), **{n: t.double() for n, t in bias.items()})
    state, parts = None, []
    for q, k, v in zip(*(t.split([40, *[1] * 20, 30], 1) for t in (query, key, value)), strict=True):
        part, state = aft_attention(q, k, v, **bias, initial_state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs(form, dtype):
    """Only the inputs and the output are rounded: sums and exponentials stay in float32."""
    inputs = [t.to(dtype) for t in make_inputs(form, 300)]
    inputs[1] = inputs[1] * 8
    bias = {name: t.to(dtype) for name, t in make_bias(form, 300).items()}
    expected = run("reference", [t.double() for t in inputs], {name: t.double() for name, t in bias.items()})
    actual = run("torch", inputs, bias)
    assert actual[0].dtype == dtype
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=1e-2 * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_sums(form):
    """Outputs and gradients are those of float32, also where the backward pass runs under autocast."""
    inputs, bias = [t.float() for t in make_inputs(form, 80)], make_bias(form, 80, dtype=torch.float32)
    expected = run("torch", inputs, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run("torch", inputs, bias)
    assert_agree(inside, expected, 1e-6, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_query_sees_the_future(form):
    (query, key, value), bias = make_inputs(form, 90), make_bias(form, 90)
    changed = [t.clone() for t in (query, key, value)]
    for tensor in changed:
        tensor[:, 50:] += torch.randn_like(tensor[:, 50:]) * 3
    torch.testing.assert_close(
        aft_attention(*changed, **bias)[:, :50], aft_attention(query, key, value, **bias)[:, :50]
    )


@pytest.mark.parametrize("form", FORMS)
def test_position_ids_choose_the_rows_of_the_tables(form):
    inputs, bias = make_inputs(form, 20), make_bias(form, 50)
    ids = torch.arange(20).expand(BATCH, -1) + torch.tensor([[0], [13]])
    options = {"position_ids": ids, "return_state": True}
    both = [run(backend, inputs, bias, **options) for backend in ("torch", "reference")]
    assert_agree(*both)
    torch.testing.assert_close(both[0][0][:1], aft_attention(*(t[:1] for t in inputs), **bias))
    shifted = {
        "position_bias": lambda t: t[13:, 13:],
        "window_bias": lambda t: t[:, 13:] if t.shape[1] > 1 else t,
        "decay": lambda t: t,
    }
    shifted = {name: shifted[name](tensor) for name, tensor in bias.items()}
    torch.testing.assert_close(both[0][0][1:], formula(*(t[1:] for t in inputs), **_rows(shifted, 20)))


def _rows(bias, length):
    return {n: t[:length, :length] if n == "position_bias" else t for n, t in bias.items()}


@pytest.mark.parametrize("kind", ["left", "interior", "everything"])
@pytest.mark.parametrize("ids", ["shifted", "repeated", "descending"])
@pytest.mark.parametrize("form", FORMS)
def test_backends_agree_for_positions_masks_and_states_together(form, ids, kind):
    length, bias, mask = 24, make_bias(form, 40), make_mask(kind, 24)
    inputs = make_inputs(form, length)
    places = torch.arange(length).expand(BATCH, -1)
    positions = {"shifted": places + 9, "repeated": places % 7, "descending": length - places}[ids]
    states = {"torch": None, "reference": None}
    for rows in (slice(0, 9), slice(9, 10), slice(10, 13), slice(13, 24)):
        part = [t[:, rows] for t in inputs]
        options = {"attention_mask": mask[:, rows], "position_ids": positions[:, rows], "return_state": True}
        results = []
        for backend, state in states.items():
            out, states[backend] = aft_attention(*part, **bias, **options, initial_state=state, backend=backend)
            results.append([out, *(t for t in states[backend] if t is not None)])
        assert_agree(*results)


@pytest.mark.parametrize("form", ["full", "local", "conv"])
def test_rows_chosen_by_the_caller(form):
    """The bias of each query instead of the table: what a decoding step does."""
    inputs, bias, mask = make_inputs(form, 20), make_bias(form, 20), make_mask("interior", 20)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    table = next(iter(bias.values()))
    if form == "full":
        rows = {"position_bias": table[positions]}
    else:
        rows = {"window_bias": table[:, positions] if form == "local" else table[:, None].expand(-1, BATCH, 20, -1)}
    options = {"attention_mask": mask, "return_state": True}
    expected = aft_attention(*inputs, **bias, attention_mask=mask)
    for backend in ("torch", "reference"):
        torch.testing.assert_close(aft_attention(*inputs, **rows, **options, backend=backend)[0], expected)


def test_the_state_keeps_the_dtypes_of_keys_and_values():
    query, key, value = make_inputs("conv", 9)
    bias = make_bias("conv", 9)
    _, state = aft_attention(query, key.bfloat16(), value.float(), **bias, return_state=True)
    assert (state.key.dtype, state.value.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form, causal):
    torch._dynamo.reset()
    inputs, bias = [t.float() for t in make_inputs(form, 70)], make_bias(form, 70, causal, dtype=torch.float32)
    bias = {name: t.requires_grad_() for name, t in bias.items()}
    inputs = [t.requires_grad_() for t in inputs]

    def call(*inputs):
        return aft_attention(*inputs, **bias, causal=causal)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs)
    torch.testing.assert_close(out, call(*inputs))
    everything = [*inputs, *bias.values()]
    assert_agree(
        torch.autograd.grad(out.sum(), everything), torch.autograd.grad(call(*inputs).sum(), everything), 1e-4, 1e-4
    )


@pytest.mark.parametrize("form", FORMS)
def test_one_compiled_graph_serves_many_lengths(form):
    """More lengths than torch.compile would recompile for."""
    torch._dynamo.reset()
    bias = make_bias(form, 200, dtype=torch.float32)
    compiled = torch.compile(lambda *i: aft_attention(*i, **bias), fullgraph=True, backend="eager")
    for length in (65, 66, 70, 71, 75, 80, 81, 90, 100, 110, 120, 127, 130, 150):
        inputs = [t.float() for t in make_inputs(form, length)]
        torch.testing.assert_close(compiled(*inputs), aft_attention(*inputs, **bias))


@pytest.mark.parametrize("form", FORMS)
def test_exports_with_a_dynamic_length(form):
    bias = make_bias(form, 200, dtype=torch.float32)

    class Mixer(torch.nn.Module):
        def forward(self, query, key, value):
            return aft_attention(query, key, value, **bias)

    inputs = tuple(t.float() for t in make_inputs(form, 100))
    length = {1: torch.export.Dim("length", min=65, max=127)}
    exported = torch.export.export(Mixer(), inputs, dynamic_shapes=(length, length, length)).module()
    others = [t.float() for t in make_inputs(form, 77)]
    torch.testing.assert_close(exported(*others), aft_attention(*others, **bias))


def test_operators_pass_opcheck():
    """torch.library's own checks: schema, fake kernels, autograd registration, aot dispatch."""
    key, value = (torch.randn(2, 6, 3, 4, requires_grad=True) for _ in range(2))
    maximum, normalizer, average = (torch.rand(2, 1, 3, 4).add(1).requires_grad_() for _ in range(3))
    bias = torch.randn(2, 5, 7, requires_grad=True)
    for with_log in (False, True):
        for visible in (0, 2):
            inputs = key, value, maximum, normalizer, average, bias, visible, with_log
            torch.library.opcheck(ops_panel.panel, inputs)
    query, value = (torch.randn(2, 40, 8, requires_grad=True) for _ in range(2))
    key, rows = torch.randn(2, 40, 4, requires_grad=True), torch.randn(4, 1, 1, 3, requires_grad=True)
    maximum, normalizer = (torch.rand(2, 4).add(1).requires_grad_() for _ in range(2))
    average = torch.randn(2, 8, requires_grad=True)
    for decay in (None, torch.rand(4, requires_grad=True)):
        torch.library.opcheck(ops_cpu.windowed, (query, key, value, rows, maximum, normalizer, average, decay, "tanh"))


class PlainPanel(torch.autograd.Function):
    """The panel without its registration as an operator, whose inside no dispatch mode sees."""

    operator = ops_panel.panel

    @staticmethod
    def forward(ctx, *inputs):
        ctx.output, ctx.inputs = PlainPanel.operator.plain(*inputs), inputs
        return ctx.output

    @staticmethod
    def backward(ctx, grad, *_):
        *inputs, visible, _ = ctx.inputs
        out, _, total = ctx.output
        needs_bias = ctx.needs_input_grad[5]
        grads = ops_panel.panel_backward.plain(grad.contiguous(), None, out, total, inputs, visible, needs_bias)
        return (*grads[:5], grads[5] if ctx.needs_input_grad[5] else None, None, None)


class PlainWindowed(torch.autograd.Function):
    """The same of the operator of the CPU."""

    operator = ops_cpu.windowed

    @staticmethod
    def forward(ctx, *inputs):
        ctx.output, ctx.inputs = PlainWindowed.operator.plain(*inputs), inputs
        return ctx.output

    @staticmethod
    def backward(ctx, grad, *_):
        *inputs, decay, activation = ctx.inputs
        needed = True, decay is not None
        *grads, d_decay = ops_cpu.windowed_backward.plain(grad, *ctx.output[1:], inputs, decay, activation, *needed)
        return *grads, None if decay is None else d_decay, None


@pytest.fixture
def largest_tensor(monkeypatch):
    monkeypatch.setattr(ops_panel, "panel", PlainPanel.apply)
    monkeypatch.setattr(ops_cpu, "windowed", PlainWindowed.apply)

    def measure(function):
        with LargestTensor() as mode:
            function()
        return mode.largest

    return measure


@pytest.mark.parametrize("form", WINDOWED)
def test_memory_is_linear_in_length(form, largest_tensor):
    """No tensor of the fast path, forward or backward, grows faster than T."""

    def largest(kernel, length):
        inputs, bias = (
            make_inputs(form, length, torch.float32),
            make_bias(form, length, dtype=torch.float32, window=32),
        )
        return largest_tensor(lambda: run(kernel, inputs, bias))

    for kernel in ("cpu", "chunks"):
        assert largest(kernel, 4096) <= 4.2 * largest(kernel, 1024)


@pytest.mark.parametrize("aft_type", ["local", "simple", "conv"])
def test_memory_of_a_model_is_linear_in_length(aft_type, largest_tensor):
    def largest(length):
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "position_bias_rank": 4}
        model = AFTModel(AFTConfig(aft_type=aft_type, max_position_embeddings=length, **size))
        ids = torch.zeros(1, length, dtype=torch.long)
        return largest_tensor(lambda: model(ids, use_cache=False).last_hidden_state.sum().backward())

    assert largest(4096) <= 4.2 * largest(1024)


@pytest.mark.parametrize("form", WINDOWED)
def test_state_keeps_its_size(form):
    bias = make_bias(form, 100)
    sizes = set()
    for length in (1, 10, 100):
        _, state = aft_attention(*make_inputs(form, length), **bias, return_state=True)
        sizes.add(sum(t.numel() for t in state if t is not None))
    assert len(sizes) == 1


def test_a_decay_is_exact_after_a_million_tokens():
    """Keys stay what they are, however far the text goes: float32 against float64 on what has not faded."""
    tail, decay = 3000, torch.tensor([0.02, 0.3])
    query, key, value = torch.randn(3, 1, 1_000_000, 2)
    whole, state = aft_attention(query, key, value, decay=decay, return_state=True)
    parts = [t[:, -tail:].double() for t in (query, key, value)]
    expected, fresh = aft_attention(*parts, decay=decay.double(), return_state=True)
    torch.testing.assert_close(whole[:, -1000:].double(), expected[:, -1000:], rtol=1e-5, atol=1e-5)
    for name in ("maximum", "normalizer", "average"):
        torch.testing.assert_close(getattr(state, name).double(), getattr(fresh, name), rtol=1e-5, atol=1e-5)


BAD_CALLS = {
    "both-biases": ({"position_bias": torch.zeros(9, 9), "window_bias": torch.zeros(1, 9, 2)}, "position_bias"),
    "table-not-square": ({"position_bias": torch.zeros(9, 8)}, r"position_bias.*\(9, 8\)"),
    "even-taps": ({"window_bias": torch.zeros(1, 9, 2), "causal": False}, "odd"),
    "heads": ({"window_bias": torch.zeros(3, 1, 2)}, "window_bias"),
    "mask-shape": ({"attention_mask": torch.ones(2, 5)}, "attention_mask"),
    "activation": ({"query_activation": "softplus"}, "query_activation.*softplus"),
    "backend": ({"backend": "cuda"}, "backend.*cuda"),
    "triton-on-a-cpu": ({"backend": "triton"}, "backend.*CUDA.*triton"),
    "full_triton-on-a-cpu": (
        {"backend": "full_triton", "position_bias": torch.zeros(9, 9)},
        "backend.*AFT-full at the positions 0, 1, ... on a CUDA device, with the package triton",
    ),
    "state-bidirectional": ({"causal": False, "return_state": True}, "return_state"),
    "decay-shape": ({"decay": torch.zeros(3)}, r"`decay` .*\[8\].*\[3\]"),
    "decay-below-0": ({"decay": torch.linspace(-0.1, 1, 8)}, "`decay` .*at least 0.*-0.1 to 1"),
    "decay-without-end": ({"decay": torch.full((8,), math.inf)}, "`decay` .*finite"),
    "decay-of-full": ({"decay": torch.zeros(8), "position_bias": torch.zeros(9, 9)}, "`decay` .*position_bias"),
    "table-too-short": ({"window_bias": torch.zeros(1, 5, 2)}, r"Position 8 .*N = 5"),
    "positions-beyond": (
        {"position_bias": torch.zeros(9, 9), "position_ids": torch.full((2, 9), 9)},
        "Position 9 .*N = 9",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        aft_attention(*(t.float() for t in make_inputs("simple", 9)), **options)


def test_errors_of_shapes_and_dtypes():
    query, key, value = make_inputs("simple", 9)
    with pytest.raises(ValueError, match="key"):
        aft_attention(query, key[..., :3], value)
    with pytest.raises(ValueError, match="query"):
        aft_attention(query[:, :4], key, value)
    with pytest.raises(ValueError, match="floating"):
        aft_attention(query, key.long(), value)
    _, state = aft_attention(query, key, value, return_state=True)
    with pytest.raises(ValueError, match="initial_state.*window of 4"):
        aft_attention(query, key, value, window_bias=torch.zeros(1, 20, 5), initial_state=state)
    with pytest.raises(ValueError, match="initial_state"):
        aft_attention(query, key, value, position_bias=torch.zeros(20, 20), initial_state=state)


@pytest.mark.parametrize("form", ["full", "local"])
def test_a_state_cannot_outgrow_its_table(form):
    inputs, bias = make_inputs(form, 6), make_bias(form, 10)
    _, state = aft_attention(*inputs, **bias, return_state=True)
    with pytest.raises(ValueError, match="Position 11 .*N = 10"):
        aft_attention(*inputs, **bias, initial_state=state)
