"""The Triton kernels of the causal windowed forms against the plain formula, see triton_tests.py."""

import importlib.util
import math
import re
import sys

import pytest
import torch
from triton_tests import DEVICE, RUNS_HERE, TOLERANCE, patch_once, run_under_interpreter  # noqa: F401

from modeling_aft.ops import aft_attention
from modeling_aft.ops_state import AFTState, compute_dtype, nothing
from modeling_aft.ops_windows import Window


FORMS = ["simple", "local", "conv"]
BATCH, WIDTH, HEADS = 2, 8, 2
LONG = 70 if DEVICE == "cuda" else 40  # more than a tile of 32, of which each takes seconds under the interpreter
KINDS = ["scaled", "jump up", "jump down", "largest sum off both maxima"]
# Under the interpreter those with a window take half a minute each; `test_log_space_in_a_later_tile` is one.
EXTREMES = [(form, kind) for form in FORMS for kind in KINDS if DEVICE == "cuda" or form == "simple"]

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from aft.triton_kernels import H100, compiling_for, resources  # noqa: E402
from modeling_aft import ops_triton  # noqa: E402


# Expressions over names of tests that share them out among processes.
PARTS = {"simple-or-conv": "simple or conv", "others": "not simple and not conv"}


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.parametrize("part", PARTS)
def test_under_the_interpreter(part):
    run_under_interpreter(__file__, PARTS[part])


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.parametrize(
    ("form", "decay"),
    [("simple", False), ("local", False), ("conv", True)],
    ids=lambda value: str(value),
)
def test_compile_for_a_gpu(form, decay):
    """Every kernel of both directions, from the call to machine code. That reads several channels at once, as it does
    where the compiler knows the alignment of tensors and strides; those of values that share a key it reads singly."""
    with compiling_for(*H100) as compiled:  # a length that is cut into chunks there
        by_triton(leaves(make_tensors(form, 512, width=64, decay=decay), torch.bfloat16)).sum().backward()
    kernels = ["_lay_out_weights"] if form != "simple" else []
    kernels += ["_forward_sums", "_forward_scan", "_forward", "_forward_in_log_space"]
    kernels += ["_backward_sums", "_backward_scan", "_backward", "_backward_in_log_space"]
    assert list(compiled) == kernels
    for name, kernel in compiled.items():
        assert kernel.asm["cubin"] and 0 < resources(kernel)["registers"] <= 255, name
        if form != "conv" and name in ("_forward_sums", "_forward", "_backward_sums", "_backward"):
            wide = r"ld\.global\S*\.v[24]\.|cp\.async\.c[ag]\.shared\.global [^;]*, 0x(8|10), "
            assert re.search(wide, kernel.asm["ptx"]), name


def make_tensors(form, length, window=5, heads=HEADS, keys=None, width=WIDTH, past=False, decay=False):
    """query, key, value, rows, past key and value, maximum, normalizer, average, decay: in float64, None where there
    is none.

    Of the past of the second sequence there is only the later half of the window, and nothing before it.
    """
    draw = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
    keys = keys or (heads if form == "conv" else width)
    query, value, key = draw(BATCH, length, width), draw(BATCH, length, width), draw(BATCH, length, keys)
    rows = {
        "simple": lambda: None,
        "local": lambda: draw(1, 1, length, window),
        "conv": lambda: draw(heads, 1, 1, window),
        "rows": lambda: draw(heads, BATCH, length, window),
    }[form]()
    state = [None] * 5
    if past:
        before = 0 if rows is None else window - 1
        state = [draw(BATCH, before, keys), draw(BATCH, before, width)]
        state += [draw(BATCH, keys), 1 + draw(BATCH, keys).abs(), draw(BATCH, width)]
        state[0][1, : (before + 1) // 2] = -math.inf
        for tensor, nothing in zip(state[2:], (-math.inf, 0, 0), strict=True):
            tensor[1] = nothing
    return [query, key, value, rows, *state, torch.logspace(-3, -0.5, keys).double() if decay else None]


def leaves(tensors, dtype=torch.float64, device="cpu"):
    """Copies that take gradients: inputs in `dtype`, biases and sums in at least float32."""
    kinds = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)] + [dtype] * 2
    kinds += [torch.promote_types(dtype, torch.float32)] * 4
    return [
        None if t is None else t.to(device, kind, copy=True).requires_grad_()
        for t, kind in zip(tensors, kinds, strict=True)
    ]


def by_reference(tensors, activation="sigmoid", mask=None):
    query, key, value, rows, past_key, past_value, *sums, decay = tensors
    state = None
    if past_key is not None:
        state = AFTState(torch.zeros(BATCH, dtype=torch.long), past_key, past_value, None, *sums)
    if rows is not None and rows.shape[1] == 1:
        rows = rows[:, 0]
    return aft_attention(
        query, key, value, window_bias=rows, decay=decay, initial_state=state, query_activation=activation,
        attention_mask=mask, backend="reference",
    )  # fmt: skip


def by_triton(tensors, activation="sigmoid", mask=None):
    query, key, value, rows, past_key, past_value, *sums, decay = tensors
    if mask is not None:
        absent = mask.to(key.device)[..., None] == 0
        key, value = key.masked_fill(absent, -math.inf), value.masked_fill(absent, 0)
    past, initial = (past_key, past_value), tuple(sums)
    if past_key is None:
        past, initial = None, nothing(key, value, compute_dtype(key, value))
    return ops_triton.windowed_triton(Window(query, key, value, rows, past, initial, True, activation, decay))


def results(function, tensors, mask=None, **options):
    """The output and the gradients of a random function of it, zero where there is none."""
    out = function(tensors, mask=mask, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if mask is not None:
        weight = weight * mask[..., None]
        out = out * mask[..., None].to(out.device)
    given = [t for t in tensors if t is not None]
    grads = torch.autograd.grad((out.double() * weight.to(out.device)).sum(), given, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, given, strict=True))]


def assert_agree(tensors, dtype=torch.float64, **options):
    """The kernels on `dtype` copies against the reference on float64 copies of the same numbers."""
    tensors = [None if t is None else t.to(dtype).double() for t in tensors]
    actual = results(by_triton, leaves(tensors, dtype, DEVICE), **options)
    expected = results(by_reference, leaves(tensors), **options)
    assert actual[0].dtype == dtype
    assert expected[0].abs().max() > 0
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, e.abs().max().item() if e.numel() else 0.0)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(a.cpu().double(), e, rtol=tolerance, atol=tolerance * scale)


class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("length", [1, 7, 32, 70] if DEVICE == "cpu" else [1, 2, 7, 31, 32, 33, 150, 1000])
    @pytest.mark.parametrize("form", FORMS)
    def test_match_the_reference(self, form, length):
        assert_agree(make_tensors(form, length))

    @pytest.mark.parametrize("window", [1, 34, 70] if DEVICE == "cpu" else [1, 2, 32, 33, 64, 100])
    @pytest.mark.parametrize("form", ["local", "conv"])
    def test_any_window(self, form, window):
        assert_agree(make_tensors(form, 80, window=window))

    @pytest.mark.parametrize("form", FORMS)
    def test_through_the_public_function(self, form):
        """Padding, a state that goes on, and the way back: what stands between a caller and the kernels."""
        query, key, value, rows, *_ = make_tensors(form, 12)
        bias = {} if rows is None else {"window_bias": rows[:, 0]}
        mask = torch.ones(BATCH, 12, dtype=torch.long)
        mask[0, :3], mask[1, 5] = 0, 0
        found = []
        for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
            inputs = [t.to(device, copy=True).requires_grad_() for t in (query, key, value, *bias.values())]
            options = {"backend": backend, "return_state": True}
            options |= dict(zip(bias, inputs[3:], strict=True))
            first = [t[:, :7] for t in inputs[:3]]
            rest = [t[:, 7:] for t in inputs[:3]]
            out, state = aft_attention(*first, attention_mask=mask[:, :7].to(device), **options)
            more, state = aft_attention(*rest, attention_mask=mask[:, 7:].to(device), initial_state=state, **options)
            outs = [torch.cat([out, more], 1), *(t for t in state if t is not None)]
            grads = torch.autograd.grad(outs[0].square().sum(), inputs)
            found.append([t.detach().cpu() for t in (*outs, *grads)])
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("length", [1, 20])
    def test_a_window_longer_than_the_text(self, length):
        assert_agree(make_tensors("local", length, window=40))
        assert_agree(make_tensors("conv", length, window=40, past=True))

    @pytest.mark.parametrize(
        ("heads", "keys", "width"),
        [
            (1, 1, 5),
            (1, 3, 9),
            (2, 4, 12),
            (3, 3, 3),
            (1, 20, 20),
            (1, 2, 34),
            (2, 2, 40 if DEVICE == "cpu" else 400),
        ],
        ids=lambda size: str(size),
    )
    def test_shared_keys_and_heads_of_the_bias(self, heads, keys, width):
        assert_agree(make_tensors("rows", LONG, window=3, heads=heads, keys=keys, width=width))
        if heads == 1:
            assert_agree(make_tensors("simple", LONG, keys=keys, width=width))

    @pytest.mark.parametrize("length", [1, LONG])
    @pytest.mark.parametrize(
        ("form", "window"), [("simple", 1), ("conv", 5), ("rows", 5), ("rows", 34)], ids=lambda value: str(value)
    )
    def test_past_keys_and_the_sum_before_them(self, form, window, length):
        assert_agree(make_tensors(form, length, window=window, past=True))

    @pytest.mark.parametrize(
        ("form", "window", "past", "dtype"),
        [
            ("simple", 1, True, torch.float64),
            ("conv", 5, False, torch.bfloat16),
            ("conv", 33, True, torch.float64),
            ("local", 5, True, torch.float32),
            ("rows", 34, True, torch.float64),
        ],
        ids=lambda value: str(value),
    )
    def test_decay(self, form, window, past, dtype):
        assert_agree(make_tensors(form, LONG, window=window, past=past, decay=True), dtype)

    @pytest.mark.parametrize("form", [*FORMS, "rows"])
    def test_absent_keys_at_the_end(self, form):
        mask = torch.ones(BATCH, LONG, dtype=torch.long)
        mask[0, 30:], mask[1, LONG - 5 :] = 0, 0
        assert_agree(make_tensors(form, LONG), mask=mask)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_query_that_sees_nothing_gives_0(self, form):
        tensors = leaves(make_tensors(form, 10, heads=4), device=DEVICE)
        mask = torch.ones(BATCH, 10)
        mask[0] = 0
        out = by_triton(tensors, mask=mask)
        assert (out[0] == 0).all() and (out[1] != 0).any()
        for grad in torch.autograd.grad(out.sum(), [t for t in tensors if t is not None]):
            assert grad.isfinite().all()
            assert grad.shape[0] != BATCH or (grad[0] == 0).all()

    @pytest.mark.parametrize(("form", "kind"), EXTREMES)
    def test_extreme_keys(self, form, kind):
        tensors = make_tensors(form, 20, heads=1, past=kind == "jump up")
        key, rows = tensors[1], tensors[3]
        if kind == "scaled":
            key *= 1e4
        elif kind == "jump up":
            key[:, 10:] += 200
            key[:, -3] += 200
        elif kind == "jump down":
            key[:, 10:] -= 200
        else:
            key[:, 10], key[:, 12] = 200, -100
            if rows is not None:
                rows[..., 1:3], rows[..., 3] = -400, 100
        denominators = (key - key.amax(1, keepdim=True)).exp().cumsum(1)
        assert denominators.min() < 1e-38 or kind == "jump down"  # the usual formula divides 0 by 0 in float32
        dtype = torch.float64 if kind == "scaled" else torch.float32
        assert_agree(tensors, dtype)

    @pytest.fixture
    def tile(self, monkeypatch):
        """How many queries a tile has: fewer under the interpreter, to which each key in log space takes long."""
        if DEVICE == "cpu":
            monkeypatch.setattr(ops_triton, "_BLOCK_T", 16)
        return ops_triton._BLOCK_T

    def test_log_space_in_a_later_tile(self, tile):
        tensors = make_tensors("local", tile + 8, window=tile)
        tensors[1][:, tile + 7 :] += 200
        assert_agree(tensors, torch.float32)

    @pytest.mark.parametrize(
        ("form", "window"), [("simple", 1), ("conv", 5), ("rows", 5)], ids=lambda value: str(value)
    )
    def test_log_space_in_one_of_several_chunks(self, form, window, tile, monkeypatch):
        """What the other chunks have written is replaced, also in rows that share a program with others."""
        monkeypatch.setattr(ops_triton, "_chunks", lambda *_: 2)
        tensors = make_tensors(form, tile + 8, window=window, heads=1, past=True, decay=True)
        tensors[1][1, tile + 4 :, :3] += 200
        assert_agree(tensors, torch.float32)

    def test_rows_of_the_batch_side_by_side(self, monkeypatch):
        """Three rows in a program of four, and in two programs of two."""
        monkeypatch.setattr(sys.modules[__name__], "BATCH", 3)
        for width in (4, 8):
            assert_agree(make_tensors("conv", 40, heads=1, width=width, past=False))
            assert_agree(make_tensors("simple", 40, keys=width, width=width), torch.float32)

    @pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "identity"])
    def test_activations(self, activation):
        tensors = make_tensors("local", 20)
        tensors[0][0, 0] = torch.tensor([1e3, -1e3, 1e-4, -1e-4, 30.0, -30.0, 2.0, -2.0])
        assert_agree(tensors, activation=activation)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("form", FORMS)
    def test_dtypes(self, form, dtype):
        assert_agree(make_tensors(form, LONG, window=32, past=True), dtype)

    @pytest.mark.parametrize(
        ("form", "window", "decay"),
        [
            *[("simple", 1, False), ("simple", 1, True), ("local", 32, False), ("local", 32, True)],
            *[("conv", 5, False), ("conv", 5, True), ("rows", 34 if DEVICE == "cpu" else 150, True)],
        ],
        ids=lambda value: str(value),
    )
    def test_chunks_side_by_side_match_the_reference(self, form, window, decay, monkeypatch):
        tensors = make_tensors(form, 66 if DEVICE == "cpu" else 300, window=window, past=True, decay=decay)
        tensors[1][:, 50:] += 50
        calls = []
        monkeypatch.setattr(ops_triton, "_chunks", lambda programs, tiles, *_: calls.append(tiles) or 2)
        assert_agree(tensors)
        assert calls == ([3, 3] if DEVICE == "cpu" else [10, 10])

    def test_slices_of_one_projection(self):
        fused = torch.randn(BATCH, LONG, 3 * WIDTH, dtype=torch.float64, device=DEVICE, requires_grad=True)
        parts = fused.split(WIDTH, -1)
        copies = [t.detach().clone().requires_grad_() for t in parts]
        slices, whole = (by_triton([*tensors, *[None] * 7]) for tensors in (parts, copies))
        assert torch.equal(slices, whole)
        grad = torch.randn_like(whole).transpose(0, 1).contiguous().transpose(0, 1)
        grads = torch.cat(torch.autograd.grad(whole, copies, grad), -1)
        assert torch.equal(torch.autograd.grad(slices, fused, grad)[0], grads)

    @pytest.mark.parametrize("form", FORMS)
    def test_the_same_in_every_run_and_under_autocast(self, form):
        tensors = make_tensors(form, 20 if DEVICE == "cpu" else 140)
        once = results(by_triton, leaves(tensors, torch.float32, DEVICE))
        for a, b in zip(once, results(by_triton, leaves(tensors, torch.float32, DEVICE)), strict=True):
            assert torch.equal(a, b)
        with torch.autocast(DEVICE, torch.bfloat16):
            for a, b in zip(once, results(by_triton, leaves(tensors, torch.float32, DEVICE)), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("form", ["simple", "conv"])
    def test_compiles_as_one_graph(self, form):
        torch._dynamo.reset()
        tensors = make_tensors(form, 20, past=True)
        compiled = torch.compile(by_triton, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        actual = results(compiled, leaves(tensors, device=DEVICE))
        for a, e in zip(actual, results(by_triton, leaves(tensors, device=DEVICE)), strict=True):
            torch.testing.assert_close(a, e)

    @pytest.mark.parametrize(("form", "decays"), [("simple", False), ("local", False), ("conv", True)])
    def test_operators_are_registered_soundly(self, form, decays):
        query, key, value, rows, *_ = leaves(make_tensors(form, 5, heads=1), device=DEVICE)
        initial = (1 + torch.rand(BATCH, 3, WIDTH, dtype=torch.float64, device=DEVICE)).requires_grad_()
        decay = torch.rand(key.shape[2], dtype=torch.float64, device=DEVICE, requires_grad=True)
        rates = decay if decays else None
        torch.library.opcheck(ops_triton._windowed, (query, key, value, rows, initial, rates, "sigmoid"))
