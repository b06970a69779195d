"""The random state: two numbers restore it completely."""

import json

import numpy as np
import pytest

import pyloss
from pyloss import random


def draws(n=5):
    return [random.next_seed() for _ in range(n)]


def test_a_seed_repeats_and_another_does_not():
    random.seed(3)
    first = draws()
    random.seed(3)
    assert draws() == first
    random.seed(4)
    assert not set(draws()) & set(first)
    assert len(set(first)) == 5 and all(0 <= s < 2**63 for s in first)


def test_the_state_goes_through_json():
    random.seed(2**63 - 1)
    draws(3)
    state = json.loads(json.dumps(random.state()))
    following = draws()
    random.set_state(state)
    assert draws() == following
    assert state == {"seed": 2**63 - 1, "counter": 3}, "a copy, which later draws do not change"


def test_generators_are_of_new_seeds():
    random.seed(0)
    a, b = random.generator().random(3), random.generator().random(3)
    assert (a != b).all()
    random.seed(0)
    assert (random.generator().random(3) == a).all()
    assert random.state()["counter"] == 1


def test_seeds_are_spread():
    random.seed(0)
    bits = np.array([[s >> i & 1 for i in range(63)] for s in draws(400)])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.15


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, 1 << 63, 10**400])
def test_what_is_no_seed(value):
    before = random.state()
    with pytest.raises(
        (ValueError, TypeError),
        match="seed is .*; it must be a whole number of at least 0|from 0 to 92",
    ):
        random.seed(value)
    assert random.state() == before


@pytest.mark.parametrize("state", [{}, {"seed": 1}])
def test_a_state_that_lacks_something_changes_nothing(state):
    before = random.state()
    with pytest.raises(ValueError, match=r"it must be what state\(\) gave"):
        random.set_state(state)
    assert random.state() == before


def test_numpy_integers_are_seeds():
    pyloss.random.seed(np.int64(5))
    first = draws()
    pyloss.random.seed(5)
    assert draws() == first


def test_a_branch_moves_the_state_by_one_seed():
    random.seed(5)
    drawn = {}
    for number in (0, 1):
        random.set_state({"seed": 5, "counter": 3})
        with random.branch(number):
            drawn[number] = [random.next_seed() for _ in range(number + 2)]
        assert random.state() == {"seed": 5, "counter": 4}
    assert not set(drawn[0]) & set(drawn[1])
    random.set_state({"seed": 5, "counter": 3})
    with random.branch(1):
        assert random.next_seed() == drawn[1][0]
