"""The time of `Group.all_sum` by itself: mpirun -n 2 python benchmarks/distributed_exchange.py

Rank 0 prints JSON: for each number of bytes the seconds of the best of some sums.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from pyloss.distributed import init

SIZES = (8, 1 << 10, 1_000_000, 4_000_000, 16_000_000, 64_000_000, 250_000_000, 500_000_000)


def main() -> None:
    group = init()
    most = int(sys.argv[1]) if len(sys.argv) > 1 else SIZES[-1]
    found = []
    for size in filter(lambda size: size <= most, SIZES):
        array = np.ones(size // 4, np.float32)
        best = float("inf")
        for _ in range(20 if size < 1_000_000 else 5 if size < 100_000_000 else 3):
            group.barrier()
            begin = time.perf_counter()
            group.all_sum(array, out=array)
            best = min(best, time.perf_counter() - begin)
        found.append((size, max(group.all_gather(best))))
    if group.rank() == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
