# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The folder of a run of `aft pretrain`: what of an earlier run is in it, and the model at the end."""

import shutil
import tempfile
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from aft.atomic_files import move_model
from aft.checkpointing import abandon, complete_checkpoints


MODEL_PART = ".model-"  # the name of a folder with files of a model that are not in place yet begins with it


def continues_here(args, checkpoint: Path | None) -> bool:
    """Whether the run goes on in the folder that its checkpoint is in."""
    folder = Path(args.output_dir) / "checkpoints"
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def check_output(args, checkpoint: Path | None) -> None:
    """Raises a ValueError if the output folder holds a run that would be lost: another than that of `checkpoint`."""
    folder = Path(args.output_dir)
    earlier = [name for name in ("config.json", "run.jsonl", "checkpoints") if (folder / name).exists()]
    unfinished = "config.json" not in earlier and not complete_checkpoints(folder / "checkpoints")
    if earlier and not (continues_here(args, checkpoint) or args.overwrite or (args.resume == "auto" and unfinished)):
        raise ValueError(
            f"--output_dir {folder} holds a run ({', '.join(earlier)}); continue it with --resume auto, replace it "
            "with --overwrite, or choose another folder"
        )


def clear_output(args, checkpoint: Path | None, step: int) -> None:
    """
    Removes an earlier run from the output folder, or what of it is younger than the checkpoint of `step`; and what a
    process that was killed has left half-written.
    """
    folder = Path(args.output_dir)
    for part in folder.glob(".*.tmp"):
        part.unlink()
    for part in folder.glob(f"{MODEL_PART}*"):
        shutil.rmtree(part)
    if args.overwrite:
        # First: no finished model is here until this run has finished.
        for name in ("config.json", "README.md", *(path.name for path in folder.glob("samples*.png"))):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard"):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    elif continues_here(args, checkpoint) and (names := abandon(folder / "checkpoints", step)):
        print(f"set aside until the next checkpoint: {', '.join(names)}, younger than {checkpoint.name}")


def save_model(model, accelerator: Accelerator, folder: Path, vocabulary) -> None:
    """
    Writes config, generation config, weights and tokenizer to `folder`; all processes must call this. config.json,
    which says that a model is here, comes last.

    Raises:
        OSError: they cannot be written.
    """
    # The names of a compiled model's weights begin with _orig_mod, and no model that loads them expects that.
    state_dict = {name.replace("_orig_mod.", ""): w for name, w in accelerator.get_state_dict(model).items()}
    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory(dir=folder, prefix=MODEL_PART) as temporary:
            try:
                accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(
                    temporary, state_dict=state_dict
                )
                vocabulary.save(Path(temporary), accelerator.unwrap_model(model).config)
            except SafetensorError as error:  # what safetensors makes of a full disk
                raise OSError(f"the model cannot be written to {folder}: {error}") from error
            move_model(Path(temporary), folder)
    accelerator.wait_for_everyone()
