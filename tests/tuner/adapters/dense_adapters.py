"""Adapters over one matrix for tests: over any base, with random factors, computed in float64."""

import numpy as np
from stored_weights import stored

import pyloss
from pyloss import nn, ops
from pyloss.tuner import DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRALinear
from pyloss.weights.weight import Weight

CLASSES = [LoRALinear, DoRALinear, LoRAEmbedding, DoRAEmbedding]


def dense(layer):
    weight = layer.weight
    return (weight.dequantize() if isinstance(weight, Weight) else weight).astype(np.float64)


def make_base(rng, cls, kind, rows=12, columns=64, bias=True):
    """A base layer: "plain" is an array, other kinds are stored formats.

    It has a bias and interleaved rows if it can.
    """
    table = cls.base_name == "embedding"
    head_dim = 0 if table or rows % 4 else 4
    weight = (
        rng.standard_normal((rows, columns)).astype(np.float32)
        if kind == "plain"
        else stored(rng, rows, columns, kind, head_dim)
    )
    if table:
        return nn.Embedding.from_weight(weight)
    return nn.Linear.from_weight(
        weight, rng.standard_normal(rows).astype(np.float32) if bias else None
    )


def trained(rng, cls, base, size=1.0, **options):
    layer = cls.from_base(base, **{"r": 3, "scale": 1.5, **options})
    layer.lora_a[...] = rng.standard_normal(layer.lora_a.shape)
    layer.lora_b[...] = size * rng.standard_normal(layer.lora_b.shape)
    if layer.kind == "dora":
        layer.m *= rng.uniform(0.5, 2, layer.m.shape).astype(np.float32)
    return layer


def parameters(layer):
    return {name: getattr(layer, name).astype(np.float64) for name in layer.parameter_names()}


def adapted(layer, p, norm=None):
    """The weight with the adapter in it; `norm` fixes DoRA's divisor."""
    product = p["lora_a"] @ p["lora_b"]
    weight = dense(layer.base) + layer.scale * (
        product if layer.base_name == "embedding" else product.T
    )
    if layer.kind == "dora":
        weight *= (p["m"] / (np.linalg.norm(weight, axis=1) if norm is None else norm))[:, None]
    return weight


def norms(layer):
    p = parameters(layer)
    product = p["lora_a"] @ p["lora_b"]
    return np.linalg.norm(
        dense(layer.base)
        + layer.scale * (product if layer.base_name == "embedding" else product.T),
        axis=1,
    )


def masked(layer, x, p, mask, norm):
    """The layer's output for rows x, or ids of a table.

    `mask` multiplies the adapter's input, or for a table its result.
    """
    factor = p["m"] / norm if layer.kind == "dora" else np.ones(len(norm))
    if np.issubdtype(np.asarray(x).dtype, np.integer):
        rows = dense(layer.base)[x] + layer.scale * mask * (p["lora_a"][x] @ p["lora_b"])
        return factor[x][..., None] * rows
    a, b = (
        (p["lora_b"].T, p["lora_a"].T)
        if layer.base_name == "embedding"
        else (p["lora_a"], p["lora_b"])
    )
    bias = getattr(layer.base, "bias", None)
    return factor * (x @ dense(layer.base).T + layer.scale * ((x * mask) @ a) @ b) + (
        0 if bias is None else bias
    )


def seeded_mask(layer, shape):
    """Seed the library and return the dropout mask of the layer's next call."""
    pyloss.random.seed(5)
    mask = ops.dropout(np.ones(shape, np.float32), layer.dropout, pyloss.random.next_seed())
    pyloss.random.seed(5)
    return mask.astype(np.float64)
