"""Rotary position tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import rotary_frequencies
from pyloss.runtime.device import on_device_of


class RopeTable:
    """cos and sin of the rotary angles, float32 [positions, head_dim / 2], grown on demand."""

    def __init__(self, config: ModelConfig, local: bool = False):
        """`local`: for layers with a window, whose rotary base may differ."""
        theta, scaling = config.rope_theta, config.rope_scaling
        if local and config.rope_local_base_freq is not None:
            theta, scaling = config.rope_local_base_freq, None
        self._frequencies, self._scale = rotary_frequencies(theta, config.head_dim, scaling)
        self._cos = self._sin = np.empty((0, len(self._frequencies)), np.float32)
        # the cos that was copied to a device, and the copies of both tables
        self._copies: tuple[Any, Any, Any] | None = None

    def upto(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables of at least the first `positions` positions."""
        if positions > len(self._cos):
            # Doubled, so that generation does not rebuild them at every token. The angles are
            # float64: float32 loses digits at high positions.
            angles = np.arange(max(positions, 2 * len(self._cos), 256))[:, None] * self._frequencies
            self._cos, self._sin = (
                (self._scale * f(angles)).astype(np.float32) for f in (np.cos, np.sin)
            )
        return self._cos, self._sin

    def on_device_of(self, x: Any) -> tuple[Any, Any]:
        """The tables as far as they have grown, on the device of `x`; copied there once."""
        if isinstance(x, np.ndarray):
            return self._cos, self._sin
        if (
            self._copies is None
            or self._copies[0] is not self._cos
            or self._copies[1].place != x.place
        ):
            self._copies = self._cos, on_device_of(x, self._cos), on_device_of(x, self._sin)
        return self._copies[1:]
