"""Devices without float64: sums that need it use pairs of floats, tried in both kernel shapes."""

import numpy as np
import pytest
from test_device_experts import adapted_experts
from test_device_model import adapted, steps
from tiny import load_tiny

import pyloss
from pyloss import _core


@pytest.fixture(params=["items", pytest.param("groups", marks=pytest.mark.slow)])
def single(device, request):
    _core.opencl_shape(*((8, 4, 2) if request.param == "groups" else (0, 0, 0)), True)
    yield device
    _core.opencl_shape(0, 0, 0)


def squares_of(x, where):
    out = pyloss.to_device(np.zeros(1), where)
    _core.sum_squares(pyloss.to_device(x, where), out)
    return out.item()


@pytest.mark.parametrize("size", [0, 1, 7, 4099, 300001])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e15])
def test_sums_of_squares(single, rng, size, scale):
    x = (scale * rng.standard_normal(size)).astype(np.float32)
    np.testing.assert_allclose(squares_of(x, single), (x.astype(np.float64) ** 2).sum(), rtol=1e-12)


def test_what_is_not_finite(single):
    assert squares_of(np.array([1, np.inf, 2], np.float32), single) == np.inf
    assert np.isnan(squares_of(np.array([1, np.nan, 2], np.float32), single))
    assert squares_of(np.full(3, 1e30, np.float32), single) == np.inf  # float64 would hold it


def test_float64_itself_is_refused(single):
    with pytest.raises(pyloss.DeviceError, match="has no float64 arithmetic"):
        pyloss.softmax_cross_entropy(pyloss.to_device(np.zeros((2, 3)), single), [0, 1])


@pytest.mark.parametrize("left", [None, 1e-1, 1e-3, 0])
def test_norms_of_rows(single, rng, left):
    """Norms of random rows, and of rows that an adapter nearly cancels."""
    a, b = (
        rng.standard_normal((200, 3)).astype(np.float32),
        rng.standard_normal((3, 50)).astype(np.float32),
    )
    whole = 2.0 * (a.astype(np.float64) @ b).T
    w = (rng.standard_normal((50, 200)) if left is None else (left - 1) * whole).astype(np.float32)
    there = [pyloss.to_device(x, single) for x in (w, a, b)]
    squares, norms, norm = (
        pyloss.to_device(np.zeros(50, t), single) for t in (np.float64, np.float32, np.float32)
    )
    _core.row_squares(there[0], squares)
    _core.row_norms(there[0], norms)
    _core.adapted_norm(*there, 2.0, squares, norm)
    wide = w.astype(np.float64)
    np.testing.assert_allclose(squares.numpy(), (wide**2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(norms.numpy(), np.linalg.norm(wide, axis=1), rtol=2e-7)
    np.testing.assert_allclose(norm.numpy(), np.linalg.norm(wide + whole, axis=1), rtol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_steps_are_those_of_the_processor(single, tmp_path, dora):
    here, there = (adapted(load_tiny(tmp_path / name), dora, 0.0) for name in ("here", "there"))
    pyloss.to_device(there, single)
    np.testing.assert_allclose(
        steps(there, np.random.default_rng(1)), steps(here, np.random.default_rng(1)), rtol=2e-5
    )


def test_experts(single):
    here, there = (adapted_experts("olmoe", "q4_1", dora=True, dropout=0.0) for _ in range(2))
    pyloss.to_device(there, single)
    np.testing.assert_allclose(
        steps(there, np.random.default_rng(1)), steps(here, np.random.default_rng(1)), rtol=2e-5
    )
