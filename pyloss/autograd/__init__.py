"""The tape: differentiable values, gradients of functions, and functions that run a second time for their gradient."""

from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.tape import (
    Tensor,
    data,
    grad,
    keep,
    no_grad,
    record,
    recording,
    value_and_grad,
)

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
