"""scripts/generate.py: flags, streaming, and text from a saved folder with and without the package."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generate import ByteStreamer, main
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from modeling_aft import AFTConfig, AFTForCausalLM, ByteTokenizer


SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A saved model with a length limit of 64 bytes, whose text is not the same byte over and over."""
    torch.manual_seed(0)
    config = AFTConfig(
        hidden_size=32, num_hidden_layers=1, max_position_embeddings=64, position_bias_rank=4, initializer_range=0.5
    )
    path = tmp_path_factory.mktemp("model")
    AFTForCausalLM(config).save_pretrained(path)
    ByteTokenizer().save_pretrained(path)
    return str(path)


class Pieces(io.StringIO):
    """Keeps what each write got."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(b"abc", ["a", "b", "c", "\n"], id="ascii"),
        pytest.param("é€😀".encode(), ["", "é", "", "", "€", "", "", "", "😀", "\n"], id="several-bytes"),
        pytest.param(b"a\xffb", ["a", "\ufffd", "b", "\n"], id="invalid"),
        pytest.param(b"a\xe2\x82", ["a", "", "", "\ufffd\n"], id="cut-at-the-end"),
    ],
)
def test_streamer_writes_whole_characters(content, expected):
    output = Pieces()
    streamer = ByteStreamer(output)
    for byte in content:
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert output.pieces == expected


def test_streams_what_generate_returns(folder, capsys):
    main(["--model", folder, "--prompt", "né", "--max_new_tokens", "20", "--greedy"])
    model = AFTForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([list("né".encode())]), max_new_tokens=20, do_sample=False)[0]
    assert capsys.readouterr().out == bytes(ids.tolist()).decode(errors="replace") + "\n"


def test_seed_decides_the_sample(folder, capsys):
    texts = []
    for seed in (1, 1, 2):
        main(["--model", folder, "--prompt", "The ", "--max_new_tokens", "40", "--seed", str(seed)])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The ") for text in texts)


def test_fills_the_length_limit_by_default(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("from standard input\n"))
    main(["--model", folder])
    assert capsys.readouterr().out.startswith("from standard input")
    with pytest.raises(ValueError, match="max_new_tokens 61 after a prompt of 4 bytes.*64"):
        main(["--model", folder, "--prompt", "The ", "--max_new_tokens", "61"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_new_tokens", "0"),
        ("--temperature", "0"),
        ("--top_k", "-1"),
        ("--top_p", "1.5"),
        ("--repetition_penalty", "0"),
        ("--dtype", "int8"),
    ],
    ids=" ".join,
)
def test_wrong_values_are_refused(flags):
    with pytest.raises(ValueError, match=f"{flags[0]} must be .*got .*{flags[1]}"):
        main(["--model", "nowhere", "--prompt", "a", *flags])


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        main(["--model", "nowhere", "--prompt", ""])


def test_other_tokens_are_refused(tmp_path):
    config = AFTConfig(hidden_size=16, num_hidden_layers=1, max_position_embeddings=32, vocab_size=300)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a model of 256 bytes, got 300 tokens"):
        main(["--model", str(tmp_path), "--prompt", "a"])
    config.vocab_size = 256
    config.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have a tokenizer of 256 bytes, got 2 tokens"):
        main(["--model", str(tmp_path), "--prompt", "a"])


def test_runs_without_the_package(folder, tmp_path):
    """Where modeling_aft cannot be imported, the code beside the weights is used."""
    blocked = tmp_path / "modeling_aft"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ImportError('not installed')")
    result = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--model",
            folder,
            "--prompt",
            "The ",
            "--max_new_tokens",
            "5",
            "--device",
            "cpu",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("The ")
