"""docs/experiments.md: its code runs, and its table names what carries gradients."""

import re
from pathlib import Path

import numpy as np

import pyloss
from pyloss.autograd.tensor import FUNCTIONS, UFUNCS, Tensor

PAGE = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")


def test_the_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "experiments.md", "exec"), names)
    assert names["report"].ok and (tmp_path / "net.safetensors").exists()


def test_the_table_names_every_function_that_carries_gradients():
    table = " ".join(line for line in PAGE.splitlines() if line.startswith("| "))
    named = set(re.findall(r"[a-z_0-9]+", " ".join(re.findall(r"`([^`]*)`", table))))
    constants = {
        f for t in (FUNCTIONS, UFUNCS) for f, g in t.items() if g.__qualname__.startswith("_plain")
    }
    aliases = {np.conjugate, np.real, np.degrees, np.radians, Tensor.__getitem__, Tensor.astype}
    aliases |= {f for f in FUNCTIONS if f.__name__ == "astype" or f.__name__.endswith("_like")}
    aliases |= {np.shape, np.ndim, np.size}
    carried = {f.__name__ for t in (FUNCTIONS, UFUNCS) for f in t if f not in constants | aliases}
    carried = {"abs" if name == "absolute" else name for name in carried}
    assert carried <= named, sorted(carried - named)
    for name in {n for n in named if len(n) > 1} - {"linalg", "astype"}:
        assert name in carried or hasattr(pyloss, name) or name in ("ops", "pyloss"), name
