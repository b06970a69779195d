"""Runs a target's cases in forked children; finds crashes, hangs, memory use and bad errors.

A target is a module with

- `prepare()`: imports, and the data that all cases start from. Called once, in the parent.
- `make(m)`: the content of case `m` (a `mutation.Mutator`), without side effects. Files are a dict
  of names to bytes.
- `use(made, folder)`: gives the content to the library. It returns if the library accepts it, and
  lets errors through.

A target may have `ALLOWED`, more exception types that are valid answers, and `check_text(error)`,
which replaces `bad_text`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import hashlib
import json
import mmap
import os
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from mutation import Mutator

from pyloss.errors import DeviceError

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
SECONDS = 20.0 if SANITIZED else 2.0  # processor time of a case
BLOCKED = 60.0  # wall time of a case
MEGABYTES = 1000 if SANITIZED else 200  # memory of a case
BATCH = 1000  # cases per child

#: Valid answers to bad input (a FormatError is a ValueError); other exceptions are findings.
ANSWERS = (ValueError, TypeError, MemoryError, OSError, DeviceError)

# Words of Python's own errors or of the core's tables. Our errors are sentences that say what was
# given and what is allowed.
_NOT_SENTENCES = re.compile(
    r"NoneType|object has no attribute|panicked|object is not (subscriptable|iterable|callable)|unhashable type|unsupported operand"
    r"|not supported between instances|Traceback|\b\w+\??:(f32|f64|i32|i64|u8|weight|stack|float|acc)\[|math domain error"
    r"|not enough values to unpack|too many values to unpack|cannot convert float|indices must be integers|has no len\(\)"
    r"|invalid literal for int|could not convert string|positional argument|unexpected keyword|<function"
    r"|assert|must be real number|cannot be interpreted as an integer|NULL|[Ii]nternal error"
)
LONGEST = 4000  # characters of an error


def bad_text(error: BaseException) -> str | None:
    """Why the text of an error is not acceptable, or None."""
    text = str(error)
    if not text:
        return None if isinstance(error, MemoryError) else "without a text"
    if len(text) > LONGEST:
        return f"a text of {len(text)} characters"
    # A failing template reports Python's words.
    found = _NOT_SENTENCES.search(text.split("the chat template failed: ")[0])
    return f"its text has {found[0]!r}" if found else None


@dataclass
class Finding:
    """One kind of wrong behavior: what happened, where, and the cases that showed it."""

    what: str
    detail: str
    cases: list[int] = field(default_factory=list)
    alone: bool = True  # whether its first case shows it in a new process


@dataclass
class Report:
    """The result of `executed` cases; the library accepted `accepted` of them."""

    target: str
    executed: int = 0
    accepted: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.target}: {self.executed} executions, {self.accepted} accepted, {len(self.findings)} kinds of findings"
        ]
        for finding in self.findings.values():
            first = f"python tests/fuzz/run.py {self.target} --case {finding.cases[0]}"
            more = (
                f" (and {len(finding.cases) - 1} more: {finding.cases[1:6]})"
                if len(finding.cases) > 1
                else ""
            )
            alone = "" if finding.alone else " — only after earlier cases of the same process"
            lines += [
                f"  {finding.what}{alone}",
                f"    {first}{more}",
                *(f"      {line}" for line in finding.detail.split("\n")),
            ]
        return "\n".join(lines)


def name_of(target: ModuleType) -> str:
    """`gguf` for the module `target_gguf`."""
    return target.__name__.rpartition(".")[2].removeprefix("target_")


def digest(target: ModuleType, case: int) -> str:
    """A hash of everything that case `case` consists of."""
    m = Mutator(name_of(target), case)
    made = target.make(m)
    parts = hashlib.sha256(repr(m.random.getstate()).encode())
    _hash(parts, made)
    return parts.hexdigest()


def _hash(parts: Any, value: Any) -> None:
    """Add an object of a case to a hash; equal objects give equal hashes in every process."""
    if isinstance(value, Mapping):
        value = [x for item in value.items() for x in item]
    if isinstance(value, (tuple, list)):
        parts.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            _hash(parts, item)
    elif isinstance(value, np.ndarray):
        parts.update(f"{value.dtype} {value.shape} {value.strides}".encode())
        parts.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif value is None or isinstance(value, (bytes, str, int, float, complex, np.generic)):
        parts.update(repr(value).encode())
    else:
        parts.update(type(value).__name__.encode())


def put_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` hold exactly these files.

    They are new files, so that a file still mapped by an earlier case stays intact.
    """
    for name in os.listdir(folder):
        place = folder / name
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    for name, data in files.items():
        place = folder / name
        if place.parent != folder:
            place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def where(error: BaseException) -> str:
    """The innermost places of the package in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/pyloss/" in f.filename and "/tests/" not in f.filename] or frames
    return " < ".join(f"{Path(f.filename).name}:{f.name}:{f.lineno}" for f in reversed(ours[-3:]))


def attempt(target: ModuleType, case: int, folder: Path) -> tuple[bool, str, str]:
    """Run one case here: (whether the library accepted it, what was wrong or "", details)."""
    m = Mutator(name_of(target), case)
    made = target.make(m)
    allowed = ANSWERS + tuple(getattr(target, "ALLOWED", ()))
    try:
        target.use(made, folder)
    except allowed as error:
        wrong = getattr(target, "check_text", bad_text)(error)
        if m.pristine:
            wrong = "refused although nothing was changed"
        if not wrong:
            return False, "", ""
        return False, f"{type(error).__name__} {wrong}, {where(error)}", _cut(str(error))
    except BaseException as error:
        return (
            False,
            f"{type(error).__name__}, {where(error)}",
            _cut("".join(traceback.format_exception(error)[-6:]) or str(error)),
        )
    return True, "", ""


def _cut(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 1500 else f"{text[:700]} … {text[-700:]}"


def _status(pid: str = "self") -> float:
    """Resident megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _give_back() -> None:
    """Return free memory to the system; a child could fill it without raising its peak."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _child(target: ModuleType, cases: range, place: mmap.mmap, out: int, folder: Path) -> None:
    """Run `cases`; write each finding as JSON, then the number of accepted cases, to `out`."""
    errors = os.open(folder.parent / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    faulthandler.enable(2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, 2, all_threads=False, chain=True)
    if not SANITIZED:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), size + (2 << 30)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = lambda descriptor: None  # the files need not last
    gc.freeze()
    before, accepted = _status(), 0
    for case in cases:
        struct.pack_into("<qq", place, 0, case, accepted)
        os.ftruncate(errors, 0)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        took, what, detail = attempt(target, case, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        accepted += took
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        if peak - before > MEGABYTES:
            what, detail = (
                what or f"more than {MEGABYTES} MB",
                f"{detail}\n{peak - before:.0f} MB more at the peak",
            )
        if what:
            os.write(out, json.dumps([case, what, detail]).encode() + b"\n")
        if peak - before > MEGABYTES:
            struct.pack_into("<qq", place, 0, case + 1, accepted)
            os._exit(3)  # a new process starts with a new peak
    struct.pack_into("<qq", place, 0, cases.stop, accepted)


def _crash(status: int, folder: Path, blocked: bool) -> tuple[str, str]:
    said = (folder.parent / "stderr").read_text(errors="replace")
    frames = re.findall(r'File "[^"]*/pyloss/([^"]+)", line (\d+) in (\w+)', said)
    at = " < ".join(f"{Path(file).name}:{name}:{line}" for file, line, name in frames[:3])
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if blocked:
            what = f"blocked for {BLOCKED:g} s"
        elif number == signal.SIGPROF:
            what = f"more than {SECONDS:g} s"
        else:
            what = f"died by {signal.Signals(number).name}"
    else:
        what = f"ended the process with status {os.waitstatus_to_exitcode(status)}"
    harness = re.search(r'File "[^"]*/tests/fuzz/(\w+\.py)", line (\d+), in make', said)
    return f"{what}, {at or (harness and ' '.join(harness.groups())) or said[-200:]}", _cut(said)


def _batch(target: ModuleType, cases: range, folder: Path, report: Report) -> int:
    """Run cases in one child until it ends; add to `report` and return the next case's number."""
    place = mmap.mmap(-1, 16)
    struct.pack_into("<qq", place, 0, cases.start, 0)
    inward, outward = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    _give_back()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(inward)
            os.setpgid(0, 0)
            _child(target, cases, place, outward, folder)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(outward)
    found, seen, since, blocked = b"", -1, time.monotonic(), False
    while True:
        ready, _, _ = select.select([inward], [], [], min(2.0, BLOCKED / 4))
        if ready:
            data = os.read(inward, 1 << 16)
            if not data:
                break
            found += data
        case = struct.unpack_from("<q", place)[0]
        if case != seen:
            seen, since = case, time.monotonic()
        elif time.monotonic() - since > BLOCKED:
            blocked = True
            os.kill(pid, signal.SIGKILL)
            break
    os.close(inward)
    _, status = os.waitpid(pid, 0)
    for line in found.splitlines():
        _add(report, *json.loads(line))
    last, accepted = struct.unpack_from("<qq", place)
    done = status == 0 or os.waitstatus_to_exitcode(status) == 3
    if not done:
        _add(report, last, *_crash(status, folder, blocked))
        last += 1
    report.executed += last - cases.start
    report.accepted += accepted
    return last


def _add(report: Report, case: int, what: str, detail: str) -> None:
    kind = re.sub(r":\d+\b|'[^']*'|\d+", "", what)
    report.findings.setdefault(kind, Finding(what, detail)).cases.append(case)


def run(target: ModuleType, count: int, first: int = 0, progress: Any = None) -> Report:
    """Run `count` cases from `first` on, and repeat each kind of finding in a new process."""
    name = name_of(target)
    target.prepare()
    report = Report(name)
    with tempfile.TemporaryDirectory(prefix=f"pyloss-fuzz-{name}-", dir=_fast_folder()) as place:
        folder = Path(place) / "case"
        folder.mkdir()
        case = first
        while case < first + count:
            known = len(report.findings)
            case = _batch(target, range(case, min(case + BATCH, first + count)), folder, report)
            for finding in list(report.findings.values())[known:]:
                alone = Report(name)
                _batch(target, range(finding.cases[0], finding.cases[0] + 1), folder, alone)
                finding.alone = bool(alone.findings)
            if progress:
                progress(report)
    return report


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
