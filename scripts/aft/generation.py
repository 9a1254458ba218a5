# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Continues a prompt, and prints the text while it is made: what `aft generate` does."""

import argparse
import codecs
import os
import sys
from typing import TextIO

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from aft.atomic_files import write_whole
from aft.model_configs import length_limit, stack_limits
from aft.saved_models import load, load_config, load_model
from aft.vocabulary import BYTE_END, vocabulary_of_model


class ByteStreamer(BaseStreamer):
    """
    Writes bytes as text as soon as they are whole characters; what is not UTF-8 becomes U+FFFD.

    Args:
        skip_prompt (`bool`): leave out the prompt, and the byte that ends a text.
    """

    def __init__(self, output: TextIO, skip_prompt: bool = False):
        self.output, self.skip_prompt, self.has_prompt = output, skip_prompt, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, value: torch.Tensor) -> None:
        """Takes the token ids of the prompt or of the next byte, of any shape with one sequence."""
        is_prompt, self.has_prompt = not self.has_prompt, True
        if self.skip_prompt:
            value = value[:0] if is_prompt else value[value != BYTE_END]
        self.output.write(self.decoder.decode(bytes(value.flatten().tolist())))
        self.output.flush()

    def end(self) -> None:
        self.output.write(self.decoder.decode(b"", final=True) + "\n")
        self.output.flush()


def find_device(asked: str | None, program: str) -> str:
    """
    The device that `--device` names, or CUDA if it is there, else the CPU.

    Raises:
        ValueError: torch does not find it.
    """
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        raise ValueError(f"{program}: --device must be a device that is here, got {device!r}") from error
    return device


def read_prompt(args: argparse.Namespace) -> bytes:
    """
    The bytes to continue: those of an argument and a pipe, too, are what they were before Python made text of them.

    Raises:
        ValueError: there are none.
    """
    if args.prompt_file is not None:
        prompt = args.prompt_file.read_bytes()
    elif args.prompt is not None:
        prompt = os.fsencode(args.prompt)
    else:
        prompt = getattr(sys.stdin, "buffer", sys.stdin).read()
        prompt = (prompt if isinstance(prompt, bytes) else os.fsencode(prompt)).rstrip(b"\r\n")
    if not prompt:
        raise ValueError("aft generate: the prompt must have at least one byte")
    return prompt


def make_streamer(vocabulary, output: TextIO, skip_prompt: bool = False) -> BaseStreamer:
    """Prints what is made of these tokens as it comes, and the prompt before it, if that is not skipped."""
    if vocabulary.is_bytes:
        return ByteStreamer(output, skip_prompt)
    options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": skip_prompt}
    return TextStreamer(vocabulary.tokenizer, skip_prompt, **options)


def prepare_model(auto_class, args: argparse.Namespace, device: str):
    """The model on its device, and what `generate` gets of the flags, of which the seed counts from here on."""
    trust = {"trust_remote_code": args.trust_remote_code}
    model, _ = load_model(auto_class, args.model, dtype=getattr(torch, args.dtype), **trust)
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.greedy:
        sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return model.to(device), {"repetition_penalty": args.repetition_penalty, **sampling}


def write_target(args: argparse.Namespace, prompt: bytes, config, device: str) -> None:
    """
    Writes the target of an encoder-decoder for a prompt, its source.

    Raises:
        ValueError: there is a file of prompts, or a chat; or the prompt is no text, or too long.
    """
    if args.chat or args.batch_file:
        name = "chat" if args.chat else "batch_file"
        allowed = "left out with an encoder-decoder, for which aft seq2seq --predict_file writes many targets"
        raise ValueError(f"--{name} must be {allowed}, got {getattr(args, name)}")
    tokenizer = load(AutoTokenizer, args.model, trust_remote_code=args.trust_remote_code)
    try:
        source = tokenizer(prompt.decode("utf-8"), return_tensors="pt")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt must be text in UTF-8, and is not at byte {error.start}") from None
    longest, length = stack_limits(config)[0], source.input_ids.shape[1]
    if longest is not None and length > longest:
        raise ValueError(f"the prompt must have at most {longest} tokens, the tables of the encoder, got {length}")
    model, options = prepare_model(AutoModelForSeq2SeqLM, args, device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids, mask = source.input_ids.to(device), source.attention_mask.to(device)
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    made = model.generate(ids, attention_mask=mask, streamer=streamer, num_beams=1, **options)
    if args.output_file is not None:
        write_whole(args.output_file.resolve(), tokenizer.decode(made[0], skip_special_tokens=True).encode())


def generate(args: argparse.Namespace) -> None:
    """
    Continues a prompt with the flags of `aft generate`, or answers it with an encoder-decoder.

    Raises:
        ValueError: the device is not there, the prompt empty or too long or no text for the tokenizer, or the model
            not whole and finite.
    """
    device = find_device(args.device, "aft generate")
    transformers.utils.logging.disable_progress_bar()
    alone = not (args.chat or args.batch_file)
    prompt = read_prompt(args) if alone else b""
    trust = {"trust_remote_code": args.trust_remote_code}
    config = load_config(args.model, **trust)
    if config.is_encoder_decoder:
        return write_target(args, prompt, config, device)
    vocabulary = vocabulary_of_model(args.model, config, **trust)
    prompt = vocabulary.encode_prompt(prompt) if alone else []
    max_new_tokens = args.max_new_tokens or 500
    limit = length_limit(config)
    if alone and limit is not None:
        length = len(prompt)
        max_new_tokens = args.max_new_tokens or min(max_new_tokens, limit - length)
        if not 1 <= max_new_tokens <= limit - length:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens} after a prompt of {length} tokens: together at most the "
                f"max_position_embeddings of the model, {limit}"
            )
    model, options = prepare_model(AutoModelForCausalLM, args, device)
    options["max_new_tokens"] = max_new_tokens
    if not alone:
        tokenizer = load(AutoTokenizer, args.model, **trust)
        if args.chat:
            from aft.talking import talk

            talk(model, vocabulary, tokenizer, {**options, "limit": limit})
        else:
            from aft.many_prompts import continue_file

            continue_file(model, tokenizer, args, limit, options)
        return
    ids = torch.tensor([prompt], device=device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=make_streamer(vocabulary, sys.stdout),
        **options,
    )
    if args.output_file is not None:
        write_whole(args.output_file.resolve(), vocabulary.decode(made[0].tolist()))
