# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Chats as token ids: tables of messages or of prompts and completions, of which only the answers are trained."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pandas
from torch.utils.data import Dataset

from aft.atomic_files import check_file
from aft.console import one_line


ROLES = ("system", "user", "assistant")
# For models whose tokenizer has none: the role, the text, and the token that ends texts. Of an answer, text and end
# are trained.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass
class Chats:
    """
    A table of chats.

    Attributes:
        name: the flag and the path, for errors.
        sha256: of the file.
        rows: the messages of each chat, dicts with `role` and `content`.
    """

    name: str
    sha256: str
    rows: list[list[dict[str, str]]]


class ChatRows(Dataset):
    """
    Chats as `input_ids` and `labels`, -100 where a token is no answer's.

    Attributes:
        num_bytes (`int`): of the answers, in UTF-8, without the token that ends each.
    """

    def __init__(self, rows: list[tuple[list[int], list[int]]], num_bytes: int):
        self.rows, self.num_bytes = rows, num_bytes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self.rows[index]
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def check_messages(messages: list, where: str, answered: bool = True) -> list[dict[str, str]]:
    """
    The messages of a chat, with role and content alone.

    Raises:
        ValueError: they are no list of messages, or, if it must be `answered`, there is no answer among them; begins
            with `where`.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of messages, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: a message must have a role ({', '.join(ROLES)}), got {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a message must have a content, a text, got {message!r:.80}")
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: a chat must have an answer, a message of the assistant, and has none")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def messages_of(row: dict, where: str) -> list[dict[str, str]]:
    """The chat in a row: its `messages`, or its `prompt` and `completion`."""
    if "messages" in row:
        found = row["messages"]
        return check_messages(found.tolist() if hasattr(found, "tolist") else found, where)
    if not {"prompt", "completion"} <= set(row):
        raise ValueError(f"{where}: must have messages, or prompt and completion, has {', '.join(row) or 'nothing'}")
    pairs = (("user", row["prompt"]), ("assistant", row["completion"]))
    return check_messages([{"role": role, "content": content} for role, content in pairs], where)


def read_chats(path: Path, flag_name: str) -> Chats:
    """
    The chats of a `.jsonl` or `.parquet` file.

    Raises:
        ValueError: it is no such table, or a row is no chat; names the flag, the file and the row.
    """
    name = f"--{flag_name} {path}"
    check_file(path, f"--{flag_name}")
    content = path.read_bytes()
    if path.suffix.lower() == ".parquet":
        try:
            rows = pandas.read_parquet(path).to_dict("records")
        except Exception as error:  # of pyarrow, of any type
            raise ValueError(f"{name}: no .parquet table: {one_line(error)}") from error
    elif path.suffix.lower() == ".jsonl":
        rows = []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{name}: line {number} is no JSON: {one_line(error)}") from error
    else:
        raise ValueError(f"--{flag_name} must be a .jsonl or .parquet file, got {path}")
    if not rows:
        raise ValueError(f"{name}: must have at least one row, is empty")
    chats = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be an object, got {row!r:.80}")
        chats.append(messages_of(row, where))
    return Chats(name, hashlib.sha256(content).hexdigest(), chats)


def prepare_tokenizer(tokenizer, name: str) -> None:
    """
    Gives a tokenizer the template for chats that it lacks, or checks the one that it has.

    Raises:
        ValueError: it has no token that ends a text, or its template does not say what the answers are.
    """
    if tokenizer.eos_token is None:
        raise ValueError(f"{name}: its tokenizer must have an end of texts (eos_token), with which an answer ends")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    elif "generation" not in str(tokenizer.chat_template):
        raise ValueError(f"{name}: the chat_template of its tokenizer must mark answers with {{% generation %}}")


def encode_chats(chats: Chats, tokenizer, truncation: str, limit: int | None) -> ChatRows:
    """
    Chats by the template of the tokenizer; of the labels, those of answers count.

    Raises:
        ValueError: a chat has more than `limit` tokens and `truncation` is "none", or no answer is left of it.
    """
    rows, num_bytes = [], 0
    for number, messages in enumerate(chats.rows, start=1):
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if limit and len(ids) > limit:
            if truncation == "none":
                raise ValueError(
                    f"{chats.name}: row {number} has {len(ids)} tokens; allowed: {limit} (--max_length, at most the "
                    "max_position_embeddings of the model), or --truncation right or left"
                )
            part = slice(limit) if truncation == "right" else slice(-limit, None)
            ids, mask = ids[part], mask[part]
        labels = [token if answer else -100 for token, answer in zip(ids, mask, strict=True)]
        labels[0] = -100  # which nothing predicts
        answer = [token for token in labels if token != -100]
        if not answer:
            raise ValueError(f"{chats.name}: row {number} must have an answer within {limit} tokens, and has none")
        num_bytes += len(tokenizer.decode(answer, skip_special_tokens=True).encode())
        rows.append((ids, labels))
    return ChatRows(rows, num_bytes)
