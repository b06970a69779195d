"""The precision of products by weights, for the whole process: float32, bfloat16 or int8, and by
which of the processor's instructions the latter two are computed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core

PRECISIONS = ("float32", "bfloat16", "mixed", "int8")

#: whether the activations of recorded layers are kept in bfloat16
_keeps_bfloat16 = False


def check_precision(precision: str) -> str:
    """The name of a precision; ValueError for anything else."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"matmul precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}"
        )
    return precision


def set_matmul_precision(precision: str) -> None:
    """Sets the precision of products by weights: "float32" (the default), "bfloat16", "mixed" or
    "int8".

    "bfloat16" holds forward and for the gradient of the input; by tiles for that of weights, too.
    It rounds inputs and weights once to bfloat16 (8 bits) and adds their products in float32. The
    tile unit of some Intel Xeons (`amx_bf16`) computes them where there is one. Elsewhere the
    process measures once which instructions are quickest, and all processors compute the same bits,
    except that bfloat16 instructions take numbers below 2^-126 as 0. The tile unit adds in another
    order (see "Products in bfloat16" in docs/fine_tuning.md). `info()` says what is used and how
    fast it is: with `avx512_bf16`, products took about half the time of float32 on an AMD EPYC (Zen
    4), and more time than float32 on an Intel Xeon.

    It applies to layers of any weight format, experts, output heads and the bases of adapters.
    These stay float32: products of up to 32 rows (4 for the gradient of the input), and devices. So
    do gradients by weights, adapters' own matrices and attention, except by tiles: there the
    gradients by layers' weights and attention are bfloat16, too, unless there are few rows or
    outputs, or a sequence has few queries, as in generation; and a number of an adapter is the sum
    of two bfloat16 numbers.

    "mixed" multiplies as "bfloat16" does. In training, decoder layers also keep in bfloat16 what
    they compute between their residual sums, for the backward pass too, in half the bytes. Residual
    sums, what norms, softmax and losses compute, adapters, their gradients and the optimizer stay
    float32. Layers whose calls cannot be recorded (experts, checkpointing, classes of one's own)
    keep float32.

    "int8" is for generation and evaluation with quantized weights. Each 32 inputs of a row are
    rounded to 8 bits with a scale of their own; their dots with the weights' codes are exact
    integers, which are added in float32. It holds forward, for any number of rows, with the same
    bits on every processor; `info()["int8"]` names the instructions. Float and NF4 weights and
    gradients stay float32. Where the tile unit is used, all products of more than 32 rows,
    gradients and attention are those of "bfloat16".

    ValueError for another name.
    """
    global _keeps_bfloat16
    forms = {"bfloat16": bfloat16_form, "mixed": bfloat16_form, "int8": int8_form}
    name = check_precision(precision)
    _core.set_matmul_precision(forms[name]().setting if name in forms else name)
    _keeps_bfloat16 = name == "mixed"


def get_matmul_precision() -> str:
    """The precision that `set_matmul_precision` set last."""
    return "mixed" if _keeps_bfloat16 else str(_core.matmul_precision()).partition("-")[0]


def keeps_bfloat16() -> bool:
    """Whether recorded layers keep and pass activations in bfloat16, as "mixed" says."""
    return _keeps_bfloat16


def has_instructions() -> bool:
    """Whether the processor and the instruction set in use have bfloat16 dot products."""
    return bool(_core.isa() == "avx512" and _core.has_bf16_dots())


def multiplies_by_tiles() -> bool:
    """Whether products by weights are computed in tiles now."""
    return "-tiles" in _core.matmul_precision()


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Sets the precision within a block; None changes nothing."""
    global _keeps_bfloat16
    before = _core.matmul_precision(), _keeps_bfloat16
    if precision is not None:
        set_matmul_precision(precision)
    try:
        yield
    finally:
        if precision is not None:
            _core.set_matmul_precision(before[0])
            _keeps_bfloat16 = before[1]


class Form(NamedTuple):
    """How products are computed: the core's name, the instructions, and why these."""

    setting: str
    name: str
    reason: str


#: The forms by the core's names, and by the instructions that compute them. The first two give the
#: same bits, and so do the last two.
FORMS = {
    "bfloat16": "avx512_bf16",
    "bfloat16-emulated": "emulated",
    "bfloat16-tiles": "amx_bf16",
    "bfloat16-tiles-emulated": "amx_bf16, emulated",
}


def bfloat16_form(environ: Mapping[str, str] = os.environ) -> Form:
    """The form of bfloat16 products in this process, by the environment, the processor and, between
    forms of the same bits, by measurement.
    """
    order = _variable(environ, "PYLOSS_BF16", ("portable", "tiles"))
    unit = _variable(environ, "PYLOSS_AMX", ("0", "1", "emulate"))
    if order == "portable":
        return _dots("PYLOSS_BF16=portable")
    if unit == "emulate":
        return _emulated_tiles("PYLOSS_AMX=emulate")
    missing = _core.amx_missing(False) or _forbidden(environ, unit) or _core.amx_missing(True)
    if not missing:
        return _measured("bfloat16-tiles", "by the tile unit")
    if order == "tiles":
        return _emulated_tiles(f"PYLOSS_BF16=tiles, and {missing}")
    return _dots(f"no tile unit: {missing}")


def int8_form(environ: Mapping[str, str] = os.environ) -> Form:
    """The form of int8 products in this process, by the environment and the processor."""
    name = _core.int8_dots(_core.isa()) or _core.isa()
    verdict = _verdict(
        "a row's product with 4-bit weights",
        *(_seconds(setting, rows=1) for setting in ("float32", "int8")),
    )
    many = bfloat16_form(environ)
    if many.setting == "bfloat16-tiles":
        return Form("int8-tiles", name, f"{verdict}; more than 32 rows are bfloat16 in tiles")
    return Form("int8", name, verdict)


def _variable(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = environ.get(name, "")
    if value and value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def _forbidden(environ: Mapping[str, str], unit: str) -> str | None:
    """Which setting keeps the tile unit from being used."""
    if environ.get("PYLOSS_NO_AMX", "0") not in ("", "0"):
        return "PYLOSS_NO_AMX is set"
    if unit == "0":
        return "PYLOSS_AMX=0"
    if environ.get("PYLOSS_ISA"):
        return "PYLOSS_ISA is set"
    return None if _core.isa() == "avx512" else f"the instruction set in use is {_core.isa()}"


def _emulated_tiles(why: str) -> Form:
    setting = "bfloat16-tiles-emulated"
    return Form(setting, FORMS[setting], f"{why}; it is for tests, far slower than float32")


def _dots(why: str) -> Form:
    """The quicker of two forms of the same bits."""
    names = ["bfloat16", "bfloat16-emulated"] if has_instructions() else ["bfloat16-emulated"]
    return _measured(min(names, key=lambda name: _seconds(name)), why)


def _measured(setting: str, why: str) -> Form:
    verdict = _verdict("products", _seconds("float32"), _seconds(setting))
    return Form(setting, FORMS[setting], f"{verdict} ({why})")


def _verdict(what: str, float32: float, seconds: float) -> str:
    """How long something takes beside the same in float32."""
    one = not what.endswith("products")
    if seconds <= float32:
        return f"{what} run{'s' * one} {float32 / seconds:.1f} times as fast as float32's"
    times = f"{seconds / float32:.1f} times as long as float32's: it does not pay here"
    return f"{what} take{'s' * one} {times}"


#: Seconds of a product, by instruction set, the core's name of the precision, and rows.
_times: dict[tuple[str, str, int], float] = {}


def _seconds(setting: str, rows: int = 128) -> float:
    """Seconds of a product, the best of a few; measured once, and without a change to what other
    threads compute. What is compared is measured in turn.

    128 rows are multiplied by float weights (12.6 MFLOP), one row by weights of 4 bits.
    """
    isa = _core.isa()
    if (isa, setting, rows) not in _times:
        if rows == 1:
            outputs, inputs, weight = 512, 512, _four_bits(512, 512)
            compared = ["float32"]
        else:
            outputs, inputs = 192, 256
            weight = np.ones((outputs, inputs), np.float32)
            compared = ["float32", "bfloat16-emulated"] + ["bfloat16"] * has_instructions()
        x, y = np.ones((rows, inputs), np.float32), np.empty((rows, outputs), np.float32)
        for name in [*compared, setting] * 5:
            _core.try_matmul_precision(name)
            try:
                seconds = _seconds_once(x, weight, y)
            finally:
                _core.try_matmul_precision(None)
            _times[isa, name, rows] = min(seconds, _times.get((isa, name, rows), seconds))
    return _times[isa, setting, rows]


def _four_bits(rows: int, columns: int) -> Any:
    """The core's handle of a matrix of zeros in Q4_0."""
    code, size = next((i, f[2]) for i, f in enumerate(_core.formats()) if f[0] == "Q4_0")
    return np.zeros(rows * columns // 32 * size, np.uint8), code, rows, columns, 0


def _seconds_once(x: np.ndarray, w: Any, y: np.ndarray) -> float:
    begin = time.perf_counter()
    _core.linear_forward(x, w, None, None, None, 0.0, None, y)
    return time.perf_counter() - begin
