"""Optimizers against torch.optim and mlx.optimizers, from equal parameters and gradients."""

import numpy as np
import pytest

from pyloss import optim

SHAPE = (17, 5)


class Holder:
    def __init__(self):
        self.arrays = {"w": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}

    def trainable_parameters(self):
        return self.arrays


def gradients(count=20):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "peer", "options"),
    [
        (optim.AdamW, "AdamW", {}),
        (optim.AdamW, "AdamW", {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.2}),
        (optim.Adam, "Adam", {}),
        (optim.SGD, "SGD", {}),
        (optim.SGD, "SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        (optim.SGD, "SGD", {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_updates_equal_torch(kind, peer, options):
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    model = Holder()
    weight = torch.nn.Parameter(torch.tensor(model.arrays["w"]))
    ours, theirs = kind(1e-2, **options), getattr(torch.optim, peer)([weight], lr=1e-2, **options)
    for grad in gradients():
        ours.update(model, {"w": grad})
        weight.grad = torch.tensor(grad)
        theirs.step()
    np.testing.assert_allclose(model.arrays["w"], weight.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "peer", "options"),
    [
        (optim.AdamW, "AdamW", {"bias_correction": False}),
        (optim.Adam, "Adam", {"bias_correction": True}),
        (optim.Lion, "Lion", {"weight_decay": 0.1}),
    ],
)
def test_updates_equal_mlx(kind, peer, options):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (parity extra)")
    from mlx import optimizers

    model = Holder()
    weight = {"w": mx.array(model.arrays["w"])}
    ours, theirs = kind(1e-2, **options), getattr(optimizers, peer)(1e-2, **options)
    for grad in gradients():
        ours.update(model, {"w": grad})
        weight = theirs.apply_gradients({"w": mx.array(grad)}, weight)
    np.testing.assert_allclose(model.arrays["w"], np.array(weight["w"]), rtol=2e-4, atol=1e-5)


MATRICES = {"square": (16, 16), "wide": (5, 24), "tall": (33, 7)}


def thirty_updates(ours, theirs, arrays, weights):
    """Run both optimizers on the same gradients."""
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    rng = np.random.default_rng(2)
    for _ in range(30):
        grads = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()}
        ours.update(arrays, grads)
        for name, grad in grads.items():
            weights[name].grad = torch.tensor(grad)
        theirs.step()


def weights_of(arrays):
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    return {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}


def some_arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_thirty_updates_of_adam_atan2_equal_the_operations_of_its_cuda_kernel():
    """The package adam-atan2 computes these on a GPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    arrays = some_arrays(MATRICES)
    rng, optimizer = np.random.default_rng(2), optim.AdamATan2(1e-2, (0.9, 0.95), weight_decay=1.0)
    weights = {name: torch.tensor(array) for name, array in arrays.items()}
    means = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 31):
        grads = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in arrays.items()}
        optimizer.update(arrays, grads)
        for name, weight in weights.items():
            g, m, v = torch.tensor(grads[name]), means[name], squares[name]
            weight *= 1 - 1e-2 * 1.0
            m.lerp_(g, 1 - 0.9)
            v.lerp_(g * g, 1 - 0.95)
            angle = torch.atan2(m, v.sqrt() / (1 - 0.95**step) ** 0.5)
            weight -= 1e-2 / (1 - 0.9**step) * angle
    for name, array in arrays.items():
        np.testing.assert_allclose(array, weights[name].numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8}, {"nesterov": False, "ns_steps": 3}],
)
@pytest.mark.parametrize("iterates_in", ["float32", "bfloat16"])
def test_thirty_updates_of_muon_equal_torch(options, iterates_in, monkeypatch):
    """torch iterates in bfloat16; with float32 in its place the updates agree."""
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    if iterates_in == "float32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    arrays = some_arrays(MATRICES)
    weights = weights_of(arrays)
    theirs = torch.optim.Muon(list(weights.values()), lr=0.02, **options)
    thirty_updates(optim.Muon(0.02, **options), theirs, arrays, weights)
    bounds = {"rtol": 1e-4, "atol": 1e-5} if iterates_in == "float32" else {"atol": 0.05}
    for name, array in arrays.items():
        np.testing.assert_allclose(array, weights[name].detach().numpy(), **bounds)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.2, "beta2_decay": -0.5, "d": 2.0}, {"eps": (1e-4, 0.1)}],
)
def test_thirty_updates_of_adafactor_equal_torch(options):
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    arrays = some_arrays({**MATRICES, "vector": (17,), "stack": (2, 5, 3)})
    weights = weights_of(arrays)
    theirs = torch.optim.Adafactor(list(weights.values()), lr=0.05, **options)
    thirty_updates(optim.Adafactor(0.05, **options), theirs, arrays, weights)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, weights[name].detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_adafactor_at_a_fixed_rate_equals_transformers(scaled):
    optimization = pytest.importorskip("transformers.optimization", reason="parity extra")
    arrays = some_arrays({**MATRICES, "vector": (17,)})
    weights = weights_of(arrays)
    # transformers scales the decay with the parameter, too.
    decay = 0.0 if scaled else 0.1
    options = {"scale_parameter": scaled, "relative_step": False, "weight_decay": decay}
    theirs = optimization.Adafactor(list(weights.values()), lr=0.05, **options)
    ours = optim.Adafactor(0.05, eps=(1e-30, 1e-3), **options)
    thirty_updates(ours, theirs, arrays, weights)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, weights[name].detach().numpy(), rtol=2e-4, atol=2e-5)


def test_averages_equal_those_of_torch():
    """torch copies at its first update, where `EMA` is made."""
    torch = pytest.importorskip("torch", reason="torch is not installed (parity extra)")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    rng = np.random.default_rng(3)
    layer = torch.nn.Linear(7, 5)
    theirs = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    arrays = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    theirs.update_parameters(layer)
    ours = optim.EMA(arrays, 0.9)
    for _ in range(30):
        for array in arrays.values():
            array += rng.standard_normal(array.shape, dtype=np.float32)
        ours.update(arrays)
        theirs.update_parameters(layer)
    for name, average in theirs.module.named_parameters():
        np.testing.assert_allclose(
            ours.averages[name], average.detach().numpy(), rtol=1e-5, atol=1e-6
        )
