"""The cache of compiled programs: files that another user could have written are never used."""

import os
import shutil
import stat
import subprocess
import sys

import pytest

SCRIPT = """
import warnings
import numpy as np, pyloss
x = np.arange(12, dtype=np.float32).reshape(3, 4)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for rows in (3, 2):
        loss = pyloss.softmax_cross_entropy(pyloss.to_device(x[:rows]), [0, 1, 2][:rows]).numpy()
        assert np.allclose(loss, pyloss.softmax_cross_entropy(x[:rows], [0, 1, 2][:rows]))
    pyloss.stablemax(pyloss.to_device(x)).numpy()
print("\\n".join(f"{w.category.__name__}: {w.message}" for w in said))
"""
REFUSED = "RuntimeWarning: compiled OpenCL kernels are not cached: {path} {reason}"
NOBODY = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def folder(tmp_path):
    """The cache's folder, which does not exist yet."""
    return tmp_path / "cache" / "opencl"


@pytest.fixture(scope="module")
def compiled(device, tmp_path_factory):
    """A cache in which a process has left both programs: compiling them takes seconds."""
    cache = tmp_path_factory.mktemp("compiled")
    given = {**os.environ, "PYLOSS_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=given, check=True, timeout=300)
    return cache / "opencl"


@pytest.fixture
def filled(compiled, folder):
    """The cache's folder with both programs, and their permissions."""
    return shutil.copytree(compiled, folder)


def test_the_cache_is_for_its_user_alone(python, folder):
    """Permissions do not depend on the umask, and no temporary file is left."""
    before = os.umask(0)
    try:
        assert python(SCRIPT) == ""
    finally:
        os.umask(before)
    files = list(folder.iterdir())
    assert len(files) == 2 and all(f.suffix == ".bin" for f in files)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_can_write_to(python, filled, mode):
    """One warning for all programs; existing files are not opened and none is written."""
    folder = filled
    first, second = sorted(folder.iterdir())
    second.unlink()
    os.utime(first, ns=(1, 1))
    folder.chmod(mode)
    assert python(SCRIPT) == REFUSED.format(path=folder, reason="can be written to by other users")
    assert list(folder.iterdir()) == [first] and first.stat().st_atime_ns == 1
    folder.chmod(0o700)
    assert python(SCRIPT) == ""
    assert len(list(folder.iterdir())) == 2


@root
def test_a_folder_of_another_user(python, folder):
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    assert python(SCRIPT) == REFUSED.format(path=folder, reason="belongs to another user")
    assert not list(folder.iterdir())


def test_a_folder_that_is_a_link_or_none(python, folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert python(SCRIPT) == REFUSED.format(path=folder, reason="is a link or no folder")
    folder.unlink()
    folder.write_text("a file")
    assert python(SCRIPT) == REFUSED.format(path=folder, reason="is a link or no folder")
    assert not list((tmp_path / "elsewhere").iterdir()) and folder.read_text() == "a file"


def spoil(file, how, tmp_path):
    """Replace or alter a file of the cache; return why it is refused."""
    if how == "link":
        (tmp_path / "target").write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(tmp_path / "target")
        return "is a link"
    if how == "pipe":
        file.unlink()
        os.mkfifo(file, 0o600)
        return "is no file"
    if how == "owner":
        os.chown(file, NOBODY, NOBODY)
        return "belongs to another user"
    file.chmod(0o666 if how == "world" else 0o620)
    return "can be written to by other users"


@pytest.mark.parametrize(
    "how", ["link", "pipe", pytest.param("owner", marks=root), "world", "group"]
)
def test_a_file_that_others_can_have_written(python, filled, tmp_path, how):
    """The file is reported, ignored and replaced by the user's own; a link's target stays."""
    file = min(filled.iterdir())
    whole = file.read_bytes()
    reason = spoil(file, how, tmp_path)
    assert python(SCRIPT) == REFUSED.format(path=file, reason=reason)
    status = file.lstat()
    assert (
        stat.S_ISREG(status.st_mode)
        and stat.S_IMODE(status.st_mode) == 0o600
        and status.st_uid == os.geteuid()
    )
    assert how != "link" or (tmp_path / "target").read_bytes() == whole
    assert python(SCRIPT) == ""
