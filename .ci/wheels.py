"""Builds the source distribution and the wheels that a Linux machine can, and checks them.

    python .ci/wheels.py [x86_64 aarch64] [--out dist]

From the source distribution: a wheel for this machine's processor, and one for the other one where
Debian's cross compiler is installed, which gets this machine's headers of Python: both are 64-bit
Linux. zig links against the symbols of glibc 2.17. Then auditwheel names the platforms, abi3audit,
twine and check-wheel-contents must find nothing, and the machine's own is installed and tried.
A wheel for musl is not built: auditwheel can examine one on a system with musl only, where the
workflow wheels.yml builds it. .ci/portable.py compiles the core for macOS and Windows.
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
PROCESSORS = ("x86_64", "aarch64")
TOOLS = Path(sys.executable).parent


class Kind(NamedTuple):
    """Compiler and linker of a wheel; `platform` is Python's name of the target."""

    compiler: str
    linker: str
    platform: str


def kinds() -> dict[str, Kind]:
    """The wheels that this machine's programs can build, by processor."""
    found = {}
    for processor in PROCESSORS:
        target = f"linux-{processor}"
        if sysconfig.get_platform() == target:
            compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
        else:
            compiler = shutil.which(f"{processor}-linux-gnu-gcc")
        if compiler:
            linker = [*zig(), "-target", f"{processor}-linux-gnu.{GLIBC}", "-shared"]
            found[processor] = Kind(compiler, shlex.join(linker), target)
    return found


def run(command: list[str | Path], cwd: Path | None = None, **variables: str) -> None:
    """Runs a command with this environment's programs in front; ends the script if it fails."""
    print("$", shlex.join(map(str, command)), flush=True)
    paths = os.pathsep.join([str(TOOLS), os.environ.get("PATH", "")])
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **variables, "PATH": paths})
    if done.returncode:
        sys.exit(f"{Path(command[0]).name} failed with status {done.returncode}")


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


def results(out: Path) -> list[Path]:
    """The files that this script writes."""
    return sorted([*out.glob("pyloss-*.whl"), *out.glob("pyloss-*.tar.gz")])


def check(out: Path) -> None:
    wheels = [path for path in results(out) if path.suffix == ".whl"]
    run(["abi3audit", "--strict", "--summary", *(w for w in wheels if "abi3" in w.name)])
    run(["twine", "check", "--strict", *results(out)])
    run(["check-wheel-contents", *wheels])
    for path in results(out):
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
    parser.add_argument("kinds", nargs="*", metavar="PROCESSOR", help=", ".join(PROCESSORS))
    parser.add_argument(
        "--out",
        default="dist",
        help="folder of the results; earlier wheels and source distributions there are removed",
    )
    given = parser.parse_args()
    found = kinds()
    for name in given.kinds or found or ["no wheel"]:
        if name not in found:
            parser.error(f"{name}: this machine can build {', '.join(found) or 'none'}")
    for name in PROCESSORS:
        if name not in found:
            print(f"no wheel for {name}: {name}-linux-gnu-gcc is not installed")
    out = Path(given.out).resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    for old in results(out):
        old.unlink()
    source = source_distribution(out)
    for name in given.kinds or found:
        wheel(name, found[name], source, out)
    check(out)
    for built in out.glob(f"*manylinux*_{platform.machine()}.whl"):
        try_out(built)


if __name__ == "__main__":
    main()
