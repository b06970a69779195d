"""Scaling of rotary positions for longer texts: its kinds, and their numbers in both formats."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.tensor_file import StoredTensor
from pyloss.models.config.known_keys import refuse_rope_keys
from pyloss.models.config.values import TEXT, Kind, Values, float32, real

# The numbers of each kind. Those of yarn that follow from others are always written out.
KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    ),
    "proportional": ("partial_rotary_factor",),
    "longrope": (
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}
# Numbers that are lists, with a divisor for each rotary frequency.
_LISTS = ("short_factor", "long_factor")
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def rotary_frequencies(
    theta: float, head_dim: int, scaling: Mapping[str, Any] | None, long: bool = False
) -> tuple[np.ndarray, float]:
    """Each pair's angle per position, float64 [head_dim / 2], and the scale of cos and sin.

    `head_dim` is the part of a head that rotates. `long`: longrope's frequencies for sequences that
    are longer than the original length.
    """
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    kind = scaling["rope_type"] if scaling else None
    if scaling is None or kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "proportional":
        rotated = int(scaling["partial_rotary_factor"] * head_dim // 2)
        return np.where(np.arange(len(plain)) < rotated, plain, 0.0), 1.0
    if kind == "llama3":
        return plain / llama3_factors(scaling, theta, head_dim), 1.0
    if kind == "longrope":
        factors = scaling["long_factor" if long else "short_factor"]
        return plain / np.array(factors, np.float64), scaling["attention_factor"]
    # Pairs that turn beta_fast times in the original length keep their frequency; pairs that turn
    # less than beta_slow times are slowed by the factor; in between the two are blended
    # (Peng et al., arXiv:2309.00071).
    length = scaling["original_max_position_embeddings"]
    first, last = (
        head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    slowed = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (slowed / scaling["factor"] + 1 - slowed), scaling["attention_factor"]


def long_from(scaling: Mapping[str, Any] | None) -> int | None:
    """The longest sequence whose positions longrope scales by its short factors, else None.

    All positions of a longer sequence are scaled by the long factors. (Ding et al.,
    arXiv:2402.13753)
    """
    if scaling is None or scaling["rope_type"] != "longrope":
        return None
    return int(scaling["original_max_position_embeddings"])


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Llama 3's divisors of the rotary frequencies, float64 [head_dim / 2]."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    # High frequencies stay, low ones are divided by the factor, those between are blended.
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def check_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raises ValueError unless `scaling` is None or a known kind with all its numbers."""
    if scaling is None:
        return
    keys = KEYS.get(scaling.get("rope_type", ""))
    if keys is None or set(scaling) != {"rope_type", *keys}:
        raise ValueError(
            f"rope_scaling must be None or of type {' or '.join(KEYS)} with its keys, got {scaling}"
        )
    numbers = [scaling[key] for key in keys if key not in _LISTS]
    numbers += [number for key in keys if key in _LISTS for number in scaling[key]]
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"rope_scaling must hold positive finite numbers, got {scaling}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in keys and not scaling[low] < scaling[high]:
            raise ValueError(f"rope_scaling's {low} must be below its {high}, got {scaling}")


# Far beyond the last position that tables are made for.
_LAST_POSITION = 2.0**31


def check_rotary(theta: float, head_dim: int, scaling: Mapping[str, Any] | None) -> None:
    """Raises ValueError if the angles, or the scale of cos and sin, are not finite."""
    for key in _LISTS:
        if scaling and key in scaling and len(scaling[key]) != head_dim // 2:
            raise ValueError(
                f"rope_scaling's {key} has {len(scaling[key])} numbers for "
                f"{head_dim // 2} rotary frequencies"
            )
    try:
        with np.errstate(all="ignore"):
            frequencies, scale = rotary_frequencies(theta, head_dim, scaling)
            finite = np.isfinite(frequencies * _LAST_POSITION).all() and np.isfinite(
                np.float32(scale)
            )
    except (ArithmeticError, ValueError):  # logarithms and divisions of yarn
        finite = False
    if not finite:
        kind = f"with {dict(scaling)}" if scaling else "alone"
        raise ValueError(f"rope_theta {theta} {kind} gives rotary angles that are not finite")


def read_hf_scaling(
    path: str | os.PathLike[str],
    scaling: Mapping[str, Any],
    original: float | None,
    longest: int,
    longrope: bool = False,
) -> dict[str, Any] | None:
    """Read the object under `rope_scaling` or `rope_parameters` of config.json.

    As in transformers, the length before scaling is `original`, from the configuration itself, else
    that of `scaling`, else `longest`, max_position_embeddings. `longrope`: the family has this kind
    alone, whose older names are su and yarn.
    """
    names = Values(
        path,
        scaling,
        {"rope_type": TEXT, "type": TEXT},
        {"rope_type": None, "type": "default"},
    )
    kind = names["type"] if names["rope_type"] is None else names["rope_type"]
    if kind == "default":
        return None
    if longrope and kind in ("su", "yarn"):
        kind = "longrope"
    kinds = [known for known in KEYS if (known == "longrope") == longrope]
    if kind not in kinds:
        raise ValueError(
            f"{path}: rope_type {shown(kind)} is not supported; "
            f"supported are default, {', '.join(kinds)}"
        )
    if kind == "longrope":
        return _read_hf_longrope(path, scaling, original, longest)
    scales = _YARN_SCALES if kind == "yarn" else ()
    known = {*scales, *(key for keys in KEYS.values() for key in keys)}
    refuse_rope_keys(path, scaling, known - {"partial_rotary_factor"} | {*KEYS[kind]})
    defaults = {**_YARN, "attention_factor": None, "original_max_position_embeddings": longest}
    if kind == "proportional":
        defaults["partial_rotary_factor"] = 1.0
        if scaling.get("factor") not in (None, 1):
            raise names.unsupported(f"factor {shown(scaling['factor'])} of proportional", "1")
    numbers = dict(Values(path, scaling, dict.fromkeys(KEYS[kind], real), defaults))
    if kind == "yarn" and numbers["attention_factor"] is None:
        read = Values(path, scaling, dict.fromkeys(scales, real), dict.fromkeys(scales))
        numbers["attention_factor"] = _attention_factor(numbers["factor"])
        if all(read.values()):
            over, under = (_attention_factor(numbers["factor"], read[key]) for key in scales)
            numbers["attention_factor"] = over / under
    if "original_max_position_embeddings" in numbers:
        length = numbers["original_max_position_embeddings"] if original is None else original
        numbers["original_max_position_embeddings"] = (
            int(length) if length == int(length) else length
        )
    return {"rope_type": kind, **numbers}


def _read_hf_longrope(
    path: str | os.PathLike[str], scaling: Mapping[str, Any], original: float | None, longest: int
) -> dict[str, Any]:
    refuse_rope_keys(path, scaling, {*KEYS["longrope"], "factor", *_MSCALES})
    kinds: dict[str, Kind] = dict.fromkeys(_LISTS, _numbers)
    kinds |= dict.fromkeys(("factor", "attention_factor", "original_max_position_embeddings"), real)
    numbers = ("factor", "attention_factor", "original_max_position_embeddings")
    read = Values(path, scaling, kinds, dict.fromkeys(numbers))
    said = read["original_max_position_embeddings"]
    length = next(each for each in (original, said, float(longest)) if each is not None)
    factor = longest / length if read["factor"] is None else read["factor"]
    attention_factor = read["attention_factor"]
    if attention_factor is None:
        attention_factor = longrope_factor(factor, length)
    return {
        "rope_type": "longrope",
        "short_factor": read["short_factor"],
        "long_factor": read["long_factor"],
        "original_max_position_embeddings": int(length) if length == int(length) else length,
        "attention_factor": attention_factor,
    }


# Keys of some published configurations that transformers ignores.
_MSCALES = ("short_mscale", "long_mscale")


def _numbers(value: Any) -> list[float]:
    if type(value) is not list:
        raise TypeError(f"expected a list of numbers, got {shown(value)}")
    return [real(number) for number in value]


def longrope_factor(factor: float, original: float) -> float:
    """longrope's scale of cos and sin for a context that is `factor` times the original one."""
    if factor <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _attention_factor(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


# Numbers of yarn in whose place an attention_factor is kept.
_YARN_SCALES = ("mscale", "mscale_all_dim")


def _mscale_all_dim(scaling: Mapping[str, Any]) -> float | None:
    """The mscale_all_dim of yarn's attention_factor, beside the mscale 1; 0: yarn's own factor.

    None if no number gives that factor.
    """
    factor, own = scaling["attention_factor"], _attention_factor(scaling["factor"])
    if math.isclose(factor, own, rel_tol=1e-6):
        return 0.0
    if scaling["factor"] <= 1 or own < factor:
        return None
    return (own / factor - 1) / (own - 1)


def yarn_for_mlx(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """`scaling` with mscale and mscale_all_dim for yarn: mlx-lm reads no attention_factor."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return scaling
    return {**scaling, "mscale": 1.0, "mscale_all_dim": _mscale_all_dim(scaling) or 0.0}


#: The name under `rope.scaling.` of yarn's mscale_all_dim, which llama.cpp reads for mistral3.
GGUF_ALL_DIM = "yarn_log_multiplier"
# The names under `rope.scaling.` in GGUF of yarn's numbers.
_GGUF_YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def read_gguf_scaling(
    read: Values, factors: StoredTensor | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Read a GGUF file's metadata, and its tensor `rope_freqs.weight` if it has one."""
    at = "rope.scaling"
    # As in llama.cpp: a factor without a type is linear, scale_linear is an older name of the
    # factor, and 0 means none.
    kind = "linear" if read[f"{at}.type"] is None else read[f"{at}.type"]
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{read.path}: {read.prefix}{at}.type {shown(kind)} is not supported; "
            "supported are none, linear, yarn"
        )
    factors_said = (read[f"{at}.factor"], read["rope.scale_linear"], 0.0)
    factor = next(said for said in factors_said if said is not None)
    if kind == "yarn" and not factor:
        raise read.wrong(f"{at}.factor", "this key is missing")
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    _refuse_yarn_options(read, at, kind, factor)
    if factors is not None:
        if kind != "none":
            where = f"{read.prefix}{at}.type {shown(kind)} beside {factors.name}"
            raise read.unsupported(where)
        return _read_llama3(read.path, factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    original = read[f"{at}.original_context_length"]
    betas = {key: read[f"{at}.{name}"] for key, name in _GGUF_YARN.items()}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": (
            read["context_length"] if original is None else original
        ),
        **{key: _YARN[key] if value is None else value for key, value in betas.items()},
        "attention_factor": _gguf_attention_factor(read, factor),
    }


def _gguf_attention_factor(read: Values, factor: float) -> float:
    if factor <= 0:
        return 0.0
    all_dim = read.get(f"rope.scaling.{GGUF_ALL_DIM}") or 0.0
    return _attention_factor(factor) / (_attention_factor(factor, all_dim) if all_dim else 1.0)


def read_gguf_longrope(
    read: Values, short: StoredTensor | None, long: StoredTensor | None, pairs: int
) -> dict[str, Any] | None:
    """The longrope of a GGUF file, whose factors are two tensors; None if it has neither.

    The other scalings of GGUF are refused.
    """
    at = "rope.scaling"
    kind = read[f"{at}.type"]
    if kind not in (None, "none", "longrope") or read[f"{at}.factor"] not in (None, 0.0, 1.0):
        raise read.unsupported(f"{read.prefix}{at}.type {shown(kind or 'linear')}", "longrope")
    if short is None or long is None:
        found, name = (long, "rope_factors_short.weight") if short is None else (short, "")
        if found is not None:
            lacks = name or "rope_factors_long.weight"
            raise FormatError(read.path, lacks, f"this tensor is missing beside {found.name}")
        if kind == "longrope":
            raise FormatError(read.path, "rope_factors_long.weight", "this tensor is missing")
        _refuse_yarn_options(read, at, "none", 1.0)
        return None
    for tensor in (short, long):
        if tensor.shape != (pairs,):
            raise FormatError(
                read.path, tensor.name, f"has shape {tensor.shape}, where rotary pairs are {pairs}"
            )
    original, factor = read[f"{at}.original_context_length"], read[f"{at}.attn_factor"]
    original = read["context_length"] if original is None else original
    return {
        "rope_type": "longrope",
        **{
            key: [float32(number) for number in tensor.array()]
            for key, tensor in (("short_factor", short), ("long_factor", long))
        },
        "original_max_position_embeddings": original,
        "attention_factor": 1.0 if factor is None else factor,
    }


def _refuse_yarn_options(read: Values, at: str, kind: str, factor: float) -> None:
    """Raises ValueError for factors of yarn that differ from those that llama.cpp assumes.

    Its converter writes attention_factor as yarn_attn_factor, which llama.cpp itself does not read.
    """
    extrapolated = (-1.0, 1.0) if kind == "yarn" else (-1.0, 0.0)
    own = (float(str(np.float32(_attention_factor(factor)))),) if kind == "yarn" else ()
    for name, neutral in (
        ("attn_factor", (1.0,)),
        ("yarn_attn_factor", (1.0, *own)),
        ("yarn_ext_factor", extrapolated),
    ):
        value = read[f"{at}.{name}"]
        if value is not None and value not in neutral:
            allowed = " or ".join(f"{each:g}" for each in neutral)
            raise read.unsupported(f"{read.prefix}{at}.{name} {value}", allowed)


def _read_llama3(
    path: str | os.PathLike[str], factors: StoredTensor, theta: float, head_dim: int
) -> dict[str, Any]:
    """Llama 3's four numbers, recovered from the stored frequency factors and checked."""
    stored = factors.array()
    if not (np.isfinite(stored) & (stored > 0)).all():
        raise FormatError(
            path, factors.name, "these are rotary factors, and some are not positive or not finite"
        )
    same = False
    if stored.shape == (head_dim // 2,):
        with np.errstate(all="ignore"):  # damaged numbers are not close to anything
            try:
                guess = _llama3_scaling(stored.astype(np.float64), theta, head_dim)
                same = np.allclose(stored, llama3_factors(guess, theta, head_dim), 1e-3)
            except (ArithmeticError, ValueError):  # a length that is no finite number
                same = False
    if not same:
        raise FormatError(
            path,
            factors.name,
            "these are not the rotary factors of Llama 3, the only ones supported",
        )
    return guess


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that made `factors`, given the frequency factors of the published models."""
    low, high, factor, original = 1.0, 4.0, float32(factors.max()), 8192
    blended = np.flatnonzero((factors > 1.001) & (factors < 0.999 * factor))
    if len(blended) and blended[0] < head_dim // 2:
        wavelength = 2 * math.pi * theta ** (2 * blended[0] / head_dim)
        smooth = (1 / factors[blended[0]] - 1 / factor) / (1 - 1 / factor)
        original = round(wavelength * (low + smooth * (high - low)))
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def gguf_scaling(scaling: Mapping[str, Any] | None, all_dim: bool = False) -> dict[str, Any]:
    """`scaling` as GGUF metadata, without the architecture's name.

    `all_dim`: llama.cpp reads `GGUF_ALL_DIM` for this architecture.

    Llama 3's scaling and a proportional one are a tensor instead, see `llama3_factors` and
    `gemma4.rotary_divisors`; longrope's factors are two.
    Raises ValueError for an attention_factor other than the one that follows from the factor.
    """
    if scaling is None or scaling["rope_type"] in ("llama3", "proportional"):
        return {}
    if scaling["rope_type"] == "longrope":
        return {
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": float(scaling["attention_factor"]),
        }
    values = {"type": scaling["rope_type"], "factor": float(scaling["factor"])}
    if scaling["rope_type"] == "yarn":
        said = _mscale_all_dim(scaling)
        if said and all_dim:
            values[GGUF_ALL_DIM] = said
        elif said != 0:
            raise ValueError(
                f"attention_factor {scaling['attention_factor']} of yarn cannot be written: "
                "llama.cpp has its own"
            )
        values["original_context_length"] = scaling["original_max_position_embeddings"]
        values |= {name: float(scaling[key]) for key, name in _GGUF_YARN.items()}
    return {f"rope.scaling.{key}": value for key, value in values.items()}
