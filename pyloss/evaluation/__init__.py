"""Evaluation of a model on a dataset: losses, and scores of generated answers."""

from pyloss.evaluation.comparison import Difference, compare
from pyloss.evaluation.measurement import Evaluation, Result, measure
from pyloss.evaluation.metrics import ANSWER_METRICS, LOSS_METRICS, METRICS
from pyloss.evaluation.output import write_results

__all__ = [
    "ANSWER_METRICS",
    "LOSS_METRICS",
    "METRICS",
    "Difference",
    "Evaluation",
    "Result",
    "compare",
    "measure",
    "write_results",
]
