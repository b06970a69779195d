"""mlx-lm's layout of adapters, which is pyloss's own: adapters.safetensors and adapter_config.json.

The tensors are `<module>.<part>`, under the names of the kind's `Adapter.parts`: `lora_a` [in, r],
`lora_b` [r, out] and for DoRA `m` [out]. Those of experts have the number of experts as their
first dimension. The configuration has `fine_tune_type`, `num_layers` and `lora_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.files import write_json, write_safetensors
from pyloss.tuner.adapters.adapter import Adapter, AdapterParameters
from pyloss.tuner.adapters.companions import main_adapters, read_indices, read_modules
from pyloss.tuner.adapters.layout import (
    BASES,
    BIAS,
    CONFIG_FILE,
    MLX_FILE,
    StoredAdapter,
    StoredLayer,
    arrays_of,
    grouped,
    is_table,
    low_rank_kind,
    one_kind,
)
from pyloss.tuner.adapters.registry import KINDS, parameters_of, parts_of
from pyloss.tuner.data.system_prompt import checked
from pyloss.tuner.run.run_folder import with_own_keys


def read_mlx(place: Path, config: dict[str, Any], file: str = MLX_FILE) -> StoredAdapter:
    """The adapter in `file` of the folder `place`. Raises as `folder.read_adapter`."""
    source = place / CONFIG_FILE
    kind = config.get("fine_tune_type", "lora")
    if kind not in tuple(KINDS):
        raise ValueError(
            f"{source}: fine_tune_type {shown(kind)} is not supported; "
            f"supported are {', '.join(map(repr, KINDS))} and 'full'"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(source, "lora_parameters", f"expected an object, got {shown(parameters)}")
    options = parameters_of(kind).stored_options(source, parameters)
    checked(config, source)
    suffixes = {f".{part}": part for part in parts_of(kind)}
    arrays, base = arrays_of(place, file)
    beside, biases, tables = _take_companions(source, arrays, parameters)
    layers = grouped(place / file, source, kind, arrays, suffixes, experts=True)
    stored = {name: StoredLayer(parts, options) for name, parts in layers.items()}
    for name, bias in biases.items():
        if name not in stored:
            raise FormatError(place / file, f"{name}.{BIAS}", "its layer has no adapter")
        stored[name].arrays[BIAS] = bias
    tied = parameters.get("ensure_weight_tying", True) is not False
    return StoredAdapter(str(place), kind, beside | stored, config, tables, tied, base)


def _take_companions(
    source: Path, arrays: dict[str, np.ndarray], parameters: Mapping[str, Any]
) -> tuple[dict[str, StoredLayer], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Takes what is beside the adapters out of `arrays`: layers, biases under adapters, tables."""
    try:
        saved = read_modules(parameters.get("modules_to_save") or ())
        indices = read_indices(parameters.get("trainable_token_indices") or ())
    except TypeError as error:
        raise FormatError(source, "lora_parameters", str(error)) from None
    layers: dict[str, StoredLayer] = {}
    biases: dict[str, np.ndarray] = {}
    tables: dict[str, np.ndarray] = {}
    for name in list(arrays):
        module, _, part = name.rpartition(".")
        outer, _, inner = module.rpartition(".")
        if part == "tokens":
            key = next((key for key in indices if f".{module}".endswith(f".{key}")), None)
            if key is None:
                raise FormatError(source, "trainable_token_indices", f"has no tokens of {module}")
            options = {"indices": indices[key]}
            layers[module] = StoredLayer({part: arrays.pop(name)}, options, "tokens")
        elif name.endswith(f".{BIAS}"):
            biases[outer] = arrays.pop(name)
        elif part == "weight" and inner in BASES and is_table(outer):
            tables[outer] = arrays.pop(name)
        elif part in ("weight", "bias"):
            named = any(f".{module}".endswith(f".{key}") for key in saved)
            if part == "weight" and is_table(module) and not named:
                tables[module] = arrays.pop(name)
            else:
                layer = layers.setdefault(module, StoredLayer({}, kind="whole"))
                layer.arrays[part] = arrays.pop(name)
    return layers, biases, tables


def write_mlx(
    place: Path,
    layers: Mapping[str, Adapter],
    config: Mapping[str, Any] | None,
    one_rank: bool = False,
    old: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    tables: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Writes adapters into the folder `place`.

    The layout has one scale for all layers: other scales are multiplied into `lora_b`. With
    `one_rank` smaller ranks are padded with zeros, since mlx-lm makes all layers of one rank.
    Without `config` a configuration is made that names all layers. `old` is the configuration in
    the folder; a user's own keys of it are kept. `metadata` is that of the file of arrays, and
    `tables` are further arrays.

    Raises ValueError for adapters of several kinds, and with `one_rank` for what mlx-lm does not
    have: DoRA over experts, and anything that is trained beside adapters.
    """
    kind = one_kind("mlx-lm's layout", layers)
    if config is None:
        config = mlx_config(kind, parameters_of(kind).of(layers))
    arrays: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        own = {part: attrgetter(part)(layer) for part in layer.parameter_names()}
        stored = layer.storable_arrays(own, config["lora_parameters"])
        arrays |= {f"{name}.{part}": array for part, array in stored.items()}
    if one_rank and tables:
        raise ValueError(
            f"{min(tables)}: mlx-lm loads adapters alone; fuse() keeps new tokens in the model's "
            "weights (pyloss fuse)"
        )
    if one_rank:
        rank = _pad_ranks(layers, arrays)
        config = {**config, "lora_parameters": {**config["lora_parameters"], "rank": rank}}
    write_safetensors(place / MLX_FILE, {**arrays, **tables}, metadata)
    write_json(place / CONFIG_FILE, with_own_keys(config, old or {}), sort_keys=True)


def mlx_config(kind: str, parameters: AdapterParameters) -> dict[str, Any]:
    """The configuration of adapters over the layers that the parameters name in full."""
    return {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters.stored()}


def _pad_ranks(layers: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> int:
    """Pads the arrays of low-rank adapters to the largest rank, which it returns."""
    low_rank_kind("mlx-lm", layers)
    beside = {name for name, layer in layers.items() if BIAS in layer.parameter_names()}
    beside |= layers.keys() - main_adapters(layers).keys()
    if beside:
        raise ValueError(
            f"{min(beside)}: mlx-lm loads adapters alone; fuse() keeps what is trained beside them "
            "in the model's weights (pyloss fuse)"
        )
    rank = max((layer.rank for layer in layers.values()), default=1)
    for name, layer in layers.items():
        if layer.kind == "dora" and layer.lora_a.ndim == 3:
            raise ValueError(
                f"{name}: mlx-lm has no DoRA over experts; "
                "fuse() keeps it in the model's weights (pyloss fuse)"
            )
        for part, axis in zip(("lora_a", "lora_b"), layer.rank_axes(), strict=True):
            arrays[f"{name}.{part}"] = _padded(arrays[f"{name}.{part}"], axis, rank)
    return int(rank)


def _padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """`array` with zeros appended up to `length` along `axis`."""
    missing = length - array.shape[axis]
    return (
        np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])
        if missing
        else array
    )
