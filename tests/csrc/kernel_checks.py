"""For tests of the C core: guarded unaligned arrays, numeric gradients, tolerances, threads."""

from contextlib import contextmanager

import numpy as np

from pyloss import _core

GUARD = 64  # bytes on each side of an array

TILES_EMULATED = "bfloat16-tiles-emulated"
#: The precisions of tiles that this machine has; they give the same bits.
TILE_FORMS = [TILES_EMULATED, *([] if _core.amx_missing(True) else ["bfloat16-tiles"])]


@contextmanager
def products(name, precision):
    """Products in a precision on an instruction set."""
    before = _core.isa()
    _core.use_isa(name)
    _core.set_matmul_precision(precision)
    try:
        yield
    finally:
        _core.set_matmul_precision("float32")
        _core.use_isa(before)


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*values):
    return np.array(values, np.int32)


class Memory:
    """Arrays one element past a 64-byte boundary, between guard bytes that `check` compares."""

    def __init__(self):
        self._blocks = []

    def new(self, shape, dtype=np.float32, fill=np.nan):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + 2 * GUARD + 64 + dtype.itemsize, 0xA5, np.uint8)
        begin = -raw.ctypes.data % 64 + GUARD + dtype.itemsize
        self._blocks.append((raw, begin, begin + size))
        array = raw[begin : begin + size].view(dtype).reshape(shape)
        array[...] = fill if dtype.kind == "f" else 0
        return array

    def put(self, values, dtype=np.float32):
        values = np.asarray(values)
        array = self.new(values.shape, dtype)
        array[...] = values
        return array

    def check(self):
        for raw, begin, end in self._blocks:
            assert (raw[:begin] == 0xA5).all(), "written before the beginning of an array"
            assert (raw[end:] == 0xA5).all(), "written past the end of an array"


def tolerance(n, dtype=np.float32):
    """Relative error allowed for a sum of n terms: eps times pairwise growth and some slack."""
    return float(np.finfo(dtype).eps) * (8 + 2 * np.sqrt(n))


def assert_close(got, want, n=1, dtype=np.float32):
    """Compare each element, within a tolerance relative to it and to the largest of its row."""
    assert got.shape == want.shape
    if got.size == 0:
        return
    largest = np.abs(want).max(axis=-1, keepdims=True) if want.ndim else np.abs(want)
    limit = tolerance(n, dtype) * (np.abs(want) + np.maximum(largest, 1e-3))
    excess = np.abs(got.astype(np.float64) - want) - limit
    assert (excess <= 0).all(), (
        f"off by {np.abs(got - want).max()} at {np.unravel_index(excess.argmax(), excess.shape)}"
    )


def row_gradient(f, x, dy, step=1e-5):
    """Central differences in float64 of sum(f(x) dy) for x [N, D]; f must not mix rows."""
    gradient = np.empty_like(x, dtype=np.float64)
    if x.size == 0:
        return gradient
    for j in range(x.shape[1]):
        shift = np.zeros(x.shape[1])
        shift[j] = step
        slope = (f(x + shift) - f(x - shift)) / (2 * step)
        gradient[:, j] = (slope * dy).reshape(len(x), -1).sum(axis=1)
    return gradient


def element_gradient(f, x, dy, step=1e-5):
    """Gradient of sum(f(x) dy) for an elementwise f, by central differences."""
    return (f(x + step) - f(x - step)) / (2 * step) * dy


def on_threads(run):
    """Call `run`, which returns new arrays, on 1, 2 and 5 threads; the bits must agree."""
    before = _core.num_threads()
    try:
        _core.set_num_threads(1)
        first = run()
        for threads in (2, 5):
            _core.set_num_threads(threads)
            for a, b in zip(first, run(), strict=True):
                assert a.tobytes() == b.tobytes(), f"other bits with {threads} threads"
    finally:
        _core.set_num_threads(before)
    return first
