"""`evaluate` module: how often a student's most likely next token is the teacher's."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Share of tokens at which the most likely token of a student is that of its teacher."

KWARGS = """
Args:
    predictions: the student's most likely token ids, one per position.
    references: the teacher's, at the same positions.
Returns:
    top1_match: a share between 0 and 1.
Example:
    >>> metric = evaluate.load("hf_minitron/evaluation/metrics/top1_match")
    >>> metric.compute(predictions=[3, 5, 8, 2], references=[3, 5, 9, 2])
    {'top1_match': 0.75}
"""


class Top1Match(evaluate.Metric):
    """Share of positions at which two lists of token ids agree."""

    def _info(self):
        ids = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=KWARGS, features=datasets.Features(ids)
        )

    def _compute(self, predictions, references):
        return {"top1_match": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
