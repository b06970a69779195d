"""Fusing: modules that can become plain layers, such as adapters, are replaced by them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pyloss.io.bars import watched
from pyloss.nn import Module

#: Storing must keep at least this share of a module's change of its base. Otherwise fusing warns,
#: and the fused model is not written.
LEAST_KEPT = 0.5


@runtime_checkable
class Fusible(Protocol):
    """A module that changes a base layer and can be merged into it."""

    def fused(self, dequantize: bool = False) -> tuple[Module, float]:
        """The plain layer, and the share of the change that storing it leaves.

        The layer is stored as the base is, or in float32 with `dequantize` over a quantized base.
        """


def fuse_modules(
    model: Module, dequantize: bool = False, ways: str | None = None
) -> dict[str, float]:
    """Replaces every `Fusible` module by its plain layer, and returns the shares kept, by name.

    All or none are replaced. Modules that keep little are named in one warning. With `ways`, which
    says how to keep the change, a small share over all modules is a ValueError instead.
    A module over a table that is also the head changes both, as it did before.
    """
    chosen: list[tuple[str, Fusible]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Fusible)
    ]
    fused = {
        name: module.fused(dequantize)
        for name, module in watched(chosen, "merging the adapter", "layer")
    }
    kept = {name: share for name, (_, share) in fused.items()}
    if ways:
        refuse_loss(kept, ways)
    elif kept and mean_kept(kept) < LEAST_KEPT:
        model.kept_of_adapter = mean_kept(kept)  # so that saving it can be refused
    for name, (layer, _) in fused.items():
        model.set_module(name, layer)
    if poor := [name for name, share in kept.items() if share < LEAST_KEPT]:
        worst: Any = fused[min(poor, key=kept.__getitem__)][0]
        count = f" ({len(poor)} of {len(kept)} layers lose most; this is the worst)"
        text = loss_warning(worst.weight.format, min(kept.values()))
        warnings.warn(text + (count if len(kept) > 1 else ""), stacklevel=3)
    return kept


def loss_warning(format: str, kept: float) -> str:
    """The warning for a fused weight that keeps little of the adapter."""
    return (
        f"storing the fused weight as {format} keeps {max(kept, 0):.0%} of the adapter; "
        "fuse(dequantize=True) keeps all of it"
    )


def mean_kept(kept: Mapping[str, float]) -> float:
    """The mean of the shares, at least 0."""
    return max(sum(kept.values()) / len(kept), 0.0)


def refuse_loss(kept: Mapping[str, float], ways: str) -> None:
    """Raises ValueError if storing keeps too little of an adapter; `ways` says how to keep it."""
    if kept and (mean := mean_kept(kept)) < LEAST_KEPT:
        least = min(kept, key=kept.__getitem__)
        raise ValueError(
            f"storing the fused weights would keep {mean:.0%} of the adapter "
            f"({max(kept[least], 0):.0%} of {least}): the steps of their format are larger than "
            f"its changes. What keeps it: {ways}"
        )
