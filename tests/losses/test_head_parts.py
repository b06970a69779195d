"""Losses under a head in parts of the rows, and the rows and classes that they leave out."""

import numpy as np
import pytest
from head_cases import FORMULAS, assert_close, case, computed, expected, f64, single
from loss_cases import REDUCTIONS
from loss_formulas import IGNORE, reduced

import pyloss
from pyloss import _core
from pyloss.losses import head as linear_losses

# In parts


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("rows", [25, 32, 168, 250])
def test_parts_do_not_change_a_bit(rng, monkeypatch, name, rows):
    """Values and hidden gradients keep their bits; the weight's gradient is a sum over parts.

    All parts have more than 32 rows, as real ones, or all have fewer, which have another order.
    """
    arrays, others = case(rng, name, (rows,), v=29, d=33)
    arrays = single(arrays)
    whole, wanted = computed(name, arrays, others, {}, range(len(arrays)))
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", 1)
    monkeypatch.setattr(linear_losses, "MAX_BYTES", 1)
    if rows > 32:
        monkeypatch.setattr(linear_losses, "rows_at_once", lambda *_: 2 * linear_losses.TILE_ROWS)
    _core.profile(True)
    parts, found = computed(name, arrays, others, {}, range(len(arrays)))
    assert _core.profile(False)["linear_forward"][0] >= 2
    assert whole.tobytes() == parts.tobytes()
    for i, (gradient, exact) in enumerate(zip(found, wanted, strict=True)):
        if i % 2:
            assert_close(gradient, exact, 1e-6)
        else:
            assert gradient.tobytes() == exact.tobytes()


@pytest.mark.parametrize("total", [*range(80), 127, 128, 211, 500, 2048, 4097])
@pytest.mark.parametrize("most", [16, 17, 41, 42, 60, 200, 210, 5000])
def test_parts_are_even_and_bounded(monkeypatch, total, most):
    monkeypatch.setattr(linear_losses, "LOGITS_BYTES", most * 8)
    monkeypatch.setattr(linear_losses, "MIN_ROWS", 1)
    parts = linear_losses._parts(total, 8)
    sizes = [p.stop - p.start for p in parts]
    assert sum(sizes) == total and [p.start for p in parts] == list(np.cumsum([0, *sizes]))[:-1]
    assert len(parts) == -(-total // most) and max(sizes, default=0) <= most
    few = 4 if most < 126 else 32
    assert len(parts) < 2 or min(sizes) > few, "few rows are multiplied in another order"


def test_rows_of_a_large_vocabulary_are_not_few():
    """Limits of the logits' memory, and of the cost of packing the head."""
    assert linear_losses.rows_at_once(4 * 49152) * 4 * 49152 < 42e6
    for row_bytes in (4 * 151936, 8 * 151936, 8 * 262144):
        assert linear_losses.rows_at_once(row_bytes) >= 64
        assert linear_losses.rows_at_once(row_bytes) * row_bytes < 170e6


def test_the_same_bits_for_any_number_of_threads(rng, many_parts):
    arrays, others = case(rng, "linear_cross_entropy", (50,), v=700, d=64)
    arrays, before = single(arrays), pyloss.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            pyloss.set_num_threads(threads)
            loss, gradients = computed(
                "linear_cross_entropy", arrays, others, {"gradient_filter": 1e-3}, (0, 1)
            )
            results.append((loss.tobytes(), *(g.tobytes() for g in gradients)))
    finally:
        pyloss.set_num_threads(before)
    assert results[0] == results[1] == results[2]


# Rows that need no computation


def rows_computed(monkeypatch, function):
    """The number of the head's rows that `function` computes."""
    counts = []

    def counting(x, *rest):
        counts.append(len(x))
        return forward(x, *rest)

    forward = _core.linear_forward
    monkeypatch.setattr(_core, "linear_forward", counting)
    result = function()
    monkeypatch.undo()
    return sum(counts), result


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_of_weight_zero_is_not_computed_whatever_it_holds(
    rng, monkeypatch, name, bad, reduction
):
    arrays, _ = case(rng, name, (6,))
    arrays, others = single(arrays), (np.arange(6),) if name == "linear_cross_entropy" else ()
    weights = np.array([1, 0, 2, 0.5, 0, 1])
    upstream = rng.standard_normal(6 if reduction == "none" else ()).astype(np.float32)
    want, gradients = expected(name, arrays, others, {"weights": weights}, reduction, upstream)
    for hidden in arrays[::2]:
        hidden[[1, 4]] = bad
    options = {"weights": weights, "reduction": reduction}
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed(name, arrays, others, options, range(len(arrays)), upstream)
    )
    assert n == 4 * len(arrays) // 2
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("ignore", [IGNORE, -1, 0, 99])
def test_a_row_without_a_label_is_not_computed(rng, monkeypatch, many_parts, ignore):
    arrays, _ = case(rng, "linear_cross_entropy", (60,))
    arrays, labels = (
        single(arrays),
        np.where(np.arange(60) % 3 == 0, rng.integers(1, 7, 60), ignore),
    )
    options = {"ignore_index": ignore, "reduction": "mean"}
    want, gradients = expected(
        "linear_cross_entropy", arrays, (labels,), {"ignore_index": ignore}, "mean"
    )
    arrays[0][labels == ignore] = np.nan
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed("linear_cross_entropy", arrays, (labels,), options, (0, 1))
    )
    assert n == 20
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("filtered", [0.0, 1e-3])
def test_nothing_to_compute(rng, monkeypatch, name, reduction, filtered):
    """All rows are ignored or have weight 0."""
    arrays, others = case(rng, name, (3,))
    arrays = [
        np.full(a.shape, np.nan, np.float32) if i % 2 == 0 else a.astype(np.float32)
        for i, a in enumerate(arrays)
    ]
    options = {"reduction": reduction, "gradient_filter": filtered}
    if name == "linear_cross_entropy":
        others = (np.full(3, IGNORE),)
    else:
        options["weights"] = np.zeros(3)
    n, (got, found) = rows_computed(
        monkeypatch, lambda: computed(name, arrays, others, options, range(len(arrays)))
    )
    assert n == 0 and not np.any(got) and np.shape(got) == ((3,) if reduction == "none" else ())
    for argument, gradient in zip(arrays, found, strict=True):
        assert gradient.shape == argument.shape and not gradient.any()


def test_a_row_that_is_not_finite_stays_alone(rng):
    (hidden, weight), _ = case(rng, "linear_cross_entropy", (5,))
    hidden, weight = single((hidden, weight))
    labels = np.arange(5)
    want = pyloss.linear_cross_entropy(hidden, weight, labels)
    hidden[2, 1] = np.nan
    for filtered in (0.0, 0.1):
        got, (gradient,) = computed(
            "linear_cross_entropy", (hidden, weight), (labels,), {"gradient_filter": filtered}, (0,)
        )
        assert np.isnan(got).tolist() == [False, False, True, False, False]
        np.testing.assert_array_equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
        assert np.isnan(gradient[2]).all() and np.isfinite(gradient[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_row_without_upstream_gradient_still_has_its_loss(rng, name):
    arrays, others = case(rng, name, (6,))
    upstream = np.array([0, 1, 0, 2, 0, 1], np.float32)
    want, gradients = expected(name, single(arrays), others, {}, "none", upstream)
    got, found = computed(name, single(arrays), others, {}, range(len(arrays)), upstream)
    assert_close(got, want)
    for gradient, exact in zip(found, gradients, strict=True):
        assert_close(gradient, exact)


# Filtered gradients


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("filtered", [2.0**-12, 0.03])
def test_filtered_gradients(rng, monkeypatch, many_parts, name, reduction, filtered):
    """A class counts if a row of the part is above the filter, before reduction and weights."""
    monkeypatch.setattr(linear_losses, "FILTERED_COLUMNS", 5)
    arrays, others = case(rng, name, (20,), v=150, d=9, e=10)
    arrays = single([4 * a if i % 2 == 0 else a for i, a in enumerate(arrays)])
    options = {"weights": rng.uniform(0.1, 3, 20)}
    _, by_logits = expected_slopes(name, arrays, others)
    scale = scales(others, options["weights"], reduction)
    got, found = computed(
        name,
        arrays,
        others,
        {**options, "reduction": reduction, "gradient_filter": filtered},
        range(len(arrays)),
    )
    counted = np.flatnonzero(others[0] != IGNORE) if others else np.arange(20)
    want, _ = expected(name, arrays, others, options, reduction)
    assert_close(got, want)
    for i, slopes in enumerate(map(np.asarray, by_logits)):
        kept = np.zeros(slopes.shape)
        for part in linear_losses._parts(len(counted), 4):
            rows = counted[part]
            above = (np.abs(slopes[rows]) > filtered).any(axis=0)
            if 2 * above.sum() >= len(above):
                above[:] = True
            kept[rows] = slopes[rows] * above * scale[rows, None]
        hidden, weight = f64(arrays[2 * i]), f64(arrays[2 * i + 1])
        assert_close(found[2 * i], kept @ weight)
        assert_close(found[2 * i + 1], kept.T @ hidden)


def expected_slopes(name, arrays, others):
    """(losses, gradients of each row's own loss by its logits)"""
    logits = [f64(h) @ f64(w).T for h, w in zip(arrays[::2], arrays[1::2], strict=True)]
    return reduced(FORMULAS[name], (*logits, *others), {})


def scales(others, weights, reduction):
    counted = others[0] != IGNORE if others else np.full(len(weights), True)
    return weights * counted / ((weights * counted).sum() if reduction == "mean" else 1)


def test_everything_below_the_filter(rng):
    arrays, _ = case(rng, "linear_kl_div", (4,))
    _, found = computed("linear_kl_div", single(arrays), (), {"gradient_filter": 0.999}, range(4))
    assert not any(gradient.any() for gradient in found)


def test_a_row_without_upstream_gradient_passes_no_filter(rng):
    (hidden, weight), _ = case(rng, "linear_cross_entropy", (2,), v=40)
    arrays, labels = single((9 * hidden, weight)), (np.array([3, 5]),)
    options, upstream = {"gradient_filter": 0.01}, np.array([0, 1], np.float32)
    _, (alone,) = computed(
        "linear_cross_entropy", (arrays[0][1:], arrays[1]), (labels[0][1:],), options, (0,)
    )
    losses, (both,) = computed("linear_cross_entropy", arrays, labels, options, (0,), upstream)
    assert_close(losses, expected("linear_cross_entropy", arrays, labels, {})[0])
    assert not both[0].any()
    assert_close(both[1:], alone, 1e-6)
