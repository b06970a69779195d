"""Fixtures for the tests of the C kernels."""

import numpy as np
import pytest
from kernel_checks import TILE_FORMS, TILES_EMULATED, Memory, products
from on_device import operations

from pyloss import _core


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.check()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


#: Formats that are also tested in the shape of GPUs. The decoders of the others are alike.
IN_GROUPS = ("f32", "f16", "q4_1", "q4_k", "affine4", "nf4")
DEVICES = ["opencl", "opencl in groups"] if _core.opencl_devices()[0] else []
# On a CPU, OpenCL takes minutes to compile the kernels in the shape of GPUs.
IN_TURN = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "opencl in groups" else [])
    for name in DEVICES
]


def pytest_collection_modifyitems(items):
    """In the shape of GPUs, keep only the formats of `IN_GROUPS`."""

    def wanted(item):
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        return "groups" not in chosen.get("place", "") or chosen.get("format", "f32") in IN_GROUPS

    items[:] = filter(wanted, items)


@pytest.fixture(params=[*_core.isas(), *IN_TURN])
def place(request, monkeypatch):
    """Run on each instruction set and on the first OpenCL device.

    The device runs its kernels in its own shape and in the shape of GPUs, where work-items share
    tiles.
    """
    before = _core.isa()
    if request.param in DEVICES:
        for name, function in operations("opencl:0").items():
            monkeypatch.setattr(_core, name, function)
        _core.opencl_shape(*((8, 4, 2) if request.param != "opencl" else (0, 0, 0)))
    else:
        _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)
    _core.opencl_shape(0, 0, 0)


# The unit's instructions are in the kernels for avx512 alone.
TILES = [
    (form, name)
    for form in TILE_FORMS
    for name in _core.isas()
    if form == TILES_EMULATED or name == "avx512"
]


@pytest.fixture(params=TILES, ids="-".join)
def tiles(request):
    """Products by tiles, in each form on each instruction set that has it."""
    form, name = request.param
    with products(name, form):
        yield form
