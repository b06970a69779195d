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
    where,
)
from pyloss.arithmetic.products import batched_product, summed_product
from pyloss.arithmetic.reductions import (
    REDUCTIONS,
    ROW_MAPS,
    cumsum,
    expanded,
    extreme_grad,
    logsumexp_grad,
    reduced,
    row_map,
    row_map_grad,
    summed_to,
)

__all__ = [
    "BINARY",
    "GRADIENT_READS",
    "REDUCTIONS",
    "ROW_MAPS",
    "UNARY",
    "batched_product",
    "binary",
    "cumsum",
    "expanded",
    "extreme_grad",
    "logsumexp_grad",
    "reduced",
    "row_map",
    "row_map_grad",
    "scaled",
    "summed_product",
    "summed_to",
    "unary",
    "unary_grad",
    "where",
]
