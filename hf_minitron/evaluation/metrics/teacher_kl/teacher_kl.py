"""`evaluate` module: the Kullback-Leibler divergence of a student's next-token distribution from the teacher's."""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax

DESCRIPTION = "Mean KL(teacher || student) of the next-token distributions, in nats per token, from logits."

KWARGS = """
Args:
    predictions: the student's logits, one row of vocabulary size per position.
    references: the teacher's logits at the same positions. Where one vocabulary is longer (padding at the end), the
        support is what both have: the teacher is renormalised over it, the student is not.
Returns:
    teacher_kl: nats per token.
Example:
    >>> metric = evaluate.load("hf_minitron/evaluation/metrics/teacher_kl")
    >>> metric.compute(predictions=[[0.0, 0.0]], references=[[0.0, 0.0]])
    {'teacher_kl': 0.0}
"""


class TeacherKL(evaluate.Metric):
    """Mean KL(teacher || student) of rows of logits."""

    def _info(self):
        rows = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features({"predictions": rows, "references": rows})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=KWARGS, features=features)

    def _compute(self, predictions, references):
        student, teacher = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        shared = min(student.shape[1], teacher.shape[1])
        student_logp = log_softmax(student, axis=1)[:, :shared]
        teacher_logp = log_softmax(teacher[:, :shared], axis=1)
        return {"teacher_kl": float((np.exp(teacher_logp) * (teacher_logp - student_logp)).sum(1).mean())}
