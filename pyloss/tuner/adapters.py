"""Adapters on disk: mlx-lm's layout, which is pyloss's own, and PEFT's.

mlx-lm: adapters.safetensors with `<module>.lora_a` [in, r] and `.lora_b` [r, out]; adapter_config.json with `fine_tune_type`,
`num_layers` and `lora_parameters`. PEFT: adapter_model.safetensors with `base_model.model.<module>.lora_A.weight` [r, in] and
`.lora_B.weight` [out, r]; adapter_config.json with `peft_type`, `r`, `lora_alpha`, `target_modules`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files import read_json, write_json, write_safetensors
from ..models.safetensors import read_safetensors
from ..nn import Module
from .adapter import settled_adapters
from .full import is_full
from .lora import LoRALinear

CONFIG_FILE = "adapter_config.json"
MLX_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_BASE = ".base_layer.weight"

# PEFT's settings that change what an adapter computes, with the values that mean "not used".
_PEFT_INACTIVE = {
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
}


@dataclass
class StoredAdapter:
    """An adapter as read: matrices by module name, `lora_a` float32 [in, r] and `lora_b` [r, out], and how they act."""

    path: str
    matrices: dict[str, tuple[np.ndarray, np.ndarray]]
    scale: float
    dropout: float
    config: dict[str, Any]  # as mlx-lm writes it
    bases: dict[str, np.ndarray] = field(default_factory=dict)  # copies of base weights, which PEFT adds for an adapted head


def read_adapter(folder: str | os.PathLike[str]) -> StoredAdapter:
    """The adapter in `folder`, in mlx-lm's or PEFT's layout.

    Raises FileNotFoundError naming what is missing, FormatError for files that cannot be understood, ValueError for an adapter
    that uses what pyloss does not have.
    """
    place = Path(folder)
    if not (place / CONFIG_FILE).is_file():
        found = "the folder does not exist" if not place.is_dir() else f"it has no {CONFIG_FILE}"
        raise FileNotFoundError(f"no adapter in {place}: {found}")
    config = read_json(place / CONFIG_FILE)
    return _read_peft(place, config) if "peft_type" in config else _read_mlx(place, config)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    file = read_safetensors(path)
    return {name: tensor.array() for name, tensor in file.tensors.items()}


def _pairs(path: Path, arrays: dict[str, np.ndarray], first: str, second: str) -> dict[str, list[np.ndarray]]:
    """`{module: [A, B]}` of tensors named `<module><first>` and `<module><second>`; others are refused by name."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        suffix = next((s for s in (first, second) if name.endswith(s)), None)
        if suffix is None:
            raise FormatError(path, name, f"is not a LoRA matrix; expected names that end in {first} or {second}")
        if array.ndim != 2:
            raise FormatError(path, name, f"has shape {array.shape}, expected two dimensions")
        halves.setdefault(name[: -len(suffix)], {})[suffix] = array
    for module, found in halves.items():
        for suffix in (first, second):
            if suffix not in found:
                raise FormatError(path, module + suffix, "is missing, though its other half is there")
    return {module: [found[first], found[second]] for module, found in halves.items()}


def _number(path: Path, config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(path, key, f"expected a number, got {value!r}")
    return float(value)


def _read_mlx(place: Path, config: dict[str, Any]) -> StoredAdapter:
    source = place / CONFIG_FILE
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ValueError(f"{source}: fine_tune_type {kind!r} is not supported yet; supported is 'lora'")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(source, "lora_parameters", f"expected an object, got {parameters!r}")
    if not (place / MLX_FILE).is_file():
        raise FileNotFoundError(f"no adapter in {place}: it has no {MLX_FILE}")
    pairs = _pairs(place / MLX_FILE, _arrays(place / MLX_FILE), ".lora_a", ".lora_b")
    scale, dropout = _number(source, parameters, "scale"), _number(source, parameters, "dropout", 0.0)
    return StoredAdapter(str(place), {name: (a, b) for name, (a, b) in pairs.items()}, scale, dropout, config)


def _read_peft(place: Path, config: dict[str, Any]) -> StoredAdapter:
    source = place / CONFIG_FILE
    if config["peft_type"] != "LORA":
        raise ValueError(f"{source}: peft_type {config['peft_type']!r} is not supported; supported is 'LORA'")
    for key, allowed in _PEFT_INACTIVE.items():
        if config.get(key) not in allowed and key in config:
            raise ValueError(f"{source}: {key} = {config[key]!r} is not supported")
    if not (place / PEFT_FILE).is_file():
        raise FileNotFoundError(f"no adapter in {place}: it has no {PEFT_FILE}")
    arrays = _arrays(place / PEFT_FILE)
    for name in arrays:
        if not name.startswith(_PEFT_PREFIX):
            raise FormatError(place / PEFT_FILE, name, f"expected names that begin with {_PEFT_PREFIX}")
    stripped = {name[len(_PEFT_PREFIX) :]: array for name, array in arrays.items()}
    bases = {name.removesuffix(_PEFT_BASE): stripped.pop(name) for name in list(stripped) if name.endswith(_PEFT_BASE)}
    pairs = _pairs(place / PEFT_FILE, stripped, ".lora_A.weight", ".lora_B.weight")
    alpha, rank = _number(source, config, "lora_alpha"), _number(source, config, "r")
    ranks = {a.shape[0] for a, _ in pairs.values()}
    if ranks and ranks != {int(rank)}:
        raise ValueError(f"{source}: modules of ranks {sorted(ranks)} under r = {int(rank)} (rank_pattern) are not supported")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    dropout = _number(source, config, "lora_dropout", 0.0)
    matrices = {name: (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) for name, (a, b) in pairs.items()}
    return StoredAdapter(str(place), matrices, scale, dropout, mlx_config(sorted(matrices), -1, int(rank), scale, dropout), bases)


def mlx_config(keys: list[str] | None, num_layers: int, rank: int, scale: float, dropout: float) -> dict[str, Any]:
    """The part of adapter_config.json that says how to make the layers again."""
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": dropout}
    if keys is not None:
        parameters["keys"] = keys
    return {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}


def save_adapter(model: Module, folder: str | os.PathLike[str], format: str = "mlx", base_model: str | None = None) -> None:
    """Writes the model's adapter into `folder`, in the layout "mlx" (pyloss's own) or "peft".

    `base_model` is the name that PEFT's config gives the base by. Raises ValueError when the model has no adapter or the format
    cannot say what the adapter does, OSError naming the file that cannot be written.
    """
    layers, full = settled_adapters(model), is_full(getattr(model, "adapter_config", None))
    if full and format != "mlx":
        raise ValueError(f"weights trained in full are saved in the layout 'mlx' or by model.save(folder), not as {format!r}")
    if not (layers or full):
        raise ValueError("the model has no adapter; call linear_to_lora_layers first")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if format == "mlx":
        config = getattr(model, "adapter_config", None)
        if config is None:
            raise ValueError("the model does not know its adapter's settings; make it with linear_to_lora_layers")
        arrays = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in layer.matrices()}
        arrays = model.trainable_parameters() if full else arrays
        write_safetensors(place / MLX_FILE, arrays)
        write_json(place / CONFIG_FILE, json.loads(json.dumps(config)), sort_keys=True)
    elif format == "peft":
        if other := [name for name, layer in layers.items() if not isinstance(layer, LoRALinear)]:
            raise ValueError(f"PEFT's layout is written for LoRA over linear layers alone; {other[0]} is another adapter")
        kinds = {(layer.rank, layer.scale, layer.dropout) for layer in layers.values()}
        if len(kinds) > 1:
            raise ValueError(f"PEFT's layout takes one rank, scale and dropout for all layers; these have {sorted(kinds)}")
        rank, scale, dropout = kinds.pop()
        arrays = {}
        for name, layer in layers.items():
            arrays[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(layer.lora_a.T)
            arrays[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(layer.lora_b.T)
        write_safetensors(place / PEFT_FILE, arrays, {"format": "pt"})
        alpha = scale * rank
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "target_modules": sorted(layers),
        }
        write_json(place / CONFIG_FILE, config, sort_keys=True)
    else:
        raise ValueError(f"format must be 'mlx' or 'peft', not {format!r}")
