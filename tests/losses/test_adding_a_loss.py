"""docs/adding_a_loss.md, carried out in a copy of the project: the loss builds and is tested."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_a_loss.md"
BLOCK = re.compile(
    r"^`([\w/.]+)`(?:, in `(\w+)`)?:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def steps():
    """(file, the list in it or "", the text that the page adds there)"""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_a_header_and_a_line_are_all_that_the_core_needs():
    core = {name: text for name, _, text in steps() if name.startswith("csrc/")}
    assert [name for name in core if not (ROOT / name).exists()] == ["csrc/losses/jeffreys.h"]
    assert core["csrc/losses.def"].count("\n") == 1 and len(core) == 2


@pytest.mark.slow  # builds the core
def test_the_page_adds_a_loss(tmp_path):
    pytest.importorskip(
        "setuptools", reason="building needs setuptools: pip install 'pyloss[test]'"
    )
    for name in ("csrc", "pyloss"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    (tmp_path / "tests" / "losses").mkdir(parents=True)
    tests = (ROOT / "tests" / "losses").glob("*.py")
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *tests):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for name, into, text in steps():
        path, start = tmp_path / name, f"\n{into} = [\n"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        assert not into or before.count(start) == 1
        if into:
            changed = before.replace(start, start + text)
        elif name == "csrc/losses.def":  # below the existing lines
            lines = before.rindex('#include "losses/')
            end = before.index("\n", lines) + 1
            changed = before[:end] + text + before[end:]
        else:
            changed = before + text
        path.write_text(changed, encoding="utf-8")

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    # A quick build: one instruction set, little optimization.
    run(
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        PYLOSS_BASELINE_ONLY="1",
        PYLOSS_CFLAGS="-O1",
        PYLOSS_ISA="",
    )
    found = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/losses/test_values.py",
        "-k",
        "jeffreys",
        PYLOSS_ISA="",
    )
    passed = re.search(r"(\d+) passed", found)
    assert passed and int(passed[1]) > 100, found
    where = run(
        "-c",
        "import pyloss; print(pyloss.__file__, pyloss.jeffreys_loss([[1, 1000]], [[1000, 1]]))",
        PYLOSS_ISA="",
    )
    assert where.split()[0].startswith(str(tmp_path)) and where.split()[1] == "[1998.]"
