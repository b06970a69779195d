"""Full fine-tuning: training the layers' own weights, and these weights in mlx-lm's layout.

adapters.safetensors then holds whole weights by their names in the model
("model.layers.2.mlp.up_proj.weight"), and adapter_config.json has `"fine_tune_type": "full"`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from pyloss.errors import size_text
from pyloss.io.files import user_path
from pyloss.io.safetensors import read_safetensors
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.base import base_of, not_for, read_base, warn_of_other_base
from pyloss.tuner.adapters.merging import with_weight
from pyloss.tuner.adapters.selection import select

log = logging.getLogger("pyloss")


def unfreeze_layers(model: Any, num_layers: int = -1, keys: Iterable[str] | None = None) -> None:
    """Makes the last `num_layers` decoder layers (-1: all) trainable, with norms and biases.

    All else is frozen. `keys` selects parts: names within a layer ("mlp", "self_attn.q_proj",
    "input_layernorm") or in the model ("model.embed_tokens", which a tied head shares, "lm_head").
    Weights are trained and saved in float32. Weights in another format are converted, which takes
    4 bytes per number; the log has the size. Files are not touched.

    Raises ValueError for keys that match nothing, with the nearest names, and for a model with
    adapters.
    """
    if adapters := list(adapter_modules(model)):
        raise ValueError(f"{adapters[0]} has an adapter; fuse() or remove_lora_layers() first")
    keys = None if keys is None else list(keys)
    candidates = {name: module for name, module in model.named_modules() if name}
    base = base_of(model)
    found = select(model, candidates, num_layers, keys, "part of the model")
    chosen = {id(module): module for part in found.values() for module in part.modules()}
    model.freeze()
    formats: dict[str, int] = {}
    for name, module in candidates.items():
        if id(module) not in chosen:
            continue
        stored = getattr(module, "weight", None)
        if stored is not None and not isinstance(stored, np.ndarray):
            kind = getattr(stored, "format", "another format")
            formats[kind] = formats.get(kind, 0) + 4 * math.prod(stored.shape)
            module = with_weight(module, stored.dequantize()).train(model.training)
            model.set_module(name, module)
        module.unfreeze(recurse=False)
    converted = ", ".join(
        f"{size_text(size)} of {kind}" for kind, size in formats.items() if kind != "f32"
    )
    if converted:
        log.info(
            "full fine-tuning trains in float32: it converts %s of stored weights (size in "
            "float32)",
            converted,
        )
    model.adapter_config, model.trained_from = full_config(num_layers, keys), base


def full_config(num_layers: int, keys: list[str] | None) -> dict[str, Any]:
    """The part of adapter_config.json that describes full fine-tuning."""
    config: dict[str, Any] = {
        "fine_tune_type": "full",
        "num_layers": num_layers,
        "lora_parameters": None,
    }
    return config if keys is None else config | {"full_keys": keys}


def is_full(config: Any) -> bool:
    """Whether an adapter configuration is one of full fine-tuning."""
    return isinstance(config, dict) and config.get("fine_tune_type") == "full"


def load_full(model: Any, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Puts the weights in the safetensors file `path` into the model, in float32 and trainable.

    All else is frozen. Raises ValueError listing every name and shape that does not fit, with the
    model left as it was, and FormatError for a file that cannot be read.
    """
    file = read_safetensors(path)
    tensors, base = file.tensors, read_base(path, file.metadata)
    own: dict[str, Any] = {**model.parameters(), **model.stored()}
    problems = [
        f"{name}: has an adapter; fuse() or remove_lora_layers() first"
        for name in adapter_modules(model)
    ]
    for name, tensor in tensors.items():
        if name not in own:
            problems.append(f"{name}: the model has no such parameter")
        elif tensor.shape != tuple(own[name].shape):
            problems.append(f"{name}: has shape {tensor.shape}, expected {tuple(own[name].shape)}")
    folder = user_path(path).parent
    if problems:
        raise ValueError(not_for(model, base, folder, problems))
    if not tensors:
        raise ValueError(f"{path} has no weights")
    warn_of_other_base(model, base, folder)
    arrays = {name: tensor.array() for name, tensor in tensors.items()}
    base = base_of(model) if base is None else base
    model.freeze()
    modules = dict(model.named_modules())
    for name in model.stored():
        owner = name.rpartition(".")[0]
        if name in arrays:
            modules[owner] = (
                with_weight(modules[owner], arrays[name]).freeze().train(model.training)
            )
            model.set_module(owner, modules[owner])
    for name, array in arrays.items():
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, array)
        modules[owner].unfreeze(recurse=False, keys=(attribute,))
    model.adapter_config, model.trained_from = config, base
