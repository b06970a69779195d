"""`compare`: the difference of two models on the same records, with its confidence interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyloss.evaluation.measurement import Evaluation, finished

RESAMPLES = 10_000
#: of the interval's two bounds
_PERCENTILES = (2.5, 97.5)
_AT_ONCE = 1 << 20  # drawn records


@dataclass(frozen=True)
class Difference:
    """A metric of two models.

    Attributes:
        score, base: of the model, and of the one that it is compared with.
        low, high: the 95 % interval of `score - base`.
    """

    score: float
    base: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """score - base."""
        return self.score - self.base


def compare(
    found: Evaluation, base: Evaluation, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """The differences of two evaluations of the same records, by metric.

    The intervals are those of the paired bootstrap: the records are drawn with replacement
    `resamples` times, the same ones for both models, and the 2.5th and 97.5th percentile of the
    differences are the bounds. ValueError for evaluations of other records or metrics.
    """
    if found.metrics != base.metrics or len(found.results) != len(base.results):
        raise ValueError(
            "the evaluations cannot be compared: they have "
            f"{len(found.results)} records of {', '.join(found.metrics)}, and "
            f"{len(base.results)} of {', '.join(base.metrics)}"
        )
    if any(a.reference != b.reference for a, b in zip(found.results, base.results, strict=True)):
        raise ValueError("the evaluations cannot be compared: their reference answers differ")
    result = {}
    for name in found.metrics:
        terms = np.stack((*found.terms(name), *base.terms(name)))
        low, high = _interval(name, terms, resamples, seed)
        result[name] = Difference(found.scores[name], base.scores[name], low, high)
    return result


def _interval(name: str, terms: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """The bounds for `terms` [4, records]: scores and weights of the model, then of the base."""
    records = terms.shape[1]
    draws = np.random.Generator(np.random.PCG64(seed))
    differences = []
    step = max(1, _AT_ONCE // records)
    for begin in range(0, resamples, step):
        drawn = draws.integers(0, records, (min(step, resamples - begin), records))
        a, a_weights, b, b_weights = terms[:, drawn].sum(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            differences.append(finished(name, a / a_weights) - finished(name, b / b_weights))
    # Without targets among the drawn records there is no loss.
    low, high = np.nanpercentile(np.concatenate(differences), _PERCENTILES)
    return float(low), float(high)
