"""This machine's speeds: memory, matrix products, training steps.

`pyloss bench` prints them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core, nn
from pyloss.ops.arrays import Array, core_weight, empty
from pyloss.optim import AdamW
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: Larger than caches.
MEMORY_BYTES = 128 << 20
#: Limits a vocabulary's table, whose products would need much memory.
MOST_ROWS = 8192


def best_seconds(function: Callable[[], Any], seconds: float) -> float:
    """The shortest of the calls that fit into about `seconds`, at least two.

    The first call counts only if it takes that long.
    """

    def once() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    first = once()
    if first >= seconds:
        return first
    end, best = time.perf_counter() + seconds, min(once(), once())
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def memory_speed(seconds: float = 0.5, size: int = MEMORY_BYTES) -> float:
    """Bytes per second of kernels over an array of `size` bytes.

    The faster of reading, and reading and writing.
    """
    rows = empty(64, max(size // 256, 1))
    rows[...] = 1
    flat, largest = rows.reshape(-1), np.empty(len(rows), np.int32)
    reading = best_seconds(lambda: _core.argmax(rows, largest), seconds / 2)
    return rows.nbytes / min(
        reading, best_seconds(lambda: _core.scale(1.0, flat, flat), seconds / 2) / 2
    )


def product_speed(weight: Array | Weight, tokens: int, seconds: float = 0.5) -> float:
    """FLOP per second of x [tokens, I] times a weight^T, and of the gradient by x.

    The weight [O, I] is float32 or stored.
    """
    rows, cols = weight.shape
    rng, stored = np.random.default_rng(0), core_weight(weight)
    x, dy = (rng.standard_normal((tokens, size), dtype=np.float32) for size in (cols, rows))
    y, dx = empty(tokens, rows), empty(tokens, cols)

    def both() -> None:
        _core.linear_forward(x, stored, None, None, None, 0.0, None, y)
        _core.linear_input_grad(dy, stored, None, None, 0, None, dx)

    return 4 * tokens * rows * cols / best_seconds(both, seconds)


def typical_weights(model: Any) -> dict[str, Weight]:
    """For each format of the model, a matrix of the shape that holds most of its values.

    The most used format is first. Matrices have at most MOST_ROWS rows.
    """
    first: dict[tuple[str, tuple[int, ...]], Weight] = {}
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    for weight in model.stored().values():
        one = weight.matrices[0] if isinstance(weight, WeightStack) else weight
        key = one.format, one.shape
        first.setdefault(key, one)
        numbers[key] = numbers.get(key, 0) + math.prod(weight.shape)
    found: dict[str, Weight] = {}
    for key in sorted(numbers, key=numbers.__getitem__, reverse=True):
        weight = first[key]
        rows = min(weight.shape[0], MOST_ROWS - MOST_ROWS % (weight.head_dim or 1))
        found.setdefault(weight.format, weight.slice_rows(0, rows))
    return found


def training_step(
    model: Any,
    config: Mapping[str, Any],
    use_dora: bool = False,
    grad_checkpoint: bool = False,
    learning_rate: float = 1e-4,
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Adds adapters to all layers of `model` and returns a training step.

    The step takes a batch and its lengths (see `tuner.default_loss`), updates the adapters with
    AdamW and returns the loss. `config` is that of `linear_to_lora_layers`.
    """
    from pyloss.tuner import default_loss, linear_to_lora_layers

    linear_to_lora_layers(model, -1, config, use_dora)
    model.train().set_grad_checkpoint(grad_checkpoint)
    optimizer, gradients = AdamW(learning_rate), nn.value_and_grad(model, default_loss)

    def step(batch: np.ndarray, lengths: np.ndarray) -> float:
        (loss, _), grads = gradients(model, batch, lengths)
        optimizer.update(model, grads)
        return float(loss)

    return step


class Step(NamedTuple):
    """How fast a model trains: tokens a second, and the peak of the process's memory in bytes."""

    tokens_per_second: float
    peak_memory: int


def step_speed(
    step: Callable[[np.ndarray, np.ndarray], float],
    vocabulary: int,
    batch: int,
    tokens: int,
    seconds: float = 5.0,
) -> Step:
    """The best of some steps over `batch` rows of `tokens` random tokens each."""
    from pyloss.tuner.run.plan import peak_memory

    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens + 1)).astype(np.int32)
    lengths = np.full((batch, 2), (0, tokens + 1), np.int32)
    best = best_seconds(lambda: step(ids, lengths), seconds)
    return Step(batch * tokens / best, peak_memory())
