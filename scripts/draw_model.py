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

    python scripts/draw_model.py runs/aft-local --output_dir pictures
    python scripts/draw_model.py runs/aft-local runs/aft-simple --output_dir pictures --dataset_path FILE

- <model>-bias-map.png: the position biases of each layer as heat maps. AFT-full has T x T of them, AFT-local the
  offsets of its window for each position, AFT-conv those for each head. Of a Synthesizer, the logits that no input
  changes (random, fixed random and factorized random, times their weight in a mixture), as means over the heads.
- <model>-bias-curve.svg: the same over the offset t - t': mean and 10 to 90 % over the positions, or a line per head.
- <model>-mixture.svg: the weights of a Synthesizer's mixture, mean over the heads and a dot for each.
- receptive-field.svg: for all AFT models together, the share of the attention weight exp(k + w) that the nearest keys
  have, mean over the channels, over real bytes, and over the queries of the second half of a window.

What is larger than 300 kB as svg becomes a png.
"""

import argparse
from pathlib import Path

import transformers

from shared.console import any_text, run_program
from shared.drawing import save_figure
from shared.model_pictures import STATIC, draw_model, draw_receptive_fields, load_models


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    parser.add_argument("--output_dir", required=True, help="folder of the pictures")
    parser.add_argument(
        "--dataset_path",
        type=Path,
        help="file whose valid split the receptive field reads; else Python's documentation",
    )
    parser.add_argument("--length", type=int, help="bytes of a window; else the least max_position_embeddings")
    parser.add_argument("--num_windows", type=int, default=4, help="windows of the receptive field (default: 4)")
    args = parser.parse_args(argv)
    problems = [
        f"--{name} must be at least {least}, got {getattr(args, name)}"
        for name, least in (("length", 2), ("num_windows", 1))
        if getattr(args, name) is not None and getattr(args, name) < least
    ]
    if not args.output_dir:
        problems.append("--output_dir must be a path, got ''")
    if problems:
        raise ValueError("draw_model.py: " + "; ".join(problems))
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
    transformers.utils.logging.disable_progress_bar()
    models = load_models(args.models)
    figures = {}
    afts = {name: model for name, model in models.items() if model.config.model_type == "aft"}
    for name, model in models.items():
        drawn = draw_model(name, model)
        if not drawn and name not in afts:
            raise ValueError(
                f"{name} has nothing to draw: neither AFT, nor a mixture, nor any of {', '.join(STATIC)}, but "
                f"{', '.join(model.config.components)}"
            )
        figures |= drawn
    if afts:
        if no_bytes := [name for name, model in afts.items() if model.config.vocab_size < 256]:
            raise ValueError(f"models: must have a vocab_size of 256 or more, not so {', '.join(no_bytes)}")
        fields = draw_receptive_fields(afts, args.dataset_path, args.length, args.num_windows)
        figures["receptive-field.svg"] = fields
    written = [save_figure(figure, args.output_dir / name) for name, figure in figures.items()]
    for path in written:
        print(f"wrote {path}")
    return written


if __name__ == "__main__":
    run_program(main)
