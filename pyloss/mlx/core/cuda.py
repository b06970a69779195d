"""mx.cuda: there is no CUDA here."""

from __future__ import annotations


def is_available() -> bool:
    """False."""
    return False


__all__ = ["is_available"]
