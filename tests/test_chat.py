"""Chats: trained on their answers alone, talked with turn by turn, continued in batches."""

import io
import json
import math
from pathlib import Path

import pandas
import pytest
import torch
from families import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aft.chats import TEMPLATE, encode_chats, prepare_tokenizer, read_chats
from aft.commands.finetune import main as finetune
from aft.commands.generate import main as generate
from aft.talking import Talk
from aft.vocabulary import ByteVocabulary, TokenizerVocabulary, train_bpe
from modeling_aft import ByteTokenizer


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "né?"},
    {"role": "assistant", "content": "oui, né"},
    {"role": "user", "content": "sure"},
    {"role": "assistant", "content": "yes"},
]
SHOWN = "".join(f"<|{message['role']}|>\n{message['content']}\xff\n" for message in CHAT)


def as_bytes(text: str) -> list[int]:
    return [*text.encode().replace("\xff".encode(), b"\xff")]


def bpe():
    texts = [message["content"] for message in CHAT] + ["<|user|>\n<|assistant|>\n"]
    return train_bpe([texts * 3], 280)


TOKENIZERS = {"bytes": ByteTokenizer, "bpe": bpe}


def write_chats(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_or_prompt_and_completion(tmp_path, suffix):
    chats = read_chats(write_chats(tmp_path / f"a{suffix}", [{"messages": CHAT, "more": 1}] * 2), "chat_file")
    assert chats.rows == [CHAT] * 2
    pairs = [{"prompt": "né?", "completion": "oui"}]
    chats = read_chats(write_chats(tmp_path / f"b{suffix}", pairs), "chat_file")
    assert chats.rows == [[{"role": "user", "content": "né?"}, {"role": "assistant", "content": "oui"}]]


WRONG = {
    "empty": (b"", "must have at least one row"),
    "no-json": (b'{"messages"', "line 1 is no JSON"),
    "no-object": (b"[1]", "row 1: must be an object"),
    "no-columns": (b'{"text": "a"}', "row 1: must have messages, or prompt and completion, has text"),
    "no-list": (b'{"messages": "a"}', "row 1: messages must be a list of messages, got 'a'"),
    "no-messages": (b'{"messages": []}', "messages must be a list of messages"),
    "role": (b'{"messages": [{"role": "bot", "content": "a"}]}', r"role \(system, user, assistant\)"),
    "content": (b'{"messages": [{"role": "user", "content": null}]}', "must have a content, a text"),
    "no-answer": (b'{"messages": [{"role": "user", "content": "a"}]}', "must have an answer"),
    "completion": (b'{"prompt": "a", "completion": 1}', "must have a content, a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_chat_is_named(tmp_path, case):
    content, message = WRONG[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"--chat_file .*a.jsonl: .*{message}"):
        read_chats(tmp_path / "a.jsonl", "chat_file")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "b.parquet").write_text("a")
    with pytest.raises(ValueError, match=r"--chat_file must be a .jsonl or .parquet file, got .*a.csv"):
        read_chats(tmp_path / "a.csv", "chat_file")
    with pytest.raises(ValueError, match="b.parquet: no .parquet table: "):
        read_chats(tmp_path / "b.parquet", "chat_file")


# Tokens


def test_answers_and_their_ends_are_labels(tmp_path):
    tokenizer = ByteTokenizer()
    prepare_tokenizer(tokenizer, "--model")
    chats = read_chats(write_chats(tmp_path / "a.jsonl", [{"messages": CHAT}]), "chat_file")
    rows = encode_chats(chats, tokenizer, "none", None)
    [row] = rows
    assert row["input_ids"] == as_bytes(SHOWN)
    assert bytes(label for label in row["labels"] if label != -100) == "oui, né".encode() + b"\xffyes\xff"
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert rows.num_bytes == len("oui, né".encode()) + len("yes")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_answers(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    prepare_tokenizer(tokenizer, "--model")
    chats = read_chats(write_chats(tmp_path / "a.jsonl", [{"messages": CHAT}]), "chat_file")
    rows = encode_chats(chats, tokenizer, "none", None)
    assert rows.num_bytes == len("oui, né".encode()) + len("yes")
    assert tokenizer.decode([label for label in rows[0]["labels"] if label != -100]).count(tokenizer.eos_token) == 2


def test_a_long_chat_is_named_or_cut(tmp_path):
    tokenizer = ByteTokenizer()
    prepare_tokenizer(tokenizer, "--model")
    chats = read_chats(write_chats(tmp_path / "a.jsonl", [{"messages": CHAT}]), "chat_file")
    length = len(as_bytes(SHOWN))
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens; allowed: 60"):
        encode_chats(chats, tokenizer, "none", 60)
    assert encode_chats(chats, tokenizer, "right", 60)[0]["input_ids"] == as_bytes(SHOWN)[:60]
    left = encode_chats(chats, tokenizer, "left", 10)
    assert left[0]["input_ids"] == as_bytes(SHOWN)[-10:] and left.num_bytes == 3
    with pytest.raises(ValueError, match="row 1 must have an answer within 20 tokens"):
        encode_chats(chats, tokenizer, "right", 20)


def test_a_template_must_mark_answers_and_a_tokenizer_end_them():
    with pytest.raises(ValueError, match="must mark answers with"):
        prepare_tokenizer(ByteTokenizer(chat_template="{{ messages }}"), "--model")
    with pytest.raises(ValueError, match="must have an end of texts"):
        prepare_tokenizer(ByteTokenizer(eos_token=None), "--model")
    tokenizer = ByteTokenizer(chat_template=TEMPLATE.replace("<|", "<human|"))
    prepare_tokenizer(tokenizer, "--model")
    assert "human" in tokenizer.chat_template


# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model of bytes, and chats."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model("conv-nopos", dtype=torch.float32)
    model.save_pretrained(folder / "model")
    ByteTokenizer().save_pretrained(folder / "model")
    rows = [{"messages": CHAT[: 3 + 2 * (i % 2)]} for i in range(10)]
    write_chats(folder / "chats.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def tuned(folder) -> tuple[Path, dict]:
    argv = ["--model", str(folder / "model"), "--chat_file", str(folder / "chats.jsonl"), "--validation_file"]
    argv += [str(folder / "chats.jsonl"), "--output_dir", str(folder / "tuned"), "--num_train_epochs", "1"]
    options = ["--per_device_train_batch_size", "5", "--report_to", "none", "--use_cpu", "--learning_rate", "1e-2"]
    return folder / "tuned", finetune([*argv, *options])


def test_the_score_is_that_of_the_answers_alone(folder, tuned):
    path, metrics = tuned
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == TEMPLATE and model.generation_config.eos_token_id in (255, [255])
    nats = num_bytes = 0
    for index in range(10):
        ids, is_answer = [], []
        for message in CHAT[: 3 + 2 * (index % 2)]:
            parts = [(f"<|{message['role']}|>\n", False), (message["content"] + "\xff", True), ("\n", False)]
            for text, counts in parts:
                tokens = as_bytes(text)
                ids += tokens
                is_answer += [counts and message["role"] == "assistant"] * len(tokens)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        chosen = torch.tensor(is_answer[1:])
        nats += losses[chosen].sum().item()
        num_bytes += (chosen & (torch.tensor(ids[1:]) != 255)).sum().item()
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_chats_stand_alone(folder, tmp_path):
    argv = [
        "--model",
        str(folder / "model"),
        "--chat_file",
        str(folder / "chats.jsonl"),
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(ValueError, match="--chat_file must be left out with --text_file"):
        finetune([*argv, "--text_file", str(folder / "chats.jsonl")])
    with pytest.raises(ValueError, match="--predict_file must be left out without --labelled_file"):
        finetune([*argv, "--predict_file", str(folder / "chats.jsonl")])
    with pytest.raises(ValueError, match="--validation_share 0.01 of 10 rows is not a single one"):
        finetune([*argv, "--validation_share", "0.01"])


# Talking


def answers(path: Path, monkeypatch, capsys, said: str, *more: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    generate(["--model", str(path), "--chat", "--greedy", "--max_new_tokens", "12", *more])
    return capsys.readouterr().out


def test_a_talk_is_what_the_whole_would_be(tuned, monkeypatch, capsys):
    """Each answer is the one that the model gives to all messages before it, read anew."""
    path, _ = tuned
    said = ["né?", "sure", "why not?"]
    printed = answers(path, monkeypatch, capsys, "\n".join(said[:2]) + "\n\n" + said[2])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    messages, expected = [], ""
    for text in said:
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=255)[0, ids.input_ids.shape[1] :]
        answer = bytes(token for token in made.tolist() if token != 255).decode(errors="replace")
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert printed == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("variant", ["conv-nopos", "local", "dense+dot_product"])
def test_nothing_is_read_twice(variant, kind):
    tokenizer = TOKENIZERS[kind]()
    prepare_tokenizer(tokenizer, "--model")
    vocabulary = ByteVocabulary() if kind == "bytes" else TokenizerVocabulary(tokenizer, "--model")
    model = make_model(variant, dtype=torch.float32, vocab_size=vocabulary.size, max_position_embeddings=256)
    talk = Talk(model, vocabulary, tokenizer, {"max_new_tokens": 3, "do_sample": True, "limit": 256})
    torch.manual_seed(0)
    read = []
    model.register_forward_pre_hook(lambda _, args, names: read.append(names["input_ids"].shape[1]), with_kwargs=True)
    for text in ("né?", "sure", "yes"):
        before = talk.ids
        talk.answer(text, io.StringIO())
        assert talk.ids[: len(before)] == before and len(talk.ids) > len(before)
    assert sum(read) == len(talk.ids) - 1  # all but the last, which no token follows
    assert len(talk.messages) == 6 and talk.messages[4]["content"] == "yes"


def test_a_talk_that_is_too_long_is_named(tuned, folder, monkeypatch, capsys, tmp_path):
    model = make_model("local", dtype=torch.float32, max_position_embeddings=40)
    model.save_pretrained(tmp_path)
    ByteTokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the talk has [0-9]+ tokens, and the position tables of the model end at 40"):
        answers(tmp_path, monkeypatch, capsys, "hello\nhow are you, and what else\n")
    with pytest.raises(ValueError, match="--chat needs a tokenizer with a chat_template"):
        answers(folder / "model", monkeypatch, capsys, "hello\n")


# Batches


def test_prompts_of_a_file_are_continued_alone(tuned, tmp_path, capsys):
    path, _ = tuned
    prompts = ["a", "the second, longer", "né"]
    (tmp_path / "a.txt").write_text("\n".join(prompts))
    argv = ["--model", str(path), "--greedy", "--max_new_tokens", "7"]
    generate(
        [*argv, "--batch_file", str(tmp_path / "a.txt"), "--batch_size", "2", "--output_file", str(tmp_path / "o")]
    )
    rows = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    capsys.readouterr()
    for row in rows:
        generate([*argv, "--prompt", row["prompt"]])
        alone = capsys.readouterr().out.removesuffix("\n")
        assert alone.removesuffix("\ufffd") == (row["prompt"] + row["text"]).removesuffix("\ufffd")
    generate([*argv, "--batch_file", str(tmp_path / "a.txt")])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_messages_of_a_file_are_answered(tuned, tmp_path, capsys):
    path, _ = tuned
    write_chats(tmp_path / "a.jsonl", [{"prompt": "a"}, {"messages": CHAT[:2]}])
    generate(["--model", str(path), "--batch_file", str(tmp_path / "a.jsonl"), "--max_new_tokens", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["prompt"] == "a" and rows[1]["prompt"].endswith("né?<|endoftext|>\n<|assistant|>\n")


WRONG_BATCHES = {
    "empty": (b"\n\n", "must have at least one prompt"),
    "no-json": (b"{", "line 1: no JSON"),
    "no-prompt": (b'{"text": "a"}', "line 1: must be an object with a prompt or with messages"),
    "bad": (b"\xff", "must be text in UTF-8, and is not at byte 0"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_a_file_without_prompts_is_named(tuned, tmp_path, case):
    content, message = WRONG_BATCHES[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"--batch_file .*a.jsonl: {message}"):
        generate(["--model", str(tuned[0]), "--batch_file", str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chat", "--prompt", "a"], "--prompt must be left out with --chat"),
        (["--chat", "--output_file", "a"], "--output_file must be left out with --chat"),
        (["--batch_file", "nowhere.txt"], "--batch_file must be a file, got 'nowhere.txt'"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    ],
)
def test_ways_to_generate_do_not_mix(tuned, flags, message):
    with pytest.raises(ValueError, match=message):
        generate(["--model", str(tuned[0]), *flags])
