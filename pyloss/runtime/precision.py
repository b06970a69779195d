"""How dense layers multiply, for the whole process: in float32, or with operands rounded to bfloat16."""

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
    """Sets how layers multiply by their weights, forward and for the gradient of their input: "float32" (at first) or "bfloat16".

    "bfloat16" rounds inputs and weights, once each, to bfloat16 (8 bits), and adds their products in float32. With
    `avx512_bf16` products took about half the time on an AMD EPYC (Zen 4), and more time than in float32 on an Intel Xeon with
    `amx_bf16`; other processors compute the same numbers to the bit with float32 instructions, and take up to 1.7 times as
    long as in float32 (`info()["bfloat16"]` says which, `pyloss bench` measures it). Only numbers below 2^-126 differ: the
    instructions take them as 0.

    It is for layers of any weight format, their adapters' bases, experts and output heads. Float32 stay: products of up to four
    rows, adapters' own matrices, gradients by weights, attention, and what runs on a device. ValueError for another name.
    """
    _core.set_matmul_precision(check_precision(precision))


def get_matmul_precision() -> str:
    """What `set_matmul_precision` was last told."""
    return str(_core.matmul_precision())


def has_instructions() -> bool:
    """Whether the processor, and the instruction set in use, have dot products of bfloat16."""
    return bool(_core.isa() == "avx512" and _core.has_bf16_dots())


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """That precision within a block; None changes nothing."""
    before = get_matmul_precision()
    if precision is not None:
        set_matmul_precision(precision)
    try:
        yield
    finally:
        if precision is not None:
            _core.set_matmul_precision(before)
