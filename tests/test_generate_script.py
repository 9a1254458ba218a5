"""scripts/generate.py: flags, streaming, and text from a saved folder with and without the package."""

import io
import os
from pathlib import Path

import launching
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from aft.commands.generate import main
from aft.generation import ByteStreamer
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
    with pytest.raises(ValueError, match="max_new_tokens 61 after a prompt of 4 tokens.*64"):
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
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e-40"),
        ("--top_p", "nan"),
        ("--repetition_penalty", "inf"),
        ("--seed", "-1"),
        ("--seed", "1000000000000"),
        ("--device", "abacus"),
        ("--prompt_file", "nowhere"),
    ],
    ids=" ".join,
)
def test_wrong_values_are_refused(flags):
    with pytest.raises(ValueError, match=f"{flags[0]} must be .*got .*{flags[1]}"):
        main(["--model", "nowhere", *([] if "--prompt_file" in flags else ["--prompt", "a"]), *flags])


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        main(["--model", "nowhere", "--prompt", ""])


def test_a_tokenizer_that_is_not_that_of_the_model_is_refused(tmp_path):
    config = AFTConfig(hidden_size=16, num_hidden_layers=1, max_position_embeddings=32, vocab_size=300)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a folder with a saved tokenizer, and has no tokenizer_config.json"):
        main(["--model", str(tmp_path), "--prompt", "a"])
    words = Tokenizer(WordLevel({"a": 0, "?": 300}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have at most its vocab_size, 300, of ids, got 301"):
        main(["--model", str(tmp_path), "--prompt", "a"])
    ByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have a vocab_size of 256 for its tokenizer of bytes, got 300"):
        main(["--model", str(tmp_path), "--prompt", "a"])


ANY_BYTES = bytes([0, 255, 254, 128, 13, 10, 0xC3])


def given(how: str, content: bytes, folder: Path, monkeypatch) -> list[str]:
    """The flags for a prompt that is given in one of the three ways."""
    if how == "pipe":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content + b"\n"), encoding="ascii"))
        return []
    if how == "argument":
        return ["--prompt", os.fsdecode(content)]
    (folder / "prompt[1].bin").write_bytes(content)
    return ["--prompt_file", str(folder / "prompt[1].bin")]


@pytest.mark.parametrize("content", [ANY_BYTES, b"\xff", "n\u00e9 \u4e2d".encode()], ids=["any", "one", "utf-8"])
@pytest.mark.parametrize("how", ["argument", "pipe", "file"])
def test_any_bytes_are_continued(folder, tmp_path, monkeypatch, capsys, how, content):
    prompt = given(how, content, tmp_path, monkeypatch)
    output = tmp_path / "new" / "whole.bin"
    main(["--model", folder, *prompt, "--max_new_tokens", "8", "--greedy", "--output_file", str(output)])
    model, ids = AFTForCausalLM.from_pretrained(folder), torch.tensor([list(content)])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]
    assert output.read_bytes() == bytes(made.tolist()) and len(made) == len(content) + 8
    assert capsys.readouterr().out == bytes(made.tolist()).decode(errors="replace") + "\n"


def test_a_file_is_continued_to_its_last_byte(folder, tmp_path):
    for name, content in (("a", b"text\n\n"), ("b", b"text")):
        (tmp_path / name).write_bytes(content)
        flags = ["--prompt_file", str(tmp_path / name), "--max_new_tokens", "1"]
        main(["--model", folder, *flags, "--output_file", str(tmp_path / "out")])
        assert (tmp_path / "out").read_bytes()[:-1] == content


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_text_is_printed_on_every_terminal(folder, monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    main(["--model", folder, "--prompt", os.fsdecode("\u4e2d".encode() + b"\xff"), "--max_new_tokens", "1"])
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"\\u4e2d\\ufffd")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("target", ["/dev/full", "/dev/null", "{folder}"])
def test_only_a_file_is_written(folder, tmp_path, target):
    target = target.format(folder=tmp_path)
    with pytest.raises(ValueError, match="--output_file must be a new file or a regular one, got"):
        main(["--model", folder, "--prompt", "a", "--output_file", target])


@pytest.mark.parametrize(("program", "trusted"), [("generate", False), ("generate", True), ("score", False)])
def test_code_beside_the_weights_runs_only_when_asked_for(program, trusted, folder, tmp_path):
    """Where modeling_aft cannot be imported."""
    blocked = tmp_path / "modeling_aft"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ImportError('not installed')")
    flags = ["--model", folder, "--prompt", "The ", "--max_new_tokens", "5", "--device", "cpu"]
    if program == "score":
        (tmp_path / "data").write_bytes(bytes(range(256)))
        flags = [folder, "--dataset_path", str(tmp_path / "data")]
    environment = {"PYTHONPATH": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = launching.program(SCRIPT.with_name(f"{program}.py"))
    result = launching.run(code, *flags, *["--trust_remote_code"] * trusted, **environment)
    if trusted:
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.startswith("The ")
    else:
        assert result.returncode == 1 and result.stdout == ""
        assert "trust_remote_code" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
        assert not any((tmp_path / "modules").rglob("modeling_attention_free.py"))
