"""Settings of the test process, fixtures for all tests, and the option `--each-value`."""

import os
import signal

import pytest

from pyloss import _core

# A shell starts background jobs with Ctrl-C ignored. The tests of Ctrl-C and the processes that
# they start need Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--each-value",
        action="store_true",
        help="of a test's variants run only so many that each value of each of its parameters occurs",
    )


def pytest_configure(config):
    """With `--each-value`, share the processors among the processes of pytest-xdist.

    With a thread of every process on each processor, threads spin for others that do not run. Tests
    of threads set their number. Runs of all variants keep one thread per processor.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if config.getoption("each_value") and workers > 1 and not os.environ.get("PYLOSS_NUM_THREADS"):
        threads = max(_core.num_threads() // workers, 1)
        _core.set_num_threads(threads)
        os.environ["PYLOSS_NUM_THREADS"] = str(threads)  # of processes that tests start


# Runs last: the hooks of folders must have removed their tests before.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("each_value"):
        return
    variants = {}
    for item in items:
        variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {item for group in variants.values() for item in covering(group)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def covering(variants):
    """Choose a few of a test's variants that together have each value of each parameter."""
    # Compared by identity: values need not be hashable, and variants share the same objects.
    values = [
        {(name, id(value)) for name, value in item.callspec.params.items()}
        for item in variants
        if hasattr(item, "callspec")
    ]
    missing = set().union(*values)
    chosen = [] if missing else variants
    while missing:
        best = max(range(len(variants)), key=lambda i: (len(values[i] & missing), -i))
        chosen.append(variants[best])
        missing -= values[best]
    return chosen


@pytest.fixture(params=_core.isas())
def isa(request):
    """Use each instruction set of this machine in turn."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)
