# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Draws what saved models have learned about positions, as one picture per model and kind.

    aft draw runs/aft-local --output_dir pictures
    aft draw runs/aft-local runs/aft-simple --output_dir pictures --dataset_path FILE

- <model>-bias-map.png: the position biases of each layer as heat maps. AFT-full has T x T of them, AFT-local the
  offsets of its window for each position, AFT-conv those for each head. Of a Synthesizer, the logits that no input
  changes (random, fixed random and factorized random, times their weight in a mixture), as means over the heads.
- <model>-bias-curve.svg: the same over the offset t - t': mean and 10 to 90 % over the positions, or a line per head.
- <model>-mixture.svg: the weights of a Synthesizer's mixture, mean over the heads and a dot for each.
- <model>-kernels.png: of an AFT-conv of images, exp(w) - 1 of each head and layer, as in figure 1 of the paper.
- receptive-field.svg: for all AFT models of text together, the share of the attention weight exp(k + w) of the nearest
  keys, mean over the channels, over real bytes, and over the queries of the second half of a window.

What is larger than 300 kB as svg becomes a png.
"""

import argparse
from pathlib import Path

from aft.console import any_text
from aft.flags import FlagParser, check_model_name
from aft.text_arguments import TextArguments, complete_text_arguments, text_problems


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("draw", __doc__)
    parser.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    parser.add_argument("--output_dir", required=True, help="folder of the pictures")
    parser.add_fields(TextArguments)
    parser.add_argument("--length", type=int, help="tokens of a window; else the least max_position_embeddings")
    parser.add_argument("--num_windows", type=int, default=4, help="windows of the receptive field (default: 4)")
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least {least}, got {getattr(args, name)}"
        for name, least in (("length", 2), ("num_windows", 1))
        if getattr(args, name) is not None and getattr(args, name) < least
    ]
    if not args.output_dir:
        problems.append("--output_dir must be a path, got ''")
    complete_text_arguments(args)
    problems += text_problems(args)
    if problems:
        raise ValueError("aft draw: " + "; ".join(problems))
    for model in args.models:
        check_model_name(model, "models:", hub=False)
    args.output_dir = Path(args.output_dir)
    return args


@any_text()
def main(argv: list[str] | None = None) -> list[Path]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the files it wrote.

    Raises:
        ValueError: a flag is wrong, or a model has nothing that could be drawn.
    """
    args = parse_arguments(argv)
    from aft.model_pictures import draw_models

    return draw_models(args)
