"""Rotary position tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import long_from, rotary_frequencies
from pyloss.runtime.device import on_device_of


class RopeTable:
    """cos and sin of the rotary angles, float32 [rows, rotary_dim / 2], grown on demand.

    A position's row is the position itself. With longrope, whose long factors hold for all
    positions of a long sequence, these have rows of their own, `long_from` further down.
    """

    def __init__(self, config: ModelConfig, local: bool = False, queries: bool = False):
        """`local`: for layers with a window, whose rotary base may differ.

        `queries`: for queries whose scale grows with their position.
        """
        theta, scaling = config.rope_theta, config.rope_scaling
        if local and config.rope_local_base_freq is not None:
            theta, scaling = config.rope_local_base_freq, None
        dims = config.rotary_dim_of(window=int(local))
        self._frequencies, self._scale = rotary_frequencies(theta, dims, scaling)
        self._long, _ = rotary_frequencies(theta, dims, scaling, long=True)
        self._long_from = long_from(scaling)
        self._growth = config.query_growth if queries else None
        self._cos = self._sin = np.empty((0, len(self._frequencies)), np.float32)
        # the cos that was copied to a device, and the copies of both tables
        self._copies: tuple[Any, Any, Any] | None = None

    def upto(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables for sequences of at least up to `positions` positions."""
        short = self._long_from
        rows = positions + (short if short is not None and positions > short else 0)
        if rows > len(self._cos):
            # Doubled, so that generation does not rebuild them at every token. The angles are
            # float64: float32 loses digits at high positions.
            row = np.arange(max(rows, 2 * len(self._cos), 256))[:, None]
            angles = row * self._frequencies
            if short is not None:
                angles[short:] = (row[short:] - short) * self._long
            scale: Any = self._scale
            if self._growth is not None:
                by, each = self._growth
                scale = scale * (1 + by * np.log1p(row // each))
            self._cos, self._sin = (
                (scale * f(angles)).astype(np.float32) for f in (np.cos, np.sin)
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
