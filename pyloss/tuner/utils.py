"""Putting adapters into a model, loading them, merging them and taking them out."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..nn import Linear, Module
from .adapter import Adapter, adapter_class, adapter_modules, dense, takes_adapter
from .adapters import mlx_config, read_adapter


def _matches(model: Any, num_layers: int, keys: Any, kind: str = "lora") -> dict[str, Module]:
    """The layers to convert, by full name: `keys` are names within a decoder layer, such as "self_attn.q_proj", or full names."""
    count = len(model.layers)
    if num_layers > count:
        raise ValueError(f"num_layers is {num_layers}, but the model has {count} layers; -1 takes all")
    chosen = set(range(count)) if num_layers < 0 else set(range(count - num_layers, count))
    found, known, used = {}, set(), set()
    bases = {f"{name}.{adapter.base_name}" for name, adapter in adapter_modules(model).items()}
    for name, module in model.named_modules():
        if name in bases or not (takes_adapter(module, kind) or isinstance(module, Adapter)):
            continue
        parts = name.split(".")
        inner = ""
        if "layers" in parts[:-1]:
            at = parts.index("layers")
            inner = ".".join(parts[at + 2 :])
        known |= {name, inner} - {""}
        by_inner = bool(inner) and (keys is None or inner in keys)
        by_name = keys is not None and name in keys
        if by_inner or by_name:
            used |= {inner, name}
        if by_name or (by_inner and int(parts[at + 1]) in chosen):
            if isinstance(module, Adapter):
                raise ValueError(f"{name} has an adapter already; fuse() or remove_lora_layers() first")
            found[name] = module
    unknown = [key for key in keys or () if key not in used]
    if unknown:
        near = {near for key in unknown for near in difflib.get_close_matches(key, known, 3, 0.5)}
        inner_names = sorted(n for n in known if not n.startswith("model."))
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"no layer that takes an adapter is named {names}; did you mean {sorted(near) or inner_names}?")
    return found


def linear_to_lora_layers(model: Any, num_layers: int, config: Mapping[str, Any], use_dora: bool = False) -> None:
    """Puts LoRA adapters over linear layers of the last `num_layers` layers (-1: all).

    `config`: `rank`, `scale`, and optionally `dropout` (0) and `keys`, names within a layer ("self_attn.q_proj") or of the whole
    model ("lm_head"); without keys every linear layer of the layers gets one. Raises ValueError for keys that match nothing, with
    the nearest names, and for a rank, scale or dropout that cannot be. The base is frozen.
    """
    if use_dora:
        raise ValueError("DoRA is not available yet; use_dora must be False")
    for key in ("rank", "scale"):
        if key not in config:
            hint = "; 'alpha' is not used here: scale is alpha / rank" if "alpha" in config and key == "scale" else ""
            raise ValueError(f"the LoRA config needs {key!r}{hint}; it has {sorted(config)}")
    unknown = set(config) - {"rank", "scale", "dropout", "keys"}
    if unknown:
        raise ValueError(f"unknown keys in the LoRA config: {sorted(unknown)}; known are rank, scale, dropout, keys")
    keys = config.get("keys")
    rank, scale, dropout = config["rank"], config["scale"], config.get("dropout", 0.0)
    layers = {
        name: adapter_class(module).from_base(module, r=rank, dropout=dropout, scale=scale)
        for name, module in _matches(model, num_layers, keys).items()
    }
    model.freeze()
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_module(name, layer)
    model.adapter_config = mlx_config(None if keys is None else list(keys), num_layers, rank, scale, dropout)


def load_adapters(model: Any, adapter_path: str | os.PathLike[str]) -> Any:
    """Puts the adapter in the folder `adapter_path` (mlx-lm's or PEFT's layout) over the model's layers.

    Raises ValueError listing every name and shape that does not fit, with the model left as it was; and as
    `adapters.read_adapter`.
    """
    adapter = read_adapter(adapter_path)
    modules = dict(model.named_modules())
    problems, layers = [], {}
    for name, (a, b) in adapter.matrices.items():
        base = modules.get(name)
        if isinstance(base, Adapter):
            problems.append(f"{name}: has an adapter already; fuse() or remove_lora_layers() first")
        elif not isinstance(base, Linear):
            problems.append(f"{name}: the model has no such layer")
        elif a.shape != (base.shape[1], a.shape[1]) or b.shape != (a.shape[1], base.shape[0]):
            expected = f"({base.shape[1]}, r) and (r, {base.shape[0]})"
            problems.append(f"{name}: lora_a {a.shape} and lora_b {b.shape}, expected {expected}")
        elif not problems:
            layers[name] = adapter_class(base).from_base(base, r=a.shape[1], dropout=adapter.dropout, scale=adapter.scale)
            layers[name].lora_a[...] = a
            layers[name].lora_b[...] = b
    for name, weight in adapter.bases.items():
        if reason := _other_base(modules.get(name), weight):
            problems.append(f"{name}: {reason}")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"the adapter in {adapter.path} is not one for this model:\n  " + "\n  ".join(problems[:20]) + more)
    if not layers:
        raise ValueError(f"the adapter in {adapter.path} has no matrices")
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_module(name, layer)
    model.adapter_config = adapter.config
    return model


def _other_base(module: Any, weight: np.ndarray) -> str | None:
    """Why a base weight that came with an adapter is not the one of `module`, or a form of it that quantising makes."""
    if not isinstance(module, Linear) or weight.shape != module.shape:
        found = module.shape if isinstance(module, Linear) else "no such layer"
        return f"the adapter was made over a weight of shape {weight.shape}; the model has {found}"
    own = dense(module.weight)
    if np.linalg.norm(weight - own) > 0.25 * np.linalg.norm(own):
        return "the adapter was made over another weight than the model's"
    return None


def fuse_adapters(model: Module, dequantize: bool = False) -> None:
    """Replaces every adapter by its fused layer; see `Adapter.fuse`."""
    for name, layer in adapter_modules(model).items():
        model.set_module(name, layer.fuse(dequantize))


def remove_lora_layers(model: Module) -> Module:
    """Takes the adapters out again, leaving the bases."""
    for name, layer in adapter_modules(model).items():
        model.set_module(name, layer.base)
    return model


def print_trainable_parameters(model: Module) -> None:
    """Prints how many numbers of the model are trained."""
    total = sum(p.size for p in model.parameters().values()) + sum(math.prod(w.shape) for w in model.stored().values())
    trained = sum(p.size for p in model.trainable_parameters().values())
    print(f"Trainable parameters: {trained / max(total, 1):.3%} ({trained / 1e6:.3f}M/{total / 1e6:.3f}M)")
