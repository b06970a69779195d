"""Layers of small models, against formulas in float64, and their gradients against differences."""

import math

import numpy as np
import pytest

import pyloss
from pyloss import nn


@pytest.fixture(autouse=True)
def seed():
    pyloss.random.seed(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def agrees(model, x, *more):
    assert pyloss.gradcheck(lambda x: model(x, *more), x, model=model).ok


def test_layer_norm():
    x, layer = normal(2, 3, 5), nn.LayerNorm(5)
    layer.weight[...], layer.bias[...] = normal(5, seed=1), normal(5, seed=2)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), want * layer.weight + layer.bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nn.LayerNorm(5, affine=False)(x), want, rtol=1e-4, atol=1e-5)
    assert list(nn.LayerNorm(5, bias=False).parameters()) == ["weight"]
    agrees(layer, x)
    with pytest.raises(ValueError, match="last axis must have 5"):
        layer(x[..., :4])


def test_a_norm_without_weight():
    x, layer = normal(3, 4), nn.RMSNorm(4, affine=False)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), want, rtol=1e-5)
    assert not layer.parameters() and not layer.buffers()
    with pytest.raises(ValueError, match="needs a weight"):
        nn.RMSNorm(4, offset=1.0, affine=False)


def test_dropout_acts_while_training():
    layer, x = nn.Dropout(0.25), np.ones((100, 100), np.float32)
    y = layer(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)} and abs(y.mean() - 1) < 0.05
    assert layer.eval()(x) is x and nn.Dropout(0)(x) is x
    with pytest.raises(ValueError, match="p"):
        nn.Dropout(1)


def convolved(x, weight, bias, stride, padding, dilation, groups):
    """The sums of the definition, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), padding, (0, 0)))
    outputs, kernel, part = weight.shape
    count = (x.shape[1] - (kernel - 1) * dilation - 1) // stride + 1
    y = np.zeros((len(x), count, outputs))
    for o in range(outputs):
        first = o // (outputs // groups) * part
        for t in range(count):
            for k in range(kernel):
                here = x[:, t * stride + k * dilation, first : first + part]
                y[:, t, o] += here @ weight[o, k]
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("inputs", "outputs", "options"),
    [
        (4, 4, {"groups": 4, "padding": "causal"}), (3, 5, {}), (3, 5, {"stride": 2, "padding": 1}),
        (4, 6, {"groups": 2, "dilation": 2}), (4, 4, {"groups": 4, "stride": 3, "bias": False}),
        (2, 3, {"padding": "causal", "dilation": 3}),
    ],
)  # fmt: skip
def test_convolutions(inputs, outputs, options):
    layer, x = nn.Conv1d(inputs, outputs, 3, **options), normal(2, 9, inputs)
    given = {"stride": 1, "dilation": 1, "groups": 1, **options}
    bias = given.pop("bias", True)
    padding = given.pop("padding", 0)
    sides = (2 * given["dilation"], 0) if padding == "causal" else (padding, padding)
    want = convolved(x, layer.weight, layer.bias if bias else None, padding=sides, **given)
    np.testing.assert_allclose(layer(x), want, rtol=1e-4, atol=1e-5)
    agrees(layer, x)


def test_a_causal_convolution_sees_no_later_token():
    layer, x = nn.Conv1d(3, 3, 4, groups=3, padding="causal"), normal(1, 8, 3)
    before = layer(x)
    x[:, 5:] += 1
    np.testing.assert_array_equal(layer(x)[:, :5], before[:, :5])
    assert before.shape == x.shape and (layer(x)[:, 5:] != before[:, 5:]).any()


def test_convolutions_refuse():
    with pytest.raises(ValueError, match="groups is 2; it must divide"):
        nn.Conv1d(3, 4, 2, groups=2)
    with pytest.raises(ValueError, match="'causal'"):
        nn.Conv1d(3, 4, 2, padding="same")
    with pytest.raises(ValueError, match="fewer than the kernel"):
        nn.Conv1d(3, 4, 5)(normal(1, 4, 3))
    with pytest.raises(ValueError, match=r"\[batch, tokens, 3\]"):
        nn.Conv1d(3, 4, 2)(normal(4, 3))


@pytest.mark.parametrize("traditional", [False, True])
def test_rotary_positions(traditional):
    x, layer = normal(2, 5, 3, 8), nn.RoPE(8, base=100.0, traditional=traditional)
    y = layer(x, offset=2)
    pairs = [(2 * i, 2 * i + 1) if traditional else (i, i + 4) for i in range(4)]
    for i, (a, b) in enumerate(pairs):
        angle = (np.arange(5) + 2)[None, :, None] / 100.0 ** (2 * i / 8)
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)
        np.testing.assert_allclose(y[..., a], turned.real, atol=1e-5)
        np.testing.assert_allclose(y[..., b], turned.imag, atol=1e-5)
    np.testing.assert_allclose(layer(x[0], offset=2), y[0], atol=1e-6)
    agrees(layer, x[:1])
    with pytest.raises(ValueError, match="even"):
        nn.RoPE(5)


def test_attention_is_the_formula():
    layer = nn.MultiHeadAttention(12, 3, kv_heads=1, causal=True, rope=nn.RoPE(4), bias=True)
    x = normal(2, 6, 12)
    q, k, v = (
        (x @ p.weight.T + p.bias).reshape(2, 6, -1, 4)
        for p in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    q, k = layer.rope(q), np.repeat(layer.rope(k), 3, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k) / 2
    scores = np.where(np.tril(np.ones((6, 6), bool)), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = np.einsum("bhts,bshd->bthd", weights, np.repeat(v, 3, 2)).reshape(2, 6, 12)
    np.testing.assert_allclose(
        layer(x), y @ layer.out_proj.weight.T + layer.out_proj.bias, atol=1e-5
    )
    agrees(layer, x[:1, :4])


def test_attention_over_other_tokens_and_masks():
    layer, x, memory = nn.MultiHeadAttention(8, 2), normal(2, 3, 8), normal(2, 5, 8, seed=1)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)[:, None, None]
    y = layer(x, memory, mask=mask)
    np.testing.assert_allclose(y[0], layer(x[:1], memory[:1, :3])[0], atol=1e-6)
    np.testing.assert_allclose(y[1], layer(x[1:], memory[1:], memory[1:])[0], atol=1e-6)
    with pytest.raises(ValueError, match="no multiple of num_heads"):
        nn.MultiHeadAttention(8, 3)
    with pytest.raises(ValueError, match="no multiple of kv_heads"):
        nn.MultiHeadAttention(8, 4, kv_heads=3)


def test_sequences_hold_modules_and_functions():
    model = nn.Sequential(nn.Linear(3, 4), pyloss.gelu, nn.Linear(4, 2))
    assert sorted(model.parameters()) == [
        "layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight",
    ]  # fmt: skip
    agrees(model, normal(2, 3))


# First values


def test_truncated_normal_has_its_deviation():
    """As JAX's: the deviation is that after the cut."""
    x = nn.init.trunc_normal((300, 400), std=0.5)
    assert x.dtype == np.float32 and abs(x.std() - 0.5) < 0.005 and abs(x.mean()) < 0.005
    # Of the uncut distribution the deviation is std / 0.8796 (JAX's constant of a cut at 2).
    assert abs(np.abs(x).max() - 2 * 0.5 / 0.87962566103423978) < 0.01
    one_sided = nn.init.trunc_normal((400, 400), lower=0.0, upper=1.0)
    assert one_sided.min() >= 0 and abs(one_sided.std() - 1) < 0.01
    with pytest.raises(ValueError, match="lower must be less"):
        nn.init.trunc_normal(3, lower=2, upper=1)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("xavier_uniform", math.sqrt(2 / 700)), ("xavier_normal", math.sqrt(2 / 700)),
        ("kaiming_uniform", math.sqrt(2 / 400)), ("kaiming_normal", math.sqrt(2 / 400)),
    ],
)  # fmt: skip
def test_scaled_first_values(name, deviation):
    x = getattr(nn.init, name)((300, 400))
    assert x.shape == (300, 400) and x.dtype == np.float32
    np.testing.assert_allclose(x.std(), deviation, rtol=0.02)
    with pytest.raises(ValueError, match="two axes"):
        getattr(nn.init, name)(5)


def test_other_first_values():
    assert (nn.init.constant((2,), 3) == 3).all()
    x = nn.init.uniform((10000,), -1, 3)
    assert -1 <= x.min() < -0.9 and 2.9 < x.max() < 3
    np.testing.assert_allclose(nn.init.normal(100000, 2, 5).std(), 2, rtol=0.02)
    pyloss.random.seed(4)
    first = nn.init.normal(3)
    pyloss.random.seed(4)
    np.testing.assert_array_equal(first, nn.init.normal(3))


def test_causal_rope_with_fewer_keys_than_queries_is_refused():
    layer = nn.MultiHeadAttention(8, 2, causal=True, rope=nn.RoPE(4))
    with pytest.raises(ValueError, match="5 queries and only 3 keys"):
        layer(np.ones((1, 5, 8), np.float32), np.ones((1, 3, 8), np.float32))
