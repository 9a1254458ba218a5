"""Models under torch.func, with second derivatives, and compiled for any length."""

import pytest
import torch
import torch._dynamo.testing
from families import VARIANTS, make_ids, make_model
from torch.func import functional_call, grad, jvp, vmap


variants = pytest.mark.parametrize("variant", VARIANTS)
directions = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
IDS = make_ids(10, batch=3)
MASK = torch.ones_like(IDS)
MASK[0, :4], MASK[1, 7:] = 0, 0


def make_loss(variant, is_decoder):
    """A model, and a scalar of its parameters, ids [B, T] and mask [B, T]."""
    model = make_model(variant, head=False, is_decoder=is_decoder)

    def loss(parameters, ids, mask):
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        hidden = functional_call(model, parameters, (), inputs).last_hidden_state
        return (hidden * mask[..., None]).square().sum()

    return model, loss


def expected_gradients(model, loss, ids, mask):
    model.zero_grad()
    loss(dict(model.named_parameters()), ids, mask).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@directions
@variants
def test_gradients_of_each_sample(variant, is_decoder):
    """What differentially private training needs: torch.func.vmap of torch.func.grad."""
    model, loss = make_loss(variant, is_decoder)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(lambda p, ids, mask: loss(p, ids[None], mask[None])), (None, 0, 0))(parameters, IDS, MASK)
    for row in range(len(IDS)):
        for name, gradient in expected_gradients(model, loss, IDS[row : row + 1], MASK[row : row + 1]).items():
            torch.testing.assert_close(found[name][row], gradient, msg=name)


@directions
@variants
def test_forward_mode_derivatives(variant, is_decoder):
    model, loss = make_loss(variant, is_decoder)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, found = jvp(lambda p: loss(p, IDS, MASK), (parameters,), (tangents,))
    gradients = expected_gradients(model, loss, IDS, MASK)
    expected = sum((gradients[name] * tangents[name]).sum() for name in gradients)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", ["full", "local", "simple", "conv", "random", "factorized-dense", "dense"])
def test_a_penalty_on_gradients_can_be_trained(variant):
    model = make_model(variant, num_hidden_layers=1)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def penalty(scale):
        loss = (scale * model(inputs_embeds=scale * embeds, use_cache=False).logits).sum()
        return torch.autograd.grad(loss, embeds, create_graph=True)[0].square().mean()

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    if variant == "dense":  # fused attention of torch has no second derivative on the CPU
        with pytest.raises(RuntimeError, match="_scaled_dot_product_flash_attention_for_cpu_backward"):
            penalty(scale).backward()
        return
    penalty(scale).backward()
    step = 1e-5
    numeric = (penalty(scale.detach() + step) - penalty(scale.detach() - step)) / (2 * step)
    torch.testing.assert_close(scale.grad, numeric.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("variant", "is_decoder"),
    [
        *((variant, True) for variant in ("full", "conv", "random+dot_product")),
        *((variant, False) for variant in ("local", "factorized-dense")),
    ],
)
def test_compiles_once_for_all_lengths(variant, is_decoder):
    """Also where the number of chunks of time, or of blocks of queries, changes with the length."""
    torch._dynamo.reset()
    sizes = {"max_position_embeddings": 300, "num_hidden_layers": 1, "dtype": torch.float32}
    model = make_model(variant, head=False, is_decoder=is_decoder, **sizes)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    counts = []
    for length in (20, 33, 70, 140, 290):
        ids = make_ids(length)
        hidden = compiled(ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
        torch.testing.assert_close(hidden, model(ids, use_cache=False).last_hidden_state, rtol=1e-3, atol=1e-3)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 3
