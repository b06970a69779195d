"""Modules: named parameters, frozen or trained, the plain layers, and gradients of modules."""

from pyloss.nn import init
from pyloss.nn.blocks import Conv1d, Dropout, LayerNorm, MultiHeadAttention, RoPE, Sequential
from pyloss.nn.layers import (
    Embedding,
    Linear,
    Projecting,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSwitchLinear,
    RMSNorm,
    SwitchLinear,
    project_each,
    uniform,
)
from pyloss.nn.module import (
    Module,
    count_parameters,
    plain_parameters,
    recorded_module,
    run_recorded,
    value_and_grad,
)
from pyloss.nn.places import shown

__all__ = [
    "Conv1d",
    "Dropout",
    "LayerNorm",
    "MultiHeadAttention",
    "RoPE",
    "Sequential",
    "init",
    "Embedding",
    "Linear",
    "Module",
    "Projecting",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSwitchLinear",
    "RMSNorm",
    "SwitchLinear",
    "count_parameters",
    "plain_parameters",
    "project_each",
    "recorded_module",
    "run_recorded",
    "shown",
    "uniform",
    "value_and_grad",
]
