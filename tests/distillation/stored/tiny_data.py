"""A teacher, a student with an adapter, and data with targets of every shape."""

import numpy as np
import tiny

import pyloss
from pyloss.models import load_model
from pyloss.tuner import linear_to_lora_layers


class Tokens(tiny.Tokens):
    """A dataset of (token ids, first target or weights)."""

    def process(self, row):
        return row


def models(folder, **teacher_sizes):
    """(student, teacher), of 29 classes."""
    made = []
    for name, seed, sizes in (("student", 0, {}), ("teacher", 1, teacher_sizes)):
        tiny.write_folder(folder / name, seed=seed, tied=False, **sizes)
        made.append(load_model(folder / name))
    pyloss.random.seed(0)
    linear_to_lora_layers(made[0], 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return made


def data(count=8, seed=0, length=12):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tokens = list(map(int, rng.integers(1, 29, length - i % 3)))
        weights = np.zeros(len(tokens), np.float32)
        weights[[2, 5, 6]] = 1
        rows.append((tokens, weights) if i % 4 == 3 else (tokens, i % 5))
    return Tokens(rows)
