"""The differentiable operations of models."""

from pyloss.ops.experts import Routing, combine, dispatch, expert_project, route, scale_rows
from pyloss.ops.layers import (
    adapted_embedding,
    add,
    append,
    attention,
    dropout,
    embedding,
    gather_rows,
    geglu,
    rms_norm,
    rope,
    rope_all,
    scale,
    swiglu,
    transposed,
)
from pyloss.ops.projection import Projection, linear, lora_linear, project, project_all

__all__ = [
    "Projection",
    "Routing",
    "adapted_embedding",
    "add",
    "attention",
    "combine",
    "dispatch",
    "dropout",
    "embedding",
    "expert_project",
    "gather_rows",
    "geglu",
    "append",
    "linear",
    "lora_linear",
    "project",
    "project_all",
    "rms_norm",
    "rope",
    "rope_all",
    "route",
    "scale",
    "scale_rows",
    "swiglu",
    "transposed",
]
