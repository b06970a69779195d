"""What all tests need of the process."""

import signal

import pytest

from pyloss import _core

# A shell's background job starts with Ctrl-C ignored; the tests of Ctrl-C, and the processes they start, need Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_core.isas())
def isa(request):
    """Each instruction set this machine can run, in use during the test."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)
