"""The tape: differentiable values, gradients of functions, checkpoints."""

from pyloss.autograd import functions
from pyloss.autograd.checkpointing import checkpoint
from pyloss.autograd.custom import custom_function, stop_gradient
from pyloss.autograd.differentiation import grad, value_and_grad, vjp
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data, keep, record, recording
from pyloss.autograd.tensor import Tensor

__all__ = [
    "Tensor",
    "checkpoint",
    "custom_function",
    "data",
    "functions",
    "grad",
    "keep",
    "no_grad",
    "record",
    "recording",
    "stop_gradient",
    "value_and_grad",
    "vjp",
]
