"""ByteTokenizer: ids are the bytes of the text, decode is the exact inverse, and saved folders load everywhere."""

import os
import random
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_aft import AFTConfig, ByteTokenizer


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
    "special-look": "<s></s><pad>[PAD]<|endoftext|><unk>",
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
    assert tokenizer.vocab_size == len(tokenizer) == 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (0, "left")
    assert tokenizer.bos_token_id is tokenizer.eos_token_id is tokenizer.unk_token_id is None
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


def test_decode_bytes_that_are_not_utf8(tokenizer):
    data = b"caf\xe9\xff ok"
    assert tokenizer.decode(list(data)) == data.decode("utf-8", errors="replace")
    assert bytes(list(data)) == data


def test_offsets_cover_the_text(tokenizer):
    text = "aé😀\n"
    encoding = tokenizer(text, return_offsets_mapping=True)
    spans = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert spans == ["a"] + ["é"] * 2 + ["😀"] * 4 + ["\n"]


def test_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 0, 97], [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "bcd"]
    # The settings of one call do not leak into the next.
    assert_exact(tokenizer, "a")


def test_truncation_counts_bytes(tokenizer):
    assert tokenizer("éa", truncation=True, max_length=2).input_ids == list("é".encode())


def test_no_padding_token():
    tokenizer = ByteTokenizer(pad_token=None)
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
    assert len(loaded) == 256
    assert (loaded.pad_token_id, loaded.padding_side) == (0, "left")
    for text in TEXTS.values():
        assert_exact(loaded, text)


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
    assert loaded(["a", "bc"], padding=True).input_ids == [[97, 0], [98, 99]]


# The text is made in the process, so that no command line or encoding of standard input can change it.
LOAD_WITHOUT_PACKAGE = """
import sys
sys.modules["modeling_aft"] = None  # importing it now fails, also where it is installed
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], {trust})
text = "".join(map(chr, range(0x250))) + chr(0x1F600) + "  \\r\\n"
assert tokenizer(text).input_ids == list(text.encode())
assert tokenizer.decode(tokenizer(text).input_ids) == text
assert (len(tokenizer), tokenizer.padding_side) == (256, "left")
print(type(tokenizer).__name__)
"""


@pytest.mark.parametrize("remote_code", [True, False], ids=["trust_remote_code", "no-remote-code"])
def test_load_where_the_package_is_not_installed(tmp_path, monkeypatch, remote_code):
    # With register_for_auto_class the folder carries the code; without, the library's own class reads tokenizer.json.
    monkeypatch.setattr(ByteTokenizer, "_auto_class", "AutoTokenizer" if remote_code else None)
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save_pretrained(folder)
    assert (folder / "tokenization_bytes.py").exists() == remote_code

    script = tmp_path / "load.py"
    script.write_text(LOAD_WITHOUT_PACKAGE.format(trust="trust_remote_code=True" if remote_code else ""))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-I", str(script), str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("ByteTokenizer" if remote_code else "TokenizersBackend")
