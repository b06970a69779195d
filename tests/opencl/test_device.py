"""Devices, arrays in their memory, the default device, mixed arguments, and failures."""

import subprocess
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pyloss
from pyloss import _core
from pyloss.runtime import device as devices, profiling

ROWS = """
import numpy as np, pyloss
x = np.linspace(-2, 2, 21, dtype=np.float32).reshape(3, 7)
labels = np.array([0, 3, 6])
want = pyloss.softmax_cross_entropy(x, labels)
def run():
    return pyloss.softmax_cross_entropy(pyloss.to_device(x), labels).numpy()
"""


def test_the_processor_is_always_there():
    first = pyloss.devices()[0]
    assert first.id == "cpu" and first.kind == "cpu" and first.fp64 and first.memory > 0
    assert pyloss.default_device().id == "cpu"


def test_devices_are_described(device):
    for i, found in enumerate(pyloss.devices()[1:]):
        assert found.id == f"opencl:{i}"
        assert found.name and found.platform and found.memory > 0
        assert found.kind in ("cpu", "gpu", "accelerator", "custom")


def test_a_machine_without_the_library_works_the_same(python):
    script = (
        ROWS
        + """
assert [d.id for d in pyloss.devices()] == ["cpu"]
try:
    run()
except pyloss.DeviceError as error:
    print(error)
assert np.isfinite(want).all()
"""
    )
    said = python(script, PYLOSS_OPENCL_LIBRARY="/nonexistent")
    assert (
        said
        == "there is no OpenCL device 'opencl:0': PYLOSS_OPENCL_LIBRARY=/nonexistent could not be loaded"
    )


def test_a_library_that_is_another_one_is_named(python):
    said = python(
        "from pyloss import _core; print(_core.opencl_devices()[1])",
        PYLOSS_OPENCL_LIBRARY="libm.so.6",
    )
    assert said == "the OpenCL library has no clGetPlatformIDs: OpenCL 1.2 is needed"


def test_importing_opens_no_library(python):
    assert python("import pyloss; print('libOpenCL' in open('/proc/self/maps').read())") == "False"


@pytest.mark.parametrize(
    "dtype",
    [
        "f8",
        "f4",
        "f2",
        ml_dtypes.bfloat16,
        "i8",
        "i4",
        "i2",
        "i1",
        "u8",
        "u4",
        "u2",
        "u1",
        "?",
        ">f4",
    ],
)
def test_arrays_go_and_come_back(device, rng, dtype):
    x = (10 * rng.random((3, 5, 2))).astype(dtype)
    on = pyloss.to_device(x, device)
    assert (on.shape, on.ndim, on.size, on.nbytes) == (x.shape, 3, 30, x.nbytes)
    assert on.dtype == x.dtype.newbyteorder("=") and on.device.id == device
    assert (on.numpy() == x).all() and (np.asarray(on) == x).all()
    assert (on.reshape(6, -1).numpy() == x.reshape(6, -1)).all()
    assert (on[1:].numpy() == x[1:]).all() and (on[0].numpy() == x[0]).all()
    assert pyloss.to_device(on) is on and isinstance(pyloss.to_device(on, "cpu"), np.ndarray)
    assert f"shape=(3, 5, 2), dtype={on.dtype}, device='opencl:0'" in repr(on)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ml_dtypes.bfloat16, "i4", "u1"])
def test_copies_stay_on_the_device(device, rng, dtype):
    x = (10 * rng.random((3, 5, 2))).astype(dtype)
    on = pyloss.to_device(x, device)
    _core.profile(True)
    copy, rows = on.copy(), on[1:].copy()
    rows[...] = on[:2]
    copied = _core.profile(False)
    assert not any("copied" in name for name in copied)
    assert (copy.numpy() == x).all() and (rows.numpy() == x[:2]).all()
    on[...] = np.zeros_like(x)
    assert (copy.numpy() == x).all(), "memory of its own"


def test_copies_that_cannot_be(device):
    x = pyloss.to_device(np.arange(6, dtype=np.float32), device)
    for other in (x[:5], x.numpy(), pyloss.to_device(np.arange(6, dtype=np.int32), device)):
        with pytest.raises(ValueError, match="needs a DeviceArray of the same device, type and"):
            x.assign(other)
    with pytest.raises(ValueError, match="the arrays overlap"):
        x[1:].assign(x[:5])
    x[2:4].assign(x[:2])
    x.assign(x)
    assert x.numpy().tolist() == [0, 1, 0, 1, 4, 5]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_small_arrays(device, shape):
    x = np.ones(shape, np.float32)
    assert pyloss.to_device(x).numpy().shape == shape and (pyloss.to_device(x).numpy() == x).all()


def test_layouts_are_copied(device):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (x.T, x[:, ::2], x[::-1], np.broadcast_to(x[0], (3, 6))):
        assert (pyloss.to_device(view).numpy() == view).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pyloss.to_device(np.array(["a"])), TypeError, "dtype <U1 cannot be on a device"),
        (
            lambda: pyloss.to_device(np.ones(2), "gpu"),
            ValueError,
            "'cpu' or 'opencl:<number>', not 'gpu'",
        ),
        (lambda: pyloss.to_device(np.ones(2), "opencl:99"), ValueError, "there are opencl:0 to"),
        (lambda: pyloss.set_default_device("opencl:x"), ValueError, "not 'opencl:x'"),
        (
            lambda: pyloss.to_device(np.ones(6)).reshape(4),
            ValueError,
            "cannot reshape array of size 6",
        ),
    ],
)
def test_bad_arguments(device, call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_mixed_arguments_are_named(device, rng):
    x = rng.standard_normal((2, 9)).astype(np.float32)
    on = pyloss.to_device(x)
    with pytest.raises(TypeError, match="logits_q is on opencl:0 and logits_p is a NumPy array"):
        pyloss.kl_div_loss(on, x)
    with pytest.raises(TypeError, match="logits is a NumPy array and targets is on opencl:0"):
        pyloss.binary_cross_entropy_with_logits(x, on)
    with pytest.raises(TypeError, match="out must be a pyloss.DeviceArray"):
        pyloss.softmax_cross_entropy(on, [0, 1], out=np.empty(2, np.float32))
    with pytest.raises(ValueError, match=r"label 9 at position 1 is outside \[0, 9\)"):
        pyloss.softmax_cross_entropy(on, [0, 9])
    with pytest.raises(TypeError, match="logits on a device must be float64"):
        pyloss.softmax_cross_entropy(pyloss.to_device(np.ones((2, 9), np.int32)), [0, 1])
    with pytest.raises(TypeError, match="x is on opencl:0 and w in host memory"):
        pyloss.linear_cross_entropy(on, rng.standard_normal((5, 9)).astype(np.float32), [0, 1])
    with pytest.raises(TypeError, match="w is on opencl:0 and x in host memory"):
        pyloss.linear_cross_entropy(x, pyloss.to_device(x.astype(np.float16)), [0, 1])
    core = pyloss._core.softmax_cross_entropy
    loss, labels = (
        pyloss.to_device(np.empty(2, np.float32)),
        pyloss.to_device(np.array([0, 9], np.int32)),
    )
    with pytest.raises(ValueError, match="labels at position 1 is 9"):
        core(on, labels, 0.0, 0.0, 0.0, None, None, None, loss, None, None)
    with pytest.raises(TypeError, match="logits is on opencl:0 and labels in host memory"):
        core(on, labels.numpy(), 0.0, 0.0, 0.0, None, None, None, loss, None, None)
    with pytest.raises(ValueError, match="loss overlaps dloss"):
        core(
            on,
            pyloss.to_device(np.zeros(2, np.int32)),
            0.0,
            0.0,
            0.0,
            None,
            loss,
            None,
            loss,
            None,
            None,
        )
    with pytest.raises(
        ValueError, match="dlogits overlaps logits; on a device a result needs memory of its own"
    ):
        core(
            on,
            pyloss.to_device(np.zeros(2, np.int32)),
            0.0,
            0.0,
            0.0,
            None,
            None,
            None,
            loss,
            None,
            on,
        )
    with pytest.raises(TypeError, match="gate is on opencl:0 and up in host memory"):
        pyloss._core.swiglu_forward(on, x, pyloss.to_device(x))


def test_too_large_an_array_is_a_memory_error(device):
    with pytest.raises(MemoryError, match="allocating an array on opencl:0"):
        pyloss._core.DeviceArray(0, (1 << 50,), "f32")
    assert pyloss.to_device(np.ones(3)).numpy().sum() == 3


def test_memory_that_runs_out_is_an_exception_and_the_next_call_works(python, shim):
    script = (
        ROWS
        + """
big = np.zeros(1 << 20, np.float32)
try:
    pyloss.to_device(big)
except MemoryError as error:
    print(error)
assert np.allclose(run(), want) and np.allclose(pyloss.softmax_cross_entropy(x, labels), want)
"""
    )
    said = python(script, PYLOSS_OPENCL_LIBRARY=shim, SHIM_MOST_BYTES="1000000")
    assert "allocating an array on opencl:0" in said and "CL_MEM_OBJECT_ALLOCATION_FAILURE" in said


def test_a_build_error_carries_the_log(python, shim):
    script = (
        ROWS
        + """
try:
    run()
except pyloss.DeviceError as error:
    print(error)
assert np.isfinite(want).all() and issubclass(pyloss.DeviceError, RuntimeError)
"""
    )
    said = python(script, PYLOSS_OPENCL_LIBRARY=shim, SHIM_OPTIONS="-DREAL=nonsense")
    assert (
        "softmax_cross_entropy on opencl:0" in said
        and "clBuildProgram: CL_BUILD_PROGRAM_FAILURE" in said
    )
    assert "error" in said.split("FAILURE", 1)[1]


def test_float64_needs_a_device_that_has_it(python, shim):
    script = (
        ROWS
        + """
assert not pyloss.devices()[1].fp64
try:
    pyloss.softmax_cross_entropy(pyloss.to_device(x.astype(np.float64)), labels)
except pyloss.DeviceError as error:
    print(error)
assert np.allclose(run(), want, rtol=1e-6), run() - want
"""
    )
    assert "has no float64 arithmetic" in python(
        script, PYLOSS_OPENCL_LIBRARY=shim, SHIM_NO_FP64="1"
    )


def test_use_after_fork_is_refused(python, device):
    script = (
        ROWS
        + """
import os, sys, warnings
warnings.simplefilter("ignore")
on = pyloss.to_device(x)
if os.fork() == 0:
    try:
        on.numpy()
    except pyloss.DeviceError as error:
        print(error, flush=True)
    del on  # touches nothing of the driver's
    assert np.isfinite(pyloss.softmax_cross_entropy(x, labels)).all()
    os._exit(0)
os.wait()
print((on.numpy() == x).all())
"""
    )
    said = python(script)
    assert "was forked from one that had already used OpenCL" in said and said.endswith("True")


def test_fork_before_the_first_use_is_fine(python, device):
    script = (
        ROWS
        + """
import os
if os.fork() == 0:
    print(np.allclose(run(), want), flush=True)
    os._exit(0)
os.wait()
print(np.allclose(run(), want))
"""
    )
    assert python(script).split() == ["True", "True"]


def test_threads_share_a_device(device, rng):
    x = rng.standard_normal((4, 8, 300)).astype(np.float32)
    labels = rng.integers(0, 300, 8)
    want = [pyloss.softmax_cross_entropy(a, labels) for a in x]
    failures = []

    def work(i):
        for _ in range(20):
            got = pyloss.softmax_cross_entropy(pyloss.to_device(x[i]), labels).numpy()
            if not np.allclose(got, want[i], rtol=1e-5):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_the_default_device(device, rng):
    x, labels = rng.standard_normal((3, 40)).astype(np.float32), np.array([1, 2, 3])

    def loss(q):
        return pyloss.softmax_cross_entropy(q, labels, reduction="mean")

    want, slope = pyloss.value_and_grad(loss)(x)
    pyloss.set_default_device(device)
    try:
        assert pyloss.default_device().id == device
        got, gradient = pyloss.value_and_grad(loss)(x)
        out = np.empty(3, np.float32)
        pyloss.softmax_cross_entropy(x, labels, out=out)
    finally:
        pyloss.set_default_device("cpu")
    assert isinstance(gradient, np.ndarray) and np.allclose(gradient, slope, atol=1e-6)
    assert np.isclose(got, want, rtol=1e-6) and np.isclose(out.mean(), want, rtol=1e-6)


def test_pyloss_device_chooses_it(python, device):
    assert (
        python("import pyloss; print(pyloss.default_device().id)", PYLOSS_DEVICE="opencl:0")
        == "opencl:0"
    )
    script = (
        "import pyloss\ntry:\n    pyloss.default_device()\nexcept ValueError as e:\n    print(e)"
    )
    assert (
        python(script, PYLOSS_DEVICE="cuda")
        == "PYLOSS_DEVICE: a device is named 'cpu' or 'opencl:<number>', not 'cuda'"
    )


def test_the_cache_of_programs(python, device, tmp_path):
    script = ROWS + "print(np.allclose(run(), want))"
    assert python(script) == "True"
    (file,) = (tmp_path / "cache" / "opencl").iterdir()
    whole, changed = file.read_bytes(), file.stat().st_mtime_ns
    assert python(script) == "True"
    assert file.stat().st_mtime_ns == changed, "a warm cache is only read"
    for damaged in (
        b"",
        whole[:10],
        whole[:-5],
        whole[:-1] + bytes([whole[-1] ^ 1]),
        b"x" * len(whole),
    ):
        file.write_bytes(damaged)
        assert python(script) == "True"
        assert file.read_bytes()[:8] == whole[:8] and file.stat().st_size > 100, (
            "a damaged file is written anew"
        )
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    file.unlink()
    file.parent.chmod(0o500)  # root may still write; nothing may fail either way
    assert python(script) == "True"
    file.parent.chmod(0o700)


def test_pyopencl_arrays_are_taken_as_they_are(device, rng):
    cl = pytest.importorskip("pyopencl", reason="needs pyopencl: pip install pyopencl")
    import pyopencl.array as cla

    context = cl.Context([cl.get_platforms()[0].get_devices()[0]])
    queue = cl.CommandQueue(context)
    x, p = rng.standard_normal((2, 5, 33)).astype(np.float32)
    xs, ps = cla.to_device(queue, x), cla.to_device(queue, p)
    loss = pyloss.kl_div_loss(xs, ps)
    assert isinstance(loss, pyloss.DeviceArray) and loss.device.id.startswith("opencl:")
    assert np.allclose(loss.numpy(), pyloss.kl_div_loss(x, p), rtol=1e-5)
    value, gradient = pyloss.value_and_grad(lambda q: pyloss.kl_div_loss(q, ps, reduction="sum"))(
        xs
    )
    want, slope = pyloss.value_and_grad(lambda q: pyloss.kl_div_loss(q, p, reduction="sum"))(x)
    assert np.isclose(value, want, rtol=1e-5) and np.allclose(gradient.numpy(), slope, atol=1e-6)
    assert np.allclose(pyloss.kl_div_loss(xs[2:], ps[2:]).numpy(), loss.numpy()[2:]), (
        "an offset in the buffer"
    )
    with pytest.raises(ValueError, match="different OpenCL contexts"):
        pyloss.kl_div_loss(xs, pyloss.to_device(p))
    with pytest.raises(ValueError, match="must be C-contiguous"):
        pyloss.kl_div_loss(xs[:, ::2], ps[:, ::2])


def test_the_core_is_not_linked_with_opencl():
    (core,) = Path(pyloss.__file__).parent.glob("_core*.so")
    listed = subprocess.run(["ldd", str(core)], capture_output=True, text=True)
    assert "libc" in listed.stdout and "OpenCL" not in listed.stdout


def test_the_profile_says_what_moved(device):
    _core.profile(True)
    x = pyloss.to_device(np.ones((5, 3), np.float32), device)
    y = x.copy()
    ids = pyloss.to_device(np.arange(5, dtype=np.int32), device)
    _core.gather_rows(x, ids, y)
    y.numpy()
    ids.numpy()  # no copy: the host still has the values
    zeros = devices.zeros_like(x)
    report = {line.split("  ")[0].strip(): line.split() for line in profiling.report().splitlines()}
    _core.profile(False)
    assert report["copied to devices"][3] == "2" and report["copied to devices"][5:] == [
        "80",
        "bytes",
    ]
    assert report["copied from devices"][3] == "1" and report["copied from devices"][5:] == [
        "60",
        "bytes",
    ]
    assert report["gather_rows"][1] == "1" and "scale" not in report
    assert not zeros.numpy().any()
    assert not any("copied" in name for name in _core.profile(False))
