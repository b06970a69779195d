"""The registry of adapters, and what all of them share."""

import numpy as np
import pytest

from pyloss import nn
from pyloss.tuner.adapters.adapter import Adapter, adapter_modules
from pyloss.tuner.adapters.registry import adapter_class, takes_adapter
from pyloss.tuner.lora import LoRALinear
from pyloss.weights.weight import Weight


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.adapted = nn.Linear(4, 6), LoRALinear(6, 3, r=2)
        self.list = [nn.RMSNorm(3), LoRALinear(3, 3, r=1)]


def test_adapters_of_a_model_are_found_by_name():
    model = Pair()
    found = adapter_modules(model)
    assert list(found) == ["adapted", "list.1"] and all(
        isinstance(layer, Adapter) for layer in found.values()
    )
    assert found["adapted"].base is found["adapted"].linear and found[
        "adapted"
    ].parameter_names() == (
        "lora_a",
        "lora_b",
    )


def test_the_class_over_a_layer():
    quantised = nn.Linear.from_weight(Weight.quantize(np.ones((4, 32), np.float32), "q4_0"))
    for layer in (nn.Linear(4, 6), quantised):
        assert adapter_class(layer) is adapter_class(layer, "lora") is LoRALinear and takes_adapter(
            layer
        )
    assert not takes_adapter(nn.RMSNorm(3)) and not takes_adapter(LoRALinear(4, 6, r=1))
    with pytest.raises(
        TypeError, match="a lora adapter goes over one of .*'Linear'.*, not RMSNorm"
    ):
        adapter_class(nn.RMSNorm(3))
    with pytest.raises(ValueError, match="kind of adapter must be one of .*'lora'.*, not 'vera'"):
        adapter_class(nn.Linear(4, 6), "vera")


def test_shapes_of_every_adapter_are_those_of_its_parameters():
    layer = LoRALinear(6, 4, r=3)
    assert {name: getattr(layer, name).shape for name in layer.parameter_names()} == layer.shapes(
        layer.base, 3
    )
    assert layer.rank == 3


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_cannot_be(scale):
    with pytest.raises(ValueError, match="scale is (nan|inf); it must be a finite number"):
        LoRALinear.from_base(nn.Linear(4, 6), r=1, scale=scale)


def test_an_adapter_that_takes_its_start_off():
    """The adapter computes scale (A B - A0 B0), at first 0.

    Its storable form has twice the rank and no fixed factors.
    """
    rng = np.random.default_rng(0)
    base = nn.Linear(6, 4, bias=False)
    layer, x = (
        LoRALinear.from_base(base, r=3, scale=1.5),
        rng.standard_normal((5, 6)).astype(np.float32),
    )
    assert layer.storable() is layer
    a0, b0 = (
        rng.standard_normal((6, 3)).astype(np.float32),
        rng.standard_normal((3, 4)).astype(np.float32),
    )
    layer.lora_a[...], layer.lora_b[...] = a0, b0
    layer.subtract_initial_product()
    np.testing.assert_allclose(layer(x), base(x), atol=1e-5)
    assert list(layer.trainable_parameters()) == [
        "lora_a",
        "lora_b",
    ] and layer.parameter_names() == (
        "lora_a",
        "lora_b",
    )
    layer.lora_a += rng.standard_normal((6, 3)).astype(np.float32)
    layer.lora_b *= 1.25
    want = x @ (base.weight.T + 1.5 * (layer.lora_a @ layer.lora_b - a0 @ b0))
    settled = layer.storable()
    assert (
        settled.rank == 6
        and settled.lora_a.shape == (6, 6)
        and settled.base is base
        and layer.rank == 3
    )
    assert (
        list(settled.trainable_parameters())
        == ["lora_a", "lora_b"]
        == list(settled.parameter_names())
    )
    for same in (layer, settled, layer.fuse()):
        np.testing.assert_allclose(same(x), want, atol=1e-5)

    def f(model):
        return (model(x) ** 2).sum()

    _, grads = nn.value_and_grad(layer, f)(layer)
    _, full = nn.value_and_grad(settled, f)(settled)
    np.testing.assert_allclose(grads["lora_a"], full["lora_a"][:, :3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"], full["lora_b"][:3], rtol=1e-4, atol=1e-4)
