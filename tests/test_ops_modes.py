"""The operator in every mode that torch has: layouts, dtypes, autocast, inference, transforms, second derivatives."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

from modeling_aft.ops import aft_attention, aft_attention_weights


FORMS = ["full", "local", "simple", "conv", "conv-decay"]
BATCH, LENGTH, WIDTH, HEADS, TAPS = 2, 70, 8, 4, 5
forms = pytest.mark.parametrize("form", FORMS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make_inputs(form, length=LENGTH, dtype=torch.float64, batch=BATCH):
    query, value = torch.randn(2, batch, length, WIDTH, dtype=dtype)
    return query, torch.randn(batch, length, HEADS if "conv" in form else WIDTH, dtype=dtype), value


def make_bias(form, length=LENGTH, causal=True, dtype=torch.float64):
    taps = TAPS if causal else 2 * TAPS - 1
    shapes = {"full": (length, length), "local": (1, length, taps), "conv": (HEADS, 1, taps)}
    name = {"full": "position_bias"}.get(form, "window_bias")
    form, _, decays = form.partition("-")
    bias = {} if form == "simple" else {name: torch.randn(shapes[form], dtype=dtype)}
    return {**bias, "decay": torch.rand(HEADS, dtype=dtype)} if decays else bias


LAYOUTS = {
    "one-row-for-all": lambda t: t[:1].expand(t.shape),
    "one-token-for-all": lambda t: t[:, :1].expand(t.shape),
    "one-channel-for-all": lambda t: t[..., :1].expand(t.shape),
    "channels-first": lambda t: t.mT.contiguous().mT,
    "every-second-channel": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "time-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["query", "key", "value", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@forms
def test_any_layout(form, layout, which, activation):
    bias = list(make_bias(form).items())
    if which == 3 and not bias:
        return
    results = []
    tensors = [*make_inputs(form), *(tensor for _, tensor in bias)]
    for apply in (layout, lambda t: layout(t).contiguous()):
        leaves = [apply(t).detach() if i == which else t.clone() for i, t in enumerate(tensors)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        named = {name: leaf for (name, _), leaf in zip(bias, leaves[3:], strict=True)}
        out = aft_attention(*leaves[:3], **named, query_activation=activation)
        # Gradients that come in have stride 0, too, as those of a sum do.
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "identity"])
@directions
@forms
def test_nothing_that_is_given_is_written_into(form, causal, activation):
    """Longer than a block of the CPU's operator, whose backward pass goes over blocks."""
    length = 120 if form == "full" else 1500
    inputs, bias = make_inputs(form, length, batch=1), make_bias(form, length, causal)
    upstream = torch.randn_like(inputs[2])
    leaves = [t.clone().requires_grad_() for t in (*inputs, *bias.values())]
    named = dict(zip(bias, leaves[3:], strict=True))
    passed_on = upstream.clone()
    out = aft_attention(*leaves[:3], **named, causal=causal, query_activation=activation)
    torch.autograd.grad(out, leaves, passed_on)
    for found, expected in zip([*leaves, passed_on], [*inputs, *bias.values(), upstream], strict=True):
        assert torch.equal(found, expected)


@forms
def test_gradients_of_the_query_itself_as_gate(form):
    """query_activation="identity", in more than one block."""
    length = 60 if form == "full" else 1100
    inputs, bias = make_inputs(form, length, batch=1), make_bias(form, length)
    grads = []
    for backend in ("torch", "reference"):
        leaves = [t[:, :length].clone().requires_grad_() for t in inputs]
        out = aft_attention(*leaves, **bias, query_activation="identity", backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@directions
@forms
def test_any_mix_of_dtypes(form, causal, autocast):
    """Of query, key and value, in one call and, causally, in a second that goes on from its state."""
    inputs, bias = make_inputs(form, 20), make_bias(form, 40, causal, torch.float32)
    exact = aft_attention(*inputs, **{name: t.double() for name, t in bias.items()}, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for dtypes in itertools.product(DTYPES, repeat=3):
            leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
            result = aft_attention(*leaves, **bias, causal=causal, return_state=causal)
            out, state = result if causal else (result, None)
            assert out.dtype == dtypes[0]
            torch.testing.assert_close(out.double(), exact, rtol=0.1, atol=0.1)
            total = out.double().sum()
            for length in (1, 5) if causal else ():
                parts = (t[:, :length] for t in leaves)
                total = total + aft_attention(*parts, **bias, initial_state=state).double().sum()
            for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                assert gradient.dtype == leaf.dtype and gradient.isfinite().all()


def as_function(form, bias, causal=True, weight=None):
    """A scalar of (query, key, value, *biases)."""

    def function(*tensors):
        named = dict(zip(bias, tensors[3:], strict=True))
        out = aft_attention(*tensors[:3], **named, causal=causal)
        return (out * weight).sum() if weight is not None else out

    return function


@directions
@forms
def test_forward_mode_derivatives(form, causal):
    """torch.func.jvp, jacfwd and dual numbers, against the gradients of the backward pass."""
    inputs, bias = make_inputs(form, 12), make_bias(form, 12, causal)
    tensors = (*inputs, *bias.values())
    tangents = tuple(map(torch.randn_like, tensors))
    weight = torch.randn_like(inputs[2])
    function = as_function(form, bias, causal, weight)
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(function(*leaves), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(jvp(function, tensors, tangents)[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(tensors, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, expected)
    jacobian = jacfwd(function, argnums=1)(*tensors)
    torch.testing.assert_close(jacobian, gradients[1])


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@directions
@forms
def test_gradients_and_per_sample_gradients_of_torch_func(form, causal, masked):
    inputs, bias = make_inputs(form, 12, batch=3), make_bias(form, 12, causal)
    mask = torch.ones(3, 12, dtype=torch.long)
    if masked:
        mask[0, :4], mask[1, 7:] = 0, 0
    names = list(bias)

    def loss(tensors, biases, mask):
        named = dict(zip(names, biases, strict=True))
        return aft_attention(*tensors, **named, causal=causal, attention_mask=mask).square().sum()

    biases = tuple(bias.values())
    everything = grad(loss, argnums=(0, 1))(inputs, biases, mask)
    samples = vmap(grad(lambda t, b, m: loss([x[None] for x in t], b, m[None]), argnums=(0, 1)), (0, None, 0))
    by_sample = samples(inputs, biases, mask)
    for row in range(3):
        leaves = [t[row : row + 1].clone().requires_grad_() for t in inputs]
        own = [t.clone().requires_grad_() for t in biases]
        expected = torch.autograd.grad(loss(leaves, own, mask[row : row + 1]), [*leaves, *own])
        for found, gradient in zip([*by_sample[0], *by_sample[1]], expected, strict=True):
            torch.testing.assert_close(found[row], gradient.view_as(found[row]))
        for found, gradient in zip(everything[0], expected, strict=False):
            torch.testing.assert_close(found[row], gradient[0])


@directions
@forms
def test_second_derivatives(form, causal):
    inputs, bias = make_inputs(form, 7, batch=1), make_bias(form, 7, causal)
    tensors = [t.requires_grad_() for t in (*inputs, *bias.values())]
    assert torch.autograd.gradgradcheck(as_function(form, bias, causal), tensors)


@pytest.mark.parametrize("length", [1, 6])
@forms
def test_transforms_go_through_a_state(form, length):
    bias = make_bias(form, 30)
    _, state = aft_attention(*make_inputs(form, 12), **bias, return_state=True)
    inputs = make_inputs(form, length)

    def function(key):
        return aft_attention(inputs[0], key, inputs[2], **bias, initial_state=state).sum()

    leaf = inputs[1].clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf), leaf)[0]
    torch.testing.assert_close(grad(function)(inputs[1]), expected)
    torch.testing.assert_close(jacfwd(function)(inputs[1]), expected)


@directions
@forms
def test_weights_are_those_of_the_average(form, causal):
    (query, key, value), bias = make_inputs(form, 20), make_bias(form, 30, causal)
    mask = torch.ones(BATCH, 20, dtype=torch.long)
    mask[0, :3], mask[1, 8:10] = 0, 0
    for options in ({}, {"attention_mask": mask}):
        weights = aft_attention_weights(key, **bias, causal=causal, **options)
        expected = aft_attention(query, key, value, **bias, causal=causal, query_activation="identity", **options)
        spread = weights.repeat_interleave(WIDTH // weights.shape[1], 1)  # [B, D, T, T]
        torch.testing.assert_close(query * (spread @ value.mT[..., None]).squeeze(-1).mT, expected)


EXTREMES = {
    "a-key-far-above": (torch.tensor([0.0, 68.0]), 1e4, 0.0, 1, 262_144.0),
    "keys-and-biases-of-30": (torch.full((400,), 30.0), 1e10, 30.0, 300, 1.0),
    "values-of-1e37": (torch.zeros(200), 1e37, 1.0, 3, 1.0),
    "keys-far-below": (torch.cat([torch.zeros(1), torch.full((99,), -45.0)]), 1e3, -30.0, 40, 1e6),
    "large-gradients": (torch.linspace(-20, 20, 100), 1e6, 3.0, 40, 1e20),
    "small-gradients": (torch.linspace(-20, 20, 100), 1.0, 3.0, 40, 1e-30),
}


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@directions
@pytest.mark.parametrize("form", ["full", "simple", "local", "conv"])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_sums_stay_finite(extreme, form, causal, state):
    """float32 against the formula in float64: results and gradients, for large but finite inputs."""
    keys, size, bias_size, window, upstream = extreme
    if state and not causal:
        return
    length = len(keys)
    torch.manual_seed(1)
    key = (keys[:, None] + 0.1 * torch.rand(length, 2)).clamp_max(float(keys.max()))[None]
    value = size * (0.5 + torch.rand(1, length, 2))
    value[:, : length // 2] *= -1
    taps = window if causal else 2 * window - 1
    bias = {
        "full": {"position_bias": torch.full((length, length), bias_size)},
        "local": {"window_bias": torch.full((1, length, taps), bias_size)},
        "conv": {"window_bias": torch.full((2, 1, taps), bias_size)},
        "simple": {},
    }[form]
    weight = upstream * torch.rand(1, length, 2)
    results = []
    for dtype, backend in ((torch.float32, "torch"), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (key, value, *bias.values())]
        named = dict(zip(bias, leaves[2:], strict=True))
        options = {"causal": causal, "backend": backend}
        query = torch.zeros(1, length, 2, dtype=dtype)
        if state:
            half = max(length // 2, 1)
            _, before = aft_attention(query[:, :half], *(t[:, :half] for t in leaves[:2]), **named, return_state=True)
            parts = (query[:, half:], *(t[:, half:] for t in leaves[:2]))
            out = aft_attention(*parts, **named, initial_state=before, **options)
        else:
            out = aft_attention(query, *leaves[:2], **named, **options)
        gradients = torch.autograd.grad(out, leaves, weight[:, -out.shape[1] :].to(dtype), allow_unused=True)
        results.append([out.detach(), *(torch.zeros(1) if g is None else g for g in gradients)])
    # What rounding has to be compared with: values, and gradients of keys, values and biases.
    scales = (size, upstream * size, upstream, upstream * size)
    for found, expected, scale in zip(*results, scales, strict=False):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=1e-4, atol=1e-4)


EMPTY = {"no-rows": (0, 5), "no-tokens": (2, 0)}


@pytest.mark.parametrize("size", EMPTY.values(), ids=EMPTY)
@forms
def test_empty_inputs_are_refused_by_name(form, size):
    batch, length = size
    inputs = (t[:batch, :length] for t in make_inputs(form))
    with pytest.raises(ValueError, match="`value` must be of at least one row and one token"):
        aft_attention(*inputs, **make_bias(form))


REFUSED = {
    "an-additive-mask": ({"attention_mask": torch.tensor([[0.0, -1e9]])}, "attention_mask.*1 or True.*-1000000000"),
    "a-negative-position": ({"position_ids": torch.tensor([[-1, 0]])}, "position_ids.*at least 0.*-1"),
    "documents-of-floats": ({"seq_idx": torch.tensor([[0.0, 1.0]])}, "seq_idx.*whole numbers"),
    "documents-with-a-state": (
        {"seq_idx": torch.tensor([[0, 1]]), "return_state": True},
        "seq_idx.*None with a state",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@forms
def test_what_makes_no_sense_is_refused_by_name(form, options, message):
    with pytest.raises(ValueError, match=message):
        aft_attention(*make_inputs(form, 2, batch=1), **make_bias(form, 4), **options)
