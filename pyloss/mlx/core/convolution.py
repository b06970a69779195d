"""mx.conv1d, by pyloss's layer of convolution."""

from __future__ import annotations

from typing import Any

from pyloss import nn
from pyloss.mlx.core.arrays import array, promoted, result


def conv1d(
    input: Any,
    weight: Any,
    /,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    stream: Any = None,
) -> array:
    """input [B, T, in] with weight [out, kernel, in / groups]: [B, T', out]."""
    x, w = promoted(input, weight, floats=True)
    if len(w.shape) != 3 or len(x.shape) != 3 or w.shape[0] % groups:
        raise ValueError(
            f"input has shape {x.shape} and weight {w.shape}; they must be [B, T, in] and "
            f"[out, kernel, in / groups], with out a multiple of groups {groups}"
        )
    layer = nn.Conv1d(w.shape[2] * groups, w.shape[0], w.shape[1], stride, padding, dilation,
                      groups, bias=False)  # fmt: skip
    vars(layer)["weight"] = w
    return result(layer(x))
