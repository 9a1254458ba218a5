"""The static cache: the same numbers in tensors that keep their place, a step that compiles once."""

import pytest
import torch
from families import FIXED_STATE, VARIANTS, make_ids, make_model
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from modeling_aft import AFTImageProcessor


variants = pytest.mark.parametrize("variant", VARIANTS)
GROWING = [name for name in VARIANTS if name not in FIXED_STATE]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def left_padded(length=9):
    ids = make_ids(length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def addresses(cache):
    tensors = [t for layer in cache.layers for t in (layer.cumulative_length, *layer.state) if t is not None]
    return [t.data_ptr() for t in tensors]


@variants
def test_logits_equal_the_full_forward_and_no_tensor_moves(variant):
    model, inputs = make_model(variant), left_padded(20)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, parts, seen, places = StaticCache(config=model.config, max_cache_len=20), [], 0, set()
    with torch.no_grad():
        for part in ids.split([9, 1, 1, 4, 1, 3, 1], 1):
            seen += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :seen], cache=cache).logits)
            assert int(cache.get_seq_length()) == seen
            places.add(tuple(addresses(cache)))
        expected = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])
    assert len(places) == 1


@variants
def test_generates_the_text_of_the_dynamic_cache(variant):
    model, inputs = make_model(variant), left_padded()
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **GREEDY), expected)
    beams = {**GREEDY, "num_beams": 3}
    static = model.generate(**inputs, cache_implementation="static", prefill_chunk_size=4, **beams)
    assert torch.equal(static, model.generate(**inputs, **beams))


@variants
def test_is_used_again_in_its_place_after_a_reset(variant):
    model, inputs = make_model(variant), left_padded()
    cache, places = StaticCache(config=model.config, max_cache_len=30), []
    expected = model.generate(**inputs, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, cache=cache, **GREEDY), expected)
        places.append(addresses(cache))
        with torch.no_grad():
            cache.reset()
        assert int(cache.get_seq_length()) == 0
    assert places[0] == places[1]
    other = {name: tensor[:1] for name, tensor in inputs.items()}  # another batch size needs other tensors
    assert torch.equal(model.generate(**other, cache=cache, **GREEDY), model.generate(**other, **GREEDY))


@pytest.mark.parametrize("removed", [0, 2, 5])
@variants
def test_crop_takes_tokens_back(variant, removed):
    model, ids = make_model(variant), make_ids(20)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        cache.activate_past_recording()
        for part in ids[:, 9:16].split([2, 1, 4], 1):
            model(part, cache=cache)
        cache.crop(-removed)
        kept = torch.cat([ids[:, : 16 - removed], ids[:, 16:]], 1)
        after = model(ids[:, 16:], cache=cache).logits
        torch.testing.assert_close(after, model(kept, use_cache=False).logits[:, 16 - removed :])


@variants
def test_gradients_pass_through_it(variant):
    model, ids = make_model(variant), make_ids(12)
    grads = []
    for cache in (StaticCache(config=model.config, max_cache_len=12), DynamicCache(config=model.config)):
        model.zero_grad()
        parts = [model(part, cache=cache).logits for part in ids.split([5, 1, 6], 1)]
        torch.cat(parts, 1).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", GROWING)
def test_more_tokens_than_it_has_room_for_are_refused(variant):
    model, ids = make_model(variant), make_ids(9)
    cache = StaticCache(config=model.config, max_cache_len=8)
    assert cache.get_max_length() == 8
    model(ids[:, :8], cache=cache)
    with pytest.raises(ValueError, match="`max_cache_len` of this static cache is 8, but 9 are needed"):
        model(ids[:, 8:], cache=cache)


compilations = []


def counting_backend(graph, inputs):
    compilations.append(graph)
    return graph.forward


def compiled(backend):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # generate compiles by itself on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


@variants
def test_generate_compiles_the_decoding_step_once(variant):
    """Not once per token, nor again for the next text."""
    model, inputs = make_model(variant, dtype=torch.float32), left_padded()
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    torch._dynamo.reset()
    compilations.clear()
    for _ in range(2):
        found = model.generate(**inputs, **compiled(counting_backend), **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert len(compilations) == 1


@pytest.mark.parametrize("variant", ["local", "dense+dot_product"])
def test_generates_the_same_text_with_generated_code(variant):
    model, inputs = make_model(variant, dtype=torch.float32, num_hidden_layers=1), left_padded()
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    assert torch.equal(model.generate(**inputs, **compiled("inductor"), **GREEDY), expected)


@pytest.mark.parametrize("rows", [0, 2], ids=["draws", "completes"])
def test_the_compiled_step_draws_the_same_pictures(rows):
    processor = AFTImageProcessor(size={"height": 3, "width": 2}, num_channels=1)
    fields = {"vocab_size": 257, "bos_token_id": 256, "max_position_embeddings": processor.num_subpixels}
    model = make_model("local", dtype=torch.float32, num_hidden_layers=1, **fields)
    model.generation_config = processor.generation_config()
    ids = processor(torch.randint(256, (4, 1, 3, 2), dtype=torch.uint8), num_rows=rows).input_ids
    torch._dynamo.reset()
    compilations.clear()
    drawn = []
    for options in ({}, compiled(counting_backend)):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, **options))
    assert len(compilations) == 1
    assert torch.equal(*drawn) and drawn[0].shape == (4, 1 + processor.num_subpixels)
    assert torch.equal(drawn[0][:, : ids.shape[1]], ids) and drawn[0][:, 1:].max() < 256


@pytest.mark.gpu
@variants
def test_generates_the_same_text_with_cuda_graphs(variant):
    """As `generate` compiles by itself on a GPU."""
    model = make_model(variant, dtype=torch.float32).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded().items()}
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **GREEDY), expected)
