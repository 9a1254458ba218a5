# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Trains a language model of bytes, and scores it in bits per byte; or one of pictures, in bits per dimension.

    aft pretrain --preset tiny                               # tiny model, text at hand, minutes on a CPU
    aft pretrain --preset small --model_preset aft-conv-small --dataset_path FILE
    accelerate launch --config_file multi-gpu.yaml -m aft pretrain --preset enwik8 --resume auto

The model is whatever AutoConfig makes of --model_preset. A training window is T bytes and, as labels, the byte after
each of them. batch_size counts windows over all processes and accumulated micro-batches, and the batch of a step is a
pure function of seed and step, so processes and micro-batches change only the rounding. Dropout is seeded by seed,
step and process, so a resumed run continues exactly. With --carry_state a row of the batch reads stream_length bytes
in order, and goes on with the state that the step before has left; checkpoints hold these states.
With --pictures a window is a picture: a start token, and its sub-pixels as labels.
With --objective masked the model is bidirectional, and the labels are the tokens that are hidden from it.

output_dir gets run.jsonl, checkpoints/ and training_curve.png, and at the end everything that from_pretrained needs:
config, weights, tokenizer, generation config, and a model card (README.md) made from run.jsonl. A run holds the folder
for itself. A checkpoint is saved before its model is evaluated and sampled from, and only if its numbers are finite;
--resume auto goes on from the newest whose checksums are right.
"""

import sys

from aft.console import any_text
from aft.pretraining_arguments import flag_problems, parse_arguments


@any_text()
def main(argv: list[str] | None = None) -> dict:
    """
    Runs the program with the flags `argv`, those of the command line by default; as `aft.pretraining.pretrain`.

    Raises:
        ValueError: a flag or a file is wrong, or another run holds the folder.
        OSError: something cannot be read or written.
        FloatingPointError: the run has diverged; no model is written, and the checkpoints before that are there.
    """
    argv = sys.argv[1:] if argv is None else argv
    if problems := flag_problems(parse_arguments(argv, __doc__)):
        raise ValueError("aft pretrain: " + "; ".join(problems))
    from aft.pretraining import pretrain

    return pretrain(argv)
