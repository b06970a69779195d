"""Products of many pairs of matrices against float64."""

import numpy as np
import pytest
from kernel_checks import assert_close, on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

FORMS = {"batched_nn": (False, False), "batched_nt": (False, True), "batched_tn": (True, False)}
# Small products, with tails of every tile; depths past a panel; A larger than the second cache.
SHAPES = [(1, 1, 1), (8, 8, 8), (81, 81, 32), (6, 16, 3), (15, 33, 7), (29, 97, 40), (3, 9, 600),
          (5, 1024, 9), (300, 20, 300), (0, 3, 2), (3, 0, 2), (3, 2, 0)]  # fmt: skip


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def swapped(x, transposed):
    return np.ascontiguousarray(x.swapaxes(1, 2)) if transposed else x


def check(memory, rng, form, shape, matrices, index):
    (m, n, k), (count_a, count_b, count) = shape, matrices
    a, b, c0 = normal(rng, count_a, m, k), normal(rng, count_b, k, n), normal(rng, count, m, n)
    ia, ib = index or (np.arange(count) % count_a, np.arange(count) % count_b)
    want = a[ia].astype(np.float64) @ b[ib]
    transposed = FORMS[form]
    left, right = memory.put(swapped(a, transposed[0])), memory.put(swapped(b, transposed[1]))
    given = [memory.put(i, np.int32) for i in index] if index else (None, None)
    for alpha, add in ((1.0, 0), (-0.75, 1)):
        c = memory.put(c0)
        getattr(_core, form)(left, right, *given, alpha, add, c)
        assert_close(c, alpha * want + add * c0, k + 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_and_one_matrix_for_all(memory, rng, form, shape):
    for matrices in ((3, 3, 3), (3, 1, 3), (1, 3, 3), (2, 6, 6), (1, 1, 1), (1, 1, 0)):
        check(memory, rng, form, shape, matrices, None)


@pytest.mark.parametrize("form", FORMS)
def test_indices_choose_the_matrices(memory, rng, form):
    index = np.array([0, 1, 1, 0, 2, 2]), np.array([1, 1, 0, 0, 0, 1])
    for shape in ((5, 17, 6), (300, 20, 300)):
        check(memory, rng, form, shape, (3, 2, 6), index)


@pytest.mark.parametrize("form", FORMS)
def test_an_index_past_the_matrices_is_refused(form):
    x = np.zeros((2, 2, 2), np.float32)
    index = np.array([0, 2], np.int32)
    with pytest.raises(ValueError, match="outside"):
        getattr(_core, form)(x, x, index, None, 1.0, 0, np.zeros((2, 2, 2), np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_bits_do_not_depend_on_threads(rng, form, place):
    if "opencl" in place:
        pytest.skip("threads of the core")
    for count, m, n, k in ((40, 81, 81, 32), (3, 300, 100, 300)):
        a = swapped(normal(rng, count, m, k), FORMS[form][0])
        b = swapped(normal(rng, count, k, n), FORMS[form][1])

        def run(a=a, b=b, shape=(count, m, n)):
            c = np.empty(shape, np.float32)
            getattr(_core, form)(a, b, None, None, 0.5, 0, c)
            return (c,)

        on_threads(run)
