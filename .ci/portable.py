"""Compiles and links the whole core for macOS and Windows, with zig's compiler, on Linux.

    python .ci/portable.py [macos-arm64 macos-x86_64 windows-x86_64] [--optimize]

Python's and NumPy's headers are this machine's, with the sizes of the other system put in; where
Python's functions are looked up when the module is loaded, a stub of its library stands for it. So
it shows that the code is portable: it compiles, and calls nothing that the system lacks. It does
not run anything, and the files are no wheels. Without --optimize the compiler is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "portable"


class System(NamedTuple):
    """zig's name of a target, Python's, and how a module is linked."""

    zig: str
    platform: str
    link: str


SYSTEMS = {
    "macos-arm64": System(
        "aarch64-macos.11.0", "macosx-11.0-arm64", "-dynamiclib -undefined dynamic_lookup"
    ),
    "macos-x86_64": System(
        "x86_64-macos.11.0", "macosx-11.0-x86_64", "-dynamiclib -undefined dynamic_lookup"
    ),
    "windows-x86_64": System("x86_64-windows-gnu", "win-amd64", "-shared"),
}

# What differs from Linux in the headers that Python and NumPy wrote when they were built: lines of
# NumPy's, and of Python's.
NUMPY_LINES = {"NPY_HAVE_ENDIAN_H": None}
WINDOWS_NUMPY_LINES = {**NUMPY_LINES, "NPY_SIZEOF_LONG": "4", "NPY_SIZEOF_LONGDOUBLE": "8"}
WINDOWS_PYCONFIG = """#ifndef Py_PYCONFIG_H
#define Py_PYCONFIG_H
#define MS_WINDOWS
#define MS_WIN32
#define MS_WIN64
#define HAVE_DECLSPEC_DLL
#define Py_ENABLE_SHARED 1
#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_PID_T 4
#define ALIGNOF_SIZE_T 8
#define HAVE_STDDEF_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
typedef long long Py_ssize_t;
#define HAVE_PY_SSIZE_T 1
#define PY_SSIZE_T_MAX 9223372036854775807LL
#endif
"""


def zig() -> list[str]:
    """The command of zig's compiler, from the package ziglang."""
    return [sys.executable, "-m", "ziglang", "cc"]


def changed(text: str, lines: dict[str, str | None]) -> str:
    """The text of a header with other values of its macros; None takes one out."""
    for name, value in lines.items():
        line = "" if value is None else f"#define {name} {value}"
        text, found = re.subn(rf"(?m)^#\s*define {name}\b.*$", line, text)
        if not found:
            raise SystemExit(f"the headers of this machine have no {name}: change {__file__}")
    return text


def headers(name: str) -> list[str]:
    """Copies of Python's and NumPy's headers for the system; their folders."""
    places = []
    for what, source in (("python", sysconfig.get_path("include")), ("numpy", numpy.get_include())):
        place = BUILD / name / what
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        places.append(str(place))
    windows = name.startswith("windows")
    config = Path(places[1], "numpy", "_numpyconfig.h")
    lines = WINDOWS_NUMPY_LINES if windows else NUMPY_LINES
    config.write_text(changed(config.read_text(), lines))
    if windows:
        Path(places[0], "pyconfig.h").write_text(WINDOWS_PYCONFIG)
    return places


def stub_library(name: str) -> str:
    """The import library of a python3.dll with all that the headers declare; its folder."""
    folder = BUILD / name
    declared: dict[str, set[str]] = {"FUNC": set(), "DATA": set()}
    for header in (folder / "python").glob("*.h"):
        text = header.read_text(encoding="utf-8")
        for kind, symbol in re.findall(r"\bPyAPI_(FUNC|DATA)\([^)]*\)\s*(\w+)", text):
            declared[kind].add(symbol)
        # Declared under the names of macros.
        declared["FUNC"] |= set(re.findall(r"#define \w+\s+(_Py\w+_SizeT)$", text, re.MULTILINE))
    lines = [*sorted(declared["FUNC"]), *(f"{s} DATA" for s in sorted(declared["DATA"]))]
    definition = folder / "python3.def"
    definition.write_text("LIBRARY python3.dll\nEXPORTS\n    " + "\n    ".join(lines) + "\n")
    subprocess.run(
        [sys.executable, "-m", "ziglang", "dlltool", "-d", str(definition), "-m", "i386:x86-64"]
        + ["-l", str(folder / "libpython3.a")],
        check=True,
    )
    return str(folder)


def build(name: str, optimize: bool) -> Path:
    """Builds the extension for a system; its path."""
    system, folder = SYSTEMS[name], BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.join([*zig(), "-target", system.zig])
    flags = ["-Wno-unused-command-line-argument", *(() if optimize else ("-O0",))]
    included = headers(name)
    libraries = ["-L" + stub_library(name)] if name.startswith("windows") else []
    environment = {
        **os.environ,
        "CC": compiler,
        "LDSHARED": f"{compiler} {system.link}",
        "CFLAGS": " ".join("-I" + place for place in included),
        "PYLOSS_CFLAGS": " ".join(flags),
        "PYLOSS_LDFLAGS": " ".join(libraries),
        "_PYTHON_HOST_PLATFORM": system.platform,
    }
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--compiler=unix"]
        + ["-b", str(folder / "lib"), "-t", str(folder / "temp")],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    (built,) = (folder / "lib").glob("pyloss/_core*")
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--optimize", action="store_true", help="as for a release; slow")
    given = parser.parse_args()
    if unknown := sorted(set(given.systems) - set(SYSTEMS)):
        parser.error(f"unknown system {unknown[0]}; there are {', '.join(SYSTEMS)}")
    for name in given.systems or SYSTEMS:
        built = build(name, given.optimize)
        print(f"{name}: compiled and linked, not run: {built.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
