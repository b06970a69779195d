"""Embeddings of puzzles: a table of which a batch reads a few rows, and only these are updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.autograd.tape import data
from pyloss.checks.arrays import as_integers
from pyloss.nn import Module
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.rows import RowGradient

LOCAL = "local_weights"


class PuzzleEmbedding(Module):
    """One row for each puzzle, all 0 at first (CastedSparseEmbedding of HRM and TRM).

    `weights` [P, E] is a buffer. While training, a batch's rows are copied to the parameter
    `local_weights` [batch_size, E], so that gradients have the size of a batch, and `update` brings
    them back to the table.
    """

    weights: np.ndarray

    def __init__(self, count: int, dims: int, batch_size: int):
        super().__init__()
        self.register_buffer("weights", np.zeros((count, dims), np.float32))
        self.local_weights = np.zeros((batch_size, dims), np.float32)
        self._ids = np.zeros(0, np.int32)

    def __call__(self, puzzle_identifiers: Any) -> Any:
        """The rows [B, E] of identifiers [B]; while training B is batch_size."""
        ids = as_integers(puzzle_identifiers, "puzzle_identifiers")
        count = len(self.weights)
        if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < count):
            raise ValueError(
                f"puzzle_identifiers must be one number per sequence, below {count}, got "
                f"shape {ids.shape}" + (f" from {ids.min()} to {ids.max()}" if ids.size else "")
            )
        if not self.training:
            return self.weights[ids]
        local = data(self.local_weights)
        if len(ids) != len(local):
            raise ValueError(
                f"a training batch has {len(ids)} sequences; the model's batch_size is {len(local)}"
            )
        local[...] = self.weights[ids]
        object.__setattr__(self, "_ids", ids.astype(np.int32))
        return self.local_weights

    def update(self, optimizer: Optimizer, gradient: Any) -> None:
        """Updates the last training batch's rows by `gradient` [batch_size, E] of `local_weights`.

        `optimizer` is a `SparseSignSGD`, as in the authors' code, or another that takes a
        `RowGradient`.
        """
        optimizer.update(_Table(self.weights), {"weights": RowGradient(self._ids, gradient)})


class _Table:
    """The table as a model of one parameter."""

    def __init__(self, weights: np.ndarray):
        self._weights = weights

    def trainable_parameters(self) -> dict[str, np.ndarray]:
        return {"weights": self._weights}


def without_puzzles(grads: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients of all but puzzle embeddings, and those of `local_weights`."""
    local = {name: grad for name, grad in grads.items() if name.split(".")[-1] == LOCAL}
    return {name: grad for name, grad in grads.items() if name not in local}, local
