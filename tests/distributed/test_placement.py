"""Ranks on a machine share its processors, and say where they would wait for each other."""

import pytest

from pyloss.distributed.placement import threads_of, warnings_of


def cpus(*numbers):
    return frozenset(numbers)


@pytest.mark.parametrize(
    ("sets", "threads"),
    [
        ([cpus(*range(8))], [8]),
        ([cpus(*range(8))] * 2, [4, 4]),
        ([cpus(*range(8))] * 3, [2, 2, 2]),
        ([cpus(0, 1, 2, 3), cpus(4, 5, 6, 7)], [4, 4]),  # bound to a socket each
        ([cpus(0, 1, 2, 3), cpus(2, 3)], [3, 1]),
        ([cpus(0)] * 4, [1] * 4),
    ],
)
def test_threads_are_a_share_of_the_processors(sets, threads):
    assert [threads_of(sets, index) for index in range(len(sets))] == threads


def ranks(*sets, all=8, host="a"):
    return [{"host": host, "processors": one, "all": all} for one in sets]


def test_a_bad_placement_is_told():
    whole = cpus(*range(8))
    assert warnings_of(ranks(whole, whole), [4, 4]) == []
    assert warnings_of(ranks(whole) + ranks(whole, host="b"), [8, 8]) == []
    assert warnings_of(ranks(cpus(0), cpus(1), all=2), [1, 1]) == []
    (crowded,) = warnings_of(ranks(whole, whole), [8, 8])
    assert "a: its 2 ranks have 16 threads on 8 processors" in crowded
    (bound,) = warnings_of(ranks(cpus(0), cpus(1)), [1, 1])
    assert "a: its 2 ranks may use 2 of 8 processors" in bound and "--bind-to none" in bound
