"""Differentiable functions of a user's own, and constants."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, time, timedelta
from enum import Enum
from functools import partial
from numbers import Number
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import numpy as np

from pyloss.autograd.functions.apply import unchanging
from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import Gradients, Tape, data, nodes_of, record_on, record_several
from pyloss.autograd.tensor import Tensor, stripped
from pyloss.autograd.trees import tree_leaves, tree_map
from pyloss.runtime.device import DeviceArray, is_bfloat16

#: What holds no Tensors.
_SIMPLE = (
    np.ndarray, np.generic, np.dtype, DeviceArray, Number, str, bytes, bytearray, NoneType, range,
    slice, type, Enum, set, frozenset, date, time, timedelta, PurePath, FunctionType,
    BuiltinFunctionType,
)  # fmt: skip


def stop_gradient(x: Any) -> Any:
    """x as a constant: the arrays of Tensors, in lists, tuples and dicts too.

    An array is a view that cannot be written to, since gradients may read it: `.copy()` gives one
    that can. TypeError for other objects, which may hold Tensors.
    """

    def constant(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if not isinstance(value, _SIMPLE):
            raise TypeError(
                f"stop_gradient of a {type(value).__name__}, which may hold Tensors: give it "
                "arrays, or lists, tuples and dicts of them"
            )
        return value

    return tree_map(constant, x)


def _given(x: Any, constant: bool) -> Any:
    """What a function gets for an argument: no recording knows it, and it cannot be written to.

    A constant is copied where it may change before its gradient reads it.
    """
    array = x.data if isinstance(x, Tensor) else unchanging(x) if constant else x
    return _read_only(array)


def _read_only(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        array = array.view()
        array.flags.writeable = False
    return array


def _own(y: Any) -> Any:
    """An output that is an argument, or a part of one, as an array of its own."""
    return y.copy() if isinstance(y, np.ndarray) and not y.flags.writeable else y


class custom_function:
    """A function with a gradient that is written by hand; used as a decorator.

    The function gets plain arrays in place of Tensors, computes as it likes, and returns an array
    or a tuple of arrays. Neither it nor its gradient function can write to the arrays that they
    get. Values of the recording that it does not get as arguments raise TypeError. Its gradient is
    registered in one of two ways.

    MLX's:

        @pyloss.custom_function
        def scaled(x, factor):
            return x * factor

        @scaled.vjp
        def scaled_vjp(primals, cotangent, output):
            x, factor = primals
            return cotangent * factor, (cotangent * x).sum()

    JAX's: `f.defvjp(forward, backward)`. `forward(*args)` returns `(output, residuals)` and
    `backward(residuals, cotangent)` the gradients.

    A gradient function returns one array for one argument, else a tuple with an array or None for
    each positional argument. A function with several outputs gets a tuple of cotangents. Keyword
    arguments are passed to the function alone and get no gradient. An output of whole numbers or
    bool beside others is a constant; alone it raises TypeError.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__name__ = getattr(function, "__name__", "custom_function")
        self.__doc__ = function.__doc__
        self._forward: Callable | None = None
        self._backward: Callable | None = None

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: the instance is the first argument, without a gradient."""
        return self if instance is None else partial(self, instance)

    def vjp(self, function: Callable) -> Callable:
        """Registers `function(primals, cotangent, output)`."""
        self._forward = None
        self._backward = lambda residuals, dy: function(residuals[0], dy, residuals[1])
        return function

    def defvjp(self, forward: Callable, backward: Callable) -> None:
        """Registers JAX's pair of functions."""
        self._forward, self._backward = forward, backward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nodes = nodes_of(*args)
        if kwargs and nodes_of(*tree_leaves(kwargs)) is not None:
            raise TypeError(
                f"{self.__name__}: an argument by keyword gets no gradient; pass it by position"
            )
        kwargs = stripped(kwargs)
        if nodes is None:
            arrays = [_given(x, False) for x in args]
        else:
            arrays = [_given(x, node is None) for x, node in zip(args, nodes, strict=True)]
        if nodes is None and current_tape() is None:
            return tree_map(_own, self.function(*arrays, **kwargs))
        closed = (
            f"{self.__name__}, a custom_function, uses a value that it is not given as an argument "
            "by position, and the gradient would be lost: pass it, or use stop_gradient of it"
        )
        with Tape(refusing=closed):
            if nodes is None:
                return tree_map(_own, self.function(*arrays, **kwargs))
            if self._backward is None:
                raise TypeError(
                    f"{self.__name__} has no gradient: register one with @{self.__name__}.vjp"
                )
            if self._forward is None:
                output = self.function(*arrays, **kwargs)
            else:
                output, residuals = self._forward(*arrays, **kwargs)
        several = isinstance(output, tuple)
        outputs = [data(_own(y)) for y in self._arrays(output if several else (output,))]
        carrying = [i for i, y in enumerate(outputs) if y.dtype.kind not in "iub"]
        if not carrying:
            raise TypeError(
                f"{self.__name__}, a custom_function, returned {outputs[0].dtype} alone, which "
                "carries no gradient: return float32 or float64 (y.astype(x.dtype))"
            )
        if self._forward is None:
            seen = [_read_only(y) for y in outputs]
            residuals = (
                arrays[0] if len(arrays) == 1 else tuple(arrays),
                tuple(seen) if several else seen[0],
            )
        backward, name = self._backward, self.__name__
        shapes = [(y.shape, y.dtype) for y in outputs]

        def pull(dys: list[Any], grads: Gradients) -> None:
            whole = [np.zeros(*like) for like in shapes]
            for i, dy in zip(carrying, dys, strict=True):
                if dy is not None:
                    whole[i] = _read_only(dy)
            found = backward(residuals, tuple(whole) if several else whole[0])
            found = found if isinstance(found, tuple | list) else (found,)
            if len(found) != len(arrays):
                raise ValueError(
                    f"the gradient of {name} returned {len(found)} values for "
                    f"{len(arrays)} arguments"
                )
            for i, (grad, x) in enumerate(zip(found, arrays, strict=True)):
                if not grads.wanted(i) or grad is None:
                    continue
                if np.iscomplexobj(grad):
                    raise TypeError(
                        f"the gradient of {name} by argument {i} is complex, and the argument real"
                    )
                grad = np.array(grad, x.dtype, order="C")
                if grad.shape != x.shape:
                    raise ValueError(
                        f"the gradient of {name} by argument {i} has shape {grad.shape}, and the "
                        f"argument {x.shape}"
                    )
                grads.put(i, grad)

        if not several:
            return record_on(nodes, outputs[0], lambda dy, grads: pull([dy], grads))
        carried = [outputs[i] for i in carrying]
        tensors = record_several(nodes, carried, pull, (False,) * len(carried))
        for i, tensor in zip(carrying, tensors, strict=True):
            outputs[i] = tensor
        return tuple(outputs)

    def _arrays(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs; TypeError for one that is no array of numbers."""
        for y in outputs:
            kind = np.asarray(y).dtype if isinstance(y, Number) else getattr(y, "dtype", None)
            if kind is None or (kind.kind not in "fiub" and not is_bfloat16(kind)):
                what = f"a {type(y).__name__}" if kind is None else f"type {kind}"
                raise TypeError(
                    f"{self.__name__}, a custom_function, returned {what}: return an array of "
                    "float32 or float64, or a tuple of arrays"
                )
        if not outputs:
            raise TypeError(f"{self.__name__}, a custom_function, returned an empty tuple")
        return outputs
