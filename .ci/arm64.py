"""Runs tests of the core for arm64 on a Linux machine of another processor, by qemu-user.

    python .ci/arm64.py [tests/csrc/test_matmul.py ...]

Needs Debian or Ubuntu with qemu-user and gcc-aarch64-linux-gnu. The wheel is that of .ci/wheels.py.
Python comes from the distribution's packages for arm64, which are unpacked into build/arm64 with
apt's own lists there, so that the system stays as it is; NumPy and pytest are wheels for arm64.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from portable import ROOT
from wheels import run

WORK = ROOT / "build" / "arm64"
SYSTEM, SITE, APT, DIST = (WORK / name for name in ("system", "site", "apt", "dist"))
PACKAGES = ("python3", "libstdc++6")
PYTHON = ("qemu-aarch64", "-L", SYSTEM, SYSTEM / "usr" / "bin" / "python3")
WHEELS = ("numpy", "pytest", "hypothesis", "ml_dtypes")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# Those that are done in a minute: products are emulated a vector at a time.
QUICK = ("test_layers.py", "test_rowloss.py", "test_maps.py", "test_routing.py", "test_int8.py")


def unpack_system() -> None:
    """Python for arm64 and the libraries that it needs, from the distribution's packages."""
    for folder in (APT / "lists" / "partial", APT / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True)
    (APT / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "Dir::State::lists": APT / "lists",
        "Dir::State::status": APT / "status",
        "Dir::Cache": APT / "cache",
        "Debug::NoLocking": 1,
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run([*apt, "update"])
    run([*apt, "--yes", "--download-only", "--no-install-recommends", "install", *PACKAGES])
    for package in sorted((APT / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(SYSTEM)], check=True)


def main() -> None:
    for program in ("qemu-aarch64", "aarch64-linux-gnu-gcc", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: apt-get install qemu-user gcc-aarch64-linux-gnu")
    shutil.rmtree(WORK, ignore_errors=True)
    unpack_system()
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.check_output([*PYTHON, "-c", show], text=True).strip()
    run([sys.executable, ROOT / ".ci" / "wheels.py", "aarch64", "--out", DIST])
    (wheel,) = DIST.glob("*aarch64.whl")
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    where = ["--target", SITE, "--only-binary=:all:", f"--python-version={version}", *platforms]
    run([*pip, *where, *WHEELS, wheel])
    # Beside the installed package, not beside the sources: the extension there is another one.
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, WORK / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", WORK)
    given = sys.argv[1:] or [f"tests/csrc/{name}" for name in QUICK]
    options = ("-q", "--each-value", "-p", "no:cacheprovider")
    variables = {"PYTHONPATH": str(SITE), "PYTHONDONTWRITEBYTECODE": "1"}
    run([*PYTHON, "-m", "pytest", *options, *given], cwd=WORK, **variables)


if __name__ == "__main__":
    main()
