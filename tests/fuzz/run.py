"""Runs fuzz targets: `python tests/fuzz/run.py [TARGET ...] -n 100000`.

`run.py TARGET --case N` runs one case and catches nothing; `--keep FOLDER` leaves its files there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYLOSS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
for place in (
    HERE,
    *(HERE.parent / room for room in ("csrc", "losses", "models", "tuner", "weights")),
):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import running

TARGETS = sorted(file.stem.removeprefix("target_") for file in HERE.glob("target_*.py"))


def target(name: str):
    """The module of a target."""
    return importlib.import_module(f"target_{name}")


def main() -> int:
    """Return the number of targets with findings, as exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "targets",
        nargs="*",
        default=TARGETS,
        choices=[*TARGETS, []],
        metavar="TARGET",
        help=", ".join(TARGETS),
    )
    parser.add_argument(
        "-n", type=int, default=100_000, help="executions of each (default: 100000)"
    )
    parser.add_argument("--first", type=int, default=0, help="the first case's number (default: 0)")
    parser.add_argument(
        "--case", type=int, help="run this case alone, in this process, and show its traceback"
    )
    parser.add_argument("--keep", type=Path, help="with --case: the folder for the case's files")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return one(target(arguments.targets[0]), arguments.case, arguments.keep)
    failed = 0
    for name in arguments.targets or TARGETS:
        begin, cpu, said = time.monotonic(), os.times(), [time.monotonic()]

        def progress(report, name=name, begin=begin, said=said):
            now = time.monotonic()
            for finding in list(report.findings.values())[len(said) - 1 :]:
                said.append(now)
                print(
                    f"{name}: case {finding.cases[0]}: {finding.what}", file=sys.stderr, flush=True
                )
            if now - said[0] > 10:
                said[0] = now
                speed = report.executed / (now - begin)
                print(
                    f"{name}: {report.executed} cases, {speed:.0f}/s, {len(report.findings)} kinds",
                    file=sys.stderr,
                    flush=True,
                )

        report = running.run(target(name), arguments.n, arguments.first, progress)
        now = os.times()
        used = sum(now[i] - cpu[i] for i in range(4))
        print(
            f"{report}\n  {report.executed / (time.monotonic() - begin):.0f}/s, {used:.1f} s of processor time",
            flush=True,
        )
        failed += bool(report.findings)
    return failed


def one(module, case: int, keep: Path | None) -> int:
    """Run a case without catching anything."""
    module.prepare()
    m = running.Mutator(running.name_of(module), case)
    made = module.make(m)
    with tempfile.TemporaryDirectory() as place:
        folder = keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        print(
            f"case {case}{' (pristine)' if m.pristine else ''}: {running._cut(repr(made))}",
            file=sys.stderr,
        )
        if (
            keep
            and isinstance(made, dict)
            and all(isinstance(data, bytes) for data in made.values())
        ):
            running.put_files(folder, made)
        begin = time.process_time()
        module.use(made, folder)
        print(f"accepted in {time.process_time() - begin:.3f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
