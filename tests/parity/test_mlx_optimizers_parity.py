"""MLX's optimizers and schedules beside the installed MLX: parameters, state and rates."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")
import mlx.core as theirs
import mlx.nn as their_nn
import mlx.optimizers as their_optim
import mlx.utils as their_utils

import pyloss.mlx.core as ours
import pyloss.mlx.nn as our_nn
import pyloss.mlx.optimizers as our_optim
import pyloss.mlx.utils as our_utils

BOTH = (
    (theirs, their_nn, their_optim, their_utils),
    (ours, our_nn, our_optim, our_utils),
)

CASES = [
    ("SGD", {"learning_rate": 0.1}),
    ("SGD", {"learning_rate": 0.1, "weight_decay": 0.1}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {"learning_rate": 0.01}),
    ("Adam", {"learning_rate": 0.01, "bias_correction": True, "betas": [0.8, 0.95], "eps": 1e-4}),
    ("AdamW", {"learning_rate": 0.01}),
    ("AdamW", {"learning_rate": 0.01, "weight_decay": 0.3, "bias_correction": True}),
    ("Lion", {"learning_rate": 0.01}),
    ("Lion", {"learning_rate": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.3}),
    ("RMSprop", {"learning_rate": 0.01}),
    ("RMSprop", {"learning_rate": 0.01, "alpha": 0.9, "eps": 1e-3}),
    ("Adagrad", {"learning_rate": 0.01}),
    ("AdaDelta", {"learning_rate": 0.5}),
    ("AdaDelta", {"learning_rate": 0.5, "rho": 0.8, "eps": 1e-3}),
    ("Adamax", {"learning_rate": 0.01}),
    ("Muon", {"learning_rate": 0.02}),
    ("Muon", {"learning_rate": 0.02, "nesterov": False, "weight_decay": 0.0, "ns_steps": 3}),
    ("Adafactor", {}),
    ("Adafactor", {"learning_rate": 0.01, "relative_step": False, "scale_parameter": False}),
    ("Adafactor", {"beta_1": 0.9, "weight_decay": 0.1, "warmup_init": True}),
]


def values():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (6, 4), "wide": (3, 8), "vector": (5,), "cube": (4, 3, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return {name: rng.normal(size=v.shape).astype(np.float32) for name, v in values().items()}


def model_of(mx, nn):
    class Part(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, mx.array(values()[name]))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = [Part(["matrix", "vector"]), Part(["wide", "cube"])]

    return Whole()


def tree_of(mx, found):
    part = lambda *names: {name: mx.array(found[name]) for name in names}
    return {"parts": [part("matrix", "vector"), part("wide", "cube")]}


def compared(a, b, rtol):
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_allclose(np.array(y), np.array(x), rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("name, settings", CASES)
@pytest.mark.parametrize("whole", [True, False], ids=["update", "apply_gradients"])
def test_updates(name, settings, whole):
    found = []
    for mx, nn, optim, utils in BOTH:
        model, optimizer = model_of(mx, nn), getattr(optim, name)(**settings)
        for step in range(3):
            grads = tree_of(mx, gradients(step))
            if whole:
                optimizer.update(model, grads)
            else:
                model.update(optimizer.apply_gradients(grads, model.parameters()))
        found.append([utils.tree_flatten(model.parameters()), optimizer.state, optimizer.step])
    rtol = 2e-3 if name == "Muon" else 2e-5
    compared(found[0][0], found[1][0], rtol)
    assert found[0][2].item() == found[1][2].item() == 3
    states = [dict(u.tree_flatten(f[1])) for f, (*_, u) in zip(found, BOTH, strict=True)]
    assert states[0].keys() == states[1].keys()
    compared(sorted(states[0].items()), sorted(states[1].items()), rtol)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion"])
def test_short_floats(name):
    found = []
    for mx, nn, optim, utils in BOTH:
        model, optimizer = model_of(mx, nn), getattr(optim, name)(learning_rate=0.1)
        model.set_dtype(mx.bfloat16)
        grads = utils.tree_map(lambda g, mx=mx: g.astype(mx.bfloat16), tree_of(mx, gradients(0)))
        optimizer.update(model, grads)
        assert all(p.dtype == mx.bfloat16 for _, p in utils.tree_flatten(model.parameters()))
        found.append([(n, p.astype(mx.float32)) for n, p in utils.tree_flatten(model.parameters())])
    compared(*found, 0.02)


def test_state_is_saved_and_goes_on(tmp_path):
    ends = []
    for mx, nn, optim, utils in BOTH:
        path = str(tmp_path / f"{mx.__name__}.safetensors")
        model, optimizer = model_of(mx, nn), optim.AdamW(learning_rate=0.01)
        optimizer.update(model, tree_of(mx, gradients(0)))
        mx.save_safetensors(path, dict(utils.tree_flatten(optimizer.state)))
        again = optim.AdamW(learning_rate=0.5)
        again.state = utils.tree_unflatten(list(mx.load(path).items()))
        assert again.learning_rate.item() == pytest.approx(0.01)
        again.update(model, tree_of(mx, gradients(1)))
        ends.append((utils.tree_flatten(model.parameters()), again.step.item()))
    compared(ends[0][0], ends[1][0], 2e-5)
    assert ends[0][1] == ends[1][1] == 2


def test_arrays_of_the_state_that_somebody_holds_keep_their_values():
    model, optimizer = model_of(ours, our_nn), our_optim.Adam(learning_rate=0.1)
    optimizer.update(model, tree_of(ours, gradients(0)))
    held = our_utils.tree_map(lambda x: x, (model.parameters(), optimizer.state))
    before = our_utils.tree_map(lambda x: np.array(x), held)
    optimizer.update(model, tree_of(ours, gradients(1)))
    compared(our_utils.tree_flatten(before), our_utils.tree_flatten(held), 0)
    assert not np.array_equal(before[0]["parts"][0]["matrix"], np.array(model.parts[0].matrix))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: o.cosine_decay(0.1, 5),
        lambda o: o.cosine_decay(0.1, 5, end=0.02),
        lambda o: o.linear_schedule(0.0, 0.1, 4),
        lambda o: o.exponential_decay(0.1, 0.9),
        lambda o: o.step_decay(0.1, 0.5, 2),
        lambda o: o.join_schedules([o.linear_schedule(0.0, 0.1, 3), o.cosine_decay(0.1, 5)], [4]),
    ],
)
def test_schedules(make):
    rates = []
    for mx, _, optim, _ in BOTH:
        schedule = make(optim)
        optimizer = optim.SGD(learning_rate=schedule)
        seen = [optimizer.learning_rate.item()]
        for _ in range(9):
            optimizer.apply_gradients({"w": mx.ones((2,))}, {"w": mx.ones((2,))})
            seen.append(optimizer.learning_rate.item())
        rates.append(seen)
        assert isinstance(schedule(mx.array(2)), mx.array)
    np.testing.assert_allclose(rates[1], rates[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clip_grad_norm(bound):
    found = []
    for mx, _, optim, utils in BOTH:
        clipped, norm = optim.clip_grad_norm(tree_of(mx, gradients(0)), bound)
        found.append([("norm", norm), *utils.tree_flatten(clipped)])
    compared(*found, 1e-5)


def test_multi_optimizer():
    ends = []
    for mx, nn, optim, utils in BOTH:
        model = model_of(mx, nn)
        optimizer = optim.MultiOptimizer(
            [optim.SGD(learning_rate=0.1, momentum=0.9), optim.AdamW(learning_rate=0.01)],
            [lambda name, g: g.ndim == 2 and "parts" in name],
        )
        for step in range(3):
            optimizer.update(model, tree_of(mx, gradients(step)))
        assert optimizer.learning_rate.item() == pytest.approx(0.1)
        ends.append(utils.tree_flatten(model.parameters()))
        assert len(optimizer.state["states"]) == 2
        optimizer.learning_rate = 0.5
        assert optimizer.optimizers[1].learning_rate.item() == 0.5
    compared(*ends, 2e-5)


def test_an_optimizer_of_ones_own():
    ends = []
    for mx, nn, optim, utils in BOTH:

        class Signs(optim.Optimizer):
            def __init__(self, rate, optim=optim):
                super().__init__()
                self._maybe_schedule("learning_rate", rate)

            def init_single(self, parameter, state, mx=mx):
                state["count"] = mx.zeros_like(parameter)

            def apply_single(self, gradient, parameter, state, mx=mx):
                state["count"] = state["count"] + 1
                return parameter - self.learning_rate * mx.sign(gradient) * state["count"]

        class Half(optim.AdamW):
            def apply_single(self, gradient, parameter, state):
                return super().apply_single(gradient * 0.5, parameter, state)

        model = model_of(mx, nn)
        for optimizer in (Signs(lambda step: 0.1 / (1 + step)), Half(learning_rate=0.01)):
            for step in range(2):
                optimizer.update(model, tree_of(mx, gradients(step)))
        ends.append(utils.tree_flatten(model.parameters()))
    compared(*ends, 2e-5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda o: o.Adam(0.1, betas=[1.0, 0.9]), "beta1 should be in"),
        (lambda o: o.SGD(0.1, nesterov=True), "Nesterov momentum requires"),
        (lambda o: o.RMSprop(0.1, eps=0), "epsilon should be >0"),
        (lambda o: o.MultiOptimizer([o.SGD(0.1)], [lambda *a: True]), "1 filters but 0 needed"),
        (lambda o: o.clip_grad_norm({}, -1), "max_norm should be"),
        (lambda o: o.cosine_decay(0.1, 0), "decay_steps"),
    ],
)
def test_what_mlx_refuses(make, text):
    for *_, optim, _ in BOTH:
        with pytest.raises(ValueError, match=text):
            make(optim)
