"""Runs the core's operations on an OpenCL device for tests that pass NumPy arrays."""

import itertools
import re

import numpy as np

from pyloss import _core
from pyloss.runtime import device

GUARD = 64  # elements on each side of an array


def _first(array):
    """Index of the array's first element behind its guard.

    One element past an aligned address, except for bytes: the bytes of a weight hold numbers of
    several sizes.
    """
    return GUARD + (array.dtype != np.uint8)


class Copies:
    """Device copies of the arrays of one call: one each, between guards that `back` compares."""

    def __init__(self, where):
        self.where, self.known = where, {}

    def put(self, array, kind=None):
        if id(array) in self.known:
            return self.known[id(array)][1]
        if array.dtype == np.uint16 and kind == "float":
            array = array.view(device._bfloat16())
        begin = _first(array)
        whole = np.full((array.size + 2 * begin) * array.itemsize, 0xA5, np.uint8).view(array.dtype)
        whole[begin : begin + array.size] = np.ascontiguousarray(array).reshape(-1)
        there = device.to_device(whole, self.where)
        part = there.part(array.shape, begin * array.itemsize)
        self.known[id(array)] = array, part, there, whole
        return part

    def take(self, argument, kind):
        if isinstance(argument, np.ndarray):
            return self.put(argument, kind)
        return (
            tuple(self.take(part, kind) for part in argument)
            if isinstance(argument, tuple)
            else argument
        )

    def back(self):
        for array, _, there, whole in self.known.values():
            begin, found = _first(array), there.numpy()
            assert found[:begin].tobytes() == whole[:begin].tobytes(), (
                "written before the beginning of an array"
            )
            assert found[-begin:].tobytes() == whole[-begin:].tobytes(), (
                "written past the end of an array"
            )
            if array.flags.writeable:
                array.reshape(-1)[...] = found[begin:-begin]


def _arrays(argument):
    if isinstance(argument, np.ndarray):
        yield argument
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _arrays(part)


def _overlap(arrays):
    """Whether two different arrays share bytes."""
    bounds = {id(a): (a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays if a.size}
    ends = sorted(bounds.values())
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(ends))


def operations(where):
    """The operations of ops.def by name, as functions of NumPy arrays that run on `where`."""
    return {name: _moved(name, specification, where) for name, specification in _core.ops()}


def _moved(name, specification, where):
    on_host = getattr(_core, name)
    kinds = re.findall(r":(\w+)", specification)

    def run(*arguments):
        # The core itself refuses wrong arguments. Arrays that share memory cannot be copied
        # separately.
        plain = list(_arrays(arguments))
        if (
            len(arguments) != len(kinds)
            or not all(a.flags.c_contiguous for a in plain)
            or _overlap(plain)
        ):
            return on_host(*arguments)
        copies = Copies(where)
        on_host(*(copies.take(a, kind) for a, kind in zip(arguments, kinds, strict=True)))
        copies.back()

    return run
