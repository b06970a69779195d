"""Adapters over experts: values over every base, sharing, and fusing."""

import warnings

import numpy as np
import pytest

import pyloss
from pyloss import _core, nn
from pyloss.tuner import DoRASwitchLinear, LoRASwitchLinear
from pyloss.tuner.adapters.merging import dense
from pyloss.tuner.adapters.registry import adapter_class
from pyloss.weights.stack import WeightStack

BASES = ["plain", "f32", "bf16", "q8_0", "q4_1"]
CLASSES = [LoRASwitchLinear, DoRASwitchLinear]
EXPERTS, OUT, IN = 4, 12, 64
OFFSETS = np.array([0, 3, 3, 4, 13], np.int32)
EXPERT_OF_ROW = np.repeat(np.arange(EXPERTS), np.diff(OFFSETS))


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make_base(rng, kind, bias=True):
    values = normal(rng, EXPERTS, OUT, IN)
    weight = values if kind == "plain" else WeightStack.quantize(values, kind)
    return nn.SwitchLinear.from_weight(weight, normal(rng, EXPERTS, OUT) if bias else None)


def trained(rng, base, size=1.0, cls=LoRASwitchLinear, **options):
    layer = cls.from_base(base, **{"r": 4, "scale": 2.0, **options})
    layer.lora_a[...] = rng.standard_normal(layer.lora_a.shape)
    layer.lora_b[...] = size * rng.standard_normal(layer.lora_b.shape)
    if cls is DoRASwitchLinear:
        layer.m *= rng.uniform(0.5, 1.5, layer.m.shape).astype(np.float32)
    return layer


def summed(layer):
    """float64 weights of the base plus the adapter's product."""
    return dense(layer.linear.weight) + layer.scale * layer.lora_b.astype(np.float64) @ layer.lora_a


def lengths(layer):
    """The factors of the rows of `summed`."""
    if isinstance(layer, LoRASwitchLinear):
        return np.ones(layer.linear.shape[:2])
    return layer.m / np.linalg.norm(summed(layer), axis=2)


def merged(layer):
    """The effective float64 weights of a layer."""
    return lengths(layer)[:, :, None] * summed(layer)


def applied(x, weight, bias):
    y = np.einsum("ni,noi->no", x.astype(np.float64), weight[EXPERT_OF_ROW])
    return y if bias is None else y + bias[EXPERT_OF_ROW]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("cls", CLASSES)
def test_from_base_shares_and_begins_as_its_base(rng, cls, kind):
    base = make_base(rng, kind)
    layer = adapter_class(base, cls.kind).from_base(base, r=3, scale=5.0)
    assert type(layer) is cls and layer.linear is base and layer.base.weight is base.weight
    assert (
        layer.lora_a.shape == (EXPERTS, 3, IN)
        and layer.lora_b.shape == (EXPERTS, OUT, 3)
        and layer.rank == 3
    )
    assert 0.9 / 8 < np.abs(layer.lora_a).max() <= 1 / 8 and not layer.lora_b.any()
    assert (
        list(layer.trainable_parameters())
        == list(layer.parameter_names())
        == ["lora_a", "lora_b", "m"][: 2 + (cls is DoRASwitchLinear)]
    )
    x = normal(rng, 13, IN)
    if cls is LoRASwitchLinear:
        np.testing.assert_array_equal(layer(x, OFFSETS), base(x, OFFSETS))
    else:
        np.testing.assert_allclose(
            layer.m, np.linalg.norm(dense(base.weight).astype(float), axis=2), rtol=1e-6
        )
        np.testing.assert_allclose(layer(x, OFFSETS), base(x, OFFSETS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_forward_gradients_and_fuse(rng, cls, kind, bias):
    layer = trained(rng, make_base(rng, kind, bias), cls=cls)
    x, dy = normal(rng, 13, IN), normal(rng, 13, OUT)
    np.testing.assert_allclose(
        layer(x, OFFSETS), applied(x, merged(layer), layer.linear.bias), atol=2e-4
    )
    np.testing.assert_allclose(
        layer.delta(), merged(layer) - dense(layer.linear.weight), rtol=1e-4, atol=1e-4
    )

    _, grads = nn.value_and_grad(layer, lambda: (layer(x, OFFSETS) * dy).sum())()
    # dL/dW
    slope = np.stack(
        [
            dy[EXPERT_OF_ROW == e].T.astype(np.float64) @ x[EXPERT_OF_ROW == e]
            for e in range(EXPERTS)
        ]
    )
    if cls is DoRASwitchLinear:  # the norms are constant
        want = (slope * summed(layer)).sum(2) / np.linalg.norm(summed(layer), axis=2)
        np.testing.assert_allclose(grads["m"], want, rtol=1e-4, atol=2e-4)
    slope *= lengths(layer)[:, :, None]
    np.testing.assert_allclose(grads["lora_a"], 2 * layer.lora_b.swapaxes(1, 2) @ slope, atol=2e-3)
    np.testing.assert_allclose(grads["lora_b"], 2 * slope @ layer.lora_a.swapaxes(1, 2), atol=2e-3)
    assert not any(gradient[1].any() for gradient in grads.values())  # expert 1 has no rows

    before = dense(layer.linear.weight).copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = layer.fuse()
    np.testing.assert_array_equal(dense(layer.linear.weight), before)
    assert (
        isinstance(fused, nn.SwitchLinear)
        and fused.bias is layer.linear.bias
        and not fused.trainable_parameters()
    )
    assert isinstance(fused.weight, np.ndarray) if kind == "plain" else fused.weight.format == kind
    steps = {"plain": 0, "f32": 0, "bf16": 2**-9, "q8_0": 1 / 250, "q4_1": 1 / 28}[kind]
    assert (
        np.abs(dense(fused.weight) - merged(layer)).max()
        <= steps * 2 * np.abs(merged(layer)).max() + 1e-5
    )
    if not steps:
        np.testing.assert_allclose(fused(x, OFFSETS), layer(x, OFFSETS), atol=2e-4)


def counted(function):
    """How often `function` computes the norms of an expert."""
    _core.profile(True)
    function()
    return _core.profile(False).get("adapted_norm", (0,))[0]


@pytest.mark.parametrize("kind", BASES)
def test_norms_of_the_experts_that_have_rows_alone(rng, kind):
    layer, x = trained(rng, make_base(rng, kind), cls=DoRASwitchLinear), normal(rng, 13, IN)
    kept = kind != "plain"
    few = np.array([0, 0, 6, 13, 13], np.int32)
    assert counted(lambda: layer(x, few)) == 2
    assert counted(lambda: layer(x, few)) == (0 if kept else 2)
    assert counted(lambda: layer(x, OFFSETS)) == (2 if kept else 3)
    layer.m *= 2
    layer.lora_b[2, 0, 0] += 1
    assert counted(lambda: layer(x, OFFSETS)) == (1 if kept else 3)
    np.testing.assert_allclose(
        layer(x, OFFSETS), applied(x, merged(layer), layer.linear.bias), rtol=1e-4, atol=3e-4
    )
    layer.linear.weight = make_base(rng, kind).weight
    np.testing.assert_allclose(
        layer(x, OFFSETS), applied(x, merged(layer), layer.linear.bias), rtol=1e-4, atol=3e-4
    )
    layer.scale = 0.5
    np.testing.assert_allclose(
        layer(x, OFFSETS), applied(x, merged(layer), layer.linear.bias), rtol=1e-4, atol=3e-4
    )


def test_an_experts_rows_without_length_stay_finite(rng):
    base = make_base(rng, "plain")
    base.weight[0, :3] = 0
    layer, x = DoRASwitchLinear.from_base(base, r=3), normal(rng, 13, IN)
    np.testing.assert_allclose(layer(x, OFFSETS), base(x, OFFSETS), rtol=1e-5, atol=1e-5)
    _, grads = nn.value_and_grad(layer, lambda: (layer(x, OFFSETS) ** 2).sum())()
    assert all(np.isfinite(gradient).all() for gradient in grads.values())


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_fusing_into_few_bits(rng, kind):
    layer = trained(rng, make_base(rng, kind), size=1e-5)
    with pytest.warns(
        UserWarning, match=rf"{kind} keeps \d+% of the adapter; fuse\(dequantize=True\)"
    ):
        layer.fuse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused, kept = layer.fused(dequantize=True)
    assert kept == 1 and fused.weight.format == "f32" and type(fused) is nn.SwitchLinear
    np.testing.assert_array_equal(dense(fused.weight), dense(layer.linear.weight) + layer.delta())
    share = trained(rng, make_base(rng, kind)).fused().kept
    assert 0.9 < share < 1


@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_acts_in_training_alone_on_the_adapter_alone(rng, cls):
    layer, x = trained(rng, make_base(rng, "q4_1"), dropout=0.5, cls=cls), normal(rng, 13, IN)
    pyloss.random.seed(1)
    first, second = layer(x, OFFSETS), layer(x, OFFSETS)
    assert (first != second).any()
    pyloss.random.seed(1)
    np.testing.assert_array_equal(layer(x, OFFSETS), first)
    layer.eval()
    whole = layer(x, OFFSETS)
    np.testing.assert_allclose(whole, applied(x, merged(layer), layer.linear.bias), atol=2e-4)
    layer.train()
    mean = np.mean([layer(x, OFFSETS) for _ in range(2000)], axis=0)
    branch = applied(
        x, lengths(layer)[:, :, None] * (summed(layer) - dense(layer.linear.weight)), None
    )
    assert np.abs(mean - whole).max() < 0.15 * np.abs(branch).max()


@pytest.mark.parametrize("rank", [0, 65537, True])
def test_ranks_that_cannot_be(rng, rank):
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 65536"):
        LoRASwitchLinear.from_base(make_base(rng, "plain"), r=rank)


@pytest.mark.parametrize("base", [nn.Linear(3, 3), nn.Embedding(3, 3), None])
@pytest.mark.parametrize("cls", CLASSES)
def test_only_experts_take_it(cls, base):
    with pytest.raises(
        TypeError, match=f"{cls.__name__} goes over a SwitchLinear, not {type(base).__name__}"
    ):
        cls.from_base(base)


def test_taking_off_the_start(rng):
    """After subtracting its initial product, the adapter and its stored form agree."""
    layer, x = trained(rng, make_base(rng, "plain")), normal(rng, 13, IN)
    layer.subtract_initial_product()
    np.testing.assert_allclose(layer(x, OFFSETS), layer.linear(x, OFFSETS), atol=2e-3)
    layer.lora_b[...] += normal(rng, *layer.lora_b.shape)
    settled = layer.storable()
    assert (
        settled.rank == 8
        and settled.lora_a.shape == (EXPERTS, 8, IN)
        and settled.lora_b.shape == (EXPERTS, OUT, 8)
    )
    np.testing.assert_allclose(settled(x, OFFSETS), layer(x, OFFSETS), atol=1e-3)
    np.testing.assert_allclose(layer.fuse()(x, OFFSETS), layer(x, OFFSETS), atol=2e-3)


def test_it_can_be_made_without_a_base():
    layer = LoRASwitchLinear(6, 4, 3, r=2, bias=True)
    assert (
        layer.linear.shape == (3, 4, 6)
        and layer.bias is layer.linear.bias is not None
        and layer.scale == 20.0
    )
    assert "LoRASwitchLinear(r=2" in repr(layer) and list(layer.trainable_parameters()) == [
        "lora_a",
        "lora_b",
    ]
