"""Several processes that work on one task, started by MPI's launchers.

`init()` returns the `Group` of all processes that `mpirun` or `srun` started; outside of a launcher
it is a group of one, which costs nothing. [distributed.md](../../docs/distributed.md) is the user's
page.
"""

from pyloss.distributed.gradients import average_gradients
from pyloss.distributed.group import Group
from pyloss.distributed.launcher import Launch, launch
from pyloss.distributed.starting import BACKENDS, group_of, init, is_available

__all__ = [
    "BACKENDS",
    "Group",
    "Launch",
    "average_gradients",
    "group_of",
    "init",
    "is_available",
    "launch",
]
