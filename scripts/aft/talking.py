# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A talk with a model that knows chats, whose state goes from turn to turn: what `aft generate --chat` does."""

import sys
from typing import TextIO

import torch
from transformers import DynamicCache

from aft.generation import make_streamer
from modeling_aft.compatibility import CACHE_NAME


class Talk:
    """
    A conversation. What the model has read it has in its cache, and reads nothing twice: a turn adds the tokens that
    its template puts between an answer and the next.

    Args:
        model: a causal language model, in evaluation mode.
        vocabulary: of its tokenizer.
        tokenizer: with a chat template and a token that ends an answer.
        options: of `generate`.

    Attributes:
        messages (`list`): what was said, dicts with `role` and `content`.
        ids (`list[int]`): all tokens that were read or made.
    """

    def __init__(self, model, vocabulary, tokenizer, options: dict):
        self.model, self.vocabulary, self.tokenizer, self.options = model, vocabulary, tokenizer, options
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.prompt = ""  # what the template made of all before the last answer
        self.cache = DynamicCache(config=model.config)

    def next_ids(self, prompt: str) -> list[int]:
        """The tokens of the next turn: those after the last answer, or all if the template has changed what was."""
        if self.messages[:-1]:
            said, end = self.prompt + self.messages[-2]["content"], self.tokenizer.eos_token
            if prompt.startswith(said + end):
                has_end = self.ids[-1] == self.tokenizer.eos_token_id
                rest = prompt[len(said) + (len(end) if has_end else 0) :]
                return [*self.ids, *self.encode(rest)]
        self.cache = DynamicCache(config=self.model.config)
        return self.encode(prompt)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, text: str, output: TextIO) -> str:
        """
        Says something, and prints the answer while it is made.

        Raises:
            ValueError: the talk is longer than the position tables of the model.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        ids = self.next_ids(prompt)
        limit = self.options.get("limit")
        if limit is not None and len(ids) >= limit:
            self.messages.pop()
            raise ValueError(f"the talk has {len(ids)} tokens, and the position tables of the model end at {limit}")
        inputs = torch.tensor([ids], device=self.model.device)
        options = {name: value for name, value in self.options.items() if name != "limit"}
        if limit is not None:
            options["max_new_tokens"] = min(options["max_new_tokens"], limit - len(ids))
        made = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=make_streamer(self.vocabulary, output, skip_prompt=True),
            eos_token_id=self.tokenizer.eos_token_id,
            return_dict_in_generate=True,
            **{CACHE_NAME: self.cache},
            **options,
        )
        self.cache, self.prompt, self.ids = made[CACHE_NAME], prompt, made.sequences[0].tolist()
        answer = [token for token in self.ids[len(ids) :] if token != self.tokenizer.eos_token_id]
        self.messages.append({"role": "assistant", "content": self.vocabulary.decode(answer).decode(errors="replace")})
        return self.messages[-1]["content"]


def talk(model, vocabulary, tokenizer, options: dict) -> Talk:
    """
    Reads lines from standard input, and answers each, until they end.

    Raises:
        ValueError: the tokenizer has no chat template, or the talk is longer than the model can read.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "--chat needs a tokenizer with a chat_template and an eos_token, such as aft finetune --chat_file saves"
        )
    found = Talk(model, vocabulary, tokenizer, options)
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return found
        if line.strip():
            found.answer(line.rstrip("\r\n"), sys.stdout)
