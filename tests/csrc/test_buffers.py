"""Buffers of the core: contents, reuse, and sizes that are refused."""

import gc
import resource

import numpy as np
import pytest

from pyloss import _core


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
    assert _core.empty((1000, 1000)).ctypes.data != address  # the view keeps it alive
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


def test_buffers_of_changing_sizes_keep_what_is_written_and_stay_near_the_peak():
    """Sizes on both sides of the limits of mapping and huge pages; the cache respects the peak."""
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
        assert stats["in_use"] + stats["cached"] <= stats["peak"] + min(stats["peak"], 16 << 20)
    del held, a
    assert _core.buffer_stats()["in_use"] == begin
    _core.trim()


def test_what_repeats_itself_asks_the_system_for_nothing():
    """The size classes together exceed the peak, yet a repetition maps no new page."""

    def work():
        for size in (300_000, 320_000, 360_000, 400_000):
            a = _core.empty((size,))
            a[:] = 1
            del a

    gc.collect()
    _core.trim()
    held = _core.empty((4_000_000,))
    work()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        work()
    # Without the cache each repetition would fault 1,350 pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 300
    del held
    _core.trim()


@pytest.mark.parametrize(
    "shape", [(1 << 60,), (1 << 31, 1 << 31, 1 << 31), (1 << 48,), (1 << 62, 4)]
)
def test_too_big(shape):
    peak = _core.buffer_stats()["peak"]
    with pytest.raises(MemoryError):
        _core.empty(shape)
    assert _core.buffer_stats()["peak"] <= peak  # a failed request must not raise it


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((-1,),), ValueError, "a size of the shape is -1; it must be a whole number from 0"),
        (((3, -(2**40)),), ValueError, "a size of the shape is -1099511627776; it must be"),
        (((1,) * 9,), ValueError, "at most 8 dimensions, got 9"),
        (((3,), "f8"), ValueError, "dtype must be"),
        (((1.5,),), TypeError, None),
        (((None,),), TypeError, None),
        ((3,), TypeError, None),
        (([3],), TypeError, None),
        (((1 << 70,),), ValueError, "a size of the shape is 1180591620717411303424; it must be"),
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
