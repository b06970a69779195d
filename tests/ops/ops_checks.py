"""For tests of operations: gradients against float64 central differences of a formula."""

import numpy as np

from pyloss import _core
from pyloss.autograd.differentiation import value_and_grad


def normal(rng, *shape):
    """float32 numbers as float64, so that both sides start from equal values."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def differences(f, arguments, i, upstream, step=1e-5):
    """The gradient of sum(f(*arguments) * upstream) by argument i, by central differences."""
    x = arguments[i]
    out = np.empty_like(x)
    for place in np.ndindex(x.shape):
        moved = list(arguments)
        ends = []
        for sign in (1, -1):
            moved[i] = x.copy()
            moved[i][place] += sign * step
            ends.append((f(*moved) * upstream).sum())
        out[place] = (ends[0] - ends[1]) / (2 * step)
    return out


def check(rng, operation, reference, *arguments, tolerance=2e-5):
    """Check value and gradients, all together and alone, contiguous and strided.

    The upstream gradient is not uniform.
    """
    want = reference(*arguments)
    upstream = normal(rng, *want.shape)
    expected = [differences(reference, arguments, i, upstream) for i in range(len(arguments))]
    single = [a.astype(np.float32) for a in arguments]

    def near(got, want):
        assert got.shape == want.shape and got.dtype == np.float32
        limit = tolerance * max(1, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, atol=limit, rtol=tolerance)

    def f(*traced):
        out = operation(*traced)
        return (out * upstream.astype(np.float32)).sum(), out

    plain = operation(*single)
    assert type(plain) is np.ndarray
    near(plain, want)
    (_, out), grads = value_and_grad(f, range(len(single)))(*single)
    assert out.tobytes() == plain.tobytes(), "recording changes the value"
    for got, exact in zip(grads, expected, strict=True):
        near(got, exact)
    for i, exact in enumerate(expected):
        (_, out), gradient = value_and_grad(f, i)(*single)
        near(gradient, exact)
    strided = [np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a for a in single]
    _, again = value_and_grad(f, range(len(single)))(*strided)
    for got, first in zip(again, grads, strict=True):
        assert got.tobytes() == first.tobytes(), "strides change the gradient"


def mask(shape, p, seed):
    """The factors by which dropout multiplies."""
    out = np.empty(shape, np.float32)
    _core.dropout(np.ones(shape, np.float32), seed, p, out)
    assert set(np.unique(out)) <= {0, np.float32(1 / (1 - p))}
    return out.astype(np.float64)
