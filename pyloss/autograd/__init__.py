"""The tape and checkpointing: differentiable values and gradients of functions."""

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
