"""PYLOSS_OPENCL_PROFILE: times of commands by the device's clock, and of builds."""

import re

import pytest

from pyloss import _core
from pyloss.runtime import profiling

SCRIPT = """
import numpy as np, pyloss
x = pyloss.to_device(np.ones((4, 300), np.float32))
for _ in range(3):
    loss = pyloss.softmax_cross_entropy(x, np.arange(4))
x.copy()
loss.numpy()
"""


def test_what_ran_on_the_device(python, device):
    """A process that compiles the program, and the next one."""
    code = f"import sys\nsys.stderr = sys.stdout\n{SCRIPT}"
    cold, warm = (python(code, PYLOSS_OPENCL_PROFILE="1") for _ in range(2))
    for said in (cold, warm):
        rows = {tuple(line.split()[:2]): line.split() for line in said.splitlines()}
        kernel = rows["softmax_cross_entropy", "row_loss"]
        assert kernel[2] == "3" and float(kernel[3]) > 0
        assert re.search(r"^- +copy +1 .* 4800 bytes$", said, re.M)
        assert re.search(r"^- +copy from the device +1 .* 16 bytes$", said, re.M)
        busy, idle = (
            float(next(line for line in said.splitlines() if line.startswith(name)).split()[-1])
            for name in ("all ", "no command ran")
        )
        assert busy >= float(kernel[3]) and idle > 0
    assert "programs compiled: 1 in" in cold and "read from the cache" not in cold
    assert "programs read from the cache: 1 in" in warm and "compiled" not in warm


def test_nothing_is_said_without_it(python, device):
    code = f"import sys\nsys.stderr = sys.stdout\n{SCRIPT}"
    assert python(code, PYLOSS_OPENCL_PROFILE="0") == ""


def test_what_was_counted_is_forgotten(python, device):
    script = (
        "from pyloss import _core\n_core.opencl_profile(True)\n"
        + SCRIPT
        + """
commands, builds, span = _core.opencl_profile(False)
found = {(operation, command): calls for operation, command, calls, _, _ in commands}
assert found["softmax_cross_entropy", "row_loss"] == 3 and found["", "copy"] == 1, found
busy = sum(seconds for *_, seconds, _ in commands)
assert 0 < busy <= span
(program, options, cached, seconds, remarks), = builds
assert program == "rowloss/class" and "-DLOSS=softmax_cross_entropy" in options
assert not cached and seconds > 0
pyloss.softmax_cross_entropy(x, np.arange(4)).numpy()
assert _core.opencl_profile(True) == ([], [], 0.0)
"""
    )
    python(script)


def test_more_commands_than_are_kept_at_a_time(python, device):
    """Events are read in between, so that a long run does not keep all of them."""
    script = """
from pyloss import _core
_core.opencl_profile(True)
import numpy as np, pyloss
x = pyloss.to_device(np.ones(4, np.float32))
y = x.copy()
for _ in range(5000):
    y.assign(x)
y.wait()
(commands, _, _) = _core.opencl_profile(False)
print([calls for _, command, calls, _, _ in commands if command == "copy"])
"""
    assert python(script) == "[5001]"


def test_the_report(monkeypatch):
    builds = [
        ("matmul", "-DTM=8", False, 0.5, "ptxas info: 40 registers\n"),
        ("maps", "", False, 0.25, None),
        ("axes", "", True, 0.125, None),
    ]
    commands = [("", "clear", 2, 0.001, 64), ("lora_forward", "gemm", 4, 0.003, 0)]
    monkeypatch.setattr(_core, "opencl_profile", lambda on: (commands, builds, 0.005))
    lines = profiling.device_report().splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["lora_forward", "gemm", "4", "3.00", "75.0%"],
        ["-", "clear", "2", "1.00", "25.0%", "64", "bytes"],
        ["all", "6", "4.00"],
        ["no", "command", "ran", "1.00"],
    ]
    assert lines[5:] == [
        "programs compiled: 2 in 0.75 s, the longest 0.50 s",
        "programs read from the cache: 1 in 0.12 s, the longest 0.12 s",
        "remarks on matmul -DTM=8:",
        "ptxas info: 40 registers",
    ]


def test_queues_of_other_libraries(python, device):
    """A queue that keeps times is counted; another one is not."""
    pytest.importorskip("pyopencl", reason="needs pyopencl: pip install pyopencl")
    script = """
from pyloss import _core
_core.opencl_profile(True)
import numpy as np, pyloss, pyopencl as cl, pyopencl.array as cla
context = cl.Context([cl.get_platforms()[0].get_devices()[0]])
counts = []
for properties in (0, cl.command_queue_properties.PROFILING_ENABLE):
    x = cla.to_device(cl.CommandQueue(context, properties=properties), np.ones((2, 9), np.float32))
    pyloss.softmax_cross_entropy(x, np.arange(2)).numpy()
    counts.append(sum(row[2] for row in _core.opencl_profile(True)[0] if row[1] == "row_loss"))
print(counts)
"""
    assert python(script) == "[0, 1]"
