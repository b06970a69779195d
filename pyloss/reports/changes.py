"""How much an adapter changed each layer: the norm of the change relative to the weight's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.merging import dense

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Change:
    """The change of one weight.

    Attributes:
        name: of its layer.
        change, weight: Frobenius norms of the change and of the base's weight.
    """

    name: str
    change: float
    weight: float

    @property
    def relative(self) -> float:
        """The change relative to the weight; 0 where nothing changed."""
        if not self.change:
            return 0.0
        return self.change / self.weight if self.weight else float("inf")


def changes(model: Any, base: Any) -> list[Change]:
    """The changes of a model with its adapters, or of a fully fine-tuned one beside its `base`.

    They are in the order of the model.
    """
    found = [
        Change(name, _norm(adapter.delta()), _norm(dense(adapter.base.weight)))
        for name, adapter in adapter_modules(model).items()
    ]
    if found:
        return found
    before = {**base.parameters(), **base.stored()}
    result = []
    for name, array in model.trainable_parameters().items():
        weight = np.asarray(dense(before[name]), np.float32)
        change = np.asarray(array) - weight
        result.append(Change(name.removesuffix(".weight"), _norm(change), _norm(weight)))
    return result


def by_layer(found: list[Change]) -> list[Change]:
    """The changes of whole decoder layers, by their numbers; other weights keep their names."""
    sums: dict[str, tuple[float, float]] = {}
    for each in found:
        match = _LAYER.search(each.name + ".")
        name = f"layer {match[1]}" if match else each.name
        change, weight = sums.get(name, (0.0, 0.0))
        sums[name] = change + each.change**2, weight + each.weight**2
    return [Change(name, change**0.5, weight**0.5) for name, (change, weight) in sums.items()]


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(array).reshape(-1)))
