"""The kinds of adapters, and which class a kind has for a layer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from pyloss.nn import Module
from pyloss.tuner.adapters.adapter import Adapter, AdapterParameters

#: The classes of each kind, one for each type of layer, as "module:class" under `pyloss.tuner`.
#: A kind's name is `fine_tune_type` in settings and files.
KINDS: dict[str, tuple[str, ...]] = {
    "lora": ("lora:LoRALinear", "lora:LoRAEmbedding", "adapters.switch:LoRASwitchLinear"),
    "dora": ("dora:DoRALinear", "dora:DoRAEmbedding", "adapters.switch:DoRASwitchLinear"),
}


#: What is trained beside the adapters of one of these kinds: whole layers, and rows of tokens.
COMPANIONS: dict[str, tuple[str, ...]] = {
    "whole": (
        "adapters.whole:WholeLinear",
        "adapters.whole:WholeEmbedding",
        "adapters.whole:WholeNorm",
    ),
    "tokens": ("adapters.tokens:TokenEmbedding", "adapters.tokens:TokenLinear"),
}


@cache
def _classes(kind: str) -> tuple[type[Adapter], ...]:
    """The classes of a kind, imported. Raises ValueError for an unknown kind."""
    if kind not in KINDS and kind not in COMPANIONS:
        raise ValueError(f"the kind of adapter must be one of {sorted(KINDS)}, not {kind!r}")
    found = []
    for place in (KINDS | COMPANIONS)[kind]:
        module, _, name = place.partition(":")
        found.append(getattr(importlib.import_module(f"pyloss.tuner.{module}"), name))
    return tuple(found)


def adapter_class(layer: Module, kind: str = "lora") -> type[Any]:
    """The adapter class of a kind for a layer.

    Raises ValueError for an unknown kind, TypeError for a layer that has no adapter of that kind.
    """
    for cls in _classes(kind):
        if isinstance(layer, cls.base_type):
            return cls
    bases = sorted(cls.base_type.__name__ for cls in _classes(kind))
    raise TypeError(f"a {kind} adapter goes over one of {bases}, not {type(layer).__name__}")


def takes_adapter(layer: Any, kind: str = "lora") -> bool:
    """Whether a layer can have an adapter of that kind."""
    return any(isinstance(layer, cls.base_type) for cls in _classes(kind))


def parameters_of(kind: str) -> type[AdapterParameters]:
    """The class of a kind's parameters. Raises ValueError for an unknown kind."""
    return _classes(kind)[0].parameters_type


def parts_of(kind: str) -> Mapping[str, int]:
    """The trained arrays of a kind, see `Adapter.parts`. Raises ValueError for an unknown kind."""
    return _classes(kind)[0].parts
