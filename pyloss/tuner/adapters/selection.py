"""Which layers of a model a run trains: those of the last decoder layers, or those with given names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pyloss.errors import counted
from pyloss.nn import Module


def inner_name(name: str) -> tuple[str, int | None]:
    """A module's name within its decoder layer and that layer's number; "" and None outside of them.

    "model.layers.3.self_attn.q_proj" gives ("self_attn.q_proj", 3).
    """
    parts = name.split(".")
    if "layers" not in parts[:-1]:
        return "", None
    at = parts.index("layers")
    return ".".join(parts[at + 2 :]), int(parts[at + 1])


def hints(names: Iterable[str], known: set[str]) -> str:
    """What `names`, which are unknown, may have been meant to be, or all names within layers where nothing is near."""
    near = {near for name in names for near in difflib.get_close_matches(name, known, 3, 0.6)}
    if near:
        return f"did you mean {sorted(near)}?"
    return f"there are {sorted(name for name in known if not name.startswith('model.'))}"


def select(
    model: Any,
    candidates: Mapping[str, Module],
    num_layers: int,
    keys: Iterable[str] | None,
    what: str,
) -> dict[str, Module]:
    """Those of `candidates` (by full name) that are chosen.

    Without `keys` all within the last `num_layers` decoder layers (-1: all layers); with keys those that are named: within these
    layers by inner names such as "self_attn.q_proj", anywhere by full names such as "lm_head".
    Raises ValueError for more layers than there are, and for keys that match nothing, with the nearest names; `what` says there
    what is looked for.
    """
    count = len(model.layers)
    if num_layers > count:
        raise ValueError(
            f"num_layers is {num_layers}, but the model has {counted(count, 'layer')}; -1 takes all"
        )
    chosen = set(range(count)) if num_layers < 0 else set(range(count - num_layers, count))
    wanted = None if keys is None else set(keys)
    found: dict[str, Module] = {}
    known: set[str] = set()
    for name, module in candidates.items():
        inner, number = inner_name(name)
        known |= {name, inner} - {""}
        by_inner = bool(inner) and number in chosen and (wanted is None or inner in wanted)
        if by_inner or (wanted is not None and name in wanted):
            found[name] = module
    if unknown := [key for key in keys or () if key not in known]:
        raise ValueError(
            f"no {what} is named {', '.join(map(repr, unknown))}; {hints(unknown, known)}"
        )
    return found
