"""The distance of a student's hidden states from a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss.autograd.tape import data
from pyloss.errors import choices
from pyloss.losses.pairs import cosine_loss
from pyloss.losses.rows import RowLoss, accumulator, counted_weight, row_weights, two_like
from pyloss.runtime.device import on_device_of

KINDS = ("cosine", "mse")


def hidden_state_loss(
    hidden_q: Any,
    hidden_p: Any,
    *,
    kind: str = "cosine",
    weights: Any = None,
    reduction: str = "none",
    out: Any = None,
) -> Any:
    """The distance of each row of hidden states `hidden_q` [..., D] from `hidden_p` [..., D].

    - "cosine": 1 - q p / (|q| |p|), in [0, 2]; 1 where a row is zero. Insensitive to the rows' size
      (`cosine_loss`; Sanh et al., arXiv:1910.01108).
    - "mse": the mean square of q - p over the D numbers (Jiao et al., arXiv:1909.10351).

    The teacher's states `hidden_p` get no gradient. `weights`, `reduction` and `out`: see
    `pyloss.losses.public`. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r:.60}; it must be {choices(KINDS)}")
    known = data(hidden_p, "hidden_p")
    if kind == "cosine":
        return cosine_loss(hidden_q, known, weights=weights, reduction=reduction, out=out)
    return _mean_square(hidden_q, known, weights, reduction, out)


def _mean_square(hidden_q: Any, hidden_p: Any, weights: Any, reduction: str, out: Any) -> Any:
    q, p = two_like(("hidden_q", "hidden_p"), (hidden_q, hidden_p))
    shape, dtype = q.shape[:-1], accumulator(q, p)
    given = row_weights(weights, shape)

    def run(dloss: Any, wanted: Sequence[bool], loss: Any) -> list[Any]:
        # A few rows of a step: NumPy takes less time than the products around them.
        difference = np.subtract(np.asarray(q), np.asarray(p), dtype=dtype)
        loss[...] = np.mean(np.square(difference), axis=-1, dtype=np.float64)
        if not any(wanted):
            return [None]
        factor = np.asarray(dloss, dtype) * dtype.type(2 / q.shape[-1])
        slope = (difference * factor[..., None]).astype(q.dtype, copy=False)
        return [on_device_of(q, slope)]

    counted = np.full(shape, True) if given is None else given != 0
    total = counted_weight(given, counted.reshape(-1))
    return RowLoss(run, (hidden_q,), shape, dtype, given, total, like=q).result(reduction, out)
