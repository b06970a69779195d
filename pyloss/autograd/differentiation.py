"""Gradients of functions: `value_and_grad`, `grad`, `vjp`, and helpers for gradients of modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss.autograd.scope import Root
from pyloss.autograd.tape import Node, Tape
from pyloss.autograd.tensor import Tensor, refuse_outer, stripped
from pyloss.autograd.trees import tree_map
from pyloss.runtime import device


def _plain(value: Any) -> Any:
    return tree_map(lambda v: v.data[()] if isinstance(v, Tensor) else v, value)


def leaf_gradient(leaf: Node, array: Any) -> Any:
    """The gradient of the leaf of `array`, in its type; zeros if there is none.

    The caller owns the result.
    """
    if isinstance(array, device.DeviceArray):
        found = device.zeros_like(array) if leaf.grad is None else leaf.grad
        return device.to_device(found, array).astype(array.dtype, copy=not leaf.owned)
    if leaf.grad is None:
        return np.zeros_like(array)
    return leaf.grad.astype(array.dtype, copy=not leaf.owned)


def run_backward(tape: Tape, result: Any, has_aux: bool = False) -> Any:
    """Runs backward from a scalar result, or the first of a tuple.

    Returns the result as plain arrays.
    """
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"with has_aux the function must return (value, aux), not {type(result).__name__}"
        )
    if isinstance(result, list | dict):
        raise TypeError(
            f"the function must return a scalar, or a tuple that begins with one: (loss, more), "
            f"not a {type(result).__name__}"
        )
    loss = result[0] if isinstance(result, tuple) and result else result
    try:
        shape = loss.shape if isinstance(loss, Tensor) else np.shape(loss)
        kind = loss.dtype if isinstance(loss, Tensor) else np.asarray(loss).dtype
    except ValueError as error:  # lists of several lengths
        raise TypeError(f"the function must return a scalar: {error}") from None
    if kind.kind not in "fiubV":
        raise TypeError(
            f"the function must return a scalar to be differentiated, not {type(loss).__name__}"
        )
    if math.prod(shape) != 1:
        raise ValueError(
            f"the function must return a scalar to be differentiated, not an array of shape {shape}"
        )
    if isinstance(loss, Tensor):
        tape.backward(loss, np.ones(shape, loss.dtype))
    return _plain(result)


def leaf_of(value: Any, root: Root) -> Tensor:
    """A Tensor that gets a gradient; whole numbers become float32."""
    refuse_outer(value)
    array = device.array(value)
    if isinstance(array, device.DeviceArray) and array.dtype.kind not in "fV":
        raise TypeError(
            f"cannot differentiate with respect to dtype {array.dtype} on a device; "
            "it must be of a float type"
        )
    if array.dtype not in (np.float32, np.float64, np.float16) and not device.is_bfloat16(
        array.dtype
    ):
        if array.dtype.kind not in "fiub":
            raise TypeError(
                f"cannot differentiate with respect to dtype {array.dtype}; "
                "it must hold real numbers"
            )
        native = array.dtype.newbyteorder("=")
        array = array.astype(native if native.kind == "f" and native.itemsize <= 8 else np.float32)
    return Tensor(array, Node(root))


def _leaves(tree: Any, root: Root, position: int) -> Any:
    """`leaf_of` of a tree's arrays; None and text stay as they are."""
    found: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        found.append(leaf_of(value, root))
        return found[-1]

    if not isinstance(tree, dict | list | tuple):
        return leaf_of(tree, root)
    traced = tree_map(leaf, tree)
    if not found:
        raise TypeError(f"argument {position} holds no arrays to differentiate by")
    return traced


def gradient_of(t: Tensor) -> Any:
    """The gradient of a Tensor that `leaf_of` made, after backward."""
    assert t._node is not None
    return leaf_gradient(t._node, t.data)


def value_and_grad(
    function: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable:
    """A function that returns `(value, gradients)` of `function`.

    `function` returns a scalar, or a tuple that begins with one; the rest is passed through.

    Args:
        argnums: the arguments to differentiate by: float arrays, or dicts, lists and tuples of
            them, in which None and text have the gradient None. An int gives one gradient, a
            sequence gives a tuple. Float arguments and their gradients keep their type; other
            numbers are computed in float32.
        has_aux: the function must return `(value, aux)`. The result is the same as without.

    Raises:
        TypeError: an operation cannot carry a gradient, or the function reads values of an outer
            function that is being differentiated (gradients of gradients are not computed).
        ValueError: the function returns no scalar, or has no such argument.
    """
    single = not np.iterable(argnums)
    positions: tuple[int, ...] = (argnums,) if single else tuple(argnums)  # type: ignore

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for i in positions:
            if not -len(args) <= i < len(args):
                raise ValueError(
                    f"argnums names argument {i}, "
                    f"but the function was called with {len(args)} arguments"
                )
        tape = Tape()
        leaves = {i: _leaves(args[i], tape.root, i) for i in positions}
        traced = list(args)
        for i in positions:  # dicts and lists of its own, which the function may change
            traced[i] = tree_map(lambda t: t, leaves[i])
        with tape:
            value = run_backward(tape, function(*traced, **kwargs), has_aux)
        grads = tuple(
            tree_map(lambda t: gradient_of(t) if isinstance(t, Tensor) else None, leaves[i])
            for i in positions
        )
        return value, grads[0] if single else grads

    return wrapped


def grad(function: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable:
    """Like `value_and_grad`, but returns only the gradients; with `has_aux` (gradients, aux)."""
    both = value_and_grad(function, argnums, has_aux)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def vjp(function: Callable, primals: Sequence[Any], cotangents: Any) -> tuple[Any, list[Any]]:
    """`(outputs, gradients)`: the products of `cotangents` with the Jacobian of `function`.

    Args:
        function: of the arrays `primals`; returns an array, or dicts, lists and tuples of arrays.
        primals: arguments; a gradient for each is returned.
        cotangents: arrays of the outputs' shapes, in dicts, lists and tuples as theirs; a list may
            stand for a tuple.

    Raises:
        TypeError: an output or a cotangent is no array of real numbers.
        ValueError: a cotangent has another shape, or there are more or fewer than outputs.
    """
    tape = Tape()
    leaves = [leaf_of(x, tape.root) for x in primals]
    with tape:
        result = function(*leaves)
        ends: list[tuple[Node, np.ndarray]] = []
        _match(result, cotangents, ends)
        tape.backward_from_all(ends)
    return _plain(result), [gradient_of(t) for t in leaves]


def _match(output: Any, cotangent: Any, ends: list[tuple[Node, np.ndarray]]) -> None:
    """Adds the nodes of a tree of outputs, with their cotangents, to `ends`."""
    if isinstance(output, dict):
        if not isinstance(cotangent, dict) or cotangent.keys() != output.keys():
            raise ValueError(
                f"an output is a dict with the keys {list(output)}, and its cotangent is not"
            )
        for key, value in output.items():
            _match(value, cotangent[key], ends)
        return
    if isinstance(output, list | tuple):
        given = list(cotangent) if np.iterable(cotangent) else [cotangent]
        if len(given) != len(output):
            raise ValueError(f"{len(output)} outputs need as many cotangents, got {len(given)}")
        for value, dy in zip(output, given, strict=True):
            _match(value, dy, ends)
        return
    array, dy = output if isinstance(output, Tensor) else np.asarray(output), stripped(cotangent)
    dy = np.asarray(dy)
    for name, x, kind in (("an output", array, type(output)), ("a cotangent", dy, type(cotangent))):
        if x.dtype.kind not in "fiub" and not device.is_bfloat16(x.dtype):
            raise TypeError(
                f"{name} is a {kind.__name__} of type {x.dtype}; it must be an array of real "
                "numbers, or a dict, list or tuple of them"
            )
    if dy.shape != array.shape:
        raise ValueError(f"a cotangent has shape {dy.shape}, its output {array.shape}")
    if isinstance(output, Tensor) and output._node is not None:
        ends.append((output._node, dy.astype(output.dtype)))
