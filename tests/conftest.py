"""Settings of the test process, fixtures for all tests, the choice of variants and their order."""

import heapq
import os
import signal
from itertools import combinations

import pytest

from pyloss import _core

# A shell starts background jobs with Ctrl-C ignored. The tests of Ctrl-C and the processes that
# they start need Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    for name, what in (("value", "each value"), ("pair", "each pair of values")):
        parser.addoption(
            f"--each-{name}",
            action="store_true",
            help=f"of a test's variants run only so many that {what} of its parameters occurs",
        )


def pytest_configure(config):
    """Share the processors among the processes of pytest-xdist.

    With a thread of every process on each processor, threads spin for others that do not run. Tests
    of threads set their number.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and not os.environ.get("PYLOSS_NUM_THREADS"):
        threads = max(_core.num_threads() // workers, 1)
        _core.set_num_threads(threads)
        os.environ["PYLOSS_NUM_THREADS"] = str(threads)  # of processes that tests start


# Runs last: the hooks of folders must have removed their tests before.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    together = 1 if config.getoption("each_value") else 2 if config.getoption("each_pair") else 0
    if not together:
        return
    variants = {}
    for item in items:
        variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {item for group in variants.values() for item in covering(group, together)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    # Files with long tests first: a long file that begins last would leave processors idle.
    slow = {item.path for item in chosen if item.get_closest_marker("slow")}
    items[:] = sorted(filter(chosen.__contains__, items), key=lambda item: item.path not in slow)


def covering(variants, together):
    """Choose a few of a test's variants that together have each value, or each pair of values."""
    have = [set(combinations(values(item), together)) for item in variants]
    missing = set().union(*have)
    if not missing:  # no parameters, or fewer than `together`
        return variants
    # What a variant adds only shrinks, so one that still adds what it did before is a best one.
    adds = [(-len(own), i) for i, own in enumerate(have)]
    heapq.heapify(adds)
    chosen = []
    while missing:
        before, i = heapq.heappop(adds)
        new = have[i] & missing
        if len(new) == -before:
            chosen.append(variants[i])
            missing -= new
        elif new:
            heapq.heappush(adds, (-len(new), i))
    return chosen


def values(item):
    """The value of each parameter, by identity; parameters that are set together are one."""
    if not hasattr(item, "callspec"):
        return []
    given = dict(item.callspec.params)
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        found.append(tuple((name, id(given.pop(name))) for name in names))
    # The rest are fixtures'.
    return found + [(name, id(value)) for name, value in given.items()]


@pytest.fixture(params=_core.isas())
def isa(request):
    """Use each instruction set of this machine in turn."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of `tiny_project`: base, adapter and data that commands run on."""
    import tiny_project

    folder = tmp_path_factory.mktemp("project")
    tiny_project.make(folder)
    return folder
