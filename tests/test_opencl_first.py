"""benchmarks/opencl_first.sh and its parts, as far as they need no device."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import opencl_check
import opencl_selection

SCRIPT = ROOT / "benchmarks" / "opencl_first.sh"


def first(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", [(), ("--quick",), ("a", "b"), ("a", "--quick", "b")])
def test_wrong_arguments(arguments, tmp_path):
    done = first(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_without_a_device_it_says_so_and_keeps_what_it_saw(tmp_path):
    folder = tmp_path / "new" / "folder"
    done = first(
        folder, "--quick", OPENCL_LIBRARY="/nonexistent/libOpenCL.so", CLINFO="no-such-clinfo"
    )
    assert done.returncode == 1, done.stderr
    summary = (folder / "summary.txt").read_text()
    assert summary in done.stdout
    assert re.search(r"clinfo +\d+ s  missing: no-such-clinfo", summary)
    assert "No device opencl:0: nothing else can run." in summary
    assert "PYLOSS_OPENCL_LIBRARY=/nonexistent/libOpenCL.so could not" in summary
    assert {path.name for path in folder.glob("*.txt")} == {
        "1-clinfo.txt",
        "1-device.txt",
        "summary.txt",
    }


def test_programs_are_those_of_the_build():
    built = re.search(r"OPENCL_PROGRAMS = (\[.*?\n\])", (ROOT / "setup.py").read_text(), re.S)
    assert opencl_check.stems() == sorted(eval(built[1]))


def test_every_function_has_its_turn_before_second_variants():
    items = [
        SimpleNamespace(nodeid=f"test.py::{name}[{i}]") for name in ("a", "b") for i in range(5)
    ]
    chosen = [item.nodeid for item in opencl_selection.in_turn(items)]
    assert chosen[:2] == ["test.py::a[0]", "test.py::b[0]"]
    assert Counter(name[:10] for name in chosen) == {"test.py::a": 3, "test.py::b": 3}


def test_every_operation_that_a_test_names_has_a_variant():
    items = [
        SimpleNamespace(
            nodeid=f"test.py::a[{name}-{n}]",
            callspec=SimpleNamespace(params={"name": name, "n": n}),
        )
        for name in ("exp", "log", "tanh")
        for n in range(4)
    ]
    chosen = [item.nodeid.partition("[")[2] for item in opencl_selection.in_turn(items)]
    assert chosen == ["exp-0]", "exp-1]", "exp-2]", "log-0]", "tanh-0]"]


@pytest.mark.parametrize(
    ("path", "given", "wanted"),
    [
        ("tests/csrc/test_matmul.py", {"place": "opencl", "format": "q4_k"}, True),
        ("tests/csrc/test_matmul.py", {"place": "opencl", "format": "q5_k"}, False),
        ("tests/csrc/test_matmul.py", {"place": "opencl in groups"}, False),
        ("tests/csrc/test_matmul.py", {"place": "avx2"}, False),
        ("tests/csrc/test_binding.py", None, False),
        ("tests/opencl/test_device.py", None, True),
    ],
)
def test_tests_that_are_chosen(path, given, wanted):
    item = SimpleNamespace(path=Path(path), get_closest_marker=lambda name: None)
    if given is not None:
        item.callspec = SimpleNamespace(params=given)
    assert opencl_selection.on_the_device(item) == wanted
