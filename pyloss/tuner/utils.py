"""Putting adapters into a model, loading them, merging them and taking them out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyloss.io.console import out
from pyloss.io.files import read_json
from pyloss.models.fusing import fuse_modules as fuse_adapters
from pyloss.models.reading import load_model
from pyloss.nn import Module
from pyloss.optim import build_schedule
from pyloss.tuner.adapters.adapter import adapter_class, adapter_modules, takes_adapter
from pyloss.tuner.adapters.full import is_full, load_full, unfreeze_layers
from pyloss.tuner.adapters.initial import loftq, pissa
from pyloss.tuner.adapters.lora_parameters import adapter_settings
from pyloss.tuner.adapters.selection import select
from pyloss.tuner.adapters.storage import put_adapter, read_adapter
from pyloss.tuner.adapters.stored import CONFIG_FILE, MLX_FILE, adapter_place
from pyloss.tuner.data.system_prompt import checked
from pyloss.tuner.run.plan import count_parameters


def linear_to_lora_layers(
    model: Any, num_layers: int, config: Mapping[str, Any], use_dora: bool = False
) -> None:
    """Puts LoRA adapters, or with `use_dora` DoRA adapters, over layers of the last `num_layers` decoder layers (-1: all).

    `config`: `rank`, `scale` or `alpha`, and optionally `dropout` (0) and `keys`, names within a decoder layer
    ("self_attn.q_proj") or of the whole model ("lm_head", "model.embed_tokens"); without keys every layer there that takes an
    adapter gets one: linear layers and experts. All that it may say is in `settings.adapter_settings`.
    Raises ValueError for keys that match nothing, with the nearest names, and for a rank, scale or dropout that cannot be. The
    base is frozen.
    """
    settings, kind = adapter_settings(config), "dora" if use_dora else "lora"
    adapters = adapter_modules(model)
    bases = {f"{name}.{adapter.base_name}" for name, adapter in adapters.items()}
    modules = {name: module for name, module in model.named_modules() if name not in bases}
    candidates = {
        name: module
        for name, module in modules.items()
        if takes_adapter(module, kind) or name in adapters
    }
    what = "layer that takes a DoRA adapter" if use_dora else "layer that takes an adapter"
    found = select(model, candidates, num_layers, settings.keys, what)
    if twice := next((name for name in found if name in adapters), None):
        raise ValueError(f"{twice} has an adapter already; fuse() or remove_lora_layers() first")
    select(model, found, -1, settings.rank_pattern, "layer with an adapter, for rank_pattern,")
    layers = {
        name: adapter_class(module, kind).from_base(
            module,
            r=settings.rank_of(name),
            dropout=settings.dropout,
            scale=settings.scale_of(name),
        )
        for name, module in found.items()
    }
    if settings.init == "pissa":
        pissa(layers)
    elif settings.loftq_model is not None:
        loftq(layers, dict(load_model(settings.loftq_model).named_modules()))
    model.freeze()
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_module(name, layer)
    model.adapter_config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": settings.stored(),
    }


def load_adapters(model: Any, adapter_path: str | os.PathLike[str]) -> Any:
    """Puts the adapter in the folder `adapter_path` (mlx-lm's or PEFT's layout) over the model's layers, trainable.

    `adapter_path` may also be a file beside an adapter_config.json, such as `adapters/0000100_adapters.safetensors`.
    An adapter of full fine-tuning (mlx-lm's layout) replaces weights; see `full.load_full`.
    Raises ValueError listing every name and shape that does not fit, with the model left as it was; and as
    `adapters.read_adapter`.
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
    """Takes the adapters out again, leaving the bases."""
    for name, layer in adapter_modules(model).items():
        model.set_module(name, layer.base)
    return model


def get_total_parameters(model: Module) -> int:
    """How many numbers a model has, stored ones of few bits included."""
    return count_parameters(model)[1]


def print_trainable_parameters(model: Module) -> None:
    """Prints how many numbers of the model are trained."""
    trained, total = count_parameters(model)
    out(
        f"Trainable parameters: {trained / max(total, 1):.3%} ({trained / 1e6:.3f}M/{total / 1e6:.3f}M)"
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
