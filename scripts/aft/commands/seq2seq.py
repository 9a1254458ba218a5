# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Trains an encoder-decoder with `transformers.Seq2SeqTrainer`, from nothing or from a saved model, and scores it.

    aft seq2seq --model small.json --pairs_file pairs.jsonl --source_column en --target_column de --metrics bleu chrf
    aft seq2seq --model runs/c4 --dataset owner/name --source_column translation.en --target_column translation.de
    aft seq2seq --model small.json --tokenizer bytes --text_file prose.txt --max_source_length 512
    aft seq2seq --model runs/en-de --pairs_file new.jsonl --predict_file more.jsonl --num_train_epochs 0

--pairs_file: .jsonl, .csv or .parquet, with a column of sources and one of targets: translations, texts and their
summaries, or texts and labels. --dataset: what `datasets` reads, with its splits. Without a part to validate on,
--split_seed draws --validation_share of the rows. --test_file is scored once, at the end.
--text_file: span corruption, as T5 is pre-trained. Of a text, spans of tokens are taken out, and the decoder says
them. Sources have exactly --max_source_length tokens. Which spans follows from --seed, the epoch and the number of the
window alone.
--model: a saved model goes on, with its tokenizer; a JSON file of a configuration, or a preset, begins from nothing.
Any model will do that AutoModelForSeq2SeqLM knows, such as T5 and BART.
--metrics: bleu and chrf (of sacrebleu) and rouge score what the model writes, beside exact match. log_perplexity is
exact, in nats per token of the targets, with the token that ends each; loss is the mean over batches that Trainer
makes.

Every flag of TrainingArguments is a flag here. Checkpoints, --resume_from_checkpoint and --num_train_epochs 0 are as
in `aft finetune`. output_dir gets the model with its tokenizer and with what `generate` needs, the results as JSON
files, and with --predict_file predictions.jsonl: source, prediction and, where there is one, target per row.
"""

import sys

from aft.console import any_text
from aft.seq2seq_flags import read_flags, seq2seq_problems


@any_text()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns all metrics.

    Raises:
        ValueError: a flag, the data or the model is wrong, or another run is in the output folder.
        FloatingPointError: a loss, a weight or a score is NaN or infinite.
    """
    argv = sys.argv[1:] if argv is None else argv
    if problems := seq2seq_problems(read_flags(argv, __doc__)):
        raise ValueError("aft seq2seq: " + "; ".join(problems))
    from aft.seq2seq import seq2seq

    return seq2seq(argv)
