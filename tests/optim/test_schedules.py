"""Schedules against their closed forms, and refused configurations."""

import pytest

from pyloss import optim


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
