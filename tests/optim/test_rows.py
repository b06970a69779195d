"""SignSGD of the rows of a table that a batch took, against its formula and HRM's steps."""

import numpy as np
import pytest

from pyloss import nn, optim

V, D = 11, 6


def a_table(seed=0):
    return np.random.default_rng(seed).standard_normal((V, D)).astype(np.float32)


def hrm_update(table, ids, values, lr, weight_decay):
    """The steps of HRM's CastedSparseEmbeddingSignSGD, in float64."""
    table = table.astype(np.float64)
    unique, inverse = np.unique(ids, return_inverse=True)
    grad = np.zeros((unique.size, D))
    np.add.at(grad, inverse, values.astype(np.float64))
    table[unique] = table[unique] * (1 - lr * weight_decay) - lr * np.sign(grad)
    return table


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_thirty_updates_are_those_of_hrm(weight_decay):
    rng, table = np.random.default_rng(1), a_table()
    expected, schedule = table.astype(np.float64), optim.linear_schedule(0.1, 0.01, 30)
    optimizer = optim.SparseSignSGD(schedule, weight_decay)
    for step in range(30):
        ids = rng.integers(0, V, 7)
        values = rng.standard_normal((7, D)).astype(np.float32)
        values[0] = 0  # decays, too
        gradient = optim.RowGradient(ids, values)
        optimizer.update({"table": table}, {"table": gradient}, grad_scale=0.5)
        expected = hrm_update(expected, ids, values, schedule(step), weight_decay)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
    assert optimizer.step == 30 and optimizer.state_dict() == {"step": 30}


def test_rows_that_the_batch_did_not_take_keep_their_bits():
    table, before = a_table(), a_table()
    optimizer = optim.SparseSignSGD(0.1, 1.0)
    optimizer.update({"table": table}, {"table": optim.RowGradient([[3, 5]], np.ones((1, 2, D)))})
    kept = [row for row in range(V) if row not in (3, 5)]
    np.testing.assert_array_equal(table[kept], before[kept])
    assert (table[[3, 5]] != before[[3, 5]]).all()
    optimizer.update(
        {"table": table}, {"table": optim.RowGradient(np.zeros(0, int), np.ones((0, D)))}
    )


def test_repeated_rows_are_summed_before_the_sign():
    gradient = optim.RowGradient([4, 1, 4], np.array([[1.0, -3], [2, 2], [-2, 1]]))
    np.testing.assert_array_equal(gradient.rows, [1, 4])
    np.testing.assert_array_equal(gradient.values, [[2, 2], [-1, -2]])
    assert repr(gradient) == "RowGradient(rows=2, dims=2)"


def test_an_embedding_is_trained_by_the_gradient_that_the_tape_gives():
    """Its rows are those that are not 0, or those that are named."""
    model = nn.Embedding(V, D)
    model.weight[...] = a_table()
    before, ids = model.weight.copy(), np.array([[2, 7, 2], [9, 9, 9]])
    weights = np.ones((2, 3, D), np.float32)
    weights[1] = 0  # row 9 takes part, with gradient 0
    _, grads = nn.value_and_grad(model, lambda model: (model(ids) * weights).sum())(model)
    optim.SparseSignSGD(0.1, 0.5).update(model, grads)
    expected = hrm_update(before, ids[0], weights[0], 0.1, 0.5)
    np.testing.assert_allclose(model.weight, expected, rtol=1e-6)

    model.weight[...] = before
    named = optim.RowGradient.taken(grads["weight"], ids)
    optim.SparseSignSGD(0.1, 0.5).update(model, {"weight": named})
    expected = hrm_update(before, ids.reshape(-1), weights.reshape(-1, D), 0.1, 0.5)
    np.testing.assert_allclose(model.weight, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "values", "error", "match"),
    [
        ([0.5], np.ones((1, D)), TypeError, "array of float64; it must be of integers"),
        ([0, 1], np.ones((3, D)), ValueError, r"shape \(3, 6\); for rows of shape \(2,\)"),
        ([-1], np.ones((1, D)), ValueError, "rows has -1; rows are counted from 0"),
        ([2**31], np.ones((1, D)), ValueError, "rows has 2147483648"),
    ],
)
def test_bad_row_gradients_are_refused(rows, values, error, match):
    with pytest.raises(error, match=match):
        optim.RowGradient(rows, values)


def test_what_does_not_fit_a_table_is_refused_before_anything_changes():
    table = a_table()
    optimizer, gradient = optim.SparseSignSGD(0.1), optim.RowGradient([V], np.ones((1, D)))
    with pytest.raises(ValueError, match=r"'table' has 6 columns and rows up to 11.*\(11, 6\)"):
        optimizer.update({"table": table}, {"table": gradient})
    with pytest.raises(ValueError, match=r"rows of tables, and 'bias' has shape \(6,\)"):
        optimizer.update({"bias": table[0]}, {"bias": table[0]})
    with pytest.raises(TypeError, match="'table' is a RowGradient, and AdamW updates whole arrays"):
        optim.AdamW(0.1).update({"table": table}, {"table": gradient})
    with pytest.raises(ValueError, match="rows has numbers from 0 to 11; the table has 11 rows"):
        optim.RowGradient.taken(table, [0, V])
    np.testing.assert_array_equal(table, a_table())
    assert optimizer.step == 0


def test_norm_and_clipping_take_the_sums_of_the_rows():
    ids, values = np.array([1, 4, 1]), np.arange(18, dtype=np.float32).reshape(3, D)
    table = np.zeros((V, D), np.float32)
    np.add.at(table, ids, values)
    grads = {"a": np.ones(3, np.float32), "table": optim.RowGradient(ids, values)}
    norm = optim.grad_norm({"a": grads["a"], "table": table})
    clipped, before = optim.clip_grad_norm(grads, 1.0)
    assert before == optim.grad_norm(grads) == pytest.approx(norm, rel=1e-6)
    assert optim.grad_norm(clipped) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(clipped["table"].values, table[[1, 4]] / norm, rtol=1e-5)


def test_a_table_and_the_other_parameters_have_their_own_optimizers():
    """The recipe of HRM."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(V, D), nn.Linear(D, 3)

        def __call__(self, ids):
            return self.layer(self.table(ids))

    model, ids = Model(), np.array([2, 7])
    before = {name: array.copy() for name, array in model.parameters().items()}
    several = optim.MultiOptimizer(
        [optim.SparseSignSGD(0.1, 0.5), optim.AdamATan2(0.01)], ["table.*"]
    )
    _, grads = nn.value_and_grad(model, lambda model: (model(ids) ** 2).sum())(model)
    several.update(model, grads)
    expected = hrm_update(before["table.weight"], ids, grads["table.weight"][ids], 0.1, 0.5)
    # The sum of the old number and its change may be small against both.
    np.testing.assert_allclose(model.table.weight, expected, rtol=1e-6)
    assert (model.layer.weight != before["layer.weight"]).all()
