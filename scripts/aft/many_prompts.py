# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Prompts of a file, continued in batches: what `aft generate --batch_file` does."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from aft.atomic_files import write_whole
from aft.chats import check_messages
from aft.console import one_line


def read_prompts(path: Path, tokenizer) -> list[str]:
    """
    The prompts of a file: its lines, or of a `.jsonl` file each object's `prompt`, or its `messages` in the template
    of the tokenizer.

    Raises:
        ValueError: a line is none of these, or there is none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--batch_file {path}: must be text in UTF-8, and is not at byte {error.start}") from None
    if not lines:
        raise ValueError(f"--batch_file {path}: must have at least one prompt, is empty")
    if path.suffix.lower() != ".jsonl":
        return [line.rstrip("\r") for line in lines]
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"--batch_file {path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON: {one_line(error)}") from error
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"]:
            prompts.append(row["prompt"])
        elif isinstance(row, dict) and "messages" in row:
            if tokenizer.chat_template is None:
                raise ValueError(f"{where}: messages need a tokenizer with a chat_template")
            messages = check_messages(row["messages"], where, answered=False)
            prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        else:
            raise ValueError(f"{where}: must be an object with a prompt or with messages, got {line:.80}")
    return prompts


def continue_all(
    model, tokenizer, prompts: list[str], batch_size: int, limit: int | None, options: dict
) -> Iterator[str]:
    """
    What a model makes of each prompt, in order; prompts of a batch are padded on the left.

    Raises:
        ValueError: the tokenizer has no padding, or a prompt leaves no room within `limit` tokens.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("--batch_file needs a tokenizer with a pad_token or an eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        inputs = tokenizer(part, padding=True, return_tensors="pt", add_special_tokens=False).to(model.device)
        ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        length, room = ids["input_ids"].shape[1], dict(options)
        if limit is not None:
            if length >= limit:
                raise ValueError(
                    f"--batch_file: a prompt from {start + 1} on has {length} tokens, and the position tables of the "
                    f"model end at {limit}"
                )
            room["max_new_tokens"] = min(options["max_new_tokens"], limit - length)
        with torch.no_grad():
            made = model.generate(**ids, pad_token_id=tokenizer.pad_token_id, **room)[:, length:]
        yield from tokenizer.batch_decode(made, skip_special_tokens=True)


def continue_file(model, tokenizer, args, limit: int | None, options: dict) -> None:
    """
    Writes what the model makes of each prompt of `--batch_file` to `--output_file`, a JSON object in each line, or
    prints it.

    Raises:
        ValueError: the file has no prompts, or one is too long.
    """
    prompts = read_prompts(args.batch_file, tokenizer)
    lines = []
    texts = continue_all(model, tokenizer, prompts, args.batch_size, limit, options)
    for prompt, text in zip(prompts, texts, strict=True):
        lines.append(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        if args.output_file is None:
            print(lines[-1], flush=True)
    if args.output_file is not None:
        write_whole(args.output_file.resolve(), "".join(line + "\n" for line in lines))
