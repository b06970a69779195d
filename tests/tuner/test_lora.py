"""LoRALinear: its start, the average effect of dropout, and rounding in fused formats."""

import warnings

import dense_adapters
import numpy as np
import pytest
from dense_adapters import dense
from stored_weights import stored

import pyloss
from pyloss import nn
from pyloss.tuner import LoRALinear
from pyloss.weights.weight import Weight

BASES = ["plain", "f32", "bf16", "f16", "q8_0", "q4_0", "q4_1"]


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def make_base(rng, kind):
    return dense_adapters.make_base(rng, LoRALinear, kind)


def trained(rng, base, **options):
    return dense_adapters.trained(rng, LoRALinear, base, **{"scale": 2.0, **options})


def test_the_factors_begin_within_bounds(rng):
    layer = LoRALinear.from_base(make_base(rng, "q4_0"), r=3)
    assert layer.lora_a.shape == (64, 3) and layer.lora_b.shape == (3, 12)
    assert 0.9 / 8 < np.abs(layer.lora_a).max() <= 1 / 8 and not layer.lora_b.any()


@pytest.mark.parametrize("kind", BASES)
def test_fusing_is_right_to_the_rounding_of_the_format(rng, kind):
    base = make_base(rng, kind)
    layer, before = trained(rng, base), dense(base)
    delta = 2.0 * layer.lora_a.astype(np.float64) @ layer.lora_b
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = layer.fuse()
    steps = {
        "plain": 0,
        "f32": 0,
        "bf16": 2**-9,
        "f16": 2**-12,
        "q8_0": 1 / 250,
        "q4_0": 1 / 14,
        "q4_1": 1 / 28,
    }[kind]
    largest = np.abs(before + delta.T).reshape(-1, 32).max(axis=1).max() * 2
    assert np.abs(dense(fused) - (before + delta.T)).max() <= steps * largest + 1e-5


@pytest.mark.parametrize("kind", BASES)
def test_fusing_an_untrained_adapter_changes_nothing(rng, kind):
    base = make_base(rng, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = LoRALinear.from_base(base).fuse()
    if kind in ("plain", "f32", "bf16", "f16", "q4_0"):
        np.testing.assert_array_equal(dense(fused), dense(base))


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone(rng):
    layer, x = (
        trained(rng, make_base(rng, "q4_1"), dropout=0.5),
        rng.standard_normal((9, 64)).astype(np.float32),
    )
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


@pytest.mark.parametrize("format", ["q5_1", "affine3", "affine4", "nf4"])
def test_fusing_keeps_groups_as_they_were(rng, format):
    options = (
        {"group_size": 32, "scale_format": "bf16", "double": False} if format[0] != "q" else {}
    )
    weight = Weight.quantize(rng.standard_normal((12, 64)).astype(np.float32), format, **options)
    fused = trained(rng, nn.Linear.from_weight(weight)).fuse()
    assert fused.weight.format == format and fused.weight.nbytes == weight.nbytes
    if weight.groups:
        old, new = weight.groups, fused.weight.groups
        assert (new.size, new.scale_format, new.double) == (old.size, old.scale_format, old.double)


def test_fusing_over_what_can_only_be_read_makes_floats(rng):
    weight = stored(rng, 12, 256, "mxfp4")
    layer = trained(rng, nn.Linear.from_weight(weight))
    with pytest.warns(
        UserWarning,
        match="mxfp4 can be read but not written: the weights fused over it are kept in float32",
    ):
        fused = layer.fuse()
    assert fused.weight.format == "f32"
    np.testing.assert_array_equal(dense(fused), weight.dequantize() + layer.delta())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.fuse(dequantize=True).weight.format == "f32"
