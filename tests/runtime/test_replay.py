"""Functions that are replaced by their recorded core calls, and functions that must not be."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import ops
from pyloss.ops.arrays import same_bits
from pyloss.runtime.replay import Replay


def runs(function, values, n=6):
    """Compare a replayed function with the function for n inputs; return if it was replayed."""
    replay, calls = Replay(), []

    def counted():
        calls.append(values[0])
        return function()

    for i in range(n):
        values[:] = i
        got = replay(counted).copy()
        np.testing.assert_array_equal(got, function())
    assert replay.ready == (values[0] not in calls)
    return replay.ready


@pytest.fixture
def x():
    return np.zeros(8, np.float32)


WEIGHT = np.arange(8, dtype=np.float32)
ROW = np.array([1], np.int32)


def test_calls_on_the_same_arrays_stand_for_the_function(x):
    assert runs(lambda: ops.add(ops.scale(ops.add(x, WEIGHT), 2.0), x), x)


def test_parts_and_shapes_of_what_calls_made(x):
    def function():
        made = ops.add(x, WEIGHT)
        return ops.scale(ops.add(made[4:], made[:4]).reshape(2, 2), 3.0)

    assert runs(function, x)


def test_a_store_that_is_written_to(x):
    store = np.zeros((3, 8), np.float32)

    def function():
        pyloss._core.put_rows(ops.scale(x, 2.0)[None], ROW, store)
        return ops.scale(store, 1.0)

    assert runs(function, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.scale(ops.scale(x, 2.0) + 1, 2.0),  # NumPy between the calls
        lambda x: ops.scale(x, float(x[0])),  # a scalar that depends on the values
        lambda x: ops.add(x, WEIGHT) + 0,  # NumPy after the calls
        lambda x: in_place(ops.add(x, WEIGHT)),  # no new array
        lambda x: ops.scale(x, 2.0) if x[0] % 2 else ops.add(x, WEIGHT),
        lambda x: ops.scale(x[: 1 + int(x[0])], 2.0),
        lambda x: x.copy(),
    ],
)
def test_functions_that_do_more_are_called_every_time(function, x):
    assert not runs(lambda: function(x), x)


def test_what_same_bits_decides_is_decided_again(x):
    options = np.zeros(8, np.float32)
    kept = [np.full(8, -1, np.float32), options]

    def function():
        if not same_bits(kept[0], options):
            kept[:] = options.copy(), ops.scale(options, 3.0)
        return ops.add(kept[1], x)

    replay = Replay()
    for i in range(20):
        options[:] = i // 8
        x[:] = i
        np.testing.assert_array_equal(replay(function), 3 * (i // 8) + i)
        assert replay.ready == (i % 8 >= 2)


def in_place(made):
    made *= 2
    return ops.scale(made, 1.0)


def test_an_error_of_the_function_ends_the_recording(x):
    replay = Replay()

    def failing():
        ops.add(x, x)
        raise RuntimeError

    for _ in range(4):
        with pytest.raises(RuntimeError):
            replay(failing)
    assert pyloss._core.record(False) is None and not replay.ready


FAMILIES = {"llama": {}, "mistral": {"sliding_window": 20}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_tokens_of_a_model_are_its_calls(tmp_path, family, adapter):
    model = tiny.load_tiny(tmp_path, model_type=family, **FAMILIES[family])
    if adapter:
        pyloss.linear_to_lora_layers(
            model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, use_dora=adapter == "dora"
        )
        for name, parameter in model.trainable_parameters().items():
            parameter[...] = np.random.default_rng(len(name)).normal(0, 0.1, parameter.shape)
    tokens, cache, replayed = np.random.default_rng(0).integers(0, 29, 150), model.make_cache(), 0
    whole = model(tokens[None])[0]
    for i, token in enumerate(tokens):
        logits = model.step([token], cache)
        np.testing.assert_allclose(logits, whole[i], atol=1e-4)
        replayed += cache.next.replay.ready
    assert replayed > 100


def test_what_a_step_returns_stays(tmp_path):
    model = tiny.load_tiny(tmp_path)
    cache = model.make_cache()
    kept = [(logits := model.step([t], cache), logits.copy()) for t in range(8)]
    assert cache.next.replay.ready and all((a == b).all() for a, b in kept)


@pytest.mark.parametrize("use_dora", [False, True])
def test_changes_of_the_model_between_tokens_count(tmp_path, use_dora):
    model = tiny.load_tiny(tmp_path)
    cache, fresh = model.make_cache(), model.make_cache()

    def both(token):
        return model.step([token], cache), model.step([token], fresh)

    for t in range(6):
        both(t)
    assert cache.next.replay.ready
    fresh.next = None
    pyloss.linear_to_lora_layers(
        model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, use_dora=use_dora
    )
    for name, parameter in model.trainable_parameters().items():
        parameter[...] = 0.1 * (1 + len(name) % 3)  # another adapter
    for t in range(6):
        got, want = both(t)
        np.testing.assert_array_equal(got, want)
        fresh.next = None  # computed without a replay at every token
    assert cache.next.replay.ready
    for t, parameter in enumerate(model.layers[0].self_attn.q_proj.trainable_parameters().values()):
        parameter[1:] = 3 + t  # written in place
        for _ in range(3):
            got, want = both(t)
            np.testing.assert_array_equal(got, want)
            fresh.next = None
        assert cache.next.replay.ready
