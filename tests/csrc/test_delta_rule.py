"""The gated delta rule and the scan against their steps in float64, and those against central
differences."""

import delta_formulas
import numpy as np
import pytest
from kernel_checks import assert_close, on_threads

from pyloss import _core

pytestmark = pytest.mark.usefixtures("place")

LENGTHS = [[0], [1], [2], [63], [64], [65], [0, 5, 0, 0, 1, 64], [3, 130, 4, 1, 66], [1000]]
#: heads of keys and of values, and their sizes
HEADS = [(1, 1, 1, 1), (2, 4, 16, 24), (1, 3, 33, 17), (2, 2, 128, 64)]
EPS = 1e-6
#: eps and delta: the delta rule, the scan, and what is between them
RULE, SCAN = (EPS, 1), (-1.0, 0)
KINDS = [RULE, SCAN, (-1.0, 1), (EPS, 0)]


def drawn(rng, lengths, groups, heads, d, e, gates="usual"):
    """Random arguments as float32, in their order."""
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    n = int(offsets[-1])
    normal = rng.standard_normal
    g = -np.exp(1.5 * normal((n, heads)) - 2)
    beta = 1 / (1 + np.exp(-2 * normal((n, heads))))
    if gates == "extreme":
        kind = rng.integers(0, 5, (n, heads))
        g = np.choose(kind, [g, 0 * g, -1e30, -np.inf, -90.0])
        beta = np.choose(rng.integers(0, 3, (n, heads)), [beta, 0, 1])
    arrays = normal((n, groups, d)), normal((n, groups, d)), normal((n, heads, e)), g, beta
    states = normal((len(lengths), heads, d, e))
    return [x.astype(np.float32) for x in arrays], offsets, states.astype(np.float32)


def assert_near(got, want, limit):
    """Within a share of the largest element, or of 1."""
    assert got.shape == want.shape
    largest = np.abs(want).max(initial=1)
    worst = np.abs(got - want).max(initial=0) / largest
    assert worst < limit, f"off by {worst} of the largest element"


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("gates", ["usual", "extreme"])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", [RULE, SCAN], ids=["rule", "scan"])
def test_delta_rule(memory, rng, lengths, heads, gates, started, kind):
    arrays, offsets, states = drawn(rng, lengths, *heads, gates)
    compare(memory, rng, arrays, offsets, states, started, kind)


@pytest.mark.parametrize("kind", KINDS[2:], ids=str)
def test_delta_and_lengths_are_apart(memory, rng, kind):
    arrays, offsets, states = drawn(rng, [3, 70], 2, 4, 9, 11)
    arrays[1] /= 4  # a delta rule whose keys are longer than 1 grows without bounds
    compare(memory, rng, arrays, offsets, states, True, kind)


def compare(memory, rng, arrays, offsets, states, started, kind):
    d_out = rng.standard_normal(arrays[2].shape).astype(np.float32)
    scale = arrays[0].shape[2] ** -0.5
    state, d_last = (memory.put(states), memory.put(states[::-1])) if started else (None, None)
    given = [memory.put(x) for x in arrays]

    def run():
        out, last = memory.new(arrays[2].shape), memory.new(states.shape)
        found = [memory.new(x.shape) for x in (*arrays, states)]
        bounds = memory.put(offsets, np.int32)
        _core.delta_rule_forward(*given, bounds, state, scale, *kind, out, last)
        d_o = memory.put(d_out)
        _core.delta_rule_grad(d_o, d_last, *given, bounds, state, scale, *kind, *found)
        return out, last, *found

    out, last, *found = on_threads(run)
    exact = [x.astype(np.float64) for x in arrays]
    exact[3] = np.maximum(exact[3], -700)
    state = states if started else None
    want, last_state, _ = delta_formulas.delta_rule(*exact, offsets, state, scale, *kind)
    assert_near(out, want, 1e-5)
    assert_near(last, last_state, 1e-5)
    d_last = states[::-1] if started else None
    wanted = delta_formulas.slopes(d_out, d_last, *exact, offsets, state, scale, *kind)
    for got, slope in zip(found, wanted, strict=True):
        assert_near(got, slope, 3e-5)


def test_states_are_optional_and_may_be_updated_in_place(memory, rng):
    arrays, offsets, states = drawn(rng, [70, 0, 3], 2, 2, 8, 8)
    given = [memory.put(x) for x in arrays]
    bounds, state = memory.put(offsets, np.int32), memory.put(states)
    out, last, alone = (memory.new(x.shape) for x in (arrays[2], states, arrays[2]))
    _core.delta_rule_forward(*given, bounds, state, 0.5, *RULE, out, last)
    _core.delta_rule_forward(*given, bounds, state, 0.5, *RULE, alone, None)
    assert_close(alone, out.astype(np.float64), 8)
    _core.delta_rule_forward(*given, bounds, state, 0.5, *RULE, alone, state)
    np.testing.assert_array_equal(state, last)
    np.testing.assert_array_equal(alone, out)


@pytest.mark.parametrize("heads", [(1, 2, 5, 3), (2, 2, 16, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_are_the_whole(memory, rng, heads, kind):
    """Steps of any length, of some sequences; states of the others stay."""
    lengths = [70, 9, 1, 40]
    arrays, offsets, states = drawn(rng, lengths, *heads)
    arrays[1] /= 1 + heads[2]
    whole = memory.new(arrays[2].shape)
    given = [memory.put(x) for x in arrays]
    _core.delta_rule_forward(
        *given, memory.put(offsets, np.int32), memory.put(states), 0.5, *kind, whole, None
    )
    store, turn = memory.new((8, *states.shape[1:])), np.zeros(4, np.int32)
    store[::2] = states
    got, held = np.full(whole.shape, np.nan, np.float32), np.zeros(4, int)
    while (held < lengths).any():
        n = np.minimum(rng.integers(0, 9, 4), np.array(lengths) - held)
        new = [offsets[i] + held[i] + j for i in range(4) for j in range(n[i])]
        places = 2 * np.arange(4) + turn
        out = memory.new((len(new), *whole.shape[1:]))
        _core.delta_rule_step(
            *(memory.put(x[new]) for x in arrays),
            memory.put(np.cumsum([0, *n]), np.int32),
            memory.put(places, np.int32),
            memory.put(places ^ 1, np.int32),
            0.5,
            *kind,
            store,
            out,
        )
        got[new] = out
        held += n
        turn[n > 0] ^= 1
    assert_near(got, whole.astype(np.float64), 1e-5)


def test_gates(memory, rng):
    a, b = (5 * rng.standard_normal((7, 19)) for _ in "ab")
    a[0, :4], b[0, :4] = [-300, 300, 0, -80], [-300, 300, 0, -80]
    a_log, bias = rng.standard_normal((2, 19))
    a, b, a_log, bias = (memory.put(x) for x in (a, b, a_log, bias))
    g, beta, da, db = (memory.new(a.shape) for _ in range(4))
    dg, dbeta = (memory.put(rng.standard_normal(a.shape)) for _ in range(2))
    _core.delta_gates_forward(a, b, a_log, bias, g, beta)
    _core.delta_gates_grad(dg, dbeta, a, b, a_log, bias, da, db)
    x, rate = a.astype(np.float64) + bias, np.exp(a_log.astype(np.float64))
    sigmoid = 1 / (1 + np.exp(-b.astype(np.float64)))
    np.testing.assert_allclose(g, -rate * np.logaddexp(0, x), rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(beta, sigmoid, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(da, -rate * dg / (1 + np.exp(-x)), rtol=4e-6, atol=1e-30)
    np.testing.assert_allclose(db, dbeta * sigmoid * (1 - sigmoid), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("low", "high"), [(0, 3e38), (0.25, 2)])
def test_gates_of_the_scan(memory, rng, low, high):
    x = 3 * rng.standard_normal((7, 19))
    x[0, :4] = [-300, 300, 0, -80]
    a_log, bias = rng.standard_normal((2, 19))
    x, a_log, bias = (memory.put(each) for each in (x, a_log, bias))
    dt, g, dx = (memory.new(x.shape) for _ in range(3))
    ddt, dg = (memory.put(rng.standard_normal(x.shape)) for _ in range(2))
    _core.scan_gates_forward(x, a_log, bias, low, high, dt, g)
    _core.scan_gates_grad(ddt, dg, x, a_log, bias, low, high, dx)
    y, rate = x.astype(np.float64) + bias, np.exp(a_log.astype(np.float64))
    step = np.logaddexp(0, y)
    np.testing.assert_allclose(dt, np.clip(step, low, high), rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(g, -rate * np.clip(step, low, high), rtol=3e-6, atol=1e-30)
    want = (ddt - rate * dg) / (1 + np.exp(-y)) * ((low <= step) & (step <= high))
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_formulas(rng, kind):
    """Their gradients are those of their results."""
    offsets, shapes = np.array([0, 3, 5]), [(5, 1, 2), (5, 1, 2), (5, 2, 3), (5, 2), (5, 2)]
    arrays = [rng.standard_normal(shape) for shape in (*shapes, (2, 2, 2, 3))]
    d_out, d_last = rng.standard_normal((5, 2, 3)), rng.standard_normal((2, 2, 2, 3))

    def loss():
        *given, state = arrays
        out, last, _ = delta_formulas.delta_rule(*given, offsets, state, 0.7, *kind)
        return (out * d_out).sum() + (last * d_last).sum()

    *given, state = arrays
    found = delta_formulas.slopes(d_out, d_last, *given, offsets, state, 0.7, *kind)
    for array, slope in zip(arrays, found, strict=True):
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-5, -1e-5):
                array[place] += step
                ends.append(loss())
                array[place] -= step
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope[place], abs=1e-7)


def test_arguments_that_do_not_fit(memory):
    def call(q=(4, 2, 3), v=(4, 4, 5), g=(4, 4), offsets=(0, 4), state=None):
        arrays = [np.zeros(shape, np.float32) for shape in (q, (4, 2, 3), v, g, (4, 4))]
        state = None if state is None else np.zeros(state, np.float32)
        _core.delta_rule_forward(
            *arrays, np.array(offsets, np.int32), state, 1.0, *RULE, memory.new((4, 4, 5)), None
        )

    call(state=(1, 4, 3, 5))
    for wrong in (
        {"q": (4, 1, 3)},
        {"v": (4, 3, 5)},
        {"g": (3, 4)},
        {"offsets": (0, 3)},
        {"offsets": ()},
        {"state": (2, 4, 3, 5)},
    ):
        with pytest.raises(ValueError, match="delta_rule_forward: "):
            call(**wrong)

    def step(place):
        arrays = [np.zeros(shape, np.float32) for shape in ((1, 1, 2),) * 2 + ((1, 1, 2),)]
        gates = [np.zeros((1, 1), np.float32)] * 2
        at = np.array([place], np.int32)
        store, out = memory.new((2, 1, 2, 2)), memory.new((1, 1, 2))
        _core.delta_rule_step(
            *arrays, *gates, np.array([0, 1], np.int32), at, at, 1.0, *RULE, store, out
        )

    step(1)
    for place in (-1, 2):
        with pytest.raises(ValueError, match="delta_rule_step: from "):
            step(place)
