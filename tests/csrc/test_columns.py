"""Operations on the columns of a matrix, on every instruction set and thread count."""

import itertools

import numpy as np
import pytest
from kernel_checks import on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

SHAPES = [(0, 3), (1, 1), (2, 0), (3, 7), (5, 33), (2, 1023), (3, 1024), (1, 1025), (17, 4099)]


@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_columns_above(memory, rng, n, v):
    x, bound = (
        rng.standard_normal((n, v)).astype(np.float32),
        rng.uniform(1, 4, n).astype(np.float32),
    )
    x[:, ::5] = bound[:, None]  # equal does not count as above
    x[:, 1::5] *= -1
    given = memory.put(x), memory.put(bound)

    def run():
        above = memory.new(v, np.uint8)
        above[...] = 7
        _core.columns_above(*given, above)
        return (above,)

    (above,) = on_threads(run)
    np.testing.assert_array_equal(above, (np.abs(x) > bound[:, None]).any(axis=0))


@pytest.mark.parametrize("v", [5, 16, 40])
def test_a_nan_is_above(memory, v):
    x, above = np.zeros((3, v), np.float32), memory.new(v, np.uint8)
    x[1, v - 1] = np.nan
    _core.columns_above(memory.put(x), memory.put(np.ones(3)), above)
    assert above.tolist() == [0] * (v - 1) + [1]
    _core.columns_above(memory.put(np.zeros((3, v))), memory.put([1, np.nan, 0]), above)
    assert above.all()


@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_gather_columns(memory, rng, n, v):
    x, columns = rng.standard_normal((n, v)).astype(np.float32), rng.integers(0, max(v, 1), 2 * v)
    given = memory.put(x), memory.put(columns, np.int32)

    def run():
        y = memory.new((n, 2 * v))
        _core.gather_columns(*given, y)
        return (y,)

    np.testing.assert_array_equal(on_threads(run)[0], x[:, columns])


@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_runs_of_columns_apart_and_together_again(memory, rng, n, v):
    x = rng.standard_normal((n, v)).astype(np.float32)
    for ends in ((0, v // 3, v // 2, v), (0, v // 3, v)):
        parts = []
        for begin, end in itertools.pairwise(ends):
            columns = memory.put(np.arange(begin, end), np.int32)
            parts.append(memory.new((n, end - begin)))
            _core.gather_columns(memory.put(x), columns, parts[-1])
            np.testing.assert_array_equal(parts[-1], x[:, begin:end])
        given = [memory.put(part) for part in parts] + [None] * (3 - len(parts))

        def run(given=given):
            y = memory.new((n, v))
            _core.concat_columns(*given, y)
            return (y,)

        np.testing.assert_array_equal(on_threads(run)[0], x)


def test_a_column_that_is_not_there():
    with pytest.raises(ValueError, match="columns"):
        _core.gather_columns(
            np.zeros((2, 3), np.float32), np.array([3], np.int32), np.empty((2, 1), np.float32)
        )
