# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Bits per byte of a language model on a split of a text, or bits per dimension on pictures, by a named protocol. Every
byte is scored once, by the token that ends with it or after it; lengths are counted in tokens, which of many models
are bytes.

    aft evaluate runs/tiny --split test --protocol segments --length 256
    aft evaluate runs/tiny --dataset_path FILE --protocol sliding --length 256 --stride 64
    aft evaluate runs/pictures --pictures FOLDER --max_pictures 1000

- `segments`: independent windows of T tokens, side by side. The first token of a window is predicted from the one
  before it, the last from T tokens.
- `sliding`: windows of T tokens at stride S. The first is scored whole, of the others only the last S tokens, so that
  each of them is predicted from T - S + 1 tokens or more.
- `carried`: streams of L tokens, side by side, or the whole split as one. A stream is read in parts of T tokens and
  the state is carried from one to the next, so that a token is predicted from all of its stream before it.
- `refreshed`: one stream, in which the model starts anew before it would read more than R tokens, and reads the last O
  again: a token is predicted from O + 1 to R tokens before it. It reads R / (R - O) times the stream.
- `masked`, of a masked language model: independent windows of T tokens, of which a share of P is replaced by the mask
  token. Only what is hidden is scored, each token from all that is not. What is hidden depends on the place of the
  window alone, so that models with the same tokens are asked the same.
- `pictures`, of a model of pictures, with --pictures in place of a text: bits per dimension, which are the summed nats
  of all T sub-pixels of a picture / (T ln 2), averaged over pictures. The first sub-pixel counts: it is predicted from
  the start token; of a model without one (256 tokens) it is charged with 8 bits. What a model of 257 tokens gives to
  the start token within a picture is lost, so its score is an upper bound of that of the 256 values.

No score depends on --batch_size or the number of processes, which say how many windows or streams are read at once;
nor do those of `carried` and `refreshed` on T, how many tokens of each. --by_position tells the same by the position
of a token in its window, or of `carried` and `refreshed` in its stream; scripts/draw_positions.py makes a picture.

The token before the split is context and is not scored, so only the very first byte of a file is never scored.
"""

import argparse
from pathlib import Path

from aft.console import any_text
from aft.flags import DTYPES, FlagParser, check_model_name, import_files
from aft.masking_arguments import MaskingArguments, masking_problems
from aft.picture_arguments import PictureArguments, complete_source, source_problems
from aft.protocols import PROTOCOLS
from aft.text_arguments import TextArguments


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("evaluate", __doc__)
    parser.add_fields(TextArguments)
    parser.add_fields(PictureArguments)
    parser.add_fields(MaskingArguments)
    parser.add_argument("model", help="folder of a saved model, or a name on the Hub")
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument(
        "--protocol",
        help="segments (default), sliding, carried or refreshed; masked (default) of a masked model; pictures "
        "(default) with --pictures",
    )
    parser.add_argument("--length", type=int, help="T in tokens (default: max_position_embeddings)")
    parser.add_argument("--stride", type=int, help="S of sliding, in tokens (default: half of T)")
    parser.add_argument("--stream_length", type=int, help="L of carried, in tokens (default: the whole range)")
    parser.add_argument("--refresh_every", type=int, help="R of refreshed, in tokens")
    parser.add_argument("--refresh_overlap", type=int, help="O of refreshed, in tokens")
    parser.add_argument("--max_pictures", type=int, help="score only the first so many pictures (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at once (default: %(default)s)")
    parser.add_argument("--by_position", type=Path, help="csv file for the bits per byte of each range of positions")
    parser.add_argument("--dtype", default="auto", help="auto (what config.json says; default) or one like float32")
    parser.add_loading()
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least 1, got {getattr(args, name)}"
        for name in ("length", "batch_size", "max_pictures")
        if getattr(args, name) is not None and getattr(args, name) < 1
    ]
    problems += [
        f"--{name} must be one of {', '.join(filter(None, choices))}, got {getattr(args, name)!r}"
        for name, choices in (
            ("split", ("train", "valid", "test")),
            ("protocol", (*PROTOCOLS, None)),
            ("dtype", ("auto", *DTYPES)),
        )
        if getattr(args, name) not in choices
    ]
    is_masked = None if args.protocol is None else args.protocol == "masked"
    problems += masking_problems(args, is_masked, "--protocol masked")
    complete_source(args)
    problems += source_problems(args)
    has_pictures = args.pictures is not None
    if has_pictures and args.protocol not in ("pictures", None):
        problems.append(f"--protocol must be pictures with --pictures, got {args.protocol!r}")
    of_text = ("length", "stride", "stream_length", "refresh_every", "refresh_overlap")
    problems += [
        f"--{name} must be left out {'with' if has_pictures else 'without'} --pictures, got {getattr(args, name)}"
        for name in (of_text if has_pictures else ("max_pictures",))
        if getattr(args, name) is not None
    ]
    if args.streaming and args.split == "train":
        problems.append("--split must be valid or test with --streaming, got 'train'")
    if problems:
        raise ValueError("aft evaluate: " + "; ".join(problems))
    check_model_name(args.model)
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
    import_files(args.imports)
    from aft.scoring import evaluate

    return evaluate(args)
