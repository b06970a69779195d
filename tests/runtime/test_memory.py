"""The memory of the process and of the machine are what the system says."""

from pathlib import Path

import numpy as np
import pytest

from pyloss.runtime import memory


def test_the_peak_grows_by_what_is_written():
    before = memory.peak_memory()
    size = before + (64 << 20)  # more than was ever in use
    array = np.ones(size, np.uint8)
    assert memory.peak_memory() >= array.nbytes
    del array
    assert memory.peak_memory() >= size


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not known on this system")
def test_free_memory_is_a_part_of_the_machines():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemTotal")))
    free = memory.free_memory()
    assert free is not None and total / 1000 < free < total


def test_what_no_file_says_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(
        memory, "open", lambda *a, **k: (_ for _ in ()).throw(OSError), raising=False
    )
    assert memory.free_memory() is None
    assert memory.peak_memory() > 1 << 20
