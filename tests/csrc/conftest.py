"""Fixtures of the tests of the C kernels."""

import numpy as np
import pytest
from kernel_checks import Memory

from pyloss import _core


@pytest.fixture(params=_core.isas())
def isa(request):
    """Each instruction set this machine can run, in use during the test."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.check()


@pytest.fixture
def rng():
    return np.random.default_rng(7)
