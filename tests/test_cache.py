"""Caches as things that users keep, share, save and break: every use of one is right, or refused by name."""

import copy
import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from families import (
    AFT_VARIANTS,
    FIXED_STATE,
    LIMIT,
    SYNTHESIZER_VARIANTS,
    VARIANTS,
    make_config,
    make_ids,
    make_model,
)
from launching import run
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from modeling_aft import load_cache, save_cache
from modeling_aft.ops_step import AHEAD, ROOM


variants = pytest.mark.parametrize("variant", VARIANTS)
few = pytest.mark.parametrize("variant", ["full", "local", "conv", "dense", "random+dot_product"])
KINDS = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config=config, max_cache_len=40)}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def fill(model, ids, kind=DynamicCache, **options):
    cache = kind(config=model.config)
    model(ids, cache=cache, **options)
    return cache


# A cache that has read something already, in `generate`


@pytest.mark.parametrize("chunk", [None, 2], ids=["", "in-chunks"])
@pytest.mark.parametrize("given", ["everything", "everything-and-mask", "the-rest-and-mask"])
@kinds
@few
def test_generate_reads_what_the_cache_has_not(variant, kind, given, chunk):
    model, ids = make_model(variant), make_ids(12)
    expected = model.generate(ids, **GREEDY)
    mask = torch.ones_like(ids)
    prompt = ids[:, 7:] if given.startswith("the-rest") else ids
    options = {**GREEDY, "prefill_chunk_size": chunk, **({} if given == "everything" else {"attention_mask": mask})}
    with torch.no_grad():
        cache = fill(model, ids[:, :7], kind)
    found = model.generate(prompt, cache=cache, **options)
    assert torch.equal(found[:, -6:], expected[:, -6:])


@pytest.mark.parametrize("chunk", [None, 3], ids=["", "in-chunks"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@kinds
@variants
def test_a_cache_that_has_read_all_of_the_prompt_is_refused(variant, kind, masked, chunk):
    model, ids = make_model(variant), make_ids(8)
    with torch.no_grad():
        cache = fill(model, ids, kind)
    options = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with pytest.raises(ValueError, match="`cache` has read 8 tokens, and `input_ids` .* are 8: nothing is left"):
        model.generate(ids, cache=cache, prefill_chunk_size=chunk, **GREEDY, **options)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="`cache` has read 8 tokens, and `inputs_embeds` .* are 8"):
        model.generate(inputs_embeds=embeds, cache=cache, prefill_chunk_size=chunk, **GREEDY, **options)


@few
def test_prompts_that_do_not_fit_a_warm_cache_are_refused(variant):
    model, ids = make_model(variant), make_ids(12)
    cache = fill(model, ids[:, :7])
    with pytest.raises(ValueError, match="nothing is left to read"):
        model.generate(ids[:, 7:], cache=cache, **GREEDY)  # new tokens without a mask of all
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="must be 12 tokens .* or the last 5 of them .* got 8"):
        model.generate(ids[:, 4:], attention_mask=mask, cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="`inputs_embeds` must be 12 tokens .the whole text., got 5"):
        embeds = model.get_input_embeddings()(ids[:, 7:])
        model.generate(inputs_embeds=embeds, attention_mask=mask, cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="as `cache` or as `past_key_values`"):
        model.generate(ids, cache=cache, past_key_values=cache, **GREEDY)


@few
def test_assisted_decoding_goes_on_from_a_warm_cache(variant):
    model, ids = make_model(variant), make_ids(6, batch=1).repeat(1, 2)
    cache = fill(model, ids[:, :7])
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **GREEDY), expected)
    cache = fill(model, ids[:, :7])
    assert torch.equal(model.generate(ids, cache=cache, assistant_model=make_model("conv"), **GREEDY), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "beams", "lookup"]
)
@few
def test_generate_in_train_mode_under_gradient_checkpointing(variant, options, reentrant):
    """Without dropout it writes what it writes in eval mode."""
    model, ids = make_model(variant, hidden_dropout_prob=0.0), make_ids(8, batch=1)
    expected = model.generate(ids, **GREEDY, **options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2  # with gradients, it computes a block again


@few
def test_a_warm_cache_under_gradient_checkpointing_is_refused(variant):
    model, ids = make_model(variant), make_ids(8)
    cache = fill(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="`cache` must be empty under gradient checkpointing"):
        model(ids, cache=cache)
    assert model(ids, use_cache=True).cache is None


# The end of the tables


LIMITED = ["full", "local", "conv", "dense", "random+dot_product"]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "uncached", "beams", "lookup", "static"],
)
@pytest.mark.parametrize("variant", LIMITED)
def test_a_text_ends_where_the_tables_do(variant, options, caplog):
    model, ids = make_model(variant), make_ids(10, batch=1)
    found = model.generate(ids, max_new_tokens=500, do_sample=False, disable_compile=True, **options)
    assert found.shape == (1, LIMIT + 1)  # the last token is never read
    within = model.generate(ids, max_new_tokens=LIMIT - 9, do_sample=False, disable_compile=True, **options)
    assert torch.equal(found, within)
    assert sum("reached the end of the model's tables" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["greedy", "uncached", "beams"])
@pytest.mark.parametrize("variant", LIMITED)
def test_each_row_of_a_batch_has_its_own_end(variant, options):
    """Rows with less padding reach the end first, and are filled up while the others go on."""
    model, ids = make_model(variant), make_ids(14, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :3] = 0, 0
    settings = {"max_length": 200, "do_sample": False, "pad_token_id": 7, **options}
    together = model.generate(ids, attention_mask=mask, **settings)
    assert together.shape[1] == 14 + LIMIT + 1 - 8
    for row, padding in enumerate((0, 6, 3)):
        alone = model.generate(ids[row : row + 1, padding:], **settings)[0]
        assert len(alone) == LIMIT + 1
        assert torch.equal(together[row, padding : padding + LIMIT + 1], alone)
        assert (together[row, padding + LIMIT + 1 :] == 7).all()


@pytest.mark.parametrize("of_call", [False, True], ids=["of-model", "of-call"])
@pytest.mark.parametrize("variant", ["local", "conv-nopos", "dense"])
def test_a_length_in_a_call_comes_before_that_of_a_config(variant, of_call):
    model, ids = make_model(variant), make_ids(10)
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = 8
    given = {"generation_config": config} if of_call else {}
    model.generation_config = model.generation_config if of_call else config
    assert model.generate(ids, do_sample=False, **given).shape[1] == 18
    assert model.generate(ids, do_sample=False, max_length=13, **given).shape[1] == 13
    assert model.generate(ids, do_sample=False, max_new_tokens=5, **given).shape[1] == 15
    with pytest.raises(ValueError, match="max_length"):
        model.generate(ids, do_sample=False, max_length=10, **given)


@pytest.mark.parametrize("variant", ["local", "dense"])
def test_an_end_of_text_comes_first(variant, caplog):
    model, ids = make_model(variant), make_ids(10, batch=1)
    text = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
    end = int(text[15])
    stopped = model.generate(ids, max_new_tokens=500, do_sample=False, eos_token_id=end, pad_token_id=0)[0]
    assert len(stopped) < LIMIT and int(stopped[-1]) == end
    assert not caplog.records or "reached the end" not in caplog.text


def test_a_prompt_that_fills_the_tables_gets_one_more_token():
    model, ids = make_model("local"), make_ids(LIMIT, batch=2)
    assert model.generate(ids[:1], max_new_tokens=9, do_sample=False).shape == (1, LIMIT + 1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # goes on while the other row has ended
    found = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=7)
    assert found.shape == (2, LIMIT + 5) and (found[0, LIMIT + 1 :] == 7).all()
    with pytest.raises(ValueError, match=f"Position {LIMIT} lies beyond"):
        model.generate(make_ids(LIMIT + 1, batch=1), max_new_tokens=9, do_sample=False)


# Gradients, modes, interruptions


@kinds
@variants
def test_a_cache_with_gradients_is_reordered_and_continued_without(variant, kind):
    model, ids = make_model(variant), make_ids(10, batch=3)
    cache = fill(model, ids[:, :6], kind)
    rows = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache.reorder_cache(rows)
        parts = [model(ids[rows, t : t + 1], cache=cache).logits for t in range(6, 10)]
        expected = model(ids[rows], use_cache=False).logits[:, 6:]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@kinds
@variants
def test_steps_without_gradients_leave_a_graph_intact(variant, kind):
    """What autograd has saved of a cache is not written into by what comes later."""
    model, ids = make_model(variant), make_ids(12)
    gradients = []
    for interrupted in (False, True):
        cache = kind(config=model.config)
        model.zero_grad()
        logits = [model(ids[:, :5], cache=cache).logits, model(ids[:, 5:7], cache=cache).logits]
        if interrupted:
            with torch.no_grad():
                for t in range(7, 12):
                    model(ids[:, t : t + 1], cache=cache)
        torch.cat(logits, 1).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


@kinds
@variants
def test_a_cache_from_inference_mode_is_continued_with_gradients(variant, kind):
    model, ids = make_model(variant), make_ids(12)
    with torch.inference_mode():
        cache = fill(model, ids[:, :7], kind)
    parts = [model(part, cache=cache).logits for part in ids[:, 7:].split([3, 1, 1], 1)]
    torch.cat(parts, 1).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    expected = model(ids, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("detached", [True, False], ids=["detached", "whole"])
@kinds
@few
def test_no_gradient_goes_back_beyond_a_detached_state(variant, kind, detached):
    model, ids = make_model(variant), make_ids(12)
    first, second = ids.split([7, 5], 1)

    def gradients(cache) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(second, cache=cache).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        constant = fill(model, first, kind)
    cache = fill(model, first, kind)
    if detached:
        for layer in cache.layers:
            layer.detach()
    found, expected = gradients(cache), gradients(constant)
    close = [torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected]
    assert all(close) if detached else not all(close)
    assert cache.get_seq_length() == 12


MODES = {"gradients": torch.enable_grad, "no-gradients": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("modes", itertools.permutations(MODES, 3), ids="-then-".join)
@kinds
@few
def test_modes_may_follow_each_other(variant, kind, modes):
    model, ids = make_model(variant), make_ids(18)
    cache, parts = kind(config=model.config), []
    for mode, part in zip([*modes, *modes], ids.split(3, 1), strict=True):
        with MODES[mode]():
            logits = [model(piece, cache=cache).logits for piece in part.split([2, 1], 1)]
            parts.append(torch.cat(logits, 1).detach().clone())
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits)


@variants
def test_a_forward_pass_that_was_interrupted_leaves_a_cache_that_says_so(variant):
    model, ids = make_model(variant), make_ids(10)

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = fill(model, ids[:, :6])
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 6:8], cache=cache)
        handle.remove()
        for use in (lambda: model(ids[:, 8:], cache=cache), lambda: model.generate(ids, cache=cache, **GREEDY)):
            with pytest.raises(ValueError, match="interrupted between two layers.*reset"):
                use()
        with pytest.raises(ValueError, match="interrupted"):
            save_cache(cache, "never")
        cache.reset()
        torch.testing.assert_close(model(ids, cache=cache).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("variant", "other", "difference"),
    [
        ("dense", "random", r"components \['random'\], not \['dense'\]"),
        ("factorized-random", "factorized-dense", "components"),
        ("simple", "local-1", "aft_type 'local', not 'simple'"),
        ("conv", "conv-nopos", "position_embedding_type 'none', not 'learned'"),
    ],
)
def test_a_cache_of_another_kind_of_model_is_refused_though_it_would_fit(variant, other, difference, tmp_path):
    ids = make_ids(6)
    cache = fill(make_model(variant), ids)
    with pytest.raises(ValueError, match=f"`cache` must be a cache of a model with .*{difference}"):
        make_model(other)(ids, cache=cache)
    save_cache(cache, tmp_path / "cache")
    with pytest.raises(ValueError, match=difference):
        load_cache(tmp_path / "cache", make_config(other))


def test_use_cache_false_does_not_drop_a_warm_cache():
    model, ids = make_model("conv"), make_ids(6)
    with pytest.raises(ValueError, match="`use_cache` must not be False where `cache` holds tokens"):
        model(ids, cache=fill(model, ids), use_cache=False)


# Files


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=repr)
def test_a_cache_is_loaded_to_a_device_by_any_of_its_names(device, tmp_path):
    model, ids = make_model("conv"), make_ids(12)
    save_cache(fill(model, ids[:, :7]), tmp_path / "cache")
    cache = load_cache(tmp_path / "cache", model.config, device)
    expected = model(ids, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(model(ids[:, 7:], cache=cache).logits, expected)


def test_many_threads_save_into_one_file(tmp_path):
    model = make_model("local", dtype=torch.float32)
    caches = [fill(model, make_ids(4, seed=seed)) for seed in range(4)]
    path, failures, stop = tmp_path / "cache.safetensors", [], threading.Event()
    expected = [cache.layers[0].state_dict() for cache in caches]
    save_cache(caches[0], path)

    def write(cache):
        try:
            for _ in range(30):
                save_cache(cache, path)
        except Exception as error:
            failures.append(error)

    def read():
        try:
            while not stop.is_set():
                found = load_cache(path, model.config).layers[0].state_dict()
                assert any(all(torch.equal(found[n], e[n]) for n in e) for e in expected)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write, args=(cache,)) for cache in caches]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert not failures and [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model, path = make_model("local"), tmp_path / "cache"
    save_cache(fill(model, make_ids(4)), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_cache(fill(model, make_ids(5)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["cache"]


def damaged(tensors, kind):
    """Malformed variants of a file: what is done to its tensors, and its metadata."""
    first = "layers.0."
    yield "no-metadata", tensors, None
    yield "metadata-that-is-no-json", tensors, "{"
    yield "metadata-of-a-list", tensors, "[1, 2]"
    yield "a-layer-too-many", {**tensors, "layers.2.position": torch.zeros(2, dtype=torch.long)}, kind
    yield "a-foreign-tensor", {**tensors, "something": torch.zeros(1)}, kind
    yield "no-tensors", {}, kind
    for name, tensor in tensors.items():
        if not name.startswith(first):
            continue
        field = name.removeprefix(first)
        rest = {n: t for n, t in tensors.items() if n != name}
        yield f"without-{field}", rest, kind
        yield f"{field}-of-another-shape", {**rest, name: torch.cat([tensor[None], tensor[None]])}, kind
        yield f"{field}-with-a-row-less", {**rest, name: tensor[:1].clone()} if tensor.dim() else rest, kind
        yield f"{field}-of-another-type", {**rest, name: tensor.to(torch.int32)}, kind
        if tensor.is_floating_point() and tensor.numel():
            yield f"{field}-with-nan", {**rest, name: torch.full_like(tensor, torch.nan)}, kind
            yield f"{field}-with-inf", {**rest, name: torch.full_like(tensor, torch.inf)}, kind
        elif tensor.numel():
            yield f"{field}-below-0", {**rest, name: torch.full_like(tensor, -7)}, kind


@few
def test_malformed_files_are_refused(variant, tmp_path):
    model, path = make_model(variant), tmp_path / "cache"
    save_cache(fill(model, make_ids(8)), path)
    kind = model.config.state_kind
    content, tensors = path.read_bytes(), load_file(path)
    load_cache(path, model.config)
    for name, broken, metadata in damaged(tensors, kind):
        save_file(broken, path, metadata=None if metadata is None else {"kind": metadata})
        with pytest.raises(ValueError):
            load_cache(path, model.config)
            pytest.fail(f"{name} was loaded")
    for name, bytes_ in {
        "empty": b"", "cut": content[: len(content) // 2], "no-safetensors": b"x" * 100, "short-header": content[:4],
    }.items():  # fmt: skip
        path.write_bytes(bytes_)
        with pytest.raises(ValueError, match="must be a file that save_cache wrote"):
            load_cache(path, model.config)
            pytest.fail(f"{name} was loaded")
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_cache(tmp_path / "nothing", model.config)
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_cache(tmp_path, model.config)


# Code that lies beside a model, twice in one process, and the package itself


TWO_COPIES = """
import sys, torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folders = sys.argv[1:3]
models = [AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True).eval() for f in folders]
assert type(models[0]) is not type(models[1])
ids = torch.arange(2, 14)[None]
for model in models:
    module = sys.modules[type(model).__module__]
    save_cache = get_class_from_dynamic_module("cache_files.save_cache", model.name_or_path)
    load_cache = get_class_from_dynamic_module("cache_files.load_cache", model.name_or_path)
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], cache=cache)
    save_cache(cache, sys.argv[3])
    loaded = load_cache(sys.argv[3], model.config)
    torch.testing.assert_close(model(ids[:, 8:], cache=loaded).logits, whole[:, 8:])
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False),
                       model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
print("fine")
"""


@pytest.mark.parametrize(
    ("variant", "names"), [("local", ("modèle", "modéle")), ("dense", ("模型", "モデル"))], ids=["local", "dense"]
)
def test_two_copies_of_the_code_in_one_process(variant, names, tmp_path):
    """In folders whose names may have any letters."""
    folders = [tmp_path / name for name in names]
    for folder in folders:
        make_model(variant, dtype=torch.float32).save_pretrained(folder)
    options = {"cwd": tmp_path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run(TWO_COPIES, *folders, tmp_path / "cache", **options)
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]


def test_the_package_can_be_imported_beside_a_saved_model(tmp_path):
    make_model("local").save_pretrained(tmp_path)
    root = str(Path(__file__).parents[1])
    code = f"import sys; sys.path[:0] = ['', {root!r}]; import modeling_aft; print(modeling_aft.AFTConfig.model_type)"
    done = run(code, cwd=tmp_path)
    assert done.stdout.strip() == "aft", done.stderr[-2000:]


def test_every_config_says_what_its_states_mean():
    kinds = {name: json.loads(make_config(name).state_kind) for name in VARIANTS}
    assert all("aft_type" in kinds[name] for name in AFT_VARIANTS)
    assert all("components" in kinds[name] for name in SYNTHESIZER_VARIANTS)
    assert "state_kind" not in make_config("local").to_dict()


# Single tokens, which a state takes up later, with others


fixed_state = pytest.mark.parametrize("variant", FIXED_STATE)


def feed(model, cache, ids, **options) -> torch.Tensor:
    """The logits [B, T, V] of tokens that are read one at a time."""
    logits = [model(ids[:, t : t + 1], cache=cache, **options).logits for t in range(ids.shape[1])]
    return torch.cat(logits, 1)


def check_equal_states(cache, expected) -> None:
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert int(layer.get_seq_length()) == int(other.get_seq_length()) == layer.known_length
        found, wanted = layer.state_dict(), other.state_dict()
        assert found.keys() == wanted.keys()
        for name in found:
            # Only the sum has a meaning where there is a decay: its two parts may differ.
            if name not in ("maximum", "normalizer"):
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)
        if "maximum" in found:
            sums = (f["maximum"] + f["normalizer"].log() for f in (found, wanted))
            torch.testing.assert_close(*sums, rtol=1e-9, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@fixed_state
def test_single_tokens_wait_for_others(variant, dtype):
    """And the state has the dtypes, sizes and places that it has without them."""
    model, ids = make_model(variant, dtype=dtype), make_ids(30)
    with torch.no_grad():
        cache, whole = fill(model, ids[:, :4]), fill(model, ids)
        places = [[t.data_ptr() for t in layer.state if t is not None] for layer in cache.layers]
        feed(model, cache, ids[:, 4:29])
        assert all((layer.recent.length, layer.recent.used) == (25, 25 % ROOM) for layer in cache.layers)
        feed(model, cache, ids[:, 29:])
    for layer, other, before in zip(cache.layers, whole.layers, places, strict=True):
        state, expected = layer.state, other.state
        assert layer.recent is None
        assert [t.data_ptr() for t in state if t is not None] == before
        for tensor, wanted in zip(state, expected, strict=True):
            assert (tensor is None) == (wanted is None)
            assert tensor is None or (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)


@pytest.mark.parametrize("steps", [1, 3, ROOM, ROOM + 1, 2 * ROOM + 5])
@fixed_state
def test_a_state_takes_up_single_tokens(variant, steps):
    model, ids = make_model(variant), make_ids(4 + steps)
    with torch.no_grad():
        cache = fill(model, ids[:, :4])
        feed(model, cache, ids[:, 4:])
        check_equal_states(cache, fill(model, ids))


@pytest.mark.parametrize(
    "use",
    {
        "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
        "copy": copy.deepcopy,
        "crop": lambda cache: cache.crop(0),
        "get_seq_length": lambda cache: cache.get_seq_length(),
        "detach": lambda cache: [layer.detach() for layer in cache.layers],
    }.items(),
    ids=lambda item: item[0],
)
@fixed_state
def test_a_cache_is_used_between_single_tokens(variant, use):
    model, ids = make_model(variant), make_ids(20)
    name, function = use
    if name in ("reorder_cache", "batch_select_indices"):
        ids[1, :11], rows = ids[0, :11].flip(0), [1, 1]
    else:
        rows = [0, 1]
    with torch.no_grad():
        cache = fill(model, ids[:, :4])
        feed(model, cache, ids[:, 4:11])
        result = function(cache)
        if name == "copy":
            feed(model, cache, ids[:, 11:17].flip(0))  # leaves the copy alone
            cache = result
        found = feed(model, cache, ids[:, 11:])
        text = torch.cat([ids[rows, :11], ids[:, 11:]], 1)
        torch.testing.assert_close(found, model(text).logits[:, 11:], rtol=1e-9, atol=1e-9)
        check_equal_states(cache, fill(model, text))


@fixed_state
def test_weights_that_change_between_single_tokens_are_seen(variant):
    """And hooks, positions that are given, gradients, padding and several tokens at once, wherever they come."""
    model, ids = make_model(variant), make_ids(40)
    bias = model.model.layers[0].mixer.position_bias
    cache, reference = (DynamicCache(config=model.config) for _ in range(2))
    mask = torch.ones(2, 1, dtype=torch.long)

    def check(first, last, **options):
        """With the tokens that a state takes up at once: where gradients are recorded, none waits."""
        with torch.no_grad():
            found = feed(model, cache, ids[:, first:last], **options)
        with torch.enable_grad():
            expected = feed(model, reference, ids[:, first:last], **options)
        assert all(layer.recent is None for layer in reference.layers)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)

    with torch.no_grad():
        for each in (cache, reference):
            model(ids[:, :3], cache=each)
    check(3, 8)
    with torch.no_grad():
        for parameter in model.model.layers[0].mixer.parameters():
            parameter.add_(0.1)
    check(8, 10)
    if bias is not None:
        calls = []
        handle = bias.register_forward_hook(lambda *_: calls.append(1))
        check(10, 13)
        handle.remove()
        assert len(calls) == 2 * 3
    check(13, 15)
    check(15, 16, position_ids=torch.full((2, 1), 20))
    check(16, 19)
    check(19, 20, attention_mask=torch.tensor([[1], [0]]))
    check(20, 24, attention_mask=mask)
    with torch.inference_mode():
        feed(model, cache, ids[:, 24:27])
    feed(model, reference, ids[:, 24:27])
    check(27, 30)
    model(ids[:, 30:33], cache=cache), model(ids[:, 30:33], cache=reference)
    check(33, 36)
    model.to(torch.float32), check(36, 38)
    model.to(torch.float64), check(38, 40)


@pytest.mark.parametrize("decay", [None, "fixed"], ids=["no-decay", "decay"])
@pytest.mark.parametrize("variant", ["local", "local-dense", "local-1", "conv", "simple"])
def test_biases_are_known_for_more_tokens_than_are_asked_at_once(variant, decay):
    """Where they depend on the position, to the end of the tables."""
    length = AHEAD + ROOM + 9
    model, ids = make_model(variant, max_position_embeddings=length, decay=decay), make_ids(length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        cache = fill(model, ids[:, :5], attention_mask=mask[:, :5])
        found = feed(model, cache, ids[:, 5:])
    torch.testing.assert_close(found, whole[:, 5:], rtol=1e-9, atol=1e-9)


@fixed_state
def test_a_model_changes_its_dtype_between_single_tokens(variant):
    model, ids = make_model(variant, dtype=torch.float32), make_ids(9)
    cache, reference = (DynamicCache(config=model.config) for _ in range(2))
    for each, recorded in ((cache, False), (reference, True)):
        model.float()
        with torch.set_grad_enabled(recorded):
            feed(model, each, ids[:, :5])
            feed(model.double(), each, ids[:, 5:])
    for layer, expected in zip(cache.layers, reference.layers, strict=True):
        dtypes = [{name: t.dtype for name, t in each.state_dict().items()} for each in (layer, expected)]
        assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("variant", ["local", "conv-decay"])
def test_a_variant_that_computes_biases_of_its_own_takes_up_each_token(variant):
    class OwnMixer(type(make_model(variant).model.layers[0].mixer)):
        def biases(self, key, tokens):
            biases = super().biases(key, tokens)
            return {name: bias + key.mean() for name, bias in biases.items()}

    model, ids = make_model(variant), make_ids(20)
    for layer in model.model.layers:
        layer.mixer.__class__ = OwnMixer
    with torch.no_grad():
        cache = fill(model, ids[:, :4])
        feed(model, cache, ids[:, 4:9])
    assert all(layer.recent is None for layer in cache.layers)
