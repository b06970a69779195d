"""`Group`: the processes that work together. This class is the group of one; `mpi.py` has others.

A sum over the ranks is taken in the order of the ranks, element by element: ((x0 + x1) + x2) + ...
So its bits depend neither on the machines of the ranks, nor on how the sum is cut into messages.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Group:
    """The processes of a task. This one is alone, and every method returns at once.

    All processes must call the same methods in the same order.
    """

    def rank(self) -> int:
        """The number of this process, from 0."""
        return 0

    def size(self) -> int:
        """The number of processes."""
        return 1

    def local_rank(self) -> int:
        """The number of this process among those of its machine."""
        return 0

    def local_size(self) -> int:
        """The number of processes on this machine."""
        return 1

    def hosts(self) -> list[str]:
        """The machines of the ranks, each once, in the order of their first ranks."""
        return [socket.gethostname()]

    def name(self, rank: int | None = None) -> str:
        """ "rank 3 on node17": how messages name a process; None: this one."""
        return f"rank 0 on {socket.gethostname()}"

    def all_sum(self, array: Any, out: np.ndarray | None = None) -> Any:
        """The sum of all ranks' arrays, in the order of the ranks; every rank gets its bits.

        float16 and bfloat16 are summed in float32. The shapes and types must be
        the same on all ranks. `out` receives the sum, and may be `array` itself.
        """
        if out is None:
            return array
        if out is not array:
            out[...] = array
        return out

    def scatter_sum(self, flat: np.ndarray, bounds: Sequence[int]) -> None:
        """Sum the ranks' arrays in place, but only the part from bounds[rank] to bounds[rank + 1].

        What the other parts then hold is not defined.
        """

    def gather_parts(self, flat: np.ndarray, bounds: Sequence[int]) -> None:
        """Fill the other ranks' parts of `flat` with their values."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of the ranks. Any object that pickle takes."""
        return [value]

    def gather(self, value: T) -> list[T] | None:
        """`all_gather` for rank 0; None on the others."""
        return [value]

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        return value

    # What follows is made of the methods above.

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only; all ranks return its result, or raise its exception."""
        if self.size() == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.rank() == 0:
            try:
                result = function()
            except Exception as raised:
                error = _sendable(raised)
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set."""
        return flag if self.size() == 1 else bool(self.all_sum(np.array([int(flag)]))[0])

    def share(self, count: int) -> range:
        """The records of this rank, of `count` in all: every `size()`-th one."""
        return range(self.rank(), count, self.size())

    def collect(self, own: Sequence[T]) -> list[T]:
        """The results of all ranks, of which `own` are those of `share`, in the records' order."""
        parts = self.all_gather(list(own))
        if len(parts) == 1:
            return parts[0]
        count = sum(map(len, parts))
        return [parts[index % len(parts)][index // len(parts)] for index in range(count)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank()} of {self.size()})"


def _sendable(error: Exception) -> Exception:
    """The exception, or one with its text if pickle cannot carry it to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
