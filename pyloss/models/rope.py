"""Rotary position tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import rotary_frequencies
from pyloss.runtime.device import on_device_of


class RopeTable:
    """cos and sin of the rotary angles, float32 [positions, head_dim / 2], grown as longer sequences come."""

    def __init__(self, config: ModelConfig, local: bool = False):
        """`local` is the table of layers with a window, where they have their own base."""
        theta, scaling = config.rope_theta, config.rope_scaling
        if local and config.rope_local_base_freq is not None:
            theta, scaling = config.rope_local_base_freq, None
        self._frequencies, self._scale = rotary_frequencies(theta, config.head_dim, scaling)
        self._cos = self._sin = np.empty((0, len(self._frequencies)), np.float32)
        # of which cos there are copies on a device, and these
        self._there: tuple[Any, Any, Any] | None = None

    def upto(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables of at least the first `positions` positions."""
        if positions > len(self._cos):
            # Doubled, so that generation does not rebuild it at every token; float64 angles, as float32 ones lose digits far out.
            angles = np.arange(max(positions, 2 * len(self._cos), 256))[:, None] * self._frequencies
            self._cos, self._sin = (
                (self._scale * f(angles)).astype(np.float32) for f in (np.cos, np.sin)
            )
        return self._cos, self._sin

    def beside(self, x: Any) -> tuple[Any, Any]:
        """The tables as far as they have grown, where the array `x` is; copied to a device once."""
        if isinstance(x, np.ndarray):
            return self._cos, self._sin
        if (
            self._there is None
            or self._there[0] is not self._cos
            or self._there[1].place != x.place
        ):
            self._there = self._cos, on_device_of(x, self._cos), on_device_of(x, self._sin)
        return self._there[1:]
