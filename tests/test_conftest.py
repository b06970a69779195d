"""The choice of variants, `--each-value` and `--each-pair`, on a file of tests of its own."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.fixture(params=["p", "q", "r"])
def place(request):
    return request.param

@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("kind", ["a", "b", "c"])
def test_crossed(place, size, flag, kind):
    pass

@pytest.mark.parametrize(("a", "b", "c"), [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_together(a, b, c):
    pass

@pytest.mark.parametrize("one", [[], {}])
def test_one(one):
    pass

def test_none():
    pass
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A function that gives the collected variants, as lists of their values, by the test."""
    folder = tmp_path_factory.mktemp("tests")
    shutil.copy(Path(__file__).parent / "conftest.py", folder)
    (folder / "test_file.py").write_text(TESTS)

    def collect(*options):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", "/dev/null"]
        done = subprocess.run(
            [*command, "--rootdir", folder, *options, folder], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = {}
        for name, values in re.findall(r"::(\w+)(?:\[(.*)\])?$", done.stdout, re.M):
            found.setdefault(name, []).append(values.split("-"))
        return found

    return collect


@pytest.mark.parametrize(("option", "together"), [("--each-value", 1), ("--each-pair", 2)])
def test_enough_variants_are_chosen_and_few(collected, option, together):
    everything, found = collected(), collected(option)
    assert [len(everything[f"test_{name}"]) for name in ("crossed", "together", "one")] == [
        72,
        4,
        2,
    ]

    def places(variants):
        return {
            chosen
            for values in variants
            for chosen in itertools.combinations(enumerate(values), together)
        }

    assert places(found["test_crossed"]) == places(everything["test_crossed"])
    assert len(found["test_crossed"]) <= (4 if together == 1 else 16)
    for whole in ("test_together", "test_one", "test_none"):
        assert found[whole] == everything[whole]
