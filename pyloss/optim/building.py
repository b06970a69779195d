"""Optimizers by name, as settings and the command line give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyloss.checks.numbers import real, shown
from pyloss.optim.adafactor import Adafactor
from pyloss.optim.adam import Adam, AdamATan2, AdamW
from pyloss.optim.groups import Matcher
from pyloss.optim.lion import Lion
from pyloss.optim.multi import MultiOptimizer
from pyloss.optim.muon import Muon
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.sgd import SGD

#: Optimizers by their names in settings.
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

    One of its `groups` may name another optimizer, `{"match": "*norm*", "optimizer": "adamw"}`,
    whose options are the rest of the group. The result is then a `MultiOptimizer`.

    ValueError lists what is allowed; its message begins with `source`, where the name was given.
    """
    by_class = {kind.__name__: key for key, kind in OPTIMIZERS.items()}
    kind = OPTIMIZERS.get(by_class.get(str(name), str(name).lower()))
    if kind is None:
        raise ValueError(f"{source}: {name!r} is not available; allowed: {', '.join(OPTIMIZERS)}")
    allowed = kind._options()
    options = dict(config or {})
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"{source}: {name} has no option {key!r}; allowed: {', '.join(allowed)}"
            )
    groups = options.get("groups")
    if isinstance(groups, Sequence) and any(
        isinstance(group, Mapping) and "optimizer" in group for group in groups
    ):
        own = [group for group in groups if "optimizer" not in group]
        main = build_optimizer(name, learning_rate, options | {"groups": own}, source)
        return _with_others(main, groups, learning_rate, source)
    try:
        return kind(learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {name}: {error}") from error


def _scaled(rate: float | Schedule, factor: float) -> float | Schedule:
    if factor == 1:
        return rate
    return (lambda step: factor * rate(step)) if callable(rate) else factor * rate


def _with_others(
    main: Optimizer, groups: Sequence[Any], learning_rate: float | Schedule, source: str
) -> MultiOptimizer:
    """`main`, and the optimizers that groups name; the first group that matches decides."""
    optimizers: list[Optimizer] = []
    filters: list[Matcher] = []
    earlier: list[Matcher] = []
    for index, group in enumerate(groups):
        where = f"{source}: groups[{index}]"
        if "match" not in group:
            raise ValueError(f"{where} is {shown(group)}; it lacks the key 'match'")
        try:
            matcher = Matcher(group["match"], f"groups[{index}]: match", tuple(earlier))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if "optimizer" in group:
            rest = {k: v for k, v in group.items() if k not in ("match", "optimizer")}
            factor = real(rest.pop("rate_scale", 1.0), f"{where}: rate_scale", 0)
            rate = _scaled(rest.pop("learning_rate", learning_rate), factor)
            optimizers.append(build_optimizer(group["optimizer"], rate, rest, where))
            filters.append(matcher)
        else:
            earlier.append(matcher)
    several = MultiOptimizer([*optimizers, main], filters)
    several.reported = len(optimizers)
    return several
