"""Foreign array-likes and masked arrays as arguments of losses."""

import numpy as np
import pytest

import pyloss

X = np.zeros((2, 4), np.float32)


class Odd:
    """A foreign array-like object without an array."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


@pytest.mark.parametrize("place", ["logits", "labels", "weights"])
def test_array_likes_that_raise_something_of_their_own(place):
    good = {"logits": X, "labels": [0, 1], "weights": [1.0, 1.0]}
    for error in (
        KeyError("gone"),
        RuntimeError("on another device"),
        ZeroDivisionError(),
        RecursionError("deep"),
    ):
        with pytest.raises(
            TypeError,
            match=f"{place} cannot be read as an array: Odd raises {type(error).__name__}",
        ) as caught:
            pyloss.softmax_cross_entropy(**(good | {place: Odd(error)}))
        assert caught.value.__cause__ is error
    with pytest.raises(MemoryError):
        pyloss.softmax_cross_entropy(**(good | {place: Odd(MemoryError())}))
    with pytest.raises(KeyboardInterrupt):
        pyloss.softmax_cross_entropy(**(good | {place: Odd(KeyboardInterrupt())}))


@pytest.mark.parametrize(
    ("place", "value"), [("logits", X), ("labels", [0, 1]), ("weights", [1.0, 1.0])]
)
def test_masked_arrays_are_read_only_where_nothing_is_masked(place, value):
    """NumPy ignores masks when it converts, so a masked label would count."""
    good = {"logits": X, "labels": [0, 1], "weights": [1.0, 1.0]}
    whole, masked = np.ma.array(value), np.ma.array(value)
    masked[1] = np.ma.masked
    want = pyloss.softmax_cross_entropy(**good)
    np.testing.assert_array_equal(pyloss.softmax_cross_entropy(**(good | {place: whole})), want)
    with pytest.raises(
        TypeError, match=f"masked elements cannot be read as {place}; give them values with .filled"
    ):
        pyloss.softmax_cross_entropy(**(good | {place: masked}))
