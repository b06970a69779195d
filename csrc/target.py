"""The system and the processor that a build is for, which need not be those that it runs on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

#: names of processors that mean the same
PROCESSORS = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
#: how compilers of macOS call a processor
ARCHS = {"x86_64": "x86_64", "aarch64": "arm64"}


class Target(NamedTuple):
    """`system`: linux, macos, windows, or another one's name; `processor`: x86_64, aarch64, ..."""

    system: str
    processor: str


def target_of(platform: str, archflags: str = "") -> Target:
    """The target of a platform tag, such as "linux-x86_64" or "macosx-11.0-arm64".

    `archflags` are flags of macOS compilers, "-arch arm64", which come before the tag.

    Raises:
        ValueError: more than one processor: the kernels of each have flags of their own.
    """
    parts = re.fullmatch(r"([a-z]+)[-_](.+)", platform.lower())
    name, processor = parts.groups() if parts else (platform.lower(), "")
    system = {"macosx": "macos", "win": "windows", "mingw": "windows"}.get(name, name)
    processor = processor.rpartition("-")[2]
    if system == "macos":
        given = re.findall(r"-arch\s+(\S+)", archflags)
        if len(set(given)) > 1:
            raise ValueError(
                f"ARCHFLAGS is {archflags!r}: one processor at a time, -arch arm64 or -arch x86_64"
            )
        processor = given[0] if given else processor
    return Target(system, PROCESSORS.get(processor, processor))


def current(environ: Mapping[str, str], platform: str, machine: str) -> Target:
    """The target of this build. `platform` is sysconfig's, `machine` this machine's processor.

    `_PYTHON_HOST_PLATFORM` and `ARCHFLAGS` name another target, as for other builds of extensions.
    A Python of macOS for both processors builds for this machine's.
    """
    wanted = environ.get("_PYTHON_HOST_PLATFORM") or platform
    found = target_of(wanted, environ.get("ARCHFLAGS", ""))
    if found.processor in ("universal2", "fat", "fat64", "intel", "universal"):
        return found._replace(processor=PROCESSORS.get(machine.lower(), machine.lower()))
    return found
