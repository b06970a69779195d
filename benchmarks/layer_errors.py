"""The errors of gradients by decoder layer, for the programs that compare precisions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def layers_of(gradients: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The gradients of a step, those of a layer in one vector; others are left out."""
    found: dict[int, list[np.ndarray]] = {}
    for name in sorted(gradients):
        if match := _LAYER.search(name):
            found.setdefault(int(match[1]), []).append(np.ravel(gradients[name]))
    return [np.concatenate(found[layer]) for layer in sorted(found)]


def relative(
    exact: Iterable[Sequence[np.ndarray]], found: Iterable[Sequence[np.ndarray]]
) -> list[float]:
    """For each layer the norm of all batches' differences, by that of the exact gradients.

    Each item of both is a batch: the vectors of its layers.
    """
    pairs = list(zip(exact, found, strict=True))
    away = np.array(
        [[np.sum((b - a) ** 2, dtype=float) for a, b in zip(*p, strict=True)] for p in pairs]
    )
    size = np.array([[np.sum(a**2, dtype=float) for a in batch] for batch, _ in pairs])
    return np.sqrt(away.sum(0) / size.sum(0)).tolist()
