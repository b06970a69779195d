"""Labels of every integer type: the library's sentinels are never converted to the labels' type.

Unsigned types cannot hold -100 and -1; converted, these would be valid classes.
"""

import numpy as np
import pytest
from loss_formulas import softmax_cross_entropy as formula

import pyloss

TYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">u8", ">i4", "<i8"]
CLASS = ["softmax_cross_entropy", "focal_loss", "stablemax_cross_entropy", "linear_cross_entropy"]
LABELS = [[2, 0, 1], [0, 2, 2]]
UNSIGNED_MOST = 2**64 - 1


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def arguments(name, rng, classes=5):
    """The arguments before the labels, for rows [2, 3]."""
    if name.startswith("linear"):
        return rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal(
            (classes, 4)
        ).astype(np.float32)
    return (rng.standard_normal((2, 3, classes)),)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CLASS)
def test_every_type_gives_what_int64_gives(rng, name, dtype):
    """Loss, gradient and mean, with an `ignore_index` that is a class and with rows of weight 0."""
    first, *others = arguments(name, rng)
    loss, weights = getattr(pyloss, name), [[1, 0, 2], [1, 1, 0]]
    for options in (
        {"ignore_index": 0},
        {"weights": weights},
        {"ignore_index": 2, "weights": weights},
        {"ignore_index": 77},
    ):

        def f(x, labels, options=options):
            each = loss(x, *others, labels, **options)
            return loss(x, *others, labels, **options, reduction="mean"), each

        (mean, each), (slope,) = pyloss.value_and_grad(f, (0,))(first, np.array(LABELS, dtype))
        (same_mean, same), (same_slope,) = pyloss.value_and_grad(f, (0,))(first, np.array(LABELS))
        np.testing.assert_array_equal(each, same)
        np.testing.assert_array_equal(slope, same_slope)
        assert float(mean) == float(same_mean)
        left_out = (np.array(LABELS) == options.get("ignore_index")) | (
            np.array(options.get("weights", 1)) == 0
        )
        assert (each[left_out] == 0).all() and (each[~left_out] > 0).all()


def test_the_case_that_was_reported():
    x = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = np.array([1, 0], np.uint8)
    want, _ = formula(x, labels, ignore_index=0)
    np.testing.assert_allclose(
        pyloss.softmax_cross_entropy(x, labels, ignore_index=0), want, rtol=1e-12
    )
    assert want[1] == 0
    mean = pyloss.softmax_cross_entropy(x, labels, ignore_index=0, reduction="mean")
    np.testing.assert_allclose(mean, want[0], rtol=1e-12)


@pytest.mark.parametrize("classes", [200, 255, 256, 300])
def test_bytes_as_labels_of_about_256_classes(rng, classes):
    """255 is a valid class of 256 but not of 255, ignored or not."""
    x = rng.standard_normal((3, classes))
    labels = np.array([255, 7, 199], np.uint8)
    if classes > 255:
        np.testing.assert_array_equal(
            pyloss.softmax_cross_entropy(x, labels),
            pyloss.softmax_cross_entropy(x, labels.astype(int)),
        )
    else:
        with pytest.raises(
            ValueError,
            match=rf"label 255 at position 0 is outside \[0, {classes}\) and not ignore_index -100",
        ):
            pyloss.softmax_cross_entropy(x, labels)
    ignored = pyloss.softmax_cross_entropy(x, labels, ignore_index=255)
    assert ignored[0] == 0 and (ignored[1:] > 0).all()
    weighted = pyloss.softmax_cross_entropy(x, np.array([6, 7, 199], np.uint8), weights=[0, 1, 1])
    assert weighted[0] == 0 and (weighted[1:] > 0).all()


@pytest.mark.parametrize("name", CLASS)
@pytest.mark.parametrize(
    ("labels", "value", "position"),
    [
        (np.array([[0, 200, 1], [1, 1, 1]], np.uint8), 200, (0, 1)),
        (np.array([[0, 1, 1], [2**63 + 5, 1, 1]], np.uint64), 2**63 + 5, (1, 0)),
        (np.array([[0, 1, 1], [1, 1, 2**64 - 100]], np.uint64), 2**64 - 100, (1, 2)),
        (np.array([[0, 1, -128], [1, 1, 1]], np.int8), -128, (0, 2)),
        (np.array([[0, 1, 2**31], [1, 1, 1]], ">u4"), 2**31, (0, 2)),
        ([[0, 1, 1], [1, 2**70, 1]], 2**70, (1, 1)),
        ([[0, 1, 1], [2**63, -1, 1]], 2**63, (1, 0)),
    ],
    ids=str,
)
def test_errors_show_the_label_as_it_was_given(rng, name, labels, value, position):
    message = rf"label {value} at position \({position[0]}, {position[1]}\) is outside \[0, 5\) and not ignore_index"
    for options in ({}, {"ignore_index": -1 if value != -128 else -100}):
        with pytest.raises(ValueError, match=message):
            getattr(pyloss, name)(*arguments(name, rng), labels, **options)


@pytest.mark.parametrize("dtype", ["u1", "u8", "i1", "i8"])
@pytest.mark.parametrize("index", [-(2**63), -129, -1, 256, 2**31, UNSIGNED_MOST])
def test_an_ignore_index_that_the_type_cannot_hold_ignores_nothing(rng, dtype, index):
    x = rng.standard_normal((2, 3, 5))
    labels = np.array(LABELS, dtype)
    np.testing.assert_array_equal(
        pyloss.softmax_cross_entropy(x, labels, ignore_index=index),
        pyloss.softmax_cross_entropy(x, labels, ignore_index=4),
    )


def test_an_ignore_index_that_only_uint64_holds(rng):
    x, labels = rng.standard_normal((3, 5)), np.array([1, UNSIGNED_MOST, 2], np.uint64)
    loss = pyloss.softmax_cross_entropy(x, labels, ignore_index=UNSIGNED_MOST)
    assert loss[1] == 0 and (loss[[0, 2]] > 0).all()
    with pytest.raises(ValueError, match=f"label {UNSIGNED_MOST} at position 1"):
        pyloss.softmax_cross_entropy(x, labels, ignore_index=UNSIGNED_MOST - 1)


@pytest.mark.parametrize("index", [-(2**63) - 1, 2**64, 10**400])
def test_an_ignore_index_beyond_64_bits(index):
    with pytest.raises(
        ValueError,
        match="ignore_index is .*; it must be a whole number from -9223372036854775808 to 18446744",
    ):
        pyloss.softmax_cross_entropy(np.zeros((1, 3)), [0], ignore_index=index)


@pytest.mark.parametrize("dtype", TYPES)
def test_accuracy(rng, dtype):
    x = rng.standard_normal((2, 3, 5))
    labels = np.array([[2, 0, 1], [0, 0, 0]], dtype)
    got = pyloss.compute_accuracy(x, labels, ignore_index=0)
    want = pyloss.compute_accuracy(x, np.array([[2, -100, 1], [-100] * 3]))
    np.testing.assert_array_equal(got, want)
    assert np.isnan(got[0][1])


@pytest.mark.parametrize(
    "labels",
    [np.array([True, False]), [True, False], np.array([1.0, 0.0]), np.array(["1", "0"]), [1, None]],
)
@pytest.mark.parametrize("name", ["softmax_cross_entropy", "compute_accuracy"])
def test_what_is_no_integer_is_refused(name, labels):
    with pytest.raises(TypeError, match="^labels must be integers, not "):
        getattr(pyloss, name)(np.zeros((2, 3)), labels)
