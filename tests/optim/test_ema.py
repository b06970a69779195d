"""The moving average of parameters: its formula, evaluation with it, saved state, refusals."""

import numpy as np
import pytest
from optim_cases import SHAPES, Holder

from pyloss import optim


def changed(model, seed):
    rng = np.random.default_rng(seed)
    for array in model.arrays.values():
        array += rng.standard_normal(array.shape, dtype=np.float32)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_averages_follow_the_formula(decay):
    model = Holder()
    ema = optim.EMA(model, decay)
    expected = {name: array.astype(np.float64) for name, array in model.arrays.items()}
    for t in range(30):
        changed(model, t)
        ema.update(model)
        for name, array in model.arrays.items():
            expected[name] = decay * expected[name] + (1 - decay) * array
    assert ema.step == 30 and set(ema.averages) == set(SHAPES)
    for name in SHAPES:
        np.testing.assert_allclose(ema.averages[name], expected[name], rtol=2e-5, atol=2e-6)


def test_the_model_has_the_averages_within_the_block_and_its_own_parameters_afterwards():
    model = Holder()
    ema = optim.EMA(model, 0.5)
    changed(model, 1)
    ema.update(model)
    trained = {name: array.copy() for name, array in model.arrays.items()}
    averages = {name: array.copy() for name, array in ema.averages.items()}
    arrays = dict(model.arrays)
    with pytest.raises(KeyError, match="stop"), ema.swapped(model) as same:
        assert same is model
        for name in SHAPES:
            np.testing.assert_array_equal(model.arrays[name], averages[name])
        for what in (ema.update, ema.copy_to, ema.register, lambda model: ema.state_dict()):
            with pytest.raises(RuntimeError, match="the model holds the averages until"):
                what(model)
        raise KeyError("stop")
    for name in SHAPES:
        assert model.arrays[name] is arrays[name]
        np.testing.assert_array_equal(model.arrays[name], trained[name])
        np.testing.assert_array_equal(ema.averages[name], averages[name])
    ema.copy_to(model)
    for name in SHAPES:
        np.testing.assert_array_equal(model.arrays[name], averages[name])


def test_a_saved_average_continues_to_the_same_bits():
    model = Holder()
    whole, split = optim.EMA(model, 0.9), optim.EMA(model, 0.9)
    for t in range(6):
        changed(model, t)
        whole.update(model)
        if t == 3:
            state = {key: np.copy(value) for key, value in split.state_dict().items()}
            split = optim.EMA(Holder(7), 0.9)
            split.load_state_dict({**state, "step": int(state["step"])})
        split.update(model)
    assert split.step == whole.step == 6
    for name in SHAPES:
        np.testing.assert_array_equal(whole.averages[name], split.averages[name])


def test_other_parameters_and_states_are_refused():
    model = Holder()
    ema = optim.EMA(model)
    other = Holder()
    other.arrays["d"] = other.arrays.pop("a")
    with pytest.raises(ValueError, match="'a' is a trainable parameter of the average only"):
        ema.update(other)
    other = Holder()
    other.arrays["a"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"average of 'a' has shape \(3, 7\).*\(2, 2\)"):
        ema.update(other)
    state = ema.state_dict()
    ema.averages["a"] += 1  # the state is a copy
    assert (ema.averages["a"] != state["average.a"]).all()
    with pytest.raises(ValueError, match="lacks 'step'"):
        ema.load_state_dict({})
    with pytest.raises(ValueError, match=r"lacks 'average\.c'"):
        ema.load_state_dict({k: v for k, v in state.items() if k != "average.c"})
    with pytest.raises(ValueError, match=r"has 'average\.x', which is not averaged"):
        ema.load_state_dict({**state, "average.x": np.zeros(1)})
    with pytest.raises(ValueError, match="has 2 numbers for 'a'"):
        ema.load_state_dict({**state, "average.a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"'average\.a'.* array of numbers"):
        ema.load_state_dict({**state, "average.a": "x"})
    with pytest.raises(ValueError, match="decay is 1.5"):
        optim.EMA(model, 1.5)
    with pytest.raises(ValueError, match="no trainable parameters"):
        optim.EMA({})
    with pytest.raises(ValueError, match="'a' is float64"):
        optim.EMA({"a": np.zeros(3)})
    assert repr(ema) == "EMA(decay=0.999, parameters=4; 0 updates)"
