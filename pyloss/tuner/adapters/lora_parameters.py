"""What a LoRA config says: rank and scale of each adapter, dropout, which layers get one, and how adapters begin."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from pyloss.checks.numbers import LARGEST, real, shown
from pyloss.errors import nearest
from pyloss.tuner.adapters.selection import inner_name

log = logging.getLogger("pyloss")

#: The keys of a config. mlx-lm has the first four.
KEYS = (
    "rank",
    "scale",
    "dropout",
    "keys",
    "alpha",
    "rslora",
    "rank_pattern",
    "init",
    "loftq_model",
)
INITS = ("default", "pissa", "loftq")

#: PEFT's names for what is named otherwise here
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "keys",
    "init_lora_weights": "init",
}


@dataclass(frozen=True)
class AdapterSettings:
    """A config that has been understood: `scale` multiplies the product of `lora_a` and `lora_b`, whatever it was given as.

    With `alpha` it is that of layers of the rank `rank`, and layers of other ranks have their own.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init: str = "default"
    loftq_model: str | None = None
    alpha: float | None = None
    rslora: bool = False

    def scale_of(self, name: str) -> float:
        """The scale of the adapter over the layer of that full name."""
        return (
            self.scale
            if self.alpha is None
            else _scale(self.alpha, self.rank_of(name), self.rslora)
        )

    def rank_of(self, name: str) -> int:
        """The rank of the adapter over the layer of that full name."""
        return self.rank_pattern.get(name, self.rank_pattern.get(inner_name(name)[0], self.rank))

    def stored(self) -> dict[str, Any]:
        """`lora_parameters` of adapter_config.json. The rank is that of the matrices in the file; see `Adapter.settled`."""
        factor = 2 if self.init == "pissa" else 1
        found: dict[str, Any] = {
            "rank": factor * int(self.rank),
            "scale": self.scale,
            "dropout": self.dropout,
        }
        if self.keys is not None:
            found["keys"] = list(self.keys)
        if self.rank_pattern:
            found["rank_pattern"] = {
                name: factor * rank for name, rank in self.rank_pattern.items()
            }
        if self.init != "default":
            found["init"] = self.init
        return found


def adapter_settings(config: Mapping[str, Any]) -> AdapterSettings:
    """The settings in a LoRA config: `rank`, and `scale` or `alpha`, and what else is wanted of

    - `scale`: factor of the adapters' product, as in mlx-lm; or `alpha`, as in PEFT: scale = alpha / rank, and with `rslora`
      scale = alpha / sqrt(rank) (arXiv:2312.03732). Where both are, as in older files of mlx-lm's, scale counts;
    - `dropout` (0), `keys` (names of layers; None for all);
    - `rank_pattern`: ranks of some layers by name, for which alpha gives scales of their own;
    - `init`: "default" (A uniform, B zero), "pissa" or "loftq" (see `initial.py`), which needs the float model, `loftq_model`.

    Raises ValueError for keys that are unknown, missing, or contradict each other, and for numbers out of
    range, TypeError for what is no number.
    Ranks are checked by the adapters, which know how large they may be.
    """
    for key in config:
        if key not in KEYS:
            near = PEFT_NAMES.get(key) or nearest(str(key), KEYS)
            ask = f": did you mean {near!r}?" if near else ";"
            raise ValueError(
                f"unknown key {key!r} in the LoRA config{ask} known are {', '.join(KEYS)}"
            )
    given = {key: value for key, value in config.items() if value is not None}
    if "rank" not in given:
        raise ValueError(f"the LoRA config needs 'rank'; it has {sorted(given)}")
    if not ("scale" in given or "alpha" in given):
        raise ValueError(
            f"the LoRA config needs 'scale', or 'alpha', which is scale times rank; it has {sorted(given)}"
        )
    for key in ("scale", "alpha"):
        if key in given:
            real(given[key], key)
    pattern, keys = given.get("rank_pattern", {}), given.get("keys", ())
    if not isinstance(pattern, Mapping):
        raise TypeError(
            f"rank_pattern is {shown(pattern)}; it must be a mapping of layer names to ranks"
        )
    keys = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, str) else keys
    if not isinstance(keys, list) or not all(isinstance(name, str) for name in keys):
        raise TypeError(f"keys is {shown(keys)}; it must be a list of layer names")
    rank, pattern, init = given["rank"], dict(pattern), given.get("init", "default")
    if "scale" in given and "alpha" in given and not given.get("rslora"):
        log.warning(
            "the LoRA config has scale %s and alpha %s: scale is used, as in mlx-lm",
            given["scale"],
            given.pop("alpha"),
        )
    if given.get("rslora") and "scale" in given:
        raise ValueError(
            "rslora divides alpha by the square root of the rank: the LoRA config must give 'alpha', not 'scale'"
        )
    if init not in INITS:
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
    if (init == "loftq") != ("loftq_model" in given):
        raise ValueError(
            "init 'loftq' and loftq_model, the float model that the base was quantised from, go together"
        )
    if init == "pissa" and given.get("dropout"):
        raise ValueError(
            "init 'pissa' needs dropout 0: dropout would drop the base's principal part, with which adapters begin"
        )
    alpha, rslora = given.get("alpha"), bool(given.get("rslora"))
    scale = given["scale"] if alpha is None else _scale(alpha, rank, rslora)
    dropout = real(given.get("dropout", 0.0), "dropout", 0, below=1)
    names = tuple(keys) if "keys" in given else None
    chosen = (rank, scale, dropout, names, pattern, init, given.get("loftq_model"), alpha, rslora)
    return AdapterSettings(*chosen)


def _scale(alpha: float, rank: Any, rslora: bool) -> float:
    """PEFT's scale. A rank that cannot be is refused by the adapter."""
    divisor = min(max(int(rank), 1), LARGEST) if isinstance(rank, Integral) else 1
    return alpha / (math.sqrt(divisor) if rslora else divisor)
