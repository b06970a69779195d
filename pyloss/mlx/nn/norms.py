"""MLX's norms and dropout."""

from __future__ import annotations

from typing import Any

from pyloss import nn as own, ops, random
from pyloss.mlx.core import fast, reductions
from pyloss.mlx.core.arrays import array, cast, of, promoted, result
from pyloss.mlx.core.creation import ones, zeros
from pyloss.mlx.core.dtypes import float32
from pyloss.mlx.core.elementwise import rsqrt
from pyloss.mlx.core.random import bernoulli
from pyloss.mlx.core.shaping import transpose
from pyloss.mlx.nn.methods import Standing
from pyloss.mlx.nn.module import Module


def _positive(name: str, eps: float) -> float:
    if eps <= 0.0:
        raise ValueError(f"[{name}] 'eps' must be positive but got {eps}.")
    return eps


class _Affine(Module):
    """A norm with a trained weight and bias, if it is affine."""

    def _scaled(self, y: array) -> array:
        return self.weight * y + self.bias if "weight" in self else y


class RMSNorm(Module, metaclass=Standing):
    """x / sqrt(mean(x^2) + eps) * weight along the last axis."""

    _stands_for = own.RMSNorm

    def __init__(self, dims: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = ones((dims,)), _positive("RMSNorm", eps)

    def __call__(self, x: Any) -> array:
        return fast.rms_norm(x, self.weight, self.eps)

    def _extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias along the last axis."""

    def __init__(self, dims: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        super().__init__()
        if affine:
            self.weight = ones((dims,))
            if bias:
                self.bias = zeros((dims,))
        self.eps, self.dims = _positive("LayerNorm", eps), dims

    def __call__(self, x: Any) -> array:
        return fast.layer_norm(x, self.get("weight"), self.get("bias"), self.eps)

    def _extra_repr(self) -> str:
        return f"{self.dims}, eps={self.eps}, affine={'weight' in self}"


class GroupNorm(_Affine):
    """Each of `num_groups` groups of the last axis has mean 0 and variance 1.

    MLX's groups are interleaved; `pytorch_compatible` ones are neighbors.
    """

    def __init__(
        self,
        num_groups: int,
        dims: int,
        eps: float = 1e-5,
        affine: bool = True,
        pytorch_compatible: bool = False,
    ):
        super().__init__()
        if num_groups <= 0 or dims <= 0 or dims % num_groups:
            raise ValueError(
                f"The number of features ({dims}) must be evenly divisible by the number of "
                f"groups ({num_groups}), and both positive."
            )
        if affine:
            self.bias, self.weight = zeros((dims,)), ones((dims,))
        self.num_groups, self.dims = num_groups, dims
        self.eps, self.pytorch_compatible = _positive("GroupNorm", eps), pytorch_compatible

    def _extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.dims}, eps={self.eps}, affine={'weight' in self}, "
            f"pytorch_compatible={self.pytorch_compatible}"
        )

    def __call__(self, x: Any) -> array:
        batch, *rest, dims = x.shape
        if self.pytorch_compatible:
            each = dims // self.num_groups
            y = x.reshape(batch, -1, self.num_groups, each).transpose(0, 2, 1, 3)
            y = fast.layer_norm(y.reshape(batch, self.num_groups, -1), None, None, self.eps)
            y = y.reshape(batch, self.num_groups, -1, each).transpose(0, 2, 1, 3)
        else:
            y = x.reshape(batch, -1, self.num_groups)
            centered = y - reductions.mean(y, 1, keepdims=True)
            y = centered * rsqrt(reductions.var(y, 1, keepdims=True) + self.eps)
        return self._scaled(y.reshape(batch, *rest, dims))


class InstanceNorm(_Affine):
    """Each channel of each sample has mean 0 and variance 1: x [N, ..., C]."""

    def __init__(self, dims: int, eps: float = 1e-5, affine: bool = False):
        super().__init__()
        if affine:
            self.weight, self.bias = ones((dims,)), zeros((dims,))
        self.dims, self.eps = dims, _positive("InstanceNorm", eps)

    def _extra_repr(self) -> str:
        return f"{self.dims}, eps={self.eps}, affine={'weight' in self}"

    def __call__(self, x: Any) -> array:
        if x.ndim < 3:
            raise ValueError(
                "InstanceNorm expects inputs with at least 3 dimensions (N, ..., C) but the input "
                f"has {x.ndim} dimensions."
            )
        first = transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))
        rows = first.reshape(x.shape[0], x.shape[-1], -1)
        y = fast.layer_norm(rows, None, None, self.eps).reshape(first.shape)
        return self._scaled(transpose(y, (0, *range(2, x.ndim), 1)))


class BatchNorm(_Affine):
    """Each channel has mean 0 and variance 1 over the batch; in evaluation by running means."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__()
        self.num_features, self.eps = num_features, _positive("BatchNorm", eps)
        self.momentum, self.track_running_stats = momentum, track_running_stats
        if affine:
            self.weight, self.bias = ones((num_features,)), zeros((num_features,))
        if track_running_stats:
            self.running_mean, self.running_var = zeros((num_features,)), ones((num_features,))
            self._freeze_stats()

    def _freeze_stats(self) -> None:
        self.freeze(keys=["running_mean", "running_var"], recurse=False)

    def unfreeze(self, *args: Any, **kwargs: Any) -> Any:
        """As `Module.unfreeze`; the running means stay frozen."""
        super().unfreeze(*args, **kwargs)
        self._freeze_stats()
        return self

    def _extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={'weight' in self}, track_running_stats={self.track_running_stats}"
        )

    def __call__(self, x: Any) -> array:
        if not 2 <= x.ndim <= 4:
            raise ValueError(
                f"Expected input tensor to have 2, 3 or 4 dimensions, but got {x.ndim}"
            )
        axes = tuple(range(x.ndim - 1))
        if self.training and x.size == x.shape[-1]:
            raise ValueError("BatchNorm training requires more than one value per channel.")
        mean, var = reductions.mean(x, axes), reductions.var(x, axes)
        if self.training and self.track_running_stats:
            old, share = 1 - self.momentum, self.momentum
            constant = [of(v.detach()) for v in (mean, reductions.var(x, axes, ddof=1))]
            self.running_mean = old * self.running_mean + share * constant[0]
            self.running_var = old * self.running_var + share * constant[1]
        elif self.track_running_stats:
            mean, var = self.running_mean, self.running_var
        return self._scaled((x - mean) * rsqrt(var + self.eps))


class _Dropping(Module):
    """A kind of dropout."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"The dropout probability {p} is not in [0, 1)")
        self._p = p

    def _extra_repr(self) -> str:
        return f"p={self._p}"


class Dropout(_Dropping):
    """While training, zeroes each element with probability p and divides the others by 1 - p."""

    def __call__(self, x: Any) -> array:
        (value,) = promoted(x, floats=True)
        if not self._p or not self.training:
            return result(value)
        wide = cast(value, float32) if value.dtype.itemsize == 2 else value
        return of(cast(ops.dropout(wide, self._p, random.next_seed()), value.dtype))


class _ChannelDropout(_Dropping):
    """Dropout of whole channels, which have so many axes."""

    _axes = 2

    def __call__(self, x: Any) -> array:
        if x.ndim not in (self._axes + 1, self._axes + 2):
            raise ValueError(
                f"Received input with {x.ndim} dimensions. Expected {self._axes + 1} or "
                f"{self._axes + 2} dimensions."
            )
        if not self._p or not self.training:
            return x
        shape = list(x.shape)
        shape[-1 - self._axes : -1] = [1] * self._axes
        kept = bernoulli(1 - self._p, shape)
        return kept * x * array(1 / (1 - self._p), x.dtype)


class Dropout2d(_ChannelDropout):
    """Dropout of whole channels of x [B, H, W, C]."""


class Dropout3d(_ChannelDropout):
    """Dropout of whole channels of x [B, D, H, W, C]."""

    _axes = 3
