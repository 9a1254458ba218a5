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
"""

import argparse
import codecs
import sys
from typing import TextIO

import torch
import transformers
from byte_models import TRUST_REMOTE_CODE, load_model, read_config
from console import any_text, run_program
from pretraining_arguments import has_length_limit
from transformers import AutoTokenizer, set_seed
from transformers.generation.streamers import BaseStreamer


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
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)!r}"
        for name, ok, allowed in (
            ("max_new_tokens", args.max_new_tokens is None or args.max_new_tokens >= 1, "at least 1"),
            ("temperature", args.temperature > 0, "positive (--greedy for the limit 0)"),
            ("top_k", args.top_k >= 0, "at least 0"),
            ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", args.repetition_penalty > 0, "positive"),
            ("dtype", args.dtype in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
        )
        if not ok
    ]
    if problems:
        raise ValueError("generate.py: " + "; ".join(problems))
    return args


@any_text()
def main(argv: list[str] | None = None) -> None:
    """Runs the program with the flags `argv`, those of the command line by default."""
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    prompt = sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("generate.py: the prompt must have at least one character")
    config = read_config(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=TRUST_REMOTE_CODE)
    if tokenizer.vocab_size != 256:
        raise ValueError(
            f"--model {args.model}: must have a tokenizer of 256 bytes, got {tokenizer.vocab_size} tokens"
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(args.device)
    max_new_tokens = args.max_new_tokens or 500
    if has_length_limit(config):
        limit, length = config.max_position_embeddings, inputs.input_ids.shape[1]
        max_new_tokens = args.max_new_tokens or min(max_new_tokens, limit - length)
        if not 1 <= max_new_tokens <= limit - length:
            raise ValueError(
                f"--max_new_tokens {max_new_tokens} after a prompt of {length} bytes: together at most the "
                f"max_position_embeddings of the model, {limit}"
            )
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    model = load_model(args.model, getattr(torch, args.dtype))
    model.to(args.device).generate(
        **inputs,
        streamer=ByteStreamer(sys.stdout),
        max_new_tokens=max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        **({"do_sample": False, "temperature": None, "top_k": None, "top_p": None} if args.greedy else sampling),
    )


if __name__ == "__main__":
    run_program(main)
