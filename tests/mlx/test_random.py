"""mx.random: seeds, keys, distributions, types and shapes."""

from __future__ import annotations

import numpy as np
import pytest

import pyloss
import pyloss.mlx.core as mx


def test_seeds_and_keys():
    mx.random.seed(3)
    first = mx.random.normal((4,)).tolist()
    assert mx.random.normal((4,)).tolist() != first
    pyloss.random.seed(3)
    assert mx.random.normal((4,)).tolist() == first
    a, b = mx.random.split(mx.random.key(1))
    same = mx.random.uniform(shape=(3,), key=a).tolist()
    assert mx.random.uniform(shape=(3,), key=a).tolist() == same
    assert mx.random.uniform(shape=(3,), key=b).tolist() != same
    assert len(mx.random.state) == 1


@pytest.mark.parametrize(
    "draw, mean, deviation",
    [
        (lambda n: mx.random.uniform(-1, 3, (n,)), 1, 4 / 12**0.5),
        (lambda n: mx.random.normal((n,), loc=2.0, scale=0.5), 2, 0.5),
        (lambda n: mx.random.truncated_normal(-1, 1, (n,)), 0, 0.5396),
        (lambda n: mx.random.bernoulli(0.3, (n,)), 0.3, 0.21**0.5),
        (lambda n: mx.random.randint(0, 5, (n,)), 2, 2**0.5),
        (lambda n: mx.random.gumbel((n,)), 0.5772, 1.2825),
        (lambda n: mx.random.laplace((n,), loc=1.0, scale=2.0), 1, 8**0.5),
        (lambda n: mx.random.categorical(mx.log(mx.array([0.2, 0.5, 0.3])), num_samples=n),
         1.1, 0.7),
    ],
)  # fmt: skip
def test_moments(draw, mean, deviation):
    mx.random.seed(0)
    values = np.asarray(draw(20000), np.float64)
    assert values.shape == (20000,)
    np.testing.assert_allclose(values.mean(), mean, atol=5 * deviation / 20000**0.5 + 1e-3)
    np.testing.assert_allclose(values.std(), deviation, rtol=0.05)


def test_shapes_and_types():
    logits = mx.zeros((2, 5, 7))
    assert mx.random.categorical(logits).shape == (2, 5)
    assert mx.random.categorical(logits, axis=1, num_samples=3).shape == (2, 7, 3)
    assert mx.random.categorical(logits, shape=(2, 5)).dtype == mx.uint32
    assert mx.random.uniform(dtype=mx.bfloat16).dtype == mx.bfloat16
    assert mx.random.randint(0, 9, [2]).dtype == mx.int32
    assert sorted(mx.random.permutation(6).tolist()) == list(range(6))
    rows = mx.random.permutation(mx.arange(6).reshape(3, 2), axis=0)
    assert sorted(rows[:, 0].tolist()) == [0, 2, 4]
    np.testing.assert_array_equal(rows[:, 1].tolist(), rows[:, 0] + 1)


def test_bounds_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="does not broadcast"):
        mx.random.bernoulli(mx.ones((2, 2)), [2, 1])
    with pytest.raises(ValueError, match="does not broadcast"):
        mx.random.normal((2,), loc=mx.ones((3, 2)))
    with pytest.raises(ValueError, match="not both"):
        mx.random.categorical(mx.zeros((2, 2)), shape=(2,), num_samples=2)
