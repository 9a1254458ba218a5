"""TokenStream and refresh: what a plain loop gives, whatever the pieces, saved or not, in constant memory."""

import pytest
import torch
from families import LIMIT, VARIANTS, make_ids, make_model
from memory import LargestTensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_aft import TokenStream, streaming


ENDLESS = ["simple-nopos", "conv-nopos"]
EVERY, OVERLAP = 16, 5
REFRESH = {"refresh_every": EVERY, "refresh_overlap": OVERLAP}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
# Of each row, those that need no refresh without one, and all models with one.
CASES = [*((name, {}) for name in ENDLESS), *((name, REFRESH) for name in VARIANTS)]
cases = pytest.mark.parametrize("variant, refresh", CASES, ids=[f"{n}{'-refreshed' * bool(r)}" for n, r in CASES])
few = pytest.mark.parametrize(
    "variant, refresh",
    [("conv-nopos", {}), ("conv-nopos", REFRESH), ("full", REFRESH), ("random+dot_product", REFRESH)],
    ids=["conv", "conv-refreshed", "full-refreshed", "mixture-refreshed"],
)


def window_of(ids, index, refresh):
    """What a model that reads token `index` has read since its last start, that token included: [B, n]."""
    start, end = 0, EVERY
    while refresh and index >= end:  # it starts anew before it would read more, and reads the overlap again
        start = end - OVERLAP
        end = start + EVERY
    return ids[:, start : index + 1]


@torch.no_grad()
def plain_surprise(model, ids, refresh):
    """[B, T]: one forward pass from nothing for each window."""
    losses, windows = [torch.zeros(len(ids), 1)], {}
    for index in range(ids.shape[1] - 1):
        window = window_of(ids, index, refresh)
        windows[index + 1 - window.shape[1]] = window  # the longest from each start
    for start, window in windows.items():
        labels = ids[:, start + 1 : start + 1 + window.shape[1]]
        log_probabilities = model(window, use_cache=False).logits.log_softmax(-1)
        found = -log_probabilities.gather(2, labels[..., None])[..., 0].float()
        losses.append(found[:, OVERLAP if start else 0 :])
    return torch.cat(losses, dim=1)


@torch.no_grad()
def plain_greedy(model, ids, count, refresh):
    """[B, count]: the likeliest tokens, one forward pass from nothing for each."""
    length = ids.shape[1]
    for _ in range(count):
        logits = model(window_of(ids, ids.shape[1] - 1, refresh), use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, length:]


def read_in(stream, ids, sizes):
    """The surprise of all tokens, read in pieces of these sizes over and over."""
    found, start = [], 0
    while start < ids.shape[1]:
        for size in sizes:
            found.append(stream.read(ids[:, start : start + size]))
            start += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("sizes", [(100,), (1,), (3, 1, 7, 0, 11)], ids=["whole", "one-by-one", "pieces"])
@cases
def test_surprise_is_that_of_a_plain_loop(variant, refresh, sizes, monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST_PIECE", 13)
    model, ids = make_model(variant), make_ids(100)
    stream = TokenStream(model.train(), **refresh)
    found = read_in(stream, ids, sizes)
    torch.testing.assert_close(found, plain_surprise(model, ids, refresh), rtol=1e-5, atol=1e-5)
    assert stream.num_tokens == 100 and found.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize("length", [1, EVERY, EVERY + 1, 2 * EVERY - OVERLAP + 1, 61])
@few
def test_expected_is_what_a_plain_loop_writes(variant, refresh, length):
    model, ids = make_model(variant), make_ids(90)
    stream = TokenStream(model, **refresh)
    before = stream.read(ids[:, :length])
    found = stream.expect(**GREEDY | {"max_new_tokens": EVERY})
    assert torch.equal(found, plain_greedy(model, ids[:, :length], EVERY, refresh))
    after = stream.read(ids[:, length:])
    expected = TokenStream(model, **refresh).read(ids)
    torch.testing.assert_close(torch.cat([before, after], dim=1), expected, rtol=1e-5, atol=1e-5)


@few
def test_expect_takes_the_options_of_generate(variant, refresh):
    model, ids = make_model(variant), make_ids(40, batch=1)
    stream = TokenStream(model, **refresh)
    stream.read(ids)
    torch.manual_seed(0)
    one = stream.expect(8, do_sample=True, temperature=0.9)
    torch.manual_seed(0)
    assert torch.equal(stream.expect(8, do_sample=True, temperature=0.9), one)
    assert not torch.equal(one, stream.expect(8, do_sample=False))
    with pytest.raises(ValueError, match="temprature"):
        stream.expect(8, temprature=0.9)


@pytest.mark.parametrize("length", [1, 2, EVERY, EVERY + 1, 50])
@few
def test_a_saved_stream_goes_on_bit_by_bit(variant, refresh, length, tmp_path):
    model, ids = make_model(variant), make_ids(80)
    stream = TokenStream(model, **refresh)
    stream.read(ids[:, :length])
    stream.save(tmp_path / "stream")
    loaded = TokenStream.load(tmp_path / "stream", model)
    assert loaded.num_tokens == length
    assert torch.equal(loaded.expect(**GREEDY), stream.expect(**GREEDY))
    assert torch.equal(loaded.read(ids[:, length:]), stream.read(ids[:, length:]))
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


def test_saving_fails_without_harm(tmp_path, monkeypatch):
    model, ids = make_model("conv-nopos"), make_ids(30)
    stream = TokenStream(model)
    stream.read(ids)
    stream.save(tmp_path / "stream")
    before = (tmp_path / "stream").read_bytes()
    monkeypatch.setattr("modeling_aft.cache_files.os.fsync", lambda file: 1 / 0)
    stream.read(ids)
    with pytest.raises(ZeroDivisionError):
        stream.save(tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: t.pop("window"), "must be a file that TokenStream.save wrote"),
        (lambda t, m: m.pop("stream"), "must be a file that TokenStream.save wrote"),
        (lambda t, m: m.pop("kind"), "does not say of what model"),
        (
            lambda t, m: m.update(stream='{"num_tokens": 30}'),
            "must be a file that TokenStream.save wrote",
        ),
        (lambda t, m: m.update(stream="{"), "must be a file that TokenStream.save wrote"),
        (
            lambda t, m: t.update(window=t["window"][:1].clone()),
            r"must have .* `window` \[2, 1\], got \[1, 1",
        ),
        (lambda t, m: t.update(window=t["window"] + 256), "less than vocab_size .256., got"),
        (lambda t, m: t.pop("layers.0.key"), "layer 0 of .* must have tensors of the shapes"),
    ],
    ids=["window", "stream", "kind", "field", "json", "rows", "vocabulary", "state"],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    model = make_model("conv-nopos")
    stream = TokenStream(model)
    stream.read(make_ids(30))
    stream.save(tmp_path / "stream")
    with safe_open(tmp_path / "stream", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "stream")
    change(tensors, metadata)
    save_file(tensors, tmp_path / "stream", metadata)
    with pytest.raises(ValueError, match=message):
        TokenStream.load(tmp_path / "stream", model)


def test_files_of_others_are_refused(tmp_path):
    stream = TokenStream(make_model("conv-nopos"))
    stream.read(make_ids(30))
    stream.save(tmp_path / "stream")
    with pytest.raises(ValueError, match="must be a cache of a model with aft_type 'simple', not 'conv'"):
        TokenStream.load(tmp_path / "stream", make_model("simple-nopos"))
    with pytest.raises(FileNotFoundError, match="TokenStream.save wrote, but there is none"):
        TokenStream.load(tmp_path / "nothing", make_model("simple-nopos"))


@pytest.mark.parametrize(
    "variant, refresh, message",
    [
        ("conv", {}, "must be given, got None: the position tables of the model end at max_position_embeddings .48."),
        ("dot_product-nopos", {}, "must be given, got None: its state grows"),
        ("conv", {"refresh_every": 8}, "`refresh_overlap` must be given with `refresh_every`, got None"),
        ("conv", {"refresh_overlap": 8}, "`refresh_every` must be given with `refresh_overlap`, got None"),
        ("conv", {"refresh_every": 8, "refresh_overlap": 8}, r"must be less than `refresh_every` \(8\), got 8"),
        ("conv", {"refresh_every": 8, "refresh_overlap": 0}, "must be a whole number of at least 1, got 0"),
        ("conv", {"refresh_every": 8.0, "refresh_overlap": 1}, "must be a whole number of at least 1, got 8.0"),
        (
            "conv",
            {"refresh_every": LIMIT + 1, "refresh_overlap": 8},
            r"must be at most max_position_embeddings \(48\)",
        ),
    ],
    ids=["tables", "growing", "every-alone", "overlap-alone", "equal", "zero", "float", "beyond-the-tables"],
)
def test_what_cannot_be_is_refused(variant, refresh, message):
    model = make_model(variant)
    with pytest.raises(ValueError, match=message):
        TokenStream(model, **refresh)
    if refresh:
        with pytest.raises(ValueError, match=message):
            model.generate(make_ids(10), **GREEDY, **refresh)


def test_models_of_others_are_refused():
    with pytest.raises(ValueError, match="must be a causal language model of this package, got GPT2LMHeadModel"):
        TokenStream(GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(ValueError, match="must be a causal language model of this package, got AFTModel"):
        TokenStream(make_model("conv-nopos", head=False))


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(3, dtype=torch.long), r"must be \[2, T\], got \[3\]"),
        (torch.zeros(3, 4, dtype=torch.long), r"must be \[2, T\], got \[3, 4\]"),
        (torch.zeros(2, 4), "must be whole numbers, got torch.float32"),
        (torch.full((2, 4), 256), r"less than vocab_size \(256\), got 256"),
        (torch.full((2, 4), -1), r"at least 0 and less than vocab_size \(256\), got -1"),
    ],
    ids=["shape", "rows", "float", "large", "negative"],
)
def test_wrong_ids_leave_the_stream_as_it_is(ids, message):
    model, right = make_model("conv-nopos"), make_ids(20)
    stream = TokenStream(model)
    with pytest.raises(ValueError, match="`read` must have read at least one token before `expect`"):
        stream.expect(3)
    with pytest.raises(ValueError, match="`read` must have read at least one token before `save`"):
        stream.save("nowhere")
    before = stream.read(right[:, :10])
    with pytest.raises(ValueError, match=message):
        stream.read(ids)
    found = torch.cat([before, stream.read(right[:, 10:])], dim=1)
    torch.testing.assert_close(found, TokenStream(model).read(right))


@few
def test_no_tensor_grows_with_the_stream(variant, refresh, monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "LONGEST_PIECE", 16)
    model, largest, files = make_model(variant), [], []
    for length in (160, 160 + 44 * (EVERY - OVERLAP)):
        stream = TokenStream(model, **refresh)
        with LargestTensor() as tensors:
            read_in(stream, make_ids(length), (64,))
            stream.expect(**GREEDY)
        stream.save(tmp_path / "stream")
        largest.append(tensors.largest)
        files.append((tmp_path / "stream").stat().st_size)
    assert largest[0] == largest[1] and files[0] == files[1]


# Refresh in `generate`


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic", "uncached", "static"],
)
@pytest.mark.parametrize("length", [3, EVERY, 2 * EVERY, 61])
@pytest.mark.parametrize("variant", ["conv-nopos", "full", "dot_product-nopos", "dense"])
def test_generate_writes_what_a_plain_loop_does(variant, length, options):
    model, ids = make_model(variant), make_ids(length)
    found = model.generate(ids, **GREEDY | {"max_new_tokens": 30}, **REFRESH, **options)
    assert torch.equal(found[:, length:], plain_greedy(model, ids, 30, REFRESH))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "uncached"])
@pytest.mark.parametrize("variant", ["conv-nopos", "full", "dense"])
def test_padding_changes_nothing_that_is_written(variant, options):
    """Each row starts anew at a column of its own."""
    model, lengths = make_model(variant), (40, 37, 12, 1)
    ids = make_ids(40, batch=4)
    mask = torch.stack([torch.arange(40) >= 40 - length for length in lengths]).long()
    found = model.generate(ids * mask, attention_mask=mask, **GREEDY | {"max_new_tokens": 30}, **REFRESH, **options)
    for row, length in enumerate(lengths):
        alone = plain_greedy(model, ids[row : row + 1, 40 - length :], 30, REFRESH)
        assert torch.equal(found[row : row + 1, 40:], alone)


def plain_beams(model, ids, count, beams):
    """The likeliest of the texts that beam search keeps, without a cache."""
    texts, scores = ids, torch.zeros(1, dtype=torch.float64)
    for _ in range(count):
        window = window_of(texts, texts.shape[1] - 1, REFRESH)
        with torch.no_grad():
            log_probabilities = model(window, use_cache=False).logits[:, -1].float().log_softmax(-1)
        scores, best = (scores[:, None] + log_probabilities).flatten().topk(beams)
        texts = torch.cat([texts[best // 256], best[:, None] % 256], dim=1)
    return texts[:1]


@pytest.mark.parametrize("variant", ["conv-nopos", "full", "dense"])
def test_beams_start_anew_with_their_own_text(variant):
    model, ids = make_model(variant), make_ids(10, batch=1)
    found = model.generate(ids, num_beams=3, **GREEDY | {"max_new_tokens": 25}, **REFRESH)
    assert torch.equal(found, plain_beams(model, ids, 25, 3))


def test_samples_are_drawn_from_the_refreshed_model():
    model, ids = make_model("conv-nopos"), make_ids(61)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "return_dict_in_generate": True}
    torch.manual_seed(0)
    found = model.generate(ids, output_scores=True, **sampling, **REFRESH)
    with torch.no_grad():
        logits = model(window_of(ids, 60, REFRESH), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found.scores[0].double(), logits, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    drawn = torch.multinomial(found.scores[0].softmax(-1), 1)
    assert torch.equal(found.sequences[:, 61:], drawn)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_lookup_num_tokens": 3}, "needs a model alone, got assisted decoding"),
        ({"prefill_chunk_size": 4}, "needs no `prefill_chunk_size`"),
        ({"position_ids": torch.arange(20)[None]}, "needs positions that the model counts, got `position_ids`"),
        ({"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, r"needs an `attention_mask` \[B, T\], got"),
    ],
    ids=["assisted", "chunks", "positions", "matrix"],
)
def test_generate_refuses_what_cannot_start_anew(options, message):
    model, ids = make_model("conv-nopos"), make_ids(20, batch=1)
    with pytest.raises(ValueError, match="`refresh_every` " + message):
        model.generate(ids, **GREEDY, **REFRESH, **options)


def test_generate_refuses_what_has_no_ids_to_read_again():
    model, ids = make_model("conv-nopos"), make_ids(20, batch=1)
    with pytest.raises(ValueError, match="`refresh_every` needs `input_ids`, got `inputs_embeds`"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY, **REFRESH)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :7], cache=cache)
    with pytest.raises(ValueError, match="`refresh_every` needs an empty `cache`, got one that has read 7 tokens"):
        model.generate(ids, cache=cache, **GREEDY, **REFRESH)
