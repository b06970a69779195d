"""Arithmetic on float32 arrays in the core: what the tape computes of NumPy's functions.

A function returns None where the core has nothing for its arguments (another type, layout or
shape); the caller then uses NumPy, whose errors are those that a user knows. Arguments are
C-contiguous float32 ndarrays, or arrays of one device. Results are new arrays.
"""

from pyloss.arithmetic.elementwise import (
    BINARY,
    GRADIENT_READS,
    UNARY,
    binary,
    scaled,
    unary,
    unary_grad,
)
from pyloss.arithmetic.products import batched_product, summed_product

__all__ = [
    "BINARY",
    "GRADIENT_READS",
    "UNARY",
    "batched_product",
    "binary",
    "scaled",
    "summed_product",
    "unary",
    "unary_grad",
]
