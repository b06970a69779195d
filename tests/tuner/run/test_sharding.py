"""Parts of the parameters for the ranks that keep an optimizer's state."""

import numpy as np
import pytest

from pyloss.tuner.run.sharding import bounds_of


@pytest.mark.parametrize(
    ("sizes", "ranks", "bounds"),
    [
        ([4, 4, 4, 4], 2, [0, 2, 4]),
        ([10, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 10], 3, [0, 2, 3, 3]),
        ([5], 3, [0, 0, 1, 1]),
    ],
)
def test_parts_are_runs_of_whole_arrays(sizes, ranks, bounds):
    assert bounds_of(sizes, ranks) == bounds


def test_parts_have_like_sizes():
    sizes = np.random.default_rng(0).integers(1, 100, 200).tolist()
    bounds = bounds_of(sizes, 8)
    sums = [sum(sizes[a:b]) for a, b in zip(bounds, bounds[1:])]
    assert sum(sums) == sum(sizes) and max(sums) < 1.1 * min(sums)
