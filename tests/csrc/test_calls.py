"""Calls of the binding: lists, outputs that it makes, recorded calls; constants of the module."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from kernel_checks import f32, i32

from pyloss import _core


def test_lists_stand_for_a_call_of_each_item():
    x, y = [f32(2, 3) + i for i in range(3)], [f32(2, 3) for _ in range(3)]
    _core.scale([1.0, 2.0, 3.0], x, y)
    assert [array[0, 0] for array in y] == [0, 2, 6]
    total = f32(2, 3)
    _core.axpy(2.0, x, total)  # in order, on one array
    assert (total == 6).all()
    _core.axpy(1.0, [], [])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1.0, [f32(2)], [f32(2), f32(2)]), ValueError, "lists have 1 and 2 items"),
        ((1.0, [f32(2), None], [f32(2), f32(2)]), TypeError, "axpy: x must be a numpy.ndarray"),
        ((1.0, [[f32(2)]], [f32(2)]), TypeError, "axpy: x must be a numpy.ndarray, not list"),
        ((1.0, [f32(2)]), TypeError, "axpy takes 3 arguments"),
        (([1.0],) * 30, TypeError, "axpy takes 3 arguments"),
    ],
)
def test_lists_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.axpy(*arguments)


def test_the_calls_of_lists_are_counted_and_recorded_one_by_one():
    x, y = [f32(2), f32(2)], [f32(2), f32(2)]
    _core.profile(True)
    _core.record(True)
    _core.axpy(1.0, x, y)
    calls, counted = _core.record(False), _core.profile(False)
    assert counted["axpy"][0] == 2
    assert [[id(a) for a in call[2:]] for call in calls] == [[id(a), id(b)] for a, b in zip(x, y)]


def test_outputs_that_the_call_makes():
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    y = _core.add(x, x, ...)
    assert y.tobytes() == (2 * x).tobytes() and y.shape == x.shape
    y, rstd = _core.rms_norm_forward(x, f32(3) + 1, 1e-5, ..., ...)
    assert y.shape == (2, 2, 3) and rstd.shape == (4,)
    assert _core.rms_norm_forward(x, f32(3) + 1, 1e-5, y, ...).tobytes() == rstd.tobytes()
    dx, dw = _core.rms_norm_grad(x, x, f32(3), rstd, ..., ...)
    assert dx.shape == x.shape and dw.shape == (3,)
    assert _core.rms_norm_grad(x, x, f32(3), rstd, ..., None).shape == x.shape
    squares = _core.row_squares(f32(2, 3) + 2, ...)
    assert squares.dtype == np.float64 and squares.tolist() == [12, 12]
    assert _core.argmax(f32(2, 3, 4), ...).shape == (2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: _core.axpy(1.0, f32(2), ...), ValueError, "axpy: y must be given"),
        (lambda: _core.put_rows(f32(1, 2), i32(0), ...), ValueError, "y must be given"),
        (lambda: _core.matmul_nn(f32(2, 2), f32(2, 2), 1.0, 1, ...), ValueError, "c must be given"),
        (lambda: _core.top_experts(f32(2, 4), ...), ValueError, "chosen must be given"),
        (lambda: _core.add(..., f32(2), ...), TypeError, "a must be a numpy.ndarray"),
        (lambda: _core.add(f32(2), f32(3), ...), ValueError, "add: b has shape"),
    ],
)
def test_outputs_that_the_call_cannot_make(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "steps",
    [
        ((999, "c", (1,), ()),),
        ((0, "ccccccccccccccccccccccccc", (1,), ()),),
        ((0, "s", (7,), ()),),
        ((0, "v", (0,), ()),),
        ((0, "v", ((0,),), ()),),
        ((0, "v", ((0, (1,)),), ()),),
        ((0, "s", ("x",), ()),),
        ((0, "n", (7,), ()),),
        ((0, "c", (1,)),),
        ((0, 1, (1,), ()),),
        (3,),
    ],
)
def test_programs_that_are_refused(steps):
    with pytest.raises((TypeError, ValueError, IndexError)):
        _core.run(steps, [None])


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


# Recorded calls


def test_recorded_calls_run_again_on_the_same_arrays():
    x, y, z = np.ones(4, np.float32), f32(4), f32(4)
    assert _core.record(True) is None
    _core.add(x, x, y)
    with pytest.raises(ValueError, match="y has shape"):
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


def test_a_step_makes_rows_for_another_array():
    """Of an output with an axis that no input has."""
    op = [name for name, _ in _core.ops()].index("top_experts")
    like = np.empty((1, 2), np.int32)
    for rows in (3, 0, 5):
        slots = [f32(rows, 4), None]
        _core.run(((op, "sm", (0, (1, 0, like)), ()),), slots)
        assert slots[1].shape == (rows, 2) and slots[1].dtype == np.int32
        assert (slots[1] == [0, 1]).all()


@pytest.mark.parametrize(
    "made",
    [
        (1, 7, np.empty((1, 2), np.int32)),
        (7, 0, np.empty((1, 2), np.int32)),
        (1, 0, "like"),
        (1, 0),
        (1, 1, np.empty((1, 2), np.int32)),
        (1, 0, np.empty((1,) * 5, np.int32)),
        (1, 0, np.empty((), np.int32)),
        (1, 0, np.empty((1, 2), np.float32)),
        1,
    ],
)
def test_rows_that_a_step_cannot_make(made):
    op = [name for name, _ in _core.ops()].index("top_experts")
    with pytest.raises((TypeError, ValueError, IndexError)):
        _core.run(((op, "sm", (0, made), ()),), [f32(3, 4), None])


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
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment():
    assert import_with(PYLOSS_ISA="baseline", PYLOSS_NUM_THREADS="3").stdout.split() == [
        "baseline",
        "3",
    ]
    assert import_with(OMP_NUM_THREADS="2", PYLOSS_NUM_THREADS="").stdout.split()[1] == "2"
    bad = import_with(PYLOSS_ISA="mmx")
    assert (
        bad.returncode != 0
        and "ImportError: PYLOSS_ISA=mmx: this machine can run baseline" in bad.stderr
    )
