"""The importance of a matrix's columns: the mean squares of the layer's inputs over some text.

Quantization multiplies the squared errors of a column by them, so that columns whose inputs are
large are stored more exactly, as with llama.cpp's importance matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyloss.autograd.tape import data
from pyloss.io.bars import watched
from pyloss.models.transformer import Model
from pyloss.nn import Linear, SwitchLinear
from pyloss.runtime.device import to_device


class _Squares:
    """A sum of squares of a layer's inputs, [in], and the number of rows."""

    def __init__(self, columns: int) -> None:
        self.sum, self.rows = np.zeros(columns), 0

    def add(self, x: Any) -> None:
        rows = np.asarray(to_device(data(x), "cpu")).reshape(-1, len(self.sum))
        self.sum += np.einsum("ni,ni->i", rows, rows, dtype=np.float64)
        self.rows += len(rows)


def column_importance(
    model: Model, sequences: Iterable[list[int]], window: int = 512
) -> dict[str, np.ndarray]:
    """Mean squares of the inputs of all linear layers and experts but the head.

    Args:
        sequences: token ids of texts, cut into parts of at most `window` tokens.

    Returns:
        float32 [in] for each layer that was used, by the name of its tensor. Experts share one.

    Raises:
        ValueError: no sequence has a token, or inputs are not finite.
    """
    plain = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear | SwitchLinear) and name != "lm_head"
    }
    found = {name: _Squares(layer.shape[-1]) for name, layer in plain.items()}
    for name, layer in plain.items():
        model.set_module(name, _observed(layer, found[name]))
    try:
        for ids in watched(sequences, "measuring which columns matter", "sample"):
            for begin in range(0, len(ids), window):
                part = np.asarray(ids[begin : begin + window], np.int32)
                model.hidden(part, np.array([0, len(part)], np.int32))
    finally:
        for name, layer in plain.items():
            model.set_module(name, layer)
    used = {name: squares for name, squares in found.items() if squares.rows}
    if not used:
        raise ValueError("there is no text to measure the importance of columns with")
    means = {
        f"{name}.weight": (squares.sum / squares.rows).astype(np.float32)
        for name, squares in used.items()
    }
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise ValueError(f"the inputs of {name} are not finite: they have no importance")
    return means


def _observed(layer: Any, squares: _Squares) -> Any:
    """A copy of a layer that counts the squares of its inputs when it is called."""
    kind: Any = type(layer)

    def call(self: Any, x: Any, *rest: Any) -> Any:
        squares.add(x)
        return kind.__call__(self, x, *rest)

    again = copy.copy(layer)
    again.__class__ = type(kind.__name__, (kind,), {"recordable": False, "__call__": call})
    return again
