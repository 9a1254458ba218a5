# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Converts a checkpoint of the Z1T family to a folder that AutoModelForCausalLM loads.

    python scripts/convert_z1t.py model.eqx runs/z1t-0 --config config.json
    python scripts/convert_z1t.py model.safetensors runs/z1t-0 --tanh_linear --tanh_mlp

The checkpoint is what Equinox writes, or its conversion to safetensors. All sizes come from the shapes of its arrays.
Whether a tanh stands behind the linear layers, and in the place of SiLU, is not in them: --config or flags say it.
"""

import argparse
import tempfile
from pathlib import Path

import transformers

from aft.atomic_files import check_new_folder, move_model
from aft.console import run_program
from aft.settings_files import read_json
from aft.z1t_checkpoints import check_arrays, make_config, make_model, open_arrays


TOLD = ("tanh_linear", "tanh_mlp")  # what shapes do not say
SIZES = {  # fields of the published configurations, by those of AFTConfig
    "vocab_size": ("vocab", "vocab_size"),
    "hidden_size": ("n_embed", "hidden_size"),
    "num_hidden_layers": ("n_layers", "num_hidden_layers"),
    "max_position_embeddings": ("sequence", "max_position_embeddings"),
    "num_attention_heads": ("aft_heads",),
    "window_size": ("aft_ksize",),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this script.

    Raises:
        ValueError: the output is there already.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="file of Equinox (.eqx) or of safetensors")
    parser.add_argument("output_dir", type=Path, help="folder for the model, new or empty")
    parser.add_argument("--config", type=Path, help="the config.json that came with the checkpoint")
    for name, text in zip(TOLD, ("a tanh stands behind linear layers", "tanh is in the place of SiLU"), strict=True):
        help = f"whether {text} (default: what --config says)"
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=help)
    args = parser.parse_args(argv)
    check_new_folder(args.output_dir, "output_dir")
    return args


def read_published(path: Path) -> dict:
    """The fields of a config.json, of the model alone where it has other sections too."""
    values = read_json(path, "--config")
    return values["model"] if isinstance(values.get("model"), dict) else values


def find_told(args: argparse.Namespace, published: dict) -> dict[str, bool]:
    """What shapes do not say, from flags and else from the published configuration, by name."""
    told = {name: published.get(name) if getattr(args, name) is None else getattr(args, name) for name in TOLD}
    if wrong := [f"--{name} or --no-{name}" for name, value in told.items() if value is None]:
        raise ValueError(f"{', '.join(wrong)} must be given, or a --config that says it: the arrays do not")
    if wrong := [f"{name} {value!r}" for name, value in told.items() if not isinstance(value, bool)]:
        raise ValueError(f"--config {args.config}: must be true or false, got {', '.join(wrong)}")
    return told


def check_published(path: Path, published: dict, config) -> None:
    """
    Compares a published configuration with what the arrays say.

    Raises:
        ValueError: lists the fields that differ.
    """
    kind = published.get("aft_kind", "conv")
    problems = [] if kind == "conv" else [f"aft_kind must be conv, got {kind!r}"]
    for field, names in SIZES.items():
        found = getattr(config, field)
        problems += [
            f"{name} {published[name]} is {found} in the checkpoint"
            for name in names
            if published.get(name, found) != found
        ]
    if problems:
        raise ValueError(f"--config {path}: {'; '.join(problems)}")


def main(argv: list[str] | None = None) -> Path:
    """
    Converts a checkpoint; returns the folder.

    Raises:
        ValueError: a flag is wrong, or the checkpoint is none of this family; nothing is written then.
    """
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    published = {} if args.config is None else read_published(args.config)
    told = find_told(args, published)
    arrays = open_arrays(args.checkpoint)
    config = make_config(arrays, **told)
    check_published(args.config, published, config)
    check_arrays(arrays, config)
    model = make_model(arrays, config)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".") as temporary:
        model.save_pretrained(temporary, max_shard_size="1GB")  # what is in memory at a time
        move_model(Path(temporary), args.output_dir)
    print(f"{model.num_parameters():,} parameters; wrote {args.output_dir}")
    return args.output_dir


if __name__ == "__main__":
    run_program(main)
