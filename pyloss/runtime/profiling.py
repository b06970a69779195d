"""`PYLOSS_PROFILE=1` and `PYLOSS_OPENCL_PROFILE=1`: tables of what ran, printed at exit.

The first counts the operations of the core by the host's clock. The second counts the kernels on
OpenCL devices by the device's clock, and the programs that were compiled.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable

from pyloss import _core


def report() -> str:
    """A table of calls, milliseconds and gigabytes of arguments per operation, slowest first.

    Resets the counters and waits for operations on devices. The bytes copied to and from devices
    stand below the table.
    """
    counted = _core.profile(True)
    copies = [
        (name, counted.pop(name))
        for name in ("copied to devices", "copied from devices")
        if name in counted
    ]
    rows = sorted(counted.items(), key=lambda item: -item[1][1])
    total = sum(seconds for _, (_, seconds, _) in rows)
    lines = [f"{'operation':28s} {'calls':>8s} {'ms':>10s} {'share':>6s} {'GB':>8s} {'GB/s':>7s}"]
    for name, (calls, seconds, size) in rows:
        speed, share = size / max(seconds, 1e-12) / 1e9, seconds / max(total, 1e-12)
        lines.append(
            f"{name:28s} {calls:8d} {seconds * 1e3:10.1f} {share:6.1%} {size / 1e9:8.2f} "
            f"{speed:7.1f}"
        )
    lines.append(f"{'all':28s} {'':8s} {total * 1e3:10.1f}")
    lines += [
        f"{name:28s} {calls:8d} {seconds * 1e3:10.1f} {size} bytes"
        for name, (calls, seconds, size) in copies
    ]
    return "\n".join(lines)


def start(say: Callable[[str], None]) -> None:
    """Times operations from now on; `say` prints the report at the end of the process."""
    _core.profile(True)
    atexit.register(lambda: say(report()))


def device_report() -> str:
    """The commands on OpenCL devices since the last report, and the programs that were built.

    Waits for the devices. The time that no command ran, between the first and the last one, is the
    device's wait for the host. The compiler's remarks stand at the end.
    """
    commands, builds, span = _core.opencl_profile(True)
    busy = sum(seconds for *_, seconds, _ in commands)
    lines = [f"{'operation':28s} {'kernel':22s} {'calls':>8s} {'ms':>10s} {'share':>6s}"]
    for operation, command, calls, seconds, size in sorted(commands, key=lambda row: -row[3]):
        moved = f" {size} bytes" if size else ""
        lines.append(
            f"{operation or '-':28s} {command:22s} {calls:8d} {seconds * 1e3:10.2f} "
            f"{seconds / max(busy, 1e-12):6.1%}{moved}"
        )
    lines.append(f"{'all':51s} {sum(row[2] for row in commands):8d} {busy * 1e3:10.2f}")
    lines.append(f"{'no command ran':51s} {'':8s} {max(span - busy, 0) * 1e3:10.2f}")
    return "\n".join([*lines, *_builds(builds)])


def _builds(builds: Iterable[tuple[str, str, bool, float, str | None]]) -> list[str]:
    """Lines on the programs: how many, their times, and the compiler's remarks."""
    lines = []
    for cached, what in ((False, "compiled"), (True, "read from the cache")):
        times = [seconds for _, _, from_cache, seconds, _ in builds if from_cache == cached]
        if times:
            lines.append(
                f"programs {what}: {len(times)} in {sum(times):.2f} s, the longest "
                f"{max(times):.2f} s"
            )
    for program, options, _, _, remarks in builds:
        if remarks:
            lines.append(f"remarks on {program} {options}:\n{remarks.strip()}")
    return lines


def start_devices(say: Callable[[str], None]) -> None:
    """Times commands on devices from now on; `say` prints the report at the end of the process.

    Called before a device is opened.
    """
    _core.opencl_profile(True)
    atexit.register(lambda: say(device_report()))
