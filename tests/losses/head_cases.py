"""Losses under a head: their arguments, and their formulas in float64."""

import numpy as np
from loss_formulas import IGNORE, reduced

import pyloss
from pyloss.autograd.differentiation import value_and_grad
from pyloss.weights.weight import Weight

FORMULAS = {
    "linear_cross_entropy": "softmax_cross_entropy",
    "linear_kl_div": "kl_div_loss",
    "linear_js_div": "js_div_loss",
    "linear_skew_kl_div": "skew_kl_div_loss",
    "linear_tvd": "tvd_loss",
    "linear_cosine": "cosine_loss",
}


def case(rng, name, shape=(2, 3), v=7, d=5, e=6):
    """(arguments with gradients, the others) of a loss of hidden states [*shape, d].

    The teacher's hidden states are [*shape, e].
    """
    hidden, weight = rng.standard_normal((*shape, d)), rng.standard_normal((v, d))
    if name == "linear_cross_entropy":
        labels = np.where(rng.uniform(size=shape) < 0.25, IGNORE, rng.integers(0, v, shape))
        return (hidden, weight), (labels,)
    return (hidden, weight, 2 * rng.standard_normal((*shape, e)), rng.standard_normal((v, e))), ()


def single(arrays):
    return tuple(a.astype(np.float32) for a in arrays)


def f64(array):
    """The argument's values in float64."""
    return (array.dequantize() if isinstance(array, Weight) else np.asarray(array)).astype(
        np.float64
    )


def expected(name, arrays, others, options, reduction="none", upstream=1.0):
    """(result, gradients of `(upstream * result).sum()` for hidden states and weights)"""
    exact = [f64(a) for a in arrays]
    heads = list(zip(exact[::2], exact[1::2], strict=True))
    logits = [hidden @ weight.T for hidden, weight in heads]
    result, by_logits = reduced(FORMULAS[name], (*logits, *others), options, reduction, upstream)
    found = []
    for (hidden, weight), by in zip(heads, by_logits, strict=True):
        by = np.asarray(by)
        found += [by @ weight, by.reshape(-1, len(weight)).T @ hidden.reshape(-1, hidden.shape[-1])]
    return result, found


def computed(name, arrays, others, options, wanted, upstream=1.0):
    """(result, gradients of the arguments at `wanted`)"""

    def f(*arrays):
        result = getattr(pyloss, name)(*arrays, *others, **options)
        return (result * np.asarray(upstream, np.float32)).sum(), result

    (_, result), found = value_and_grad(f, wanted)(*arrays)
    return result, found


def assert_close(got, want, tolerance=1e-5):
    got = np.asarray(got, np.float64)
    assert got.shape == np.shape(want)
    np.testing.assert_allclose(
        got, want, rtol=tolerance, atol=tolerance * (1 + np.abs(want).max(initial=0))
    )
