"""Mixers and blocks by themselves, in a model of one's own that need not know of tokens."""

import pytest
import torch
from families import LIMIT, VARIANTS, make_config, make_ids, make_model, model_classes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from modeling_aft import AFTConfig, AFTMixer, AFTPreTrainedModel, SynthesizerMixer
from modeling_aft.modeling_attention_free import AFTBlock
from modeling_aft.modeling_stack import MixerStack
from modeling_aft.modeling_tokens import read_tokens


variants = pytest.mark.parametrize("variant", VARIANTS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
few = pytest.mark.parametrize("variant", ["full", "local", "conv-nopos", "dense", "random+dot_product"])


def make_mixer(variant, causal=True):
    config = make_config(variant)
    mixer_class = AFTMixer if config.model_type == "aft" else SynthesizerMixer
    return mixer_class(config, causal=causal).double()


@directions
@variants
def test_a_mixer_begins_as_that_of_a_model(variant, causal):
    """Its weights are drawn, of the same kinds, and it sees what it should."""
    torch.manual_seed(0)
    mixer = make_mixer(variant, causal)
    drawn = model_classes(variant)[0](make_config(variant, is_decoder=causal)).layers[0].mixer.state_dict()
    assert mixer.state_dict().keys() == drawn.keys()
    for name, found in mixer.state_dict().items():
        spread, expected = (t.double().std(correction=0) for t in (found, drawn[name]))
        assert found.shape == drawn[name].shape and expected / 4 <= spread <= 4 * expected, name
    hidden = torch.randn(2, 12, 16, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 8:] += 1
    difference = (mixer(changed)[0] - mixer(hidden)[0]).abs().amax((0, 2))
    assert bool((difference[:8] < 1e-12).all()) == causal


def test_a_mixer_draws_its_weights_without_changing_what_comes_after():
    torch.manual_seed(0)
    nn.Linear(16, 3 * 16, bias=False), nn.Linear(16, 16)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_mixer("local")
    assert torch.equal(torch.rand(3), expected)


@directions
@few
def test_padding_of_a_mixer_changes_nothing(variant, causal):
    mixer, hidden = make_mixer(variant, causal), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    padded, _ = mixer(hidden, read_tokens(hidden, mask))
    torch.testing.assert_close(padded[0, 4:], mixer(hidden[:1, 4:])[0][0])
    torch.testing.assert_close(padded[1], mixer(hidden[1:])[0][0])


@pytest.mark.parametrize("variant", ["full", "local", "dense", "random"])
def test_a_mixer_names_its_limit(variant):
    with pytest.raises(ValueError, match=f"Position {LIMIT} lies beyond"):
        make_mixer(variant)(torch.randn(1, LIMIT + 1, 16, dtype=torch.float64))


@few
def test_a_mixer_learns_in_a_model_of_ones_own(variant):
    """To give back the token before: that takes mixing."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 16, 16, dtype=torch.float64)
    target = inputs.roll(1, 1)
    norm, mixer = nn.LayerNorm(16).double(), make_mixer(variant)
    optimizer = torch.optim.Adam([*norm.parameters(), *mixer.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        loss = (mixer(norm(inputs))[0] - target)[:, 1:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


class PatchModel(AFTPreTrainedModel, MixerStack):
    """A stack over patches of pictures: no vocabulary, no mask, no position table but the mixers' own."""

    block_class = AFTBlock

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, stride=4)
        self.add_blocks(causal=False)
        self.post_init()

    def forward(self, pixel_values):
        return self.run_blocks(self.patches(pixel_values).flatten(2).mT)


def test_blocks_stand_in_a_model_without_tokens():
    """One whose config calls itself a decoder, which is not theirs to read."""
    model = PatchModel(AFTConfig(hidden_size=16, num_hidden_layers=2, max_position_embeddings=64, is_decoder=True))
    pixels = torch.randn(2, 3, 32, 32)
    out = model(pixels)
    assert out.shape == (2, 64, 16)
    pixels[:, :, -4:, -4:] += 1  # the last patch, which the first one sees
    assert (model(pixels)[:, 0] - out[:, 0]).abs().max() > 0


class Looks(TorchDispatchMode):
    """Counts what a program waits for: numbers that Python reads off tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@variants
def test_a_decoding_step_waits_for_nothing(variant):
    """The limit of the tables is known to the host, by the number of tokens that it has fed."""
    model, ids = make_model(variant), make_ids(LIMIT + 1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], cache=cache)
    with Looks() as looks:
        for t in range(30, LIMIT):
            model(ids[:, t : t + 1], cache=cache)
    assert looks.count == 0
    if model.config.has_position_table:
        with pytest.raises(ValueError, match=f"Position {LIMIT} lies beyond"):
            model(ids[:, LIMIT:], cache=cache)


@torch.no_grad()
def test_padding_that_was_fed_does_not_bring_the_end_nearer():
    model, ids = make_model("local"), make_ids(LIMIT)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, :9] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], attention_mask=mask, cache=cache)
    for t in range(1, LIMIT):
        model(ids[:, t : t + 1], cache=cache)
    with pytest.raises(ValueError, match=f"Position {LIMIT} lies beyond"):
        model(ids[:, :1], cache=cache)
