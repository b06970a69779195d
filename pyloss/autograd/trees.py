"""Dicts, lists and tuples of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function`'s results in place of the values."""
    return tree_map_with_path(lambda path, value: function(value), tree)


def tree_map_with_path(
    function: Callable[[tuple[Any, ...], Any], Any], tree: Any, path: tuple[Any, ...] = ()
) -> Any:
    """As `tree_map`, for a function of the keys and indices down to a value, and the value."""
    if isinstance(tree, dict):
        return {k: tree_map_with_path(function, v, (*path, k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = (tree_map_with_path(function, v, (*path, i)) for i, v in enumerate(tree))
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return function(path, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The values of a tree, in its order."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found
