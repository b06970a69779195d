"""mlx.optimizers over pyloss's kernels, with MLX's defaults: Adam without bias correction."""

from pyloss.mlx.core.refused import refusing
from pyloss.mlx.optimizers import schedulers
from pyloss.mlx.optimizers.base import MultiOptimizer, Optimizer
from pyloss.mlx.optimizers.fused import SGD, Adam, AdamW, Lion, Muon
from pyloss.mlx.optimizers.others import AdaDelta, Adafactor, Adagrad, Adamax, RMSprop
from pyloss.mlx.optimizers.schedulers import (
    clip_grad_norm,
    cosine_decay,
    exponential_decay,
    join_schedules,
    linear_schedule,
    step_decay,
)

__getattr__ = refusing("optimizers")

__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "clip_grad_norm",
    "cosine_decay",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "schedulers",
    "step_decay",
]
