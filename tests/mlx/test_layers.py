"""Layers, losses and optimizers of pyloss.mlx where no MLX is installed: against float64."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import pyloss
import pyloss.mlx.core as mx
import pyloss.mlx.nn as nn
import pyloss.mlx.optimizers as optim
from pyloss.mlx.utils import tree_flatten, tree_map, tree_merge, tree_reduce, tree_unflatten


def test_cross_entropy_against_float64():
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(3, 4, 7)).astype(np.float32), rng.integers(0, 7, (3, 4))
    wide = logits.astype(np.float64)
    lse = np.log(np.exp(wide).sum(-1))
    plain = lse - np.take_along_axis(wide, labels[..., None], -1)[..., 0]
    found = nn.losses.cross_entropy(mx.array(logits), mx.array(labels))
    np.testing.assert_allclose(found.tolist(), plain, rtol=1e-5)
    smooth = nn.losses.cross_entropy(
        mx.array(logits), mx.array(labels), label_smoothing=0.3, reduction="mean"
    )
    np.testing.assert_allclose(
        smooth.item(), (0.7 * plain + 0.3 * (lse - wide.mean(-1))).mean(), rtol=1e-5
    )
    ignored = nn.losses.cross_entropy(mx.array(logits[0]), mx.array([-100, 1, 2, 3]))
    assert ignored[0].item() == 0
    with pytest.raises(ValueError, match="label 7"):
        nn.losses.cross_entropy(mx.array(logits[0]), mx.array([7, 1, 2, 3]))


def test_optimizers_against_float64():
    w, g = np.array([1.0, -2.0]), np.array([0.5, -0.25])
    model = nn.Module()
    model.w = mx.array(w)
    optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.1)
    optimizer.update(model, {"w": mx.array(g)})
    m, v = 0.1 * g, 0.001 * g**2
    want = w * (1 - 0.1 * 0.1) - 0.1 * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(model.w.tolist(), want, rtol=1e-5)
    assert optimizer.state["w"]["m"].tolist() == pytest.approx(m.tolist())
    assert optimizer.step.item() == 1 and optimizer.learning_rate.item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
        optimizer.update(model, {"w": mx.ones(3)})


def test_a_module_may_hold_a_model_of_pyloss():
    class Reward(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = pyloss.nn.Linear(4, 3)
            self.head = nn.Linear(3, 1, bias=False)

        def __call__(self, x):
            return self.head(mx.tanh(self.body(x)))

    model = Reward()
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert names == ["body.weight", "body.bias", "head.weight"]
    model.freeze()
    model.body.unfreeze()
    x = mx.ones((2, 4))
    _, grads = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
    assert [name for name, _ in tree_flatten(grads)] == names[:2]
    before = model(x)
    optim.SGD(learning_rate=0.1).update(model, grads)
    assert not mx.array_equal(before, model(x))


def test_pyloss_adapters_take_layers_of_mlx():
    for layer in (nn.Linear(64, 8), nn.QuantizedLinear(64, 8)):
        y = pyloss.nn.project_each(np.ones((2, 64), np.float32), layer)[0]
        np.testing.assert_allclose(y, np.asarray(layer(mx.ones((2, 64)))), rtol=1e-6)
    adapted = pyloss.LoRALinear.from_base(nn.Linear(6, 4), r=2)
    assert adapted(np.ones((3, 6), np.float32)).shape == (3, 4)


def test_quantized_layers_are_quantized():
    layer = nn.Linear(128, 16)
    small = layer.to_quantized(64, 4)
    assert small.weight.dtype == mx.uint32 and small.weight.shape == (16, 16)
    x = mx.random.normal((4, 128))
    error = mx.abs(small(x) - layer(x)).max().item()
    assert 0 < error < 0.3
    small.unfreeze()
    assert [name for name, _ in tree_flatten(small.trainable_parameters())] == ["bias"]
    with pytest.raises(ValueError, match="quantize_input"):
        layer.to_quantized(quantize_input=True)


def test_quantize_a_model_of_pyloss():
    class Plain(pyloss.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = pyloss.nn.Embedding(5, 64)
            self.layers = [pyloss.nn.Linear(64, 8)]

    model = Plain()
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.layers[0], pyloss.nn.QuantizedLinear)
    assert isinstance(model.embed, pyloss.nn.QuantizedEmbedding)
    assert model.layers[0].weight.format == "affine8" and model.layers[0].weight.groups.size == 32


def test_dropout_and_training_mode():
    model = nn.Sequential(nn.Dropout(0.5))
    x = mx.ones((1000,))
    kept = model(x)
    assert set(kept.tolist()) == {0.0, 2.0}
    model.eval()
    assert not model.training and mx.array_equal(model(x), x)
    assert nn.Dropout2d(0.5)(mx.ones((2, 3, 3, 8), mx.bfloat16)).dtype == mx.bfloat16


def test_batch_norm_in_a_recording_keeps_plain_means():
    norm = nn.BatchNorm(3)
    x = mx.random.normal((8, 3))
    nn.value_and_grad(norm, lambda m, x: m(x).square().sum())(norm, x)
    np.testing.assert_allclose(
        norm.running_mean.tolist(), 0.1 * np.asarray(x, np.float64).mean(0), rtol=1e-4, atol=1e-6
    )
    norm.unfreeze()
    assert {n for n, _ in tree_flatten(norm.trainable_parameters())} == {"weight", "bias"}


def test_values_that_a_function_puts_into_a_module():
    """The functional idiom: `model.update(params)` inside of the differentiated function."""
    model = nn.Linear(2, 1, bias=False)
    params = model.trainable_parameters()

    def loss(params, x):
        model.update(params)
        return model(x).sum()

    _, grads = mx.value_and_grad(loss)(params, mx.array([[1.0, 2.0], [3.0, 4.0]]))
    assert grads["weight"].tolist() == [[4, 6]]
    # the recording has ended: the module has plain arrays again
    assert mx.array_equal(model.weight, params["weight"])
    _, grads = nn.value_and_grad(model, lambda m: m(mx.ones((1, 2))).sum())(model)
    assert grads["weight"].tolist() == [[1, 1]]


def test_threads_train_models_of_their_own():
    ends = []

    def train(seed):
        model = nn.Linear(4, 1)
        model.update(tree_map(lambda p: p * 0 + seed, model.parameters()))
        optimizer = optim.SGD(learning_rate=0.1)
        for _ in range(5):
            _, grads = nn.value_and_grad(model, lambda m: m(mx.ones((2, 4))).square().mean())(model)
            optimizer.update(model, grads)
        ends.append((seed, model.weight[0, 0].item()))

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 4 and len({end for _, end in ends}) >= 3


def test_trees():
    tree = {"a": [1, {"b": 2}], "c": (3,)}
    flat = [("a.0", 1), ("a.1.b", 2), ("c.0", 3)]
    assert tree_flatten(tree) == flat and tree_flatten(tree, ".x")[0] == ("x.a.0", 1)
    assert tree_unflatten(flat) == {"a": [1, {"b": 2}], "c": [3]}
    assert tree_unflatten([("1", 5)]) == [{}, 5]
    assert tree_map(lambda x, y: x + y, tree, tree) == {"a": [2, {"b": 4}], "c": (6,)}
    assert tree_reduce(lambda a, x: a + x, tree, 0) == 6
    assert tree_merge({"a": 1}, {"b": [2]}) == {"a": 1, "b": [2]}
    with pytest.raises(ValueError, match="same place"):
        tree_merge({"a": 1}, {"a": 2})
    assert tree_merge({"a": 1}, {"a": 2}, max) == {"a": 2}
