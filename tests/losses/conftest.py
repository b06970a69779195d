"""Fixtures of the losses under a head."""

import numpy as np
import pytest

from pyloss.losses import head as linear_losses


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def many_parts(monkeypatch):
    """Compute at most 16 rows at a time."""
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", 1)
    monkeypatch.setattr(linear_losses, "MAX_BYTES", 1)
