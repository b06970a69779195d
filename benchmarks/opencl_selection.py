"""A plugin of pytest for opencl_first.sh: few tests of tests/csrc and tests/opencl, every kernel.

    python -m pytest -p opencl_selection tests/csrc tests/opencl   (benchmarks/ on Python's path)

Of tests/csrc it keeps those on the first OpenCL device, in its own shape, a few variants of each
test function and one for each operation that it names. Each function's first variant runs before
all second ones, so that a run that is cut off has tried every function. At the end it says which
operations ran on the device and which of csrc/ops.def did not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from pyloss import _core

VARIANTS = int(os.environ.get("OPENCL_VARIANTS") or 3)
# The decoders of the other formats are alike; see tests/csrc/conftest.py.
FORMATS = ("f32", "f16", "q4_1", "q4_k", "affine4", "nf4")
# Parameters that name an operation.
NAMES = ("name", "kind", "function")
#: operations that ran on the device, of all processes
seen: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    _core.opencl_profile(True)  # before a test opens the device


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = in_turn(filter(on_the_device, items))
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen


def on_the_device(item: Any) -> bool:
    """Whether a test runs on the device, in its own shape, and with one of the chosen formats."""
    if "opencl" in item.path.parts:
        return not item.get_closest_marker("slow")
    given = parameters(item)
    return given.get("place") == "opencl" and given.get("format", FORMATS[0]) in FORMATS


def parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def in_turn(items: Iterable[Any]) -> list[Any]:
    """The first variants of each function: all first ones, then all second ones, and so on.

    Those that name an operation first come at the end.
    """
    count: Counter[str] = Counter()
    known: set[tuple[str, ...]] = set()
    turns: list[list[Any]] = [[] for _ in range(VARIANTS + 1)]
    for item in items:
        function, given = item.nodeid.partition("[")[0], parameters(item)
        named = (function, *(str(given[name]) for name in NAMES if name in given))
        if count[function] < VARIANTS:
            turns[count[function]].append(item)
        elif named not in known:
            turns[-1].append(item)
        count[function] += 1
        known.add(named)
    return [item for turn in turns for item in turn]


def pytest_sessionfinish(session: pytest.Session) -> None:
    commands, _, _ = _core.opencl_profile(True)
    seen.update(operation for operation, *_ in commands if operation)
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["operations"] = sorted(seen)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    seen.update(getattr(node, "workeroutput", {}).get("operations", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing = [name for name, _ in _core.ops() if name not in seen]
    terminalreporter.write_line(
        f"operations that ran on the device: {len(_core.ops()) - len(missing)} of "
        f"{len(_core.ops())}; not: {', '.join(missing) or 'none'}"
    )
