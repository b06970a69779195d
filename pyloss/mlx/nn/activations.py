"""MLX's activations, as functions and as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyloss import autograd
from pyloss.mlx.core import elementwise, reductions
from pyloss.mlx.core.arrays import array
from pyloss.mlx.core.creation import full
from pyloss.mlx.core.elementwise import in_float32, maximum, minimum, where
from pyloss.mlx.core.shaping import split
from pyloss.mlx.nn.module import Module


def sigmoid(x: Any) -> array:
    """1 / (1 + exp(-x))."""
    return elementwise.sigmoid(x)


def tanh(x: Any) -> array:
    """The hyperbolic tangent."""
    return elementwise.tanh(x)


def relu(x: Any) -> array:
    """max(x, 0)."""
    return maximum(x, 0)


def relu2(x: Any) -> array:
    """max(x, 0)^2."""
    return relu(x).square()


def relu6(x: Any) -> array:
    """min(max(x, 0), 6)."""
    return minimum(relu(x), 6.0)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> array:
    """x, times a slope below 0."""
    return maximum(negative_slope * x, x)


def log_softmax(x: Any, axis: int = -1) -> array:
    """x - logsumexp(x) along an axis."""
    return in_float32(autograd.functions.log_softmax, x, axis=axis)


def elu(x: Any, alpha: float = 1.0) -> array:
    """x, below 0 alpha (exp(x) - 1)."""
    return where(x > 0, x, alpha * elementwise.expm1(minimum(x, 0)))


def softmax(x: Any, axis: int = -1) -> array:
    """exp(x) / sum(exp(x)) along an axis."""
    return reductions.softmax(x, axis)


def softmin(x: Any, axis: int = -1) -> array:
    """softmax(-x)."""
    return softmax(-x, axis)


def softplus(x: Any) -> array:
    """log(1 + exp(x))."""
    return elementwise.logaddexp(x, 0)


def softsign(x: Any) -> array:
    """x / (1 + |x|)."""
    return x / (1 + elementwise.abs(x))


def softshrink(x: Any, lambd: float = 0.5) -> array:
    """x moved towards 0 by lambd; 0 where it is nearer."""
    return where(elementwise.abs(x) > lambd, x - elementwise.sign(x) * lambd, 0)


def hard_shrink(x: Any, lambd: float = 0.5) -> array:
    """x, 0 where |x| is at most lambd."""
    return where(elementwise.abs(x) > lambd, x, 0)


def celu(x: Any, alpha: float = 1.0) -> array:
    """max(x, 0) + alpha (exp(min(x, 0) / alpha) - 1)."""
    return maximum(x, 0.0) + alpha * (elementwise.exp(minimum(x, 0.0) / alpha) - 1)


def silu(x: Any) -> array:
    """x sigmoid(x)."""
    return in_float32(autograd.functions.silu, x)


def log_sigmoid(x: Any) -> array:
    """log(sigmoid(x))."""
    return -softplus(-x)


def gelu(x: Any) -> array:
    """x P(X <= x) for a standard normal X."""
    return in_float32(autograd.functions.gelu, x)


def gelu_approx(x: Any) -> array:
    """GELU's form with tanh."""
    return in_float32(autograd.functions.gelu, x, approximate="tanh")


def gelu_fast_approx(x: Any) -> array:
    """x sigmoid(1.702 x)."""
    return x * sigmoid(1.702 * x)


def glu(x: Any, axis: int = -1) -> array:
    """The first half times the sigmoid of the second."""
    a, b = split(x, 2, axis)
    return a * sigmoid(b)


def step(x: Any, threshold: float = 0.0) -> array:
    """1 where x is at least the threshold, else 0."""
    return where(x >= threshold, 1, 0)


def selu(x: Any) -> array:
    """ELU with the constants of self-normalizing networks."""
    return elu(x, 1.67326) * 1.0507


def prelu(x: Any, alpha: Any) -> array:
    """max(0, x) + alpha min(0, x)."""
    return maximum(0, x) + alpha * minimum(0, x)


def mish(x: Any) -> array:
    """x tanh(softplus(x))."""
    return x * tanh(softplus(x))


def hardswish(x: Any) -> array:
    """x min(max(x + 3, 0), 6) / 6."""
    return x * minimum(maximum(x + 3, 0), 6) / 6


def hard_tanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> array:
    """x between two bounds."""
    return minimum(maximum(x, min_val), max_val)


def _module(name: str, function: Callable[[Any], array]) -> type[Module]:
    """A module of an activation without settings."""

    def call(self: Module, x: Any) -> array:
        return function(x)

    doc = f"`nn.{function.__name__}` as a module."
    return type(name, (Module,), {"__call__": call, "__doc__": doc, "__module__": __name__})


Sigmoid = _module("Sigmoid", sigmoid)
Mish = _module("Mish", mish)
ReLU = _module("ReLU", relu)
ReLU2 = _module("ReLU2", relu2)
ReLU6 = _module("ReLU6", relu6)
Softmax = _module("Softmax", softmax)
Softmin = _module("Softmin", softmin)
Softplus = _module("Softplus", softplus)
Softsign = _module("Softsign", softsign)
SiLU = _module("SiLU", silu)
LogSoftmax = _module("LogSoftmax", log_softmax)
LogSigmoid = _module("LogSigmoid", log_sigmoid)
Tanh = _module("Tanh", tanh)
Hardswish = _module("Hardswish", hardswish)
SELU = _module("SELU", selu)
HardTanh = _module("HardTanh", hard_tanh)


class GLU(Module):
    """`nn.glu` as a module."""

    def __init__(self, axis: int = -1):
        super().__init__()
        self.axis = axis

    def __call__(self, x: Any) -> array:
        return glu(x, self.axis)


class LeakyReLU(Module):
    """`nn.leaky_relu` as a module."""

    def __init__(self, negative_slope: float = 1e-2):
        super().__init__()
        self._negative_slope = negative_slope

    def __call__(self, x: Any) -> array:
        return leaky_relu(x, self._negative_slope)


class ELU(Module):
    """`nn.elu` as a module."""

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        self._alpha = alpha

    def __call__(self, x: Any) -> array:
        return elu(x, self._alpha)


class CELU(Module):
    """`nn.celu` as a module."""

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        self._alpha = alpha

    def __call__(self, x: Any) -> array:
        return celu(x, self._alpha)


class Softshrink(Module):
    """`nn.softshrink` as a module."""

    def __init__(self, lambd: float = 0.5):
        super().__init__()
        self.lambd = lambd

    def __call__(self, x: Any) -> array:
        return softshrink(x, self.lambd)


class HardShrink(Module):
    """`nn.hard_shrink` as a module."""

    def __init__(self, lambd: float = 0.5):
        super().__init__()
        self.lambd = lambd

    def __call__(self, x: Any) -> array:
        return hard_shrink(x, self.lambd)


class Step(Module):
    """`nn.step` as a module."""

    def __init__(self, threshold: float = 0.0):
        super().__init__()
        self.threshold = threshold

    def __call__(self, x: Any) -> array:
        return step(x, self.threshold)


class PReLU(Module):
    """`nn.prelu` with trained slopes."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25):
        super().__init__()
        self.weight = full([num_parameters], init)

    def __call__(self, x: Any) -> array:
        return prelu(x, self.weight)


class GELU(Module):
    """GELU: exact ("none"), with tanh ("precise", "tanh"), or by a sigmoid ("fast")."""

    def __init__(self, approx: str = "none"):
        super().__init__()
        forms: dict[str, Callable[[Any], array]] = {
            "none": gelu, "precise": gelu_approx, "tanh": gelu_approx, "fast": gelu_fast_approx,
        }  # fmt: skip
        if approx not in forms:
            raise ValueError(
                f"The approximation should be in {list(forms)} but '{approx}' was given"
            )
        self._form, self._approx = forms[approx], approx

    def __call__(self, x: Any) -> array:
        return self._form(x)

    def _extra_repr(self) -> str:
        return f"approx={self._approx}"
