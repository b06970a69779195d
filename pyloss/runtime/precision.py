"""The precision of products by weights, for the whole process: float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyloss import _core

PRECISIONS = ("float32", "bfloat16")


def check_precision(precision: str) -> str:
    """The name of a precision; ValueError for anything else."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"matmul precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}"
        )
    return precision


def set_matmul_precision(precision: str) -> None:
    """Sets the precision of products by weights: "float32" (the default) or "bfloat16".

    It holds forward and for the gradient of the input. "bfloat16" rounds inputs and weights once to
    bfloat16 (8 bits) and adds their products in float32. With `avx512_bf16`, products took about
    half the time on an AMD EPYC (Zen 4), and more time than float32 on an Intel Xeon with
    `amx_bf16`. Other processors compute the same bits with float32 instructions, in up to 1.7 times
    the time of float32 (`info()["bfloat16"]` says which, `pyloss bench` measures it). Only numbers
    below 2^-126 differ, which the instructions take as 0.

    It applies to layers of any weight format, experts, output heads and the bases of adapters.
    These stay float32: products of up to four rows, the adapters' own matrices, gradients by
    weights, attention, and devices. ValueError for another name.
    """
    _core.set_matmul_precision(check_precision(precision))


def get_matmul_precision() -> str:
    """The precision that `set_matmul_precision` set last."""
    return str(_core.matmul_precision())


def has_instructions() -> bool:
    """Whether the processor and the instruction set in use have bfloat16 dot products."""
    return bool(_core.isa() == "avx512" and _core.has_bf16_dots())


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Sets the precision within a block; None changes nothing."""
    before = get_matmul_precision()
    if precision is not None:
        set_matmul_precision(precision)
    try:
        yield
    finally:
        if precision is not None:
            _core.set_matmul_precision(before)
