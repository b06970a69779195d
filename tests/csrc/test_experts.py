"""Products of experts against float64: operations, formats, instruction sets, spreads of rows."""

import numpy as np
import pytest
from kernel_checks import assert_close, on_threads
from stored_weights import stored
from test_matmul import near, normal, unaligned, wide

from pyloss import _core
from pyloss.weights.weight import FORMATS, Weight

pytestmark = pytest.mark.usefixtures("place")

# Rows of each expert: none, one each, few and many, all to one, more than one block of A, more
# experts than one batch has.
SPREADS = {
    "none": [0, 0, 0],
    "one expert": [7],
    "single rows": [1, 0, 1, 1],
    "few and many": [3, 0, 5, 4, 0, 37, 1, 0],
    "all to one": [0, 0, 61, 0],
    "long": [2, 1100, 0, 9],
    "many experts": [i % 7 for i in range(75)],
}
SIZES = [(5, 7, 1), (33, 40, 8), (97, 65, 3), (64, 96, 16)]


def offsets_of(memory, counts):
    return memory.put(np.concatenate(([0], np.cumsum(counts))), np.int32)


def per_expert(x, matrices, counts):
    """Multiply each row of x by the matrix of its expert, in float64."""
    parts = np.split(wide(x), np.cumsum(counts)[:-1])
    return np.concatenate(
        [part @ wide(matrix) for part, matrix in zip(parts, matrices, strict=True)]
    )


def repeated(values, counts):
    return np.repeat(wide(values), counts, axis=0)


def check_experts(memory, rng, weight, dense, counts, rank, scale):
    """Check every operation over the experts `weight`; `dense` [E, out, in] is its float32 form."""
    (e, o, i), n = dense.shape, sum(counts)
    offsets = offsets_of(memory, counts)
    x, dy, bias = (memory.put(normal(rng, *s)) for s in ((n, i), (n, o), (e, o)))
    a, b = memory.put(normal(rng, e, rank, i)), memory.put(normal(rng, e, o, rank))
    factor = memory.put(rng.uniform(0.5, 1.5, (e, o)))
    plain, hidden = (
        per_expert(x, dense.transpose(0, 2, 1), counts),
        per_expert(x, a.transpose(0, 2, 1), counts),
    )
    y = memory.new((n, o))
    _core.experts_forward(x, weight, None, offsets, None, None, 0.0, None, y)
    near(y, plain, i)
    y = memory.new((n, o))
    _core.experts_forward(x, weight, None, offsets, None, None, 0.0, factor, y)
    near(y, plain * repeated(factor, counts), i)
    given = memory.put(hidden / np.sqrt(i + 1))
    y = memory.new((n, o))
    _core.experts_forward(x, weight, bias, offsets, given, b, scale, None, y)
    near(
        y,
        plain + repeated(bias, counts) + scale * per_expert(given, b.transpose(0, 2, 1), counts),
        i + rank,
    )
    y, h = memory.new((n, o)), memory.new((n, rank))
    _core.experts_lora_forward(x, weight, bias, offsets, a, b, scale, None, h, y)
    near(h, hidden, i)
    near(
        y,
        plain + repeated(bias, counts) + scale * per_expert(hidden, b.transpose(0, 2, 1), counts),
        i + rank * i,
    )
    y = memory.new((n, o))
    _core.experts_lora_forward(x, weight, None, offsets, a, b, scale, factor, h, y)
    near(
        y,
        plain * repeated(factor, counts) + scale * per_expert(hidden, b.transpose(0, 2, 1), counts),
        i + rank * i,
    )

    plain, dh_want, before = (
        per_expert(dy, dense, counts),
        scale * per_expert(dy, b, counts),
        normal(rng, n, i),
    )
    given = memory.put(dh_want / np.sqrt(o + 1))
    for accumulate in (0, 1):
        dx = memory.put(before)
        _core.experts_input_grad(dy, weight, offsets, None, None, accumulate, None, dx)
        near(dx, accumulate * before + plain, o + 1)
        dx = memory.put(before)
        _core.experts_input_grad(dy, weight, offsets, None, None, accumulate, factor, dx)
        near(
            dx,
            accumulate * before + per_expert(dy * repeated(factor, counts), dense, counts),
            2 * o + 1,
        )
        dx = memory.put(before)
        _core.experts_input_grad(dy, weight, offsets, given, a, accumulate, None, dx)
        near(dx, accumulate * before + plain + per_expert(given, a, counts), o + rank + 1)
        dx, dh = memory.put(before), memory.new((n, rank))
        _core.experts_lora_input_grad(dy, weight, offsets, a, b, scale, accumulate, None, dh, dx)
        near(dh, dh_want, o)
        near(dx, accumulate * before + plain + per_expert(dh_want, a, counts), o + rank * o + 1)

    dw, at = memory.new((e, o, i)), np.cumsum(counts)[:-1]
    _core.experts_weight_grad(dy, x, offsets, scale, dw)
    parts = zip(np.split(wide(dy), at), np.split(wide(x), at), strict=True)
    near(dw, scale * np.stack([p.T @ q for p, q in parts]), max(counts))
    assert not dw[np.array(counts) == 0].any()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("o", "i", "rank"), SIZES)
def test_float_experts(memory, rng, spread, o, i, rank):
    counts = SPREADS[spread]
    weight = memory.put(normal(rng, len(counts), o, i))
    check_experts(memory, rng, weight, weight, counts, rank, 0.5)


def test_deeper_and_wider_than_a_block(memory, rng):
    weight = memory.put(normal(rng, 3, 193, 2401))
    check_experts(memory, rng, weight, weight, [15, 2, 6], 8, 0.5)
    weight = memory.put(normal(rng, 3, 2310, 64))
    check_experts(memory, rng, weight, weight, [3, 40, 0], 33, 0.5)


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format(memory, rng, format):
    """Each matrix has its own memory, as in a file with one tensor per expert."""
    stack = [unaligned(stored(rng, 64, 256, format)) for _ in range(4)]
    dense = np.stack([weight.dequantize() for weight in stack])
    for counts in ([0, 4, 1, 0], [17, 3, 0, 30]):
        check_experts(memory, rng, tuple(weight.handle for weight in stack), dense, counts, 8, -1.5)


def test_threads_give_the_same_bits(rng):
    counts = [3, 0, 130, 1, 45, 6, 0, 300]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    (n, e), o, i, r = (sum(counts), len(counts)), 193, 130, 8
    x, dy, w, a, b = (normal(rng, *s) for s in ((n, i), (n, o), (e, o, i), (e, r, i), (e, o, r)))
    factor = normal(rng, e, o)

    def run():
        h, y, dh, dx, dw = (
            np.empty(s, np.float32) for s in ((n, r), (n, o), (n, r), (n, i), (e, o, i))
        )
        _core.experts_lora_forward(x, w, factor, offsets, a, b, 0.5, factor, h, y)
        _core.experts_lora_input_grad(dy, w, offsets, a, b, 0.5, 0, factor, dh, dx)
        _core.experts_weight_grad(dy, x, offsets, 1.0, dw)
        return h, y, dh, dx, dw

    on_threads(run)


def test_an_expert_computes_what_it_does_alone(rng):
    """The bits of one expert's rows do not depend on the number of rows of the others."""
    counts, o, i, r = [9, 0, 2, 160], 97, 385, 8
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    x, w, a, b = (normal(rng, *s) for s in ((sum(counts), i), (4, o, i), (4, r, i), (4, o, r)))
    h, y = np.empty((sum(counts), r), np.float32), np.empty((sum(counts), o), np.float32)
    _core.experts_lora_forward(x, w, None, offsets, a, b, 0.5, None, h, y)
    for e in range(4):
        rows = slice(offsets[e], offsets[e + 1])
        inner, out = np.empty((counts[e], r), np.float32), np.empty((counts[e], o), np.float32)
        alone = np.array([0, counts[e]], np.int32)
        _core.experts_lora_forward(
            x[rows], w[e : e + 1], None, alone, a[e : e + 1], b[e : e + 1], 0.5, None, inner, out
        )
        assert out.tobytes() == y[rows].tobytes() and inner.tobytes() == h[rows].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_expert(rng, bad):
    w, offsets = normal(rng, 3, 33, 40), np.array([0, 5, 5, 25], np.int32)
    w[1] = bad
    y = np.full((25, 33), np.nan, np.float32)
    _core.experts_forward(normal(rng, 25, 40), w, None, offsets, None, None, 0.0, None, y)
    assert np.isfinite(y).all()
    w[2, 3, 4] = bad
    _core.experts_forward(normal(rng, 25, 40), w, None, offsets, None, None, 0.0, None, y)
    assert set(zip(*np.nonzero(~np.isfinite(y)), strict=True)) == {(n, 3) for n in range(5, 25)}


# Rows of tokens and rows of experts


@pytest.mark.parametrize(
    ("n", "k", "d"), [(0, 2, 5), (1, 1, 1), (5, 2, 33), (40, 8, 100), (3, 3, 9000)]
)
def test_rows(memory, rng, n, k, d):
    m = n * k
    rows = memory.put(rng.permutation(m).reshape(n, k), np.int32)
    x, before = memory.put(normal(rng, m, d)), normal(rng, n, d)
    for accumulate in (0, 1):
        y = memory.put(before)
        _core.combine_rows(x, rows, accumulate, y)
        assert_close(y, accumulate * before + wide(x)[rows].sum(1), k + 1)
    factor, dy = memory.put(normal(rng, m)), memory.put(normal(rng, m, d))
    y = memory.new((m, d))
    _core.scale_rows(x, factor, y)
    np.testing.assert_array_equal(y, x * factor[:, None])
    dx, dfactor = memory.new((m, d)), memory.new((m,))
    _core.scale_rows_grad(dy, x, factor, dx, dfactor)
    np.testing.assert_array_equal(dx, dy * factor[:, None])
    near(dfactor, (wide(dy) * x).sum(1), d)


# Checks of the binding


def call(**changed):
    """Call experts_forward for three experts [5, 4] with some arguments replaced."""
    f = np.zeros
    arguments = {
        "x": f((6, 4), np.float32),
        "w": f((3, 5, 4), np.float32),
        "bias": None,
        "offsets": np.array([0, 2, 2, 6], np.int32),
        "xa": None,
        "b": None,
        "scale": 0.0,
        "row_factor": None,
        "y": f((6, 5), np.float32),
    } | changed
    return _core.experts_forward(*arguments.values())


def handles(*shapes, format="f32"):
    return tuple(Weight.quantize(np.zeros(shape), format).handle for shape in shapes)


def test_stacks_that_can_be():
    assert call() is None
    assert call(w=handles((5, 4), (5, 4), (5, 4))) is None
    empty = np.zeros((0, 4), np.float32)
    assert call(x=empty, offsets=np.zeros(4, np.int32), y=np.zeros((0, 5), np.float32)) is None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"w": np.zeros((3, 5), np.float32)}, ValueError, "w has 2 dimensions, expected 3"),
        ({"w": np.zeros((3, 5, 4))}, TypeError, "w must have dtype float32, not float64"),
        ({"w": np.zeros((3, 5, 8), np.float32)[..., ::2]}, ValueError, "w must be C-contiguous"),
        ({"w": None}, TypeError, "w must be a numpy.ndarray"),
        ({"w": ()}, ValueError, "w has 0 matrices, expected 1 to 65536"),
        ({"w": np.zeros((0, 5, 4), np.float32)}, ValueError, "w has 0 matrices"),
        (
            {"w": handles((5, 4))[0]},
            TypeError,
            "w must be a float32 array or a tuple of tuples, not ndarray",
        ),
        (
            {"w": handles((5, 4), (5, 4), (4, 4))},
            ValueError,
            "matrix 2 of w must have the format, shape",
        ),
        (
            {"w": handles((5, 4), (5, 4)) + handles((5, 4), format="f16")},
            ValueError,
            "matrix 2 of w must have the format",
        ),
        (
            {"w": (*handles((5, 4), (5, 4)), (np.zeros(3, np.uint8), 0, 5, 4, 0))},
            ValueError,
            "w has 3 bytes; its 5 rows need 16",
        ),
        (
            {"w": handles((5, 4), (5, 4))},
            ValueError,
            "offsets has shape .4,.; its axis 0 must be 3, not 4, to go with w of shape .2, 5, 4.",
        ),
        (
            {"w": np.zeros((3, 6, 4), np.float32)},
            ValueError,
            "y has shape .6, 5.; its axis 1 must be 6",
        ),
        (
            {"offsets": np.array([0, 3, 2, 6], np.int32)},
            ValueError,
            "offsets must begin with 0, never decrease and end with 6",
        ),
        ({"offsets": np.array([0, 2, 2, 5], np.int32)}, ValueError, "end with 6"),
        ({"offsets": np.array([1, 2, 2, 6], np.int32)}, ValueError, "begin with 0"),
    ],
)
def test_stacks_that_cannot_be(changed, error, message):
    with pytest.raises(error, match=f"experts_forward: .*{message}".replace("[", r"\[")):
        call(**changed)


def test_an_output_may_lie_between_the_matrices_but_not_over_one():
    memory = np.zeros((6, 6, 5), np.float32)
    flat = memory.reshape(6, 120 // 4)
    weights = [Weight(flat[i, :20].view(np.uint8), "f32", (5, 4)) for i in (0, 2, 5)]
    stack = tuple(weight.handle for weight in weights)
    assert call(w=stack, y=memory[3]) is None
    with pytest.raises(ValueError, match="y overlaps w"):
        call(w=stack, y=memory[2])


def test_indices_of_rows_are_checked():
    with pytest.raises(ValueError, match="rows at position 1 is 4, outside"):
        _core.combine_rows(
            np.zeros((4, 3), np.float32),
            np.array([[0, 4]], np.int32),
            0,
            np.zeros((1, 3), np.float32),
        )
