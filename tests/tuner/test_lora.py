"""LoRALinear over every kind of base: what it computes, what it shares, and what fusing leaves of it."""

import warnings

import numpy as np
import pytest
from stored_weights import stored

import pyloss
from pyloss import nn
from pyloss.tuner import LoRALinear
from pyloss.weights import Weight

BASES = ["plain", "f32", "bf16", "f16", "q8_0", "q4_0", "q4_1"]
QUANTISED = ["q8_0", "q4_0", "q4_1"]


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def make_base(rng, kind, head_dim=0, bias=True, out=12, columns=64):
    values = rng.standard_normal((out, columns)).astype(np.float32)
    weight = values if kind == "plain" else Weight.quantize(values, kind, head_dim)
    return nn.Linear.from_weight(weight, rng.standard_normal(out).astype(np.float32) if bias else None)


def dense(layer):
    weight = layer.weight
    return weight.dequantize() if isinstance(weight, Weight) else weight


def trained(rng, base, size=1.0, **options):
    layer = LoRALinear.from_base(base, **{"r": 4, "scale": 2.0, **options})
    layer.lora_a[...] = rng.standard_normal(layer.lora_a.shape)
    layer.lora_b[...] = size * rng.standard_normal(layer.lora_b.shape)
    return layer


@pytest.mark.parametrize("kind", BASES)
def test_from_base_shares_and_begins_as_its_base(rng, kind):
    base = make_base(rng, kind)
    layer = LoRALinear.from_base(base, r=3, scale=5.0)
    assert layer.linear is base and layer.linear.weight is base.weight
    assert layer.lora_a.shape == (64, 3) and layer.lora_b.shape == (3, 12)
    assert 0.9 / 8 < np.abs(layer.lora_a).max() <= 1 / 8 and not layer.lora_b.any()
    assert list(layer.trainable_parameters()) == ["lora_a", "lora_b"]
    for rows in (1, 3, 9):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        np.testing.assert_array_equal(layer(x), base(x))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("head_dim", [0, 4])
def test_forward_and_fuse(rng, kind, head_dim):
    base = make_base(rng, kind, head_dim)
    layer, x = trained(rng, base), rng.standard_normal((7, 64)).astype(np.float32)
    delta = 2.0 * layer.lora_a.astype(np.float64) @ layer.lora_b
    want = x @ (dense(base).T + delta) + base.bias
    np.testing.assert_allclose(layer(x), want, atol=1e-4)
    np.testing.assert_allclose(layer.delta(), delta.T, rtol=1e-5, atol=1e-5)
    before = dense(base).copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = layer.fuse()
    np.testing.assert_array_equal(dense(base), before)
    assert fused.bias is base.bias and not fused.trainable_parameters()
    if kind == "plain":
        assert type(fused) is nn.Linear and isinstance(fused.weight, np.ndarray)
    else:
        assert fused.weight.format == kind and fused.weight.nbytes == base.weight.nbytes
    # To the rounding of the format that stores the sum.
    steps = {"plain": 0, "f32": 0, "bf16": 2**-9, "f16": 2**-12, "q8_0": 1 / 250, "q4_0": 1 / 14, "q4_1": 1 / 28}[kind]
    largest = np.abs(before + delta.T).reshape(-1, 32).max(axis=1).max() * 2
    assert np.abs(dense(fused) - (before + delta.T)).max() <= steps * largest + 1e-5
    if kind in ("plain", "f32"):
        np.testing.assert_allclose(fused(x), layer(x), atol=2e-4)


@pytest.mark.parametrize("kind", BASES)
def test_fusing_with_dequantize_keeps_everything(rng, kind):
    layer, x = trained(rng, make_base(rng, kind, 4), size=1e-3), rng.standard_normal((7, 64)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = layer.fuse(dequantize=True)
    if kind in QUANTISED:
        assert fused.weight.format == "f32" and type(fused) is nn.Linear
    if kind not in ("bf16", "f16"):
        np.testing.assert_array_equal(dense(fused), dense(layer.linear) + layer.delta())
        np.testing.assert_allclose(fused(x), layer(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_fusing_a_small_adapter_into_few_bits_warns(rng, kind):
    layer = trained(rng, make_base(rng, kind), size=1e-4)
    with pytest.warns(UserWarning, match=rf"{kind} keeps \d+% of the adapter; fuse\(dequantize=True\)"):
        fused = layer.fuse()
    assert fused.weight.format == kind and isinstance(fused, nn.QuantizedLinear)


@pytest.mark.parametrize("kind", BASES)
def test_fusing_an_untrained_adapter_changes_nothing(rng, kind):
    base = make_base(rng, kind, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = LoRALinear.from_base(base).fuse()
    if kind in ("plain", "f32", "bf16", "f16", "q4_0"):
        np.testing.assert_array_equal(dense(fused), dense(base))


@pytest.mark.parametrize("rank", [0, -1, 65, 1.5, "8", True, None])
def test_ranks_that_cannot_be(rng, rank):
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 64"):
        LoRALinear.from_base(make_base(rng, "plain"), r=rank)


@pytest.mark.parametrize("rank", [1, 12, 33, 64, np.int64(5)])
def test_ranks_that_can(rng, rank):
    layer, x = trained(rng, make_base(rng, "q8_0"), r=rank), rng.standard_normal((6, 64)).astype(np.float32)
    want = x @ (dense(layer.linear).T + 2.0 * layer.lora_a.astype(float) @ layer.lora_b) + layer.linear.bias
    np.testing.assert_allclose(layer(x), want, atol=1e-3)


@pytest.mark.parametrize("dropout", [1.0, -0.1, 2])
def test_dropouts_that_cannot_be(rng, dropout):
    with pytest.raises(ValueError, match="dropout"):
        LoRALinear.from_base(make_base(rng, "plain"), dropout=dropout)


@pytest.mark.parametrize("base", [nn.RMSNorm(3), None, np.ones((2, 2))])
def test_only_linear_layers_take_an_adapter(base):
    with pytest.raises(TypeError, match=f"not {type(base).__name__}"):
        LoRALinear.from_base(base)


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone(rng):
    layer, x = trained(rng, make_base(rng, "q4_1"), dropout=0.5), rng.standard_normal((9, 64)).astype(np.float32)
    pyloss.random.seed(1)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    pyloss.random.seed(1)
    np.testing.assert_array_equal(layer(x), first)
    branch = (first - layer.linear(x)).astype(np.float64)
    layer.eval()
    state = pyloss.random.state()
    np.testing.assert_array_equal(layer(x), layer(x))
    assert pyloss.random.state() == state
    whole = layer(x) - layer.linear(x)
    assert np.abs(branch - whole).max() > 1
    layer.train()
    mean = np.mean([layer(x) for _ in range(4000)], axis=0) - layer.linear(x)
    assert np.abs(mean - whole).max() < 0.1 * np.abs(whole).max()


def test_it_can_be_made_without_a_base():
    layer = LoRALinear(6, 4, r=2, bias=True)
    assert layer.linear.shape == (4, 6) and layer.linear.bias is not None and layer.scale == 20.0
    assert "r=2" in repr(layer) and list(layer.trainable_parameters()) == ["lora_a", "lora_b"]


@pytest.mark.parametrize("format", ["q5_1", "affine3", "affine4", "nf4"])
def test_fusing_keeps_groups_as_they_were(rng, format):
    options = {"group_size": 32, "scale_format": "bf16", "double": False} if format[0] != "q" else {}
    weight = Weight.quantize(rng.standard_normal((12, 64)).astype(np.float32), format, **options)
    fused = trained(rng, nn.Linear.from_weight(weight)).fuse()
    assert fused.weight.format == format and fused.weight.nbytes == weight.nbytes
    if weight.groups:
        old, new = weight.groups, fused.weight.groups
        assert (new.size, new.scale_format, new.double) == (old.size, old.scale_format, old.double)


def test_fusing_over_what_can_only_be_read_makes_floats(rng):
    weight = stored(rng, 12, 256, "q4_k")
    layer = trained(rng, nn.Linear.from_weight(weight))
    with pytest.warns(UserWarning, match="q4_k can be read but not written here: weights fused over it are kept in float32"):
        fused = layer.fuse()
    assert fused.weight.format == "f32"
    np.testing.assert_array_equal(dense(fused), weight.dequantize() + layer.delta())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.fuse(dequantize=True).weight.format == "f32"
