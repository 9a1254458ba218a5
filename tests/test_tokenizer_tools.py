"""ByteTokenizer in the hands of the library: Trainer, generate, collators, pipelines, chats, streams."""

import json
from pathlib import Path

import pytest
import torch
from families import LIMIT, VARIANTS, make_config, make_ids, make_model
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    configuration_utils,
    pipeline,
)

from aft.vocabulary import rows_needed
from modeling_aft import ByteTokenizer


SOME = pytest.mark.parametrize("variant", ["local", "conv-nopos", "dense", "random+dot_product"])
GREEDY = {"max_new_tokens": 8, "do_sample": False}
UNLIMITED = int(1e30)  # of a tokenizer


def after_one_step(model, tokenizer, folder):
    """A model after a step of Trainer that changes no weight, and what is loaded of the folder where it was saved."""
    arguments = TrainingArguments(
        folder, max_steps=1, learning_rate=0.0, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[tokenizer("some te\0t"), tokenizer("more")],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(folder)
    return model.eval(), AutoModelForCausalLM.from_pretrained(folder).eval()


# Padding is no byte.


@SOME
def test_after_training_a_byte_0_is_no_padding(variant, tmp_path):
    ids = make_ids(12)
    ids[0, 3] = ids[1, 0] = ids[1, 11] = 0
    model = make_model(variant, dtype=torch.float32)
    before = model.generate(ids, **GREEDY)
    assert 255 not in before[:, 12:]  # now an end
    for case in after_one_step(model, ByteTokenizer(), tmp_path):
        assert (case.config.pad_token_id, case.config.eos_token_id, case.config.vocab_size) == (256, 255, 256)
        assert case.generation_config.pad_token_id == 256
        assert torch.equal(case.generate(ids, **GREEDY), before)


def test_of_ids_beyond_the_vocabulary_that_of_padding_is_no_mistake(monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", warnings.append)
    make_config("local", pad_token_id=256)
    make_config("local", pad_token_id=0)
    assert not warnings
    make_config("local", bos_token_id=256)
    make_config("local", pad_token_id=-1)
    assert len(warnings) == 2


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"do_sample": True, "top_k": 1}],
    ids=["greedy", "repetition", "beams", "ngrams", "sampling"],
)
@SOME
def test_rows_of_a_padded_batch_end_on_their_own(variant, options, tmp_path):
    """With an id that each row writes at another time as the end; the rows are those of each prompt alone."""
    tokenizer, prompts = ByteTokenizer(), ["a", "some longer one \0", "two of"]
    model = make_model(variant, dtype=torch.float32, pad_token_id=256)
    options = {**GREEDY, **options}
    alone = [model.generate(**tokenizer(p, return_tensors="pt"), **options)[0, len(p) :].tolist() for p in prompts]
    ends = [alone[0][1], alone[1][5]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    if "num_beams" not in options:
        alone = [row[: 1 + min([row.index(end) for end in ends if end in row], default=7)] for row in alone]
    else:
        rows = [model.generate(**tokenizer(p, return_tensors="pt"), **options, eos_token_id=ends) for p in prompts]
        alone = [row[0, len(p) :].tolist() for row, p in zip(rows, prompts, strict=True)]
    length = batch.input_ids.shape[1]
    for inputs in (batch, {"input_ids": batch.input_ids}):  # without a mask, padding is known by its id
        written = model.generate(**inputs, **options, eos_token_id=ends)[:, length:].tolist()
        assert [row[: len(own)] for row, own in zip(written, alone, strict=True)] == alone
        assert {token for row, own in zip(written, alone, strict=True) for token in row[len(own) :]} <= {256}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
@SOME
@torch.no_grad()
def test_classifiers_know_padding_without_a_mask(variant, auto_class, causal, side):
    tokenizer = ByteTokenizer(padding_side=side)
    texts = ["short\0", "\0 some longer text \0", "mid"]
    config = make_config(variant, is_decoder=causal, num_labels=3, pad_token_id=tokenizer.pad_token_id)
    model = auto_class.from_config(config).double().eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    masked, unmasked = model(**batch).logits, model(batch.input_ids).logits
    for row, text in enumerate(texts):
        kept = slice(None) if masked.dim() == 2 else batch.attention_mask[row].bool()
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(masked[row][kept], alone)
        torch.testing.assert_close(unmasked[row][kept], alone)


def test_collators_keep_byte_0_as_data():
    tokenizer = ByteTokenizer(mask_token="[MASK]")
    rows = [tokenizer("a\0\0b"), tokenizer("\0")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert batch["input_ids"].tolist() == [[97, 0, 0, 98], [257, 257, 257, 0]]
    assert batch["labels"].tolist() == [[97, 0, 0, 98], [-100, -100, -100, 0]]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    torch.manual_seed(0)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.999)(rows)
    assert batch["labels"].tolist() == [[97, 0, 0, 98], [-100, -100, -100, 0]]


def test_a_masked_model_needs_no_row_for_padding():
    """Though the collator may put the id of padding in the place of a masked token."""
    tokenizer = ByteTokenizer(mask_token="[MASK]")
    config = make_config("local", is_decoder=False, vocab_size=257, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForMaskedLM.from_config(config)
    ids = torch.tensor([[97, 257, 98, 256]])
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_of_tensors(side, return_tensors):
    rows = [{"input_ids": torch.tensor([0, 1])}, {"input_ids": torch.tensor([3])}]
    batch = ByteTokenizer().pad(rows, padding_side=side, pad_to_multiple_of=3, return_tensors=return_tensors)
    expected = [[256, 0, 1], [256, 256, 3]] if side == "left" else [[0, 1, 256], [3, 256, 256]]
    assert batch["input_ids"].tolist() == expected


@SOME
def test_an_embedding_may_grow_to_the_size_of_the_tokenizer(variant, tmp_path):
    """As scripts of the library make it, whether it need be or not."""
    tokenizer, model = ByteTokenizer(), make_model(variant, dtype=torch.float32)
    batch = tokenizer(["a", "longer"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits
    model.resize_token_embeddings(len(tokenizer))
    torch.testing.assert_close(model(**batch).logits[..., :256], before)
    _, loaded = after_one_step(model, tokenizer, tmp_path)
    assert (loaded.config.vocab_size, loaded.config.pad_token_id) == (257, 256)
    torch.testing.assert_close(loaded(**batch).logits[..., :256], before)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, 256),
        ({"eos_token": "<|end|>"}, 257),
        ({"eos_token": "<|end|>", "pad_token": "<|end|>"}, 257),
        ({"pad_token": None}, 256),
        ({"mask_token": "[MASK]", "eos_token": None}, 257),
    ],
    ids=["default", "end", "shared", "no-padding", "mask"],
)
def test_rows_that_a_tokenizer_needs(options, needed, tmp_path):
    tokenizer = ByteTokenizer(**options)
    assert rows_needed(tokenizer, make_config("local")) == needed
    tokenizer.save_pretrained(tmp_path)
    assert rows_needed(PreTrainedTokenizerFast.from_pretrained(tmp_path), make_config("local")) == needed


# A text ends where the tables of its model end.


def save(folder, variant, tokenizer_first=False, auto_class=AutoModelForCausalLM, **options):
    model = auto_class.from_config(make_config(variant, **options))
    for part in (ByteTokenizer(), model) if tokenizer_first else (model, ByteTokenizer()):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokenizer_first", [False, True], ids=["model-first", "tokenizer-first"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_says_how_long_a_text_may_be(variant, tokenizer_first, tmp_path):
    save(tmp_path, variant, tokenizer_first)
    limit = LIMIT if make_config(variant).has_position_table else None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == (limit or UNLIMITED)
    assert len(tokenizer("x" * 100, truncation=True).input_ids) == (limit or 100)
    if not tokenizer_first:  # where the package is not there to look
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path).model_max_length == (limit or UNLIMITED)


def test_a_limit_of_ones_own_is_kept(tmp_path):
    save(tmp_path, "local")
    for asked in (20, 1000):
        assert ByteTokenizer.from_pretrained(tmp_path, model_max_length=asked).model_max_length == asked
    tokenizer = ByteTokenizer(model_max_length=20)
    tokenizer.save_pretrained(tmp_path)
    assert ByteTokenizer.from_pretrained(tmp_path).model_max_length == 20
    tokenizer = ByteTokenizer(model_max_length=1000)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.model_max_length == 1000
    assert ByteTokenizer.from_pretrained(tmp_path).model_max_length == LIMIT


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "{}", '{"model_type": "gpt2", "n_positions": 16}', '{"model_type": "aft", "aft_type": "other"}'],
    ids=["damaged", "list", "empty", "gpt2", "wrong-value"],
)
def test_other_configurations_set_no_limit(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    ByteTokenizer().save_pretrained(tmp_path)
    assert ByteTokenizer.from_pretrained(tmp_path).model_max_length == UNLIMITED
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == UNLIMITED


@pytest.mark.parametrize("variant", ["local", "dense"])
def test_pipelines_truncate(variant, tmp_path):
    """The last as the library's own test of the feature-extraction pipeline does it."""
    long = "This is a test" * 100
    for task, auto_class in (
        ("text-classification", AutoModelForSequenceClassification),
        ("feature-extraction", AutoModelForMaskedLM),
    ):
        save(tmp_path / task, variant, auto_class=auto_class, is_decoder=False)
        pipe = pipeline(task, model=str(tmp_path / task))
        assert pipe(long, truncation=True) == pipe(long[:LIMIT])
        assert len(pipe([long, "short"], truncation=True, batch_size=2)) == 2


def test_a_long_prompt_makes_room(tmp_path):
    generate = pipeline("text-generation", model=str(save(tmp_path, "local")))
    text = generate("x" * 100, handle_long_generation="hole", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("x" * 100) and len(text) > 100


def test_the_pipeline_of_the_shipped_synthesizer_ends_at_its_table(caplog):
    folder = Path(__file__).resolve().parent.parent / "model_cards" / "synthesizer-enwik8"
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=False)
    assert generate.tokenizer.model_max_length == 256
    for prompt, options, length, warned in (
        ("The history of ", {}, 15 + 128, 0),  # what its generation config says
        ("x" * 200, {"max_new_tokens": 256}, 257, 1),
        ("x" * 200, {}, 257, 1),
    ):
        caplog.clear()
        output = generate(prompt, return_tensors=True, **options)[0]["generated_token_ids"]
        assert len(output) == length
        assert caplog.text.count("end of the model's tables") == warned


# Chats and streams.

CHAT = [
    {"role": "user", "content": "qé<|endoftext|>"},
    {"role": "assistant", "content": "é so €"},
    {"role": "user", "content": "Ā"},
    {"role": "assistant", "content": "😀"},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a: {% generation %}{{ m.content }}{{ end }}"
    "{% endgeneration %}\n{% else %}u: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|end|>"])
def test_a_chat_template_writes_the_end(token):
    tokenizer = ByteTokenizer(eos_token=token, chat_template=TEMPLATE.replace("end }}", "eos_token }}"))
    ids = tokenizer.apply_chat_template(CHAT[1:], return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == f"a: é so €{token}u: Ā\na: 😀{token}"


@pytest.mark.parametrize("end", ["", "<|endoftext|>", "!"], ids=["character", "end", "byte"])
@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_masks_of_answers_hold_whole_characters(batched, return_tensors, end):
    tokenizer = ByteTokenizer(chat_template=TEMPLATE.replace("{{ end }}", end))
    chats = [CHAT, CHAT[:2]] if batched else CHAT
    options = {"return_tensors": return_tensors, "padding": batched, "return_dict": True}
    encoded = tokenizer.apply_chat_template(chats, return_assistant_tokens_mask=True, **options)
    answers = ["é so €" + end + "😀" + end, "é so €" + end]
    rows = batched or return_tensors is not None
    ids, masks = (encoded[name] if rows else [encoded[name]] for name in ("input_ids", "assistant_masks"))
    for row, mask, answer in zip(ids, masks, answers, strict=batched):
        assert tokenizer.decode([i for i, kept in zip(row, mask, strict=True) if kept]) == answer


@pytest.mark.parametrize("skip", [True, False])
def test_streams_hold_a_character_back_until_it_is_whole(skip):
    tokenizer, text = ByteTokenizer(), "né € 😀\n你好 "
    stream, pieces = DecodeStream(skip_special_tokens=skip), []
    for token in tokenizer(text).input_ids:
        if (piece := stream.step(tokenizer.backend_tokenizer, token)) is not None:
            pieces.append(piece)
    assert pieces == list(text)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=skip)
    for token in [*tokenizer(text).input_ids, 255]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text + ("" if skip else "<|endoftext|>")
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["é", "b\0", "€", "Ā"])
def test_generate_stops_at_a_string_of_any_bytes(stop):
    tokenizer, model = ByteTokenizer(), make_model("conv-nopos", dtype=torch.float32, pad_token_id=256)
    data = stop.encode()
    model.forward = script(model.forward, [*b"xy", *data, *b"zz"])
    batch = tokenizer(["a", "longer"], padding=True, return_tensors="pt")
    output = model.generate(**batch, **GREEDY, stop_strings=[stop], tokenizer=tokenizer)
    assert bytes(output[0, batch.input_ids.shape[1] :].tolist()) == b"xy" + data


def script(forward, said: list[int]):
    """A forward pass whose likeliest next tokens are those given, one each time."""
    left = iter(said)

    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1, next(left)] = 1e4
        return output

    return wrapped


def test_offsets_and_words_of_characters_with_several_bytes():
    tokenizer = ByteTokenizer()
    encoded = tokenizer("aé😀", return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(0, 1)] + [(1, 2)] * 2 + [(2, 3)] * 4
    assert (encoded.char_to_token(2), encoded.token_to_chars(6)) == (3, (2, 3))
    words = tokenizer(["né", "b"], is_split_into_words=True)
    assert words.input_ids == list("néb".encode()) and words.word_ids() == [0, 0, 0, 1]
    windows = tokenizer("abcdef", truncation=True, max_length=4, stride=2, return_overflowing_tokens=True)
    assert windows.input_ids == [list(b"abcd"), list(b"cdef")]
