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


def takes(monkeypatch, clock, model, method, durations):
    """Lets each call of a method of the model take some time: the numbers in turn, or a function
    of its first argument.
    """
    cls, turn = type(model), None if callable(durations) else iter(durations)
    original = getattr(cls, method)

    def timed(self, first, *rest):
        clock[0] += durations(first) if turn is None else next(turn)
        return original(self, first, *rest)

    monkeypatch.setattr(cls, method, timed)


@pytest.mark.parametrize(
    ("seconds", "durations", "speed"),
    [
        (7, (90, 1, 4, 2), (9, 18, 3)),
        (3.5, (90, 1, 1, 1, 1), (18, 18, 4)),
        (0, (9,) * 4, (2, 2, 3)),
    ],
)
def test_the_speed_of_training_is_that_of_the_trainers_steps_after_the_first(
    monkeypatch, clock, seconds, durations, speed
):
    model = llama()
    measuring.add_adapters(model, {"rank": 2, "scale": 2.0})
    takes(monkeypatch, clock, model, "hidden", durations)
    assert measuring.training_speed(model, 3, 6, seconds) == speed


def test_measured_training_updates_the_adapters_as_training_does(monkeypatch):
    monkeypatch.setattr(measuring, "_repeats", lambda seconds: range(4))
    config = {"rank": 2, "scale": 2.0}
    model, same = llama("q4_1"), llama("q4_1")
    pyloss.random.seed(0)
    measuring.add_adapters(model, config, use_dora=True)
    pyloss.random.seed(0)
    step = measuring.training_step(same, config, use_dora=True, learning_rate=0.02)
    assert measuring.training_speed(model, 3, 6, learning_rate=0.02).runs == 3
    ids = np.random.default_rng(0).integers(0, 64, (3, 7)).astype(np.int32)
    losses = [step(ids, np.full((3, 2), (0, 7), np.int32)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    trained = same.trainable_parameters()
    assert trained
    for name, array in model.trainable_parameters().items():
        np.testing.assert_array_equal(array, trained[name], err_msg=name)


def test_the_speed_of_evaluation_is_without_gradients(monkeypatch, clock):
    model = llama()
    takes(monkeypatch, clock, model, "hidden", (90, 1, 4, 2))
    assert measuring.evaluation_speed(model, 3, 6, seconds=7) == (9, 18, 3)
    assert not model.training


def test_the_speeds_of_a_prompt_and_of_the_answer(monkeypatch, clock):
    model = llama()
    takes(
        monkeypatch, clock, model, "step", lambda tokens: 0.5 if len(tokens) == 1 else len(tokens)
    )
    reading, generating = measuring.generation_speed(model, 6, seconds=2)
    assert (reading.median, generating.median) == (1, 2)


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
