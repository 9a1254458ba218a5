"""Linear layers of few inputs per output: the formula, its gradients, what is drawn, what is saved."""

import math

import pytest
import torch
from families import make_config, make_ids, make_model
from torch import nn
from torch.func import grad
from transformers.activations import ACT2FN

from modeling_aft import AFTForCausalLM
from modeling_aft.modeling_linear import SparseLinear, activate, make_linear, project


def make_sparse(in_features=11, out_features=7, fan_in=3, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = SparseLinear(in_features, out_features, fan_in, bias).to(dtype)
    layer.draw_weights(0.5)
    return layer


def dense_weight(layer: SparseLinear) -> torch.Tensor:
    """[out, in] with the weights where the indices say."""
    zeros = layer.weight.new_zeros(layer.out_features, layer.in_features)
    return zeros.scatter_add(1, layer.indices.long(), layer.weight)


@pytest.mark.parametrize("shape", [(11,), (4, 11), (2, 5, 11)], ids=["vector", "matrix", "batch"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_output_and_gradients_are_those_of_a_dense_layer(bias, shape):
    layer = make_sparse(bias=bias)
    nn.init.normal_(layer.weight)
    if bias:
        nn.init.normal_(layer.bias)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [inputs, *layer.parameters()]
    found, expected = layer(inputs), nn.functional.linear(inputs, dense_weight(layer), layer.bias)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, parameters, weights) for out in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    of_inputs = grad(lambda inputs: (layer(inputs) * weights).sum())(inputs.detach())
    torch.testing.assert_close(of_inputs, torch.autograd.grad(layer(inputs), inputs, weights)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, inputs = make_sparse(dtype=torch.float32), torch.randn(4, 11)
    expected = layer(inputs)
    assert layer(inputs.to(dtype)).dtype == dtype  # what autocast hands on
    found = layer.to(dtype)(inputs.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_memory_for_the_gradients_does_not_grow_with_the_fan_in():
    saved = []
    for fan_in in (2, 8):
        kept, inputs = [], torch.randn(500, 16, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()), lambda t: t):
            make_sparse(16, 64, fan_in)(inputs)
        saved.append(sum(kept))
    assert saved[1] - saved[0] <= 64 * 6 * 4  # weights and indices alone


@pytest.mark.parametrize("fan_in", [1, 4, 10, 11])
def test_indices_are_drawn_without_repetition_and_reach_every_input(fan_in):
    layer = make_sparse(11, 2000, fan_in)
    rows = layer.indices.sort(1).values
    assert rows.dtype == torch.int32 and rows.min() == 0 and rows.max() == 10
    assert bool((rows[:, 1:] > rows[:, :-1]).all())
    share = torch.bincount(layer.indices.flatten(), minlength=11) / 2000
    torch.testing.assert_close(share, torch.full((11,), fan_in / 11), atol=0.05, rtol=0)  # 4.5 standard deviations


def test_outputs_begin_as_large_as_those_of_a_dense_layer():
    torch.manual_seed(0)
    inputs = torch.randn(100, 256)
    layer, dense = make_sparse(256, 400, 4, dtype=torch.float32), nn.Linear(256, 400)
    nn.init.normal_(dense.weight, std=0.5)
    nn.init.zeros_(dense.bias)
    assert layer(inputs).std().item() == pytest.approx(dense(inputs).std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("fan_in", "expected"), [(None, nn.Linear), (3, SparseLinear), (8, nn.Linear), (9, nn.Linear)], ids=str
)
def test_a_layer_is_sparse_where_it_has_more_inputs(fan_in, expected):
    assert type(make_linear(make_config("conv", linear_fan_in=fan_in), 8, 5)) is expected


def test_models_draw_their_indices_and_keep_them(tmp_path):
    torch.manual_seed(0)
    model = AFTForCausalLM(make_config("z1t")).eval()
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 8 and not torch.equal(layers[0].indices, layers[4].indices)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = AFTForCausalLM.from_pretrained(tmp_path)
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    torch.testing.assert_close(loaded(make_ids(9)).logits, model(make_ids(9)).logits)


def test_the_dense_model_with_the_same_weights_says_the_same():
    sparse, dense = make_model("z1t"), make_model("z1t", linear_fan_in=None)
    weights = {name: tensor for name, tensor in sparse.state_dict().items() if not name.endswith("indices")}
    for name, module in sparse.named_modules():
        if isinstance(module, SparseLinear):
            weights[f"{name}.weight"] = dense_weight(module)
    dense.load_state_dict(weights)
    torch.testing.assert_close(sparse(make_ids(20)).logits, dense(make_ids(20)).logits)


# A few rows on a CPU


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, out: 2 * out)
    return layer


def replaced(layer):
    """As libraries do that move weights where they are needed."""
    layer.forward = lambda inputs: 2 * nn.Linear.forward(layer, inputs)
    return layer


def quantized(layer):
    """With weights that say themselves how they are multiplied."""

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            out = super().__torch_function__(function, types, args, kwargs or {})
            return 2 * out if function is nn.functional.linear else out

    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    return layer


class Adapted(nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (8, 1), (9,), (4, 0), ()], ids=str)
def test_any_number_of_rows_gives_what_the_layer_gives(shape, bias, seen):
    torch.manual_seed(0)
    layer, hidden = nn.Linear(6, 10, bias=bias), torch.randn(*shape, 6)
    expected = layer(hidden)
    found = project(layer, hidden)
    assert torch.equal(found, expected) and found.requires_grad
    with torch.no_grad():
        del seen[:]
        found = project(layer, hidden)
    torch.testing.assert_close(found, expected.detach())
    assert found.is_contiguous() and found.shape == (*shape, 10)
    assert bool(seen) != (math.prod(shape) in (1, 3, 4, 8))


@pytest.fixture
def seen(monkeypatch):
    """The calls of `nn.Linear`."""
    calls, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, inputs: calls.append(inputs.shape) or forward(self, inputs))
    return calls


def adapted(layer):
    return Adapted(6, 10)


@pytest.mark.parametrize("change", [hooked, replaced, quantized, adapted])
def test_a_layer_that_does_more_is_called(change):
    torch.manual_seed(0)
    layer, hidden = change(nn.Linear(6, 10)), torch.randn(4, 6)
    with torch.no_grad():
        plain = hidden @ layer.weight.as_subclass(torch.Tensor).T + layer.bias
        torch.testing.assert_close(project(layer, hidden).as_subclass(torch.Tensor), 2 * plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_graphs_take_the_layer_itself(dtype):
    layer, hidden = nn.Linear(6, 10, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(project(layer, hidden), layer(hidden))
        layer, hidden = layer.float(), hidden.float()
        traced = torch.compile(project, backend="eager", fullgraph=True)
        assert torch.equal(traced(layer, hidden), layer(hidden))
        rows = torch.func.vmap(lambda rows: project(layer, rows))(hidden[None])
        torch.testing.assert_close(rows[0], layer(hidden))


def compiled(function, layer, hidden):
    """Its result, and whether the graph has a product of a matrix with a vector."""
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    found = torch.compile(function, backend=backend, fullgraph=True)(layer, hidden)
    return found, any("mv" in target for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_compiled_step_multiplies_one_row_with_a_matrix(bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(6, 10, bias=bias, dtype=dtype)
    for shape, expected in {(1, 1): True, (1,): True, (): True, (2, 1): False, (1, 3): False}.items():
        wide = torch.randn(*shape, 12, dtype=dtype)
        for hidden in (wide[..., :6], wide[..., 3:9], wide[..., ::2]):
            with torch.no_grad():
                found, is_vector = compiled(project, layer, hidden)
            assert is_vector == expected and found.shape == (*shape, 10)
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, layer(hidden).detach(), rtol=tolerance, atol=tolerance)
    assert not compiled(project, layer, hidden[:1, :1])[1]  # where gradients are recorded


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_is_left_open_is_no_single_row():
    layer, hidden, chosen = nn.Linear(6, 10), torch.randn(5, 6), torch.tensor([True, False, True, True, False])
    torch._dynamo.reset()
    function = torch.compile(lambda hidden, chosen: project(layer, hidden[chosen]), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(function(hidden, chosen), layer(hidden[chosen]))


@pytest.mark.parametrize("change", [hooked, replaced, quantized, adapted, "autocast", "mixed"])
def test_a_compiled_layer_that_does_more_is_called(change):
    layer, hidden = nn.Linear(6, 10), torch.randn(1, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=isinstance(change, str)):
        layer = layer.bfloat16() if change == "mixed" else layer if change == "autocast" else change(layer)
        expected = layer(hidden)
        found, is_vector = compiled(project, layer, hidden)
    assert not is_vector and found.dtype == expected.dtype
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_inductor_gives_what_the_layer_gives():
    """Of inputs, and of what is computed before: whole, a part, and every second number; with what comes after."""
    torch.manual_seed(0)
    layer, norm, wide = nn.Linear(70, 30), nn.LayerNorm(70), nn.LayerNorm(140)

    def step(product, hidden):
        one, whole = norm(hidden[:, -1:, 70:]), wide(hidden)[:, -1:]
        rows = (hidden[:, -1:, 7:77], hidden[:, :1, ::2], one, whole[..., 70:], whole[..., 3:73], whole[..., ::2])
        return [product(layer, row).sigmoid() + 1 for row in rows]

    torch._dynamo.reset()
    hidden = torch.randn(1, 4, 140)
    with torch.no_grad():
        found = torch.compile(lambda hidden: step(project, hidden), fullgraph=True)(hidden)
        torch.testing.assert_close(found, step(lambda layer, row: layer(row), hidden))


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 64), (64,), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_python", "silu"])
def test_activations_of_one_row_are_what_their_modules_say(name, shape):
    act_fn, hidden = ACT2FN[name], 8 * torch.randn(shape)
    hidden.view(-1)[:2] = torch.tensor([-30.0, float("nan")])[: hidden.numel()]
    expected = act_fn(hidden)
    assert torch.equal(activate(act_fn, hidden).nan_to_num(), expected.nan_to_num())
    with torch.no_grad():
        torch.testing.assert_close(activate(act_fn, hidden), expected, equal_nan=True)


def test_an_activation_that_is_watched_or_in_another_dtype_is_called():
    act_fn, hidden, calls = ACT2FN["gelu"], torch.randn(1, 1, 64), []
    with torch.no_grad():
        assert torch.equal(activate(act_fn, hidden.double()), act_fn(hidden.double()))
        act_fn.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(activate(act_fn, hidden), act_fn(hidden)) and len(calls) == 2


def test_a_tensor_of_another_type_reaches_the_activation_itself():
    functions = []

    class Recorded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            functions.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    with torch.no_grad():
        activate(ACT2FN["gelu"], torch.randn(1, 1, 64).as_subclass(Recorded))
    assert nn.functional.gelu in functions
