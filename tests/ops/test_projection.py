"""Products of layers: values and gradients against float64 central differences of formulas."""

import numpy as np
import pytest
from ops_checks import check, mask, normal
from stored_weights import stored

from pyloss import ops
from pyloss.ops.projection import Product, Projection
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


# (rows, in, out)
SHAPES = [(1, 1, 1), (1, 7, 3), (7, 1, 5), (5, 33, 7), (0, 4, 3), (13, 5, 0), (3, 17, 19)]


@pytest.mark.parametrize(("n", "i", "o"), SHAPES)
def test_linear(rng, n, i, o):
    x, w, b = normal(rng, n, i), normal(rng, o, i), normal(rng, o)
    check(rng, ops.linear, lambda x, w: x @ w.T, x, w)
    check(rng, ops.linear, lambda x, w, b: x @ w.T + b, x, w, b)


def test_linear_with_more_leading_axes(rng):
    check(
        rng,
        ops.linear,
        lambda x, w, b: x @ w.T + b,
        normal(rng, 2, 3, 5),
        normal(rng, 7, 5),
        normal(rng, 7),
    )
    check(rng, ops.linear, lambda x, w: x @ w.T, normal(rng, 5), normal(rng, 3, 5))


@pytest.mark.parametrize(("n", "i", "o"), [(1, 7, 3), (5, 33, 7), (0, 4, 3), (9, 3, 17)])
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_linear(rng, n, i, o, rank):
    arguments = (
        normal(rng, n, i),
        normal(rng, o, i),
        normal(rng, o),
        normal(rng, i, rank),
        normal(rng, rank, o),
    )
    check(
        rng,
        lambda x, w, bias, a, b: ops.lora_linear(x, w, bias, a, b, 1.5),
        lambda x, w, bias, a, b: x @ w.T + bias + 1.5 * x @ a @ b,
        *arguments,
    )
    x, w, _, a, b = arguments
    check(
        rng,
        lambda x, w, a, b: ops.lora_linear(x, w, None, a, b, -0.5),
        lambda x, w, a, b: x @ w.T - 0.5 * x @ a @ b,
        x,
        w,
        a,
        b,
    )


@pytest.mark.parametrize(("n", "i", "o"), [(5, 33, 7), (0, 4, 3), (4, 7, 3)])
def test_lora_linear_with_dropout(rng, n, i, o):
    factors = mask((n, i), 0.4, 99)
    if n == 5:
        assert (factors == 0).any() and (factors != 0).any()
    check(
        rng,
        lambda x, w, bias, a, b: ops.lora_linear(x, w, bias, a, b, 1.5, 0.4, 99),
        lambda x, w, bias, a, b: x @ w.T + bias + 1.5 * (x * factors) @ a @ b,
        normal(rng, n, i), normal(rng, o, i), normal(rng, o), normal(rng, i, 2), normal(rng, 2, o),
    )  # fmt: skip


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("head_dim", [0, 4])
def test_every_stored_format(rng, format, head_dim):
    weight = stored(rng, 12, 32, format, head_dim)
    cols = weight.shape[1]
    dense = weight.dequantize().astype(np.float64)
    x, bias = normal(rng, 6, cols), normal(rng, 12)
    a, b = normal(rng, cols, 2), normal(rng, 2, 12)
    check(
        rng,
        lambda x, bias: ops.linear(x, weight, bias),
        lambda x, bias: x @ dense.T + bias,
        x,
        bias,
    )
    check(
        rng,
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 2.0),
        lambda x, a, b: x @ dense.T + 2.0 * x @ a @ b,
        x,
        a,
        b,
    )
    factors = mask((6, cols), 0.5, 4)
    check(
        rng,
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, 2.0, 0.5, 4),
        lambda x, a, b: x @ dense.T + 2.0 * (x * factors) @ a @ b,
        x, a, b,
    )  # fmt: skip
    ids = np.array([[11, 0], [5, 5]])
    np.testing.assert_allclose(ops.embedding(ids, weight), dense[ids], rtol=1e-6)
    # A stored matrix is never trained; without a trained input nothing is recorded.
    assert type(ops.linear(x, weight)) is np.ndarray


def test_a_value_that_goes_into_several_layers_gathers_their_gradients(rng):
    """q, k and v read one array; each path that can adds its gradient in place."""
    x, w, a, b = normal(rng, 6, 5), normal(rng, 7, 5), normal(rng, 5, 2), normal(rng, 2, 7)
    factors = mask((6, 5), 0.5, 3)

    def operation(x, w, a, b):
        y = ops.rms_norm(x, np.ones(5, np.float32))
        parts = [
            ops.linear(y, w),
            ops.lora_linear(y, w, None, a, b, 0.5),
            ops.lora_linear(y, w, None, a, b, 0.5, 0.5, 3),
            ops.linear(y, w),
        ]
        return ops.add(ops.add(parts[0], parts[1]), ops.add(parts[2], parts[3]))

    def reference(x, w, a, b):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return 4 * y @ w.T + 0.5 * y @ a @ b + 0.5 * (y * factors) @ a @ b

    check(rng, operation, reference, x, w, a, b)


@pytest.mark.parametrize("rows", [1, 3, 5, 14, 50])
@pytest.mark.parametrize("depth", [32, 1536])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_products_thin_part_alone_has_the_bits_of_the_whole(rows, depth, dropout):
    """Checkpoints recompute only this part of a product whose result is not read."""
    rng = np.random.default_rng(rows)
    x, w, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, depth), (64, depth), (depth, 8), (8, 64))
    )
    for weight in (w, Weight.quantize(w, "q4_1")):
        products = [
            Product((Projection(weight, None, a, b, 2.0, dropout, seed=3),), rows, x)
            for _ in range(2)
        ]
        products[0].forward([np.empty((rows, 64), np.float32)])
        products[1].compute_low_rank()
        first, second = (product.low_rank[0] for product in products)
        assert first.any() and first.tobytes() == second.tobytes()
