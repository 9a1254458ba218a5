# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The code of a saved model, which it needs where the package is not installed: added to its folder, or taken away."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision

import modeling_aft
from aft.settings_files import read_json


# What reads the inputs of a model. An auto_map, there and in config.json, says which class is in which file.
READERS = {"tokenizer_config.json": AutoTokenizer, "preprocessor_config.json": AutoImageProcessor}


def add_code(folder: Path) -> None:
    """
    Adds the code of the installed package to a model that was saved without, as `save_pretrained` writes it.

    Raises:
        ValueError: the model is not one of the package.
    """
    config = AutoConfig.from_pretrained(folder)
    readers = [loader.from_pretrained(folder) for file, loader in READERS.items() if (folder / file).is_file()]
    name = (config.architectures or ["no class"])[0]
    if name not in modeling_aft.__all__:
        raise ValueError(f"architectures must begin with a class of modeling_aft, whose code is added, got {name!r}")
    with torch.device("meta"):
        model = getattr(modeling_aft, name)(config)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, state_dict={})
        for reader in readers:
            reader.save_pretrained(temporary)
        for path in Path(temporary).glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        for name in configurations(folder):
            auto_map = read_json(Path(temporary) / name, name).get("auto_map")
            if auto_map is not None:
                write_json(folder / name, {**read_json(folder / name, name), "auto_map": auto_map})


def remove_code(folder: Path) -> None:
    """Takes away what `add_code` adds: from then on, the model loads where the package is installed."""
    for path in folder.glob("*.py"):
        path.unlink()
    for name in configurations(folder):
        content = read_json(folder / name, name)
        content.pop("auto_map", None)
        write_json(folder / name, content)


def configurations(folder: Path) -> list[str]:
    """The files of a model that may have an auto_map."""
    return ["config.json", *(name for name in READERS if (folder / name).is_file())]


def write_json(path: Path, content: dict) -> None:
    """Writes a configuration in the manner of `save_pretrained`."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
