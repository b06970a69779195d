"""Builds the source distribution and the wheels that a Linux machine can, and checks them.

    python .ci/wheels.py [x86_64 aarch64] [--out dist]

From the source distribution: a wheel for this machine's processor and one for arm64 by Debian's
cross compiler, which gets this machine's headers of Python: both are 64-bit Linux. zig links both
against the symbols of glibc 2.17. Then auditwheel names their platforms, abi3audit, twine and
check-wheel-contents must find nothing, and the machine's own is installed and tried. A wheel for
musl is not built: auditwheel examines those on a system with musl only, as the workflow wheels.yml
does. .ci/portable.py compiles the core for macOS and Windows.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import NamedTuple

from portable import ROOT, zig

WORK = ROOT / "build" / "wheels"
BACKEND = "import setuptools.build_meta as b; b.build_{}({!r})"
GLIBC = "2.17"
TOOLS = Path(sys.executable).parent


class Kind(NamedTuple):
    """Compiler and linker of a wheel; `platform` is Python's name of the target."""

    compiler: str
    linker: str
    platform: str


def linked_by_zig(target: str) -> str:
    return shlex.join([*zig(), "-target", target, "-shared"])


def kinds() -> dict[str, Kind]:
    """The wheels that this machine's programs can build."""
    found = {}
    native = os.environ.get("CC") or shutil.which("gcc") or "cc"
    if sysconfig.get_platform() == "linux-x86_64":
        found["x86_64"] = Kind(native, linked_by_zig(f"x86_64-linux-gnu.{GLIBC}"), "linux-x86_64")
    if cross := shutil.which("aarch64-linux-gnu-gcc"):
        linker = linked_by_zig(f"aarch64-linux-gnu.{GLIBC}")
        found["aarch64"] = Kind(cross, linker, "linux-aarch64")
    return found


def run(command: list[str], cwd: Path | None = None, **variables: str) -> None:
    """Runs a command with this environment's programs in front; ends the script if it fails."""
    print("$", shlex.join(command), flush=True)
    paths = os.pathsep.join([str(TOOLS), os.environ.get("PATH", "")])
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables, "PATH": paths})
    if done.returncode:
        sys.exit(f"wheels.py: {Path(command[0]).name} failed with status {done.returncode}")


def source_distribution(out: Path) -> Path:
    """Writes the source distribution to `out`; an unpacked copy."""
    run([sys.executable, "-c", BACKEND.format("sdist", str(out))], cwd=ROOT)
    archive = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    with tarfile.open(archive) as tar:
        tar.extractall(WORK, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return WORK / archive.name.removesuffix(".tar.gz")


def wheel(name: str, kind: Kind, source: Path, out: Path) -> None:
    """Builds a wheel in a copy of the source, and puts it under its platform's name into `out`."""
    tree, raw = WORK / name, WORK / f"{name}-raw"
    shutil.copytree(source, tree)
    script = BACKEND.format("wheel", str(raw))
    target = {"CC": kind.compiler, "LDSHARED": kind.linker, "_PYTHON_HOST_PLATFORM": kind.platform}
    run([sys.executable, "-c", script], cwd=tree, **target)
    (built,) = raw.glob("*.whl")
    run([sys.executable, "-m", "auditwheel", "show", str(built)])
    # Only the name changes: nothing but the C library is linked.
    run([sys.executable, "-m", "auditwheel", "repair", "-w", str(out), str(built)])


def check(out: Path) -> None:
    wheels = sorted(map(str, out.glob("*.whl")))
    run(["abi3audit", "--strict", "--summary", *(w for w in wheels if "abi3" in w)])
    run(["twine", "check", "--strict", *map(str, sorted(out.iterdir()))])
    run(["check-wheel-contents", *wheels])
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:5.2f} MB  {path.name}")


TRY = """
import numpy as np, pyloss
logits, labels = np.random.default_rng(0).standard_normal((3, 50)), np.arange(3)
expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), labels]
assert np.abs(pyloss.softmax_cross_entropy(logits, labels) - expected).max() < 1e-12
print("installed and tried:", pyloss.__file__)
"""


def try_out(wheel: Path) -> None:
    """Installs the wheel into a new environment, and computes a loss outside of the repository."""
    folder = WORK / "environment"
    run([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    run([python, "-m", "pip", "-q", "--disable-pip-version-check", "install", str(wheel)])
    run([python, "-c", TRY], cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="x86_64, aarch64")
    parser.add_argument(
        "--out", default="dist", help="folder of the results; earlier ones there are removed"
    )
    given = parser.parse_args()
    found = kinds()
    for name in given.kinds:
        if name not in found:
            parser.error(f"{name}: not to be built here; this machine can: {', '.join(found)}")
    if "aarch64" not in found:
        print("no wheel for aarch64: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    out = Path(given.out).resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("pyloss-*.whl"), *out.glob("pyloss-*.tar.gz")):
        old.unlink()
    source = source_distribution(out)
    for name in given.kinds or found:
        wheel(name, found[name], source, out)
    check(out)
    for built in out.glob(f"*manylinux*_{platform.machine()}.whl"):
        try_out(built)


if __name__ == "__main__":
    main()
