"""DoRALinear, LoRAEmbedding and DoRAEmbedding against mlx-lm and PEFT, fusing included."""

import itertools

import numpy as np
import pytest
from parity_models import relative

from pyloss import nn
from pyloss.tuner import DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRALinear
from pyloss.weights.weight import Weight

IN, OUT = 64, 96
IDS = np.array([[3, 50, 3, 0], [95, 7, 8, 50]])


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def normal(rng, *shape, size=1.0):
    return (size * rng.standard_normal(shape)).astype(np.float32)


def gradients(layer, call, x, target):
    return nn.value_and_grad(layer, lambda: (call(x) * target).sum())()[1]


@pytest.fixture
def mlx():
    pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")
    return pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")


def their_class(cls):
    from mlx_lm.tuner import dora, lora

    return getattr(dora if cls.__name__.startswith("DoRA") else lora, cls.__name__)


@pytest.mark.parametrize(
    ("cls", "bits"),
    [
        *itertools.product((LoRALinear, DoRALinear, LoRAEmbedding), (None, 4, 8)),
        (DoRAEmbedding, None),
    ],
)
def test_mlx_lm(mlx, rng, cls, bits):
    """mlx-lm has no DoRA over quantized embeddings."""
    import mlx.nn as mlx_nn

    linear = cls.base_name == "linear"
    base = mlx_nn.Linear(IN, OUT, bias=True) if linear else mlx_nn.Embedding(OUT, IN)
    base.weight = mlx.array(normal(rng, OUT, IN))
    weight = np.array(base.weight)
    if bits:
        weight = Weight.quantize(weight, f"affine{bits}", group_size=32)
        base = base.to_quantized(group_size=32, bits=bits)
        their_dense = mlx.dequantize(
            base.weight, base.scales, base.biases, group_size=32, bits=bits
        )
        np.testing.assert_allclose(weight.dequantize(), np.array(their_dense), atol=1e-6)
    own = (
        nn.Linear.from_weight(weight, np.array(base.bias))
        if linear
        else nn.Embedding.from_weight(weight)
    )
    theirs, ours = (
        their_class(cls).from_base(base, r=5, scale=3.0),
        cls.from_base(own, r=5, scale=3.0),
    )
    for name in ours.parameter_names():
        assert getattr(theirs, name).shape == getattr(ours, name).shape
    if ours.kind == "dora":
        assert relative(ours.m, np.array(theirs.m)) < 1e-6
        ours.m *= rng.uniform(0.5, 2, OUT).astype(np.float32)
    ours.lora_b[...] = normal(rng, *ours.lora_b.shape)
    for name in ours.parameter_names():
        setattr(theirs, name, mlx.array(getattr(ours, name)))
    getattr(theirs, cls.base_name).freeze()
    x = normal(rng, 7, IN)
    calls = (
        [(ours, theirs, x)]
        if linear
        else [(ours, theirs, IDS), (ours.as_linear, theirs.as_linear, x)]
    )
    for call, their_call, argument in calls:
        expected = np.array(their_call(mlx.array(argument)))
        assert relative(call(argument), expected) < 1e-5
        target = normal(rng, *expected.shape)

        def their_loss(model, argument=argument, target=target, by_rows=their_call is theirs):
            y = (model if by_rows else model.as_linear)(mlx.array(argument))
            return (y * mlx.array(target)).sum()

        their_grads = mlx_nn.value_and_grad(theirs, their_loss)(theirs)[1]
        for name, gradient in gradients(ours, call, argument, target).items():
            assert relative(gradient, np.array(their_grads[name])) < 1e-4, name
    fused = theirs.fuse(dequantize=bool(bits))
    assert (
        relative(
            ours.merged(own.weight if bits is None else weight.dequantize()), np.array(fused.weight)
        )
        < 1e-5
    )


@pytest.mark.parametrize("bias", [False, True])
def test_dora_of_peft(rng, bias):
    """Without dropout, which PEFT's DoRA also applies to the base's part."""
    torch = pytest.importorskip("torch", reason="compares with torch (parity extra)")
    pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(IN, OUT, bias=bias)
    weight = base.weight.detach().numpy().copy()
    own = nn.Linear.from_weight(weight, base.bias.detach().numpy().copy() if bias else None)
    ours = DoRALinear.from_base(own, r=5, scale=3.0)
    config = LoraConfig(r=5, lora_alpha=15, use_dora=True, lora_dropout=0.0)
    theirs = Linear(base, "default", config, r=5, lora_alpha=15)
    np.testing.assert_allclose(
        theirs.lora_magnitude_vector["default"].weight.detach().numpy(), ours.m, rtol=1e-6
    )
    ours.lora_b[...] = normal(rng, *ours.lora_b.shape, size=0.1)
    ours.m *= rng.uniform(0.5, 2, OUT).astype(np.float32)
    parts = {
        "lora_a": theirs.lora_A["default"].weight,
        "lora_b": theirs.lora_B["default"].weight,
        "m": theirs.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for name, parameter in parts.items():
            parameter.copy_(
                torch.from_numpy(getattr(ours, name)).T if name != "m" else torch.from_numpy(ours.m)
            )
    x, target = normal(rng, 7, IN), normal(rng, 7, OUT)
    y = theirs(torch.from_numpy(x))
    assert relative(ours(x), y.detach().numpy()) < 1e-5
    (y * torch.from_numpy(target)).sum().backward()
    for name, gradient in gradients(ours, ours, x, target).items():
        theirs_by = parts[name].grad.numpy()
        assert relative(gradient, theirs_by.T if name != "m" else theirs_by) < 1e-4, name
