# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Fine-tunes a saved model with `transformers.Trainer`, as a language model, on chats, or as a classifier of texts.

    aft finetune --model runs/tiny --text_file notes.txt --output_dir runs/notes
    aft finetune --model runs/tiny --chat_file chats.jsonl --output_dir runs/chat
    aft finetune --model runs/tiny --labelled_file mails.csv --predict_file new.csv
    accelerate launch -m aft finetune --model runs/tiny --text_file notes.txt --resume_from_checkpoint auto

--text_file: any bytes for a model of bytes, else UTF-8 text for the model's own tokenizer. It is cut into windows of
--max_length tokens that overlap by one, so that every token but the first is predicted once.
--chat_file: .jsonl or .parquet, with messages (role: system, user or assistant; content) or prompt and completion. The
answers are trained, and scored in bits per byte of them. A tokenizer without a chat template gets one. `aft generate
--chat` talks with the result.
--labelled_file: .csv, .jsonl or .parquet, UTF-8, with a column of texts and one of labels, strings or integers. The
model gets a new head, with the names of the labels in its config; one that is a classifier already goes on with the
labels it has.

Every flag of TrainingArguments is a flag here. By default each epoch ends with a checkpoint and an evaluation, and the
best checkpoint becomes the result; --num_train_epochs 0 only evaluates and predicts. A run is continued only with the
data, the model and the flags that it was begun with, as far as they decide the weights. Without --validation_file a
share of the data is held out: the end of a text, or rows that --split_seed draws. bits_per_byte is exact, loss the
mean over batches that Trainer makes. output_dir gets the model with its code and tokenizer, checkpoints, the results
as JSON files, and with --predict_file predictions.jsonl: text, label (the likeliest) and scores (of all labels) per
row.
"""

import sys

from aft.console import any_text
from aft.finetuning_flags import input_problems, read_flags


@any_text()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns all metrics.

    Raises:
        ValueError: a flag, a file or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    argv = sys.argv[1:] if argv is None else argv
    if problems := input_problems(read_flags(argv, __doc__)):
        raise ValueError("aft finetune: " + "; ".join(problems))
    from aft.finetuning import finetune

    return finetune(argv)
