"""Fixtures for tests on OpenCL devices; without a device the tests are skipped, except in CI."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import pyloss
from pyloss import _core


def unavailable(reason):
    """Skip, except in CI, which has everything that these tests need."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have it: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def device():
    """The name of the first OpenCL device."""
    found, reason = _core.opencl_devices()
    if not found:
        unavailable(f"no OpenCL device: {reason}; apt-get install pocl-opencl-icd")
    return "opencl:0"


@pytest.fixture
def groups(device):
    """Run row kernels in the shape of GPUs: work-groups that share a row."""
    if pyloss.devices()[1].kind == "cpu":  # other devices already have this shape
        _core.opencl_shape(8, 4, 2)
    yield
    _core.opencl_shape(0, 0, 0)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def python(tmp_path):
    """Run a script in a new process with its own cache; return its output.

    `environment` is added to the process's variables.
    """

    def run(script, expect=0, **environment):
        given = {**os.environ, "PYLOSS_CACHE": str(tmp_path / "cache"), **environment}
        done = subprocess.run(
            [sys.executable, "-c", script], env=given, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout.strip()

    return run


# An OpenCL library that forwards all calls to the real one, except those that the environment makes
# fail.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))
typedef int32_t (*info_fn)(void *, uint32_t, size_t, void *, size_t *);
typedef int32_t (*build_fn)(void *, uint32_t, const void *, const char *, void *, void *);
typedef int32_t (*run_fn)(void *, void *, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t, const void *, void *);
typedef void *(*buffer_fn)(void *, uint64_t, size_t, void *, int32_t *);
int32_t clGetDeviceInfo(void *device, uint32_t what, size_t size, void *value, size_t *needed) {
    if (what == 0x1032 && getenv("SHIM_NO_FP64")) return -30;
    return REAL(info_fn, "clGetDeviceInfo")(device, what, size, value, needed);
}
int32_t clBuildProgram(void *program, uint32_t n, const void *devices, const char *options, void *notify, void *user) {
    if (getenv("SHIM_OPTIONS")) options = getenv("SHIM_OPTIONS");
    return REAL(build_fn, "clBuildProgram")(program, n, devices, options, notify, user);
}
int32_t clEnqueueNDRangeKernel(void *queue, void *kernel, uint32_t dims, const size_t *offset, const size_t *size, const size_t *group,
                               uint32_t n, const void *events, void *event) {
    if (getenv("SHIM_NO_KERNELS")) return -36;
    return REAL(run_fn, "clEnqueueNDRangeKernel")(queue, kernel, dims, offset, size, group, n, events, event);
}
void *clCreateBuffer(void *context, uint64_t flags, size_t bytes, void *host, int32_t *code) {
    const char *most = getenv("SHIM_MOST_BYTES");
    if (most && bytes > (size_t)atoll(most)) {
        *code = -4;
        return NULL;
    }
    return REAL(buffer_fn, "clCreateBuffer")(context, flags, bytes, host, code);
}
"""


@pytest.fixture(scope="session")
def shim(device, tmp_path_factory):
    """The path of a library for PYLOSS_OPENCL_LIBRARY whose calls can fail.

    SHIM_NO_FP64, SHIM_OPTIONS, SHIM_MOST_BYTES and SHIM_NO_KERNELS choose the failures.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        unavailable("needs a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    path = folder / "libshim.so"
    libraries = ["-Wl,--no-as-needed", "-l:libOpenCL.so.1", "-ldl"]
    command = [compiler, "-shared", "-fPIC", "-o", path, folder / "shim.c", *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        unavailable(f"the library between could not be made: {done.stderr}")
    return str(path)
