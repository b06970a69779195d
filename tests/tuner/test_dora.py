"""DoRA's cached norms, rows of length 0, and the inputs that its gradient recomputes."""

import numpy as np
import pytest
import tiny
from dense_adapters import adapted, dense, make_base, norms, parameters, trained
from stored_weights import stored

import pyloss
from pyloss import _core, nn, ops
from pyloss.tuner import DoRAEmbedding, DoRALinear, linear_to_lora_layers
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.losses import default_loss
from pyloss.tuner.run.plan import estimate_memory

CLASSES = [DoRALinear, DoRAEmbedding]


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def counted(function):
    """(number of norm computations, number of them over whole bases) in `function`."""
    _core.profile(True)
    function()
    calls = _core.profile(False)
    return calls.get("adapted_norm", (0,))[0], calls.get("row_squares", (0,))[0]


def output(layer, x):
    return layer.as_linear(x) if isinstance(layer, DoRAEmbedding) else layer(x)


@pytest.mark.parametrize("cls", CLASSES)
def test_norms_are_kept_while_nothing_changes(rng, cls):
    layer, x = trained(rng, cls, make_base(rng, cls, "q4_1")), np.ones((2, 64), np.float32)
    for mode in (True, False):
        layer.train(mode)
        output(layer, x)
        assert counted(lambda: [output(layer, x) for _ in range(5)]) == (0, 0)
    layer.m *= 2  # norms do not depend on m
    assert counted(lambda: output(layer, x)) == (0, 0)


def changes(layer):
    rng = np.random.default_rng(1)
    yield "in place", lambda: layer.lora_a.__setitem__(..., rng.standard_normal(layer.lora_a.shape))
    yield "one element", lambda: layer.lora_b.__setitem__((0, 0), 7.0)
    yield "length", lambda: layer.m.__imul__(2)
    yield "another array", lambda: setattr(layer, "lora_b", layer.lora_b + 1)
    yield "loaded", lambda: layer.load_weights({"lora_a": 2 * layer.lora_a}, strict=False)
    yield (
        "updated",
        lambda: pyloss.optim.SGD(0.5).update(
            layer, {name: np.ones_like(p) for name, p in layer.trainable_parameters().items()}
        ),
    )
    yield "scale", lambda: setattr(layer, "scale", 0.25)
    yield "base", lambda: setattr(layer.base, "weight", stored(rng, 12, 64, "q8_0"))
    if isinstance(layer.base.weight, np.ndarray):
        yield "base in place", lambda: layer.base.weight.__imul__(3)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", ["plain", "q4_1"])
@pytest.mark.parametrize("cls", CLASSES)
def test_norms_follow_every_change(rng, cls, kind, mode):
    names = [name for name, _ in changes(trained(rng, cls, make_base(rng, cls, kind)))]
    for name in names:
        layer, x = (
            trained(rng, cls, make_base(rng, cls, kind, bias=False)).train(mode),
            rng.standard_normal((3, 64)).astype(np.float32),
        )
        before = output(layer, x)
        dict(changes(layer))[name]()
        want = x @ adapted(layer, parameters(layer)).T
        np.testing.assert_allclose(output(layer, x), want, rtol=1e-4, atol=1e-4, err_msg=name)
        assert not np.allclose(before, want), name


@pytest.mark.parametrize("cls", CLASSES)
def test_rows_without_length_stay_as_they_are_and_finite(rng, cls):
    base = make_base(rng, cls, "plain", bias=False)
    base.weight[[2, 5]] = 0
    layer, x = cls.from_base(base, r=3), rng.standard_normal((4, 64)).astype(np.float32)
    assert not layer.m[[2, 5]].any()
    np.testing.assert_allclose(output(layer, x), x @ base.weight.T, rtol=1e-5, atol=1e-5)
    _, grads = nn.value_and_grad(layer, lambda: (output(layer, x) ** 2).sum())()
    assert all(np.isfinite(g).all() for g in grads.values()) and not grads["m"][[2, 5]].any()
    assert np.isfinite(layer.fuse().weight).all() and not layer.fuse().weight[[2, 5]].any()
    if cls is DoRAEmbedding:
        assert not layer(np.array([2, 5])).any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_the_gradient_of_a_vanishing_magnitude(rng, bias, small):
    """It needs the values that the magnitude multiplies, which the output no longer shows."""
    layer, x = (
        trained(rng, DoRALinear, make_base(rng, DoRALinear, "q8_0", bias=bias)),
        rng.standard_normal((9, 64)).astype(np.float32),
    )
    layer.m[3:6] = small
    dy = rng.standard_normal((9, 12)).astype(np.float32)
    _, grads = nn.value_and_grad(layer, lambda: (layer(x) * dy).sum())()
    p = {**parameters(layer), "m": norms(layer)}
    want = (dy * (x @ adapted(layer, p).T)).sum(axis=0) / norms(layer)
    np.testing.assert_allclose(grads["m"], want, rtol=1e-4, atol=1e-4)


def test_what_is_overwritten_in_place_is_restored_for_its_gradient(rng):
    """Rotary positions overwrite q and k; the magnitude's gradient needs the old values."""
    layer = trained(rng, DoRALinear, make_base(rng, DoRALinear, "q4_1", rows=16))
    x, dy = (
        rng.standard_normal((5, 64)).astype(np.float32),
        rng.standard_normal((5, 16)).astype(np.float32),
    )
    angles = np.outer(np.arange(9), [1.0, 0.3, 0.1, 0.02])
    positions, cos, sin = (
        np.array([0, 3, 8, 1, 2], np.int32),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
    )

    def gradients(in_place, shape):
        def loss():
            y = layer(x).reshape(*shape).reshape(5, 16)
            return (ops.rope(y, positions, cos, sin, in_place=in_place) * dy).sum()

        return nn.value_and_grad(layer, loss)()[1]

    apart = gradients(False, (5, 16))
    for shape in ((5, 16), (10, 8)):
        for name, gradient in gradients(True, shape).items():
            np.testing.assert_allclose(gradient, apart[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_whole_model_against_differences(tmp_path, rng, checkpointed):
    """The gradient holds norms constant, so differences move the factors but not the norms."""
    pyloss.random.seed(0)  # the same factors whatever tests ran before
    model = tiny.load_tiny(tmp_path / "model", tied=False)
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.5}, use_dora=True)
    model.set_grad_checkpoint(checkpointed)
    for layer in adapter_modules(model).values():
        layer.lora_b[...] = rng.standard_normal(layer.lora_b.shape) / 4
        layer.m *= rng.uniform(0.8, 1.25, layer.m.shape).astype(np.float32)
        layer.norms()
    batch, lengths = rng.integers(0, 29, (3, 9)), np.array([[1, 9], [2, 7], [0, 8]])
    _, grads = nn.value_and_grad(model, lambda: default_loss(model, batch, lengths))()
    fixed = {name: layer.norms().copy() for name, layer in adapter_modules(model).items()}
    for name, layer in adapter_modules(model).items():
        layer.norms = lambda name=name: fixed[name]
    for part in ("lora_a", "lora_b", "m"):
        own = {name: p for name, p in model.trainable_parameters().items() if name.endswith(part)}
        way = {name: rng.standard_normal(p.shape) for name, p in own.items()}
        size = 1e-2 / np.sqrt(sum((w**2).sum() for w in way.values()))
        start, values = {name: p.copy() for name, p in own.items()}, []
        for sign in (1, -1):
            for name, p in own.items():
                p[...] = start[name] + sign * size * way[name]
            values.append(float(default_loss(model, batch, lengths)[0]))
        for name, p in own.items():
            p[...] = start[name]
        slope = sum((way[name] * grads[name]).sum() for name in own)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * size), rel=5e-3, abs=1e-3), (
            part
        )


def test_parameters_and_step_0_of_a_model(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    tokens = np.array([[3, 1, 4, 1, 5]])
    before = model(tokens)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 3.0, "dropout": 0.0}, use_dora=True)
    assert model(tokens).tobytes() == before.tobytes()
    # mlx-lm's count: rank * (in + out), and a magnitude per output.
    shapes = [(32, 32)] * 2 + [(32, 16)] * 2 + [(32, 64)] * 2 + [(64, 32)]
    count = sum(4 * (i + o) + o for i, o in shapes)
    assert sum(p.size for p in model.trainable_parameters().values()) == 2 * count
    for layer in adapter_modules(model).values():
        np.testing.assert_allclose(layer.m, np.linalg.norm(dense(layer.linear), axis=1), rtol=1e-6)
    _, grads = nn.value_and_grad(model, lambda: default_loss(model, tokens, np.array([[0, 5]])))()
    pyloss.optim.SGD(0.1).update(model, grads)
    adapted_logits = model(tokens)
    model.fuse()
    np.testing.assert_allclose(model(tokens), adapted_logits, rtol=1e-4, atol=1e-4)
    assert not np.allclose(adapted_logits, before, atol=1e-3)


def test_the_estimate_of_memory_counts_what_magnitudes_keep(tmp_path):
    found = []
    for use_dora in (False, True):
        model = tiny.load_tiny(tmp_path / "model")
        linear_to_lora_layers(model, -1, {"rank": 4, "scale": 3.0}, use_dora=use_dora)
        found.append([estimate_memory(model, 4, 100, grad_checkpoint=on) for on in (False, True)])
    magnitudes = sum(layer.m.size for layer in adapter_modules(model).values())
    whole, checkpointed = (b - a - 4 * 5 * magnitudes for a, b in zip(*found, strict=True))
    assert whole == 3 * checkpointed == 3 * 2 * 4 * 400 * 32
