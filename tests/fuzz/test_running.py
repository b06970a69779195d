"""The fuzz runner: which faults it reports, one planted per kind, and which answers it accepts."""

import ctypes
import os
import time
from types import ModuleType

import mutation
import numpy as np
import pytest
import running

from pyloss.errors import DeviceError, FormatError

BAD = 7  # the case with the fault


def planted(fault):
    """A target whose case `BAD` calls `fault`; the library accepts the others."""
    target = ModuleType("target_planted")
    target.prepare = lambda: None
    target.make = lambda m: {"case": str(m.case).encode()}
    target.use = lambda made, folder: fault() if made["case"] == str(BAD).encode() else None
    return target


def raising(error):
    def fault():
        raise error

    return fault


def hang():
    while True:
        pass


def fill():
    np.ones(200 << 20, np.uint8)


class Foreign(BaseException):
    """Like the exceptions of Rust's panics, which do not derive from Exception."""


FAULTS = {
    "died by SIGSEGV": lambda: ctypes.string_at(0),
    "died by SIGABRT": os.abort,
    "ended the process with status 5": lambda: os._exit(5),
    "more than 0.5 s": hang,
    "blocked for 3 s": lambda: time.sleep(60),
    "more than 50 MB": fill,
    "KeyError": raising(KeyError("x")),
    "RecursionError": raising(RecursionError("too deep")),
    "OverflowError": raising(OverflowError("x")),
    "SystemExit": raising(SystemExit(3)),
    "Foreign": raising(Foreign("x")),
    "ValueError without a text": raising(ValueError()),
    "ValueError its text has 'NoneType'": raising(ValueError("'NoneType' object has no items")),
    "TypeError its text has 'a:f32['": raising(TypeError('add: N in "a:f32[*N] b:f32[*N]"')),
    "TypeError its text has 'object has no attribute'": raising(
        TypeError("'int' object has no attribute 'x'")
    ),
    "ValueError a text of": raising(ValueError("z" * 5000)),
}
ANSWERS = [
    ValueError("x is 3; it must be at least 4"),
    TypeError("x must be text"),
    FormatError("a", "b", "c"),
    MemoryError(),
]
ANSWERS += [
    OSError(2, "no such file", "x"),
    DeviceError("no device"),
    UnicodeEncodeError("utf-8", "a", 0, 1, "no"),
]


def test_memory_is_noticed_where_the_process_kept_as_much_free(monkeypatch):
    monkeypatch.setattr(running, "SECONDS", 8.0)
    monkeypatch.setattr(running, "MEGABYTES", 50)
    kept = [np.ones(8000) for _ in range(6000)]
    last = kept.pop()  # stays at the heap's end, so the memory before it is not returned
    kept.clear()
    (finding,) = running.run(planted(fill), 20).findings.values()
    assert finding.what.startswith("more than 50 MB") and len(last)


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_caught_and_said_of_its_case(what, monkeypatch):
    # The system may take a second to provide new memory.
    monkeypatch.setattr(running, "SECONDS", 0.5 if FAULTS[what] is hang else 8.0)
    monkeypatch.setattr(running, "BLOCKED", 3.0 if "blocked" in what else 30.0)
    monkeypatch.setattr(running, "MEGABYTES", 50)
    report = running.run(planted(FAULTS[what]), 20)
    (finding,) = report.findings.values()
    assert finding.what.startswith(what) and finding.cases == [BAD] and finding.alone
    assert report.executed == 20, "the cases after it are run too"
    assert f"planted --case {BAD}" in str(report)


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: type(error).__name__)
def test_a_clear_error_is_an_answer(error):
    report = running.run(planted(raising(error)), 20)
    assert not report.findings and report.executed == 20 and report.accepted == 19


def test_what_one_case_leaves_to_another_is_said():
    seen = []

    def fault():
        raise KeyError("x")

    target = planted(fault)
    target.use = lambda made, folder: fault() if seen else seen.append(1)
    (finding,) = running.run(target, 3).findings.values()
    assert finding.cases == [1, 2] and not finding.alone


def test_unchanged_cases_must_be_taken():
    pristine = next(case for case in range(1000) if mutation.Mutator("planted", case).pristine)
    target = planted(None)
    target.use = lambda made, folder: raising(ValueError("a clear sentence"))()
    (finding,) = running.run(target, pristine + 1).findings.values()
    assert "refused although nothing was changed" in finding.what and finding.cases == [pristine]


def test_mutations_reach_every_place_of_a_tree():
    tree = {"a": [1, {"b": None}], "c": "text", "d": {"e": {"f": 2.5}}}
    text = mutation.Mutator("x", 0).dumps(tree)
    changed = {mutation.Mutator("tree", case).json(text) for case in range(300)}
    assert len(changed) > 200
    for untouched in (b'"c": "text"', b'"b": null', b'"f": 2.5'):
        assert any(untouched not in data for data in changed) and any(
            untouched in data for data in changed
        )
