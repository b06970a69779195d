"""The model's tables under an adapter: those that its files carry, and a head that is one of them.

PEFT writes the embedding and the head beside an adapter over them, and where tokens were added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.models.resizing import EMBEDDING, HEAD, resize, set_table, tables, untie_head
from pyloss.models.transformer import Model
from pyloss.nn import Embedding, Linear
from pyloss.tuner.adapters.layout import StoredLayer
from pyloss.tuner.adapters.merging import dense
from pyloss.weights.weight import Weight

# Relative distances of a table from its quantized form, and from one in a shorter float type.
_QUANTIZED, _FLOATS = 0.25, 0.004


class Tables:
    """The tables of a model, which can be changed for an adapter and put back."""

    def __init__(self, model: Any):
        self.model = model
        self.known = isinstance(model, Model)
        if self.known:
            self.before = tables(model), model.config, model.own_tables

    def restore(self) -> None:
        """Puts the earlier tables back."""
        if not self.known:
            return
        layers, self.model.config, self.model.own_tables = self.before
        self.model.lm_head = layers.get(HEAD)
        self.model.set_module(EMBEDDING, layers[EMBEDDING])

    def change(
        self, tied: bool, layers: dict[str, StoredLayer], given: dict[str, np.ndarray]
    ) -> list[str]:
        """Makes the tables those that an adapter needs; returns what does not fit.

        `layers` are the adapter's, `given` the tables in its files; copies of what is one table
        here are taken out of both. `tied` says that an adapter over the embedding also changes a
        head that is the embedding.
        """
        if not self.known:
            return [f"{name}: the model has no such table" for name in given]
        model, problems = self.model, []
        if model.lm_head is None:
            self._drop_twins(tied, layers, given)
        for name, table in given.items():
            layer = tables(model).get(name) or (tables(model)[EMBEDDING] if name == HEAD else None)
            if layer is None or not isinstance(layer, Embedding | Linear):
                reason = "no such table" if layer is None else "has an adapter already"
                problems.append(f"{name}: {reason}")
            elif table.ndim != 2 or table.shape[1] != layer.shape[1]:
                problems.append(
                    f"{name}: the adapter was made over a weight of shape {table.shape}; "
                    f"the model has {layer.shape}"
                )
            elif not same(layer.weight, table):
                if name == HEAD:
                    untie_head(model)
                set_table(model, name, table)
        if problems:
            return problems
        apart = any(
            name == HEAD or (name == EMBEDDING and not tied and layer.kind != "tokens")
            for name, layer in layers.items()
        )
        if apart and all(isinstance(each, Embedding | Linear) for each in tables(model).values()):
            untie_head(model)
        sizes = {name: layer.shape[0] for name, layer in tables(model).items()}
        rows = max(sizes.values())
        short = [name for name, size in sizes.items() if size < rows]
        if any(name in given for name in short):
            said = " and ".join(f"{name} with {size}" for name, size in sizes.items())
            return [f"{short[0]}: tables must have as many rows, and there are {said}"]
        if short:  # PEFT does not write a head beside an adapted embedding
            resize(model, rows)
        return []

    def _drop_twins(
        self, tied: bool, layers: dict[str, StoredLayer], given: dict[str, np.ndarray]
    ) -> None:
        """Drops what a head has twice: PEFT writes a tied table under both names."""
        if (head := given.get(HEAD)) is not None:
            trained = layers.get(EMBEDDING)
            copies = [
                given.get(EMBEDDING),
                trained.arrays.get("weight") if tied and trained else None,
            ]
            if same(tables(self.model)[EMBEDDING].weight, head) or any(
                copy is not None and np.array_equal(head, copy) for copy in copies
            ):
                del given[HEAD]
        twins = layers.get(HEAD), layers.get(EMBEDDING)
        if twins[0] is None or twins[1] is None or twins[0].kind != twins[1].kind:
            return
        both = _equal(twins[0].arrays, twins[1].arrays)
        if both and (twins[0].kind == "tokens" or (twins[0].kind == "whole" and tied)):
            del layers[HEAD]


def _equal(some: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    return some.keys() == others.keys() and all(
        np.array_equal(array, others[name]) for name, array in some.items()
    )


def same(weight: np.ndarray | Weight, table: np.ndarray) -> bool:
    """Whether a weight holds the table, in a shorter or quantized form."""
    if tuple(weight.shape) != table.shape:
        return False
    allowed = _QUANTIZED if isinstance(weight, Weight) and not weight.is_float else _FLOATS
    own = dense(weight)
    return bool(np.linalg.norm(table - own) <= allowed * np.linalg.norm(own))
