"""Five hundred cases of every fuzz target; a failure prints the command that repeats it.

`make fuzz N=100000` runs more cases.
"""

import os
import subprocess
import sys

import pytest
import run
import running

CASES = 500
#: Smallest share of cases that the library must accept; with fewer, most fail at the first check.
ACCEPTED = 0.05


@pytest.mark.parametrize("name", run.TARGETS)
def test_no_case_crashes_hangs_or_gives_a_bad_error(name):
    report = running.run(run.target(name), CASES)
    assert not report.findings, str(report)
    assert report.executed == CASES and report.accepted >= ACCEPTED * CASES, str(report)


def test_a_case_is_the_same_in_every_process():
    """Two processes differ in the hashes of texts and so in the order of sets."""
    cases = [(name, case) for name in run.TARGETS for case in range(12)]
    program = f"""
import sys
sys.path.insert(0, {str(run.HERE)!r})
import run, running
for name in run.TARGETS:
    run.target(name).prepare()
for name, case in {cases!r}:
    print(name, case, running.digest(run.target(name), case))
"""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8",
    }
    other = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    for name in run.TARGETS:
        run.target(name).prepare()
    assert other.stdout.splitlines() == [
        f"{name} {case} {running.digest(run.target(name), case)}" for name, case in cases
    ]
