"""mlx_lm.tuner.losses beside pyloss's: values and gradients of the student's logits."""

import numpy as np
import pytest
from mlx_sides import compare

SHAPES = [(7,), (3, 11), (2, 3, 50)]


def logits(shape, scale=2.0):
    rng = np.random.default_rng(4)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("name", ["kl_div_loss", "js_div_loss"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(name, shape):
    def case(side):
        mx, loss = side.mx, getattr(side("tuner.losses"), name)
        q, p = map(mx.array, logits(shape))
        weights = mx.array(
            np.arange(1, 1 + int(np.prod(shape[:-1])), dtype=np.float32).reshape(shape[:-1])
        )
        grad = mx.grad(lambda x: (loss(x, p) * weights).sum())(q)
        return np.array(loss(q, p)), np.array(grad)

    compare(case, atol=2e-5)


@pytest.mark.parametrize("name", ["kl_div_loss", "js_div_loss"])
def test_equal_distributions(name):
    def case(side):
        q, _ = map(side.mx.array, logits((4, 9)))
        return np.array(getattr(side("tuner.losses"), name)(q, q + 3.0))

    np.testing.assert_allclose(compare(case), 0, atol=1e-6)
