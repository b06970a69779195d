"""Layers of experts and their adapters against mlx-lm's: outputs and gradients."""

import numpy as np
import pytest
from parity_models import relative

from pyloss import nn, ops
from pyloss.models.moe import SparseMoe, SwitchGLU
from pyloss.tuner import LoRASwitchLinear
from pyloss.weights.stack import WeightStack

mx = pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")
pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")
mlx_nn = pytest.importorskip("mlx.nn")

N, HIDDEN, INNER, EXPERTS, K = 40, 64, 96, 6, 2


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def normal(rng, *shape, size=1.0):
    return (size * rng.standard_normal(shape)).astype(np.float32)


def sorted_rows(rng):
    """(rows [M, hidden] sorted by expert, offsets, the expert of each row)."""
    experts = np.sort(rng.integers(0, EXPERTS - 1, N))  # the last expert has no rows
    offsets = np.concatenate(([0], np.cumsum(np.bincount(experts, minlength=EXPERTS)))).astype(
        np.int32
    )
    return normal(rng, N, HIDDEN), offsets, experts


@pytest.mark.parametrize("stored", ["float32", "8 bits"])
def test_switch_linear_and_its_adapter(rng, stored):
    from mlx_lm.models import switch_layers
    from mlx_lm.tuner.lora import LoRASwitchLinear as Theirs

    x, offsets, experts = sorted_rows(rng)
    theirs = switch_layers.SwitchLinear(HIDDEN, INNER, EXPERTS)
    theirs.weight, theirs.bias = (
        mx.array(normal(rng, EXPERTS, INNER, HIDDEN)),
        mx.array(normal(rng, EXPERTS, INNER)),
    )
    weight = np.array(theirs.weight)
    if stored == "8 bits":
        theirs = theirs.to_quantized(group_size=64, bits=8)
        weight = WeightStack.quantize(
            np.array(
                mx.dequantize(theirs.weight, theirs.scales, theirs.biases, group_size=64, bits=8)
            ),
            "f32",
        )
    ours = nn.SwitchLinear.from_weight(weight, np.array(theirs.bias))
    rows, indices = mx.array(x)[:, None, None, :], mx.array(experts.astype(np.int32))[:, None]
    assert relative(ours(x, offsets), np.array(theirs(rows, indices))[:, 0, 0]) < 1e-5

    theirs, ours = (
        Theirs.from_base(theirs, r=5, scale=3.0),
        LoRASwitchLinear.from_base(ours, r=5, scale=3.0),
    )
    assert theirs.lora_a.shape == ours.lora_a.shape and theirs.lora_b.shape == ours.lora_b.shape
    ours.lora_b[...] = normal(rng, *ours.lora_b.shape)
    theirs.lora_a, theirs.lora_b = mx.array(ours.lora_a), mx.array(ours.lora_b)
    assert relative(ours(x, offsets), np.array(theirs(rows, indices))[:, 0, 0]) < 1e-5
    theirs.linear.freeze()
    target = normal(rng, N, INNER)

    def their_loss(model):
        return (model(rows, indices)[:, 0, 0] * mx.array(target)).sum()

    _, their_grads = mlx_nn.value_and_grad(theirs, their_loss)(theirs)
    _, grads = nn.value_and_grad(ours, lambda: (ours(x, offsets) * target).sum())()
    assert sorted(grads) == ["lora_a", "lora_b"]
    for name, grad in grads.items():
        assert relative(grad, np.array(their_grads[name])) < 1e-4
    if stored == "float32":
        np.testing.assert_allclose(
            ours.fuse().weight, np.array(theirs.fuse().weight), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("normalise", [True, False])
def test_a_whole_block(rng, normalise):
    """Router, experts and input gradient of OLMoE's block in mlx-lm."""
    from mlx_lm.models import olmoe

    arguments = {
        "model_type": "olmoe",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 8,
    }
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": K,
    }
    theirs = olmoe.OlmoeSparseMoeBlock(
        olmoe.ModelArgs(**arguments, **sizes, norm_topk_prob=normalise)
    )
    gate = normal(rng, EXPERTS, HIDDEN, size=0.3)
    names = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    weights = {name: normal(rng, EXPERTS, *shape, size=0.15) for name, shape in names.items()}
    theirs.gate.weight = mx.array(gate)
    for name, weight in weights.items():
        getattr(theirs.switch_mlp, name).weight = mx.array(weight)
    experts = SwitchGLU(*(nn.SwitchLinear.from_weight(weights[name]) for name in names))
    ours = SparseMoe(nn.Linear.from_weight(gate), experts, K, normalise)
    x, target = normal(rng, N, HIDDEN), normal(rng, N, HIDDEN)
    assert relative(ours(x), np.array(theirs(mx.array(x)[None]))[0]) < 1e-5

    before = nn.RMSNorm(HIDDEN)
    model = nn.Module()
    model.before, model.block = before, ours
    _, grads = nn.value_and_grad(model, lambda: (ours(before(x)) * target).sum())()

    norm = mlx_nn.RMSNorm(HIDDEN, eps=before.eps)
    their_model = mlx_nn.Sequential(norm, theirs)
    _, their_grads = mlx_nn.value_and_grad(
        their_model, lambda m: (m(mx.array(x)[None])[0] * mx.array(target)).sum()
    )(their_model)
    first, block = their_grads["layers"]
    assert relative(grads["before.weight"], np.array(first["weight"])) < 1e-4
    assert relative(grads["block.gate.weight"], np.array(block["gate"]["weight"])) < 1e-4
    for name in names:
        assert (
            relative(
                grads[f"block.switch_mlp.{name}.weight"],
                np.array(block["switch_mlp"][name]["weight"]),
            )
            < 1e-4
        )


def test_routing_of_mixtral(rng):
    """Its softmax over the chosen logits equals the normalized softmax over all."""
    logits = normal(rng, N, EXPERTS)
    routing, weights = ops.route(logits, K, True)
    gates = mx.array(logits)
    indices = mx.argpartition(-gates, kth=K - 1, axis=-1)[..., :K]
    scores = np.array(mx.softmax(mx.take_along_axis(gates, indices, axis=-1), axis=-1))
    order = np.argsort(np.array(indices), axis=1)
    np.testing.assert_allclose(
        weights[routing.visits], np.take_along_axis(scores, order, 1), rtol=1e-5
    )
