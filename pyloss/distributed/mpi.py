"""The group of the processes that MPI started.

MPI moves bytes only; sums are NumPy's. MPI's own sums may be taken in another order on other
machines, and then have other bits.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from pyloss.distributed.group import Group
from pyloss.errors import counted

T = TypeVar("T")

#: bytes of a sum for which every rank receives all arrays: one exchange in place of two
SMALL_BYTES = 1 << 14
#: bytes that are summed at a time: what an exchange needs beside the array
BLOCK_BYTES = 32 << 20
#: bytes of a message, well below 2^31, where MPI's counts end
MESSAGE_BYTES = 1 << 30


class MPIGroup(Group):
    """All processes of MPI's world, or of another communicator of mpi4py.

    Raises ImportError if MPI has another number of processes than `expected`.
    """

    def __init__(self, communicator: Any = None, expected: int | None = None) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        whole = MPI.COMM_WORLD if communicator is None else communicator
        self._world = whole.Dup()
        # Failing ranks meet here: what the others still wait for in `_world` cannot be mixed up.
        self._failing = whole.Dup()
        self._leaving = whole.Dup()
        self._rank, self._size = int(whole.Get_rank()), int(whole.Get_size())
        if expected is not None and expected != self._size:
            version = MPI.Get_library_version().splitlines()[0].strip("\x00 ")
            raise ImportError(
                f"the launcher started {counted(expected, 'process', 'processes')}, and mpi4py's "
                f"MPI ({version}) knows of {self._size}: the launcher belongs to another MPI than "
                "mpi4py's"
            )
        node = whole.Split_type(MPI.COMM_TYPE_SHARED, self._rank)
        self._local = int(node.Get_rank()), int(node.Get_size())
        node.Free()
        self._hosts: list[str] = self.all_gather(socket.gethostname())

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def local_rank(self) -> int:
        return self._local[0]

    def local_size(self) -> int:
        return self._local[1]

    def hosts(self) -> list[str]:
        return list(dict.fromkeys(self._hosts))

    def name(self, rank: int | None = None) -> str:
        number = self._rank if rank is None else rank
        return f"rank {number} on {self._hosts[number]}"

    # ---- sums

    def all_sum(self, array: Any, out: np.ndarray | None = None) -> Any:
        given = np.asarray(array)
        kind = given.dtype.kind
        wide_type = np.int64 if kind in "biu" else np.float64 if given.itemsize == 8 else np.float32
        wide = np.ascontiguousarray(given, wide_type)
        into = out is not None and out.dtype == wide_type and out.flags.c_contiguous
        result = out if out is not None and into else np.empty(wide.shape, wide_type)
        flat, sums = wide.reshape(-1), result.reshape(-1)
        if self._size == 1:
            sums[...] = flat
        elif wide.nbytes <= SMALL_BYTES:
            self._sum_small(flat, sums)
        else:
            step = BLOCK_BYTES // flat.itemsize
            for begin in range(0, flat.size, step):
                self._sum_block(flat[begin : begin + step], sums[begin : begin + step])
        if out is None:
            return result.astype(given.dtype, copy=False)
        if not into:
            out[...] = result
        return out

    def _sum_small(self, flat: np.ndarray, sums: np.ndarray) -> None:
        """Every rank receives all arrays and adds them."""
        parts = np.empty((self._size, flat.size), flat.dtype)
        self._world.Allgather(self._bytes(flat), self._bytes(parts))
        self._add(parts, sums)

    def _sum_block(self, flat: np.ndarray, sums: np.ndarray) -> None:
        """Rank r adds piece r of all arrays, then all receive its sum: 2 (n - 1) / n of the bytes
        go out of each rank, which is the least that there is."""
        bounds = np.arange(self._size + 1) * flat.size // self._size
        starts, counts = bounds[:-1], np.diff(bounds)
        own = int(counts[self._rank])
        parts = np.empty((self._size, own), flat.dtype)
        width = flat.itemsize
        places = np.arange(self._size) * own
        self._world.Alltoallv(
            [flat.view(np.uint8), (counts * width, starts * width), self._mpi.BYTE],
            [
                parts.reshape(-1).view(np.uint8),
                (np.full(self._size, own * width), places * width),
                self._mpi.BYTE,
            ],
        )
        piece = np.empty(own, flat.dtype)
        self._add(parts, piece)
        self._world.Allgatherv(
            self._bytes(piece),
            [sums.view(np.uint8), (counts * width, starts * width), self._mpi.BYTE],
        )

    def scatter_sum(self, flat: np.ndarray, bounds: Sequence[int]) -> None:
        begin, end = bounds[self._rank], bounds[self._rank + 1]
        step = max(BLOCK_BYTES // flat.itemsize // self._size, 1)
        longest = max(b - a for a, b in pairwise(bounds))
        for offset in range(0, longest, step):
            own = flat[min(begin + offset, end) : min(begin + offset + step, end)]
            parts = np.empty((self._size, own.size), flat.dtype)
            waiting = []
            for rank, (first, last) in enumerate(pairwise(bounds)):
                piece = flat[min(first + offset, last) : min(first + offset + step, last)]
                if rank == self._rank:
                    parts[rank] = own
                    continue
                if own.size:
                    waiting.append(self._world.Irecv(self._bytes(parts[rank]), rank, 3))
                if piece.size:
                    waiting.append(self._world.Isend(self._bytes(piece), rank, 3))
            self._mpi.Request.Waitall(waiting)
            if own.size:
                self._add(parts, own)

    def gather_parts(self, flat: np.ndarray, bounds: Sequence[int]) -> None:
        step = MESSAGE_BYTES // flat.itemsize
        for rank, (first, last) in enumerate(pairwise(bounds)):
            for begin in range(first, last, step):
                self._world.Bcast(self._bytes(flat[begin : min(begin + step, last)]), rank)

    @staticmethod
    def _add(parts: np.ndarray, sums: np.ndarray) -> None:
        np.add(parts[0], parts[1], out=sums)
        for part in parts[2:]:
            np.add(sums, part, out=sums)

    def _bytes(self, array: np.ndarray) -> list[Any]:
        return [array.reshape(-1).view(np.uint8), self._mpi.BYTE]

    # ---- waiting, objects

    def barrier(self) -> None:
        self._world.Barrier()

    def all_gather(self, value: T) -> list[T]:
        text = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        sizes = np.empty(self._size, np.int64)
        self._world.Allgather(np.array([len(text)], np.int64), sizes)
        return [self._sent(text, int(size), root) for root, size in enumerate(sizes)]

    def gather(self, value: T) -> list[T] | None:
        if self._size == 1:
            return [value]
        text = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        if self._rank:
            self._world.Send(np.array([len(text)], np.int64), 0, 1)
            for begin in range(0, len(text), MESSAGE_BYTES):
                self._world.Send(memoryview(text)[begin : begin + MESSAGE_BYTES], 0, 2)
            return None
        found = [value]
        for rank in range(1, self._size):
            size = np.empty(1, np.int64)
            self._world.Recv(size, rank, 1)
            received = bytearray(int(size[0]))
            for begin in range(0, len(received), MESSAGE_BYTES):
                self._world.Recv(memoryview(received)[begin : begin + MESSAGE_BYTES], rank, 2)
            found.append(pickle.loads(received))
        return found

    def broadcast(self, value: T) -> T:
        text = pickle.dumps(value, pickle.HIGHEST_PROTOCOL) if self._rank == 0 else b""
        size = np.array([len(text)], np.int64)
        self._world.Bcast(size, 0)
        found = self._sent(text, int(size[0]), 0)
        return value if self._rank == 0 else found

    def _sent(self, text: bytes, size: int, root: int) -> Any:
        """The object of rank `root`, of which `text` is the pickle there."""
        received = bytearray(text) if self._rank == root else bytearray(size)
        for begin in range(0, size, MESSAGE_BYTES):
            self._world.Bcast(memoryview(received)[begin : begin + MESSAGE_BYTES], root)
        return pickle.loads(received)

    # ---- failures

    def all_failed(self, seconds: float) -> bool:
        """Whether all ranks call this within some `seconds`: called where this rank has failed."""
        return self._meet(self._failing, seconds)

    def all_leave(self, seconds: float) -> bool:
        """Whether all ranks call this within some `seconds`: called at the end of the process."""
        return self._meet(self._leaving, seconds)

    @staticmethod
    def _meet(communicator: Any, seconds: float) -> bool:
        request = communicator.Ibarrier()
        end = time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def abort(self, code: int) -> None:
        """End all ranks; this call does not return."""
        self._mpi.COMM_WORLD.Abort(code)
