"""Fixtures of the tests of the C kernels."""

import numpy as np
import pytest
from kernel_checks import Memory


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.check()


@pytest.fixture
def rng():
    return np.random.default_rng(7)
