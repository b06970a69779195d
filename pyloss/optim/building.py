"""Optimizers by name, as settings and the command line give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyloss.optim.adafactor import Adafactor
from pyloss.optim.adam import Adam, AdamATan2, AdamW
from pyloss.optim.lion import Lion
from pyloss.optim.muon import Muon
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "adam_atan2": AdamATan2,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
    "sgd": SGD,
}


def build_optimizer(
    name: str,
    learning_rate: float | Schedule,
    config: Mapping[str, Any] | None = None,
    source: str = "optimizer",
) -> Optimizer:
    """The optimizer `name`, in any case or by its class, with the keyword arguments `config`.

    ValueError lists what is allowed; its message begins with `source`, where the name was given.
    """
    by_class = {kind.__name__: key for key, kind in OPTIMIZERS.items()}
    kind = OPTIMIZERS.get(by_class.get(str(name), str(name).lower()))
    if kind is None:
        raise ValueError(f"{source}: {name!r} is not available; allowed: {', '.join(OPTIMIZERS)}")
    allowed = kind._options()
    for key in config or {}:
        if key not in allowed:
            raise ValueError(
                f"{source}: {name} has no option {key!r}; allowed: {', '.join(allowed)}"
            )
    try:
        return kind(learning_rate, **(config or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {name}: {error}") from error
