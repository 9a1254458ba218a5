# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Trains a classifier of pictures with `transformers.Trainer`, from nothing or from a saved model, and scores it.

    aft classify --data pictures --output_dir runs/pictures
    aft classify --data /usr/share/datasets/fashion-mnist --model small.json --num_train_epochs 20
    aft classify --data owner/name --model runs/deit-aft --recipe finetune
    accelerate launch -m aft classify --data pictures --resume_from_checkpoint auto

--data: a folder with one folder of pictures per class, or with train/, valid/ and test/ of such; a folder with the
files of MNIST or Fashion-MNIST (train-images-idx3-ubyte.gz and the like); or a data set of `datasets`, by its path or
its name on the Hub, with --image_column and --label_column. Without a part to validate on, --split_seed draws
--validation_share of the pictures to train on. A test part is scored once, at the end.
--model: a saved model goes on, with a new head if its labels are others; a JSON file of a configuration, or a preset,
begins from nothing. Any model will do that AutoModelForImageClassification knows. --model_override sets fields, as
drop_path_rate=0.1.
--recipe: how pictures are changed and how the model is trained, as a file of flags. An explicit flag wins.

Every flag of TrainingArguments is a flag here. Checkpoints, --resume_from_checkpoint and --num_train_epochs 0 are as
in `aft finetune`. What is done to a picture follows from --seed, the epoch and its number alone, so that neither
--dataloader_num_workers nor a stop in between changes a run. output_dir gets the model with its code and its image
processor, which evaluation uses too: pipeline("image-classification", model=output_dir) gives the same scores. A
pipeline makes every picture RGB, and so do models of three channels here, as all presets are.
"""

import sys

from aft.classifying_flags import add_recipe, picture_problems, read_flags
from aft.console import any_text


@any_text()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns all metrics.

    Raises:
        ValueError: a flag, the data or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    argv = add_recipe(sys.argv[1:] if argv is None else argv)
    if problems := picture_problems(read_flags(argv, __doc__)):
        raise ValueError("aft classify: " + "; ".join(problems))
    from aft.classifying import classify

    return classify(argv)
