"""Groups: parameters, chosen by patterns of their names, that have their own settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pyloss.checks.numbers import real, shown
from pyloss.errors import nearest

if TYPE_CHECKING:
    from pyloss.optim.optimizer import Optimizer

#: patterns of names, or a function of name and parameter
Match = str | Sequence[str] | Callable[[str, Any], bool]


class Matcher:
    """Whether a parameter belongs to a group.

    A pattern is one of `fnmatch` over the whole name: `*` stands for any text, dots included, `?`
    for a letter, `[ab]` for one of two. A function gets name and parameter, as MLX's filters do.
    What one of the matchers `unless` matches does not belong to the group.
    """

    def __init__(self, match: Any, where: str, unless: tuple[Matcher, ...] = ()) -> None:
        self.given, self.unless = match, unless
        self.patterns: list[str] | None = None
        if callable(match):
            return
        patterns = [match] if isinstance(match, str) else match
        if (
            not isinstance(patterns, Sequence)
            or not patterns
            or not all(isinstance(pattern, str) and pattern for pattern in patterns)
        ):
            raise ValueError(
                f"{where} is {shown(match)}; it must be a pattern of names such as '*.bias', "
                "several of them, or a function of name and parameter"
            )
        self.patterns = list(patterns)

    def __call__(self, name: str, parameter: Any) -> bool:
        if any(other(name, parameter) for other in self.unless):
            return False
        if self.patterns is None:
            return bool(self.given(name, parameter))
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, parameters: Mapping[str, Any], where: str) -> None:
        """ValueError for a pattern, or a function, that no parameter matches."""
        if self.patterns is None:
            if not any(self.given(name, parameter) for name, parameter in parameters.items()):
                raise ValueError(f"{where} is a function that is true for no parameter")
            return
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                hint = nearest(pattern, parameters)
                raise ValueError(
                    f"{where}: {pattern!r} matches none of the {len(parameters)} parameters"
                    + (f"; the nearest is {hint!r}" if hint else "")
                )

    def __repr__(self) -> str:
        if self.patterns is None:
            return getattr(self.given, "__name__", repr(self.given))
        return repr(self.patterns[0] if len(self.patterns) == 1 else self.patterns)


class Groups:
    """The groups of an optimizer; a parameter belongs to the first one that it matches.

    Attributes:
        given: the mappings that the groups were made of.
    """

    def __init__(self, optimizer: Optimizer, given: Any) -> None:
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ValueError(
                f"groups is {shown(given)}; it must be a list of mappings such as "
                '{"match": "*.bias", "weight_decay": 0}'
            )
        self.given = tuple(given)
        self.matchers: list[Matcher] = []
        self.settings: list[dict[str, Any]] = []
        self.schedules: list[Any] = []
        self.factors: list[float] = []
        for index, group in enumerate(given):
            self._add(optimizer, group, f"groups[{index}]")
        self._found: dict[str, int] = {}

    def _add(self, optimizer: Optimizer, group: Any, where: str) -> None:
        kind = type(optimizer)
        own = [name for name in kind._options() if name != "groups"]
        allowed = ["match", "learning_rate", "rate_scale", *own]
        if not isinstance(group, Mapping) or "match" not in group:
            raise ValueError(
                f"{where} is {shown(group)}; it must be a mapping with the key 'match' and settings"
            )
        for key in group:
            if key == "optimizer":
                raise ValueError(
                    f"{where}: another optimizer is one of MultiOptimizer, or of a run's settings"
                )
            if key not in allowed:
                raise ValueError(
                    f"{where}: {kind.__name__} has no option {shown(key)}; "
                    f"allowed: {', '.join(allowed)}"
                )
        if "learning_rate" in group and "rate_scale" in group:
            raise ValueError(f"{where}: learning_rate replaces the rate, rate_scale multiplies it")
        self.matchers.append(Matcher(group["match"], f"{where}: match"))
        named = {key: value for key, value in group.items() if key in own}
        rate = group.get("learning_rate")
        try:
            # A second optimizer checks the settings as the first one's were.
            options = {name: getattr(optimizer, name) for name in own} | named
            made = kind(0.0 if rate is None else rate, **options)
            factor = real(group.get("rate_scale", 1.0), "rate_scale", 0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        settings = {name: vars(made)[name] for name in (*named, "slots") if name in vars(made)}
        self.settings.append(settings)
        self.schedules.append(None if rate is None else made)
        self.factors.append(factor)

    def __len__(self) -> int:
        return len(self.matchers)

    def check(self, parameters: Mapping[str, Any]) -> None:
        """ValueError for a group that matches no parameter."""
        for index, matcher in enumerate(self.matchers):
            matcher.check(parameters, f"groups[{index}]")

    def find(self, parameters: Mapping[str, Any]) -> dict[str, int]:
        """The group of each parameter, -1 for none; ValueError for a pattern that matches none."""
        if self._found.keys() != parameters.keys():
            self.check(parameters)
            self._found = {
                name: next((i for i, match in enumerate(self.matchers) if match(name, p)), -1)
                for name, p in parameters.items()
            }
        return self._found

    def of(self, optimizer: Optimizer, index: int) -> Optimizer:
        """The optimizer with the settings of a group; arrays and counts are the same objects."""
        if index < 0 or not self.settings[index]:
            return optimizer
        changed = copy.copy(optimizer)
        vars(changed).update(self.settings[index])
        return changed

    def rate(self, index: int, rate: float, step: int) -> float:
        """A group's rate at update `step`, where the optimizer's is `rate`."""
        if index < 0:
            return rate
        own = self.schedules[index]
        return self.factors[index] * (rate if own is None else own._rate_of(step))

    def __repr__(self) -> str:
        return "[" + ", ".join(map(repr, self.matchers)) + "]"
