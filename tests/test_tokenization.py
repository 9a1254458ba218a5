"""ByteTokenizer: ids are the bytes of the text, decode is the exact inverse, and saved folders load everywhere."""

import copy
import json
import pickle
import random
import time

import pytest
from launching import run
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_aft import AFTConfig, ByteTokenizer
from modeling_aft.tokenization_bytes import BYTE_SYMBOLS, byte_backend


TEXTS = {
    "empty": "",
    "ascii": "".join(map(chr, range(128))),
    "nul": "\0a\0\0b\0",
    "line-ends": "a\nb\r\nc\rd\n\n",
    "spaces": "  two  leading, \t tab, trailing  ",
    "only-space": " ",
    "punctuation-spaces": "a , b . c ! d 's n't",
    "accents": "Crème brûlée, Ångström",
    "not-normalised": "e\u0301 é \u212b \u00c5 \ufb01 \u1112\u1161\u11ab",
    "emoji": "👩‍👩‍👧‍👦 🇯🇵 ❤️",
    "other-scripts": "Привет 你好 こんにちは שלום नमस्ते",
    "byte-symbols": "".join(map(chr, range(0xA0, 0x180))),
    "pad-symbol": "Ā\0Ā Ā",
    "special-look": "<s></s><pad>[PAD]<|pad|><|end|><unk>",
    "replacement": "\ufffd\ufeff\u200b\u2028",
    "last-code-point": "\U0010ffff",
}


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


def assert_exact(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_vocabulary(tokenizer):
    assert tokenizer.is_fast
    assert (tokenizer.vocab_size, len(tokenizer)) == (256, 257)
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<|pad|>", 256, "left")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 255)
    assert tokenizer.bos_token_id is tokenizer.unk_token_id is None
    assert tokenizer.model_max_length >= 10**6


@pytest.mark.parametrize("name", TEXTS)
def test_round_trip(tokenizer, name):
    assert_exact(tokenizer, TEXTS[name])


@pytest.mark.parametrize("plane", range(17))
def test_round_trip_of_plane(tokenizer, plane):
    code_points = range(plane << 16, (plane + 1) << 16, 1 if plane == 0 else 7)
    assert_exact(tokenizer, "".join(chr(c) for c in code_points if not 0xD800 <= c < 0xE000))


@pytest.mark.parametrize("highest", [0x7F, 0x7FF, 0xD7FF, 0x10FFFF], ids=hex)
def test_round_trip_of_random_text(tokenizer, highest):
    generator = random.Random(highest)
    for length in range(50):
        code_points = (generator.randrange(highest + 1) for _ in range(length))
        assert_exact(tokenizer, "".join(chr(c) for c in code_points if not 0xD800 <= c < 0xE000))


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_decode_token_by_token(tokenizer, character):
    ids = tokenizer(character).input_ids
    for length in range(1, len(ids)):
        assert set(tokenizer.decode(ids[:length])) == {"\ufffd"}
    assert tokenizer.decode(ids) == character
    assert b"".join(bytes([i]) for i in ids).decode("utf-8") == character


@pytest.mark.parametrize(
    ("data", "options"),
    [(b"caf\xe9\xfe ok", {}), (b"caf\xe9\xff ok", {"eos_token": None})],
    ids=["text-with-an-end", "binary"],
)
def test_decode_bytes_that_are_not_utf8(data, options):
    tokenizer = ByteTokenizer(**options)
    assert tokenizer.decode(list(data)) == data.decode("utf-8", errors="replace")
    assert bytes(list(data)) == data


def test_offsets_cover_the_text(tokenizer):
    text = "aé😀\n"
    encoding = tokenizer(text, return_offsets_mapping=True)
    spans = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert spans == ["a"] + ["é"] * 2 + ["😀"] * 4 + ["\n"]


def test_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "bcd"]
    # The settings of one call do not leak into the next.
    assert_exact(tokenizer, "a")


def test_truncation_counts_bytes(tokenizer):
    assert tokenizer("éa", truncation=True, max_length=2).input_ids == list("é".encode())


def test_no_padding_token(tmp_path):
    ByteTokenizer(pad_token=None).save_pretrained(tmp_path)
    tokenizer = ByteTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 256
    assert_exact(tokenizer, TEXTS["pad-symbol"])
    with pytest.raises(ValueError, match="padding token"):
        tokenizer(["a", "bcd"], padding=True)


def test_added_special_token(tmp_path):
    tokenizer = ByteTokenizer(pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    for extended in (tokenizer, ByteTokenizer.from_pretrained(tmp_path)):
        assert (len(extended), extended.vocab_size, extended.pad_token_id) == (257, 256, 256)
        assert_exact(extended, "<pad>Ā\0")
        assert extended(["a", "bcd"], padding=True).input_ids[0] == [256, 256, 97]


def test_long_text_in_one_call(tokenizer):
    text = "The quick brown fox — naïve, 3 × 4 = 12.\n" * 25_000  # 1.1 MB
    start = time.process_time()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert time.process_time() - start < 20  # about 1.5 when linear in the length; hours when quadratic


@pytest.mark.parametrize("cls", [ByteTokenizer, AutoTokenizer, PreTrainedTokenizerFast], ids=lambda cls: cls.__name__)
def test_save_and_load(tokenizer, tmp_path, cls):
    tokenizer.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast if cls is PreTrainedTokenizerFast else ByteTokenizer)
    assert len(loaded) == 257
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (255, 256, "left")
    for text in TEXTS.values():
        if cls is not PreTrainedTokenizerFast:
            assert_exact(loaded, text)
        else:  # finds padding in a text
            assert_exact(loaded, text.replace("<|pad|>", ""))


def test_load_beside_a_model_config(tokenizer, tmp_path):
    AFTConfig().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), ByteTokenizer)


def test_save_again_writes_the_same_vocabulary(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    ByteTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "tokenizer.json").read_text() for name in ("first", "second"))
    assert first == second


def test_load_with_other_padding_side(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    assert loaded(["a", "bc"], padding=True).input_ids == [[97, 256], [98, 99]]


SPECIAL = {
    "none": ({"eos_token": None}, {"pad_token": 256}),
    "end": ({"eos_token": "<|end|>"}, {"eos_token": 256, "pad_token": 257}),
    "mask": ({"mask_token": "[MASK]"}, {"eos_token": 255, "mask_token": 256, "pad_token": 257}),
    "several": (
        {"mask_token": "[M]", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<x>", "«y»"]},
        {"bos_token": 256, "eos_token": 257, "mask_token": 258, "<x>": 259, "«y»": 260, "pad_token": 261},
    ),
    "shared": ({"eos_token": "<|end|>", "pad_token": "<|end|>"}, {"eos_token": 256, "pad_token": 256}),
    "added-token": ({"eos_token": AddedToken("<|end|>", lstrip=True)}, {"eos_token": 256, "pad_token": 257}),
    "other-padding": ({"pad_token": "<pad>"}, {"eos_token": 255, "pad_token": 256}),
}
BY_SPECIAL = pytest.mark.parametrize(("options", "expected"), SPECIAL.values(), ids=SPECIAL)


def reload(tokenizer, folder, cls=ByteTokenizer):
    tokenizer.save_pretrained(folder)
    return cls.from_pretrained(folder)


@BY_SPECIAL
def test_special_tokens_are_found_in_a_text(options, expected, tmp_path):
    tokenizer = ByteTokenizer(**options)
    for case in (tokenizer, reload(tokenizer, tmp_path), reload(tokenizer, tmp_path, AutoTokenizer)):
        for name, token_id in expected.items():
            token = getattr(case, name) if name.endswith("_token") else name
            assert case.convert_tokens_to_ids(token) == token_id
            assert case.convert_ids_to_tokens(token_id) == token
            is_padding_alone = name == "pad_token" and token_id == case.pad_token_id != case.eos_token_id
            ids = [*token.encode()] if is_padding_alone else [token_id]
            assert case(f"hi{token}é").input_ids == [104, 105, *ids, 195, 169]
            assert case.decode([104, token_id, 195, 169]) == f"h{token}é"
            assert case.decode([104, token_id, 105], skip_special_tokens=True) == "hi"
        assert (case.vocab_size, len(case)) == (256, max(256, *(i + 1 for i in expected.values())))
        assert_exact(case, TEXTS["byte-symbols"])


@pytest.mark.parametrize("chosen", [None, False, True], ids=["by-default", "found", "split"])
@pytest.mark.parametrize("token", ["<|endoftext|>", "<|end|>"])
def test_special_tokens_are_split_where_that_is_asked_for(token, chosen, tmp_path):
    tokenizer = ByteTokenizer(eos_token=token, **({} if chosen is None else {"split_special_tokens": chosen}))
    whole, split = [97, tokenizer.eos_token_id], list(f"a{token}".encode())
    for case in (tokenizer, reload(tokenizer, tmp_path)):
        assert case(f"a{token}").input_ids == (split if chosen else whole)
        assert case(f"a{token}", split_special_tokens=True).input_ids == split
        assert case(f"a{token}", split_special_tokens=False).input_ids == whole
        assert case(f"a{token}").input_ids == (split if chosen else whole)  # one call does not change the next


def test_symbols_of_bytes_are_never_found_in_a_text():
    text = "".join(BYTE_SYMBOLS)
    for byte, symbol in enumerate(BYTE_SYMBOLS):
        tokenizer = ByteTokenizer(pad_token=symbol, eos_token=symbol, split_special_tokens=False)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (byte, byte, 256)
        assert tokenizer.add_tokens([symbol, AddedToken(symbol)], special_tokens=byte % 2 == 0) == 0
        assert tokenizer(text).input_ids == list(text.encode())


def test_a_model_of_256_tokens_knows_what_a_text_can_have(tokenizer):
    assert max(tokenizer("".join(map(tokenizer.convert_ids_to_tokens, range(257)))).input_ids) == 255


def test_added_tokens(tokenizer, tmp_path):
    """Also names that consist of symbols of bytes, which the library's decoder takes for bytes."""
    assert tokenizer.add_tokens(["<new>", "née"]) == 2
    assert tokenizer.add_special_tokens({"pad_token": "[P]"}) == 1
    for case in (tokenizer, reload(tokenizer, tmp_path), copy.deepcopy(tokenizer)):
        assert (case.vocab_size, len(case), case.pad_token_id) == (256, 260, 259)
        text = "é<new>née[P]é"
        assert case(text).input_ids == [195, 169, 257, 258, 259, 195, 169]
        assert case.decode(case(text).input_ids) == text


def test_decode_of_other_things(tokenizer):
    assert (tokenizer.decode(97), tokenizer.decode([]), tokenizer.decode([300, 97])) == ("a", "", "a")
    assert tokenizer.decode(tokenizer("né")) == "né"
    assert tokenizer.convert_tokens_to_string(["Ã", "©", "<|endoftext|>", "Ã"]) == "é<|endoftext|>\ufffd"
    assert tokenizer.decode(list(b"a , b ."), clean_up_tokenization_spaces=True) == "a , b ."


@BY_SPECIAL
def test_copies_are_equal(options, expected):
    tokenizer = ByteTokenizer(**options)
    for case in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        text = "".join(tokenizer.get_vocab()) + TEXTS["other-scripts"]
        assert case(text).input_ids == tokenizer(text).input_ids
        assert case.special_tokens_map == tokenizer.special_tokens_map


def test_an_end_can_be_added_to_each_text(tmp_path):
    tokenizer = ByteTokenizer(add_eos_token=True)
    for case in (tokenizer, reload(tokenizer, tmp_path)):
        assert case("é").input_ids == [195, 169, 255]
        assert case("é", add_special_tokens=False).input_ids == [195, 169]


def test_another_end_than_that_of_the_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = ByteTokenizer.from_pretrained(tmp_path, eos_token=None)
    assert loaded.eos_token_id is None
    assert_exact(loaded, "<|endoftext|>")
    assert loaded.decode([0x89, 255]) == "\ufffd\ufffd"
    loaded = ByteTokenizer.from_pretrained(tmp_path, eos_token="<|end|>")
    assert loaded("a<|end|>").input_ids == [97, 257]


def save_as_before(folder, pad_token="Ā", eos_token=None):
    """A folder as it was saved when the symbol of byte 0 was the padding token, and no text had an end."""
    backend = byte_backend({symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)})
    named = {name: token for name, token in {"eos_token": eos_token, "pad_token": pad_token}.items() if token}
    backend.add_special_tokens([AddedToken(token, special=True) for token in named.values()])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        **named,
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "padding_side": "left",
        "split_special_tokens": True,
        "tokenizer_class": "ByteTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("cls", [ByteTokenizer, AutoTokenizer], ids=lambda cls: cls.__name__)
def test_folders_of_before_load_as_they_were(cls, tmp_path):
    save_as_before(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for case in (loaded, reload(loaded, tmp_path / "again")):
        assert (len(case), case.pad_token_id, case.eos_token_id) == (256, 0, None)
        for text in [*TEXTS.values(), "<|endoftext|>"]:
            assert_exact(case, text)
            assert case(text, split_special_tokens=False).input_ids == list(text.encode())
        assert case(["a", "bcd"], padding=True).input_ids == [[0, 0, 97], [98, 99, 100]]
        assert case.decode([0, 0, 97, 255], skip_special_tokens=True) == "a\ufffd"


def test_special_tokens_of_before_keep_their_ids(tmp_path):
    save_as_before(tmp_path, pad_token="<pad>", eos_token="<|endoftext|>")
    loaded = ByteTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (258, 256, 257)
    assert_exact(loaded, "a<pad><|endoftext|>")
    assert loaded("<|endoftext|>ÿ", split_special_tokens=False).input_ids == [256, 195, 191]
    assert loaded.decode([255, 256]) == "\ufffd<|endoftext|>"


def other_tokenizers() -> dict[str, Tokenizer]:
    symbols = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
    merged, lower, words = (byte_backend({**symbols, "th": 256}) for _ in range(3))
    merged.model = models.BPE({**symbols, "th": 256}, [("t", "h")])
    lower.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "BPE tokenizer of 257 tokens and another model": merged,
        "BPE tokenizer of 257 tokens and another normalizer": lower,
        "BPE tokenizer of 257 tokens and another pre_tokenizer": words,
        "BPE tokenizer of 255 tokens": byte_backend({symbol: byte for symbol, byte in symbols.items() if byte < 255}),
        "BPE tokenizer of 257 tokens": byte_backend({**symbols, "<pad>": 300}),
        "WordLevel tokenizer of 2 tokens": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")),
        "Unigram tokenizer of 1 tokens": Tokenizer(models.Unigram([("a", 0.0)], 0, False)),
    }


@pytest.mark.parametrize("found", other_tokenizers())
def test_the_vocabulary_of_another_tokenizer_is_refused(found, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=other_tokenizers()[found]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    for load in (ByteTokenizer.from_pretrained, lambda folder: ByteTokenizer(tokenizer_file=str(path))):
        with pytest.raises(ValueError, match=f"tokenizer.json must hold the 256 bytes.*a {found}") as error:
            load(tmp_path)
        assert str(path) in str(error.value)
    AFTConfig().save_pretrained(tmp_path)  # by whose type AutoTokenizer chooses
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="must hold the 256 bytes"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}'], ids=["empty", "no-parts", "damaged"])
def test_a_damaged_file_is_refused(tokenizer, content, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        ByteTokenizer(tokenizer_file=tmp_path / "tokenizer.json")


@pytest.mark.parametrize("files", [(), ("vocab.json", "merges.txt"), ("tokenizer_config.json",)], ids=len)
def test_a_folder_without_a_vocabulary_is_refused(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    for config in (None, AFTConfig(vocab_size=320)):
        if config is not None:
            config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must have a tokenizer.json that a ByteTokenizer wrote"):
            ByteTokenizer.from_pretrained(tmp_path)


def test_a_model_of_bytes_needs_no_file(tmp_path):
    AFTConfig().save_pretrained(tmp_path)
    assert_exact(AutoTokenizer.from_pretrained(tmp_path), TEXTS["emoji"])


@pytest.mark.parametrize("name", ["vocab", "merges", "vocab_file", "tokenizer_object"])
def test_there_is_no_vocabulary_to_choose(tokenizer, name):
    with pytest.raises(ValueError, match=f"`{name}` must not be given.*256 bytes"):
        ByteTokenizer(**{name: tokenizer.backend_tokenizer})


def test_there_is_nothing_to_train(tokenizer):
    with pytest.raises(ValueError, match="nothing to train.*tokenizers.Tokenizer.*PreTrainedTokenizerFast"):
        tokenizer.train_new_from_iterator([["some", "text"]], vocab_size=300)


# The text is made in the process, so that no command line or encoding of standard input can change it.
LOAD_WITHOUT_PACKAGE = """
import sys
sys.modules["modeling_aft"] = None  # importing it now fails, also where it is installed
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], {trust})
text = "".join(map(chr, range(0x250))) + chr(0x1F600) + "  \\r\\n"
assert tokenizer(text).input_ids == list(text.encode())
assert tokenizer.decode(tokenizer(text).input_ids) == text
assert tokenizer(text + "<|endoftext|>").input_ids == list(text.encode()) + [255]
assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side) == (257, 256, "left")
print(type(tokenizer).__name__)
"""


@pytest.mark.parametrize("remote_code", [True, False], ids=["trust_remote_code", "no-remote-code"])
def test_load_where_the_package_is_not_installed(tmp_path, monkeypatch, remote_code):
    # With register_for_auto_class the folder carries the code; without, the library's own class reads tokenizer.json.
    monkeypatch.setattr(ByteTokenizer, "_auto_class", "AutoTokenizer" if remote_code else None)
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save_pretrained(folder)
    assert (folder / "tokenization_bytes.py").exists() == remote_code

    code = LOAD_WITHOUT_PACKAGE.format(trust="trust_remote_code=True" if remote_code else "")
    result = run(code, folder, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("ByteTokenizer" if remote_code else "TokenizersBackend")
