# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Bits per byte of a causal language model on a range of bytes, by a named protocol. Every byte is scored once.

    python scripts/score.py runs/tiny --split test --protocol segments --length 256
    python scripts/score.py runs/tiny --dataset_path FILE --protocol sliding --length 256 --stride 64

- `segments`: independent windows of T bytes, side by side. The first byte of a window is predicted from the one byte
  before it, the last from T bytes.
- `sliding`: windows of T bytes at stride S. The first is scored whole, of the others only the last S bytes, so that
  each of them is predicted from T - S + 1 bytes or more.
- `carried`: the range is cut into one contiguous stream per row of the batch and process; a stream is read in segments
  of T bytes, and the recurrent state is carried from one to the next. So --batch_size sets how long a stream is, and
  changes the score: the fewer streams, the more context. With --batch_size 1 on one process there is a single one.

The byte before the range is context and is not scored, so only the very first byte of a file is never scored.
"""

import argparse
from pathlib import Path

import transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from shared.bits_per_byte import evaluate_split
from shared.byte_data import file_bytes, pydoc_bytes
from shared.console import any_text, run_program
from shared.pretraining_arguments import CHOICES, has_length_limit
from shared.run_log import describe_protocol
from shared.saved_models import TRUST_HELP, load_config, load_model


def check_protocol(config, protocol: str, length: int | None, stride: int | None) -> tuple[int, int]:
    """
    T and S of a protocol for a model: `max_position_embeddings` and half of T where they are None.

    Raises:
        ValueError: the model has no such length, its position tables end before the protocol does, or the protocol
            has no stride.
    """
    limit = getattr(config, "max_position_embeddings", None)
    length = length or limit
    if length is None:
        raise ValueError("--length must be given: the model has no max_position_embeddings")
    if has_length_limit(config):
        if length > limit:
            raise ValueError(f"--length must be at most max_position_embeddings ({limit}), got {length}")
        if protocol == "carried":
            raise ValueError("--protocol must be segments or sliding, got 'carried': the model's position tables end")
    if stride is not None and protocol != "sliding":
        raise ValueError(f"--stride must be left out without --protocol sliding, got {stride}")
    stride = stride or max(length // 2, 1)
    if stride > length:
        raise ValueError(f"--stride must be at most --length ({length}), got {stride}")
    return length, stride


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or a name on the Hub")
    parser.add_argument("--dataset_path", type=Path, help="file of bytes; Python's documentation when left out")
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument("--protocol", default="segments", help="segments (default), sliding or carried")
    parser.add_argument("--length", type=int, help="T in bytes (default: max_position_embeddings)")
    parser.add_argument("--stride", type=int, help="S of the sliding protocol (default: half of T)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="windows at once; of carried, streams of each process, which changes the score (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", help="auto (what config.json says; default) or one like float32")
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least 1, got {getattr(args, name)}"
        for name in ("length", "stride", "batch_size")
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    problems += [
        f"--{name} must be one of {', '.join(choices)}, got {getattr(args, name)!r}"
        for name, choices in (
            ("split", ("train", "valid", "test")),
            ("protocol", CHOICES["eval_protocol"]),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        )
        if getattr(args, name) not in choices
    ]
    if problems:
        raise ValueError("score.py: " + "; ".join(problems))
    return args


@any_text()
def main(argv: list[str] | None = None) -> dict:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the result.

    Raises:
        ValueError: a flag is wrong, or does not fit the model, or the model is not one of bytes, whole and finite.
        FloatingPointError: the score is NaN or infinite.
    """
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    content = pydoc_bytes() if args.dataset_path is None else file_bytes(args.dataset_path)
    trust = {"trust_remote_code": args.trust_remote_code}
    length, stride = check_protocol(load_config(args.model, **trust), args.protocol, args.length, args.stride)
    accelerator = Accelerator()
    model, _ = load_model(AutoModelForCausalLM, args.model, dtype=args.dtype, **trust)
    result = evaluate_split(
        accelerator.prepare(model),
        content,
        args.split,
        accelerator,
        protocol=args.protocol,
        length=length,
        stride=stride,
        batch_size=args.batch_size,
    )
    streams = f"; {result['bytes_per_stream']} bytes per stream" if "streams" in result else ""
    score = f"{result['bits_per_byte']:.4f} bits per byte"
    accelerator.print(f"{args.split}: {score} ({describe_protocol(result)}){streams}")
    return result


if __name__ == "__main__":
    run_program(main)
