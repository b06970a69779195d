"""Gradients of functions: `value_and_grad` and `grad`, and helpers for gradients of modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss.autograd.tape import Node, Tape, Tensor
from pyloss.runtime import device


def _tree_map(function: Callable, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _tree_map(function, v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = (_tree_map(function, v) for v in tree)
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return function(tree)


def _plain(value: Any) -> Any:
    return _tree_map(lambda v: v.data[()] if isinstance(v, Tensor) else v, value)


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


def run_backward(tape: Tape, result: Any) -> Any:
    """Runs backward from a scalar result, or the first of a tuple.

    Returns the result as plain arrays.
    """
    loss = result[0] if isinstance(result, tuple) else result
    shape = loss.shape if isinstance(loss, Tensor) else np.shape(loss)
    if math.prod(shape) != 1:
        raise ValueError(
            f"the function must return a scalar to be differentiated, not an array of shape {shape}"
        )
    if isinstance(loss, Tensor):
        tape.backward(loss, np.ones(shape, loss.dtype))
    return _plain(result)


def value_and_grad(function: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns `(value, gradients)` of `function`.

    `function` returns a scalar, or a tuple that begins with one; the rest is passed through. The
    gradients are those of the arguments at `argnums`: float arrays, or dicts, lists and tuples of
    them. An int gives one gradient, a sequence gives a tuple. Float arguments and their gradients
    keep their type; other numbers are computed in float32.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def leaf(value: Any, root: object) -> Tensor:
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
            array = array.astype(
                native if native.kind == "f" and native.itemsize <= 8 else np.float32
            )
        return Tensor(array, Node(root))

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for i in positions:
            if not -len(args) <= i < len(args):
                raise ValueError(
                    f"argnums names argument {i}, "
                    f"but the function was called with {len(args)} arguments"
                )
        traced, tape = list(args), Tape()
        for i in positions:
            traced[i] = _tree_map(lambda value: leaf(value, tape.root), args[i])
        with tape:
            value = run_backward(tape, function(*traced, **kwargs))

        def gradient(t: Tensor) -> np.ndarray:
            assert t._node is not None
            return leaf_gradient(t._node, t.data)

        grads = tuple(_tree_map(gradient, traced[i]) for i in positions)
        return value, grads[0] if isinstance(argnums, int) else grads

    return wrapped


def grad(function: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """Like `value_and_grad`, but returns only the gradients."""
    both = value_and_grad(function, argnums)
    return lambda *args, **kwargs: both(*args, **kwargs)[1]
