"""Optimizers against float64 formulas, schedules against closed forms, and refused arguments."""

import math
from functools import partial

import numpy as np
import pytest

from pyloss import optim

SHAPES = {"a": (3, 7), "b": (1,), "c": (33, 5), "layers.0.lora_a": (2, 2, 3)}


class Holder:
    """The one method of a model that an optimizer uses."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.arrays = {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
        }

    def trainable_parameters(self):
        return self.arrays


def some_grads(seed):
    rng = np.random.default_rng(1000 + seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def adamw_float64(
    p, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, bias_correction=True
):
    b1, b2 = betas
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1, 1)
    return p - lr * weight_decay * p - lr * (s["m"] / c1) / (np.sqrt(s["v"] / c2) + eps)


def sgd_float64(p, g, s, t, lr, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False):
    g = g + weight_decay * p
    if momentum:
        s["buf"] = g if t == 1 else momentum * s["buf"] + (1 - dampening) * g
        g = g + momentum * s["buf"] if nesterov else s["buf"]
    return p - lr * g


def lion_float64(p, g, s, t, lr, betas=(0.9, 0.99), weight_decay=0.0):
    m = s.get("m", 0)
    s["m"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + weight_decay * p)


CASES = [
    (optim.AdamW, adamw_float64, {}),
    (optim.AdamW, adamw_float64, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
    (optim.AdamW, adamw_float64, {"bias_correction": False, "weight_decay": 0.0}),
    (optim.SGD, sgd_float64, {}),
    (optim.SGD, sgd_float64, {"weight_decay": 0.1}),
    (optim.SGD, sgd_float64, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (optim.SGD, sgd_float64, {"momentum": 0.9, "nesterov": True}),
    (optim.Lion, lion_float64, {}),
    (optim.Lion, lion_float64, {"betas": (0.5, 0.7), "weight_decay": 0.2}),
]


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
    "kind", [optim.AdamW, optim.SGD, optim.Lion, partial(optim.SGD, momentum=0.9, dampening=0.5)]
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


def test_unavailable_optimizers_are_refused_by_name():
    with pytest.raises(
        ValueError, match="'muon' is not available; allowed: adam, adamw, lion, sgd"
    ):
        optim.build_optimizer("muon", 0.1)
    with pytest.raises(ValueError, match="adamw has no option 'beta'; allowed: betas, eps"):
        optim.build_optimizer("adamw", 0.1, {"beta": 1})
    with pytest.raises(ValueError, match=r"Adam: betas\[0\] is 1.5"):
        optim.build_optimizer("Adam", 0.1, {"betas": [1.5, 0.9]})
    assert isinstance(optim.build_optimizer("AdamW", 0.1, {"betas": [0.9, 0.98]}), optim.AdamW)


def test_norm_and_clipping():
    grads = some_grads(0)
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert optim.grad_norm(grads) == pytest.approx(norm, rel=1e-6)
    clipped, before = optim.clip_grad_norm(grads, 1.0)
    assert before == pytest.approx(norm, rel=1e-6)
    assert optim.grad_norm(clipped) == pytest.approx(1.0, rel=1e-4)
    kept, _ = optim.clip_grad_norm(grads, 1e9)
    for name in SHAPES:
        np.testing.assert_array_equal(kept[name], grads[name])
    assert optim.grad_norm({}) == 0
    assert math.isnan(optim.grad_norm({"a": np.array([1, np.nan], np.float32)}))
    assert math.isinf(optim.grad_norm({"a": np.array([1, np.inf], np.float32)}))


def test_schedules_follow_their_closed_forms():
    linear = optim.linear_schedule(0.0, 0.1, 100)
    assert [linear(0), linear(50), linear(100), linear(1000)] == pytest.approx([0, 0.05, 0.1, 0.1])
    step = optim.step_decay(0.1, 0.9, 10)
    assert [step(9), step(10), step(20)] == pytest.approx([0.1, 0.09, 0.081])
    cosine = optim.cosine_decay(0.1, 1000, 0.01)
    assert [cosine(0), cosine(500), cosine(1000), cosine(5000)] == pytest.approx(
        [0.1, 0.055, 0.01, 0.01]
    )
    joined = optim.join_schedules([linear, lambda n: 7 + n, lambda n: 100 + n], [10, 12])
    assert [joined(9), joined(10), joined(11), joined(12), joined(15)] == pytest.approx(
        [0.009, 7, 8, 100, 103]
    )
    with pytest.raises(ValueError, match="one boundary fewer"):
        optim.join_schedules([linear], [3])
    with pytest.raises(ValueError, match="steps is 0"):
        optim.linear_schedule(0, 1, 0)


def test_mlx_lm_schedule_config():
    config = {
        "name": "cosine_decay",
        "warmup": 100,
        "warmup_init": 1e-7,
        "arguments": [1e-5, 1000, 1e-7],
    }
    schedule = optim.build_schedule(config)
    after = optim.cosine_decay(1e-5, 1000, 1e-7)
    assert schedule(0) == 1e-7
    assert schedule(50) == pytest.approx((1e-5 + 1e-7) / 2)
    assert schedule(100) == 1e-5
    assert schedule(101) == pytest.approx(after(0))
    assert schedule(600) == pytest.approx(after(499))
    assert schedule.warmup == 100
    assert optim.build_schedule({"name": "step_decay", "arguments": [0.1, 0.5, 2]})(2) == 0.05


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"name": "cosine", "arguments": [1]}, "name is 'cosine'; allowed: cosine_decay"),
        (
            {"name": {"cosine_decay": 1}, "arguments": [1]},
            "name is {'cosine_decay': 1}; allowed: cosine_decay",
        ),
        ({"name": ["cosine_decay"], "arguments": [1]}, "allowed: cosine_decay"),
        ({"name": "cosine_decay", "arguments": [1e-5]}, r"takes \[init, decay_steps, end"),
        ({"name": "cosine_decay"}, "arguments is None"),
        (
            {"name": "cosine_decay", "arguments": ["1e-5", 3]},
            "init is '1e-5'; it must be a finite number",
        ),
        (
            {"name": "linear_schedule", "arguments": [0, 10**400, 3]},
            "end is an integer of 1329 bits; it must be a finite",
        ),
        (
            {"name": "step_decay", "arguments": [1e-3, 0.5, 2**63]},
            "step_size is 9223372036854775808; it must be",
        ),
        ({"name": "exponential_decay", "arguments": "1e-3"}, "arguments is '1e-3'"),
        ({"name": "cosine_decay", "arguments": [1e-5, 3], "warm_up": 1}, "unknown key 'warm_up'"),
        ({"name": "cosine_decay", "arguments": [1e-5, 3], "warmup": "1"}, "warmup is '1'"),
        ({"name": "cosine_decay", "arguments": [1e-5, 0]}, "decay_steps is 0"),
    ],
)
def test_bad_schedule_configs_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        optim.build_schedule(config)


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
