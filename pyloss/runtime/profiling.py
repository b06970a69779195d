"""`PYLOSS_PROFILE=1`: time and bytes of each operation of the core, printed at exit."""

from __future__ import annotations

import atexit
from collections.abc import Callable

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
