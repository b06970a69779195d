"""An adapter over the output head, or over a table that is also the head, acts at every use."""

import numpy as np
import pytest
import tiny
from dense_adapters import CLASSES, make_base, parameters, trained

import pyloss
from pyloss import nn
from pyloss.losses import head as linear_losses
from pyloss.tuner import linear_to_lora_layers
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.losses import default_loss
from pyloss.tuner.utils import fuse_adapters, remove_lora_layers

BATCH = np.random.default_rng(1).integers(0, 29, (4, 11))
LENGTHS = np.array([[1, 11], [0, 8], [3, 5], [0, 11]])


@pytest.fixture
def rng():
    return np.random.default_rng(10)


def adapted_model(folder, tied, use_dora=False, dropout=0.0):
    model = tiny.load_tiny(folder, tied=tied)
    keys = ["model.embed_tokens" if tied else "lm_head", "self_attn.q_proj"]
    linear_to_lora_layers(
        model, -1, {"rank": 3, "scale": 2.0, "dropout": dropout, "keys": keys}, use_dora=use_dora
    )
    rng = np.random.default_rng(0)
    for layer in adapter_modules(model).values():
        layer.lora_a[...] = rng.standard_normal(layer.lora_a.shape) / 2
        layer.lora_b[...] = rng.standard_normal(layer.lora_b.shape) / 2
        if use_dora:
            layer.m *= rng.uniform(0.7, 1.4, layer.m.shape).astype(np.float32)
    return model


def loss_of_logits(model):
    logits = model(BATCH[:, :-1])
    places = np.arange(1, 11)
    used = (places >= LENGTHS[:, :1]) & (places < LENGTHS[:, 1:])
    losses = pyloss.softmax_cross_entropy(logits, np.where(used, BATCH[:, 1:], -100))
    return losses.sum() / float(used.sum())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_training_loss_is_that_of_the_logits(tmp_path, tied, use_dora):
    model = adapted_model(tmp_path / "model", tied, use_dora)
    want, want_grads = nn.value_and_grad(model, lambda: loss_of_logits(model))()
    (value, _), grads = nn.value_and_grad(model, lambda: default_loss(model, BATCH, LENGTHS))()
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    head = "model.embed_tokens" if tied else "lm_head"
    assert {f"{head}.lora_a", f"{head}.lora_b"} <= grads.keys()
    for name, gradient in grads.items():
        assert np.abs(gradient).max() > 1e-6, name
        np.testing.assert_allclose(
            gradient, want_grads[name], rtol=1e-3, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )
    # Without the adapter the loss differs.
    remove_lora_layers(model)
    assert abs(float(default_loss(model, BATCH, LENGTHS)[0]) - float(want)) > 0.1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_generation_and_fusing(tmp_path, tied, use_dora):
    model = adapted_model(tmp_path / "model", tied, use_dora, dropout=0.3).eval()
    logits = model(BATCH)
    cache = model.make_cache()
    model.step(BATCH[0, :5], cache)
    np.testing.assert_allclose(model.step(BATCH[0, 5:6], cache), logits[0, 5], rtol=1e-3, atol=1e-4)
    loss, count = default_loss(model, BATCH, LENGTHS)
    assert float(loss) == pytest.approx(float(loss_of_logits(model)), rel=1e-5)
    greedy = logits.argmax(axis=-1)
    with pytest.raises(ValueError, match="the head has an adapter"):
        _ = model.head_weight
    assert model.head_layer is (model.model.embed_tokens if tied else model.lm_head)
    model.fuse()
    assert not adapter_modules(model) and model.head_weight.shape == (29, 32)
    np.testing.assert_allclose(model(BATCH), logits, rtol=1e-3, atol=1e-3)
    assert (model(BATCH).argmax(axis=-1) == greedy).mean() > 0.95
    assert default_loss(model, BATCH, LENGTHS)[1] == count


def test_fusing_a_model_reports_what_storing_left(tmp_path):
    folder = tmp_path / "model"
    model = adapted_model(folder, tied=True)
    model.model.embed_tokens.embedding = nn.Embedding.from_weight(
        pyloss.Weight.quantize(model.model.embed_tokens.embedding.weight.dequantize(), "q4_0")
    )
    model.model.embed_tokens.lora_b *= 1e-3
    with pytest.warns(
        UserWarning,
        match=r"q4_0 keeps \d+% of the adapter.*\(1 of 4 layers lose most; this is the worst\)",
    ):
        kept = fuse_adapters(model)
    assert kept.keys() == {
        "model.embed_tokens",
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
    }
    assert kept.pop("model.embed_tokens") < 0.5 and set(kept.values()) == {1.0}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "bf16", "q4_1"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_loss_in_parts_is_that_of_all_logits(rng, monkeypatch, cls, kind, dropout):
    """The loss over few rows at a time: values and gradients; some rows do not count."""
    monkeypatch.setattr(linear_losses, "MIN_ROWS", 16)
    layer = trained(rng, cls, make_base(rng, cls, kind, rows=23), size=0.2, dropout=dropout)
    hidden, labels = rng.standard_normal((60, 64)).astype(np.float32) / 4, rng.integers(0, 23, 60)
    if not dropout:
        labels[::7] = -100
    weights = rng.uniform(0.5, 2, 60).astype(np.float32)
    call = layer.as_linear if cls.base_name == "embedding" else layer

    def fused(x):
        return pyloss.linear_cross_entropy(
            x, layer, labels, weights=weights, reduction="sum", logits_bytes=1
        )

    def plain(x):
        return pyloss.softmax_cross_entropy(call(x), labels, weights=weights, reduction="sum")

    found = []
    for loss in (fused, plain):
        pyloss.random.seed(4)
        value, grads = nn.value_and_grad(layer, lambda loss=loss: loss(hidden))()
        pyloss.random.seed(4)
        found.append((float(value), {**grads, "hidden": pyloss.grad(loss)(hidden)}))
    (value, grads), (want, want_grads) = found
    assert value == pytest.approx(want, rel=1e-6) and grads.keys() == {*parameters(layer), "hidden"}
    for name, gradient in grads.items():
        np.testing.assert_allclose(
            gradient, want_grads[name], rtol=1e-3, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize("layer", [nn.Linear(8, 7), nn.Embedding(7, 8)])
def test_plain_layers_train_whole(rng, layer):
    hidden, labels = rng.standard_normal((5, 8)).astype(np.float32), rng.integers(0, 7, 5)
    call = layer.as_linear if isinstance(layer, nn.Embedding) else layer
    _, grads = nn.value_and_grad(
        layer, lambda: pyloss.linear_cross_entropy(hidden, layer, labels).sum()
    )()
    _, want = nn.value_and_grad(
        layer, lambda: pyloss.softmax_cross_entropy(call(hidden), labels).sum()
    )()
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_distillation_from_and_to_adapted_heads(rng, name):
    heads = [
        trained(rng, cls, make_base(rng, cls, "q4_1", rows=9), size=0.1)
        for cls in (CLASSES[1], CLASSES[2])
    ]
    hidden = [rng.standard_normal((6, 64)).astype(np.float32) / 4 for _ in heads]
    q, p = heads

    def fused():
        return getattr(pyloss, f"linear_{name}")(hidden[0], q, hidden[1], p).sum()

    def plain():
        return getattr(pyloss, f"{name}_loss")(q(hidden[0]), p.as_linear(hidden[1])).sum()

    for layer in heads:
        value, grads = nn.value_and_grad(layer, fused)()
        want, want_grads = nn.value_and_grad(layer, plain)()
        assert float(value) == pytest.approx(float(want), rel=1e-5)
        for part, gradient in grads.items():
            np.testing.assert_allclose(
                gradient,
                want_grads[part],
                rtol=1e-3,
                atol=1e-5 * np.abs(gradient).max(),
                err_msg=part,
            )


def test_a_filter_leaves_an_adapted_head_exact(rng):
    layer = trained(rng, CLASSES[1], make_base(rng, CLASSES[1], "q4_1", rows=40))
    hidden, labels = rng.standard_normal((6, 64)).astype(np.float32), rng.integers(0, 40, 6)
    exact, filtered = (
        nn.value_and_grad(
            layer,
            lambda f=f: pyloss.linear_cross_entropy(hidden, layer, labels, gradient_filter=f).sum(),
        )()[1]
        for f in (0.0, 0.5)
    )
    for part, gradient in filtered.items():
        assert gradient.tobytes() == exact[part].tobytes()


def test_hidden_states_that_do_not_fit(rng):
    layer = trained(rng, CLASSES[0], make_base(rng, CLASSES[0], "plain"))
    with pytest.raises(
        ValueError, match=r"hidden has shape \(2, 63\), which does not end in weight's 64"
    ):
        pyloss.linear_cross_entropy(np.ones((2, 63), np.float32), layer, [0, 1])
