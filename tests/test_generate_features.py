"""What `generate` offers for any model, and files of caches."""

import threading

import pytest
import torch
from families import VARIANTS, make_config, make_ids, make_model
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_aft import ByteTokenizer, load_cache, save_cache
from modeling_aft.compatibility import CACHE_NAME


variants = pytest.mark.parametrize("variant", VARIANTS)
both_families = pytest.mark.parametrize("variant", ["local", "random+dot_product"])


@both_families
def test_streams_text(variant, capsys):
    model, tokenizer = make_model(variant, dtype=torch.float32), ByteTokenizer()
    inputs = tokenizer("hello", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    text = tokenizer.decode(model.generate(**inputs, **options)[0])
    model.generate(**inputs, streamer=TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    streamer = TextIteratorStreamer(tokenizer)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@both_families
def test_stops_where_it_is_told_to(variant):
    model, ids = make_model(variant), make_ids(8, batch=1)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, **options)[0]
    assert model.generate(ids, stopping_criteria=[StopAfter(11)], **options).shape == (1, 11)
    first = text.tolist().index(text[12], 8)
    assert torch.equal(model.generate(ids, eos_token_id=int(text[12]), **options)[0], text[: first + 1])
    tokenizer = ByteTokenizer()
    stop = tokenizer.decode(text[9:11])
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)[0]
    assert torch.equal(stopped, text[: len(stopped)]) and len(stopped) <= 11
    assert stop in tokenizer.decode(stopped[8:])


@both_families
def test_rows_of_a_batch_stop_on_their_own(variant):
    model, ids = make_model(variant), make_ids(8)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(ids, **options)
    end = int(texts[0, 10])
    together = model.generate(ids, eos_token_id=end, **options)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], eos_token_id=end, **options)[0]
        assert torch.equal(together[row, : len(alone)], alone) and not together[row, len(alone) :].any()


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


CONSTRAINTS = {
    "prefix-allowed-tokens": {"prefix_allowed_tokens_fn": lambda batch, ids: [2, 4, 6]},
    "suppressed-tokens": {"suppress_tokens": list(range(1, 256, 2))},
    "bad-words": {"bad_words_ids": [[t] for t in range(1, 256, 2)]},
    "own-processor": {"logits_processor": [OnlyEven()]},
}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
@both_families
def test_constrained_output(variant, constraint, num_beams):
    model, ids = make_model(variant), make_ids(8)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    text = model.generate(ids, **constraint, **options)
    assert (text[:, 8:] % 2 == 0).all() and (model.generate(ids, **options)[:, 8:] % 2 == 1).any()
    assert torch.equal(text, model.generate(ids, use_cache=False, **constraint, **options))


@both_families
def test_returns_scores_logits_states_and_the_cache(variant):
    model, ids = make_model(variant), make_ids(8)
    out = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert torch.equal(torch.stack(out.logits, 1).argmax(-1), out.sequences[:, 8:])
    assert len(out.hidden_states) == 4 and len(out.hidden_states[0]) == model.config.num_hidden_layers + 1
    expected = model(out.sequences, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(out.sequences[:, -1:], cache=getattr(out, CACHE_NAME)).logits, expected)


@both_families
def test_prompts_given_as_vectors(variant):
    model, ids = make_model(variant), make_ids(8)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(text, model.generate(ids, **options)[:, 8:])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@variants
def test_a_cache_saved_to_disk_continues_the_same_text(variant, kind, tmp_path):
    model, ids = make_model(variant), make_ids(12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)
    cache = kind(config=model.config, **({"max_cache_len": 30} if kind is StaticCache else {}))
    model(ids[:, :11], attention_mask=mask[:, :11], cache=cache)
    save_cache(cache, tmp_path / "conversation.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["conversation.safetensors"]
    del cache
    loaded = load_cache(tmp_path / "conversation.safetensors", model.config)
    assert int(loaded.get_seq_length()) == 11
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=loaded, **options), expected)


def test_cache_files_that_do_not_fit_are_refused(tmp_path):
    local, full, path = make_model("local"), make_model("full"), tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="`cache` must be a cache of AFT"):
        save_cache(DynamicCache(), path)
    assert not any(tmp_path.iterdir())
    save_cache(local(make_ids(8), use_cache=True).cache, path)
    assert all(tensor.shape[:1] in ((), (2,)) for tensor in load_file(path).values())
    with pytest.raises(ValueError, match="must be a cache of a model with aft_type 'full', not 'local'"):
        load_cache(path, full.config)
    with pytest.raises(ValueError, match="window_size 7, not 5"):
        load_cache(path, make_config("local", window_size=7))


@variants
def test_layers_move_off_their_device_and_back(variant):
    """What an offloaded cache does between the uses of a layer."""
    model, ids = make_model(variant), make_ids(12)
    cache = model(ids[:, :8], use_cache=True).cache
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
        assert all(t.device.type == "meta" for t in layer.state if t is not None)
    cache = model(ids[:, :8], use_cache=True).cache
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(model(ids[:, 8:], cache=cache).logits, model(ids, use_cache=False).logits[:, 8:])


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@variants
def test_offloaded_caches(variant, implementation):
    model, ids = make_model(variant).cuda(), make_ids(10).cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation=implementation, **options), expected)


@both_families
def test_caches_of_attention_alone_are_refused_by_name(variant):
    model, ids = make_model(variant), make_ids(8)
    with pytest.raises(ValueError, match="QuantizedCache.*only full attention"):
        model.generate(ids, cache_implementation="quantized", max_new_tokens=2)
    with pytest.raises(ValueError, match="Continuous batching.*Use `generate` with a padded batch"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="Continuous batching|`cache_implementation` must be None or 'dynamic'"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=2)
