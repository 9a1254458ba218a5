# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Continues a prompt with a byte-level model, and prints the text while it is made.

    python scripts/generate.py --model runs/pretraining --prompt "The return value"
    echo "The return value" | python scripts/generate.py --model runs/pretraining --temperature 0.5
    python scripts/generate.py --model runs/pretraining --prompt_file head.bin --output_file whole.bin

A prompt is any bytes, UTF-8 or not; line ends at the end of standard input do not count. What is not UTF-8 is printed
as U+FFFD; --output_file gets the bytes as they are.
"""

import argparse
import codecs
import os
import sys
from pathlib import Path
from typing import TextIO

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.generation.streamers import BaseStreamer

from shared.atomic_files import write_whole
from shared.console import any_text, run_program
from shared.pretraining_arguments import has_length_limit
from shared.saved_models import DTYPES, TRUST_HELP, load, load_config, load_model


class ByteStreamer(BaseStreamer):
    """Writes bytes as text as soon as they are whole characters; what is not UTF-8 becomes U+FFFD."""

    def __init__(self, output: TextIO):
        self.output = output
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, value: torch.Tensor) -> None:
        """Takes the token ids of the prompt or of the next byte, of any shape with one sequence."""
        self.output.write(self.decoder.decode(bytes(value.flatten().tolist())))
        self.output.flush()

    def end(self) -> None:
        self.output.write(self.decoder.decode(b"", final=True) + "\n")
        self.output.flush()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that pretrain_enwik8.py made, or a name on the Hub")
    parser.add_argument("--prompt", help="text to continue; standard input when left out")
    parser.add_argument("--prompt_file", help="file whose bytes to continue, all of them")
    parser.add_argument("--output_file", help="file for the bytes of the prompt and what continues it")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max_new_tokens", type=int, help="bytes to add; 500, or what a model with a length limit has room for"
    )
    sampling.add_argument("--greedy", action="store_true", help="always take the likeliest byte")
    sampling.add_argument("--temperature", type=float, default=0.8, help="divides the logits (default: %(default)s)")
    sampling.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest bytes; 0 = all (default)")
    sampling.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the likeliest of this mass (default 1)"
    )
    sampling.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 = fewer repeats (default: 1)")
    sampling.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where the model runs (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    args = parser.parse_args(argv)
    source, target = (None if name is None else Path(name) for name in (args.prompt_file, args.output_file))
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)!r}"
        for name, ok, allowed in (
            ("prompt", args.prompt is None or args.prompt_file is None, "left out with --prompt_file"),
            ("prompt_file", source is None or (source.exists() and not source.is_dir()), "a file or a pipe"),
            ("output_file", target is None or target.is_file() or not target.exists(), "a new file or a regular one"),
            ("max_new_tokens", args.max_new_tokens is None or args.max_new_tokens >= 1, "at least 1"),
            ("temperature", 1e-6 <= args.temperature <= 1e6, "in [1e-6, 1e6] (--greedy for the limit 0)"),
            ("top_k", args.top_k >= 0, "at least 0"),
            ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", 1e-6 <= args.repetition_penalty <= 1e6, "in [1e-6, 1e6]"),
            ("seed", 0 <= args.seed < 2**32, "in [0, 2**32)"),
            ("device", is_device(args.device), "a device that is here"),
            ("dtype", args.dtype in DTYPES, "float32, bfloat16 or float16"),
        )
        if not ok
    ]
    if problems:
        raise ValueError("generate.py: " + "; ".join(problems))
    args.prompt_file, args.output_file = source, target
    return args


def is_device(name: str) -> bool:
    """Whether torch finds a device of this name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the latter of a build without CUDA
        return False
    return True


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
        raise ValueError("generate.py: the prompt must have at least one byte")
    return prompt


def check_tokenizer(tokenizer, name: str) -> None:
    """
    Checks that the ids of a tokenizer are bytes.

    Raises:
        ValueError: it has other tokens.
    """
    if tokenizer.vocab_size != 256 or tokenizer("a\u00e9").input_ids != [97, 195, 169]:
        raise ValueError(f"--model {name}: must have a tokenizer of 256 bytes, got {tokenizer.vocab_size} tokens")


@any_text()
def main(argv: list[str] | None = None) -> None:
    """
    Runs the program with the flags `argv`, those of the command line by default.

    Raises:
        ValueError: a flag is wrong, the prompt empty or too long, or the model not one of bytes, whole and finite.
    """
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    prompt = read_prompt(args)
    trust = {"trust_remote_code": args.trust_remote_code}
    config = load_config(args.model, **trust)
    check_tokenizer(load(AutoTokenizer, args.model, **trust), args.model)
    max_new_tokens = args.max_new_tokens or 500
    if has_length_limit(config):
        limit, length = config.max_position_embeddings, len(prompt)
        max_new_tokens = args.max_new_tokens or min(max_new_tokens, limit - length)
        if not 1 <= max_new_tokens <= limit - length:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens} after a prompt of {length} bytes: together at most the "
                f"max_position_embeddings of the model, {limit}"
            )
    model, _ = load_model(AutoModelForCausalLM, args.model, dtype=getattr(torch, args.dtype), **trust)
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    ids = torch.tensor([list(prompt)], device=args.device)
    made = model.to(args.device).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=ByteStreamer(sys.stdout),
        max_new_tokens=max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        **({"do_sample": False, "temperature": None, "top_k": None, "top_p": None} if args.greedy else sampling),
    )
    if args.output_file is not None:
        write_whole(args.output_file.resolve(), bytes(made[0].tolist()))


if __name__ == "__main__":
    run_program(main)
