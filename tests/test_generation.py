"""The recurrent cache: decoding step by step gives what the whole forward pass gives, however it is driven."""

import pytest
import torch
import torch._dynamo.testing
from families import AFT_VARIANTS, FIXED_STATE, LIMIT, VARIANTS, make_ids, make_model
from transformers import DynamicCache
from transformers.generation import stopping_criteria

from modeling_aft.ops import aft_attention


variants = pytest.mark.parametrize("variant", VARIANTS)
LENGTH = 30


def padded_batch():
    """Three rows of 30 places: no padding, left padding, and padding on the left and in the middle."""
    ids, mask = make_ids(LENGTH, batch=3), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, :3] = 0
    mask[2, 11:14] = 0
    return ids, mask


SPLITS = {
    "single-tokens": [1] * LENGTH,
    "prompt-then-steps": [20] + [1] * 10,
    "step-between": [13, 1, 16],
    "uneven": [12, 5, 1, 1, 11],
    "last-token": [29, 1],
}


@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@variants
@torch.no_grad()
def test_step_logits_equal_the_full_forward(variant, split, padding):
    model = make_model(variant)
    ids, mask = padded_batch()
    if not padding:
        mask = torch.ones_like(mask)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts, seen = None, [], 0
    for part in ids.split(split, 1):
        seen += part.shape[1]
        output = model(part, attention_mask=mask[:, :seen], cache=cache, use_cache=True)
        cache, parts = output.cache, [*parts, output.logits]
        assert int(cache.get_seq_length()) == seen
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


@variants
@torch.no_grad()
def test_a_single_row_with_padding_before_and_after_its_cache(variant):
    model, ids = make_model(variant), make_ids(16, batch=1)
    mask = torch.ones_like(ids)
    mask[:, [0, 1, 9, 10, 13]] = 0
    cache, parts = None, []
    for start, stop in ((0, 8), (8, 12), (12, 13), (13, 14), (14, 16)):
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True)
        cache, parts = output.cache, [*parts, output.logits]
    alone = model(ids[:, mask[0].bool()], use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1)[:, mask[0].bool()], alone)


@variants
def test_position_ids_as_generate_passes_them(variant):
    model = make_model(variant)
    ids, mask = padded_batch()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    first = model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], use_cache=True)
    cache, parts = first.cache, [first.logits]
    for t in range(20, LENGTH):
        step = model(
            ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=positions[:, t : t + 1],
            cache=cache,
        )
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam": {"num_beams": 4, "do_sample": False},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "several-sequences": {"do_sample": True, "num_return_sequences": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
}


@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@variants
def test_generate_with_and_without_cache(variant, options, padding):
    model, ids = make_model(variant), make_ids(12)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :5], ids[0, :5] = 0, 0
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **options)
        )
    assert torch.equal(*texts)
    if options == GENERATION["sampling"]:
        assert texts[0][:, 12:].unique().numel() > 3  # models that say one thing would show nothing


@variants
def test_left_padded_batches_equal_single_prompts(variant):
    model = make_model(variant)
    prompts = [make_ids(length, batch=1, seed=length) for length in (4, 9, 13)]
    batch, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 13 - prompt.shape[1] :], mask[row, 13 - prompt.shape[1] :] = prompt, 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row, 13:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("chunk", [1, 5, 12])
@variants
def test_prefill_in_chunks(variant, chunk):
    model, ids = make_model(variant), make_ids(20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    chunked, whole = (model.generate(ids, prefill_chunk_size=size, **options) for size in (chunk, None))
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits))


@variants
def test_a_second_turn_on_a_warm_cache(variant):
    model, ids = make_model(variant), make_ids(8)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False)
    prompt = torch.cat([first, make_ids(5, seed=9)], 1)
    second = model.generate(prompt, cache=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(second, model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False))


@variants
def test_cache_rows_can_be_selected_and_repeated(variant):
    model, ids = make_model(variant), make_ids(10, batch=3)
    cache = model(ids[:, :9], use_cache=True).cache
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    rows = torch.tensor([0, 0, 2, 2])
    torch.testing.assert_close(
        model(ids[rows, 9:], cache=cache).logits, model(ids[rows], use_cache=False).logits[:, 9:]
    )


@pytest.mark.parametrize("variant", FIXED_STATE)
def test_state_keeps_its_size(variant):
    model = make_model(variant)
    cache, sizes = None, set()
    for part in make_ids(40).split([1, 20, 1, 18], 1):
        cache = model(part, cache=cache, use_cache=True).cache
        sizes.add(sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.state if t is not None))
    assert len(sizes) == 1


@pytest.mark.parametrize("variant", ["simple-nopos", "conv-nopos"])
def test_state_and_accuracy_at_100000_tokens(variant):
    """One token at a time after a long prefill: the state is as large and as exact as at the start."""
    model, ids = make_model(variant, dtype=torch.float32), make_ids(100_000, batch=1)
    with torch.no_grad():
        small = model(ids[:, :50], use_cache=True).cache
        cache = model(ids[:, :99_990], use_cache=True, logits_to_keep=1).cache
        steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(99_990, 100_000)]
        expected = model.double()(ids, use_cache=False, logits_to_keep=10).logits
    assert int(cache.get_seq_length()) == 100_000
    for old, new in zip(small.layers, cache.layers, strict=True):
        assert [t.shape for t in old.state if t is not None] == [t.shape for t in new.state if t is not None]
    torch.testing.assert_close(torch.cat(steps, 1).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["simple", "local", "conv"])
def test_the_operator_is_exact_after_100000_tokens(form):
    """No drift: one long call, many short ones, then 5,000 single steps in float32 against the float64 formula."""
    steps, width = 100_000, 2
    query, key, value = torch.randn(3, 1, steps, width)
    bias = {} if form == "simple" else {"window_bias": torch.randn(1, 1 if form == "conv" else steps, 3)}
    expected = aft_attention(*(t.double() for t in (query, key, value)), **{n: t.double() for n, t in bias.items()})
    state, out = None, []
    for q, k, v in zip(*(t.split([55_000, *[200] * 200, *[1] * 5_000], 1) for t in (query, key, value)), strict=True):
        y, state = aft_attention(q, k, v, **bias, initial_state=state, return_state=True)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1).double(), expected, rtol=1e-4, atol=1e-5)


@variants
def test_positions_of_the_users_own_step_by_step(variant):
    """They may leave some out, as long as they rise."""
    model, ids = make_model(variant), make_ids(12)
    positions = torch.tensor([[0, 1, 4, 5, 6, 9, 11, 12, 13, 20, 21, 30], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    whole = model(ids, position_ids=positions, use_cache=False).logits
    cache, parts = None, []
    for t, part in zip(positions.split([4, 1, 1, 4, 1, 1], 1), ids.split([4, 1, 1, 4, 1, 1], 1), strict=True):
        output = model(part, position_ids=t, cache=cache, use_cache=True)
        cache, parts = output.cache, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@variants
def test_a_cache_from_inference_mode_can_be_used_outside(variant):
    model, ids = make_model(variant), make_ids(12)
    with torch.inference_mode():
        cache = model(ids[:, :9], use_cache=True).cache
    with torch.no_grad():
        parts = [model(ids[:, t : t + 1], cache=cache).logits for t in (9, 10, 11)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits[:, 9:])


@pytest.mark.parametrize(
    ("variant", "trained"),
    [
        *((variant, "") for variant in VARIANTS),
        *((variant, "position_bias") for variant in AFT_VARIANTS if variant[:4] in ("full", "loca", "conv")),
    ],
)
def test_scoring_with_gradients_through_a_cache(variant, trained):
    """A cache built with autograd on: the tensors that the backward pass needs are not overwritten."""
    model, ids = make_model(variant), make_ids(12)
    parameters = {n: p for n, p in model.named_parameters() if trained in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    if not parameters:  # the window of no taps
        return
    grads = []
    for split in ([12], [4, 1, 7]):
        model.zero_grad()
        cache, parts = None, []
        for part in ids.split(split, 1):
            output = model(part, cache=cache, use_cache=True)
            cache, parts = output.cache, [*parts, output.logits]
        torch.cat(parts, 1).square().mean().backward()
        grads.append([p.grad.clone() for p in parameters.values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("removed", [0, 1, 3, 6, 8])
@variants
def test_crop_takes_tokens_back(variant, removed):
    """After a crop, everything is as if the removed tokens had never been fed, padded ones included."""
    model = make_model(variant)
    ids, mask = padded_batch()
    mask[:, 21] = torch.tensor([1, 0, 1])
    fed = 24
    with torch.no_grad():
        cache = model(ids[:, :16], attention_mask=mask[:, :16], use_cache=True).cache
        cache.activate_past_recording()
        for start, stop in ((16, 20), (20, 21), (21, 24)):
            model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        cache.crop(-removed)
        assert int(cache.get_seq_length()) == fed - removed
        kept = torch.cat([ids[:, : fed - removed], ids[:, fed:]], 1)
        kept_mask = torch.cat([mask[:, : fed - removed], mask[:, fed:]], 1)
        after = model(ids[:, fed:], attention_mask=kept_mask, cache=cache).logits
        torch.testing.assert_close(
            after, model(kept, attention_mask=kept_mask, use_cache=False).logits[:, fed - removed :]
        )


def test_crop_gives_back_only_what_was_recorded():
    model, ids = make_model("local"), make_ids(12)
    cache = model(ids[:, :8], use_cache=True).cache
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove.*between 0 and 0, got -1"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(ids[:, 8:], cache=cache)
    with pytest.raises(ValueError, match="between -4 and 0, got -5"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="got 3"):
        cache.crop(3)


@pytest.mark.parametrize("help", ["itself", "another-model", "prompt-lookup"])
@variants
def test_assisted_decoding_gives_the_text_of_greedy_decoding(variant, help):
    model, ids = make_model(variant), make_ids(6, batch=1).repeat(1, 2)
    options = {"max_new_tokens": 14, "do_sample": False}
    expected = model.generate(ids, **options)
    if help == "prompt-lookup":
        options["prompt_lookup_num_tokens"] = 3
    else:
        options["assistant_model"] = model if help == "itself" else make_model("conv")
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_cache_of_another_model_is_refused():
    model = make_model("local")
    with pytest.raises(ValueError, match="DynamicCache.config=model.config."):
        model(make_ids(4), cache=DynamicCache())
    with pytest.raises(ValueError, match="'aft_state'.*aft_full_state"):
        model(make_ids(4), cache=DynamicCache(config=make_model("full").config))


@pytest.mark.parametrize("variant", ["conv-nopos", "relative-decay", "local"])
def test_a_text_beyond_max_position_embeddings_is_no_news_of_the_library(variant, monkeypatch):
    """It warns of a text that is longer, which is no limit without tables; of theirs the models warn themselves."""
    said = []
    monkeypatch.setattr(
        stopping_criteria.logger, "warning_once", lambda message, *args, **kwargs: said.append(message)
    )
    make_model(variant).generate(make_ids(LIMIT - 2), max_new_tokens=5, do_sample=False)
    assert said == []
