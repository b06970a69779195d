"""Selection of the layers that a run trains: the last decoder layers, or layers by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pyloss.errors import counted
from pyloss.nn import Module


def inner_name(name: str) -> tuple[str, int | None]:
    """A module's name within its decoder layer, and the layer's number; "" and None elsewhere.

    "model.layers.3.self_attn.q_proj" gives ("self_attn.q_proj", 3).
    """
    parts = name.split(".")
    if "layers" not in parts[:-1]:
        return "", None
    at = parts.index("layers")
    return ".".join(parts[at + 2 :]), int(parts[at + 1])


def hints(names: Iterable[str], known: set[str]) -> str:
    """The known names that are nearest to the unknown `names`, else all names within layers."""
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
    """Selects from `candidates`, modules by full name.

    Without `keys` it selects all within the last `num_layers` decoder layers (-1: all layers). With
    keys it selects by name: inner names such as "self_attn.q_proj" within these layers, full names
    such as "lm_head" anywhere.

    Raises ValueError for more layers than there are, and for keys that match nothing, with the
    nearest names; `what` describes a candidate in the message.
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
        tied = "lm_head" in unknown and getattr(model, "lm_head", None) is None
        hint = (
            "the head is tied to the embedding, and both are model.embed_tokens"
            if tied and "model.embed_tokens" in known
            else hints(unknown, known)
        )
        raise ValueError(f"no {what} is named {', '.join(map(repr, unknown))}; {hint}")
    return found
