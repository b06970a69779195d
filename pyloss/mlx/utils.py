"""mlx.utils: functions of trees. Arrays in trees are `mx.array`s; a module is a tree, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np

from pyloss.autograd.tensor import Parameter
from pyloss.mlx.core.arrays import shared
from pyloss.mlx.core.dtypes import bfloat16, float16, float32
from pyloss.mlx.core.refused import refusing
from pyloss.nn.module import Module
from pyloss.nn.places import key_named
from pyloss.weights.weight import Weight

__getattr__ = refusing("utils")

_FLOATS = {"f32": float32, "f16": float16, "bf16": bfloat16}


def module_items(module: Module) -> Iterator[tuple[str, Any]]:
    """A module's arrays, submodules and containers by name, as MLX's modules, which are dicts."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, np.ndarray | Parameter | dict | list | tuple | Module):
            yield name, value
        elif isinstance(value, Weight) and (floats := stored_floats(value)) is not None:
            yield name, floats


def stored_floats(weight: Weight) -> np.ndarray | None:
    """The array of a stored matrix of floats, over its memory; None if it is stored otherwise."""
    kind = _FLOATS.get(weight.format)
    if kind is None or weight.head_dim or weight.columns is not None:
        return None
    if not isinstance(weight.raw, np.ndarray):  # in a device's memory
        return None
    return weight.raw.view(kind).reshape(weight.shape)


def child_of(owner: Any, key: Any) -> Any:
    """What is called `key` in a module, dict or list; KeyError if nothing is."""
    if isinstance(owner, Module):
        return vars(owner)[key]
    if isinstance(owner, list | tuple):
        if not str(key).isdecimal() or int(key) >= len(owner):
            raise KeyError(key)
        return owner[int(key)]
    if isinstance(owner, dict):
        return owner[key if key in owner else key_named(owner, key)]
    raise KeyError(key)


def place_of(tree: Any, path: str) -> tuple[Any, str]:
    """The module, dict or list that holds what has the dotted name `path`, and its name there.

    A dict may have the dotted name as a key. KeyError if nothing has the name.
    """
    if isinstance(tree, dict) and path in tree:
        return tree, path
    *parents, last = path.split(".")
    owner = tree
    for part in parents:
        owner = child_of(owner, part)
    child_of(owner, last)
    return owner, last


def _child(tree: Any, key: Any) -> Any:
    """What a tree holds under a key, which may be a dotted name, or a number."""
    dotted = isinstance(tree, Module) or (isinstance(tree, dict) and key not in tree)
    return child_of(*place_of(tree, str(key))) if dotted else tree[key]


def _leaf(value: Any) -> Any:
    return shared(value) if isinstance(value, np.ndarray | Parameter) else value


def _branches(tree: Any) -> list[tuple[Any, Any]] | None:
    """The keys and values of a dict or module, the numbers and values of a list; None: a leaf."""
    if isinstance(tree, Module):
        return list(module_items(tree))
    if isinstance(tree, dict):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, list | tuple) else None


def _like(tree: Any, values: list[tuple[Any, Any]]) -> Any:
    if isinstance(tree, dict | Module):
        return dict(values)
    found = [value for _, value in values]
    return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)


def tree_map(fn: Callable, tree: Any, *rest: Any, is_leaf: Callable | None = None) -> Any:
    """`tree` with `fn(leaf, *leaves at the same places of rest)` in place of its leaves."""
    return tree_map_with_path(lambda path, *leaves: fn(*leaves), tree, *rest, is_leaf=is_leaf)


def tree_map_with_path(
    fn: Callable, tree: Any, *rest: Any, is_leaf: Callable | None = None, path: Any = None
) -> Any:
    """As `tree_map`, of a function that gets a leaf's dotted path first."""
    branches = None if is_leaf is not None and is_leaf(tree) else _branches(tree)
    if branches is None:
        return fn(path, _leaf(tree), *map(_leaf, rest))
    prefix = f"{path}." if path else ""
    return _like(
        tree,
        [
            (
                key,
                tree_map_with_path(
                    fn,
                    child,
                    *(_child(other, key) for other in rest),
                    is_leaf=is_leaf,
                    path=f"{prefix}{key}",
                ),
            )
            for key, child in branches
        ],
    )


def tree_flatten(
    tree: Any, prefix: str = "", is_leaf: Callable | None = None, destination: Any = None
) -> Any:
    """The leaves with dotted names, as a list of pairs, or in the list or dict `destination`.

    Names begin with `prefix` without its first character.
    """
    found = [] if destination is None else destination
    if not isinstance(found, list | dict):
        raise ValueError(
            f"destination must be a list, a dict or None, not a {type(destination).__name__}"
        )
    branches = None if is_leaf is not None and is_leaf(tree) else _branches(tree)
    if branches is not None:
        for key, child in branches:
            tree_flatten(child, f"{prefix}.{key}", is_leaf, found)
    elif isinstance(found, list):
        found.append((prefix[1:], _leaf(tree)))
    else:
        found[prefix[1:]] = _leaf(tree)
    return found


def tree_unflatten(tree: Any) -> Any:
    """The tree of leaves with dotted names; levels whose names are all numbers become lists."""
    items = list(tree.items() if isinstance(tree, dict) else tree)
    if len(items) == 1 and items[0][0] == "":
        return items[0][1]
    children: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for name, value in items:
        first, _, rest = name.partition(".")
        children[first].append((rest, value))
    numbers = {int(name): name for name in children if name.lstrip("-").isdecimal()}
    if len(numbers) < len(children):
        return {name: tree_unflatten(values) for name, values in children.items()}
    found: list[Any] = []
    for number, name in sorted(numbers.items()):
        found.extend({} for _ in range(number - len(found)))
        found.append(tree_unflatten(children[name]))
    return found


def tree_reduce(
    fn: Callable, tree: Any, initializer: Any = None, is_leaf: Callable | None = None
) -> Any:
    """`fn(so far, leaf)` over all leaves; the first leaf begins if `initializer` is None."""
    total = initializer
    for _, leaf in tree_flatten(tree, is_leaf=is_leaf):
        total = leaf if total is None else fn(total, leaf)
    return total


def tree_merge(tree_a: Any, tree_b: Any, merge_fn: Callable | None = None) -> Any:
    """One tree with the leaves of both; `merge_fn` makes one of two in the same place."""
    a, b = _none_if_empty(tree_a), _none_if_empty(tree_b)
    if a is None and b is None:
        if type(tree_a) is not type(tree_b):
            raise ValueError(
                f"cannot merge a {type(tree_a).__name__} with a {type(tree_b).__name__}"
            )
        return type(tree_a)() if tree_a is not None else None
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        merged = [(None, tree_merge(x, y, merge_fn)) for x, y in zip_longest(a, b)]
        return _like(a, merged)
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: tree_merge(a.get(key), b.get(key), merge_fn) for key in {**a, **b}}
    if merge_fn is None:
        raise ValueError("the trees have leaves in the same place, and no merge_fn is given")
    return merge_fn(_leaf(a), _leaf(b))


def _none_if_empty(tree: Any) -> Any:
    return None if isinstance(tree, dict | list | tuple) and len(tree) == 0 else tree


__all__ = [
    "tree_flatten",
    "tree_map",
    "tree_map_with_path",
    "tree_merge",
    "tree_reduce",
    "tree_unflatten",
]
