"""What a model is given: masks, positions, padding, and what it is asked for. Right, or refused by name."""

import re

import pytest
import torch
from families import AFT_VARIANTS, SYNTHESIZER_VARIANTS, VARIANTS, make_config, make_ids, make_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)

from modeling_aft.modeling_linear import SparseLinear
from modeling_aft.modeling_tokens import read_tokens
from modeling_aft.ops import aft_attention_weights


variants = pytest.mark.parametrize("variant", VARIANTS)
few = pytest.mark.parametrize("variant", ["full", "local", "simple", "conv", "dense", "random+dot_product"])
HEADS = {
    "model": (AutoModel, True),
    "causal": (AutoModelForCausalLM, True),
    "masked": (AutoModelForMaskedLM, False),
    "sequence": (AutoModelForSequenceClassification, False),
    "token": (AutoModelForTokenClassification, False),
}
heads = pytest.mark.parametrize("head", HEADS)


def with_head(variant, head, **changes):
    auto_class, is_decoder = HEADS[head]
    torch.manual_seed(0)
    changes = {"is_decoder": is_decoder, "num_labels": 3, "initializer_range": 0.4, **changes}
    return auto_class.from_config(make_config(variant, **changes)).double().eval()


# Masks and positions


@heads
@few
def test_a_mask_of_any_type_and_of_zeros_and_twos(variant, head):
    model, ids = with_head(variant, head), make_ids(9)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    expected = model(ids, attention_mask=mask)[0]
    for other in (mask.bool(), mask.float(), mask.double(), mask.int(), mask.to(torch.uint8), 2 * mask, 5.0 * mask):
        torch.testing.assert_close(model(ids, attention_mask=other)[0], expected)


@few
def test_generate_with_a_mask_of_zeros_and_twos(variant):
    model, ids = make_model(variant), make_ids(9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    for use_cache in (True, False):
        found = model.generate(ids, attention_mask=2 * mask, use_cache=use_cache, **options)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="`attention_mask` must be 0 and 1 in `generate`"):
        model.generate(ids, attention_mask=1 + torch.arange(9).expand(2, -1) // 5, **options)


@pytest.mark.parametrize("side", ["right", "interior"])
@few
def test_generate_after_padding_that_is_not_on_the_left(variant, side):
    """Positions go on from the tokens that are kept, with the cache and without."""
    model, ids = make_model(variant), make_ids(9, batch=1)
    mask = torch.ones_like(ids)
    mask[:, {"right": slice(6, None), "interior": slice(3, 5)}[side]] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [model.generate(ids, attention_mask=mask, use_cache=cached, **options).logits for cached in (True, False)]
    torch.testing.assert_close(found[0][1:], found[1][1:])
    new = found[0][0].argmax(-1)[:, None]
    alone = model(torch.cat([ids[:, mask[0].bool()], new], 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found[0][1].double(), alone, check_dtype=False, rtol=1e-5, atol=1e-5)


@heads
@few
def test_negative_positions_are_refused(variant, head):
    model, ids = with_head(variant, head), make_ids(4)
    with pytest.raises(ValueError, match="`position_ids` must be at least 0 where a token is kept, got -1"):
        model(ids, position_ids=torch.tensor([[-1, 0, 1, 2]]))
    mask = torch.tensor([[0, 1, 1, 1]] * 2)
    shifted = model(ids, attention_mask=mask, position_ids=torch.tensor([[-1, 0, 1, 2]]))[0]
    torch.testing.assert_close(shifted, model(ids, attention_mask=mask)[0])


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 5), (3, 1, 4)], ids=str)
def test_numbers_of_tokens_of_a_wrong_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be of shape [2, 4], got {list(shape)}")):
        make_model("local")(make_ids(4), **{name: torch.zeros(shape, dtype=torch.long)})


@pytest.mark.parametrize("size", [(0, 4), (2, 0)], ids=["no-rows", "no-tokens"])
@heads
@few
def test_empty_batches_are_refused(variant, head, size):
    model = with_head(variant, head)
    ids = torch.zeros(size, dtype=torch.long)
    message = f"at least one row and one token, got {size[0]} rows of {size[1]} tokens"
    with pytest.raises(ValueError, match=message):
        model(ids)
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=torch.zeros(*size, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=torch.ones(size))


@pytest.mark.parametrize("given", ["ids", "vectors", "types"])
@few
def test_inputs_of_a_wrong_shape_are_refused(variant, given):
    model, ids = make_model(variant), make_ids(4)
    wrong = {
        "ids": {"input_ids": ids[0]},
        "vectors": {"inputs_embeds": torch.zeros(2, 4)},
        "types": {"input_ids": ids, "token_type_ids": torch.ones_like(ids)},
    }[given]
    message = {
        "ids": r"`input_ids` must be \[B, T\], got \[4\]",
        "vectors": r"`inputs_embeds` must be \[B, T, D\]",
        "types": "`token_type_ids` must all be 0",
    }[given]
    with pytest.raises(ValueError, match=message):
        model(**wrong)


def test_types_of_tokens_that_are_all_the_same_are_taken():
    """As tokenizers of other models give them."""
    model, ids = make_model("local"), make_ids(4)
    torch.testing.assert_close(model(ids, token_type_ids=torch.zeros_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", SYNTHESIZER_VARIANTS)
def test_masks_of_pairs(variant, is_decoder, kind):
    """In one call, and with a cache: each of three last tokens sees the first three and itself."""
    model = make_model(variant, head=False, is_decoder=is_decoder)
    ids = make_ids(6, batch=1)
    visible = torch.ones(6, 6).tril().bool()
    visible[3:, 3:] = torch.eye(3).bool()
    mask, positions = visible[None, None], torch.tensor([[0, 1, 2, 3, 3, 3]])
    if kind == "added":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    hidden = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    for last in (3, 4, 5):
        rows = [0, 1, 2, last]
        own = visible[rows][:, rows][None, None]
        alone = model(ids[:, rows], attention_mask=own, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden[:, rows], alone)
    if is_decoder:
        torch.testing.assert_close(alone, model(ids[:, rows], use_cache=False).last_hidden_state)
        cache = DynamicCache(config=model.config)
        model(ids[:, :3], cache=cache)
        rest = model(ids[:, 3:], attention_mask=mask[:, :, 3:], position_ids=positions[:, 3:], cache=cache)
        torch.testing.assert_close(rest.last_hidden_state, hidden[:, 3:])
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[.., 6, 6\], got \[1, 1, 6, 5\]"):
        model(ids, attention_mask=mask[..., :5], use_cache=False)


@pytest.mark.parametrize("variant", ["full", "local", "simple", "conv"])
def test_masks_of_pairs_are_refused_by_aft(variant):
    with pytest.raises(ValueError, match=r"`attention_mask` must be \[B, T\].*got \[1, 1, 6, 6\]"):
        make_model(variant)(make_ids(6, batch=1), attention_mask=torch.ones(1, 1, 6, 6))


# Padding


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@variants
def test_padding_changes_no_loss(variant, side):
    """Whatever the label, a token whose predecessor is padding is predicted from nothing, and does not count."""
    model, ids = make_model(variant), make_ids(12)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 5), "right": slice(-5, None), "interior": slice(4, 7)}[side]] = 0
    labels = ids.masked_fill(mask == 0, -100)
    pieces = [ids[1:], ids[:1, :4], ids[:1, 7:]] if side == "interior" else [ids[1:], ids[:1, mask[0].bool()]]
    logits = model(ids, attention_mask=mask).logits
    if side == "interior":  # both pieces are one text, of which one token is not predicted
        total = nn.functional.cross_entropy(logits[:1, :3].mT, ids[:1, 1:4], reduction="sum")
        total += nn.functional.cross_entropy(logits[:1, 7:11].mT, ids[:1, 8:], reduction="sum")
        total += 11 * model(ids[1:], labels=ids[1:]).loss
        expected = total / (11 + 3 + 4)
    else:
        total = sum(model(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in pieces)
        expected = total / (11 + 6)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected, check_dtype=False)
    loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(36)).loss
    torch.testing.assert_close(loss, total / 36, check_dtype=False)


PADDING_ID = 256  # beyond the vocabulary


def padded(side, length=9):
    ids = make_ids(length)
    ids[0, 2], ids[1, -3] = 0, 0  # which is data
    ids[0, : length // 3] = 65
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@heads
@few
def test_padding_beyond_the_vocabulary_needs_no_mask(variant, head, side):
    model = with_head(variant, head, pad_token_id=PADDING_ID)
    ids, mask = padded(side)
    expected = model(ids, attention_mask=mask)[0]
    keep = mask.bool() if expected.dim() == 3 else slice(None)
    for options in ({}, {"attention_mask": mask}):
        found = model(ids.masked_fill(mask == 0, PADDING_ID), **options)[0]
        torch.testing.assert_close(found[keep], expected[keep])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", ["sequence", "token"])
@few
def test_classifiers_take_a_padding_id_at_the_ends_for_padding(variant, head, side):
    """As GPT-2's classifier does; inside of a text it is a token."""
    model = with_head(variant, head, pad_token_id=5)
    ids, mask = padded(side)
    ids[:, 4] = 5
    expected = model(ids, attention_mask=mask)[0]
    keep = mask.bool() if expected.dim() == 3 else slice(None)
    torch.testing.assert_close(model(ids.masked_fill(mask == 0, 5))[0][keep], expected[keep])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}], ids=["greedy", "beams", "penalty"]
)
@pytest.mark.parametrize("where", ["config", "generation_config", "argument"])
@few
def test_generate_with_padding_beyond_the_vocabulary(variant, where, options):
    """Rows end at different times; NUL is data; what stands for padding changes no text."""
    model = make_model(variant, pad_token_id=PADDING_ID if where == "config" else None)
    if where == "generation_config":
        model.generation_config.pad_token_id = PADDING_ID
    ids, mask = padded("left")
    settings = {"max_new_tokens": 8, "do_sample": False, **options}
    plain = [model.generate(ids[row : row + 1, mask[row].bool()], **settings)[0] for row in range(2)]
    end = int(plain[0][8])
    settings |= {"eos_token_id": end, **({"pad_token_id": PADDING_ID} if where == "argument" else {})}
    alone = [model.generate(ids[row : row + 1, mask[row].bool()], **settings)[0] for row in range(2)]
    inputs = ids.masked_fill(mask == 0, PADDING_ID)
    together = model.generate(inputs, attention_mask=mask, **settings)
    for row in range(2):
        text = together[row][together[row] != PADDING_ID]
        assert torch.equal(text, alone[row][alone[row] != PADDING_ID])
    if where != "argument":
        assert torch.equal(model.generate(inputs, **settings), together)


# What a model is asked for


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", AFT_VARIANTS)
def test_attentions_of_aft_are_the_weights_of_its_averages(variant, is_decoder):
    model, ids = make_model(variant, head=False, is_decoder=is_decoder), make_ids(9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    output = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    mixer, block = model.layers[0].mixer, model.layers[0]
    channels = 4 if model.config.aft_type == "conv" else 16
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, channels, 9, 9)] * 2
    total = output.attentions[0].sum(-1)
    torch.testing.assert_close(total, mask[:, None].double().expand_as(total))
    projected = mixer.qkv_proj(block.mixer_norm(output.hidden_states[0]))
    query, key, value = (projected.tanh() if variant == "z1t" else projected).split(mixer.widths, -1)
    gate = query.tanh() if variant == "z1t" else query.sigmoid()
    weights = output.attentions[0].repeat_interleave(16 // channels, 1)
    mixed = mixer.o_proj(gate * torch.einsum("bdts,bsd->btd", weights, value))
    mixed = mixed.tanh() if variant == "z1t" else mixed
    hidden = block.mixer_norm(output.hidden_states[0])
    expected, _ = mixer(hidden, read_tokens(hidden, mask))
    torch.testing.assert_close(mixed[mask.bool()], expected[mask.bool()])
    assert model(ids).attentions is None


@pytest.mark.parametrize("variant", ["full", "local", "simple", "conv"])
def test_attentions_over_a_state_are_refused(variant):
    """Sums have no weights to show."""
    model, ids = make_model(variant), make_ids(6)
    with pytest.raises(ValueError, match="`output_attentions` must be False where a cache holds tokens"):
        model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True, use_cache=False
    )
    assert [step[0].shape[-1] for step in out.attentions] == [6, 7, 8]


@pytest.mark.parametrize("form", ["full", "conv"])
def test_attention_weights_refuse_what_the_operator_refuses(form):
    with pytest.raises(ValueError, match="`position_bias` must be"):
        aft_attention_weights(torch.randn(1, 4, 4), torch.zeros(4, 3))


@pytest.mark.parametrize("variant", SYNTHESIZER_VARIANTS)
def test_attentions_under_a_static_cache_have_its_width(variant):
    """As those of the library's models have, so that a compiled step gives the same shape for each token."""
    model, ids = make_model(variant), make_ids(6)
    caches = StaticCache(config=model.config, max_cache_len=10), DynamicCache(config=model.config)
    for part in ids.split([3, 1, 2], 1):
        static, dynamic = (
            model(part, cache=cache, output_attentions=True).attentions[1].expand(2, -1, -1, -1) for cache in caches
        )
        length = dynamic.shape[-1]
        assert static.shape[-1] == 10
        torch.testing.assert_close(static[..., :length], dynamic)
        assert not static[..., length:].any()


@heads
@variants
def test_linear_layers_are_plain(variant, head):
    """Quantisers look for exactly this class."""
    model = with_head(variant, head)
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Block")]
    expected = SparseLinear if model.config.linear_fan_in else nn.Linear
    assert all(sum(type(m) is expected for m in block.modules()) == 4 for block in blocks)
