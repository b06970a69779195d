"""Speeds are amounts over the shortest time; the measured work is the stated one."""

import numpy as np
import pytest

import pyloss
from pyloss import _core, measuring
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(format="f32", tied=True):
    return random_model(ModelConfig("llama", tie_word_embeddings=tied, **SIZES), format)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return now


def pass_time(clock, *durations):
    turn = iter(durations)

    def function():
        clock[0] += next(turn)

    return function


def test_the_shortest_call_counts_but_not_the_first(clock):
    assert measuring.best_seconds(pass_time(clock, 1, 3, 5, 2), 9) == 2


def test_two_calls_are_made_even_where_the_first_takes_all_the_time_left(clock):
    assert measuring.best_seconds(pass_time(clock, 3, 8, 7), 4) == 7


def test_a_first_call_that_fills_the_time_is_enough(clock):
    assert measuring.best_seconds(pass_time(clock, 9), 4) == 9


def test_speeds_are_amounts_over_time(monkeypatch):
    monkeypatch.setattr(measuring, "best_seconds", lambda function, seconds: (function(), 0.5)[1])
    assert measuring.memory_speed(size=4096) == 2 * 4096 / 0.5
    weight = pyloss.Weight.quantize(np.ones((6, 32), np.float32), "q8_0")
    _core.profile(True)
    assert measuring.product_speed(weight, 10) == 2 * 2 * 10 * 6 * 32 / 0.5
    assert {name: calls for name, (calls, _, _) in _core.profile(False).items()} == {
        "linear_forward": 1,
        "linear_input_grad": 1,
    }


def test_a_step_trains(monkeypatch):
    monkeypatch.setattr(measuring, "best_seconds", lambda function, seconds: (function(), 0.5)[1])
    model = llama()
    losses, step = (
        [],
        measuring.training_step(
            model, {"rank": 2, "scale": 2.0}, use_dora=True, learning_rate=0.02
        ),
    )

    def noted(batch, lengths):
        losses.append(step(batch, lengths))

    for _ in range(5):
        speed, peak = measuring.step_speed(noted, model.vocab_size, 3, 6)
    assert speed == 3 * 6 / 0.5 and peak > 1 << 20
    assert losses[-1] < losses[0] - 0.05


def test_typical_weights_are_one_of_each_format(monkeypatch):
    monkeypatch.setattr(measuring, "MOST_ROWS", 48)
    model = llama("q4_1")
    model.set_module(
        "model.embed_tokens",
        pyloss.nn.Embedding.from_weight(pyloss.Weight.quantize(np.ones((64, 32)), "q8_0")),
    )
    weights = measuring.typical_weights(model)
    assert [(name, weight.format, weight.shape) for name, weight in weights.items()] == [
        ("q4_1", "q4_1", (48, 32)),
        ("q8_0", "q8_0", (48, 32)),
    ]
