"""What every rank of tests/distributed/test_group.py does."""

import sys

import ml_dtypes
import numpy as np

from pyloss.distributed import average_gradients, init, mpi

group = init()
rank, size = group.rank(), group.size()
assert size == int(sys.argv[1]) and group is init()
mpi.BLOCK_BYTES = 1 << 12  # several blocks


def of_rank(r, count, dtype):
    return (np.random.default_rng([r, count]).standard_normal(count) * 10).astype(dtype)


def in_order(count, dtype):
    """The sum that the ranks must have: in their order, float16 and bfloat16 in float32."""
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    total = of_rank(0, count, dtype).astype(wide)
    for r in range(1, size):
        total = total + of_rank(r, count, dtype).astype(wide)
    return total.astype(dtype)


for small in (1 << 14, 0):
    mpi.SMALL_BYTES = small
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int32):
        for count in (0, 1, 3, 1023, 5000):
            given = of_rank(rank, count, dtype)
            found = group.all_sum(given)
            assert found.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found, in_order(count, dtype))
            assert group.all_sum(given, out=given) is given
            np.testing.assert_array_equal(given, in_order(count, dtype))
for bounds in ([0, *[5000 * (r + 1) // size for r in range(size)]], [0, *[5000] * size]):
    flat = of_rank(rank, 5000, np.float32)
    group.scatter_sum(flat, bounds)
    part = slice(bounds[rank], bounds[rank + 1])
    np.testing.assert_array_equal(flat[part], in_order(5000, np.float32)[part])
    group.gather_parts(flat, bounds)
    np.testing.assert_array_equal(flat, in_order(5000, np.float32))
matrix = of_rank(rank, 12, np.float32).reshape(3, 4).T
np.testing.assert_array_equal(group.all_sum(matrix), in_order(12, np.float32).reshape(3, 4).T)

mpi.MESSAGE_BYTES = 1000  # objects go in several messages
everything = group.all_gather({"rank": rank, "text": "x" * (3000 * rank)})
assert [(one["rank"], len(one["text"])) for one in everything] == [
    (r, 3000 * r) for r in range(size)
]
gathered = group.gather(np.arange(rank + 500))
assert (gathered is None) == (rank > 0)
if rank == 0:
    assert [len(part) for part in gathered] == [500 + r for r in range(size)]
assert group.broadcast(["of rank", rank] * 400) == ["of rank", 0] * 400
assert group.first(lambda: rank) == 0
try:
    group.first(lambda: [][rank])
except IndexError as error:
    assert "out of range" in str(error)
else:
    raise AssertionError


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail():
    raise Unpicklable(1, 2)


try:
    group.first(fail)
except (RuntimeError, Unpicklable) as error:
    assert str(error) in ("Unpicklable: 1 and 2", "1 and 2")
else:
    raise AssertionError
assert group.any(rank == size - 1) and not group.any(False)
group.barrier()
assert group.name().startswith(f"rank {rank} on ") and group.local_size() == size

tree = {
    "a": [of_rank(rank, 10, np.float32)],
    "b": (of_rank(rank, 2000, np.float32).reshape(2, -1),),
}
means = [average_gradients(tree, group, all_reduce_size=n) for n in (0, 100, 1 << 25)]
for mean in means:
    np.testing.assert_array_equal(mean["a"][0], in_order(10, np.float32) / np.float32(size))
    np.testing.assert_array_equal(
        mean["b"][0].ravel(), in_order(2000, np.float32) / np.float32(size)
    )
print(f"rank {rank} is done", flush=True)
