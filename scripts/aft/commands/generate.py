# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Continues a prompt, and prints the text while it is made.

    aft generate --model runs/pretraining --prompt "The return value"
    echo "The return value" | aft generate --model runs/pretraining --temperature 0.5
    aft generate --model runs/pretraining --prompt_file head.bin --output_file whole.bin
    aft generate --model runs/pretraining --batch_file prompts.txt --output_file texts.jsonl
    aft generate --model runs/chat --chat

Of a model of bytes a prompt is any bytes, UTF-8 or not; what is not UTF-8 is printed as U+FFFD, and --output_file gets
the bytes as they are. Of other models it is text. Line ends at the end of standard input do not count.
Of an encoder-decoder the prompt is the source, and its target is printed.
--chat talks with a model that aft finetune --chat_file has made: its state goes from turn to turn, and nothing is read
twice.
"""

import argparse
from pathlib import Path

from aft.console import any_text
from aft.flags import FlagParser, check_model_name, import_files, sampling_checks


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("generate", __doc__)
    parser.add_argument("--model", required=True, help="folder that aft pretrain made, or a name on the Hub")
    parser.add_argument("--prompt", help="text to continue; standard input when left out")
    parser.add_argument("--prompt_file", help="file whose bytes to continue, all of them")
    parser.add_argument("--chat", action="store_true", help="answer each line of standard input, by the chat template")
    parser.add_argument("--batch_file", help="prompts: a line each, or .jsonl with prompt or messages in each object")
    parser.add_argument("--batch_size", type=int, default=8, help="of them at once (default: %(default)s)")
    parser.add_argument(
        "--output_file", help="file for the bytes of the prompt and what continues it; of --batch_file .jsonl"
    )
    parser.add_loading()
    sampling = parser.add_sampling(temperature=0.8)
    sampling.add_argument(
        "--max_new_tokens",
        type=int,
        help="tokens to add; 500, or what a model with a length limit has room for",
    )
    sampling.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    sampling.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 = fewer repeats (default: 1)")
    args = parser.parse_args(argv)
    source, target, batch = (
        None if name is None else Path(name) for name in (args.prompt_file, args.output_file, args.batch_file)
    )
    ways = [
        name for name in ("prompt", "prompt_file", "chat", "batch_file") if getattr(args, name) not in (None, False)
    ]
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)!r}"
        for name, ok, allowed in (
            *((name, False, f"left out with --{ways[-1]}") for name in ways[:-1]),
            ("output_file", target is None or not args.chat, "left out with --chat"),
            ("batch_file", batch is None or batch.is_file(), "a file"),
            ("batch_size", args.batch_size >= 1, "at least 1"),
            ("prompt_file", source is None or (source.exists() and not source.is_dir()), "a file or a pipe"),
            ("output_file", target is None or target.is_file() or not target.exists(), "a new file or a regular one"),
            ("max_new_tokens", args.max_new_tokens is None or args.max_new_tokens >= 1, "at least 1"),
            ("repetition_penalty", 1e-6 <= args.repetition_penalty <= 1e6, "in [1e-6, 1e6]"),
            *sampling_checks(args),
        )
        if not ok
    ]
    if problems:
        raise ValueError("aft generate: " + "; ".join(problems))
    check_model_name(args.model)
    args.prompt_file, args.output_file, args.batch_file = source, target, batch
    return args


@any_text()
def main(argv: list[str] | None = None) -> None:
    """
    Runs the program with the flags `argv`, those of the command line by default.

    Raises:
        ValueError: a flag is wrong, the prompt empty or too long, or the model not whole and finite.
    """
    args = parse_arguments(argv)
    import_files(args.imports)
    from aft.generation import generate

    generate(args)
