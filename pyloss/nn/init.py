"""First values of parameters: float32 arrays from the library's random state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pyloss import random
from pyloss.checks.numbers import real, whole


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else shape
    return tuple(whole(n, "shape", 0) for n in sizes)


def _fans(shape: int | Sequence[int], name: str) -> tuple[int, int]:
    """Inputs and outputs of a weight [out, in] or [out, kernel, in]."""
    sizes = _shape(shape)
    if len(sizes) < 2:
        raise ValueError(f"{name} needs a weight of two axes or more, got shape {sizes}")
    inner = math.prod(sizes[1:-1])
    return inner * sizes[-1], inner * sizes[0]


def constant(shape: int | Sequence[int], value: float) -> np.ndarray:
    """`value` everywhere."""
    return np.full(_shape(shape), real(value, "value"), np.float32)


def uniform(shape: int | Sequence[int], low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Even in [low, high)."""
    return random.generator().uniform(low, high, _shape(shape)).astype(np.float32)


def normal(shape: int | Sequence[int], std: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """Normal with this mean and standard deviation."""
    draws = random.generator().standard_normal(_shape(shape))
    return (real(mean, "mean") + real(std, "std", 0) * draws).astype(np.float32)


def trunc_normal(
    shape: int | Sequence[int], std: float = 1.0, lower: float = -2.0, upper: float = 2.0
) -> np.ndarray:
    """Normal values, cut at `lower` and `upper`, with the standard deviation `std` after the cut.

    As jax.nn.initializers.truncated_normal and the initialization of HRM and TRM; torch's
    trunc_normal_ has a smaller deviation. `lower` and `upper` count in deviations of the uncut
    distribution.
    """
    low, high = real(lower, "lower"), real(upper, "upper")
    if not low < high:
        raise ValueError(f"lower is {low} and upper {high}; lower must be less")
    inside = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    at_low, at_high = (math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) for x in (low, high))
    variance = 1 - (high * at_high - low * at_low) / inside - ((at_low - at_high) / inside) ** 2
    count = math.prod(_shape(shape))
    draws = np.empty(0)
    while len(draws) < count:
        more = random.generator().standard_normal(max(2 * (count - len(draws)), 64))
        draws = np.concatenate([draws, more[(more >= low) & (more <= high)]])
    scale = real(std, "std", 0) / math.sqrt(variance)
    return (draws[:count].reshape(_shape(shape)) * scale).astype(np.float32)


def xavier_uniform(shape: int | Sequence[int], gain: float = 1.0) -> np.ndarray:
    """Even in +-gain sqrt(6 / (in + out)) (Glorot & Bengio, 2010), of a weight [out, ..., in]."""
    bound = real(gain, "gain") * math.sqrt(6 / max(sum(_fans(shape, "xavier_uniform")), 1))
    return uniform(shape, -bound, bound)


def xavier_normal(shape: int | Sequence[int], gain: float = 1.0) -> np.ndarray:
    """Normal with the deviation gain sqrt(2 / (in + out)) (Glorot & Bengio, 2010)."""
    return normal(shape, real(gain, "gain") * math.sqrt(2 / max(sum(_fans(shape, "xavier")), 1)))


def kaiming_uniform(shape: int | Sequence[int], gain: float = math.sqrt(2)) -> np.ndarray:
    """Even in +-gain sqrt(3 / in) (He et al., arXiv:1502.01852); the gain is that of ReLU."""
    bound = real(gain, "gain") * math.sqrt(3 / max(_fans(shape, "kaiming_uniform")[0], 1))
    return uniform(shape, -bound, bound)


def kaiming_normal(shape: int | Sequence[int], gain: float = math.sqrt(2)) -> np.ndarray:
    """Normal with the deviation gain / sqrt(in) (He et al., arXiv:1502.01852)."""
    return normal(shape, real(gain, "gain") / math.sqrt(max(_fans(shape, "kaiming")[0], 1)))
