"""`generate_batch`: a batch that stays full writes what `generate` writes for each prompt alone."""

import random

import pytest
import torch
from families import FIXED_STATE, LIMIT, make_model, make_seq2seq
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from modeling_aft.continuous_batching import ContinuousBatch


def make_prompts(count: int, longest: int = 20) -> tuple[list[list[int]], list[int]]:
    """Prompts of random ids, and how many tokens to write after each."""
    generator = random.Random(0)
    prompts = [[generator.randrange(256) for _ in range(generator.randint(1, longest))] for _ in range(count)]
    return prompts, [generator.randint(1, 25) for _ in prompts]


def alone(model, prompt: list[int], **options) -> list[int]:
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("variant", FIXED_STATE)
def test_each_text_is_that_of_its_prompt_alone(variant, size):
    model = make_model(variant)
    prompts, numbers = make_prompts(14)
    outputs = model.generate_batch(prompts, max_new_tokens=numbers, max_batch_size=size, do_sample=False)
    assert list(outputs) == [f"req_{number}" for number in range(14)]
    for prompt, number, output in zip(prompts, numbers, outputs.values(), strict=True):
        assert isinstance(output, GenerationOutput) and output.is_finished() and output.prompt_ids == prompt
        assert output.generated_tokens == alone(model, prompt, max_new_tokens=number, do_sample=False)


OPTIONS = {
    "eos": {"eos_token_id": [7, 100, *range(120, 150)]},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "min": {"min_new_tokens": 4, "eos_token_id": list(range(200))},
    "suppressed": {"suppress_tokens": list(range(50, 200)), "begin_suppress_tokens": [3, 4]},
    "coldest": {"do_sample": True, "top_k": 1},
    "encoder-penalty": {"encoder_repetition_penalty": 1.4},
    "length": {"max_length": 24, "max_new_tokens": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("variant", ["conv", "simple-nopos"])
def test_options_mean_what_they_mean_for_each_prompt_alone(variant, options):
    model = make_model(variant)
    prompts, _ = make_prompts(9)
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    outputs = model.generate_batch(prompts, max_batch_size=4, **options)
    written = [output.generated_tokens for output in outputs.values()]
    assert written == [alone(model, prompt, **options) for prompt in prompts]
    if "eos_token_id" in options:
        assert len({len(tokens) for tokens in written}) > 1


def test_a_config_says_what_flags_say():
    model = make_model("local")
    prompts, _ = make_prompts(5)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None)
    outputs = model.generate_batch(prompts, config)
    expected = model.generate_batch(prompts, max_new_tokens=6, do_sample=False)
    assert [o.generated_tokens for o in outputs.values()] == [o.generated_tokens for o in expected.values()]
    assert config.max_length is None or config.max_length == GenerationConfig().max_length
    assert model.generate_batch([]) == {}


def test_samples_are_drawn_from_the_generator_of_torch():
    """With the probabilities that the options leave, which are the same for all rows."""
    model = make_model("simple")
    prompts = [[5, 6, 7]] * 600
    options = {"do_sample": True, "temperature": 0.7, "top_k": 4, "max_new_tokens": 1}
    torch.manual_seed(0)
    first = [output.generated_tokens[0] for output in model.generate_batch(prompts, **options).values()]
    torch.manual_seed(0)
    assert first == [output.generated_tokens[0] for output in model.generate_batch(prompts, **options).values()]
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1])).logits[0, -1]
    best, ids = (logits / 0.7).topk(4)
    shares = torch.tensor([first.count(token) / len(first) for token in ids.tolist()], dtype=best.dtype)
    torch.testing.assert_close(shares, best.softmax(0), rtol=0, atol=0.07)
    assert shares.sum() == 1


@pytest.mark.parametrize("variant", ["local", "conv"])
def test_texts_end_where_the_tables_do(variant, caplog):
    model = make_model(variant)
    prompts, _ = make_prompts(12, LIMIT)
    prompts[3] = [1] * LIMIT
    outputs = model.generate_batch(prompts, max_new_tokens=30, max_batch_size=3, do_sample=False)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert len(output.generated_tokens) == min(30, LIMIT + 1 - len(prompt))
        assert output.generated_tokens == alone(model, prompt, max_new_tokens=30, do_sample=False)
    assert "has reached the end of the model's tables" in caplog.text


def test_the_batch_stays_full(monkeypatch):
    """Fewer than an eighth of the rows rest while prompts wait, and few at the end."""
    model = make_model("conv-nopos")
    prompts, numbers = make_prompts(60)
    seen, write = [], ContinuousBatch._write

    def watched(self, requests, logits):
        if self.rows is requests:
            seen.append((len(requests), requests.count(None), len(self.waiting)))
        return write(self, requests, logits)

    monkeypatch.setattr(ContinuousBatch, "_write", watched)
    model.generate_batch(prompts, max_new_tokens=numbers, max_batch_size=16, do_sample=False)
    assert all(resting < (2 if waiting else max(1, rows // 4)) for rows, resting, waiting in seen)
    assert all(rows == 16 for rows, _, waiting in seen if waiting)
    assert sum(rows for rows, _, _ in seen) < 1.1 * sum(numbers)


@pytest.mark.parametrize(
    "values, message",
    {
        "no prompt": ({"inputs": [[1], []]}, r"`inputs\[1\]` must be 1 to 48 ids, .* got 0 of them"),
        "long": ({"inputs": [[1] * 49]}, r"`inputs\[0\]` must be 1 to 48 ids, as max_position_embeddings says"),
        "ids": ({"inputs": [[1, 256]]}, r"`inputs\[0\]` must be ids from 0 to 255, got 1 to 256"),
        "numbers": (
            {"max_new_tokens": [1, 2]},
            "`max_new_tokens` must be one number, or 1, one for each prompt, got 2",
        ),
        "none": ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        "size": ({"max_batch_size": 0}, "`max_batch_size` must be a whole number of at least 1, got 0"),
        "beams": ({"num_beams": 2}, "`num_beams` must be None or 1 in `generate_batch`, got 2"),
        "several": ({"num_return_sequences": 2, "do_sample": True}, "`num_return_sequences` must be None or 1"),
        "strings": ({"stop_strings": ["a"]}, r"`stop_strings` must be None in `generate_batch`, got \['a'\]"),
        "lookup": ({"prompt_lookup_num_tokens": 2}, "`prompt_lookup_num_tokens` must be None in"),
    }.values(),
    ids=lambda value: None,
)
def test_what_it_cannot_do_is_refused_before_any_work(values, message, monkeypatch):
    model = make_model("local")
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        model.generate_batch(**{"inputs": [[1, 2]], **values})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="generate_batch.. knows no option `stopping_criteria`"):
        make_model("local").generate_batch([[1]], stopping_criteria=[])


@pytest.mark.parametrize("variant", ["full", "dense", "random+dot_product", "seq2seq"])
def test_states_that_grow_are_refused(variant):
    model = make_seq2seq("conv") if variant == "seq2seq" else make_model(variant)
    with pytest.raises(ValueError, match="Use `generate` with a padded batch"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
