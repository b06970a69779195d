"""Reads YAML settings files, with limits against damaged or hostile ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.io.files import PathLike, user_path

#: Size limit of a settings file.
MOST_BYTES = 1 << 20
#: Limits of the aliases in a file and of the values after their expansion: nested lists of aliases
#: can expand to any number of values.
MOST_ALIASES, MOST_VALUES = 100, 100_000
#: Limit of the keys and values in the text; PyYAML parses this many in a second or two.
MOST_NODES = 20_000
#: Digits of an integer. Python refuses more than 4300 itself, with a message about its own setting.
MOST_DIGITS = 1000


class _Wrong(ValueError):
    """An error in a settings file.

    Attributes:
        where: ", line N" if the line is known, else empty.
    """

    def __init__(self, reason: str, mark: Any = None) -> None:
        super().__init__(reason)
        self.where = "" if mark is None else f", line {mark.line + 1}"


def read_yaml(path: PathLike) -> dict[Any, Any]:
    """Return the mapping in a YAML file, without keys whose value is null.

    Allowed values are text, finite numbers, true, false, lists and mappings. As in mlx-lm, `1e-5`
    is a number (in YAML 1.1 it is text).

    Raises:
        ImportError: PyYAML is missing.
        OSError: the file cannot be read.
        ValueError: the file is not YAML or not UTF-8, gives a key twice, is too large, or holds
            other values; the message names the file.
    """
    place = user_path(path)
    with open(place, "rb") as file:
        raw = file.read(MOST_BYTES + 1)
    try:
        if len(raw) > MOST_BYTES:
            raise _Wrong(f"larger than {MOST_BYTES >> 20} MB, which no file of settings is")
        content = _parse(raw.decode("utf-8-sig"))
        content = {} if content is None else content
        if not isinstance(content, Mapping):
            raise _Wrong(f"holds a {type(content).__name__}; a mapping of settings is needed")
        _check(content, "", {})
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{place}: not YAML that can be read: nested too deep") from None
    except _Wrong as error:
        raise ValueError(f"{place}{error.where}: {error}") from error
    return {key: value for key, value in content.items() if value is not None}


def yaml_value(text: str) -> Any:
    """The value of a piece of YAML text, such as `1e-4` or `[a, b]`, as in a settings file.

    Raises ImportError without PyYAML, ValueError for other text.
    """
    try:
        value = _parse(text)
        _check(value, "the value", {})
    except (_Wrong, RecursionError) as error:
        raise ValueError(f"{shown(text)}: {error}") from None
    return value


def _parse(text: str) -> Any:
    """Return the content of a YAML text. Raises _Wrong for invalid text."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "reading a YAML configuration needs PyYAML: pip install PyYAML"
        ) from error

    class Loader(yaml.SafeLoader):
        aliases = nodes = 0

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            """Treat long scalars as text, except integers: number patterns take quadratic time."""
            if (
                kind is yaml.ScalarNode
                and implicit[0]
                and len(value) > MOST_DIGITS
                and not value.lstrip("+-").isdigit()
            ):
                return self.DEFAULT_SCALAR_TAG
            return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes += 1
            if self.nodes > MOST_NODES:
                raise _Wrong(
                    f"more than {MOST_NODES} keys and values, which no file of settings has"
                )
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > MOST_ALIASES:
                raise _Wrong(f"more than {MOST_ALIASES} aliases")
            return super().compose_node(parent, index)

        def flatten_mapping(self, node: Any) -> None:
            """Expand `<<`. Of equal keys only the last is kept, so that they do not accumulate."""
            own: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in own:
                        raise _Wrong(f"the key {shown(key.value)} is given twice", key.start_mark)
                    own.add(key.value)
            super().flatten_mapping(node)
            named = {
                key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value)
                for key, value in node.value
            }
            node.value = list(named.values())

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > MOST_DIGITS:
                raise _Wrong(f"an integer of {len(node.value)} digits", node.start_mark)
            return int(super().construct_yaml_int(node))

    number = r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(number), list("-+0123456789.")
    )
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise _Wrong(
            f"not YAML: {getattr(error, 'problem', None) or error}",
            getattr(error, "problem_mark", None),
        ) from error
    except _Wrong:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML raises these for a tag that does not fit its value, or for an invalid date.
        raise _Wrong(
            "a value that its tag does not fit (such as !!int x), or a date that is none"
        ) from error


def _check(value: Any, key: str, counted: dict[int, int]) -> int:
    """Count the values in `value`, aliases expanded.

    Raises _Wrong for too many values and for types that settings cannot have.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise _Wrong(f"{key} is {value}; it must be a finite number")
    if value is None or isinstance(value, (str, int, float)):
        return 1
    if not isinstance(value, (list, dict)):
        raise _Wrong(
            f"{key} is a {type(value).__name__}; it must be text, a number, true, false, a "
            f"list or a mapping"
        )
    if id(value) in counted:
        if not counted[id(value)]:
            raise _Wrong(f"{key} holds itself")
        return counted[id(value)]
    counted[id(value)] = 0
    total = 1 + sum(
        _check(item, key or shown(name).strip("'"), counted) for name, item in _parts(value)
    )
    if total > MOST_VALUES:
        raise _Wrong(f"{key or 'the file'} stands for more than {MOST_VALUES} values")
    counted[id(value)] = total
    return total


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)
