"""The precision of products by weights, for the whole process: float32 or bfloat16, and by which of
the processor's instructions bfloat16 is computed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

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
    bfloat16 (8 bits) and adds their products in float32. The tile unit of some Intel Xeons
    (`amx_bf16`) computes them where there is one. Elsewhere the process measures once which
    instructions are quickest, and all processors compute the same bits, except that bfloat16
    instructions take numbers below 2^-126 as 0. The tile unit adds in another order (see "Products
    in bfloat16" in docs/fine_tuning.md). `info()` says what is used and how fast it is: with
    `avx512_bf16`, products took about half the time of float32 on an AMD EPYC (Zen 4), and more
    time than float32 on an Intel Xeon.

    It applies to layers of any weight format, experts, output heads and the bases of adapters.
    These stay float32: products of up to 32 rows (4 for the gradient of the input), gradients by
    weights, and devices. So do adapters' own matrices and attention, except by tiles: there
    attention is bfloat16, too, unless a sequence has few queries, as in generation, and a number of
    an adapter is the sum of two bfloat16 numbers. ValueError for another name.
    """
    name = check_precision(precision)
    _core.set_matmul_precision(name if name == "float32" else bfloat16_form().setting)


def get_matmul_precision() -> str:
    """The precision that `set_matmul_precision` set last."""
    return str(_core.matmul_precision()).partition("-")[0]


def has_instructions() -> bool:
    """Whether the processor and the instruction set in use have bfloat16 dot products."""
    return bool(_core.isa() == "avx512" and _core.has_bf16_dots())


def multiplies_by_tiles() -> bool:
    """Whether products by weights are computed in tiles now."""
    return str(_core.matmul_precision()).startswith("bfloat16-tiles")


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Sets the precision within a block; None changes nothing."""
    before = _core.matmul_precision()
    if precision is not None:
        set_matmul_precision(precision)
    try:
        yield
    finally:
        if precision is not None:
            _core.set_matmul_precision(before)


class Form(NamedTuple):
    """How bfloat16 products are computed: the core's name, the instructions, and why these."""

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
    speed = _seconds("float32") / _seconds(setting)
    verdict = f"products run {speed:.1f} times as fast as float32's"
    if speed < 1:
        verdict = f"products take {1 / speed:.1f} times as long as float32's: it does not pay here"
    return Form(setting, FORMS[setting], f"{verdict} ({why})")


#: Seconds of a product, by instruction set and the core's name of the precision.
_times: dict[tuple[str, str], float] = {}


def _seconds(setting: str) -> float:
    """Seconds of a product of 12.6 MFLOP, the best of a few; measured once, and without a change to
    what other threads compute. What is compared is measured in turn.
    """
    isa = _core.isa()
    if (isa, setting) not in _times:
        x, w = np.ones((128, 256), np.float32), np.ones((192, 256), np.float32)
        y = np.empty((128, 192), np.float32)
        compared = ["float32", "bfloat16-emulated", *(["bfloat16"] if has_instructions() else [])]
        for name in [*compared, setting] * 5:
            _core.try_matmul_precision(name)
            try:
                seconds = _seconds_once(x, w, y)
            finally:
                _core.try_matmul_precision(None)
            _times[isa, name] = min(seconds, _times.get((isa, name), seconds))
    return _times[isa, setting]


def _seconds_once(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> float:
    begin = time.perf_counter()
    _core.linear_forward(x, w, None, None, None, 0.0, None, y)
    return time.perf_counter() - begin
