"""Classifiers that are encoder-decoders: what is read, which state counts, losses, files, and what is refused."""

import pytest
import torch
from families import make_ids, make_seq2seq, make_seq2seq_config, spread
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, pipeline

from aft.seq2seq_models import end_texts
from modeling_aft import (
    AFTSeq2SeqForSequenceClassification,
    ByteTokenizer,
    SynthesizerSeq2SeqForSequenceClassification,
)


END, START = 1, 0  # as the tests of all encoder-decoders have them; padding is 0 too
# Padded before, behind and within, and not at all; ends at the end, before other ids, twice.
MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 7 + [0] * 2, [1, 0, 1, 0, 0, 1, 1, 1, 0], [1] * 9])
ENDS = [(8,), (3, 6), (7, 5, 3), (4,)]  # that of row 2 at 3 is padding
LAST = [8, 6, 7, 4]


def make_classifier(variant, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = make_seq2seq_config(variant, **{"num_labels": 3, **changes})
    return spread(AutoModelForSequenceClassification.from_config(config).to(dtype).eval())


def make_source():
    ids = make_ids(9, 4).clamp_min(2)
    for row, places in enumerate(ENDS):
        ids[row, list(places)] = END
    return ids


@pytest.mark.parametrize("variant", ["dense", "random+dot_product", "conv", "local", "simple"])
def test_the_state_at_the_last_end_is_classified(variant):
    model, source = make_classifier(variant), make_source()
    logits = model(source, MASK).logits
    for row in range(4):
        kept = source[row][MASK[row].bool()]
        read = torch.cat([torch.tensor([START]), kept[:-1]])
        state = model.model(kept[None], decoder_input_ids=read[None]).last_hidden_state[0]
        place = int(MASK[row, : LAST[row]].sum())
        torch.testing.assert_close(logits[row], model.score.weight @ state[place] + model.score.bias)
    other = source.clone()
    other[3, 4:6] = torch.tensor([END + 4, END])
    assert not torch.allclose(model(other, MASK).logits[3], logits[3])
    assert torch.equal(model(other, MASK).logits[:3], logits[:3])


def test_padding_at_the_ends_is_found_without_a_mask():
    model, source = make_classifier("random"), make_source()
    source = source.masked_fill(MASK == 0, 0)[[0, 1, 3]]
    torch.testing.assert_close(model(source).logits, model(source, MASK[[0, 1, 3]]).logits)


def test_the_end_may_be_one_of_several_ids():
    model, source = make_classifier("dense", eos_token_id=[END, 300]), make_source()
    torch.testing.assert_close(model(source, MASK).logits, make_classifier("dense")(source, MASK).logits)


def test_pipeline_classifies_texts_of_any_length():
    tokenizer = ByteTokenizer()
    end_texts(tokenizer)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = make_classifier("random+dot_product", torch.float32, pad_token_id=tokenizer.pad_token_id, **ids)
    texts = ["A tool", "Tool for texts", "x"]
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, top_k=None, batch_size=2)
    for text, scores in zip(texts, found, strict=True):
        logits = model(torch.tensor([[*text.encode(), tokenizer.eos_token_id]])).logits[0]
        expected = {f"LABEL_{index}": value for index, value in enumerate(logits.softmax(-1).tolist())}
        assert {score["label"]: score["score"] for score in scores} == pytest.approx(expected, rel=1e-4)


def test_the_decoder_may_read_another_text():
    model, source, text = make_classifier("dense"), make_source(), make_ids(5, 4, 3)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    states = model.model(source, MASK, text, mask).last_hidden_state
    expected = model.score(states[range(4), [4, 4, 2, 0]])
    torch.testing.assert_close(model(source, MASK, text, mask).logits, expected)
    encoded = model.model.encoder(source, MASK)
    torch.testing.assert_close(model(None, MASK, text, mask, encoder_outputs=encoded).logits, expected)
    table = model.get_input_embeddings()
    embedded = {"inputs_embeds": table(source), "decoder_inputs_embeds": table(text)}
    torch.testing.assert_close(model(attention_mask=MASK, decoder_attention_mask=mask, **embedded).logits, expected)
    torch.testing.assert_close(model(source, MASK, text).logits[0], expected[0])


@pytest.mark.parametrize("variant", ["random+dot_product", "conv"])
@pytest.mark.parametrize(
    ("problem", "labels", "formula"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1]), F.cross_entropy),
        ("multi_label_classification", torch.rand(4, 3).round(), F.binary_cross_entropy_with_logits),
        ("regression", torch.rand(4, 3), F.mse_loss),
    ],
    ids=["classes", "several", "numbers"],
)
def test_losses_and_gradients(variant, problem, labels, formula):
    model, source = make_classifier(variant, torch.float32, problem_type=problem), make_source()
    out = model(source, MASK, labels=labels, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.loss, formula(out.logits, labels))
    assert [len(t) for t in (out.encoder_hidden_states, out.decoder_hidden_states, out.cross_attentions)] == [3, 3, 2]
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


def test_losses_of_parts_of_a_batch_add_up():
    model, source, labels = make_classifier("dense", torch.float32), make_source(), torch.tensor([0, 2, -100, 1])
    parts = [
        model(source[rows], MASK[rows], labels=labels[rows], num_items_in_batch=3).loss
        for rows in (slice(1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), model(source, MASK, labels=labels).loss)


@pytest.mark.parametrize("variant", ["random", "conv"])
def test_files(variant, tmp_path):
    source = make_source()
    make_seq2seq(variant, dtype=torch.float32).save_pretrained(tmp_path / "language")
    begun, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "language", num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"score.weight", "score.bias"} and not report["unexpected_keys"]
    expected = (
        AFTSeq2SeqForSequenceClassification if variant == "conv" else SynthesizerSeq2SeqForSequenceClassification
    )
    assert type(begun) is expected
    begun.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(loaded(source, MASK).logits, begun.eval()(source, MASK).logits)
    assert loaded.model.decoder.embed_tokens.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_embeddings(tied):
    for model in (classifier := make_classifier("dense", tie_word_embeddings=tied), classifier.model):
        model.resize_token_embeddings(size := model.config.vocab_size + 4)
        tables = classifier.model.encoder.embed_tokens, classifier.model.decoder.embed_tokens
        assert (tables[0].weight is tables[1].weight) == tied
        assert {len(table.weight) for table in tables} == {size} == {model.config.vocab_size}
        model.config.validate_fields()


BAD = {
    "no-end": (
        {},
        {"input_ids": make_source().masked_fill(torch.tensor([[1], [0], [1], [0]]) == 1, 5)},
        r"rows \[0, 2\]",
    ),
    "padded-end": (
        {},
        {"input_ids": make_source(), "attention_mask": 1 - F.one_hot(torch.tensor(LAST), 9)},
        r"`input_ids` must be ids with an end \(config.eos_token_id=1\) in every row, got none in rows \[0, 3\]",
    ),
    "no-id-of-ends": ({"eos_token_id": None}, {"input_ids": make_source()}, "`config.eos_token_id` must be an id"),
    "no-first-id": (
        {"decoder_start_token_id": None},
        {"input_ids": make_source()},
        "`config.decoder_start_token_id` must be an id where inputs are made of those of the encoder",
    ),
    "nothing-to-decode": (
        {},
        {"inputs_embeds": torch.ones(4, 9, 16)},
        "`decoder_input_ids` must be given where there",
    ),
    "mask-alone": (
        {},
        {"input_ids": make_source(), "decoder_attention_mask": MASK},
        "`decoder_attention_mask` must be None where the decoder reads `input_ids`",
    ),
    "other-mask": (
        {},
        {"input_ids": make_source(), "decoder_input_ids": make_ids(3, 4), "decoder_attention_mask": MASK},
        r"`decoder_attention_mask` must be of shape \[4, 3\], got \[4, 9\]",
    ),
    "empty-row": (
        {},
        {
            "input_ids": make_source(),
            "decoder_input_ids": make_ids(9, 4),
            "decoder_attention_mask": MASK * MASK[:, :1],
        },
        r"`decoder_attention_mask` must be 1 at a token of every row, got none in rows \[0\]",
    ),
    "packed": ({}, {"input_ids": make_source(), "attention_mask": MASK.cumsum(1) // 4 + 1}, "several documents"),
}


@pytest.mark.parametrize(("changes", "inputs", "message"), BAD.values(), ids=BAD)
def test_bad_inputs_are_refused(changes, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_classifier("dense", torch.float32, **changes)(**inputs)


def test_a_misspelled_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword arguments use_cache"):
        make_classifier("dense")(make_source(), use_cache=True)
