"""Bytes and tokenizers as vocabularies: each byte of a text belongs to one token, whatever the tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aft.text_sources import FileText
from aft.vocabulary import (
    ByteVocabulary,
    TokenizerVocabulary,
    load_vocabulary,
    train_bpe,
    trained_vocabulary,
)
from modeling_aft import AFTConfig, ByteTokenizer


TEXTS = [
    "The cat sat on the mat.\n\nThe dog did not.",
    "né, naïve, 中文, \U0001f600\U0001f44d\u200d",
    "   spaces\t\ttabs \n",
    "",
    " ",
    "<|endoftext|> in a text is text",
    "e\u0301 is two characters",
]


def bpe() -> PreTrainedTokenizerFast:
    return train_bpe([TEXTS * 3], 290)


def words() -> PreTrainedTokenizerFast:
    """A lossy one: small letters, and whatever it does not know is one token."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "[SEP]": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def pieces() -> PreTrainedTokenizerFast:
    """One in the manner of SentencePiece, with a space before each text and bytes for what it does not know."""
    vocab = [("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnop")]
    vocab += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"bpe": bpe, "words": words, "pieces": pieces}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_sizes_add_up_to_the_bytes_of_the_text(kind, index):
    text = TEXTS[index]
    [(ids, sizes)] = TokenizerVocabulary(TOKENIZERS[kind](), "--tokenizer").encode([text])
    assert len(ids) == len(sizes) and (sizes >= 0).all()
    if len(ids):
        assert sizes.sum() == len(text.encode())
    else:
        assert not text.strip()


def test_sizes_are_those_of_each_token_where_they_can_be_told():
    vocabulary = TokenizerVocabulary(bpe(), "--tokenizer")
    for text in ("The cat sat on the mat.", "naïve 中文 \U0001f600"):
        [(ids, sizes)] = vocabulary.encode([text])
        content, done, characters = text.encode(), 0, 0
        for end in np.cumsum([len(vocabulary.decode([i])) for i in ids]):  # of parts of characters: U+FFFD, 3 bytes
            characters = end
        for token, size in zip(ids, sizes, strict=True):
            piece = vocabulary.tokenizer.convert_ids_to_tokens(int(token))
            if text.isascii():
                assert content[done : done + size].decode() == piece.replace("\u0120", " ")
            done += size
        assert done == len(content) and characters >= done


@pytest.mark.parametrize("kind, exact", [("bpe", True), ("words", False)])
def test_what_loses_text_is_said_to(kind, exact):
    vocabulary = TokenizerVocabulary(TOKENIZERS[kind](), "--tokenizer")
    vocabulary.encode(TEXTS)
    assert vocabulary.is_exact == exact


def test_a_bpe_gives_every_text_back():
    vocabulary = TokenizerVocabulary(bpe(), "--tokenizer")
    assert vocabulary.size == 290 and vocabulary.end == 0
    for text, (ids, _) in zip(TEXTS, vocabulary.encode(TEXTS), strict=True):
        assert vocabulary.decode(ids) == text.encode()
        assert vocabulary.end not in ids


def test_saved_padding_and_truncation_do_not_count(tmp_path):
    tokenizer = bpe()
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = load_vocabulary(str(tmp_path))
    assert [len(ids) for ids, _ in vocabulary.encode(TEXTS)] == [
        len(ids) for ids, _ in TokenizerVocabulary(bpe(), "").encode(TEXTS)
    ]


def test_bytes():
    vocabulary = ByteVocabulary()
    for text, (ids, sizes) in zip(TEXTS, vocabulary.encode(TEXTS), strict=True):
        assert ids.tobytes() == text.encode() and (sizes == 1).all() and len(sizes) == len(ids)
    assert vocabulary.decode(vocabulary.encode_prompt(bytes(range(256)))) == bytes(range(256))


def test_a_saved_byte_tokenizer_is_bytes(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    assert load_vocabulary(str(tmp_path)).is_bytes


def test_a_tokenizer_json_is_enough(tmp_path):
    bpe().save_pretrained(tmp_path)
    found = load_vocabulary(str(tmp_path / "tokenizer.json"))
    assert found.encode(TEXTS)[0][0].tolist() == TokenizerVocabulary(bpe(), "").encode(TEXTS)[0][0].tolist()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="--tokenizer .*broken.json: must be a tokenizer.json or a folder"):
        load_vocabulary(str(tmp_path / "broken.json"))


@pytest.mark.parametrize("name, message", [("nowhere/at/all", "no such folder"), ("", "saved tokenizer")])
def test_what_is_no_tokenizer_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--tokenizer {name}: .*{message}"):
        load_vocabulary(name)


def test_a_trained_one_is_kept_by_content(tmp_path, monkeypatch):
    content = ("The cat sat on the mat. " * 40).encode()
    first = trained_vocabulary(FileText("a", content), 262, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("aft.vocabulary.train_bpe", None)
        again = trained_vocabulary(FileText("b", content), 262, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert first.encode(["the mat"])[0][0].tolist() == again.encode(["the mat"])[0][0].tolist()
    other = trained_vocabulary(FileText("a", content[::-1]), 262, tmp_path)
    assert other.fingerprint != first.fingerprint and len(list(tmp_path.iterdir())) == 2


def test_a_bpe_is_trained_on_train_alone(tmp_path):
    content = b"ab " * 900 + b"xy " * 100
    tokens = trained_vocabulary(FileText("a", content), 259, tmp_path).tokenizer.get_vocab()
    assert "ab" in tokens and "xy" not in tokens


def test_more_tokens_than_the_text_gives_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--vocab_size must be at most 259, the tokens that this text gives, got 300"):
        trained_vocabulary(FileText("a", b"ab " * 100), 300, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("positions, limit", [("learned", 48), ("none", None)])
def test_a_tokenizer_is_saved_with_the_limit_of_its_model(tmp_path, positions, limit):
    vocabulary = TokenizerVocabulary(bpe(), "--tokenizer")
    config = AFTConfig(position_embedding_type=positions, aft_type="simple", max_position_embeddings=48)
    before = vocabulary.tokenizer.model_max_length
    vocabulary.save(tmp_path, config)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert saved.model_max_length == (limit or before) and vocabulary.tokenizer.model_max_length == before
