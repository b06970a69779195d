"""mlx-lm's layout of adapters, which is pyloss's own: adapters.safetensors and adapter_config.json.

The tensors are `<module>.lora_a` [in, r], `<module>.lora_b` [r, out] and for DoRA `<module>.m`
[out]. Those of experts have the number of experts as their first dimension. The configuration has
`fine_tune_type`, `num_layers` and `lora_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import write_json, write_safetensors
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.adapters.stored import (
    CONFIG_FILE,
    MLX_FILE,
    StoredAdapter,
    StoredLayer,
    arrays_of,
    check_kind,
    grouped,
    low_rank_kind,
    number,
)
from pyloss.tuner.data.system_prompt import checked
from pyloss.tuner.run.run_folder import with_own_keys

_SUFFIXES = {".lora_a": "lora_a", ".lora_b": "lora_b", ".m": "m"}


def read_mlx(place: Path, config: dict[str, Any], file: str = MLX_FILE) -> StoredAdapter:
    """The adapter in `file` of the folder `place`. Raises as `storage.read_adapter`."""
    source = place / CONFIG_FILE
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"{source}: fine_tune_type {shown(kind)} is not supported; "
            "supported are 'lora', 'dora' and 'full'"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(source, "lora_parameters", f"expected an object, got {shown(parameters)}")
    scale, dropout = number(source, parameters, "scale"), number(source, parameters, "dropout", 0.0)
    checked(config, source)
    layers = grouped(place / file, arrays_of(place, file), _SUFFIXES, (2, 3))
    check_kind(source, kind, layers)
    stored = {name: StoredLayer(arrays, scale, dropout) for name, arrays in layers.items()}
    return StoredAdapter(str(place), kind, stored, config)


def write_mlx(
    place: Path,
    layers: Mapping[str, LowRankAdapter],
    config: Mapping[str, Any] | None,
    one_rank: bool = False,
    old: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters into the folder `place`.

    The layout has one scale for all layers: other scales are multiplied into `lora_b`. With
    `one_rank` smaller ranks are padded with zeros, since mlx-lm makes all layers of one rank.
    Without `config` a configuration is made that names all layers. `old` is the configuration in
    the folder; a user's own keys of it are kept.

    Raises ValueError for adapters of other or several kinds, and with `one_rank` for DoRA over
    experts, which mlx-lm does not have.
    """
    kind = low_rank_kind("mlx-lm's layout", layers)
    rank = max(layer.rank for layer in layers.values())
    if config is None:
        first = next(iter(layers.values()))
        config = mlx_config(kind, sorted(layers), rank, first.scale, first.dropout)
    scale = config["lora_parameters"]["scale"]
    if one_rank:
        config = {**config, "lora_parameters": {**config["lora_parameters"], "rank": rank}}
    arrays = {}
    for name, layer in layers.items():
        if one_rank and layer.kind == "dora" and layer.lora_a.ndim == 3:
            raise ValueError(f"{name}: mlx-lm has no DoRA over experts")
        for part in layer.parameter_names():
            array = getattr(layer, part)
            if part == "lora_b" and layer.scale != scale:
                array = array * np.float32(layer.scale / scale if scale else 0)
            if one_rank and part != "m":
                array = _padded(array, layer.rank_axes()[part == "lora_b"], rank)
            arrays[f"{name}.{part}"] = array
    write_safetensors(place / MLX_FILE, arrays)
    write_json(place / CONFIG_FILE, with_own_keys(config, old or {}), sort_keys=True)


def mlx_config(
    kind: str, keys: list[str], rank: int, scale: float, dropout: float
) -> dict[str, Any]:
    """The configuration of adapters over the layers of the full names `keys`."""
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys}
    return {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}


def _padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """`array` with zeros appended up to `length` along `axis`."""
    missing = length - array.shape[axis]
    return (
        np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
        if missing
        else array
    )
