"""The ACT example: valid mazes, and a loss that falls with both ways of halting."""

import collections
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import pyloss
from pyloss import ACTLossHead

_spec = importlib.util.spec_from_file_location(
    "act_maze", Path(__file__).parents[2] / "examples" / "act_maze.py"
)
act_maze = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(act_maze)


def moves(maze):
    """Number of moves from the start to each cell, by breadth-first search."""
    grid = maze.reshape(act_maze.SIZE, act_maze.SIZE)
    start = tuple(map(int, np.argwhere(grid == act_maze.START)[0]))
    found, queue = {start: 0}, collections.deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if (
                cell not in found
                and 0 <= min(cell) <= max(cell) < act_maze.SIZE
                and grid[cell] != act_maze.WALL
            ):
                found[cell] = found[i, j] + 1
                queue.append(cell)
    return found


def test_mazes_are_labelled_right():
    mazes, distance = act_maze.make_mazes(np.random.default_rng(4), 6)
    assert [((low <= distance) & (distance <= high)).sum() for low, high in act_maze.DISTANCES] == [
        6
    ] * len(act_maze.DISTANCES)
    for inputs, labels, far in zip(mazes["inputs"], mazes["labels"], distance):
        found = moves(inputs)
        assert (inputs == act_maze.START).sum() == 1 and max(found.values()) == far
        reached = np.zeros((act_maze.SIZE, act_maze.SIZE), int)
        reached[tuple(zip(*found))] = 1
        np.testing.assert_array_equal(
            labels, np.where(inputs == act_maze.WALL, -100, reached.ravel())
        )


@pytest.mark.parametrize("q_continue", [False, True])
def test_training_lowers_the_loss(q_continue):
    mazes, _ = act_maze.make_mazes(np.random.default_rng(4), 20)
    pyloss.random.seed(1)
    head = ACTLossHead(
        act_maze.MazeModel(q_continue), "stablemax_cross_entropy", q_continue=q_continue
    )
    before = head.parameters()["model.gate.weight"].copy()
    losses = [
        sums["lm_loss"] for _, sums in act_maze.train(head, mazes, 60, batch_size=8, report=20)
    ]
    assert losses[2] < 0.95 * losses[0]
    assert not np.array_equal(head.parameters()["model.gate.weight"], before)
    right, steps = act_maze.evaluate(head, mazes)
    assert (
        right.shape == steps.shape == (100,)
        and 1 <= steps.min() <= steps.max() <= act_maze.MAX_STEPS
        and head.training
    )
