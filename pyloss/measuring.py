"""This machine's speeds: memory, matrix products; and a model's: training, evaluation, generation.

`pyloss bench` prints them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core, nn
from pyloss.generation import generate_tokens
from pyloss.ops.arrays import Array, core_weight, empty
from pyloss.optim import AdamW
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: Larger than caches.
MEMORY_BYTES = 128 << 20
#: Limits a vocabulary's table, whose products would need much memory.
MOST_ROWS = 8192
#: steps of a training run are measured for at least so long, and at least so many
STEP_SECONDS, LEAST_STEPS = 10.0, 3


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


def add_adapters(
    model: Any, config: Mapping[str, Any], use_dora: bool = False, grad_checkpoint: bool = False
) -> None:
    """Adds adapters to all layers of `model`. `config` is that of `linear_to_lora_layers`."""
    from pyloss.tuner import linear_to_lora_layers

    linear_to_lora_layers(model, -1, config, use_dora)
    model.train().set_grad_checkpoint(grad_checkpoint)


def training_step(
    model: Any,
    config: Mapping[str, Any],
    use_dora: bool = False,
    grad_checkpoint: bool = False,
    learning_rate: float = 1e-4,
    loss: Callable[..., Any] | None = None,
) -> Callable[[np.ndarray, np.ndarray], float]:
    """`add_adapters`; returns a training step.

    The step takes a batch and its lengths (see `tuner.default_loss`, the default of `loss`),
    updates the adapters with AdamW and returns the loss.
    """
    from pyloss.tuner import default_loss

    add_adapters(model, config, use_dora, grad_checkpoint)
    optimizer, gradients = AdamW(learning_rate), nn.value_and_grad(model, loss or default_loss)

    def step(batch: np.ndarray, lengths: np.ndarray) -> float:
        (loss, _), grads = gradients(model, batch, lengths)
        optimizer.update(model, grads)
        return float(loss)

    return step


class Speed(NamedTuple):
    """Tokens a second: of the median and the best of some runs after a first one."""

    median: float
    best: float
    runs: int

    @classmethod
    def of(cls, speeds: Sequence[float]) -> Speed:
        """The speed of runs with these speeds."""
        return cls(statistics.median(speeds), max(speeds), len(speeds))


def training_speed(
    model: Any, batch: int, tokens: int, seconds: float = STEP_SECONDS, learning_rate: float = 1e-5
) -> Speed:
    """The speed that `tuner.train` reports for each of its steps after the first.

    Batches have `batch` rows of `tokens` random tokens each. The trainable parameters of `model`
    are trained.
    """
    from pyloss.tuner.callbacks import TrainingCallback
    from pyloss.tuner.trainer import TrainingArgs, train

    rows, speeds = _random_batch(model, batch, tokens), []

    class Speeds(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            speeds.append(train_info["tokens_per_second"])

    def batches(**options: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (rows for _ in _repeats(seconds))

    args = TrainingArgs(
        iters=sys.maxsize, steps_per_report=1, adapter_file=None, keep_best=False, progress=False
    )
    train(
        model,
        AdamW(learning_rate),
        [rows],
        args=args,
        iterate_batches=batches,
        training_callback=Speeds(),
    )
    return Speed.of(speeds[1:])


def evaluation_speed(model: Any, batch: int, tokens: int, seconds: float = 3.0) -> Speed:
    """The speed of `tuner.evaluate` over `batch` rows of `tokens` random tokens each."""
    from pyloss.tuner import evaluate

    rows = _random_batch(model, batch, tokens)
    return _speed(
        lambda: evaluate(model, rows, batch, iterate_batches=lambda **_: [rows]),
        batch * tokens,
        seconds,
    )


def generation_speed(model: Any, tokens: int, seconds: float = 3.0) -> tuple[Speed, Speed]:
    """The speeds of reading a prompt of `tokens` random tokens, and of generating after it."""
    prompt = _random_batch(model, 1, tokens)[0][0, :tokens].tolist()
    reading = _speed(lambda: next(generate_tokens(model, prompt)), tokens, seconds)
    answer = generate_tokens(model, prompt)
    next(answer)
    return reading, _speed(lambda: next(answer), 1, seconds)


def _random_batch(model: Any, batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch and its lengths (see `tuner.default_loss`) of `tokens` targets a row."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, tokens + 1))
    return ids.astype(np.int32), np.full((batch, 2), (0, tokens + 1), np.int32)


def _repeats(seconds: float) -> Iterator[int]:
    """Counts a first run, then runs for about `seconds`, at least LEAST_STEPS."""
    yield 0
    end = time.perf_counter() + seconds
    for count in itertools.count(1):
        if count > LEAST_STEPS and time.perf_counter() >= end:
            return
        yield count


def _speed(function: Callable[[], Any], tokens: int, seconds: float) -> Speed:
    """The speed of calls of `function`, each over `tokens` tokens."""
    speeds = []
    for _ in _repeats(seconds):
        begin = time.perf_counter()
        function()
        speeds.append(tokens / max(time.perf_counter() - begin, 1e-9))
    return Speed.of(speeds[1:])
