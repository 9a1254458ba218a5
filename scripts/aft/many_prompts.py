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
from modeling_aft.continuous_batching import can_stay_full


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
    What a model makes of each prompt, in order, some hundreds at a time. A model with states of fixed size puts the
    next prompt where a text has ended; others have a batch padded on the left until all of it has ended.

    Raises:
        ValueError: the tokenizer has no padding, or a prompt leaves no room within `limit` tokens.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("--batch_file needs a tokenizer with a pad_token or an eos_token")
        tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(prompts, add_special_tokens=False).input_ids
    for number, ids in enumerate(rows, start=1):
        if limit is not None and len(ids) >= limit:
            raise ValueError(
                f"--batch_file: prompt {number} has {len(ids)} tokens, and the position tables of the model end at "
                f"{limit}"
            )
    stays_full = can_stay_full(model.config)
    at_once = 16 * batch_size if stays_full else batch_size
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        if stays_full:
            outputs = model.generate_batch(part, max_batch_size=batch_size, **options)
            written = [output.generated_tokens for output in outputs.values()]
        else:
            written = continue_padded(model, tokenizer, part, limit, options)
        yield from tokenizer.batch_decode(written, skip_special_tokens=True)


def continue_padded(model, tokenizer, rows: list[list[int]], limit: int | None, options: dict) -> torch.Tensor:
    """The ids that follow on each row of ids, by one padded batch, up to the end of the tables for the longest."""
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    length, options = inputs["input_ids"].shape[1], dict(options)
    if limit is not None:
        options["max_new_tokens"] = min(options["max_new_tokens"], limit - length)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.generate(**ids, pad_token_id=tokenizer.pad_token_id, **options)[:, length:]


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
