"""The binding: arguments that it accepts and refuses. `test_calls.py` has its other calls."""

import re
import threading

import numpy as np
import pytest
from kernel_checks import f32, i32

from pyloss import _core

PLAIN = (0.0, 0.0, 0.0)  # label_smoothing, z_loss, softcap
NONE = (None, None, None)  # class_weight, dloss, dlse


def rms(**changed):
    """Call rms_norm_forward(x, w, eps, y, rstd) with some arguments replaced."""
    arguments = {"x": f32(3, 4), "w": f32(4), "eps": 1e-5, "y": f32(3, 4), "rstd": f32(3)} | changed
    return _core.rms_norm_forward(*arguments.values())


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(n):
    return np.zeros(4 * n + 1, np.uint8)[1:].view(np.float32)


# Arrays


def test_good_arguments_give_none():
    assert rms() is None
    assert rms(x=f32(3, 1, 4), y=f32(1, 3, 4)) is None
    assert rms(x=read_only(f32(3, 4)), eps=1) is None
    assert rms(x=f32(4), y=f32(4), rstd=f32(1)) is None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [[0.0] * 4] * 3}, TypeError, "x must be a numpy.ndarray, not list"),
        ({"x": None}, TypeError, "x must be a numpy.ndarray, not None"),
        ({"x": np.zeros((3, 4))}, TypeError, "x must have dtype float32, not float64"),
        ({"rstd": np.zeros(3, np.int32)}, TypeError, "rstd must have dtype float32, not int32"),
        (
            {"x": f32(3, 4).astype(">f4")},
            ValueError,
            "x must be C-contiguous, aligned and in native byte order",
        ),
        ({"x": f32(3, 8)[:, ::2]}, ValueError, "x must be C-contiguous"),
        ({"x": f32(4, 3).T}, ValueError, "x must be C-contiguous"),
        ({"w": unaligned(4)}, ValueError, "w must be C-contiguous, aligned"),
        ({"y": read_only(f32(3, 4))}, ValueError, "y is read-only"),
        (
            {"w": f32(5)},
            ValueError,
            "w has shape (5,); its axis 0 must be 4, not 5, to go with x of shape (3, 4)$",
        ),
        (
            {"y": f32(3, 5)},
            ValueError,
            "y has shape (3, 5); its axis 1 must be 4, not 5, to go with x of shape (3, 4)$",
        ),
        (
            {"y": f32(2, 4)},
            ValueError,
            "y has shape (2, 4); its axis 0 must be 3, not 2, to go with x of shape (3, 4)$",
        ),
        ({"rstd": f32(3, 1)}, ValueError, "rstd has 2 dimensions, expected 1"),
        ({"x": np.zeros((), np.float32)}, ValueError, "x has 0 dimensions, expected at least 1"),
        (
            {"x": f32(2, 3, 4)},
            ValueError,
            "y has shape (3, 4); its axis 0 must be 6, not 3, to go with x of shape (2, 3, 4)$",
        ),
        (
            {"y": f32(2, 1, 4)},
            ValueError,
            "y has shape (2, 1, 4); its leading axes must make 3 rows, not 2, to go with x of shape",
        ),
        ({"eps": "small"}, TypeError, "eps must be a finite number, not str"),
        ({"eps": None}, TypeError, "eps must be a finite number, not None"),
        ({"eps": 1j}, TypeError, "eps must be a finite number, not complex"),
        ({"eps": np.nan}, ValueError, "eps is nan; it must be a finite number"),
        ({"eps": -np.inf}, ValueError, "eps is -inf; it must be a finite number"),
        ({"eps": np.float32(np.inf)}, ValueError, "eps is inf; it must be a finite number"),
        (
            {"eps": 10**400},
            ValueError,
            "eps is a number of more than 40 digits; it must be a finite number",
        ),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")) as caught:
        rms(**changed)
    assert str(caught.value).startswith("rms_norm_forward: ")


def test_number_of_arguments():
    with pytest.raises(
        TypeError, match=r"^rms_norm_forward takes 5 arguments \(x, w, eps, y, rstd\), got 2$"
    ):
        _core.rms_norm_forward(f32(1), f32(1))
    with pytest.raises(TypeError):
        _core.add(a=f32(1), b=f32(1), y=f32(1))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (
            0.5,
            TypeError,
            "seed must be a whole number from -9223372036854775808 to 9223372036854775807, not float",
        ),
        ("1", TypeError, "seed must be a whole number .*, not str"),
        (
            1 << 63,
            ValueError,
            "seed is 9223372036854775808; it must be a whole number from -9223372036854775808 to 92",
        ),
        (-(1 << 63) - 1, ValueError, "seed is -9223372036854775809; it must be"),
        (
            1 << 20000,
            ValueError,
            "seed is a number of more than 40 digits; it must be a whole number",
        ),
        (np.uint64(2**64 - 1), ValueError, "seed is 18446744073709551615; it must be"),
    ],
    ids=["float", "text", "2^63", "below", "many digits", "uint64"],
)
def test_integers_are_integers_of_64_bits(seed, error, message):
    with pytest.raises(error, match=f"^dropout: {message}"):
        _core.dropout(f32(2), seed, 0.5, f32(2))
    _core.dropout(f32(2), np.int64(-1), np.float32(0.5), f32(2))


def example(name, text):
    """Valid arguments by an operation's specification: sizes 2 unless it says more, scalars 1."""
    made = []
    kinds = {
        "f32": np.float32,
        "f64": np.float64,
        "i32": np.int32,
        "u8": np.uint8,
        "float": np.float32,
        "acc": np.float32,
    }
    for word in text.split():
        if word == ">" or ":" not in word:
            continue
        label, _, rest = word.lstrip("+=").partition(":")
        kind, _, dims = re.split(r"[\^<]", rest)[0].partition("[")
        if kind in ("int", "real"):
            made.append((label, kind, 1))
            continue
        sizes = [
            {"+": 3, "/": 1}.get(d[1:2], 2) for d in dims.rstrip("]").replace("*", "").split(",")
        ]
        sizes = [
            int(d) if d.isdigit() else n
            for d, n in zip(dims.rstrip("]").split(","), sizes, strict=True)
        ]
        array = np.zeros(sizes, kinds.get(kind, np.float32))
        if "^" in word:
            array[-1] = 2
        made.append((label, kind, array))
    return made


@pytest.mark.parametrize(
    ("name", "text"), _core.ops(), ids=lambda value: value if " " not in value else ""
)
def test_every_scalar_of_every_operation(name, text):
    """A scalar that is not finite or does not fit its type is refused by name."""
    arguments = example(name, text)
    for i, (label, kind, _) in enumerate(arguments):
        bad = {
            "int": [1 << 63, -(1 << 64), 10**5000],
            "real": [np.nan, np.inf, -np.inf, 10**400],
        }.get(kind, [])
        for value in bad:
            given = [value if j == i else array for j, (_, _, array) in enumerate(arguments)]
            with pytest.raises(
                ValueError, match=f"^{name}: {label} is .*; it must be a (whole|finite) number"
            ):
                getattr(_core, name)(*given)


@pytest.mark.parametrize(
    ("name", "text"), _core.ops(), ids=lambda value: value if " " not in value else ""
)
def test_every_array_of_every_operation(name, text):
    """Errors about wrong sizes, types or ranks use words, not the specification's letters."""
    arguments = example(name, text)
    for i, (_, kind, array) in enumerate(arguments):
        if kind in ("int", "real"):
            continue
        larger, deep = (
            np.zeros([n + 1 for n in array.shape], array.dtype),
            np.zeros((2,) * 5, array.dtype),
        )
        for bad in (larger, deep, array.astype(np.complex64), array.tolist(), object()):
            given = [bad if j == i else other for j, (_, _, other) in enumerate(arguments)]
            try:
                getattr(_core, name)(*given)
            except (ValueError, TypeError) as error:
                assert (
                    str(error).startswith(f"{name}: ")
                    and "[*" not in str(error)
                    and '"' not in str(error)
                )
            else:
                assert bad is larger or bad is deep  # the only array with that letter


def test_overlap():
    both = f32(24)
    x = both[:12].reshape(3, 4)
    with pytest.raises(ValueError, match="y overlaps x"):
        rms(x=x, y=x)
    with pytest.raises(ValueError, match="y overlaps a"):
        _core.add(both[:8], f32(8), both[4:12])
    with pytest.raises(ValueError, match="y overlaps b"):
        _core.add(f32(8), both[4:12], both[:8])
    with pytest.raises(ValueError, match="dgate overlaps dup"):
        _core.swiglu_grad(f32(8), f32(8), f32(8), both[:8], both[:8])
    with pytest.raises(ValueError, match="rstd overlaps w"):
        _core.rms_norm_forward(f32(4, 4), both[:4], 0.0, f32(4, 4), both[:4])
    _core.add(both[:8], both[:8], both[:8])
    _core.add(both[:8], both[8:16], both[16:])


def test_in_place_only_where_the_elements_correspond():
    table = f32(2, 2)
    with pytest.raises(ValueError, match="y overlaps cos"):
        _core.rope(f32(1, 1, 4), i32(0), table, f32(2, 2), 0, table.reshape(1, 1, 4))
    labels = i32(0, 0)
    with pytest.raises(ValueError, match="dlogits overlaps labels"):
        _core.softmax_cross_entropy(
            *(f32(2, 1), labels, *PLAIN, *NONE),
            *(f32(2), None, labels.view(np.float32).reshape(2, 1)),
        )


def test_arrays_of_no_elements_overlap_nothing():
    empty = f32(0)
    _core.axpy(1.0, empty, empty)


# Rows of floats


def test_rows_of_any_float_type_and_stride():
    """`float` arguments may differ in type, `acc` has the widest; leading axes may be strided."""
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    whole, part = f32(12), np.zeros(4, np.float64)
    _core.stablemax_cross_entropy(x, np.zeros(12, np.int32), *NONE, whole, None, None)
    _core.kl_div(
        *(x[::-2, 1:3], x[::-2, 1:3].astype(np.float64), None, 1.0, 0.0, 1.0, 0.0),
        *(None, part, None, np.zeros((2, 2, 5))),
    )
    assert (part == 0).all()
    with pytest.raises(TypeError, match="loss must have dtype float64, not float32"):
        _core.kl_div(
            x[0], x[0].astype(np.float64), None, 1.0, 0.0, 1.0, 0.0, None, f32(4), None, None
        )
    narrow = f32(4)
    _core.stablemax_cross_entropy(x[::-2, 1:3], i32(0, 0, 0, 0), *NONE, narrow, None, None)
    assert (narrow == whole.reshape(3, 4)[::-2, 1:3].ravel()).all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.zeros((2, 3), np.int32),
            TypeError,
            "x must have dtype float32, float64, float16, or uint16 for bfloat16, not int32",
        ),
        ([[1.0]], TypeError, "x must be a numpy.ndarray, not list"),
        (np.zeros((3, 2), np.float32).T, ValueError, "x must be contiguous along its last axis"),
        (np.zeros((2, 3), ">f4"), ValueError, "native byte order"),
        (np.float32(1) * np.zeros(()), TypeError, "numpy.ndarray"),
        (np.array(1.0), ValueError, "0 dimensions, expected 1 to 3"),
        (np.zeros((1, 1, 1, 2)), ValueError, "4 dimensions, expected 1 to 3"),
    ],
)
def test_rows_refused(x, error, message):
    with pytest.raises(error, match=message):
        _core.argmax(x, i32(0, 0))


def test_strided_rows_overlap_by_their_extent():
    table = np.zeros((6, 4), np.float32)
    _core.stablemax(table[:2], None, table[2:4], None)
    with pytest.raises(ValueError, match="y overlaps x"):
        _core.stablemax(table[::2][:2], None, table[1:3], None)
    with pytest.raises(ValueError, match="dlogits overlaps logits"):
        _core.stablemax_cross_entropy(table[::2][:2], i32(0, 0), *NONE, f32(2), None, table[:2])
    _core.stablemax_cross_entropy(table[:2], i32(0, 0), *NONE, f32(2), None, table[:2])


# Indices


@pytest.mark.parametrize(
    ("bad", "position"), [((7, 0), 0), ((0, -1), 1), ((0, 2**31 - 1), 1), ((-(2**31), 0), 0)]
)
def test_index_out_of_range(bad, position):
    for call in (
        lambda ids: _core.embedding_forward(ids, f32(7, 2), f32(2, 2)),
        lambda ids: _core.embedding_grad(f32(2, 2), ids, f32(7, 2)),
        lambda ids: _core.gather_rows(f32(7, 2), ids, f32(2, 2)),
        lambda ids: _core.scatter_add_rows(f32(2, 2), ids, f32(7, 2)),
        lambda ids: _core.rope(f32(2, 1, 4), ids, f32(7, 2), f32(7, 2), 0, f32(2, 1, 4)),
    ):
        with pytest.raises(
            ValueError, match=rf"at position {position} is {bad[position]}, outside \[0, 7\)"
        ):
            call(i32(*bad))


def test_labels():
    for label in (-2, 5):
        with pytest.raises(
            ValueError, match=rf"labels at position 1 is {label}, outside \[0, 5\) and not ignored"
        ):
            _core.softmax_cross_entropy(
                f32(2, 5), i32(-1, label), *PLAIN, *NONE, f32(2), None, None
            )
    with pytest.raises(ValueError, match="labels at position 0 is 0"):
        _core.softmax_cross_entropy(f32(1, 0), i32(0), *PLAIN, *NONE, f32(1), None, None)
    _core.softmax_cross_entropy(f32(1, 0), i32(-1), *PLAIN, *NONE, f32(1), None, f32(1, 0))
    with pytest.raises(TypeError, match="labels must have dtype int32, not int64"):
        _core.softmax_cross_entropy(
            f32(1, 5), np.zeros(1, np.int64), *PLAIN, *NONE, f32(1), None, None
        )


def test_twice_a_dimension():
    _core.rope(f32(1, 1, 5), i32(0), f32(3, 2), f32(3, 2), 0, f32(1, 1, 5))
    for d in (0, 4, 5):
        with pytest.raises(
            ValueError,
            match=f"rope: axis 2 of x has size {d}; it must be at least twice axis 1 of cos, 3",
        ):
            _core.rope(f32(1, 1, d), i32(0), f32(3, 3), f32(3, 3), 0, f32(1, 1, d))


def test_sums_of_dimensions():
    parts = f32(2, 3), f32(2, 4), f32(2, 1)
    assert _core.concat_columns(*parts, ...).shape == (2, 8)
    assert _core.concat_columns(*parts[:2], None, ...).shape == (2, 7)
    for wrong in (f32(2, 7), f32(2, 9), f32(3, 8)):
        with pytest.raises(ValueError, match="concat_columns: y has shape"):
            _core.concat_columns(*parts, wrong)
    with pytest.raises(ValueError, match="concat_columns: y overlaps a"):
        _core.concat_columns(parts[0], f32(2, 0), None, parts[0])


@pytest.mark.parametrize("offsets", [(), (0, 3), (1, 4), (0, 3, 2, 4), (0, -1, 4), (0, 5)])
def test_offsets(offsets):
    offsets = i32(*offsets)
    with pytest.raises(
        ValueError, match="must begin with 0, never decrease and end with 4|offsets has shape"
    ):
        _core.attention_forward(
            f32(4, 2, 8),
            f32(4, 1, 8),
            f32(4, 1, 8),
            offsets,
            offsets,
            1.0,
            0.0,
            0,
            0,
            f32(4, 2, 8),
            f32(4, 2),
        )


@pytest.mark.parametrize(
    ("bounds", "good"), [((0, 4), True), ((0, 2), True), ((0, 5), False), ((1, 2), False)]
)
def test_offsets_of_a_part(bounds, good):
    """Keys may be the first rows of a larger store."""

    def attend():
        _core.attention_forward(
            f32(1, 2, 8),
            f32(4, 1, 8),
            f32(4, 1, 8),
            i32(0, 1),
            i32(*bounds),
            1.0,
            0.0,
            0,
            0,
            f32(1, 2, 8),
            f32(1, 2),
        )

    if good:
        return attend()
    with pytest.raises(
        ValueError, match="k_offsets must begin with 0, never decrease and end with at most 4"
    ):
        attend()


def test_heads_must_share_evenly():
    offsets = i32(0, 4)
    with pytest.raises(
        ValueError, match="axis 1 of q has size 3; it must be a multiple of axis 1 of k, 2"
    ):
        _core.attention_forward(
            f32(4, 3, 8),
            f32(4, 2, 8),
            f32(4, 2, 8),
            offsets,
            offsets,
            1.0,
            0.0,
            0,
            0,
            f32(4, 3, 8),
            f32(4, 3),
        )


def test_indices_that_change_while_the_kernel_runs():
    """The kernel reads the checked indices, not those that another thread writes meanwhile."""
    ids, table, rows = np.zeros(20_000, np.int32), np.ones((3, 64), np.float32), f32(20_000, 64)
    done = threading.Event()

    def change():
        while not done.is_set():
            ids[:] = 2**31 - 1
            ids[:] = 0

    writer = threading.Thread(target=change)
    writer.start()
    good = 0
    try:
        for _ in range(60):
            try:
                _core.embedding_forward(ids, table, rows)
                good += 1
            except ValueError as error:
                assert "outside [0, 3)" in str(error)
            assert ((rows == 1) | (rows == 0)).all()
    finally:
        done.set()
        writer.join()
