# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Accuracy and macro F1 of a classifier, as a metric of the `evaluate` library."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Accuracy is the share of examples that are predicted right. F1 of a class is 2 * right / (predicted + present): twice
the examples of the class that are predicted right, over those predicted to be of it plus those that are. Macro F1 is
its mean over the classes that occur among the predictions or the references.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): per example, the class that the model chose.
    references (`list` of `int`): per example, the true class.
Returns:
    `dict` with `accuracy` (`float`) and `macro_f1` (`float`).
Raises:
    ValueError: there are no examples.
Examples:
    >>> metric = evaluate.load("scripts/aft/metrics/classification/classification.py")
    >>> metric.compute(predictions=[0, 0, 1, 1], references=[0, 1, 1, 1])
    {'accuracy': 0.75, 'macro_f1': 0.7333333333333334}
"""


class Classification(evaluate.Metric):
    """Accuracy and macro F1 over classes that are named by integers."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        predicted, present = np.asarray(predictions), np.asarray(references)
        if len(present) == 0:
            raise ValueError("references must have at least one example, got none")
        scores = [
            2
            * np.sum((predicted == label) & (present == label))
            / (np.sum(predicted == label) + np.sum(present == label))
            for label in np.union1d(predicted, present)
        ]
        return {"accuracy": float(np.mean(predicted == present)), "macro_f1": float(np.mean(scores))}
