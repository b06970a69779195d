"""Updates against float64 formulas, saved state, and refused arguments."""

import math
from functools import partial

import numpy as np
import pytest
from optim_cases import CASES, SHAPES, Holder, some_grads

from pyloss import optim


@pytest.mark.parametrize(("kind", "formula", "options"), CASES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_ten_updates_follow_the_formula(kind, formula, options, scale):
    model, rate = Holder(), 1e-2
    arrays = dict(model.arrays)
    expected = {name: array.astype(np.float64) for name, array in arrays.items()}
    state = {name: {} for name in expected}
    optimizer = kind(rate, **options)
    for t in range(1, 11):
        grads = some_grads(t)
        for name, grad in grads.items():
            expected[name] = formula(
                expected[name], grad.astype(np.float64) * scale, state[name], t, rate, **options
            )
        optimizer.update(model, grads, grad_scale=scale)
    assert optimizer.step == 10
    for name, array in arrays.items():
        assert model.arrays[name] is array
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=2e-6)


def test_adam_is_adamw_without_weight_decay():
    first, second = Holder(), Holder()
    one, two = optim.Adam(0.01), optim.AdamW(0.01, weight_decay=0.0)
    for t in range(3):
        one.update(first, some_grads(t))
        two.update(second, some_grads(t))
    for name in SHAPES:
        np.testing.assert_array_equal(first.arrays[name], second.arrays[name])


def test_grads_may_be_strided_and_absent():
    model = Holder()
    before = {name: array.copy() for name, array in model.arrays.items()}
    grad = np.asfortranarray(np.ones(SHAPES["c"], np.float32))
    optim.SGD(0.5).update(model, {"c": grad})
    np.testing.assert_allclose(model.arrays["c"], before["c"] - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(model.arrays["a"], before["a"])


def refused(model, grads, match):
    before = {name: array.copy() for name, array in model.arrays.items()}
    optimizer = optim.AdamW(0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.update(model, grads)
    assert optimizer.step == 0
    for name, array in before.items():
        np.testing.assert_array_equal(model.arrays[name], array)


def test_an_unknown_name_is_refused_before_anything_changes():
    refused(
        Holder(),
        some_grads(0) | {"layers.0.lora_b": np.zeros(3, np.float32)},
        "nearest is 'layers.0.lora_a'",
    )


def test_a_wrong_shape_is_refused_before_anything_changes():
    refused(
        Holder(),
        some_grads(0) | {"c": np.zeros((5, 33), np.float32)},
        r"'c' has shape \(5, 33\).*\(33, 5\)",
    )


@pytest.mark.parametrize(("kind", "formula", "options"), CASES)
def test_scaled_rates_are_those_of_a_group_of_its_own(kind, formula, options):
    """A parameter's own rate, with decay and schedule; the other rates stay unchanged."""
    model, schedule = Holder(), optim.cosine_decay(1e-2, 8)
    expected = {name: array.astype(np.float64) for name, array in model.arrays.items()}
    state = {name: {} for name in expected}
    optimizer = kind(schedule, **options)
    optimizer.rate_scales = {"lora_a": 16, "c.a": 3}
    for t in range(1, 6):
        grads = some_grads(t)
        for name, grad in grads.items():
            rate = schedule(t - 1) * (16 if name == "layers.0.lora_a" else 1)
            expected[name] = formula(
                expected[name], grad.astype(np.float64), state[name], t, rate, **options
            )
        optimizer.update(model, grads)
    assert optimizer.learning_rate == schedule(4) and set(optimizer.state_dict()) == set(
        kind_state(optimizer)
    )
    for name, array in model.arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=2e-6)


def kind_state(optimizer):
    return ["step", *(f"{slot}.{name}" for slot in optimizer.slots for name in SHAPES)]


@pytest.mark.parametrize("betas", [None, 0.9, "ab", (0.9,), (0.9, 0.99, 0.999)])
def test_betas_are_two_numbers(betas):
    with pytest.raises(
        ValueError, match="betas is .*; it must be two numbers of at least 0 and below 1"
    ):
        optim.AdamW(1e-3, betas)


@pytest.mark.parametrize("scale", [-1, math.nan, math.inf, "x"])
def test_scales_that_cannot_be(scale):
    optimizer = optim.AdamW(1e-3)
    with pytest.raises((TypeError, ValueError), match="rate_scales"):
        optimizer.rate_scales = {"lora_b": scale}
    assert optimizer.rate_scales == {}


@pytest.mark.parametrize("bad", [np.zeros((3, 7)), np.zeros((7, 3), np.float32).T])
def test_a_parameter_that_cannot_be_updated_in_place_is_refused(bad):
    model = Holder()
    model.arrays["a"] = bad
    refused(model, some_grads(0), "'a' is .* only writable C-contiguous float32")


@pytest.mark.parametrize(
    "kind",
    [
        optim.AdamW,
        optim.AdamATan2,
        optim.SGD,
        optim.Lion,
        partial(optim.SGD, momentum=0.9, dampening=0.5),
    ],
)
def test_saved_state_continues_to_the_same_bits(kind):
    schedule = optim.cosine_decay(0.01, 10)
    whole, split = Holder(), Holder()
    one, two = kind(schedule), kind(schedule)
    for t in range(6):
        one.update(whole, some_grads(t))
    for t in range(3):
        two.update(split, some_grads(t))
    three = kind(schedule)
    three.load_state_dict({key: np.copy(value) for key, value in two.state_dict().items()})
    for t in range(3, 6):
        three.update(split, some_grads(t))
    assert three.step == 6
    for name in SHAPES:
        np.testing.assert_array_equal(whole.arrays[name], split.arrays[name])


def test_state_of_another_kind_of_optimizer_is_refused():
    model, adam = Holder(), optim.Adam(0.1)
    adam.update(model, some_grads(0))
    with pytest.raises(ValueError, match="SGD keeps nothing"):
        optim.SGD(0.1).load_state_dict(adam.state_dict())
    state = adam.state_dict()
    del state["v.a"]
    with pytest.raises(ValueError, match="'a' lacks v"):
        optim.Adam(0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks 'step'"):
        optim.Adam(0.1).load_state_dict({})


@pytest.mark.parametrize(
    "value", ["\0", "float32", None, {"a": 1}, [1, "x"], [[1, 2], [3]], 1j, True]
)
def test_a_state_that_holds_no_numbers_is_refused(value):
    adam = optim.Adam(0.1)
    adam.update(Holder(), some_grads(0))
    with pytest.raises(ValueError, match=r"optimizer state.* 'v\.a'"):
        optim.Adam(0.1).load_state_dict({**adam.state_dict(), "v.a": value})


def test_state_of_another_size_is_refused():
    model, adam = Holder(), optim.Adam(0.1)
    adam.update(model, some_grads(0))
    model.arrays["a"] = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="state of 'a' has another size"):
        adam.update(model, {"a": np.zeros((2, 2), np.float32)})


def test_learning_rate_is_that_of_the_latest_update():
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9))
    assert optimizer.learning_rate == pytest.approx(0.1)
    for t in range(5):
        optimizer.update(Holder(), some_grads(t))
    assert optimizer.learning_rate == pytest.approx(0.06561)
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate == 0.5
    with pytest.raises(ValueError, match="learning_rate is -1"):
        optimizer.learning_rate = -1


@pytest.mark.parametrize("rate", [math.inf, math.nan, 10**400, -1e-3])
def test_rates_that_no_step_can_have(rate):
    with pytest.raises(ValueError, match="learning_rate is"):
        optim.SGD(rate)
    with pytest.raises(ValueError, match="learning rate that the schedule has for update 0 is"):
        optim.SGD(lambda step: rate).update({"a": np.ones(2, np.float32)}, {"a": np.ones(2)})


def test_a_schedule_that_grows_out_of_range():
    optimizer = optim.SGD(optim.exponential_decay(1.0, 10.0))
    optimizer.step = 400
    with pytest.raises(ValueError, match="update 400 is too large for a float"):
        optimizer.update({"a": np.ones(2, np.float32)}, {"a": np.ones(2)})
    assert optimizer.step == 400


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (
            optim.SGD(0.1),
            "SGD(learning_rate=0.1, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False; "
            "1 update)",
        ),
        (
            optim.Lion(optim.cosine_decay(1e-4, 10)),
            "Lion(learning_rate=0.0001 by cosine_decay, betas=(0.9, 0.99), weight_decay=0.0; "
            "1 update)",
        ),
        (
            optim.AdamATan2(optim.WarmUp(1e-4, 10)),
            "AdamATan2(learning_rate=0 by WarmUp, betas=(0.9, 0.999), weight_decay=0.01, a=1.0, "
            "b=1.0, correct_angle=False; 1 update)",
        ),
    ],
)
def test_an_optimizer_says_its_settings_and_its_updates_in_a_line(optimizer, text):
    optimizer.update(Holder(), some_grads(0))
    assert repr(optimizer) == text
    optimizer.rate_scales = {"lora_b": 16}
    assert "rate_scales={'lora_b': 16.0}" in repr(optimizer)


def test_a_saved_state_does_not_change_at_the_next_update():
    for optimizer in (optim.Adam(0.1), optim.MultiOptimizer([optim.Adam(0.1)], [])):
        model = Holder()
        optimizer.update(model, some_grads(0))
        saved, live = optimizer.state_dict(), optimizer.state_dict(copy=False)
        kept = {key: np.copy(value) for key, value in saved.items()}
        optimizer.update(model, some_grads(1))
        for key, value in kept.items():
            np.testing.assert_array_equal(saved[key], value)
        assert any((live[key] != value).any() for key, value in kept.items() if key != "step")
