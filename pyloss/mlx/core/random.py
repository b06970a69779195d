"""mx.random over pyloss's random state. The numbers are not MLX's; `seed` gives the same again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyloss import random as own
from pyloss.mlx.core.arrays import array, of, promoted, raw
from pyloss.mlx.core.creation import shape_of
from pyloss.mlx.core.dtypes import float32, int32, uint32
from pyloss.mlx.core.elementwise import constant
from pyloss.mlx.core.refused import refusing

_refused = refusing("random")


def __getattr__(name: str) -> Any:
    return [state_array()] if name == "state" else _refused(name)


def state_array() -> array:
    """The state, as MLX shows it: a key."""
    state = own.state()
    return of(np.array([state["seed"] & 0xFFFFFFFF, state["counter"]], uint32))


def seed(seed: int) -> None:
    """Begins a new sequence of numbers; it is pyloss's, of `pyloss.random`."""
    own.seed(int(seed) & 0x7FFFFFFFFFFFFFFF)


def key(seed: int) -> array:
    """A key for the functions' argument `key`: they then give the same numbers for it."""
    number = int(seed) & 0xFFFFFFFFFFFFFFFF
    return of(np.array([number >> 32, number & 0xFFFFFFFF], uint32))


def split(key: Any, num: int = 2, stream: Any = None) -> array:
    """Keys [num, 2] made from one."""
    words = [int(x) for x in np.asarray(raw(key)).reshape(-1)]
    made = np.random.SeedSequence(words).generate_state(2 * int(num), np.uint32)
    return of(made.reshape(int(num), 2))


def _generator(key: Any) -> np.random.Generator:
    if key is None:
        return own.generator()
    words = [int(x) for x in np.asarray(raw(key)).reshape(-1)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _bound(x: Any) -> Any:
    return x if isinstance(x, int | float) else np.asarray(constant(raw(x), "random"))


def _fitting(x: Any, shape: tuple[int, ...], name: str) -> Any:
    """x; ValueError if its shape does not broadcast to that of the drawn numbers."""
    if np.broadcast_shapes(np.shape(x), shape) != shape:
        raise ValueError(f"{name} has shape {np.shape(x)}, which does not broadcast to {shape}")
    return x


def _typed(values: Any, dtype: Any) -> array:
    return of(np.asarray(values).astype(dtype or float32))


def uniform(
    low: Any = 0,
    high: Any = 1,
    shape: Sequence[int] = (),
    dtype: Any = float32,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Even in [low, high)."""
    low, high = _bound(low), _bound(high)
    drawn = _generator(key).random(shape_of(shape), np.float32)
    for name, value in (("low", low), ("high", high)):
        _fitting(value, drawn.shape, name)
    return _typed(low + (np.asarray(high) - low) * drawn, dtype)


def normal(
    shape: Sequence[int] = (),
    dtype: Any = float32,
    loc: Any = None,
    scale: Any = None,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Normal with mean `loc` (0) and standard deviation `scale` (1)."""
    drawn = _generator(key).standard_normal(shape_of(shape), np.float32)
    drawn = drawn if scale is None else drawn * _fitting(_bound(scale), drawn.shape, "scale")
    return _typed(
        drawn if loc is None else drawn + _fitting(_bound(loc), drawn.shape, "loc"), dtype
    )


def truncated_normal(
    lower: Any,
    upper: Any,
    shape: Sequence[int] | None = None,
    dtype: Any = float32,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Normal values within [lower, upper]."""
    low, high = np.broadcast_arrays(np.asarray(_bound(lower), float), np.asarray(_bound(upper)))
    sizes = low.shape if shape is None else shape_of(shape)
    low, high = np.broadcast_to(low, sizes), np.broadcast_to(high, sizes)
    if not np.all(low <= high):
        raise ValueError("lower must not be above upper")
    draw = _generator(key)
    # By the distribution's inverse, in float64: bisection over erf, 60 halvings.
    below = np.vectorize(math.erf, otypes=[float])
    share = draw.random(sizes)
    wanted = below(low / math.sqrt(2)) * (1 - share) + below(high / math.sqrt(2)) * share
    left, right = np.maximum(low, -9.0), np.minimum(high, 9.0)
    for _ in range(60):
        middle = (left + right) / 2
        smaller = below(middle / math.sqrt(2)) < wanted
        left, right = np.where(smaller, middle, left), np.where(smaller, right, middle)
    return _typed(np.clip((left + right) / 2, low, high), dtype)


def randint(
    low: Any,
    high: Any,
    shape: Sequence[int] = (),
    dtype: Any = int32,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Whole numbers in [low, high)."""
    low, high = np.asarray(_bound(low)), np.asarray(_bound(high))
    sizes = shape_of(shape) or np.broadcast_shapes(low.shape, high.shape)
    return of(_generator(key).integers(low, high, sizes).astype(dtype or int32))


def bernoulli(
    p: Any = 0.5, shape: Sequence[int] | None = None, key: Any = None, stream: Any = None
) -> array:
    """True with probability p."""
    share = np.asarray(_bound(p))
    sizes = share.shape if shape is None else shape_of(shape)
    return of(np.asarray(_generator(key).random(sizes) < _fitting(share, sizes, "p")))


def permutation(x: Any, axis: int = 0, key: Any = None, stream: Any = None) -> array:
    """The numbers below x, or an array's parts along an axis, in another order."""
    if isinstance(x, int):
        return of(_generator(key).permutation(x).astype(int32))
    return of(_generator(key).permutation(np.asarray(constant(raw(x), "permutation")), axis))


def gumbel(
    shape: Sequence[int] = (), dtype: Any = float32, key: Any = None, stream: Any = None
) -> array:
    """-log(-log(u)) of even u."""
    return _typed(_generator(key).gumbel(size=shape_of(shape)), dtype)


def laplace(
    shape: Sequence[int] = (),
    dtype: Any = float32,
    loc: float = 0.0,
    scale: float = 1.0,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Laplace's distribution."""
    return _typed(_generator(key).laplace(loc, scale, shape_of(shape)), dtype)


def categorical(
    logits: Any,
    axis: int = -1,
    shape: Sequence[int] | None = None,
    num_samples: int | None = None,
    key: Any = None,
    stream: Any = None,
) -> array:
    """Classes drawn by unnormalized log-probabilities along an axis, uint32.

    `shape` is the result's, or `num_samples` a last axis of so many draws each.
    """
    if shape is not None and num_samples is not None:
        raise ValueError("give shape or num_samples, not both")
    (x,) = promoted(logits, floats=True)
    values = np.moveaxis(np.asarray(constant(x, "random.categorical"), np.float32), axis, -1)
    rows = values.shape[:-1]
    if num_samples is not None:
        values, rows = values[..., None, :], (*rows, int(num_samples))
    elif shape is not None:
        rows = shape_of(shape)
    noise = _generator(key).gumbel(size=(*rows, values.shape[-1]))
    return of(np.argmax(values + noise, -1).astype(uint32))
