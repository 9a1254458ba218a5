# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Makes an AFT of a ViT or DeiT: all its weights but those of queries, keys, class token and positions.

    python scripts/convert_vit.py facebook/deit-tiny-patch16-224 runs/deit-aft --model_override num_attention_heads=32
    aft classify --model runs/deit-aft --data pictures --output_dir runs/pictures

The source is a folder or a name on the Hub. What is new must be trained before the model says anything; --gate_bias 2
lets it begin nearer to the source. The image processor of the source is saved with the model, with every field.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aft.atomic_files import check_new_folder, move_model
from aft.console import run_program
from aft.model_configs import read_overrides
from aft.saved_models import load, load_model
from modeling_aft import AFTForImageClassification, AFTVisionConfig


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: the output is there already.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a saved ViT or DeiT, or its name on the Hub")
    parser.add_argument("output_dir", type=Path, help="folder for the model, new or empty")
    parser.add_argument(
        "--model_override",
        nargs="*",
        default=[],
        help="fields of AFTVisionConfig as key=value: aft_type=full, kernel_size=11, num_attention_heads=16, ...",
    )
    parser.add_argument("--gate_bias", type=float, help="what the biases of all queries begin with (default: 0)")
    args = parser.parse_args(argv)
    check_new_folder(args.output_dir, "output_dir")
    return args


def main(argv: list[str] | None = None) -> Path:
    """
    Converts a model; returns the folder.

    Raises:
        ValueError: a flag is wrong, or the source is no ViT or DeiT; nothing is written then.
    """
    args = parse_arguments(argv)
    fields = read_overrides(args.model_override, AFTVisionConfig())
    transformers.utils.logging.disable_progress_bar()
    vit, _ = load_model(
        AutoModelForImageClassification, args.source, flag="source", new_head=True, dtype=torch.float32
    )
    processor = load(AutoImageProcessor, args.source, flag="source", file="preprocessor_config.json")
    model, found = AFTForImageClassification.from_vit(
        vit, gate_bias=args.gate_bias, output_loading_info=True, **fields
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".") as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        move_model(Path(temporary), args.output_dir)
    print(f"left out: {', '.join(found['left_out'])}")
    print(f"{len(found['copied'])} tensors copied, {len(found['new'])} new; {model.num_parameters():,} parameters")
    print(f"wrote {args.output_dir}; train it: aft classify --model {args.output_dir} --data FOLDER")
    return args.output_dir


if __name__ == "__main__":
    run_program(main)
