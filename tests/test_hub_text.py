"""Data sets and tokenizers of the Hub, by their names, from a Hub of our own."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hub_clients import online
from hub_server import HubServer, Repository

from aft.run_log import read_log
from aft.vocabulary import train_bpe


DOCUMENTS = [f"document {i}, é and 中\nits second line" for i in range(40)]
CARD = b"""---
configs:
- config_name: en
  data_files: en/train.parquet
- config_name: de
  data_files: de/train.parquet
---
"""
FLAGS = [
    "--max_steps",
    "1",
    "--sequence_length",
    "16",
    "--sample_bytes",
    "0",
    "--batch_size",
    "2",
    "--model",
    "a.json",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a data set of two configurations, and a tokenizer."""
    tables = {"README.md": CARD}
    for name, column in (("en", "text"), ("de", "body")):
        Dataset.from_dict({column: DOCUMENTS}).to_parquet(table := io.BytesIO())
        tables[f"{name}/train.parquet"] = table.getvalue()
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([DOCUMENTS], 270).save_pretrained(folder)
    tokenizer = {path.name: path.read_bytes() for path in folder.iterdir()}
    with HubServer() as server:
        for name, files in (("datasets:me/texts", tables), ("me/tokens", tokenizer)):
            server.repositories[name] = Repository()
            server.repositories[name].add("main", files, "first")
        yield server
        assert server.unknown == []


PROGRAM = """
import json, sys
from aft.commands.pretrain import main
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
        print("RESULT", json.dumps(None))
    except Exception as error:
        print("RESULT", json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture(scope="module")
def pretrain(hub, tmp_path_factory):
    """A function that runs `aft pretrain` with each of several command lines; returns the folder, and the errors."""
    folder = tmp_path_factory.mktemp("runs")
    model = '{"model_type": "aft", "aft_type": "simple", "hidden_size": 16, "num_hidden_layers": 1}'
    (folder / "a.json").write_text(model)
    environment = online(hub, folder / "home", ACCELERATE_USE_CPU="true")
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "scripts")

    def run(*commands: list[str]) -> tuple[Path, list[str | None]]:
        argv = [[*command, *FLAGS, "--cache_dir", "cache"] for command in commands]
        command = [sys.executable, "-c", PROGRAM, json.dumps(argv)]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        found = [json.loads(line.removeprefix("RESULT ")) for line in result.stdout.splitlines() if "RESULT" in line]
        assert len(found) == len(commands), result.stderr
        return folder, found

    return run


def test_a_data_set_and_a_tokenizer_by_name(pretrain):
    flags = ["--dataset", "me/texts", "--dataset_config", "en", "--tokenizer", "me/tokens"]
    streaming = ["--streaming", "--test_size", "5"]
    folder, errors = pretrain(
        [*flags, "--output_dir", "whole"],
        [*flags, *streaming, "--output_dir", "stream"],
    )
    assert errors == [None, None]
    for name in ("whole", "stream"):
        config, *_ = read_log(folder / name / "run.jsonl")
        assert (config["data"], config["hub_dataset"]) == ("me/texts, en", "me/texts")
        assert config["tokenizer"] == "me/tokens" and config["model_config"]["vocab_size"] == 270
        sizes = [config[f"{split}_bytes"] for split in ("train", "valid", "test")]
        if name == "stream":
            assert sizes == [None, *(len("".join(part).encode()) for part in (DOCUMENTS[:5], DOCUMENTS[5:10]))]
        else:
            assert sum(sizes) == len("".join(DOCUMENTS).encode())
        card = (folder / name / "README.md").read_text()
        assert "datasets:\n- me/texts\n" in card and "Its tokenizer is\nme/tokens, with 270 tokens." in card


WRONG = {
    ("--dataset", "me/texts"): "--dataset me/texts --dataset_config None: .*'en', 'de'",
    ("--dataset", "me/texts", "--dataset_config", "fr"): "--dataset_config fr: .*not found.*'en', 'de'",
    ("--dataset", "me/texts", "--dataset_config", "de", "--text_column", "text"): (
        r"--text_column must be one of the columns of strings \(body\), got 'text'"
    ),
    ("--dataset", "me/nothing"): "--dataset me/nothing: cannot be read: .*doesn't exist on the Hub",
    ("--tokenizer", "me/nothing"): "--tokenizer me/nothing: no such folder; as a name on the Hub: ",
}


def test_what_is_not_there_is_named(pretrain):
    folder, errors = pretrain(*([*argv, "--output_dir", "wrong"] for argv in WRONG))
    for error, message in zip(errors, WRONG.values(), strict=True):
        assert re.match("ValueError: .*" + message, error), error
    assert not (folder / "wrong").exists()
