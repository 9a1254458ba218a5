"""The Synthesizer's types against their equations, the fast paths against the definition, counts, memory, cache."""

import math

import pytest
import torch
from families import LIMIT, SYNTHESIZER_VARIANTS, make_config, make_ids, make_model
from memory import LargestTensor

from modeling_aft import SynthesizerConfig, SynthesizerForCausalLM
from modeling_aft.modeling_synthesizer import SynthesizerMixer
from modeling_aft.modeling_tokens import read_tokens
from modeling_aft.ops_synthesizer import KERNELS, Logits, attend_fused


variants = pytest.mark.parametrize("variant", SYNTHESIZER_VARIANTS)
HEADS, SIZE = 4, 4


def make_mixer(variant, **changes) -> SynthesizerMixer:
    return make_model(variant, head=False, **changes).layers[0].mixer


def linear(mixer, layer, hidden) -> torch.Tensor:
    """A linear layer, and the tanh behind it where there is one."""
    return layer(hidden).tanh() if mixer.linear_activation == "tanh" else layer(hidden)


def projections(mixer, hidden) -> dict[str, torch.Tensor]:
    """The query, key and value [T, D] of hidden [T, D], where there are any."""
    names = ["query"] * mixer.has_query + ["key"] * mixer.has_key + ["value"]
    return dict(zip(names, linear(mixer, mixer.qkv_proj, hidden).split(HEADS * SIZE, -1), strict=True))


def equation(mixer, name, hidden, head):
    """The [T, T] logits of one component, head and sequence, as the paper defines them; hidden [T, D]."""
    length = len(hidden)
    part = slice(head * SIZE, (head + 1) * SIZE)
    if name == "dot_product":
        query, key = (projections(mixer, hidden)[which][:, part] for which in ("query", "key"))
        return query @ key.T / math.sqrt(SIZE)
    module = mixer.logits[name]
    if name in ("random", "fixed_random"):
        return module.table[head, :length, :length]
    if name == "factorized_random":
        return (module.query_factors[head] @ module.key_factors[head].T)[:length, :length]
    first = torch.relu(projections(mixer, hidden)["query"][:, part])
    if name == "dense":
        return (first @ module.weight[head] + module.bias[head])[:, :length]
    a, b = (first @ w[head] + c[head] for w, c in ((module.weight_a, module.bias_a), (module.weight_b, module.bias_b)))
    rows = [torch.stack([a[t, n // b.shape[1]] * b[t, n % b.shape[1]] for n in range(LIMIT)]) for t in range(length)]
    return torch.stack(rows)[:, :length]


def definition(mixer, hidden):
    """Y = softmax(sum_i alpha_i S_i) G(X) W_o under a causal mask, head by head; hidden [B, T, D]."""
    out = torch.zeros_like(hidden)
    weights = torch.zeros(len(hidden), HEADS, hidden.shape[1], hidden.shape[1], dtype=hidden.dtype)
    future = torch.ones(hidden.shape[1], hidden.shape[1]).triu(1).bool()
    for b, x in enumerate(hidden):
        for h in range(HEADS):
            alphas = [1.0] if mixer.mixture_logits is None else mixer.mixture_logits[h].softmax(0)
            logits = sum(alpha * equation(mixer, n, x, h) for alpha, n in zip(alphas, mixer.names, strict=True))
            weights[b, h] = logits.masked_fill(future, -math.inf).softmax(-1)
            part = slice(h * SIZE, (h + 1) * SIZE)
            out[b, :, part] = weights[b, h] @ projections(mixer, x)["value"][:, part]
    return linear(mixer, mixer.o_proj, out), weights


@pytest.mark.parametrize("length", [1, 2, 7, 31, LIMIT])
@variants
def test_fast_path_and_explicit_path_match_the_equations(variant, length):
    mixer, hidden = make_mixer(variant), torch.randn(2, length, 16, dtype=torch.float64)
    expected, weights = definition(mixer, hidden)
    fast, nothing = mixer(hidden)
    explicit, attentions = mixer(hidden, output_attentions=True)
    assert nothing is None
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(explicit, expected)
    torch.testing.assert_close(attentions.expand_as(weights), weights)


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
@variants
def test_fast_path_has_the_gradients_of_the_explicit_path(variant, padding, is_decoder):
    mask = torch.ones(3, 20, dtype=torch.long)
    if padding:
        mask[1, :7], mask[2, 4:6], mask[0, -3:] = 0, 0, 0
    keep, weight = mask.bool(), torch.randn(3, 20, 16, dtype=torch.float64)
    grads = []
    for output_attentions in (False, True):
        mixer = make_mixer(variant, is_decoder=is_decoder)
        hidden = torch.randn(
            3, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
        ).requires_grad_()
        tokens = read_tokens(hidden, mask if padding else None)
        out, _ = mixer(hidden, tokens, output_attentions=output_attentions)
        (out * weight)[keep].sum().backward()
        grads.append([out[keep], hidden.grad, *(p.grad for p in mixer.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@variants
def test_half_precision(variant):
    model = make_model(variant, dtype=torch.float32)
    expected = model(make_ids(12), use_cache=False).logits
    half = model.to(torch.bfloat16)
    for output in (half(make_ids(12), use_cache=False), half(make_ids(12), output_attentions=True)):
        assert output.logits.dtype == torch.bfloat16
        torch.testing.assert_close(output.logits.float(), expected, rtol=0.1, atol=0.2 * expected.std().item())


@variants
def test_attentions_are_causal_rows_that_sum_to_one(variant):
    model = make_model(variant)
    attentions = model(make_ids(12), output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape == (2, HEADS, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert (weights.triu(1) == 0).all()
    assert model(make_ids(12)).attentions is None


@pytest.mark.parametrize("variant", ["dense", "factorized-dense", "random", "fixed-random", "factorized-random"])
def test_what_the_weights_depend_on(variant):
    """Dense: row t depends on x_t only. Random: on nothing."""
    mixer, hidden = make_mixer(variant), torch.randn(1, 10, 16, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 6] += 1
    before, after = (mixer(x, output_attentions=True)[1] for x in (hidden, changed))
    rows = ((before - after).abs().amax((1, 3)) > 1e-9)[0].nonzero().flatten().tolist()
    assert rows == ([6] if "dense" in variant else [])


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        # papers: dot product 2 d^2, random N^2, factorized random 2 N k, dense d^2 + d N, factorized dense
        # d^2 + d (k1 + k2), to which the multi-head form adds its biases; here d = 16, N = 48, H = 4, k = 3, [6, 8]
        ("dot_product", 2 * 16**2),
        ("random", 4 * 48**2),
        ("fixed-random", 0),
        ("factorized-random", 4 * 2 * 48 * 3),
        ("dense", 16**2 + 16 * 48 + 4 * 48),
        ("factorized-dense", 16**2 + 16 * (6 + 8) + 4 * (6 + 8)),
        ("dense+dot_product", 2 * 16**2 + 16 * 48 + 4 * 48 + 4 * 2),
        ("random+dot_product", 2 * 16**2 + 4 * 48**2 + 4 * 2),
    ],
)
def test_parameters_per_layer(variant, count):
    value_and_output = 2 * 16**2 + 16
    assert sum(p.numel() for p in make_mixer(variant).parameters()) == count + value_and_output


def test_fixed_random_is_never_trained_and_always_saved(tmp_path):
    model = make_model("fixed-random", dtype=torch.float32)
    tables = [layer.mixer.logits["fixed_random"].table.clone() for layer in model.model.layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model.train().requires_grad_(True)(make_ids(20), labels=make_ids(20)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = SynthesizerForCausalLM.from_pretrained(tmp_path).requires_grad_(True)
    assert not any("table" in name for name, _ in loaded.named_parameters())
    for layer, table in zip(loaded.model.layers, tables, strict=True):
        assert torch.equal(layer.mixer.logits["fixed_random"].table, table)
    assert not torch.equal(*tables)


def test_factorized_dense_gives_all_products():
    """Repeat on one factor and tile on the other: with tile on both, only lcm(a, b) of the products would differ."""
    mixer = make_mixer("factorized-dense", factorized_dense_shape=[4, 12])
    logits = mixer.logits["factorized_dense"](torch.randn(1, HEADS, 1, SIZE, dtype=torch.float64))
    assert logits.shape[-1] == LIMIT
    assert all(len(row.unique()) == LIMIT for row in logits[0, :, 0])


def test_mixture_weights_are_a_softmax_per_head_and_mix_logits():
    mixer = make_mixer("random+dot_product")
    alphas = torch.stack([a.squeeze() for a in mixer.mixture_weights().values()])
    torch.testing.assert_close(alphas.sum(0), torch.ones(HEADS, dtype=torch.float64))
    fresh = SynthesizerForCausalLM(make_config("random+dot_product")).model.layers[0].mixer
    assert all((alpha == 0.5).all() for alpha in fresh.mixture_weights().values())


def test_dot_product_alone_is_the_vanilla_transformer():
    mixer, hidden = make_mixer("dot_product"), torch.randn(2, 20, 16, dtype=torch.float64)
    split = (p.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in projections(mixer, hidden).values())
    expected = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True)
    torch.testing.assert_close(mixer(hidden)[0], mixer.o_proj(expected.transpose(1, 2).flatten(2)))


@variants
def test_the_cache_holds_keys_only_for_dot_products(variant):
    model = make_model(variant)
    cache = model(make_ids(20), use_cache=True).cache
    for layer in cache.layers:
        assert layer.state.value.shape == (2, HEADS, 20, SIZE)
        assert (layer.state.key is None) == ("dot_product" not in model.config.components)


def largest_tensor(variant, length, batch):
    mixer = make_mixer(variant, max_position_embeddings=length, dtype=torch.float32)
    hidden = torch.randn(batch, length, 16, requires_grad=True)
    with LargestTensor() as mode:
        mixer(hidden)[0].sum().backward()
    return mode.largest


@pytest.mark.parametrize(
    "variant", ["dense", "factorized-random", "dot_product", "dense+dot_product", "factorized_random+dense"]
)
def test_memory_of_the_factored_types_is_linear_in_length(variant):
    """No tensor, forward or backward, grows faster than T."""
    assert largest_tensor(variant, 2048, 1) <= 4.2 * largest_tensor(variant, 512, 1)


@pytest.mark.parametrize("variant", ["random", "fixed-random", "factorized_random+fixed_random"])
def test_input_independent_logits_cost_one_matrix_whatever_the_batch(variant):
    assert largest_tensor(variant, 256, 4) == largest_tensor(variant, 256, 1)


@pytest.mark.parametrize(
    "variant", ["factorized-dense", "random+dot_product", "dense+random+factorized_dense+dot_product"]
)
def test_other_logits_are_there_for_one_block_of_queries_at_a_time(variant):
    batch, length = 16, 512
    matrix_of_the_batch = batch * HEADS * length * length * 4
    assert largest_tensor(variant, length, batch) <= matrix_of_the_batch / 4


def test_config_errors():
    with pytest.raises(ValueError) as error:
        SynthesizerConfig(
            synthesizer_type="sparse",
            mixture_components=["dense"],
            factorized_dense_shape=[3, 5],
            num_attention_heads=7,
            factorized_rank=0,
        )
    for expected in (
        "synthesizer_type",
        "'sparse'",
        "mixture_components",
        "(1024)",
        "[3, 5]",
        "divisor",
        "factorized_rank",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize("components", [None, [], ["dense", "dense"], ["dense", "local"]], ids=str)
def test_mixture_needs_different_known_components(components):
    with pytest.raises(ValueError, match="mixture_components.*dot_product"):
        SynthesizerConfig(synthesizer_type="mixture", mixture_components=components)


def make_logits(kind):
    """Parts of logits of 2 rows, 3 heads and 150 tokens, of which one kernel or several can take care."""
    query, key = torch.randn(2, 2, 3, 150, 4, dtype=torch.float64)
    parts = {
        "factors": {"query": query, "key": key[:1]},
        "one-bias": {"bias": torch.randn(1, 3, 150, 150, dtype=torch.float64)},
        "product": {"product": tuple(torch.randn(2, 2, 3, 150, 13, dtype=torch.float64))},
    }
    if kind in parts:
        return parts[kind]
    return {**parts["factors"], **parts["one-bias"], **parts["product"]}


@pytest.mark.parametrize("count", [None, torch.tensor([150, 70])], ids=["", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", ["factors", "one-bias", "product", "everything"])
def test_kernels_agree_or_say_what_they_are_for(kind, causal, count):
    value, parts = torch.randn(2, 3, 150, 5, dtype=torch.float64), make_logits(kind)
    names = {"factors": ["factors"], "one-bias": ["shared"] if causal or count is None else []}.get(kind, [])
    names += ["blocks", "whole"]
    results = []
    for name in ("auto", *names):
        leaves = [t.clone().requires_grad_() for t in (value, *flattened(parts))]
        out = attend_fused(Logits(**rebuilt(parts, leaves[1:])), leaves[0], causal, count, backend=name)
        kept = out if count is None else out[1, :, :70]
        results.append([kept, *torch.autograd.grad(kept.square().sum(), leaves)])
    for result in results:
        for found, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(found, expected)
    for kernel in KERNELS:
        if kernel.name not in names:
            with pytest.raises(ValueError, match=f"'{kernel.name}' is for"):
                attend_fused(Logits(**parts), value, causal, count, backend=kernel.name)
    with pytest.raises(ValueError, match="`backend` must be one of auto, factors, .*got 'flash'"):
        attend_fused(Logits(**parts), value, causal, count, backend="flash")


def flattened(parts):
    return [t for part in parts.values() for t in (part if isinstance(part, tuple) else (part,))]


def rebuilt(parts, leaves):
    leaves = iter(leaves)
    return {
        name: tuple(next(leaves) for _ in part) if isinstance(part, tuple) else next(leaves)
        for name, part in parts.items()
    }
