"""Optimizers and learning-rate schedules.

An optimizer updates the float32 arrays of `model.trainable_parameters()` in place, with one fused
call of the C core for all that have the same rate. A schedule is a function of the number of
updates made so far.
"""

from pyloss.optim.adafactor import Adafactor
from pyloss.optim.adam import Adam, AdamATan2, AdamW
from pyloss.optim.building import OPTIMIZERS, build_optimizer
from pyloss.optim.clipping import clip_grad_norm, clip_scale, grad_norm
from pyloss.optim.ema import EMA
from pyloss.optim.lion import Lion
from pyloss.optim.multi import MultiOptimizer
from pyloss.optim.muon import Muon
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.rows import RowGradient
from pyloss.optim.schedules import (
    SCHEDULES,
    Schedule,
    WarmUp,
    build_schedule,
    cosine_decay,
    exponential_decay,
    join_schedules,
    linear_schedule,
    step_decay,
)
from pyloss.optim.sgd import SGD
from pyloss.optim.signsgd import SparseSignSGD

__all__ = [
    "Optimizer",
    "Adam",
    "AdamW",
    "AdamATan2",
    "Lion",
    "SGD",
    "Muon",
    "Adafactor",
    "MultiOptimizer",
    "SparseSignSGD",
    "RowGradient",
    "EMA",
    "OPTIMIZERS",
    "build_optimizer",
    "Schedule",
    "SCHEDULES",
    "WarmUp",
    "build_schedule",
    "cosine_decay",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "step_decay",
    "clip_grad_norm",
    "clip_scale",
    "grad_norm",
]
