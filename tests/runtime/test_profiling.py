"""PYLOSS_PROFILE prints what ran; without it nothing is printed."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("setting", ["1", "0"])
def test_the_report_at_the_end(setting):
    code = "import numpy as np, pyloss; pyloss.softmax_cross_entropy(np.zeros((3, 5), np.float32), [0, 1, 2])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYLOSS_PROFILE": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stderr.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert ("softmax_cross_entropy" in rows) == (setting == "1")
    if setting == "1":
        assert rows["softmax_cross_entropy"][1] == "1"
        assert rows["all"]
