"""Shallower models: some of a model's decoder layers, in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyloss.checks.numbers import shown, whole
from pyloss.errors import counted
from pyloss.models.config.fields import LAYER_TYPES
from pyloss.models.saving import refuse_adapters
from pyloss.models.transformer import Model

_RANGE = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", re.ASCII)


def parse_layers(text: str) -> list[int]:
    """The layers of a text such as "0-19,28-29": numbers and ranges, both ends included.

    Raises ValueError naming the part that is neither.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not found or first > last or last - first > 100_000:
            raise ValueError(
                f"{shown(part)} in {shown(text)} is not a layer or a range of layers such as 0-19"
            )
        layers += range(first, last + 1)
    return layers


def even_layers(count: int, keep: int) -> list[int]:
    """`keep` of `count` layers at even distances: the first, the last and those between.

    Raises ValueError unless 1 <= keep <= count.
    """
    keep = whole(keep, "keep", 1)
    if keep > count:
        raise ValueError(f"keep is {keep}; the model has {counted(count, 'layer')}")
    if keep == 1:
        return [0]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def prune_model(model: Model, layers: Sequence[int]) -> None:
    """Keep the decoder layers with these numbers, in place.

    Windows, experts and all weights of a kept layer stay as they are.

    Raises ValueError if the numbers are not ascending numbers of layers of the model, if no layer
    with attention is among them, or if the model has unfused adapters.
    """
    refuse_adapters(model)
    if model.config.gemma4 is not None:
        raise ValueError(
            f"layers of {model.config.model_type} cannot be taken away: they share keys and "
            "values, and a table of embeddings"
        )
    count = len(model.layers)
    kept = [whole(i, "layers", 0) for i in layers]
    if not kept:
        raise ValueError("layers is empty: a model needs at least one layer")
    for before, i in zip([-1, *kept], kept, strict=False):
        if i >= count:
            raise ValueError(f"layers has {i}; the model has layers 0 to {count - 1}")
        if i <= before:
            raise ValueError(f"layers has {i} after {before}; layers must be in ascending order")
    types = model.config.layer_types or []
    attending = [i for i, kind in enumerate(types) if kind in LAYER_TYPES]
    if attending and not set(kept) & set(attending):
        raise ValueError(
            "layers has none with attention, without which transformers does not run the model; "
            f"the first one is {attending[0]}"
        )
    model.model.layers = [model.layers[i] for i in kept]
    model.config = model.config_of_layers()
