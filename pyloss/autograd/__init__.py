"""The tape and checkpointing: differentiable values and gradients of functions."""

from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.differentiation import grad, value_and_grad
from pyloss.autograd.tape import Tensor, data, keep, no_grad, record, recording

__all__ = [
    "Tensor",
    "checkpoint",
    "data",
    "grad",
    "keep",
    "no_grad",
    "record",
    "recording",
    "value_and_grad",
]
