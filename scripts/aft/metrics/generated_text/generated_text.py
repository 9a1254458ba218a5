# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Scores of texts that a model has written, as a metric of the `evaluate` library."""

import datasets
import evaluate


_DESCRIPTION = """\
Exact match is the share of predictions that are their reference, character by character. BLEU and chrF are those of
sacrebleu, of the whole corpus, and ROUGE-1, ROUGE-2 and ROUGE-L those of rouge_score, without stemming: the mean of
the F-measures of all pairs. All but the first are in percent.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `str`): what the model wrote.
    references (`list` of `str`): what it should have written.
    names (`list` of `str`): which scores to compute beside exact match, of "bleu", "chrf" and "rouge".
Returns:
    `dict` with `exact_match`, and as asked `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL` (`float`), and
    `bleu_signature` and `chrf_signature` (`str`), which say how sacrebleu computes.
Raises:
    ValueError: there are no predictions.
Examples:
    >>> metric = evaluate.load("scripts/aft/metrics/generated_text/generated_text.py")
    >>> metric.compute(predictions=["a b", "c"], references=["a b", "d"], names=["rouge"])
    {'exact_match': 0.5, 'rouge1': 50.0, 'rouge2': 50.0, 'rougeL': 50.0}
"""

ROUGES = ("rouge1", "rouge2", "rougeL")


class GeneratedText(evaluate.Metric):
    """Exact match, BLEU, chrF and ROUGE."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, names=()):
        if not predictions:
            raise ValueError("predictions must have at least one text, got none")
        pairs = list(zip(predictions, references, strict=True))
        result = {"exact_match": sum(made == right for made, right in pairs) / len(pairs)}
        for name in ("bleu", "chrf"):
            if name in names:
                from sacrebleu import BLEU, CHRF

                metric = {"bleu": BLEU, "chrf": CHRF}[name]()
                result[name] = metric.corpus_score(predictions, [references]).score
                result[f"{name}_signature"] = str(metric.get_signature())
        if "rouge" in names:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(ROUGES)
            found = [scorer.score(right, made) for made, right in pairs]
            result |= {name: 100 * sum(scores[name].fmeasure for scores in found) / len(found) for name in ROUGES}
        return result
