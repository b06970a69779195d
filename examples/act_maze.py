"""A small recurrent model that solves mazes and learns when to halt.

    python examples/act_maze.py [--updates 3000] [--no-q-continue] [--out build/act_maze.png]

Which cells of a maze can be reached from the start? The model mixes every cell with its neighbors a
few times per step, and steps until it halts: the farther the farthest cell, the more steps it
needs. It is trained like the Hierarchical Reasoning Model (Wang et al. 2025, arXiv:2506.21734):
every step has its own loss and update, the state carries no gradient to the next step, a new maze
replaces each one that halted, and a Q-head learns when to halt from whether the answer was right.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np

import pyloss
from pyloss import ACTLossHead, nn, ops, optim
from pyloss.autograd import data

ROOMS = 5
SIZE = 2 * ROOMS - 1  # cells per side: rooms, and walls or passages between them
WALL, FREE, START, IGNORE = 0, 1, 2, -100
CYCLES, MAX_STEPS = 4, 6  # mixing rounds per step, and steps: information travels at most 24 cells
DISTANCES = [(1, 4), (5, 8), (9, 12), (13, 16), (17, 20)]


def make_mazes(rng, per_distance):
    """`per_distance` mazes of each of `DISTANCES`, shuffled.

    Returns `{"inputs", "labels"}` [N, cells] and the distances [N]. A distance is the number of
    moves to the farthest reachable cell. Labels are 1 for reachable cells, 0 for other free cells,
    IGNORE for walls.
    """
    parts = [[] for _ in DISTANCES]
    while min(map(len, parts)) < per_distance:
        # Each room opens a passage up or right, which makes a tree. A fifth of them is closed.
        free = np.zeros((4096, SIZE, SIZE), bool)
        free[:, ::2, ::2] = True
        upwards, kept = (
            rng.random((4096, ROOMS, ROOMS)) < 0.5,
            rng.random((4096, ROOMS, ROOMS)) < 0.8,
        )
        upwards[:, :, -1], upwards[:, 0] = True, False
        free[:, 1::2, ::2], free[:, ::2, 1::2] = (
            (upwards & kept)[:, 1:],
            (~upwards & kept)[:, :, :-1],
        )
        padded = np.zeros((4096, SIZE + 2, SIZE + 2), bool)
        reached = padded[:, 1:-1, 1:-1]
        row, column = 2 * rng.integers(0, ROOMS, (2, 4096))
        reached[np.arange(4096), row, column] = True
        inputs, distance = (
            np.where(reached, START, np.where(free, FREE, WALL)).astype(np.int32),
            np.zeros(4096, int),
        )
        while True:
            near = (
                padded[:, :-2, 1:-1]
                | padded[:, 2:, 1:-1]
                | padded[:, 1:-1, :-2]
                | padded[:, 1:-1, 2:]
            )
            fresh = near & free & ~reached
            if not fresh.any():
                break
            reached |= fresh
            distance += fresh.any((1, 2))
        labels = np.where(free, reached, IGNORE)
        # Otherwise far mazes would be those with all cells reachable, and could be guessed.
        fair = reached.sum((1, 2)) < 0.6 * free.sum((1, 2))
        for part, (low, high) in zip(parts, DISTANCES, strict=True):
            found = np.flatnonzero(fair & (low <= distance) & (distance <= high))[
                : per_distance - len(part)
            ]
            part.extend((inputs[i].ravel(), labels[i].ravel(), distance[i]) for i in found)
    mazes = [maze for part in parts for maze in part]
    inputs, labels, distance = (
        np.stack(values)
        for values in zip(*(mazes[i] for i in rng.permutation(len(mazes))), strict=True)
    )
    return {"inputs": inputs, "labels": labels}, distance


@dataclasses.dataclass
class Carry:
    """The state from step to step: plain arrays, so no gradient passes."""

    state: np.ndarray
    steps: np.ndarray
    halted: np.ndarray
    current_data: dict


class MazeModel(nn.Module):
    """One block for all cells, rounds and steps.

    A cell's new state comes from the cell, its neighbors and the mean of all cells.
    """

    halt_max_steps = MAX_STEPS

    def __init__(self, q_continue=True, dims=32, hidden=64, exploration=0.1):
        super().__init__()
        self.embed = nn.Embedding(3, dims)
        self.share = nn.Linear(dims, dims)
        self.gate, self.up, self.down = (
            nn.Linear(5 * dims, hidden),
            nn.Linear(5 * dims, hidden),
            nn.Linear(hidden, dims),
        )
        self.norm = nn.RMSNorm(dims)
        self.answer = nn.Linear(dims, 2)
        self.q_gate, self.q_up = nn.Linear(dims, dims), nn.Linear(dims, dims)
        self.q_halt, self.q_continue = nn.Linear(dims, 1), nn.Linear(dims, 1)
        # Information must travel far from the first update on, so the weights keep its magnitude.
        for layer in (self.gate, self.up, self.down, self.q_gate, self.q_up):
            layer.weight *= 3**0.5
        self.embed.weight *= dims**0.5
        # as in HRM: answers count as wrong at first
        for q in (self.q_halt, self.q_continue):
            q.weight[:], q.bias[:] = 0, -5
        self.dims, self._compares, self._exploration, self._rng = (
            dims,
            q_continue,
            exploration,
            np.random.default_rng(0),
        )
        cells = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
        around = np.pad(cells, 1, mode="edge")  # a neighbor beyond the edge is the cell itself
        near = [cells, around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]]
        self._near = np.stack(near, -1).reshape(-1).astype(np.int32)

    def initial_carry(self, batch):
        """All mazes count as halted, so the first step loads the whole batch."""
        count, cells = batch["inputs"].shape
        state = np.zeros((count, cells, self.dims), np.float32)
        return Carry(
            state,
            np.zeros(count, int),
            np.ones(count, bool),
            {k: np.zeros_like(v) for k, v in batch.items()},
        )

    def think(self, state, inputs):
        """One step: the new state [B, cells, dims], and both q logits [B]."""
        count, cells = inputs.shape
        grid = np.arange(count, dtype=np.int32)[:, None]
        near, own = (grid * cells + self._near).ravel(), np.repeat(grid.ravel(), cells)
        seen, state = self.embed(inputs.ravel()), state.reshape(count * cells, self.dims)
        for _ in range(CYCLES):
            mean = self.share(state.reshape(count, cells, self.dims).mean(1))
            mixed = ops.add(ops.add(state, seen), ops.gather_rows(mean, own))
            window = ops.gather_rows(mixed, near).reshape(count * cells, 5 * self.dims)
            state = self.norm(
                ops.add(state, self.down(ops.swiglu(self.gate(window), self.up(window))))
            )
        votes = (
            ops.swiglu(self.q_gate(state), self.q_up(state))
            .reshape(count, cells, self.dims)
            .mean(1)
            * SIZE
        )
        return (
            state.reshape(count, cells, self.dims),
            self.q_halt(votes).reshape(count),
            self.q_continue(votes).reshape(count),
        )

    def next_q_logits(self, carry):
        """The q logits of the next step, for the target of q_continue."""
        return self.think(carry.state, carry.current_data["inputs"])[1:]

    def __call__(self, carry, batch):
        new = carry.halted
        current = {k: np.where(new[:, None], batch[k], v) for k, v in carry.current_data.items()}
        steps = np.where(new, 0, carry.steps) + 1
        state, q_halt, q_continue = self.think(
            np.where(new[:, None, None], np.float32(0), carry.state), current["inputs"]
        )
        halted = data(q_halt) > (data(q_continue) if self._compares else 0)
        if self.training:  # exploration: some mazes must think longer
            explores = self._rng.random(len(steps)) < self._exploration
            halted &= steps >= explores * self._rng.integers(2, MAX_STEPS + 1, len(steps))
        halted |= steps >= MAX_STEPS
        outputs = {
            "logits": self.answer(state),
            "q_halt_logits": q_halt,
            "q_continue_logits": q_continue,
        }
        return Carry(data(state), steps, halted, current), outputs


def train(head, mazes, updates, batch_size=32, learning_rate=2e-3, report=100):
    """Trains with one update per step; ends with the moving average of the weights.

    Yields `(update, metrics)` every `report` updates; the metrics are sums over these updates.
    """
    rate = optim.build_schedule(
        {
            "name": "cosine_decay",
            "warmup": 50,
            "arguments": [learning_rate, updates, learning_rate / 50],
        }
    )
    optimizer, rng = (
        optim.AdamW(rate, betas=(0.9, 0.98), weight_decay=0.1),
        np.random.default_rng(1),
    )
    average = {name: value.copy() for name, value in head.trainable_parameters().items()}

    def fresh():
        rows = rng.integers(0, len(mazes["inputs"]), batch_size)
        return {k: v[rows] for k, v in mazes.items()}

    def step(carry, batch):
        carry, loss, metrics, _, _ = head(carry=carry, batch=batch)
        return loss * (1 / batch_size), carry, metrics

    carry, sums = head.initial_carry(fresh()), {}
    for update in range(1, updates + 1):
        (_, carry, metrics), grads = nn.value_and_grad(head, step)(carry, fresh())
        optimizer.update(head, *optim.clip_grad_norm(grads, 1.0)[:1])
        for name, value in head.trainable_parameters().items():
            average[name] += (value - average[name]) * max(1 / update, 1 / 200)
        sums = {k: sums.get(k, 0) + v for k, v in metrics.items()}
        if update % report == 0:
            yield update, sums
            sums = {}
    head.load_weights(average)


def evaluate(head, mazes):
    """Whether each maze's answer was right in every cell when the model halted, and its steps."""
    head.eval()
    count = len(mazes["inputs"])
    running, right, steps = np.ones(count, bool), np.zeros(count, bool), np.zeros(count, int)
    carry = head.initial_carry(mazes)
    while running.any():
        carry, _, _, outputs, _ = head(["logits"], carry=carry, batch=mazes)
        ends, labels = running & carry.halted, carry.current_data["labels"]
        right[ends] = ((outputs["logits"].argmax(-1) == labels) | (labels == IGNORE)).all(-1)[ends]
        steps[ends] = carry.steps[ends]
        running &= ~carry.halted
    head.train()
    return right, steps


def draw(path, history, groups, after):
    """Draws accuracy and steps, during training and by distance."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: install matplotlib to draw it")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = [f"{low}-{high}" for low, high in DISTANCES]
    right, steps = ([values[group].mean() for group in groups] for values in after)
    for axis, x, curves, label in (
        (axes[0], history["update"], (history["right"], history["steps"]), "update"),
        (axes[1], names, (right, steps), "distance of the farthest cell (held-out mazes)"),
    ):
        axis.plot(x, curves[0], "C0-o", markersize=3)
        axis.set(xlabel=label, ylabel="share answered exactly", ylim=(0, 1.02))
        axis.yaxis.label.set_color("C0")
        other = axis.twinx()
        other.plot(x, curves[1], "C1-o", markersize=3)
        other.set(ylabel="mean steps", ylim=(0, MAX_STEPS + 0.2))
        other.yaxis.label.set_color("C1")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument(
        "--no-q-continue",
        action="store_true",
        help="halt where q_halt > 0 instead of q_halt > q_continue",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/act_maze.png"), help="file of the picture"
    )
    options = parser.parse_args()
    began = time.perf_counter()

    mazes, _ = make_mazes(np.random.default_rng(0), 4000)
    held_out, distance = make_mazes(np.random.default_rng(1), 100)
    pyloss.random.seed(0)
    both = not options.no_q_continue
    head = ACTLossHead(MazeModel(both), "stablemax_cross_entropy", q_continue=both)
    before = evaluate(head, held_out)

    history = {"update": [], "right": [], "steps": []}
    for update, sums in train(head, mazes, options.updates):
        count = max(sums["count"], 1)
        values = update, sums["exact_accuracy"] / count, sums["steps"] / count
        history = {
            name: [*past, value]
            for (name, past), value in zip(history.items(), values, strict=True)
        }
        if update % 500 == 0:
            print(
                "update {}: {:.0%} of the mazes that halted are exact, after {:.1f} steps".format(
                    *values
                ),
                flush=True,
            )

    after = evaluate(head, held_out)
    groups = [(low <= distance) & (distance <= high) for low, high in DISTANCES]
    print(
        "\nheld-out mazes    before training        after"
        "\nfarthest cell    exact     steps    exact     steps"
    )
    for name, group in [
        *zip((f"{low:2d} to {high:2d}" for low, high in DISTANCES), groups, strict=True),
        ("all", distance > 0),
    ]:
        cells = (
            f"{right[group].mean():9.1%} {steps[group].mean():8.2f}"
            for right, steps in (before, after)
        )
        print(f"{name:13s}", *cells)
    right, steps = after
    relation = np.corrcoef(distance, steps)[0, 1] if steps.std() else 0.0
    print(f"correlation of steps and distance: {relation:.2f}")
    draw(options.out, history, groups, after)
    print(f"all in {time.perf_counter() - began:.0f} s")
    return 0 if right.mean() > 0.8 and relation > 0.5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
