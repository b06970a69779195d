"""Attention by tiles (amx_bf16) against float64: factors of products are rounded to bfloat16, the
rest is float32. The unit, where there is one, gives the bits of the emulation.
"""

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import TILE_FORMS, TILES_EMULATED, on_threads
from test_attention import forward, normal, offsets, pairs, probabilities

from pyloss import _core

LENGTHS = [1, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257]
WIDTHS = [8, 64, 80, 96, 128, 256]
FEW_ROWS = 8  # of a key-value head: their forward pass is float32
UNIT = 2.0**-8  # rounding to bfloat16
FLOAT = 1e-5  # what float32 may add


def rounded(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


class Case:
    """Inputs and options of attention."""

    def __init__(self, rng, lengths, heads=(2, 1), d=64, keys=None, seen=(0, 0), softcap=0.0):
        self.heads, self.options = heads, (*seen, softcap)
        self.q_at, self.k_at = offsets(lengths), offsets(keys or lengths)
        self.scale = 1 / np.sqrt(d)
        n, m = int(self.q_at[-1]), int(self.k_at[-1])
        self.q, self.do = (normal(rng, n, heads[0], d) for _ in range(2))
        self.k, self.v = (normal(rng, m, heads[1], d) for _ in range(2))

    def forward(self, memory):
        return forward(
            memory, self.q, self.k, self.v, self.q_at, self.k_at, self.scale, *self.options
        )

    def grad(self, memory, o, lse):
        window, ahead, softcap = self.options
        out = [memory.new(a.shape) for a in (self.q, self.k, self.v)]
        arrays = [memory.put(a) for a in (self.do, self.q, self.k, self.v, o, lse)]
        at = [memory.put(a, np.int32) for a in (self.q_at, self.k_at)]
        _core.attention_grad(*arrays, *at, self.scale, softcap, window, ahead, *out)
        return tuple(out)

    def run(self, memory):
        o, lse = self.forward(memory)
        return (o, lse, *self.grad(memory, o, lse))

    def problems(self):
        """Each head of each sequence: its rows of queries and keys, its heads, and q, k and v as
        they are multiplied.
        """
        for i, j, h, g in pairs(self.q_at, self.k_at, *self.heads):
            q = np.asarray(self.q[i, h], np.float32) * np.float32(self.scale)
            yield i, j, h, g, rounded(q), rounded(self.k[j, g]), rounded(self.v[j, g])


def check_forward(case, o, lse):
    window, ahead, softcap = case.options
    group = case.heads[0] // case.heads[1]
    for i, j, h, g, q, k, v in case.problems():
        unit, scale = UNIT, 1
        if (i.stop - i.start) * group <= FEW_ROWS:
            q, k, v, unit, scale = case.q[i, h], case.k[j, g], case.v[j, g], 0, case.scale
        p, want_lse = probabilities(q, k, scale, window, ahead, softcap)
        limit = (unit + FLOAT) * (p @ np.abs(v))
        assert (np.abs(o[i, h] - p @ v) <= limit + 1e-30).all()
        none = np.isneginf(want_lse)
        np.testing.assert_array_equal(np.isneginf(lse[i, h]), none)
        assert np.allclose(lse[i, h][~none], want_lse[~none], rtol=FLOAT, atol=FLOAT)


def check_grad(case, o, lse, got):
    window, ahead, softcap = case.options
    want, limit = ([np.zeros(a.shape) for a in got] for _ in range(2))
    for i, j, h, g, q, k, v in case.problems():
        do, full = rounded(case.do[i, h]), np.asarray(case.do[i, h])
        scores, slope = q @ k.T, 1
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        seen = probabilities(q, k, 1, window, ahead)[0] > 0
        finite = np.where(np.isneginf(lse[i, h]), 0, lse[i, h])[:, None]
        p = np.where(seen, np.exp(np.where(seen, scores - finite, 0)), 0)
        dp, delta = do @ v.T, (np.asarray(o[i, h], np.float64) * full).sum(axis=1)[:, None]
        ds = p * slope * (dp - delta)
        size = p * (np.abs(do) @ np.abs(v).T + np.abs(o[i, h] * full).sum(axis=1)[:, None])
        error = UNIT * np.abs(ds) + FLOAT * (size + np.abs(scores) * np.abs(ds))
        want[0][i, h] += case.scale * ds @ k
        limit[0][i, h] += case.scale * error @ np.abs(k)
        want[1][j, g] += ds.T @ q
        limit[1][j, g] += error.T @ np.abs(q)
        want[2][j, g] += p.T @ do
        limit[2][j, g] += (UNIT + FLOAT) * p.T @ np.abs(do) + FLOAT * np.abs(scores * p).T @ np.abs(
            do
        )
    for a, b, most in zip(got, want, limit, strict=True):
        assert (np.abs(a - b) <= 1.01 * most + 1e-30).all()


def check(memory, case):
    o, lse, *got = case.run(memory)
    check_forward(case, o, lse)
    check_grad(case, o, lse, got)


CASES = [
    *({"lengths": [n], "d": 8 if n > 100 else 64} for n in LENGTHS),
    *({"lengths": [40], "d": d, "heads": (1, 1)} for d in WIDTHS),
    {"lengths": [5, 0, 1, 70, 33], "heads": (9, 3), "d": 17},
    {"lengths": [129, 3, 64], "heads": (4, 2), "d": 40},
    {"lengths": [150], "seen": (30, 0), "d": 8},
    {"lengths": [150], "seen": (0, 20), "d": 8},
    {"lengths": [70, 90], "seen": (64, 100), "d": 33},
    {"lengths": [70], "softcap": 2.0, "d": 32},
    {"lengths": [20, 40, 3], "keys": [100, 33, 200], "d": 24},
    {"lengths": [70, 9], "keys": [40, 0], "d": 16, "heads": (2, 2)},
    {"lengths": [300], "heads": (4, 1), "d": 8},
]
NAMES = ["-".join(f"{k}{v}" for k, v in case.items()) for case in CASES]


@pytest.mark.parametrize("options", CASES, ids=NAMES)
def test_forward_and_gradient(memory, rng, tiles, options):
    check(memory, Case(rng, **options))


@pytest.mark.skipif(len(TILE_FORMS) == 1, reason="needs the tile unit")
@pytest.mark.parametrize("options", CASES, ids=NAMES)
def test_the_unit_has_the_bits_of_the_emulation(memory, rng, options):
    case, results = Case(rng, **options), []
    for form in TILE_FORMS:
        _core.set_matmul_precision(form)
        try:
            results.append(case.run(memory))
        finally:
            _core.set_matmul_precision("float32")
    for got, want in zip(*results, strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("lengths", [[300], [3, 140, 0, 65], [1] * 20])
def test_any_number_of_threads_gives_the_same_bits(memory, rng, tiles, lengths):
    case = Case(rng, lengths, (6, 2), 40)
    first = on_threads(lambda: case.run(memory))
    before = _core.num_threads()
    try:
        _core.set_num_threads(64)
        for got, want in zip(case.run(memory), first, strict=True):
            assert got.tobytes() == want.tobytes()
    finally:
        _core.set_num_threads(before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(memory, rng, tiles, value):
    """One in a row of q: in the forward pass, its row of o and lse; in the backward pass, too, but
    for the keys of its sequence.
    """
    case = Case(rng, [20, 50, 40], (4, 2), 17)
    clean = case.run(memory)
    case.q[33, 1] = value
    o, lse, dq, dk, dv = case.run(memory)
    other = np.ones(lse.shape, bool)
    other[33, 1] = False
    assert (o[other] == clean[0][other]).all()
    assert (lse[other] == clean[1][other]).all()
    assert (dq[other] == clean[2][other]).all()
    assert np.isnan(o[33, 1]).all()
    keys = (np.arange(110) < 20) | (np.arange(110) >= 70)
    for got, want in ((dk, clean[3]), (dv, clean[4])):
        assert (got[keys] == want[keys]).all()
        assert (got[:, 1] == want[:, 1]).all()


@pytest.mark.parametrize("which", ["k", "v", "do"])
def test_nan_stays_in_its_sequence(memory, rng, tiles, which):
    case = Case(rng, [20, 33, 40], (4, 2), 17)
    clean = case.run(memory)
    getattr(case, which)[20] = np.nan
    own = (np.arange(93) >= 20) & (np.arange(93) < 53)
    for got, want in zip(case.run(memory), clean, strict=True):
        assert (got[~own] == want[~own]).all()


def test_a_tokens_bits_do_not_depend_on_the_length_of_its_batch(memory, rng, tiles):
    """Sequences of few rows are float32, whether other sequences are long or not."""
    case = Case(rng, [4, 60], (2, 1), 16, keys=[30, 60])
    o, lse = case.forward(memory)
    alone = forward(
        memory, case.q[:4], case.k[:30], case.v[:30], offsets([4]), offsets([30]), case.scale
    )
    assert o[:4].tobytes() == alone[0].tobytes()
    assert lse[:4].tobytes() == alone[1].tobytes()


def test_other_forms_of_bfloat16_leave_attention_in_float32(memory, rng, isa):
    case = Case(rng, [70, 33], (4, 2), 40)
    want = case.run(memory)
    _core.set_matmul_precision("bfloat16-emulated")
    try:
        for got, expected in zip(case.run(memory), want, strict=True):
            assert got.tobytes() == expected.tobytes()
        _core.set_matmul_precision(TILES_EMULATED)
        assert case.run(memory)[0].tobytes() != want[0].tobytes()
    finally:
        _core.set_matmul_precision("float32")
