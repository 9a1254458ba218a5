"""AFT-conv of a picture, and AFT-full with heads: every kernel against the plain formula, for any finite input."""

import math

import onnx_ir
import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from modeling_aft import ops, ops_grid
from modeling_aft.ops import aft_attention, aft_attention_weights
from modeling_aft.ops_state import Call


BATCH, WIDTH = 3, 8
CONVOLUTION, KERNELS = "grid_convolution", ["grid_convolution", "grid_dense", "grid_export", "grid_composed"]
FULL_KERNELS = ["full", "full_export", "full_composed"]
# Grid, kernel, heads, key channels.
SIZES = {
    "smaller-kernel": ((4, 5), (3, 3), 4, 8),
    "one-head": ((4, 4), (5, 3), 1, 8),
    "head-for-each-channel": ((3, 6), (3, 5), 8, 8),
    "narrow-keys": ((4, 5), (3, 5), 4, 4),
    "one-narrow-key": ((4, 5), (3, 5), 1, 1),
    "larger-kernel": ((3, 4), (9, 11), 2, 4),
    "kernel-that-is-taller": ((2, 6), (7, 3), 2, 8),
    "single-place": ((1, 1), (3, 3), 2, 2),
    "column": ((7, 1), (3, 3), 2, 2),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
kernels = pytest.mark.parametrize("kernel", KERNELS)


def make_inputs(size, dtype=torch.float64, batch=BATCH, scale=1.0):
    (rows, columns), sides, heads, keys = size
    query, value = torch.randn(2, batch, rows * columns, WIDTH, dtype=dtype)
    key = torch.randn(batch, rows * columns, keys, dtype=dtype)
    return [query, key, value, scale * torch.randn(heads, *sides, dtype=dtype)]


def make_mask(size):
    """Holes in the first row, none in the second, and no token in the third."""
    rows, columns = size[0]
    mask = torch.ones(BATCH, rows * columns, dtype=torch.long)
    mask[0, ::3], mask[2] = 0, 0
    return mask


def attend(tensors, size, **options):
    *inputs, window_bias = tensors
    return aft_attention(*inputs, window_bias=window_bias, grid=size[0], causal=False, **options)


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


def formula(query, key, value, kernel, grid):
    """Eq. 6 in two dimensions, term by term: an oracle that shares no code with the package."""
    rows, columns = grid
    heads, kernel_rows, kernel_columns = kernel.shape
    bias = torch.zeros(heads, rows, columns, rows, columns, dtype=key.dtype)
    for y in range(rows):
        for x in range(columns):
            for a in range(kernel_rows):
                for b in range(kernel_columns):
                    other = y - (a - (kernel_rows - 1) // 2), x - (b - (kernel_columns - 1) // 2)
                    if 0 <= other[0] < rows and 0 <= other[1] < columns:
                        bias[:, y, x, other[0], other[1]] = kernel[:, a, b]
    bias = bias.flatten(3).flatten(1, 2).repeat_interleave(WIDTH // heads, 0).permute(1, 2, 0)  # [T, T', D]
    logits = key.repeat_interleave(WIDTH // key.shape[-1], -1)[:, None] + bias
    return torch.sigmoid(query) * (logits.softmax(2) * value[:, None]).sum(2)


@sizes
def test_the_reference_is_the_formula(size):
    tensors = make_inputs(size)
    torch.testing.assert_close(attend(tensors, size, backend="reference"), formula(*tensors, size[0]))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@kernels
@sizes
def test_every_kernel_matches_the_reference(size, kernel, masked):
    tensors, mask = make_inputs(size), make_mask(size) if masked else None
    options = {"attention_mask": mask, "query_activation": "tanh"}
    expected = with_gradients(lambda t: attend(t, size, **options, backend="reference"), tensors)
    assert_agree(with_gradients(lambda t: attend(t, size, **options, backend=kernel), tensors), expected)


@kernels
def test_padding_changes_nothing(kernel):
    """Whatever stands there; places stay where they are."""
    size = SIZES["narrow-keys"]
    tensors, mask = make_inputs(size), make_mask(size)
    clean = attend(tensors, size, attention_mask=mask, backend=kernel)
    query, key, value, _ = tensors
    query[mask == 0], key[mask == 0], value[mask == 0] = math.nan, 1e4, math.nan
    out = attend(tensors, size, attention_mask=mask, backend=kernel)
    assert (out[mask == 0] == 0).all()
    torch.testing.assert_close(out, clean)
    torch.testing.assert_close(out[:1], formula(*_without_padding(tensors, mask), size[0])[:1] * mask[:1, :, None])


def _without_padding(tensors, mask):
    """The first row alone, with keys at padded places that do not count."""
    query, key, value, kernel = (tensor.clone() for tensor in tensors)
    query[mask == 0], key[mask == 0], value[mask == 0] = 0, -1e4, 0
    return query[:1], key[:1], value[:1], kernel


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_grid_of_one_row_is_the_window_of_a_text(kernel):
    size = (1, 19), (1, 7), 4, 8
    tensors = make_inputs(size)
    expected = aft_attention(*tensors[:3], window_bias=tensors[3], causal=False)
    torch.testing.assert_close(attend(tensors, size, backend=kernel), expected)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_kernel_of_zeros_sees_all_places_alike(kernel):
    size = SIZES["smaller-kernel"]
    *inputs, window_bias = make_inputs(size)
    out = attend([*inputs, torch.zeros_like(window_bias)], size, backend=kernel)
    torch.testing.assert_close(out, aft_attention(*inputs, causal=False))


def hard(kind, tensors):
    query, key, value, kernel = tensors
    heads, tall, wide = kernel.shape
    if kind == "keys-spread-over-200":
        key = key + 200 * torch.randint(-1, 2, key.shape)
    elif kind == "keys-far-below":
        key = key - 1e4
    elif kind == "one-key-far-above":
        key = key.index_add(1, torch.tensor([7]), torch.full_like(key[:, :1], 60.0))
    elif kind == "biases-of-minus-5":
        kernel = kernel.clamp(-0.5, 0.5) - 5
    elif kind == "biases-of-minus-50":
        kernel = kernel - 50
    elif kind == "biases-of-100":
        kernel = kernel + 100
    elif kind == "biases-of-both-signs":
        kernel = kernel * 100
    elif kind == "one-steep-head":
        kernel = torch.cat([kernel[:1] - 50, kernel[1:]])
    elif kind == "own-place-alone-is-hidden":
        key[:, 7] += 60
        kernel = kernel.clone()
        kernel[:, tall // 2, wide // 2] = -100
    elif kind == "values-of-1e34":
        value, kernel = value * 1e34, kernel + 8  # whose products with exp(w) are beyond float32
    elif kind == "one-value-of-1e8":
        value[:, 7] *= 1e8
    return [query, key, value, kernel]


HARD = [
    "plain",
    "keys-spread-over-200",
    "keys-far-below",
    "one-key-far-above",
    "biases-of-minus-5",
    "biases-of-minus-50",
    "biases-of-100",
    "biases-of-both-signs",
    "one-steep-head",
    "own-place-alone-is-hidden",
    "values-of-1e34",
    "one-value-of-1e8",
]


@pytest.mark.parametrize("upstream", [1.0, 1e25, 1e-30], ids=["", "large-gradients", "small-gradients"])
@pytest.mark.parametrize("kind", HARD)
def test_exact_for_any_finite_input(kind, upstream):
    """float32 against the reference in float64, outputs and gradients."""
    if kind == "values-of-1e34" and upstream > 1:
        pytest.skip("the gradients are beyond float32")
    size = (5, 6), (5, 7), 4, 8
    single = [tensor.float() for tensor in hard(kind, make_inputs(size))]
    double = [tensor.double() for tensor in single]
    expected = with_gradients(lambda t: attend(t, size, backend="reference"), double, upstream)
    for kernel in (CONVOLUTION, "grid_dense"):
        found = with_gradients(lambda t, kernel=kernel: attend(t, size, backend=kernel), single, upstream)
        tolerance = 1e-2 if kind == "keys-far-below" else 1e-4
        assert_agree(found[:1], expected[:1], tolerance)
        assert_agree(found[1:], expected[1:], tolerance, scale=upstream)


def test_a_small_output_beside_a_large_value_keeps_its_digits():
    """What a convolution adds and takes away again may be larger by many orders than what is left."""
    size = (6, 6), (5, 5), 1, 8
    query, key, value, kernel = (tensor.float() for tensor in make_inputs(size, batch=1))
    value[:, 0], kernel = 1e8, torch.full_like(kernel, -40.0)
    key[:, 0] = 0
    tensors = [query, key, value, kernel]
    expected = attend([tensor.double() for tensor in tensors], size, backend="reference")
    near = torch.arange(36).unflatten(0, size[0])[:3, :3].flatten()
    assert expected[:, near].abs().max() < 100
    torch.testing.assert_close(attend(tensors, size).double(), expected, rtol=1e-4, atol=1e-4)


def test_only_steep_heads_take_the_dense_form(monkeypatch):
    taken = []
    dense = ops_grid._dense
    monkeypatch.setattr(ops_grid, "_dense", lambda *tensors: taken.append(tensors[2].shape[0]) or dense(*tensors))
    size = (5, 6), (5, 7), 4, 8
    tensors = make_inputs(size, torch.float32)
    for bias, heads in ((0.0, []), (-2.0, []), (8.0, [])):
        attend([*tensors[:3], tensors[3].clamp(-3, 3) + bias], size)
        assert taken == heads
    for rows, count in ((slice(0, 1), 1), (slice(1, 4), 3), (slice(None), 4)):
        for bias in (-9.0, 20.0):
            taken.clear()
            kernel = tensors[3].clone()
            kernel[rows, 1, 1] = bias
            attend([*tensors[:3], kernel], size)
            assert taken == [count]


def test_the_table_chooses_what_pays():
    def name(dtype):
        query, key, value, kernel = make_inputs(SIZES["smaller-kernel"], dtype)
        call = Call(query, key, value, window_bias=kernel, causal=False, grid=(4, 5))
        return ops.choose(ops.TABLES, call).name

    assert name(torch.float32) == name(torch.bfloat16) == CONVOLUTION
    assert name(torch.float64) == "grid_dense"


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs(kernel, dtype):
    """Only the inputs and the output are rounded."""
    size = (5, 6), (5, 7), 4, 4
    half = [tensor.to(dtype) for tensor in make_inputs(size)]
    expected = with_gradients(lambda t: attend(t, size, backend="reference"), [tensor.double() for tensor in half])
    found = with_gradients(lambda t: attend(t, size, backend=kernel), half)
    assert {tensor.dtype for tensor in found} == {dtype}
    assert_agree(found, expected, 1e-2)


def test_autocast_does_not_reach_the_sums():
    size = SIZES["smaller-kernel"]
    tensors = make_inputs(size, torch.float32)
    expected = with_gradients(lambda t: attend(t, size), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agree(with_gradients(lambda t: attend(t, size), tensors), expected, 1e-6)


@kernels
@pytest.mark.parametrize("size", ["narrow-keys", "larger-kernel"])
def test_gradcheck(size, kernel):
    size = SIZES[size]
    tensors = [tensor.requires_grad_() for tensor in make_inputs(size, batch=2)]
    mask = make_mask(size)[:2]
    assert torch.autograd.gradcheck(
        lambda *t: attend(t, size, attention_mask=mask, backend=kernel), tensors, fast_mode=True
    )


def test_second_derivatives():
    size = (2, 3), (3, 3), 2, 4
    tensors = [tensor.requires_grad_() for tensor in make_inputs(size, batch=1)]
    for kernel in (CONVOLUTION, "grid_dense"):
        assert torch.autograd.gradgradcheck(
            lambda *t, kernel=kernel: attend(t, size, backend=kernel), tensors, fast_mode=True
        )


def test_transforms_of_torch_func():
    """Gradients of each sample, and forward-mode derivatives."""
    size = SIZES["narrow-keys"]
    *inputs, kernel = make_inputs(size)
    mask = make_mask(size)

    def loss(inputs, kernel, mask):
        return attend([*inputs, kernel], size, attention_mask=mask).square().sum()

    of_sample = vmap(grad(lambda i, k, m: loss([t[None] for t in i], k, m[None]), argnums=1), (0, None, 0))
    found = of_sample(inputs, kernel, mask)
    for row in range(BATCH):
        leaf = kernel.clone().requires_grad_()
        one = loss([tensor[row : row + 1] for tensor in inputs], leaf, mask[row : row + 1])
        torch.testing.assert_close(found[row], torch.autograd.grad(one, leaf)[0])
    _, tangent = jvp(lambda k: loss(inputs, k, mask), (kernel,), (torch.ones_like(kernel),))
    torch.testing.assert_close(tangent, found.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["convolution", "dense"])
def test_one_compiled_graph_serves_many_grids(dtype):
    torch._dynamo.reset()
    kernel = torch.randn(4, 5, 5, dtype=dtype, requires_grad=True)

    def mixed(pictures):
        tokens = pictures.flatten(2).mT
        return attend([tokens, tokens, tokens, kernel], (pictures.shape[2:],))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixed, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns in ((9, 6), (7, 5), (3, 9), (8, 2)):
        pictures = torch.randn(2, WIDTH, rows, columns, dtype=dtype)
        found, expected = compiled(pictures), mixed(pictures)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(out.square().sum(), kernel)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, pictures, mask):
        tokens = pictures.flatten(2).mT
        return attend([tokens, tokens, tokens, self.kernel], (pictures.shape[2:],), attention_mask=mask)


def test_exports_with_a_dynamic_grid():
    rows, columns, batch = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns", "batch"))
    sizes = {"pictures": {0: batch, 2: rows, 3: columns}, "mask": {0: batch, 1: torch.export.Dim.DYNAMIC}}
    model = Mixer()
    example = torch.randn(2, WIDTH, 4, 7), torch.ones(2, 28, dtype=torch.bool)
    program = torch.export.export(model, example, dynamic_shapes=sizes)
    pictures, mask = torch.randn(3, WIDTH, 6, 2), torch.ones(3, 12, dtype=torch.bool)
    mask[0, 3:], mask[2] = False, False
    expected = model(pictures, mask)
    torch.testing.assert_close(program.module()(pictures, mask), expected)
    graph = onnx_ir.to_proto(torch.onnx.export(program, (), dynamo=True, verbose=False).model)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pictures": pictures.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected.detach())


def test_operators_pass_opcheck():
    query, key, value, kernel = (tensor.requires_grad_() for tensor in make_inputs(SIZES["narrow-keys"]))
    for convolve in (True, False):
        torch.library.opcheck(ops_grid.grid_average, (key, value, kernel, 4, 5, convolve))


def test_operations_are_counted():
    (rows, columns), sides, heads, keys = size = (4, 5), (3, 11), 4, 4
    tensors = [tensor.requires_grad_() for tensor in make_inputs(size)]
    channels = BATCH * (keys + WIDTH)

    def counted(kernel):
        with FlopCounterMode(display=False) as forward:
            out = attend(tensors, size, backend=kernel)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    pairs = 2 * (rows * columns) ** 2 * channels
    assert counted("grid_dense") == (pairs, 2 * pairs)
    taps = 2 * rows * columns * 3 * 9 * channels  # columns are at most 4 apart
    of_rows = 2 * (rows + 2 * (rows - 1)) * columns**2 * channels
    assert counted(CONVOLUTION) == (taps, taps + of_rows)


@sizes
def test_weights_are_those_of_the_average(size):
    (query, key, value, kernel), mask = make_inputs(size), make_mask(size)
    weights = aft_attention_weights(key, window_bias=kernel, grid=size[0], causal=False, attention_mask=mask)
    out = attend([query, key, value, kernel], size, attention_mask=mask, query_activation="identity")
    weights = weights.repeat_interleave(WIDTH // key.shape[-1], 1)
    torch.testing.assert_close(query * (weights @ value.mT[..., None]).squeeze(-1).mT, out)


def test_nothing_that_is_given_is_written_into():
    size = SIZES["narrow-keys"]
    tensors = make_inputs(size, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    upstream = torch.randn(BATCH, 20, WIDTH)
    given = upstream.clone()
    torch.autograd.grad(attend(leaves, size, query_activation="identity"), leaves, given)
    for found, expected in zip([*leaves, given], [*tensors, upstream], strict=True):
        assert torch.equal(found, expected)


STATE = aft_attention(*(torch.zeros(BATCH, 20, WIDTH) for _ in range(3)), return_state=True)[1]
KERNEL = torch.zeros(4, 3, 3)
REFUSED = {
    "causal": ({"causal": True}, "`causal` must be False with a grid"),
    "position-bias": ({"position_bias": torch.zeros(20, 20), "window_bias": None}, "`position_bias` must be None"),
    "position-ids": ({"position_ids": torch.arange(20)[None]}, "`position_ids` must be None with a grid"),
    "decay": ({"decay": torch.ones(8)}, "`decay` must be None with a grid"),
    "documents": ({"seq_idx": torch.zeros(BATCH, 20, dtype=torch.long)}, "`seq_idx` must be None with a grid"),
    "state": ({"initial_state": STATE}, "`initial_state` must be None with a grid"),
    "return-state": ({"return_state": True}, "`return_state` must be False with a grid"),
    "product": ({"grid": (4, 6)}, r"`grid` must be two positive ints.*20 tokens, got \(4, 6\)"),
    "negative-side": ({"grid": (-4, -5)}, "`grid` must be two positive ints"),
    "float-side": ({"grid": (4.0, 5)}, "`grid` must be two positive ints"),
    "one-side": ({"grid": (20,)}, "`grid` must be two positive ints"),
    "no-kernel": ({"window_bias": None}, r"`window_bias` must be \[h, kh, kw\] .*None"),
    "even-rows": ({"window_bias": torch.zeros(4, 2, 3)}, r"`window_bias` .*odd, got \(4, 2, 3\)"),
    "even-columns": ({"window_bias": torch.zeros(4, 3, 0)}, r"`window_bias` .*odd, got \(4, 3, 0\)"),
    "two-dimensions": ({"window_bias": torch.zeros(3, 3)}, r"`window_bias` .*\(3, 3\)"),
    "four-dimensions": ({"window_bias": torch.zeros(4, 1, 3, 3)}, r"`window_bias` must be \[h, kh, kw\]"),
    "heads": ({"window_bias": torch.zeros(3, 3, 3)}, "`window_bias` .*divisor of the 8 key channels"),
    "mask": ({"attention_mask": torch.ones(BATCH, 4, 5)}, "`attention_mask` must be"),
    "another-kernel": ({"backend": "chunks"}, "'chunks' is for forms with a window"),
    "full-kernel": ({"backend": "full"}, "'full' is for AFT-full"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_name_the_argument(options, message):
    tensors = (torch.zeros(BATCH, 20, WIDTH) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        aft_attention(*tensors, **{"window_bias": KERNEL, "grid": (4, 5), "causal": False, **options})


@kernels
def test_kernels_of_grids_are_for_grids_alone(kernel):
    tensors = [torch.zeros(BATCH, 20, WIDTH) for _ in range(3)]
    for bias in ({}, {"position_bias": torch.zeros(20, 20)}, {"window_bias": torch.zeros(4, 1, 3)}):
        with pytest.raises(ValueError, match=f"'{kernel}' is for calls with a grid"):
            aft_attention(*tensors, **bias, causal=False, backend=kernel)


# AFT-full with heads


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


def test_a_grid_is_full_with_a_table_for_each_head():
    size = SIZES["narrow-keys"]
    tensors = make_inputs(size)
    table = ops_grid.pair_bias(tensors[3], *size[0])[:, None]
    torch.testing.assert_close(attend(tensors, size), aft_attention(*tensors[:3], table, causal=False))


@pytest.mark.parametrize(
    "shape", [(4, 1, 9, 8), (4, 2, 9, 9), (3, 1, 9, 9), (4, BATCH, 8, 9), (9,), (1, 4, 1, 9, 9)], ids=str
)
def test_tables_of_heads_that_do_not_fit_are_refused(shape):
    query, key, value, _ = make_tables(4, 8)
    with pytest.raises(ValueError, match=r"`position_bias` must be \[N, N\].*divisor of the 8 key channels"):
        aft_attention(query, key, value, torch.zeros(shape))
