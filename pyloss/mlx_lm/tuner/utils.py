"""mlx_lm.tuner.utils: adapters by mlx-lm's rules, over pyloss's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.errors import choices
from pyloss.mlx_lm.arrays import seen_as_mlx
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from pyloss.mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from pyloss.mlx_lm.utils import dequantize_model as dequantize, get_total_parameters
from pyloss.optim import build_schedule as schedule_of
from pyloss.tuner import utils as ours
from pyloss.tuner.adapters.selection import inner_name

log = logging.getLogger("pyloss")

__all__ = [
    "DoRAEmbedding",
    "DoRALinear",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "build_schedule",
    "dequantize",
    "get_total_parameters",
    "linear_to_lora_layers",
    "load_adapters",
    "print_trainable_parameters",
    "remove_lora_layers",
]

__getattr__ = absent(__name__)


def build_schedule(schedule_config: Mapping[str, Any]) -> Any:
    """The schedule of `{name, arguments, warmup, warmup_init}`; see `pyloss.optim.build_schedule`.

    Raises KeyError without name or arguments, ValueError for an unknown schedule or key.
    """
    if not isinstance(schedule_config, Mapping):
        raise ValueError(
            f"lr_schedule is {shown(schedule_config)}; it must be a mapping such as "
            "{name: cosine_decay, arguments: [1e-5, 1000]}"
        )
    for key in ("name", "arguments"):
        if key not in schedule_config:
            raise KeyError(f"lr_schedule lacks {key!r}; it has {sorted(schedule_config)}")
    return schedule_of(schedule_config)


def linear_to_lora_layers(
    model: Any, num_layers: int, config: Mapping[str, Any], use_dora: bool = False
) -> None:
    """Add LoRA or DoRA adapters to the last `num_layers` decoder layers.

    `config` has `rank`, `scale`, `dropout` and `keys`, the names of layers within a decoder layer
    or in the model; without keys all layers within decoder layers get one. 0, numbers below it and
    those above the number of layers mean all. The base is frozen; parameters that were trained
    before stay trained, unless nothing was frozen.

    Raises KeyError without `scale`, ValueError if no key names a layer.
    """
    if "scale" not in config:
        hint = " (it has 'alpha', which is scale times rank)" if "alpha" in config else ""
        raise KeyError(f"LoRA config is missing required key 'scale'{hint}")
    count = len(model.layers)
    chosen = num_layers if 0 < num_layers <= count else count
    given = {key: config[key] for key in ("rank", "scale", "dropout") if key in config}
    if config.get("keys") is not None:
        given["keys"] = _known_keys(model, config["keys"])
    trained = _trained_arrays(model)
    ours.add_adapters(model, "dora" if use_dora else "lora", chosen, given)
    _train_again(model, trained)
    seen_as_mlx(model)


def _trained_arrays(model: Any) -> set[str]:
    """The names of the arrays that are trained; none if a script has frozen nothing."""
    found, frozen = set(), False
    for path, module in model.named_modules():
        for name, _, parameter in module._own_arrays():
            if parameter and name not in module._frozen:
                found.add(f"{path}.{name}")
        frozen = frozen or bool(module._frozen)
    if found and not frozen:
        log.warning(
            "the base is frozen below the adapters; under mlx-lm it would be trained, since "
            "nothing has called model.freeze()"
        )
        return set()
    return found


def _known_keys(model: Any, keys: Any) -> list[str]:
    """The keys that name a layer, or all if none does; the others are ignored, with a warning."""
    names = [name for name, _ in model.named_modules()]
    known = {*names, *(inner_name(name)[0] for name in names)}
    found = [key for key in keys if key in known]
    if found and (ignored := [key for key in keys if key not in known]):
        log.warning("no layer is named %s: ignored, as in mlx-lm", choices(sorted(ignored)))
    return sorted(found or keys)


def _train_again(model: Any, names: set[str]) -> None:
    """Trains the parameters of these names, which adding adapters has frozen."""
    for path, module in model.named_modules():
        own = [name for name in vars(module) if f"{path}.{name}" in names]
        if own:
            module.unfreeze(recurse=False, keys=own)


def load_adapters(model: Any, adapter_path: str) -> Any:
    """The model with the adapter of a folder, or with the weights of a full fine-tuning.

    Raises FileNotFoundError, and ValueError for tensors that do not fit.
    """
    ours.load_adapters(model, adapter_path)
    return seen_as_mlx(model)


def remove_lora_layers(model: Any) -> Any:
    """The model without its adapters."""
    ours.remove_lora_layers(model)
    return model


def print_trainable_parameters(model: Any) -> None:
    """Print how many of the model's parameters are trained."""
    ours.print_trainable_parameters(model)
