"""Devices, streams and memory: facades, since everything runs on the processor at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyloss import _core
from pyloss.runtime.memory import peak_memory


class DeviceType:
    """A kind of device."""

    def __init__(self, name: str):
        self.name = name

    def __eq__(self, other: object) -> bool:
        return getattr(other, "type", other) is self or (
            isinstance(other, DeviceType) and other.name == self.name
        )

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"DeviceType.{self.name}"


cpu = DeviceType("cpu")
gpu = DeviceType("gpu")


class Device:
    """A device: the processor. `Device(mx.gpu)` stands for it too, so that scripts run."""

    def __init__(self, type: DeviceType = cpu, index: int = 0):
        self.type, self.index = type, index

    def __eq__(self, other: object) -> bool:
        return getattr(other, "type", other) == self.type

    def __hash__(self) -> int:
        return hash(self.type)

    def __repr__(self) -> str:
        return f"Device({self.type.name}, {self.index})"


class Stream:
    """The one order in which everything is computed."""

    def __init__(self, device: Any = None):
        self.device, self.index = default_device(), 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"Stream({self.device}, 0)"


def default_device() -> Device:
    """The processor."""
    return Device(cpu)


def set_default_device(device: Any) -> None:
    """Does nothing: MLX's arrays stay with the processor here."""


def is_available(device: Any) -> bool:
    """Whether it is the processor."""
    return device == cpu


def device_count(device_type: Any) -> int:
    """1 processor, and no other device."""
    return int(device_type == cpu)


def device_info(d: Any = None) -> dict[str, Any]:
    """The processor's name and memory, under MLX's keys."""
    total = _memory_size()
    return {
        "device_name": f"processor with {_core.isa()}",
        "architecture": str(_core.isa()),
        "memory_size": total,
        "max_recommended_working_set_size": total,
        "max_buffer_length": total,
        "resource_limit": 499000,
    }


def _memory_size() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_stream(device: Any = None) -> Stream:
    """The one stream."""
    return Stream()


def set_default_stream(stream: Any) -> None:
    """Does nothing: there is one stream."""


def new_stream(device: Any = None) -> Stream:
    """The one stream."""
    return Stream()


@contextmanager
def stream(s: Any) -> Iterator[Stream]:
    """The one stream, whichever is named."""
    yield Stream()


StreamContext = stream


def clear_streams() -> None:
    """Does nothing: there is one stream."""


def synchronize(stream: Any = None) -> None:
    """Does nothing: everything is computed at once."""


def get_peak_memory() -> int:
    """The most bytes that this process has held in memory so far."""
    return peak_memory()


def reset_peak_memory() -> None:
    """Begins a new peak where the system allows it (Linux); else does nothing."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return


def get_active_memory() -> int:
    """The bytes of buffers in use."""
    return int(_core.buffer_stats()["in_use"])


def get_cache_memory() -> int:
    """The bytes of buffers kept for reuse."""
    return int(_core.buffer_stats()["cached"])


def get_array_buffer_size(*args: Any) -> int:
    """The bytes of arrays."""
    return sum(x.nbytes for x in args)


def clear_cache() -> None:
    """Does nothing: pyloss reuses its buffers, and their memory is bounded."""


def _limit(limit: int) -> int:
    if int(limit) < 0:
        raise ValueError(f"a limit of memory must be at least 0, not {limit}")
    return _memory_size()


def set_memory_limit(limit: int) -> int:
    """Does nothing: the limit is the machine's memory, which it returns."""
    return _limit(limit)


def get_memory_limit() -> int:
    """The machine's memory in bytes."""
    return _memory_size()


def set_cache_limit(limit: int) -> int:
    """Does nothing: buffers are reused as pyloss does. Returns the machine's memory."""
    return _limit(limit)


def set_wired_limit(limit: int) -> int:
    """Does nothing: no memory is wired. Returns the machine's memory."""
    return _limit(limit)
