# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Pre-trains a byte-level causal language model and scores it in bits per byte.

    python scripts/pretrain_enwik8.py                              # tiny model, text at hand, minutes on a CPU
    python scripts/pretrain_enwik8.py --training_preset configuration/training/enwik8.yaml
    accelerate launch --config_file configuration/accelerate/multi-gpu.yaml scripts/pretrain_enwik8.py --resume auto

The model is whatever AutoConfig makes of --model_preset. A training window is T bytes and, as labels, the byte after
each of them. batch_size counts windows over all processes and accumulated micro-batches, and the batch of a step is a
pure function of seed and step, so processes and micro-batches change only the rounding. Dropout is seeded by seed,
step and process, so a resumed run continues exactly. With --carry_state a row of the batch reads stream_length bytes
in order, and goes on with the state that the step before has left; checkpoints hold these states.

output_dir gets run.jsonl, checkpoints/ and training_curve.png, and at the end everything that from_pretrained needs:
config, weights, tokenizer, generation config, and a model card (README.md) made from run.jsonl. A run holds the folder
for itself. A checkpoint is saved before its model is evaluated and sampled from, and only if its numbers are finite;
--resume auto goes on from the newest whose checksums are right.
"""

import sys

from shared.console import any_text, run_program
from shared.pretraining import pretrain


@any_text()
def main(argv: list[str] | None = None) -> dict:
    """Runs the program with the flags `argv`, those of the command line by default; as `pretrain`."""
    return pretrain(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    run_program(main)
