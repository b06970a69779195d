"""Groups of parameters with settings of their own, and several optimizers in one."""

import numpy as np
import pytest
from optim_cases import SHAPES, Holder, adamw_float64, some_grads

from pyloss import optim


def run(optimizer, updates=5):
    model = Holder()
    for t in range(updates):
        optimizer.update(model, some_grads(t))
    return model.arrays


def alone(make, name, updates=5):
    """The parameter that an optimizer of its own leaves."""
    model = {name: Holder().arrays[name]}
    optimizer = make()
    for t in range(updates):
        optimizer.update(model, {name: some_grads(t)[name]})
    return model[name]


@pytest.mark.parametrize(
    "kind", [optim.AdamW, optim.AdamATan2, optim.Lion, optim.SGD, optim.Adafactor]
)
def test_a_group_is_updated_as_by_an_optimizer_with_its_settings(kind):
    schedule, other = optim.cosine_decay(1e-2, 8), optim.linear_schedule(0.1, 0.0, 10)
    groups = [
        {"match": "layers.*", "weight_decay": 0.0},
        {"match": ["a", "b"], "learning_rate": other, "weight_decay": 0.5},
        {"match": lambda name, array: array.ndim == 1, "learning_rate": 7.0},  # b is taken
        {"match": "c", "rate_scale": 3},
    ]
    groups[2]["match"] = lambda name, array: name in "bc" and array.size < 2
    found = run(kind(schedule, weight_decay=0.1, groups=groups))
    wanted = {
        "layers.0.lora_a": lambda: kind(schedule, weight_decay=0.0),
        "a": lambda: kind(other, weight_decay=0.5),
        "b": lambda: kind(other, weight_decay=0.5),
        "c": lambda: kind(lambda step: 3 * schedule(step), weight_decay=0.1),
    }
    for name, make in wanted.items():
        np.testing.assert_array_equal(found[name], alone(make, name))


def test_a_group_may_keep_other_arrays_and_the_state_resumes_to_the_same_bits():
    def make():
        return optim.SGD(0.1, groups=[{"match": "a", "momentum": 0.9, "dampening": 0.5}])

    one = make()
    whole = run(one, 6)
    assert set(one.state_dict()) == {"step", "buf.a"}
    model, two = Holder(), make()
    for t in range(6):
        if t == 3:
            state, two = two.state_dict(), make()
            two.load_state_dict(state)
        two.update(model, some_grads(t))
    for name in SHAPES:
        np.testing.assert_array_equal(model.arrays[name], whole[name])
    np.testing.assert_array_equal(
        whole["a"], alone(lambda: optim.SGD(0.1, momentum=0.9, dampening=0.5), "a", 6)
    )


def test_settings_that_change_later_reach_the_groups_that_do_not_set_them():
    optimizer = optim.AdamW(1e-2, groups=[{"match": "a", "weight_decay": 0.0}])
    optimizer.betas = (0.5, 0.6)
    optimizer.weight_decay = 0.3
    optimizer.rate_scales = {"a": 2}
    found = run(optimizer, 1)
    given, grad = Holder().arrays, some_grads(0)
    for name, decay, rate in (("a", 0.0, 2e-2), ("b", 0.3, 1e-2)):
        want = adamw_float64(
            given[name].astype(np.float64),
            grad[name].astype(np.float64),
            {},
            1,
            rate,
            betas=(0.5, 0.6),
            weight_decay=decay,
        )
        np.testing.assert_allclose(found[name], want, rtol=2e-5, atol=2e-6)


def test_a_pattern_that_matches_nothing_is_refused_before_anything_changes():
    model, before = Holder(), Holder()
    optimizer = optim.AdamW(1e-2, groups=[{"match": ["a", "layers.*.lora_B"], "weight_decay": 0}])
    for act in (lambda: optimizer.update(model, some_grads(0)), lambda: optimizer.check(model)):
        with pytest.raises(
            ValueError, match=r"groups\[0\]: 'layers\.\*\.lora_B' matches none of the 4"
        ):
            act()
    nothing = optim.SGD(0.1, groups=[{"match": lambda name, array: False}])
    with pytest.raises(ValueError, match=r"groups\[0\] is a function that is true for no"):
        nothing.update(model, some_grads(0))
    multi = optim.MultiOptimizer([optim.Muon(), optim.AdamW(0.1)], ["*.lora_b"])
    with pytest.raises(ValueError, match=r"filters\[0\]: '\*\.lora_b' matches none of the 4"):
        multi.update(model, some_grads(0))
    assert optimizer.step == multi.step == 0
    for name in SHAPES:
        np.testing.assert_array_equal(model.arrays[name], before.arrays[name])


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ("*.bias", "groups is .* it must be a list of mappings"),
        ([{"weight_decay": 0}], r"groups\[0\] is .*the key 'match'"),
        (
            [{"match": "a"}, {"match": "b", "decay": 0}],
            r"groups\[1\]: AdamW has no option 'decay'; allowed: match, learning_rate, rate_scale, betas",
        ),
        ([{"match": "a", "weight_decay": -1}], r"groups\[0\]: weight_decay is -1"),
        ([{"match": "a", "betas": 0.9}], r"groups\[0\]: betas is 0.9"),
        ([{"match": "a", "learning_rate": "x"}], r"groups\[0\]: learning_rate is 'x'"),
        ([{"match": "a", "rate_scale": -2}], r"groups\[0\]: rate_scale is -2"),
        ([{"match": "a", "learning_rate": 1, "rate_scale": 2}], "learning_rate replaces the rate"),
        ([{"match": []}], r"groups\[0\]: match is \[\]; it must be a pattern of names"),
        ([{"match": 3}], r"groups\[0\]: match is 3"),
        ([{"match": "a", "optimizer": "sgd"}], "another optimizer is one of MultiOptimizer"),
    ],
)
def test_bad_groups_are_refused(groups, match):
    with pytest.raises(ValueError, match=match):
        optim.AdamW(0.1, groups=groups)


def make_multi():
    return optim.MultiOptimizer(
        [optim.Muon(0.02), optim.AdamW(optim.cosine_decay(1e-2, 8))],
        [lambda name, array: array.ndim == 2],
    )


def test_each_of_several_optimizers_updates_its_parameters():
    optimizer = make_multi()
    found = run(optimizer)
    assert optimizer.step == 5 and optimizer.learning_rate == 0.02
    for name, array in found.items():
        make = (
            (lambda: optim.Muon(0.02))
            if array.ndim == 2
            else (lambda: optim.AdamW(optim.cosine_decay(1e-2, 8)))
        )
        np.testing.assert_array_equal(array, alone(make, name))
    assert [set(state) for state in optimizer.state["states"]] == [
        {"a", "c"},
        {"b", "layers.0.lora_a"},
    ]
    assert repr(optimizer).startswith("MultiOptimizer(<lambda>: Muon(learning_rate=0.02, ")
    assert repr(optimizer).endswith("weight_decay=0.01, bias_correction=True; 5 updates))")


def test_the_state_of_several_resumes_to_the_same_bits():
    whole, split, two = run(make_multi(), 6), Holder(), make_multi()
    for t in range(6):
        if t == 3:
            state, two = two.state_dict(), make_multi()
            two.load_state_dict(state)
        two.update(split, some_grads(t))
    for name in SHAPES:
        np.testing.assert_array_equal(whole[name], split.arrays[name])
    state = two.state_dict()
    for wrong, match in [
        ({k: v for k, v in state.items() if k != "step"}, "lacks 'step'"),
        ({**state, "2.step": 1}, "'2.step'; it must begin with the number of one of the 2"),
        ({**state, "1.buf.a": np.zeros(21)}, r"'buf\.a'; AdamW keeps m, v"),
        ({**state, "step": -1}, "step of the optimizer state is -1"),
    ]:
        with pytest.raises(ValueError, match=match):
            two.load_state_dict(wrong)
        assert two.step == 6 and two.optimizers[0].step == 6


def test_several_optimizers_refuse_before_anything_changes():
    model, before = Holder(), Holder()
    optimizer = optim.MultiOptimizer([optim.AdamW(0.1), optim.Muon()], ["a"])
    for act in (lambda: optimizer.update(model, some_grads(0)), lambda: optimizer.check(model)):
        with pytest.raises(ValueError, match=r"Muon updates matrices, and 'b' has shape \(1,\)"):
            act()
    with pytest.raises(ValueError, match="gradient for 'x', which is not a trainable"):
        optimizer.update(model, {"x": np.zeros(1)})
    assert optimizer.step == 0 and optimizer.optimizers[0].state == {}
    for name in SHAPES:
        np.testing.assert_array_equal(model.arrays[name], before.arrays[name])
    with pytest.raises(ValueError, match="2 optimizers and 0 filters given"):
        optim.MultiOptimizer([optim.AdamW(0.1), optim.SGD(0.1)])
    with pytest.raises(ValueError, match="optimizers is .* must be a list of pyloss's optimizers"):
        optim.MultiOptimizer(optim.AdamW(0.1))


def test_rates_of_several_optimizers_are_set_together():
    optimizer = make_multi()
    optimizer.learning_rate = 0.5
    optimizer.rate_scales = {"lora_b": 16}
    assert [one.learning_rate for one in optimizer.optimizers] == [0.5, 0.5]
    assert [one.rate_scales for one in optimizer.optimizers] == [{"lora_b": 16.0}] * 2


def test_settings_give_groups_and_other_optimizers():
    config = {
        "groups": [
            {"match": "layers.*", "weight_decay": 0.3},
            {"match": "b", "optimizer": "sgd", "momentum": 0.9, "rate_scale": 0.5},
            {"match": "layers.*", "optimizer": "lion", "learning_rate": 1.0},
        ]
    }
    config["groups"][2]["match"] = ["layers.*", "a"]
    schedule = optim.cosine_decay(1e-2, 8)
    optimizer = optim.build_optimizer("adamw", schedule, config)
    assert optimizer.learning_rate == 1e-2 and optimizer.schedule is schedule
    found = run(optimizer)
    wanted = {
        "layers.0.lora_a": lambda: optim.AdamW(schedule, weight_decay=0.3),
        "b": lambda: optim.SGD(lambda step: 0.5 * schedule(step), momentum=0.9),
        "a": lambda: optim.Lion(1.0),
        "c": lambda: optim.AdamW(schedule),
    }
    for name, make in wanted.items():
        np.testing.assert_array_equal(found[name], alone(make, name))


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([{"match": "a", "optimizer": "sgt"}], r"optimizer: groups\[0\]: 'sgt' is not available"),
        ([{"optimizer": "sgd"}], r"optimizer: groups\[0\] is .*lacks the key 'match'"),
        (
            [{"match": "a", "optimizer": "sgd", "betas": 1}],
            r"groups\[0\]: sgd has no option 'betas'",
        ),
        ([{"match": 1, "optimizer": "sgd"}], r"optimizer: groups\[0\]: match is 1"),
        (
            [{"match": "a", "weight_decay": -1}],
            r"optimizer: adamw: groups\[0\]: weight_decay is -1",
        ),
    ],
)
def test_bad_groups_in_settings_are_refused(groups, match):
    with pytest.raises(ValueError, match=match):
        optim.build_optimizer("adamw", 0.1, {"groups": groups})
