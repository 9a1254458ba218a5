"""The Triton kernels of AFT-full against the plain formula, see triton_tests.py."""

import importlib.util
import math

import pytest
import torch
from triton_tests import DEVICE, RUNS_HERE, TOLERANCE, patch_once, run_under_interpreter  # noqa: F401

from modeling_aft.ops import aft_attention


if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from aft.triton_kernels import H100, compiling_for, resources  # noqa: E402
from modeling_aft import ops_triton_full  # noqa: E402


BATCH = 2
both = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter():
    run_under_interpreter(__file__)


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.parametrize(
    ("architecture", "dtype", "causal"),
    [
        *[("sm_90", torch.bfloat16, True), ("sm_90", torch.float32, False)],
        *[("sm_80", torch.bfloat16, False), ("sm_100", torch.bfloat16, True)],
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compile_for_a_gpu(architecture, dtype, causal):
    """Every kernel of both directions, from the call to machine code, with products on tensor cores that are fed by
    copies ahead of time; with several of all that there can be one of."""
    key, value, bias = leaves(make_tensors(300, heads=2, width=320)[1:], dtype)
    with compiling_for(architecture, H100[1]) as compiled:
        ops_triton_full.full_triton(key, value, bias[:, 0], causal).sum().backward()
    products = {"_forward", "_backward_keys", "_backward_bias"}
    laid_out = {"_lay_out_pairs", "_lay_out_factors", "_lay_out_gradients"}
    assert set(compiled) == products | laid_out | {f"{name}_in_log_space" for name in products}
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[architecture]
    for name, kernel in compiled.items():
        found = resources(kernel)
        assert kernel.asm["cubin"] and 0 < found["registers"] <= 255 and found["spill_stores"] < 300, name
        if name in products:
            assert instruction in kernel.asm["ptx"] and "cp.async.c" in kernel.asm["ptx"], name


def make_tensors(length, heads=1, width=8, keys=None):
    """query, key, value and a table of biases, in float64."""
    draw = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
    tensors = [draw(BATCH, length, width), draw(BATCH, length, keys or width), draw(BATCH, length, width)]
    return [*tensors, draw(heads, 1, length, length)]


def leaves(tensors, dtype=torch.float64, device="cpu"):
    """Copies that take gradients, biases in at least float32."""
    *inputs, bias = tensors
    copies = [t.to(device, dtype, copy=True) for t in inputs]
    copies.append(bias.to(device, torch.promote_types(dtype, torch.float32), copy=True))
    return [t.requires_grad_() for t in copies]


def results(tensors, backend, causal=True, mask=None):
    """The output and the gradients of a random function of it."""
    mask = None if mask is None else mask.to(tensors[0].device)
    out = aft_attention(*tensors, causal=causal, attention_mask=mask, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), tensors)]


def assert_agree(tensors, dtype=torch.float64, **options):
    """The kernels on `dtype` copies against the reference on float64 copies of the same numbers."""
    tensors = [t.to(dtype).double() for t in tensors]
    actual = results(leaves(tensors, dtype, DEVICE), "full_triton", **options)
    expected = results(leaves(tensors), "reference", **options)
    assert actual[0].dtype == dtype
    assert expected[0].abs().max() > 0
    for a, e in zip(actual, expected, strict=True):
        tolerance = TOLERANCE[dtype]
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.cpu().double(), e, rtol=tolerance, atol=tolerance * scale)


class TestKernels:
    __test__ = RUNS_HERE

    @both
    @pytest.mark.parametrize("length", [1, 7, 16, 40] if DEVICE == "cpu" else [1, 2, 31, 128, 129, 300, 1000])
    def test_match_the_reference(self, length, causal):
        assert_agree(make_tensors(length), causal=causal)

    @both
    @pytest.mark.parametrize(
        ("heads", "keys", "width"), [(1, 1, 5), (1, 3, 9), (2, 4, 12), (3, 3, 3)], ids=lambda size: str(size)
    )
    def test_heads_of_the_bias_and_shared_keys(self, heads, keys, width, causal):
        assert_agree(make_tensors(20, heads=heads, keys=keys, width=width), causal=causal)

    @pytest.fixture(params=["rows", "columns"])
    def small(self, request, monkeypatch):
        """Many tiles and blocks of little, which differ in all their sizes and in both directions: in float64 and
        float32 tiles of 32 x 16 and 16 x 32, 16 deep, in blocks of 32."""
        wide = {"rows": 64, "columns": 32, "depth": 32, "num_warps": 4, "num_stages": 2}
        long = {**wide, "rows": 32, "columns": 64}
        layouts = (
            {"forward": wide, "backward": long} if request.param == "rows" else {"forward": long, "backward": wide}
        )
        monkeypatch.setattr(ops_triton_full, "_SIDE", 32)
        monkeypatch.setattr(ops_triton_full, "layout_of", lambda form, direction, device: layouts[direction])

    @both
    def test_many_blocks_of_which_the_last_are_not_full(self, causal, small):
        assert_agree(make_tensors(70, heads=2, width=44), causal=causal)

    def test_the_gradient_of_the_bias_in_splits(self, monkeypatch):
        monkeypatch.setattr(ops_triton_full, "processor", lambda device: ("default", 100))
        splits, plan = [], ops_triton_full._plan
        monkeypatch.setattr(
            ops_triton_full, "_plan", lambda *args: splits.append(plan(*args)[0].splits) or plan(*args)
        )
        assert_agree(make_tensors(16, width=100))
        assert max(splits) == 3

    @both
    def test_through_the_public_function(self, causal):
        """Padding at the beginning, in the middle and at the end, and a row of nothing else; and longer than the
        table."""
        tensors = make_tensors(20)
        mask = torch.ones(BATCH, 20, dtype=torch.long)
        mask[0, :3], mask[1, 5], mask[1, 17:] = 0, 0, 0
        assert_agree(tensors, causal=causal, mask=mask)
        assert_agree([*tensors[:3], tensors[3][..., :19, :19].contiguous()], causal=causal, mask=mask)
        mask[1] = 0
        assert_agree(tensors, causal=causal, mask=mask)

    def test_a_state_to_go_on_from(self):
        tensors = [t.to(DEVICE) for t in make_tensors(20)]
        first, rest = ([t[:, part] for t in tensors[:3]] for part in (slice(0, 12), slice(12, 20)))
        found = []
        for backend in ("full_triton", "full"):
            out, state = aft_attention(*first, tensors[3], return_state=True, backend=backend)
            found.append(torch.cat([out, aft_attention(*rest, tensors[3], initial_state=state, backend="full")], 1))
        torch.testing.assert_close(*found)
        with pytest.raises(ValueError, match="'full_triton' is for AFT-full at the positions 0, 1, ..."):
            aft_attention(*rest, tensors[3], initial_state=state, backend="full_triton")

    def test_biases_of_minus_infinity(self):
        """They hide a key, and a query that sees none gives 0, with zero gradients."""
        query, key, value, bias = make_tensors(20)
        hidden = bias.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -math.inf)
        ours = [results(leaves(t, device=DEVICE), "full_triton", causal=c) for t, c in
                (([query, key, value, hidden], False), ([query, key, value, bias], True))]  # fmt: skip
        for a, b in zip(*ours, strict=True):
            torch.testing.assert_close(a, b)
        hidden[..., 3, :] = -math.inf
        out, *grads = results(leaves([query, key, value, hidden], device=DEVICE), "full_triton", causal=False)
        assert (out[:, 3] == 0).all() and (out[:, 4] != 0).all()
        assert all(grad.isfinite().all() for grad in grads) and (grads[3][..., 3, :] == 0).all()

    @both
    @pytest.mark.parametrize("kind", ["scaled", "offset", "jump up", "jump down", "bias", "values"])
    def test_extreme_inputs(self, kind, causal):
        """Some need log space in some tiles of some columns."""
        tensors = make_tensors(20 if DEVICE == "cpu" else 200)
        key, bias = tensors[1], tensors[3]
        if kind == "scaled":
            key *= 1e4
        elif kind == "offset":  # which cancels
            key[:, :, :4] += 1e5
            bias[..., 7, :] -= 1e6
        elif kind == "jump up":
            key[1, 10:, :3] += 200
            key[1, -3, :3] += 200
        elif kind == "jump down":
            key[:, 10:] -= 200
        elif kind == "values":  # of keys that hardly count, in rows of small denominators
            key[:, 19] += 50
            key[:, 0], tensors[2][:, 0] = -120, 1e20
        else:
            key[:, 10], key[:, 12] = 200, -100
            bias[..., 1:3], bias[..., 3] = -400, 100
        assert_agree(tensors, torch.float64 if kind == "scaled" else torch.float32, causal=causal)

    def test_log_space_in_several_blocks(self, small):
        tensors = make_tensors(40, heads=2, width=40)
        tensors[1][1, 30:, 3:25] += 200
        assert_agree(tensors, torch.float32)

    def test_values_that_are_too_large_for_sums(self):
        query, key, value, bias = make_tensors(20)
        values = torch.full_like(value, 1e38, dtype=torch.float32, device=DEVICE)
        inputs = key.float().to(DEVICE), values, bias[:, 0].float().to(DEVICE)
        torch.testing.assert_close(ops_triton_full.full_triton(*inputs, True), values)

    def test_gradients_that_are_too_large_for_products(self):
        """Of denominators that are small, but not so small that the forward pass needs log space."""
        tensors = make_tensors(20)
        tensors[1][:, 19] += 50
        inputs = leaves(tensors, torch.float32, DEVICE), leaves(tensors)
        found = []
        for given, backend in zip(inputs, ("full_triton", "reference"), strict=True):
            out = aft_attention(*given, backend=backend)
            found.append(torch.autograd.grad(out, given, torch.full_like(out, 1e12)))
        for a, e in zip(*found, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a.cpu().double(), e, rtol=1e-4, atol=1e-4 * e.abs().max().item())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    def test_dtypes(self, dtype):
        assert_agree(make_tensors(40, width=16), dtype)

    def test_slices_of_one_projection(self):
        fused = torch.randn(BATCH, 20, 24, dtype=torch.float64, device=DEVICE, requires_grad=True)
        table = torch.randn(1, 30, 30, dtype=torch.float64, device=DEVICE)[:, :20, :20]
        parts = fused.split(8, -1)[1:]
        copies = [t.detach().clone().requires_grad_() for t in parts]
        slices = ops_triton_full.full_triton(*parts, table, True)
        whole = ops_triton_full.full_triton(*copies, table.contiguous(), True)
        assert torch.equal(slices, whole)
        grad = torch.randn_like(whole).transpose(0, 1).contiguous().transpose(0, 1)
        grads = torch.cat(torch.autograd.grad(whole, copies, grad), -1)
        assert torch.equal(torch.autograd.grad(slices, fused, grad)[0][..., 8:], grads)

    def test_the_same_in_every_run_and_under_autocast(self):
        once, again = (results(leaves(make_tensors_of(0), torch.float32, DEVICE), "full_triton") for _ in range(2))
        with torch.autocast(DEVICE, torch.bfloat16):
            under = results(leaves(make_tensors_of(0), torch.float32, DEVICE), "full_triton")
        for a, b, c in zip(once, again, under, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)

    def test_second_derivatives(self):
        found = []
        for backend in ("full_triton", "full"):
            tensors = leaves(make_tensors_of(0), device=DEVICE)
            out = aft_attention(*tensors, backend=backend)
            grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e)

    def test_compiles_as_one_graph(self):
        torch._dynamo.reset()
        tensors = make_tensors(20)
        inputs = [leaves(tensors, device=DEVICE) for _ in range(2)]
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"

        def average(query, key, value, bias):
            return ops_triton_full.full_triton(key, value, bias[:, 0], True)

        compiled = torch.compile(average, fullgraph=True, backend=backend)
        outs = [function(*given) for function, given in zip((average, compiled), inputs, strict=True)]
        grads = [torch.autograd.grad(out.sum(), given[1:]) for out, given in zip(outs, inputs, strict=True)]
        for a, e in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(a, e)

    def test_many_lengths_make_few_graphs(self):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(ops_triton_full.full_triton, fullgraph=True, dynamic=True, backend=counter)
        for length in (9, 17, 20, 23, 30, 37, 45):
            _, key, value, bias = (t.to(DEVICE) for t in make_tensors(length))
            compiled(key, value, bias[:, 0], True)
        assert counter.frame_count <= 2

    def test_biases_of_other_lengths_are_refused(self):
        _, key, value, bias = make_tensors(20)
        for wrong in (bias[:, 0, :19], bias[:, 0, :, :19]):
            with pytest.raises(ValueError, match=r"`bias` must be \[h, 20, 20\], for 20 tokens, got \(1, "):
                ops_triton_full.full_triton(key.to(DEVICE), value.to(DEVICE), wrong.to(DEVICE), True)

    @both
    def test_operators_are_registered_soundly(self, causal):
        _, key, value, bias = leaves(make_tensors(5), device=DEVICE)
        torch.library.opcheck(ops_triton_full._full, (key, value, bias[:, 0].detach().requires_grad_(), causal))


def make_tensors_of(seed):
    torch.manual_seed(seed)
    return make_tensors(20)
