"""What the binding accepts and refuses, calls from several threads, after fork, and reused buffers."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from pyloss import _core
from pyloss.weights import FORMATS


def f32(*shape):
    return np.zeros(shape, np.float32)


PLAIN = (0.0, 0.0, 0.0)  # label_smoothing, z_loss, softcap


def i32(*values):
    return np.array(values, np.int32)


def rms(**changed):
    """rms_norm_forward(x, w, eps, y, rstd) with some arguments replaced."""
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
        ({"x": [[0.0] * 4] * 3}, TypeError, "x must be a numpy.ndarray, not <class 'list'>"),
        ({"x": None}, TypeError, "x must be a numpy.ndarray"),
        ({"x": np.zeros((3, 4))}, TypeError, "x must have dtype f32, not float64"),
        ({"rstd": np.zeros(3, np.int32)}, TypeError, "rstd must have dtype f32, not int32"),
        ({"x": f32(3, 4).astype(">f4")}, ValueError, "x must be C-contiguous, aligned and in native byte order"),
        ({"x": f32(3, 8)[:, ::2]}, ValueError, "x must be C-contiguous"),
        ({"x": f32(4, 3).T}, ValueError, "x must be C-contiguous"),
        ({"w": unaligned(4)}, ValueError, "w must be C-contiguous, aligned"),
        ({"y": read_only(f32(3, 4))}, ValueError, "y is read-only"),
        ({"w": f32(5)}, ValueError, "w has size 5 along axis 0 where the other arguments give 4"),
        ({"y": f32(3, 5)}, ValueError, "y has size 5 along axis 1"),
        ({"y": f32(2, 4)}, ValueError, "y has size 2 along axis 0"),
        ({"rstd": f32(3, 1)}, ValueError, "rstd has 2 dimensions, expected 1"),
        ({"x": np.zeros((), np.float32)}, ValueError, "x has 0 dimensions, expected at least 1"),
        ({"eps": "small"}, TypeError, "real number"),
        ({"eps": None}, TypeError, "real number"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")) as caught:
        rms(**changed)
    if "eps" not in changed:
        assert str(caught.value).startswith("rms_norm_forward: ")


def test_number_of_arguments():
    with pytest.raises(TypeError, match="takes 5 arguments .* got 2"):
        _core.rms_norm_forward(f32(1), f32(1))
    with pytest.raises(TypeError):
        _core.add(a=f32(1), b=f32(1), y=f32(1))


def test_integers_are_integers():
    for seed, error in ((0.5, TypeError), (1 << 63, OverflowError), ("1", TypeError)):
        with pytest.raises(error):
            _core.dropout(f32(2), seed, 0.5, f32(2))
    _core.dropout(f32(2), np.int64(-1), np.float32(0.5), f32(2))


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
        _core.softmax_cross_entropy(f32(2, 1), labels, *PLAIN, None, f32(2), labels.view(np.float32).reshape(2, 1))


def test_arrays_of_no_elements_overlap_nothing():
    empty = f32(0)
    _core.axpy(1.0, empty, empty)


# Rows of floats


def test_rows_of_any_float_type_and_stride():
    """Each `float` argument has a type of its own; `acc` follows the widest; leading axes may have any stride."""
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    whole, part = f32(12), np.zeros(4, np.float64)
    _core.stablemax_cross_entropy(x, np.zeros(12, np.int32), None, whole, None)
    _core.kl_div(x[::-2, 1:3], x[::-2, 1:3].astype(np.float64), 1.0, None, part, None, np.zeros((2, 2, 5)))
    assert (part == 0).all()
    with pytest.raises(TypeError, match="loss must have dtype f64, not float32"):
        _core.kl_div(x[0], x[0].astype(np.float64), 1.0, None, f32(4), None, None)
    narrow = f32(4)
    _core.stablemax_cross_entropy(x[::-2, 1:3], i32(0, 0, 0, 0), None, narrow, None)
    assert (narrow == whole.reshape(3, 4)[::-2, 1:3].ravel()).all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((2, 3), np.int32), TypeError, r"x must have dtype f32, f64, f16 or u16 \(bf16\), not int32"),
        ([[1.0]], TypeError, "x must be a numpy.ndarray, not <class 'list'>"),
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
        _core.stablemax_cross_entropy(table[::2][:2], i32(0, 0), None, f32(2), table[:2])
    _core.stablemax_cross_entropy(table[:2], i32(0, 0), None, f32(2), table[:2])


# Indices


@pytest.mark.parametrize(("bad", "position"), [((7, 0), 0), ((0, -1), 1), ((0, 2**31 - 1), 1), ((-(2**31), 0), 0)])
def test_index_out_of_range(bad, position):
    for call in (
        lambda ids: _core.embedding_forward(ids, f32(7, 2), f32(2, 2)),
        lambda ids: _core.embedding_grad(f32(2, 2), ids, f32(7, 2)),
        lambda ids: _core.gather_rows(f32(7, 2), ids, f32(2, 2)),
        lambda ids: _core.scatter_add_rows(f32(2, 2), ids, f32(7, 2)),
        lambda ids: _core.rope(f32(2, 1, 4), ids, f32(7, 2), f32(7, 2), 0, f32(2, 1, 4)),
    ):
        with pytest.raises(ValueError, match=rf"at position {position} is {bad[position]}, outside \[0, 7\)"):
            call(i32(*bad))


def test_labels():
    for label in (-2, 5):
        with pytest.raises(ValueError, match=rf"labels at position 1 is {label}, outside \[0, 5\) and not ignored"):
            _core.softmax_cross_entropy(f32(2, 5), i32(-1, label), *PLAIN, None, f32(2), None)
    with pytest.raises(ValueError, match="labels at position 0 is 0"):
        _core.softmax_cross_entropy(f32(1, 0), i32(0), *PLAIN, None, f32(1), None)
    _core.softmax_cross_entropy(f32(1, 0), i32(-1), *PLAIN, None, f32(1), f32(1, 0))
    with pytest.raises(TypeError, match="labels must have dtype i32, not int64"):
        _core.softmax_cross_entropy(f32(1, 5), np.zeros(1, np.int64), *PLAIN, None, f32(1), None)


def test_half_dimensions():
    with pytest.raises(ValueError, match="D = 5 must be even"):
        _core.rope(f32(1, 1, 5), i32(0), f32(3, 2), f32(3, 2), 0, f32(1, 1, 5))
    with pytest.raises(ValueError, match="cos has size 3 along axis 1 where the other arguments give 2"):
        _core.rope(f32(1, 1, 4), i32(0), f32(3, 3), f32(3, 3), 0, f32(1, 1, 4))


@pytest.mark.parametrize("offsets", [(), (0, 3), (1, 4), (0, 3, 2, 4), (0, -1, 4), (0, 5)])
def test_offsets(offsets):
    offsets = i32(*offsets)
    with pytest.raises(ValueError, match="must begin with 0, never decrease and end with 4|offsets has size"):
        _core.attention_forward(f32(4, 2, 8), f32(4, 1, 8), f32(4, 1, 8), offsets, offsets, 1.0, 0, f32(4, 2, 8), f32(4, 2))


def test_heads_must_share_evenly():
    offsets = i32(0, 4)
    with pytest.raises(ValueError, match="H = 3 is not a multiple of G = 2"):
        _core.attention_forward(f32(4, 3, 8), f32(4, 2, 8), f32(4, 2, 8), offsets, offsets, 1.0, 0, f32(4, 3, 8), f32(4, 3))


# Weight handles: (bytes, format, rows, cols, head_dim[, groups])

WHOLE = {name: layout for name, layout in FORMATS.items() if not layout.bits}


def embed(handle, rows=4, cols=256):
    _core.embedding_forward(i32(0, rows - 1), handle, f32(2, cols))


def raw(size):
    return np.zeros(size, np.uint8)


@pytest.mark.parametrize("layout", WHOLE.values(), ids=WHOLE)
def test_weight_sizes(layout):
    code, row = layout.code, 256 // layout.elements * layout.bytes
    embed((raw(4 * row), code, 4, 256, 0))
    embed((raw(4 * row), code, 4, 256, 2))
    for size in (4 * row - 1, 4 * row + 1, 0, 8 * row):
        with pytest.raises(ValueError, match=f"w has {size} bytes where 4 rows need {row} each"):
            embed((raw(size), code, 4, 256, 0))
    if layout.elements > 1:
        with pytest.raises(ValueError, match=f"blocks of {layout.elements}"):
            embed((raw(4 * row), code, 4, 256 + 16, 0))
    with pytest.raises(ValueError, match="must come without groups"):
        embed((raw(4 * row), code, 4, 256, 0, AFFINE))


# Four rows of 256, in groups of 64: 16 of them.
AFFINE = (64, 0, raw(32), raw(32), 1, None, None, None, 0, 0.0)
NF4 = (64, 0, raw(64), None, 0, raw(64), None, None, 0, 0.0)
DOUBLE = (64, 0, raw(16), None, 0, raw(64), raw(1024), raw(4), 256, 0.5)


def grouped(groups, code=15, row=128):
    return (raw(4 * row), code, 4, 256, 0, groups)


def changed(groups, **parts):
    names = ("size", "first", "scales", "offsets", "type", "table", "map", "nested", "nested_size", "nested_offset")
    return tuple(parts.get(name, part) for name, part in zip(names, groups, strict=True))


def test_weights_with_groups():
    for code, row in zip(range(13, 19), (64, 96, 128, 160, 192, 256), strict=True):
        embed(grouped(AFFINE, code, row))
    embed(grouped(NF4, 19))
    embed(grouped(DOUBLE, 19))
    embed(grouped(changed(DOUBLE, first=64 * 16, scales=raw(32)), 19))
    embed(grouped(changed(AFFINE, type=0, scales=raw(64), offsets=raw(64))))


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        (grouped(AFFINE)[:5], ValueError, "must come with groups"),
        (grouped(AFFINE, 20), ValueError, "unknown format 20"),
        (grouped(AFFINE, 16), ValueError, "has 512 bytes where 4 rows need 160"),
        (grouped(None), TypeError, "groups of w must be a tuple"),
        (grouped(AFFINE[:9]), TypeError, "groups of w must be a tuple"),
        (grouped(changed(AFFINE, size=0)), ValueError, "cannot have groups of 0"),
        (grouped(changed(AFFINE, size=48)), ValueError, "groups of 48"),
        (grouped(changed(AFFINE, size=16)), ValueError, "groups of 16"),
        (grouped(changed(AFFINE, size=-64)), ValueError, "groups of -64"),
        (grouped(changed(AFFINE, size=2**62)), ValueError, "groups of"),
        (grouped(changed(AFFINE, first=-32)), ValueError, "from -32"),
        (grouped(changed(AFFINE, first=16)), ValueError, "from 16"),
        (grouped(changed(AFFINE, first=2**62)), ValueError, "from"),
        (grouped(changed(AFFINE, first=64)), ValueError, "the scales of w have 32 bytes where 34 are needed"),
        (grouped(changed(AFFINE, first=2**39)), ValueError, "the scales of w have 32 bytes"),
        (grouped(changed(AFFINE, type=3)), ValueError, "format 3"),
        (grouped(changed(AFFINE, type=-1)), ValueError, "format -1"),
        (grouped(changed(AFFINE, type=0)), ValueError, "the scales of w have 32 bytes where 64"),
        (grouped(changed(AFFINE, scales=raw(31))), ValueError, "the scales of w have 31 bytes where 32"),
        (grouped(changed(AFFINE, offsets=raw(31))), ValueError, "the offsets of w have 31 bytes where 32"),
        (grouped(changed(AFFINE, scales=None)), TypeError, "w must be a numpy.ndarray"),
        (grouped(changed(AFFINE, scales=f32(64))), TypeError, "u8"),
        (grouped(changed(AFFINE, scales=raw(64)[::2])), ValueError, "C-contiguous"),
        (grouped(changed(AFFINE, offsets=None)), ValueError, "other parts"),
        (grouped(changed(AFFINE, table=raw(64))), ValueError, "other parts"),
        (grouped(changed(AFFINE, map=raw(1024), nested=raw(4), nested_size=256)), ValueError, "other parts"),
        (grouped(changed(AFFINE, size="64")), TypeError, None),
        (grouped(changed(AFFINE, nested_offset=None)), TypeError, None),
        (grouped(NF4), ValueError, "other parts"),
        (grouped(changed(NF4, table=raw(60)), 19), ValueError, "the table of w have 60 bytes where 64"),
        (grouped(changed(NF4, table=None), 19), ValueError, "other parts"),
        (grouped(changed(NF4, offsets=raw(64)), 19), ValueError, "other parts"),
        (grouped(changed(NF4, map=raw(1024), nested_size=256), 19), ValueError, "other parts"),
        (grouped(changed(NF4, nested=raw(1024), nested_size=256), 19), ValueError, "other parts"),
        (grouped(changed(DOUBLE, map=raw(1020)), 19), ValueError, "the map of w have 1020 bytes"),
        (grouped(changed(DOUBLE, nested=raw(0)), 19), ValueError, "the nested of w have 0 bytes where 4"),
        (grouped(changed(DOUBLE, nested_size=8), 19), ValueError, "the nested of w have 4 bytes where 8"),
        (grouped(changed(DOUBLE, nested_size=0), 19), ValueError, "in groups of 0"),
        (grouped(changed(DOUBLE, nested_size=3), 19), ValueError, "in groups of 3"),
    ],
)  # fmt: skip
def test_malformed_groups(handle, error, message):
    with pytest.raises(error, match=message):
        embed(handle)


@pytest.mark.parametrize(
    ("handle", "error", "message"),
    [
        ((raw(1024), 20, 4, 64, 0), ValueError, "unknown format 20"),
        ((raw(1024), -1, 4, 64, 0), ValueError, "unknown format -1"),
        ((raw(1024), 2**40, 4, 64, 0), ValueError, "unknown format"),
        ((raw(1024), 2**70, 4, 64, 0), OverflowError, None),
        ((raw(1024), 0, -4, -64, 0), ValueError, "cannot be -4 rows"),
        ((raw(1024), 0, 4, -64, 0), ValueError, "cannot be"),
        ((raw(0), 0, 2**62, 4, 0), ValueError, "cannot be"),
        ((raw(0), 0, 2**40, 2**40, 0), ValueError, "has 0 bytes"),
        ((raw(136), 3, 4, 33, 0), ValueError, "blocks of 32"),
        ((raw(1024), 0, 4, 64, 3), ValueError, "heads of 3"),
        ((raw(1024), 0, 4, 64, 8), ValueError, "heads of 8"),
        ((raw(1024), 0, 4, 64, -2), ValueError, "heads of -2"),
        ((raw(1024), 0, 4, 64), TypeError, "must be a tuple"),
        ((raw(1024), 0, 4, 64, 0, 0, 0), TypeError, "must be a tuple"),
        ((), TypeError, "must be a tuple"),
        ((raw(1024), "f32", 4, 64, 0), TypeError, None),
        ((raw(1024), 0.0, 4, 64, 0), TypeError, None),
        ((raw(1024), None, 4, 64, 0), TypeError, None),
        ((f32(256), 0, 4, 64, 0), TypeError, "w must have dtype u8, not float32"),
        ((bytes(1024), 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((memoryview(bytes(1024)), 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((None, 0, 4, 64, 0), TypeError, "w must be a numpy.ndarray"),
        ((raw(2048)[::2], 0, 4, 64, 0), ValueError, "w must be C-contiguous"),
        ((raw(1280), 0, 5, 64, 0), None, ""),
        ((raw(1280), 0, 4, 80, 0), ValueError, "y has size 64 along axis 1"),
        (f32(256), ValueError, "w has 1 dimensions, expected 2"),
        (np.zeros((4, 64)), TypeError, "w must have dtype f32"),
        ([0] * 5, TypeError, "w must be a numpy.ndarray"),
    ],
)
def test_malformed_weights(handle, error, message):
    if error is None:
        embed(handle, cols=64)
        return
    with pytest.raises(error, match=message):
        embed(handle, cols=64)


def test_weights_over_foreign_memory():
    buffer = np.arange(256, dtype=np.float32).tobytes()
    y = f32(1, 64)
    _core.embedding_forward(i32(3), (np.frombuffer(buffer, np.uint8), 0, 4, 64, 0), y)
    assert (y[0] == np.arange(192, 256)).all()


def test_rotary_rows_are_read_in_file_order():
    w = np.arange(8, dtype=np.float32).reshape(8, 1)
    y = f32(8, 1)
    _core.embedding_forward(np.arange(8, dtype=np.int32), (w.view(np.uint8).ravel(), 0, 8, 1, 4), y)
    assert y.ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_output_may_not_overlap_a_weight():
    store = raw(1024)
    with pytest.raises(ValueError, match="y overlaps w"):
        _core.embedding_forward(i32(0), (store, 0, 4, 64, 0), store[:256].view(np.float32).reshape(1, 64))


# References


def test_calls_keep_no_references():
    arguments = [f32(3, 4), f32(4), 1e-5, f32(3, 4), f32(3)]
    before = [sys.getrefcount(a) for a in arguments]
    for _ in range(100):
        _core.rms_norm_forward(*arguments)
        with pytest.raises(ValueError):
            _core.rms_norm_forward(*arguments[:3], arguments[0], arguments[4])
    gc.collect()
    after = [sys.getrefcount(a) for a in arguments]
    assert all(b - a < 10 for a, b in zip(before, after, strict=True))


# Threads, fork


def work(seed):
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 200, 577), dtype=np.float32)
    w = rng.standard_normal(577, dtype=np.float32)
    y, dx, rstd, dw = np.zeros_like(x), np.zeros_like(x), f32(200), f32(577)
    _core.rms_norm_forward(x, w, 1e-5, y, rstd)
    _core.rms_norm_grad(dy, x, w, rstd, dx, dw)
    return y.tobytes() + dx.tobytes() + dw.tobytes()


@pytest.fixture
def threads():
    before = _core.num_threads()
    yield _core.set_num_threads
    _core.set_num_threads(before)


def test_number_of_threads(threads):
    threads(3)
    assert _core.num_threads() == 3
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {bad}"):
            threads(bad)
    threads(100_000)
    assert 1 <= _core.num_threads() <= 100_000
    threads(2)


def test_calls_from_several_threads(threads):
    threads(2)
    want = [work(seed) for seed in range(4)]
    wrong = []

    def call(seed):
        for _ in range(20):
            if work(seed) != want[seed]:
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for n in (1, 3, 2, 4) * 5:  # the number changes under the callers' feet
        threads(n)
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_in_a_forked_child_and_its_parent(threads):
    threads(2)
    want = work(1)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            right = work(1) == want and work(1) == want and _core.empty((1000,)).size == 1000
            os._exit(0 if right else 1)
        assert work(1) == want
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert work(1) == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_another_thread_is_in_a_kernel(threads):
    threads(2)
    want = work(1)
    stop = threading.Event()

    def call():
        while not stop.is_set():
            work(2)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if work(1) == want else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        caller.join()


# Buffers


def test_empty():
    for dtype, kind in (("f32", np.float32), ("f64", np.float64), ("i32", np.int32)):
        a = _core.empty((3, 5), dtype)
        assert a.shape == (3, 5) and a.dtype == kind and a.flags.c_contiguous and a.flags.writeable
        assert a.ctypes.data % 64 == 0
    assert _core.empty((4,)).dtype == np.float32
    assert _core.empty(()).shape == () and _core.empty((0, 7)).shape == (0, 7)


def test_a_released_buffer_is_used_again():
    a = _core.empty((1000, 1000))
    address = a.ctypes.data
    view = a[10:20]
    del a
    assert _core.empty((1000, 1000)).ctypes.data != address  # the view holds it
    del view
    assert _core.empty((1000, 1000)).ctypes.data in (address, _core.empty((999, 1001)).ctypes.data)


def test_buffer_stats():
    gc.collect()
    _core.trim()
    start = _core.buffer_stats()
    assert start["cached"] == 0 and start["peak"] == start["in_use"]
    a = _core.empty((1 << 20,))
    during = _core.buffer_stats()
    assert during["in_use"] - start["in_use"] >= 4 << 20 and during["peak"] >= during["in_use"]
    del a
    after = _core.buffer_stats()
    assert after["in_use"] == start["in_use"] and after["cached"] >= 4 << 20
    _core.trim()
    assert _core.buffer_stats()["cached"] == 0


def test_buffers_of_changing_sizes_keep_what_is_written_and_stay_within_the_peak():
    """Sizes on both sides of what is mapped and of huge pages: what is cached is given back, or becomes the size asked for."""
    gc.collect()
    _core.trim()
    begin, rng, held = _core.buffer_stats()["in_use"], np.random.default_rng(0), []
    for i in range(3000):
        if len(held) == 12:
            j = int(rng.integers(12))
            value, a = held.pop(j)
            assert (a[:: len(a) // 40 + 1] == value).all() and a[-1] == value
            del a
        a = _core.empty((int(2 ** rng.uniform(8, 21.5)),))
        assert a.ctypes.data % 64 == 0
        a[:: len(a) // 40 + 1], a[-1] = i, i
        held.append((i, a))
        stats = _core.buffer_stats()
        assert stats["in_use"] + stats["cached"] <= stats["peak"]
    del held, a
    assert _core.buffer_stats()["in_use"] == begin
    _core.trim()


@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 31, 1 << 31, 1 << 31), (1 << 48,), (1 << 62, 4)])
def test_too_big(shape):
    peak = _core.buffer_stats()["peak"]
    with pytest.raises(MemoryError):
        _core.empty(shape)
    assert _core.buffer_stats()["peak"] <= peak  # and keeps no more for later


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((-1,),), ValueError, "size -1 along axis 0 is negative"),
        (((3, -(2**40)),), ValueError, "along axis 1 is negative"),
        (((1,) * 9,), ValueError, "at most 8 dimensions, got 9"),
        (((3,), "f8"), ValueError, "dtype must be"),
        (((1.5,),), TypeError, None),
        (((None,),), TypeError, None),
        ((3,), TypeError, None),
        (([3],), TypeError, None),
        (((1 << 70,),), OverflowError, None),
        ((), TypeError, None),
    ],
)
def test_empty_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.empty(*arguments)


def test_empty_of_zero_elements_and_a_huge_axis():
    try:
        assert _core.empty((0, 1 << 50)).size == 0
    except (ValueError, MemoryError):
        pass


@pytest.mark.parametrize(("bounds", "good"), [((0, 4), True), ((0, 2), True), ((0, 5), False), ((1, 2), False)])
def test_offsets_of_a_part(bounds, good):
    """Keys may be the first of a store with room for more."""

    def attend():
        _core.attention_forward(f32(1, 2, 8), f32(4, 1, 8), f32(4, 1, 8), i32(0, 1), i32(*bounds), 1.0, 0, f32(1, 2, 8), f32(1, 2))

    if good:
        return attend()
    with pytest.raises(ValueError, match="k_offsets must begin with 0, never decrease and end with at most 4"):
        attend()


# Recorded calls


def test_recorded_calls_run_again_on_the_same_arrays():
    x, y, z = np.ones(4, np.float32), f32(4), f32(4)
    assert _core.record(True) is None
    _core.add(x, x, y)
    with pytest.raises(ValueError, match="y has size"):
        _core.add(x, x, f32(3))
    other = threading.Thread(target=lambda: _core.scale(3.0, x, f32(4)))
    other.start()
    other.join()
    _core.scale(2.0, y, z)
    calls = _core.record(False)
    assert _core.record(False) is None
    _core.add(x, x, y)
    assert len(calls) == 3 and calls[0][1] is x and calls[2][1:] == (2.0, y, z)
    del calls[1]
    x[:] = 5
    assert _core.replay(calls) is None
    assert z.tolist() == [20.0] * 4


@pytest.mark.parametrize(
    ("calls", "error", "message"),
    [
        ((), TypeError, "the calls must be a list"),
        ([None], ValueError, "call 0 is not one that was recorded"),
        ([()], ValueError, "call 0 is not one that was recorded"),
        ([("add",)], ValueError, "call 0 is not one that was recorded"),
        ([(10**6,)], ValueError, "call 0 is not one that was recorded"),
        ([(0, *range(30))], ValueError, "call 0 is not one that was recorded"),
        ([(0,)], TypeError, "takes"),
    ],
)
def test_calls_that_were_not_recorded(calls, error, message):
    with pytest.raises(error, match=message):
        _core.replay(calls)


# The module


def test_instruction_sets():
    names = _core.isas()
    assert names[0] == "baseline" and _core.isa() in names
    with pytest.raises(ValueError, match="no instruction set 'avx1024'"):
        _core.use_isa("avx1024")


def test_every_operation_has_a_function_and_says_its_arguments():
    operations = _core.ops()
    assert len(operations) == len({name for name, _ in operations}) > 20
    for name, text in operations:
        function = getattr(_core, name)
        assert text in function.__doc__
        with pytest.raises(TypeError, match=f"{name} takes"):
            function()


def test_profile():
    _core.profile(True)
    _core.add(f32(1000), f32(1000), f32(1000))
    calls, seconds, size = _core.profile(False)["add"]
    assert calls == 1 and seconds >= 0 and size == 12_000
    _core.add(f32(10), f32(10), f32(10))
    assert _core.profile(False) == {}


def import_with(**environment):
    code = "from pyloss import _core; print(_core.isa(), _core.num_threads())"
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False)


def test_environment():
    assert import_with(PYLOSS_ISA="baseline", PYLOSS_NUM_THREADS="3").stdout.split() == ["baseline", "3"]
    assert import_with(OMP_NUM_THREADS="2", PYLOSS_NUM_THREADS="").stdout.split()[1] == "2"
    bad = import_with(PYLOSS_ISA="mmx")
    assert bad.returncode != 0 and "ImportError: PYLOSS_ISA=mmx: this machine can run baseline" in bad.stderr
