"""OpenCL devices, arrays in their memory, and calls of the core on the host or a device.

The first call that needs libOpenCL opens it. Functions of pyloss run where their arrays are; with a
default device other than the cpu, NumPy arrays are copied there, and results back. Errors of a
device are `DeviceError`, or MemoryError if its memory is short; both leave it usable.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.checks.arrays import as_array
from pyloss.errors import DeviceError
from pyloss.runtime.memory import total_memory

_KINDS = {"f8": "f64", "f4": "f32", "f2": "f16", "i8": "i64", "i4": "i32", "i2": "i16", "i1": "i8"}
_KINDS |= {"u8": "u64", "u4": "u32", "u2": "u16", "u1": "u8", "b1": "bool"}
_CODES = {kind: code for code, kind in _KINDS.items()}


@dataclass(frozen=True)
class Device:
    """A device that pyloss can compute on.

    Attributes:
        id: "cpu" for the C kernels, else "opencl:<number>".
        name: the processor or card as its driver names it.
        platform: the OpenCL platform; "" for the C kernels.
        kind: "cpu", "gpu", "accelerator" or "custom".
        memory: bytes of memory.
        fp64: whether it computes in float64.
    """

    id: str
    name: str
    platform: str
    kind: str
    memory: int
    fp64: bool


def _host() -> Device:
    return Device("cpu", f"C kernels ({_core.isa()})", "", "cpu", total_memory() or 0, True)


def devices() -> list[Device]:
    """All devices: "cpu", then OpenCL's."""
    found = (
        Device(f"opencl:{i}", *(d[k] for k in ("name", "platform", "kind", "memory", "fp64")))
        for i, d in _opencl()
    )
    return [_host(), *found]


def _opencl() -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(_core.opencl_devices()[0]))


def _index(device: str | Device) -> int:
    """The number of an OpenCL device, -1 for the cpu.

    ValueError or DeviceError if there is no such device.
    """
    name = device.id if isinstance(device, Device) else device
    if not isinstance(name, str):
        raise TypeError(f"a device is named by a string or a Device, not {type(name).__name__}")
    if name == "cpu":
        return -1
    kind, _, number = name.partition(":")
    if kind != "opencl" or not (number.isdecimal() or name == "opencl"):
        raise ValueError(f"a device is named 'cpu' or 'opencl:<number>', not {name!r}")
    found, reason = _core.opencl_devices()
    index = int(number or 0)
    if not found:
        raise DeviceError(f"there is no OpenCL device {name!r}: {reason}")
    if index >= len(found):
        raise ValueError(
            f"there is no OpenCL device {name!r}; there are opencl:0 to opencl:{len(found) - 1}"
        )
    return index


# The name of the default device; its number once that is known.
_default: str | int = os.environ.get("PYLOSS_DEVICE") or -1


def _default_index() -> int:
    global _default
    if isinstance(_default, str):
        try:
            _default = _index(_default)
        except ValueError as error:
            raise ValueError(f"PYLOSS_DEVICE: {error}") from None
    return _default


def set_default_device(device: str | Device) -> None:
    """Sets where functions of NumPy arrays run: "cpu" or "opencl:<number>".

    It begins as PYLOSS_DEVICE, or the cpu. Arrays are copied to the device and results back.
    ValueError if there is no such device, `DeviceError` if OpenCL has none.
    """
    global _default
    _default = _index(device)


def default_device() -> Device:
    """The device that functions of NumPy arrays run on."""
    index = _default_index()
    return _host() if index < 0 else devices()[index + 1]


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def is_bfloat16(dtype: np.dtype) -> bool:
    """Whether this is ml_dtypes' type, by its name: `import pyloss` does not import ml_dtypes."""
    return dtype.name == "bfloat16"


def _kind(dtype: np.dtype) -> str:
    if is_bfloat16(dtype):
        return "bf16"
    kind = _KINDS.get(dtype.str[1:])
    if kind is None:
        raise TypeError(
            f"arrays of dtype {dtype} cannot be on a device; real floats, bfloat16, "
            "integers and bool can"
        )
    return kind


class DeviceArray(_core.DeviceArray):
    """An array in the memory of an OpenCL device: C-contiguous, made by `to_device` or operations.

    It has `shape`, `dtype`, `ndim`, `size`, `nbytes` and `device`. `numpy()` copies it back, as
    numpy.asarray does. Work on a device is queued; copying a result back waits for it.
    """

    __slots__ = ()
    __array_priority__ = 100

    @property
    def dtype(self) -> np.dtype:
        """The element type, as NumPy and ml_dtypes know it."""
        return _bfloat16() if self.kind == "bf16" else np.dtype(_CODES[self.kind])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> Device:
        """The device whose memory holds it."""
        return devices()[self.index + 1]

    def numpy(self) -> np.ndarray:
        """A copy as a NumPy array."""
        out = np.empty(self.shape, self.dtype)
        self.read(bits(out))
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array in device memory cannot be a NumPy array without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def item(self) -> Any:
        """The value of an array with one element."""
        return self.numpy().item()

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements, and memory, in another shape."""
        given = (
            shape[0] if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        )
        return self.part(
            np.broadcast_to(np.empty((), np.bool_), self.shape).reshape(given).shape, 0
        )

    def copy(self) -> DeviceArray:
        """The same values in new memory on the device."""
        out = self.fresh(self.shape, self.kind)
        out.assign(self)
        return out

    def __setitem__(self, key: Any, value: Any) -> None:
        """Writes all elements, or rows along the first axis."""
        to = (
            self
            if key is ...
            else self[key]
            if isinstance(key, slice) and key.step in (None, 1)
            else None
        )
        if to is None:
            raise TypeError(
                "only all elements of an array on a device, or rows of it, can be written to"
            )
        here = isinstance(value, DeviceArray) and value.place == to.place
        if here and value.kind == to.kind and value.shape == to.shape:
            to.assign(value)
        else:
            whole = np.empty(to.shape, to.dtype)
            whole[...] = np.asarray(value)
            to.write(bits(whole))

    def astype(self, dtype: Any, copy: bool = True) -> DeviceArray:
        """The same values in another type (by way of the host), or in the same one."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self.copy() if copy else self
        return to_device(self.numpy().astype(dtype), self)

    def sum(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
        """The sum over an axis, several, or all, as NumPy gives it."""
        return self.numpy().sum(axis=axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
        """The mean over an axis, several, or all, as NumPy gives it."""
        return self.numpy().mean(axis=axis, dtype=dtype, keepdims=keepdims)

    def __add__(self, other: Any) -> DeviceArray:
        return to_device(self.numpy() + np.asarray(other), self)

    __radd__ = __add__

    def __getitem__(self, key: Any) -> Any:
        """A row or rows along the first axis, in the same memory.

        Other indexing gives a copy, as in NumPy.
        """
        if isinstance(key, tuple) and key == ():
            return self
        if isinstance(key, int) and not isinstance(key, bool) and self.shape:
            rows, rest = self.shape[0], self.shape[1:]
            if not -rows <= key < rows:
                raise IndexError(f"row {key} is not among the {rows} of the array")
            return self.part(rest, key % rows * math.prod(rest) * self.dtype.itemsize)
        if isinstance(key, slice) and self.shape:
            begin, end, step = key.indices(self.shape[0])
            if step == 1:
                rest = self.shape[1:]
                row = math.prod(rest) * self.dtype.itemsize
                return self.part((max(end - begin, 0), *rest), begin * row if end > begin else 0)
        return to_device(self.numpy()[key], self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    def __float__(self) -> float:
        return float(self.item())

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device='opencl:{self.index}')"


def _is_pyopencl(x: Any) -> bool:
    """Whether this is a pyopencl array. Does not import pyopencl."""
    return type(x).__module__ == "pyopencl.array" and hasattr(x, "base_data")


def _from_pyopencl(x: Any) -> DeviceArray:
    if x.size and not x.flags.c_contiguous:
        raise ValueError(
            "a pyopencl array must be C-contiguous; "
            f"this one of shape {x.shape} has strides {x.strides}"
        )
    if x.queue is None:
        raise ValueError("a pyopencl array must have a queue: use array.with_queue(queue)")
    if x.base_data is None:
        return empty(x.shape, x.dtype, _index(f"opencl:{_number_of(x.queue.device)}"))
    for event in x.events:
        event.wait()
    handles = (x.context.int_ptr, x.queue.int_ptr, x.base_data.int_ptr, x.offset, x.base_data.size)
    return DeviceArray(handles, tuple(x.shape), _kind(np.dtype(x.dtype)))


def _number_of(device: Any) -> int:
    names = [d["name"] for _, d in _opencl()]
    return names.index(device.name.strip()) if device.name.strip() in names else 0


def array(x: Any, name: str = "the argument") -> Any:
    """`x` where it lies: DeviceArrays and pyopencl arrays uncopied, others as NumPy arrays.

    Errors call it `name`, see `checks.arrays.as_array`.
    """
    if isinstance(x, DeviceArray):
        return x
    return _from_pyopencl(x) if _is_pyopencl(x) else as_array(x, name)


def is_device_array(x: Any) -> bool:
    """Whether `x` lies in device memory."""
    return isinstance(x, DeviceArray) or _is_pyopencl(x)


def empty(shape: tuple[int, ...], dtype: Any, device: int | DeviceArray) -> DeviceArray:
    """An uninitialized array on the device of this number, or in the context of another array."""
    kind = _kind(np.dtype(dtype))
    return (
        device.fresh(tuple(shape), kind)
        if isinstance(device, DeviceArray)
        else DeviceArray(device, tuple(shape), kind)
    )


def to_device(x: Any, device: str | Device | DeviceArray | None = None) -> Any:
    """Copies an array to a device: the same shape and type, as a `DeviceArray`.

    Takes what numpy.asarray takes. A `Weight` gives one whose kernels read its bytes there; the
    arrays and weights of a `Module` are moved in place.

    Args:
        device: a name ("opencl:0", "cpu"), a `Device`, or an array on it. By default the default
            device, or opencl:0 if that is the cpu. "cpu" gives a NumPy array. An array on the
            device is returned as it is.

    Raises:
        TypeError: a type that no device holds.
        ValueError, DeviceError: there is no such device.
        MemoryError: the array does not fit.
    """
    if hasattr(x, "moved"):
        return x.moved(lambda part: to_device(part, device))
    source = array(x)
    if device is None:
        default = _default_index()
        where: Any = default if default >= 0 else _index("opencl:0")
    else:
        where = device if isinstance(device, DeviceArray) else _index(device)
    if isinstance(source, DeviceArray):
        if isinstance(where, DeviceArray):
            if source.place == where.place:
                return source
        elif where == source.index and source.own:
            return source
        source = source.numpy()
    return source if not isinstance(where, DeviceArray) and where < 0 else _upload(source, where)


def _upload(source: np.ndarray, where: int | DeviceArray) -> DeviceArray:
    """Copies to the device of this number, or of another array."""
    if not source.dtype.isnative:
        source = source.astype(source.dtype.newbyteorder("="))
    out = empty(source.shape, source.dtype, where)
    source = np.ascontiguousarray(source).reshape(source.shape)
    out.write(bits(source))
    return out


def zeros_like(x: DeviceArray) -> DeviceArray:
    """Zeros with the shape and type of `x`, on its device."""
    zeros = x.fresh(x.shape, x.kind)
    zeros.clear()
    return zeros


def on_device_of(like: Any, x: Any) -> Any:
    """`x`, a NumPy array or None, copied to the device of `like` if that is on one."""
    return to_device(x, like) if x is not None and isinstance(like, DeviceArray) else x


def same_place(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """TypeError or ValueError unless all arrays are on the host, or all on one device."""

    def said(name: str, x: Any) -> str:
        return (
            f"{name} is on opencl:{x.index}"
            if isinstance(x, DeviceArray)
            else f"{name} is a NumPy array"
        )

    first_name, first = names[0], arrays[0]
    for name, x in zip(names[1:], arrays[1:], strict=True):
        both = f"{said(first_name, first)} and {said(name, x)}"
        if isinstance(x, DeviceArray) != isinstance(first, DeviceArray):
            raise TypeError(f"{both}: move one with pyloss.to_device or .numpy()")
        if isinstance(x, DeviceArray) and x.place != first.place:
            if x.index != first.index:
                raise ValueError(f"{both}: move one with pyloss.to_device")
            raise ValueError(
                f"{first_name} and {name} are on opencl:{x.index} in different OpenCL contexts "
                "or queues"
            )


def call(kernel: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Runs an operation of the core where its arrays are, or on the default device.

    If any array is on a device, host arrays are copied there, and host outputs back.
    """
    where: Any = next((x for x in (*inputs, *outputs) if isinstance(x, DeviceArray)), None)
    if where is None:
        where = _default_index()
        if where < 0:
            getattr(_core, kernel)(*map(bits, inputs), *map(bits, outputs))
            return
    given = [_upload(x, where) if isinstance(x, np.ndarray) else x for x in inputs]
    made = [empty(x.shape, x.dtype, where) if isinstance(x, np.ndarray) else x for x in outputs]
    getattr(_core, kernel)(*given, *made)
    for to, result in zip(outputs, made, strict=True):
        if isinstance(to, np.ndarray):
            result.read(bits(to))


def bits(array: Any) -> Any:
    """An array for the core: bfloat16, which NumPy does not know, as 16-bit integers."""
    return (
        array.view(np.uint16)
        if isinstance(array, np.ndarray) and is_bfloat16(array.dtype)
        else array
    )
