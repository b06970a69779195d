"""Adds adapters to a model, loads, merges and removes them; mlx-lm's `tuner.utils`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyloss.io.console import out
from pyloss.io.files import read_json
from pyloss.models.fusing import fuse_modules as fuse_adapters
from pyloss.models.resizing import tie_head, untie_head
from pyloss.models.transformer import Model
from pyloss.nn import Module, count_parameters
from pyloss.optim import build_schedule
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.companions import whole_modules
from pyloss.tuner.adapters.folder import put_adapter, read_adapter
from pyloss.tuner.adapters.full import is_full, load_full, unfreeze_layers
from pyloss.tuner.adapters.layout import CONFIG_FILE, MLX_FILE, adapter_place
from pyloss.tuner.adapters.registry import adapter_class, parameters_of, takes_adapter
from pyloss.tuner.adapters.selection import select
from pyloss.tuner.data.system_prompt import checked


def linear_to_lora_layers(
    model: Any, num_layers: int, config: Mapping[str, Any], use_dora: bool = False
) -> None:
    """Add LoRA or DoRA adapters to the last `num_layers` decoder layers.

    `config` has `rank`, `scale` or `alpha`, and optionally `dropout` (default 0) and `keys`.
    `lora_parameters.read_lora_parameters` lists all keys. See `add_adapters` for `num_layers`,
    `keys` and errors.
    """
    add_adapters(model, "dora" if use_dora else "lora", num_layers, config)


def add_adapters(model: Any, kind: str, num_layers: int, config: Mapping[str, Any]) -> None:
    """Add adapters of one kind to the last `num_layers` decoder layers (-1: all); freeze the base.

    `config` has the kind's parameters. Its `keys` name the layers to adapt, within a decoder layer
    ("self_attn.q_proj") or in the model ("lm_head", "model.embed_tokens"). Without `keys`, every
    suitable layer in these decoder layers gets an adapter.

    Raises ValueError for keys that match nothing (with the nearest names), for a layer that has an
    adapter already, and for parameters that are not allowed. The model is then unchanged.
    """
    parameters = parameters_of(kind).read(config)
    whole = set(whole_modules(model, getattr(parameters, "modules_to_save", ())))
    tied = isinstance(model, Model) and model.lm_head is None
    untied = tied and not getattr(parameters, "ensure_weight_tying", True)
    if untied:
        untie_head(model)
    try:
        _add(model, kind, num_layers, parameters, whole)
    except BaseException:
        if untied:
            tie_head(model)
        raise


def _add(model: Any, kind: str, num_layers: int, parameters: Any, whole: set[str]) -> None:
    adapters = adapter_modules(model)
    bases = {f"{name}.{adapter.base_name}" for name, adapter in adapters.items()}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name not in bases and (takes_adapter(module, kind) or name in adapters)
    }
    if parameters.keys is None:  # as in PEFT
        candidates = {name: each for name, each in candidates.items() if name not in whole}
    what = f"layer that takes a {kind} adapter"
    found = select(model, candidates, num_layers, parameters.keys, what)
    if twice := next((name for name in found if name in adapters), None):
        raise ValueError(f"{twice} has an adapter already; fuse() or remove_lora_layers() first")
    parameters.check_layers(model, found)
    layers = {
        name: adapter_class(module, kind).from_base(module, **parameters.options(name))
        for name, module in found.items()
    }
    parameters.initialize(layers)
    layers |= parameters.companions(model, layers)
    model.freeze()
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_module(name, layer)
    model.trained_from = None
    model.adapter_config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters.stored(),
    }


def load_adapters(model: Any, adapter_path: str | os.PathLike[str]) -> Any:
    """Load the adapter in the folder `adapter_path` (mlx-lm's or PEFT's layout), trainable.

    `adapter_path` may also be a file next to an adapter_config.json, such as
    `adapters/0000100_adapters.safetensors`. An adapter of full fine-tuning (mlx-lm's layout)
    replaces weights, see `full.load_full`.

    Raises ValueError listing every name and shape that does not fit; the model is then unchanged.
    Also raises the errors of `folder.read_adapter`.
    """
    place, name = adapter_place(adapter_path)
    if (place / CONFIG_FILE).is_file() and is_full(config := read_json(place / CONFIG_FILE)):
        file = place / (name or MLX_FILE)
        if not file.is_file():
            raise FileNotFoundError(f"no adapter in {place}: it has no {file.name}")
        checked(config, place / CONFIG_FILE)
        load_full(model, file, config)
        return model
    put_adapter(model, read_adapter(adapter_path))
    return model


def remove_lora_layers(model: Module) -> Module:
    """Replace each adapter with its base layer; return the model."""
    for name, layer in adapter_modules(model).items():
        model.set_module(name, layer.original())
    return model


def get_total_parameters(model: Module) -> int:
    """Count the model's parameters, including quantized ones."""
    return count_parameters(model)[1]


def print_trainable_parameters(model: Module) -> None:
    """Print how many of the model's parameters are trainable."""
    trained, total = count_parameters(model)
    out(
        f"Trainable parameters: {trained / max(total, 1):.3%} "
        f"({trained / 1e6:.3f}M/{total / 1e6:.3f}M)"
    )


__all__ = [
    "build_schedule",
    "fuse_adapters",
    "get_total_parameters",
    "linear_to_lora_layers",
    "load_adapters",
    "print_trainable_parameters",
    "remove_lora_layers",
    "unfreeze_layers",
]
