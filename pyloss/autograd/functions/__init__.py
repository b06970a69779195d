"""What carries gradients: NumPy's functions of Tensors, activations, and functions of a user's own.

Importing this room fills the tables of `tensor.py`.
"""

from pyloss.autograd.functions import elementwise, products, reductions, shaping
from pyloss.autograd.functions.activations import (
    gelu,
    log_softmax,
    logsumexp,
    one_hot,
    relu,
    sigmoid,
    silu,
    softmax,
)

__all__ = [
    "elementwise",
    "gelu",
    "log_softmax",
    "logsumexp",
    "one_hot",
    "products",
    "reductions",
    "relu",
    "shaping",
    "sigmoid",
    "silu",
    "softmax",
]
