"""Gradients, checkpoints, functions with gradients of their own, and what MLX's laziness needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pyloss import autograd
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tensor import Tensor
from pyloss.autograd.trees import tree_map
from pyloss.mlx.core.arrays import array, of, raw, result, tree_raw


def eval(*args: Any) -> None:
    """Does nothing: everything is computed at once."""


def async_eval(*args: Any) -> None:
    """Does nothing: everything is computed at once."""


def compile(
    fun: Callable | None = None, inputs: Any = None, outputs: Any = None, shapeless: bool = False
) -> Callable:
    """`fun`: nothing is compiled. Also a decorator with arguments."""
    if fun is None:
        return functools.partial(compile, inputs=inputs, outputs=outputs, shapeless=shapeless)
    return fun


def disable_compile() -> None:
    """Does nothing: nothing is compiled."""


def enable_compile() -> None:
    """Does nothing: nothing is compiled."""


def stop_gradient(a: Any, /, *, stream: Any = None) -> array:
    """The value, a constant."""
    return of(Tensor.detach(raw(array(a)))) if _carried(a) else result(raw(a))


def _carried(a: Any) -> bool:
    return isinstance(raw(a), Tensor)


def _traced(tree: Any) -> Any:
    """Arrays in place of the tape's values, in lists, tuples and dicts."""
    return result(tree) if isinstance(tree, Tensor | list | tuple | dict) else tree


def value_and_grad(
    fun: Callable, argnums: int | Sequence[int] | None = None, argnames: Any = ()
) -> Callable:
    """A function that returns `(value, gradients)` of `fun` by some of its arguments.

    `fun` returns a scalar, or a tuple that begins with one. The gradients have the argument's
    structure; for several `argnums` they are a tuple, in the order of the arguments. With
    `argnames`, the names of arguments by keyword, they are `(gradients by position or None, dict
    of the others)`.
    """
    names = [argnames] if isinstance(argnames, str) else list(argnames)
    if argnums is None and not names:
        argnums = 0
    positions = (
        [] if argnums is None else [argnums] if isinstance(argnums, int) else sorted(argnums)
    )
    single = len(positions) == 1

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name in names:
            if name not in kwargs:
                raise ValueError(f"argnames has {name!r}, which is not given by keyword")
        if any(not -len(args) <= i < len(args) for i in positions):
            raise ValueError(
                f"argnums is {argnums}, and the function was called with {len(args)} arguments"
            )
        chosen = {i % len(args): args[i] for i in positions} if positions else {}
        named = {name: kwargs[name] for name in names}

        def inner(by_position: dict[int, Any], by_name: dict[str, Any]) -> Any:
            given = [
                _traced(by_position[i]) if i in by_position else arg for i, arg in enumerate(args)
            ]
            return tree_raw(
                fun(*given, **{**kwargs, **{k: _traced(v) for k, v in by_name.items()}})
            )

        wanted = [i for i, part in enumerate((chosen, named)) if part]
        value, found = autograd.value_and_grad(inner, wanted)(
            _with_arrays(chosen), _with_arrays(named)
        )
        by_part = dict(zip(wanted, found, strict=True))
        grads = [result(by_part[0][i % len(args)]) for i in positions]
        by_position = None if not positions else grads[0] if single else tuple(grads)
        if names:
            return result(value), (by_position, result(by_part[1]))
        return result(value), by_position

    return wrapped


def _with_arrays(tree: dict) -> Any:
    """Values to differentiate by; numbers become float32."""
    return tree_map(lambda x: raw(array(x)) if isinstance(x, float) else x, tree_raw(tree))


def grad(fun: Callable, argnums: int | Sequence[int] | None = None, argnames: Any = ()) -> Callable:
    """Like `value_and_grad`, but returns only the gradients."""
    both = value_and_grad(fun, argnums, argnames)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return wrapped


def vjp(
    fun: Callable, primals: Sequence[Any], cotangents: Sequence[Any]
) -> tuple[list[array], list[array]]:
    """The outputs, and the products of `cotangents` with the Jacobian of `fun`: two lists."""

    def inner(*values: Any) -> list[Any]:
        found = tree_raw(fun(*(result(v) for v in values)))
        return list(found) if isinstance(found, list | tuple) else [found]

    outputs, grads = autograd.vjp(inner, [raw(x) for x in primals], [raw(x) for x in cotangents])
    return list(result(outputs)), list(result(grads))


def checkpoint(fun: Callable) -> Callable:
    """`fun`, which runs again in backward, so that only its arguments are kept until then."""

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        flat: list[Any] = []
        shell = _numbered((args, kwargs), flat)

        def inner(*values: Any) -> Any:
            given, named = _filled(shell, [result(v) for v in values])
            return tree_raw(fun(*given, **named))

        return result(autograd.checkpoint(inner, *flat))

    return wrapped


class _Place:
    """Stands for an array among arguments."""

    def __init__(self, number: int):
        self.number = number


def _numbered(tree: Any, found: list[Any]) -> Any:
    """A tree with a `_Place` for each array, and the arrays' values in `found`."""
    if isinstance(tree, list | tuple):
        items = [_numbered(x, found) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _numbered(x, found) for key, x in tree.items()}
    if isinstance(tree, array):
        found.append(raw(tree))
        return _Place(len(found) - 1)
    return tree


def _filled(tree: Any, values: list[Any]) -> Any:
    if isinstance(tree, list | tuple):
        items = [_filled(x, values) for x in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _filled(x, values) for key, x in tree.items()}
    return values[tree.number] if isinstance(tree, _Place) else tree


class custom_function:
    """A function whose gradient is written by hand: a decorator, with `@f.vjp` for the gradient.

    `vjp(primals, cotangents, outputs)` gets arrays, or tuples of several, and returns a gradient
    for each argument. Without one, gradients go through the function itself, as in MLX.
    """

    def __init__(self, f: Callable):
        self._function = f
        self._custom: autograd.custom_function | None = None
        functools.update_wrapper(self, f)

    def vjp(self, f: Callable) -> custom_function:
        """Registers the gradient."""
        inner = autograd.custom_function(
            functools.wraps(self._function)(
                lambda *args, **kwargs: tree_raw(
                    self._function(*(_traced_constant(x) for x in args), **kwargs)
                )
            )
        )

        def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
            found = f(*(_traced_constant(x) for x in (primals, cotangents, outputs)))
            return tree_raw(found)

        inner.vjp(backward)
        self._custom = inner
        return self

    def jvp(self, f: Callable) -> None:
        """AttributeError: gradients are computed backwards here, by `vjp`."""
        raise AttributeError("mx.custom_function.jvp is not here: vjp gives the gradient")

    def vmap(self, f: Callable) -> None:
        """AttributeError: functions are called on whole arrays here."""
        raise AttributeError("mx.custom_function.vmap is not here: call it on whole arrays")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._custom is None:
            return self._function(*args, **kwargs)
        flat = [raw(x) if isinstance(x, array) else x for x in args]
        return result(self._custom(*flat, **kwargs))


def _traced_constant(x: Any) -> Any:
    with no_grad():
        return result(x)
