"""What machine this is: for the page about a run, and `pyloss info --report` for reports of errors.

A report goes to a public page, so it has no names of people or computers, and no paths.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata

import pyloss
from pyloss.errors import size_text
from pyloss.runtime.memory import free_memory, total_memory

#: what kernels can use, by the names of Linux
FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
#: environment variables that change results or speed; values of others may be paths
SHOWN = (
    *("PYLOSS_NUM_THREADS", "PYLOSS_ISA", "PYLOSS_AMX", "PYLOSS_BF16", "PYLOSS_NO_AMX"),
    *("PYLOSS_DEVICE", "PYLOSS_PROFILE", "OMP_NUM_THREADS"),
)


def processor() -> str:
    """The processor's name, as its maker gives it where the system tells."""
    if found := _cpuinfo("model name"):
        return found
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return said.stdout.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """The machine and the versions, for people."""
    info = pyloss.info()
    return {
        "processor": processor(),
        "threads": str(info["threads"]),
        "instruction set": str(info["isa"]),
        "system": f"{platform.system()} {platform.machine()}",
        "pyloss": str(info["version"]),
        "Python, NumPy": f"{platform.python_version()}, {info['numpy']}",
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }


def report() -> Iterator[str]:
    """The lines of `pyloss info --report`."""
    info = pyloss.info()
    yield f"pyloss: {info['version']}"
    yield (
        f"Python: {platform.python_version()} ({platform.python_implementation()}, "
        f"{platform.python_compiler()})"
    )
    yield f"system: {_system()}"
    yield f"processor: {processor()}, {os.cpu_count()} logical"
    yield f"features: {', '.join(_features()) or 'not told by the system'}"
    total, free = total_memory(), free_memory()
    texts = [f"{size_text(total)} in all"] if total is not None else []
    texts += [f"{size_text(free)} free"] if free is not None else []
    yield f"memory: {', '.join(texts) or 'not told by the system'}"
    for name in ("isa", "isas", "threads", "matmul_precision", "bfloat16", "int8"):
        value = info[name]
        yield f"{name}: {', '.join(value) if isinstance(value, list) else value}"
    for device in pyloss.devices():
        yield f"device {device.id}: {device.name} {device.platform}".rstrip()
    yield "packages: " + (", ".join(_packages()) or "pyloss is not installed, but in the path")
    others = sorted(name for name in os.environ if name.startswith("PYLOSS_") and name not in SHOWN)
    settings = [f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ]
    yield "environment: " + (", ".join([*settings, *(f"{n} is set" for n in others)]) or "-")


def _system() -> str:
    """The system with its release and, on Linux, the distribution and the C library."""
    text = f"{platform.system()} {platform.release()} {platform.machine()}"
    with suppress(OSError):
        text += f", {platform.freedesktop_os_release()['PRETTY_NAME']}"
    library = " ".join(platform.libc_ver()).strip()
    return f"{text}, {library}" if library else text


def _cpuinfo(*keys: str) -> str:
    """The value of the first line of /proc/cpuinfo that begins with one of the keys, or ""."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(keys):
                return line.partition(":")[2].strip()
    return ""


def _features() -> list[str]:
    found = set(_cpuinfo("flags", "Features").split())
    return [name for name in FEATURES if name in found]


def _packages() -> list[str]:
    """The installed ones of those that pyloss's metadata names, with their versions."""
    found = []
    with suppress(metadata.PackageNotFoundError):
        required = metadata.requires("pyloss") or []
        names = {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required}
        for name in sorted(names - {"pyloss"}, key=str.lower):
            with suppress(metadata.PackageNotFoundError):
                found.append(f"{name} {metadata.version(name)}")
    return found
