"""Layers, activations, losses and modules of mlx.nn beside the installed MLX."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

pytest.importorskip("mlx.core")
import mlx.core as theirs
import mlx.nn as their_nn
import mlx.utils as their_utils

import pyloss.mlx.core as ours
import pyloss.mlx.nn as our_nn
import pyloss.mlx.utils as our_utils

theirs.set_default_device(theirs.cpu)

BOTH = ((theirs, their_nn, their_utils), (ours, our_nn, our_utils))


def close(found, want, rtol=2e-5, atol=2e-5):
    np.testing.assert_allclose(np.array(found), np.array(want), rtol=rtol, atol=atol)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


FUNCTIONS = [
    "sigmoid", "relu", "relu2", "relu6", "leaky_relu", "log_softmax", "elu", "softmax", "softmin",
    "softplus", "softsign", "softshrink", "hard_shrink", "celu", "silu", "log_sigmoid", "gelu",
    "gelu_approx", "gelu_fast_approx", "glu", "step", "selu", "mish", "hardswish", "hard_tanh",
    "tanh",
]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name):
    found = []
    for mx, nn, _ in BOTH:
        function = getattr(nn, name)
        x = mx.array(3 * draw(4, 6))
        y = function(x)
        grad = None
        if name != "step":
            grad = mx.grad(lambda x, f=function, mx=mx: (f(x) * mx.cos(f(x) + 1)).sum())(x)
        found.append((y, grad))
    close(found[1][0], found[0][0])
    assert name == "step" or close(found[1][1], found[0][1]) is None


MODULES = [
    ("Sigmoid", {}), ("Mish", {}), ("ReLU", {}), ("ReLU2", {}), ("ReLU6", {}), ("Softmax", {}),
    ("Softmin", {}), ("Softplus", {}), ("Softsign", {}), ("SiLU", {}), ("LogSoftmax", {}),
    ("LogSigmoid", {}), ("Tanh", {}), ("Hardswish", {}), ("SELU", {}), ("HardTanh", {}),
    ("GLU", {"axis": 0}), ("LeakyReLU", {"negative_slope": 0.2}), ("ELU", {"alpha": 0.5}),
    ("CELU", {"alpha": 0.5}), ("Softshrink", {"lambd": 0.2}), ("HardShrink", {"lambd": 0.2}),
    ("Step", {"threshold": 0.1}), ("PReLU", {}), ("GELU", {}), ("GELU", {"approx": "precise"}),
    ("GELU", {"approx": "fast"}), ("Identity", {}), ("Dropout", {"p": 0.0}),
    ("Linear", {"input_dims": 6, "output_dims": 3}),
    ("Linear", {"input_dims": 6, "output_dims": 3, "bias": False}),
    ("RMSNorm", {"dims": 6}), ("LayerNorm", {"dims": 6}),
    ("LayerNorm", {"dims": 6, "bias": False}), ("LayerNorm", {"dims": 6, "affine": False}),
    ("GroupNorm", {"num_groups": 2, "dims": 6}),
    ("GroupNorm", {"num_groups": 2, "dims": 6, "pytorch_compatible": True}),
    ("InstanceNorm", {"dims": 6, "affine": True}), ("BatchNorm", {"num_features": 6}),
    ("BatchNorm", {"num_features": 6, "affine": False, "track_running_stats": False}),
    ("RoPE", {"dims": 6}), ("RoPE", {"dims": 4, "traditional": True, "base": 100.0, "scale": 2.0}),
    ("Conv1d", {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1, "stride": 2}),
    ("Conv1d", {"in_channels": 6, "out_channels": 6, "kernel_size": 2, "groups": 3,
                "bias": False}),
]  # fmt: skip


@pytest.mark.parametrize("name, settings", MODULES)
def test_modules(name, settings):
    found, weights = [], None
    for mx, nn, utils in BOTH:
        module = getattr(nn, name)(**settings)
        own = sorted(n for n, _ in utils.tree_flatten(module.parameters()))
        if weights is None:
            weights = {
                n: np.array(v) + 0.1 * draw(*v.shape, seed=i)
                for i, (n, v) in enumerate(sorted(utils.tree_flatten(module.parameters())))
            }
        assert own == list(weights)
        module.update(utils.tree_unflatten([(n, mx.array(v)) for n, v in weights.items()]))
        x = mx.array(draw(2, 5, 4, 6) if name != "Conv1d" else draw(2, 5, 6))

        def loss(module, x, mx=mx):
            y = module(x)
            return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum(), y

        trained = sorted(n for n, _ in utils.tree_flatten(module.trainable_parameters()))
        if trained or nn is our_nn:  # MLX refuses to differentiate by nothing
            (_, y), grads = nn.value_and_grad(module, loss)(module, x)
        else:
            y, grads = module(x), {}
        by_x = mx.grad(lambda x, m=module, f=loss: f(m, x)[0])(x) if name != "Step" else x
        after = {n: np.array(v) for n, v in utils.tree_flatten(module.parameters())}
        module.eval()
        found.append(
            (y, utils.tree_flatten(grads, destination={}), by_x, after, module(x), trained)
        )
    (y, grads, by_x, after, still, trained), mine = found
    assert mine[5] == trained and sorted(mine[1]) == sorted(grads)
    for a, b in [(mine[0], y), (mine[2], by_x), (mine[4], still)]:
        close(a, b, 1e-4, 1e-4)
    for n in grads:
        close(mine[1][n], grads[n], 1e-4, 1e-4)
    for n in after:
        close(mine[3][n], after[n], 1e-5, 1e-6)


def test_embedding_and_its_head():
    found = []
    for mx, nn, _ in BOTH:
        layer = nn.Embedding(7, 4)
        layer.weight = mx.array(draw(7, 4))
        ids = mx.array([[1, 2], [6, 1]])

        def loss(layer, ids=ids):
            return layer.as_linear(layer(ids)).square().sum()

        value, grads = nn.value_and_grad(layer, loss)(layer)
        found.append((value, grads["weight"], layer(ids)))
    for a, b in zip(found[1], found[0], strict=True):
        close(a, b, 1e-4, 1e-3)


def test_attention_bilinear_and_encodings():
    found = []
    for mx, nn, utils in BOTH:
        attention = nn.MultiHeadAttention(8, 2, key_input_dims=6, value_output_dims=5, bias=True)
        flat = sorted(utils.tree_flatten(attention.parameters()))
        attention.update(
            utils.tree_unflatten(
                [(n, mx.array(draw(*v.shape, seed=i))) for i, (n, v) in enumerate(flat)]
            )
        )
        q, k = mx.array(draw(2, 3, 8)), mx.array(draw(2, 4, 6))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(4)[:3]
        bilinear = nn.Bilinear(8, 6, 3)
        bilinear.weight, bilinear.bias = mx.array(draw(3, 6, 8)), mx.array(draw(3))
        positions = nn.SinusoidalPositionalEncoding(8, cos_first=True, full_turns=True)
        scores = mx.array(draw(1, 6, 3, 4))
        found.append(
            [
                attention(q, k, k),
                attention(q, k, k, mask),
                bilinear(q[:, :2], k[:, :2]),
                positions(mx.arange(5)),
                nn.ALiBi()(scores),
                nn.ALiBi()(scores[:, :, :1], offset=2, mask=scores[:, :, :1]),
            ]
        )
    for a, b in zip(found[1], found[0], strict=True):
        close(a, b, 1e-4, 1e-4)


@pytest.mark.parametrize("norm_first, checkpoint", [(True, False), (False, True)])
def test_transformers(norm_first, checkpoint):
    found = []
    for mx, nn, utils in BOTH:
        model = nn.Transformer(
            8, 2, 2, 1, mlp_dims=12, activation=nn.silu, norm_first=norm_first,
            checkpoint=checkpoint,
        )  # fmt: skip
        flat = sorted(utils.tree_flatten(model.parameters()))
        model.load_weights(
            [(n, mx.array(0.3 * draw(*v.shape, seed=i))) for i, (n, v) in enumerate(flat)]
        )
        src, tgt = mx.array(draw(2, 5, 8)), mx.array(draw(2, 4, 8, seed=1))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(4)

        def loss(model, src, tgt, mask=mask):
            y = model(src, tgt, None, mask, None)
            return y.square().sum(), y

        (_, y), grads = nn.value_and_grad(model, loss)(model, src, tgt)
        found.append([("y", y), *sorted(utils.tree_flatten(grads))])
    for (name, a), (same, b) in zip(found[1], found[0], strict=True):
        assert name == same
        close(a, b, 1e-3, 1e-3)


LABELS = np.array([[0, 3, 2], [4, 1, 1]])
POSITIVE = np.abs(draw(2, 3, 5)) + 0.1
PROBABILITIES = POSITIVE / POSITIVE.sum(-1, keepdims=True)
SIGNS = np.where(draw(2, 3, 5) > 0, 1.0, -1.0).astype(np.float32)
A, B = draw(2, 3, 5, seed=1), draw(2, 3, 5, seed=2)

#: (loss, its arrays, settings, which arrays get a gradient)
LOSSES = [
    ("cross_entropy", (A, LABELS), {}, (0,)),
    ("cross_entropy", (A, LABELS), {"label_smoothing": 0.2, "reduction": "mean"}, (0,)),
    ("cross_entropy", (A, LABELS, draw(2, 3)), {"reduction": "sum"}, (0, 2)),
    ("cross_entropy", (A, LABELS[:, :1].repeat(5, 1) % 3), {"axis": 1}, (0,)),
    ("cross_entropy", (A, PROBABILITIES), {"label_smoothing": 0.1}, (0, 1)),
    ("cross_entropy", (100 * A, LABELS), {}, (0,)),
    ("binary_cross_entropy", (A, (B > 0).astype(np.float32)), {}, (0,)),
    ("binary_cross_entropy", (A, PROBABILITIES, POSITIVE), {"reduction": "none"}, (0, 1)),
    ("binary_cross_entropy", (PROBABILITIES, SIGNS / 2 + 0.5), {"with_logits": False}, (0,)),
    ("l1_loss", (A, B), {}, (0, 1)),
    ("mse_loss", (A, B), {"reduction": "sum"}, (0, 1)),
    ("nll_loss", (A, LABELS), {"reduction": "mean"}, (0,)),
    ("gaussian_nll_loss", (A, B, POSITIVE), {"full": True}, (0, 1, 2)),
    ("kl_div_loss", (A, B), {}, (0, 1)),
    ("kl_div_loss", (A, B), {"axis": 1, "reduction": "mean"}, (0, 1)),
    ("smooth_l1_loss", (A, B), {"beta": 0.7}, (0, 1)),
    ("triplet_loss", (A, B, POSITIVE), {"margin": 2.0}, (0, 1, 2)),
    ("hinge_loss", (A, SIGNS), {"reduction": "mean"}, (0,)),
    ("huber_loss", (A, B), {"delta": 0.6}, (0, 1)),
    ("log_cosh_loss", (A, B), {}, (0, 1)),
    ("cosine_similarity_loss", (A, B), {"axis": 2}, (0, 1)),
    ("margin_ranking_loss", (A, B, SIGNS), {"margin": 0.3}, (0, 1)),
]


@pytest.mark.parametrize("name, arrays, settings, differentiated", LOSSES)
def test_losses(name, arrays, settings, differentiated):
    found = []
    for mx, nn, _ in BOTH:
        loss = getattr(nn.losses, name)
        given = [mx.array(x) for x in arrays]
        value = loss(*given, **settings)

        def total(*xs, loss=loss):
            return (loss(*xs, **settings) * 1.5).sum()

        grads = mx.grad(total, argnums=differentiated)(*given)
        found.append([value, *(grads if len(differentiated) > 1 else [grads])])
    assert np.array(found[0][0]).dtype == np.array(found[1][0]).dtype
    for a, b in zip(found[1], found[0], strict=True):
        close(a, b, 1e-4, 1e-5)


@pytest.mark.parametrize("name", sorted({case[0] for case in LOSSES}))
def test_signatures_of_losses(name):
    a, b = (
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(their_nn.losses, name), getattr(our_nn.losses, name))
    )
    assert a == b


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda mx, n: n.cross_entropy(mx.ones((2, 3)), mx.array([0, 1]), label_smoothing=1.0),
         "Label smoothing must be in"),
        (lambda mx, n: n.cross_entropy(mx.ones((2, 3)), mx.array([0])), "does not match logits"),
        (lambda mx, n: n.cross_entropy(mx.ones((2, 3)), mx.array([0, 1]), mx.ones((3,))),
         "is not the same as"),
        (lambda mx, n: n.mse_loss(mx.ones((2,)), mx.ones((3,))), "does not match"),
        (lambda mx, n: n.l1_loss(mx.ones((2,)), mx.ones((2,)), reduction="max"),
         r"Must be one of \('none', 'mean', 'sum'\)"),
    ],
)  # fmt: skip
def test_what_losses_refuse(call, text):
    for mx, nn, _ in BOTH:
        with pytest.raises(ValueError, match=text):
            call(mx, nn.losses)


@pytest.mark.parametrize(
    "name, settings", [("QuantizedLinear", {}), ("QuantizedLinear", {"bits": 8})]
)
def test_quantized_layers_take_each_others_weights(tmp_path, name, settings):
    found = []
    path = str(tmp_path / "w.safetensors")
    for mx, nn, utils in BOTH:
        linear = nn.Linear(64, 6)
        linear.weight, linear.bias = mx.array(draw(6, 64)), mx.array(draw(6))
        layer = nn.QuantizedLinear.from_linear(linear, 32, **settings)
        if not found:
            layer.save_weights(path)
        fresh = nn.QuantizedLinear(64, 6, group_size=32, **settings)
        fresh.load_weights(path)
        x = mx.array(draw(3, 64, seed=5))
        by_x = mx.grad(lambda x, layer=layer: layer(x).square().sum())(x)
        assert not utils.tree_flatten(fresh.trainable_parameters())
        found.append([layer(x), fresh(x), by_x])
    for a, b in zip(found[1], found[0], strict=True):
        close(a, b, 1e-3, 2e-3)


def test_quantize_a_model():
    found = []
    for mx, nn, utils in BOTH:
        model = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 64), nn.RMSNorm(64),
                              nn.Linear(64, 3))  # fmt: skip
        flat = sorted(utils.tree_flatten(model.parameters()))
        model.load_weights([(n, mx.array(draw(*v.shape, seed=i))) for i, (n, v) in enumerate(flat)])
        nn.quantize(model, 64, 4, class_predicate=lambda path, m: path != "layers.3"
                    and hasattr(m, "to_quantized"))  # fmt: skip
        found.append(([type(layer).__name__ for layer in model.layers], model(mx.array([0, 4, 2]))))
    assert found[0][0] == found[1][0]
    close(found[1][1], found[0][1], 1e-3, 1e-2)


def test_a_model_trained_by_both():
    """The first updates of a small model with checkpoints, frozen parts and clipping."""
    losses = []
    for mx, nn, utils in BOTH:
        import importlib

        optim = importlib.import_module(f"{mx.__name__.removesuffix('.core')}.optimizers")

        class Block(nn.Module):
            def __init__(self, nn=nn, mx=mx):
                super().__init__()
                self.norm = nn.RMSNorm(16)
                self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
                self.scale = mx.ones((16,))

            def __call__(self, x, nn=nn):
                return x + self.down(nn.silu(self.up(self.norm(x)))) * self.scale

        class Model(nn.Module):
            def __init__(self, nn=nn, Block=Block):
                super().__init__()
                self.embed = nn.Embedding(11, 16)
                self.layers = [Block() for _ in range(3)]

            def __call__(self, ids, nn=nn):
                x = self.embed(ids)
                for layer in self.layers:
                    x = nn.utils.checkpoint(layer)(x) if hasattr(nn, "utils") else layer(x)
                return self.embed.as_linear(x)

        model = Model()
        flat = sorted(utils.tree_flatten(model.parameters()))
        model.update(
            utils.tree_unflatten(
                [(n, mx.array(0.3 * draw(*v.shape, seed=i))) for i, (n, v) in enumerate(flat)]
            )
        )
        model.freeze()
        model.layers[1].unfreeze()
        model.layers[2].unfreeze(keys=["weight", "scale"])
        model.layers[0].apply_to_modules(
            lambda name, m: m.unfreeze(keys="bias") if name.endswith("up") else None
        )
        optimizer = optim.AdamW(optim.cosine_decay(1e-2, 10), weight_decay=0.1)
        ids = mx.array(np.random.default_rng(0).integers(0, 11, (4, 9)))

        def loss_fn(model, ids, mx=mx, nn=nn):
            logits = model(ids[:, :-1])
            mask = mx.arange(8)[None] < mx.array([[8], [5], [7], [3]])
            ce = nn.losses.cross_entropy(logits, ids[:, 1:]) * mask
            total = ce.sum()
            total /= mask.sum()
            return total, mask.sum()

        step = nn.value_and_grad(model, loss_fn)
        seen = []
        for _ in range(8):
            (loss, count), grads = step(model, ids)
            grads, norm = optim.clip_grad_norm(grads, 0.5)
            optimizer.update(model, grads)
            mx.eval(model.state, optimizer.state)
            seen.append((loss.item(), norm.item(), count.item(), optimizer.learning_rate.item()))
        names = sorted(n for n, _ in utils.tree_flatten(model.trainable_parameters()))
        losses.append((seen, names))
    assert losses[0][1] == losses[1][1]
    close(losses[1][0], losses[0][0], 1e-4, 1e-4)
