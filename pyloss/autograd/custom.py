"""Differentiable functions of a user's own, constants, and a check of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyloss.autograd.scope import current_tape
from pyloss.autograd.tape import Gradients, Tape, data, nodes_of, record_on, record_several
from pyloss.autograd.tensor import Tensor, stripped
from pyloss.autograd.trees import tree_map


def stop_gradient(x: Any) -> Any:
    """x as a constant: the arrays of Tensors, in lists, tuples and dicts too.

    An array is a view that cannot be written to, since gradients may read it: `.copy()` gives one
    that can.
    """

    def constant(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tree_map(constant, x)


def _constant(x: Any) -> Any:
    """The array of a Tensor or parameter, as one that no recording knows."""
    array = x.data if isinstance(x, Tensor) else x
    return array.view() if isinstance(array, np.ndarray) else array


class custom_function:
    """A function with a gradient that is written by hand; used as a decorator.

    The function gets plain arrays in place of Tensors, computes as it likes, and returns an array
    or a tuple of arrays. Values of the recording that it does not get as arguments raise TypeError.
    Its gradient is registered in one of two ways.

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
    arguments are passed to the function alone and get no gradient.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.__name__ = getattr(function, "__name__", "custom_function")
        self.__doc__ = function.__doc__
        self._forward: Callable | None = None
        self._backward: Callable | None = None

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
        if any(isinstance(v, Tensor) and nodes_of(v) is not None for v in kwargs.values()):
            raise TypeError(
                f"{self.__name__}: an argument by keyword gets no gradient; pass it by position"
            )
        arrays = [_constant(x) for x in args]
        kwargs = stripped(kwargs)
        if nodes is None and current_tape() is None:
            return self.function(*arrays, **kwargs)
        closed = (
            f"{self.__name__}, a custom_function, uses a value that it is not given as an argument "
            "by position, and the gradient would be lost: pass it, or use stop_gradient of it"
        )
        with Tape(refusing=closed):
            if nodes is None:
                return self.function(*arrays, **kwargs)
            if self._backward is None:
                raise TypeError(
                    f"{self.__name__} has no gradient: register one with @{self.__name__}.vjp"
                )
            if self._forward is None:
                output = self.function(*arrays, **kwargs)
                residuals: Any = (arrays[0] if len(arrays) == 1 else tuple(arrays), output)
            else:
                output, residuals = self._forward(*arrays, **kwargs)
        several = isinstance(output, tuple)
        outputs = [np.asarray(y) for y in output] if several else [data(output)]
        backward, name = self._backward, self.__name__

        def pull(dys: list[Any], grads: Gradients) -> None:
            whole = [
                np.zeros_like(y) if dy is None else dy for dy, y in zip(dys, outputs, strict=True)
            ]
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
                grad = np.array(grad, x.dtype, order="C")
                if grad.shape != x.shape:
                    raise ValueError(
                        f"the gradient of {name} by argument {i} has shape {grad.shape}, and the "
                        f"argument {x.shape}"
                    )
                grads.put(i, grad)

        if not several:
            return record_on(nodes, outputs[0], lambda dy, grads: pull([dy], grads))
        return tuple(record_several(nodes, outputs, pull, (False,) * len(outputs)))
