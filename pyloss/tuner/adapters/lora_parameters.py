"""The parameters of low-rank adapters: rank, scale, dropout, layers and initialization."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from pyloss.checks.numbers import LARGEST, real, shown
from pyloss.errors import nearest
from pyloss.models.reading import load_model
from pyloss.nn import Module
from pyloss.tuner.adapters.adapter import AdapterParameters
from pyloss.tuner.adapters.companions import (
    BIASES,
    TokenIndices,
    companions,
    main_adapters,
    read_indices,
    read_modules,
    settings_of,
)
from pyloss.tuner.adapters.initial import loftq, pissa
from pyloss.tuner.adapters.layout import number
from pyloss.tuner.adapters.selection import inner_name, select

log = logging.getLogger("pyloss")

#: The keys of a LoRA config. mlx-lm has the first four.
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
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "ensure_weight_tying",
)
INITS = ("default", "pissa", "loftq")

#: PEFT's names for the same parameters.
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "target_modules": "keys",
    "init_lora_weights": "init",
}


@dataclass(frozen=True, kw_only=True)
class LoraParameters(AdapterParameters):
    """A LoRA config, read and checked.

    Attributes:
        rank: the rank of adapters that `rank_pattern` does not name.
        scale: the factor of the product of `lora_a` and `lora_b` at that rank.
        dropout: dropout of the adapters' input.
        rank_pattern: ranks by name, in full or within a decoder layer.
        init: how adapters begin: one of `INITS`.
        loftq_model: the float model, for init "loftq".
        alpha: PEFT's lora_alpha, if the config gives it: each rank then has its own scale.
        rslora: divide alpha by the square root of the rank.
        modules_to_save: the names of modules that are trained as a whole.
        trainable_token_indices: the rows of tables that are trained.
        bias: one of `companions.BIASES`.
        ensure_weight_tying: whether a head that is the embedding stays it. False: an adapter over
            one of the two changes that one alone, as in PEFT.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init: str = "default"
    loftq_model: str | None = None
    alpha: float | None = None
    rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: TokenIndices = field(default_factory=dict)
    bias: str = "none"
    ensure_weight_tying: bool = True

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LoraParameters:
        return read_lora_parameters(config)

    @classmethod
    def of(cls, adapters: Mapping[str, Any]) -> LoraParameters:
        main = main_adapters(adapters)
        first = next(iter(main.values()), None)
        more = settings_of(adapters)
        if "trainable_token_indices" in more:
            more["trainable_token_indices"] = read_indices(more["trainable_token_indices"])
        return cls(
            rank=max((adapter.rank for adapter in main.values()), default=1),
            scale=1.0 if first is None else first.scale,
            dropout=0.0 if first is None else first.dropout,
            keys=tuple(sorted(main)),
            **more,
        )

    @classmethod
    def stored_options(cls, path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "scale": number(path, stored, "scale"),
            "dropout": number(path, stored, "dropout", 0.0),
        }

    def check_layers(self, model: Any, layers: Mapping[str, Module]) -> None:
        what = "layer with an adapter, for rank_pattern,"
        select(model, layers, -1, self.rank_pattern, what)

    def options(self, name: str) -> dict[str, Any]:
        return {"r": self.rank_of(name), "dropout": self.dropout, "scale": self.scale_of(name)}

    def initialize(self, adapters: Mapping[str, Any]) -> None:
        if self.init == "pissa":
            pissa(adapters)
        elif self.loftq_model is not None:
            loftq(adapters, dict(load_model(self.loftq_model).named_modules()))

    def scale_of(self, name: str) -> float:
        """The scale of the adapter over the layer of the full name `name`."""
        if self.alpha is None:
            return self.scale
        return _scale(self.alpha, self.rank_of(name), self.rslora)

    def rank_of(self, name: str) -> int:
        """The rank of the adapter over the layer of the full name `name`."""
        return self.rank_pattern.get(name, self.rank_pattern.get(inner_name(name)[0], self.rank))

    def stored(self) -> dict[str, Any]:
        """`lora_parameters` of adapter_config.json.

        The rank is that of the matrices in the file, which PiSSA doubles; see
        `LowRankAdapter.storable`.
        """
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
        if self.modules_to_save:
            found["modules_to_save"] = list(self.modules_to_save)
        if self.trainable_token_indices:
            found["trainable_token_indices"] = {
                name: list(indices) for name, indices in self.trainable_token_indices.items()
            }
        if self.bias != "none":
            found["bias"] = self.bias
        if not self.ensure_weight_tying:
            found["ensure_weight_tying"] = False
        return found

    def companions(self, model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
        return companions(model, self, layers)


def read_lora_parameters(config: Mapping[str, Any]) -> LoraParameters:
    """Reads and checks a LoRA config.

    It has `rank`, `scale` or `alpha`, and optionally:

    - `scale`: the factor of the adapters' product, as in mlx-lm; or `alpha`, as in PEFT, which
      gives scale = alpha / rank, or with `rslora` alpha / sqrt(rank) (arXiv:2312.03732). A config
      with both, as older versions of mlx-lm wrote them, uses scale;
    - `dropout` (default 0) and `keys`, the names of layers (default: all);
    - `rank_pattern`: ranks of some layers by name; with alpha each rank has its own scale;
    - `init`: "default" (A uniform, B zero), "pissa" or "loftq" (see `initial.py`), which needs
      `loftq_model`, the float model;
    - `modules_to_save`: names of modules, or ends of names, that are trained as a whole beside the
      adapters; `bias`: "none", "lora_only" (biases of layers with an adapter) or "all";
      `trainable_token_indices`: token ids whose rows of the embedding are trained, or such lists by
      the name of their table; as in PEFT;
    - `ensure_weight_tying` (default true): a head that is the embedding stays it. False, as is
      PEFT's default: an adapter over one of the two changes that one alone.

    Raises ValueError for keys that are unknown, missing or contradict each other and for numbers
    out of range, TypeError for values of another type. The adapters check the ranks, since the
    largest one depends on the layer.
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
            "the LoRA config needs 'scale', or 'alpha', which is scale times rank; "
            f"it has {sorted(given)}"
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
            "rslora divides alpha by the square root of the rank: "
            "the LoRA config must give 'alpha', not 'scale'"
        )
    if init not in INITS:
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
    if (init == "loftq") != ("loftq_model" in given):
        raise ValueError(
            "init 'loftq' and loftq_model, the float model from which the base was quantized, "
            "go together"
        )
    if init == "pissa" and given.get("dropout"):
        raise ValueError(
            "init 'pissa' needs dropout 0: dropout would act on the base's principal part, "
            "with which adapters begin"
        )
    alpha, rslora = given.get("alpha"), bool(given.get("rslora"))
    scale = given["scale"] if alpha is None else _scale(alpha, rank, rslora)
    dropout = real(given.get("dropout", 0.0), "dropout", 0, below=1)
    if given.get("bias", "none") not in BIASES:
        raise ValueError(f"bias is {shown(given['bias'])}; it must be one of {', '.join(BIASES)}")
    return LoraParameters(
        modules_to_save=read_modules(given.get("modules_to_save", ())),
        trainable_token_indices=read_indices(given.get("trainable_token_indices", ())),
        bias=given.get("bias", "none"),
        ensure_weight_tying=bool(given.get("ensure_weight_tying", True)),
        keys=tuple(keys) if "keys" in given else None,
        rank=rank,
        scale=scale,
        dropout=dropout,
        rank_pattern=pattern,
        init=init,
        loftq_model=given.get("loftq_model"),
        alpha=alpha,
        rslora=rslora,
    )


def _scale(alpha: float, rank: Any, rslora: bool) -> float:
    """PEFT's scale. The adapter refuses a rank that is out of range."""
    divisor = min(max(int(rank), 1), LARGEST) if isinstance(rank, Integral) else 1
    return alpha / (math.sqrt(divisor) if rslora else divisor)
