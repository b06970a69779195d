"""PEFT's layout of adapters: adapter_model.safetensors and adapter_config.json.

The tensors' names are `base_model.model.<module>` and `.lora_A.weight` [r, in], `.lora_B.weight`
[out, r], of embeddings `.lora_embedding_A` [r, V], `.lora_embedding_B` [D, r], and for DoRA
`.lora_magnitude_vector` [out]. A layer's scale is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
`use_rslora`. `rank_pattern` and `alpha_pattern` give rank and alpha of some layers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError, listed
from pyloss.io.files import write_json, write_safetensors
from pyloss.nn import Embedding
from pyloss.tuner.adapters.layout import (
    CONFIG_FILE,
    PEFT_FILE,
    StoredAdapter,
    StoredLayer,
    arrays_of,
    grouped,
    low_rank_kind,
    number,
)
from pyloss.tuner.adapters.lora_parameters import LoraParameters
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.adapters.mlx import mlx_config
from pyloss.tuner.adapters.peft_experts import (
    check_targets,
    peft_name,
    take_experts,
    take_own_layers,
    whole_parameters,
)
from pyloss.tuner.data.system_prompt import KEY, checked

_PREFIX = "base_model.model."
_BASE = ".base_layer.weight"
_SUFFIXES = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_a",
    ".lora_embedding_B": "lora_b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}

_EXPERTS_NAMES = (".gate_proj", ".up_proj", ".down_proj")

# Settings that change what an adapter computes, with the values that mean "not used".
_INACTIVE = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}
# Keys named like switches that are supported, or that matter only where training begins.
_PASSIVE = (
    "use_rslora",
    "use_dora",
    "runtime_config",
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
# Initializations that change the base: the adapter then belongs to a base other than the named one.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(place: Path, config: dict[str, Any], name: str = PEFT_FILE) -> StoredAdapter:
    """The adapter in the file `name` of the folder `place`. Raises as `folder.read_adapter`."""
    source, file = place / CONFIG_FILE, place / name
    _refuse_settings(source, config)
    arrays, base = arrays_of(place, name)
    if other := [name for name in arrays if not name.startswith(_PREFIX)]:
        raise FormatError(file, other[0], f"expected names that begin with {_PREFIX}")
    stripped = {name[len(_PREFIX) :]: array for name, array in arrays.items()}
    bases = {
        name.removesuffix(_BASE): stripped.pop(name)
        for name in list(stripped)
        if name.endswith(_BASE)
    }
    kind, dropout = (
        "dora" if config.get("use_dora") else "lora",
        number(source, config, "lora_dropout", 0.0),
    )
    layers: dict[str, StoredLayer] = {}
    targets = check_targets(source, config)
    for name, parameter, parts in take_experts(
        file, stripped, targets, lambda p: _rank_and_scale(source, config, p)[0]
    ):
        layers[name] = _layer(parts, _rank_and_scale(source, config, parameter)[1], dropout)
    for name, scale, parts in take_own_layers(
        file, stripped, lambda module: _rank_and_scale(source, config, module)
    ):
        layers[name] = _layer(parts, scale, dropout)
    found = grouped(file, source, kind, stripped, _SUFFIXES)
    embeddings = {
        name.removesuffix(".lora_embedding_A")
        for name in stripped
        if name.endswith(".lora_embedding_A")
    }
    if kind == "dora" and embeddings:
        raise ValueError(
            f"{file}: {min(embeddings)}: PEFT's DoRA of an embedding scales columns, pyloss's rows"
        )
    problems = []
    for name, parts in found.items():
        weight = f"{name}.weight"  # the name of a layer adapted as a parameter
        whole = any(f".{weight}".endswith(f".{target}") for target in targets)
        rank, scale = _rank_and_scale(source, config, weight if whole else name)
        if parts["lora_a"].shape[0] != rank:
            problems.append(
                f"{name}: rank {parts['lora_a'].shape[0]}, and the configuration gives {rank:g}"
            )
        turned = {
            part: array if part == "m" else np.ascontiguousarray(array.T)
            for part, array in parts.items()
        }
        layers[name] = _layer(turned, scale, dropout)
    if problems:
        raise FormatError(source, None, f"does not fit the tensors:{listed(problems)}")
    if tied := bool(config.get("ensure_weight_tying")):
        _drop_twins(layers, bases, embeddings)
    scales = Counter(layer.options["scale"] for layer in layers.values())
    parameters = LoraParameters(
        rank=max((layer.arrays["lora_a"].shape[1] for layer in layers.values()), default=1),
        scale=scales.most_common(1)[0][0] if layers else 1.0,
        dropout=dropout,
        keys=tuple(sorted(layers)),
    )
    made = mlx_config(kind, parameters) | checked(config, source)
    untied = set() if tied else embeddings
    return StoredAdapter(str(place), kind, layers, made, bases, untied, base)


def _layer(arrays: dict[str, np.ndarray], scale: float, dropout: float) -> StoredLayer:
    return StoredLayer(arrays, {"scale": scale, "dropout": dropout})


def _drop_twins(
    layers: dict[str, StoredLayer], bases: dict[str, np.ndarray], embeddings: set[str]
) -> None:
    """Drops heads whose adapter is an embedding's, transposed: PEFT writes both if tied."""
    for name in set(layers) - embeddings:
        own = layers[name].arrays
        for other in embeddings:
            theirs = layers[other].arrays
            if np.array_equal(own["lora_a"].T, theirs["lora_b"]) and np.array_equal(
                own["lora_b"].T, theirs["lora_a"]
            ):
                del layers[name]
                bases.pop(name, None)
                break


def _refuse_settings(source: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first setting that changes the result and is not supported."""
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"{source}: peft_type {shown(config['peft_type'])} is not supported; "
            "supported is 'LORA'"
        )
    for key, value in config.items():
        # PEFT names its switches use_... and its groups of settings ..._config.
        switch = key not in _PASSIVE and (
            (key.startswith("use_") and value) or (key.endswith("_config") and value)
        )
        if switch or value not in _INACTIVE.get(key, (value,)):
            raise ValueError(f"{source}: {key} = {shown(value)} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"{source}: init_lora_weights = {shown(start)} is not supported: it changes the base; "
            "save the adapter with path_initial_model_for_weight_conversion"
        )


def _rank_and_scale(source: Path, config: Mapping[str, Any], module: str) -> tuple[float, float]:
    rank, alpha = (
        _of_module(source, config, *keys, module)
        for keys in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if rank < 1 or rank != int(rank):
        raise FormatError(source, "r", f"expected a rank of 1 or more, got {rank:g}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(
    source: Path, config: Mapping[str, Any], key: str, pattern: str, module: str
) -> float:
    """The number `key` of the configuration, or the one of `pattern` for the layer.

    The keys of `pattern` are regular expressions for the end of the layer's name.
    """
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise FormatError(source, pattern, f"expected an object, got {shown(patterns)}")
    try:
        chosen = next((name for name in patterns if re.match(rf"(.*\.)?({name})$", module)), None)
    except re.error as error:
        raise FormatError(source, pattern, f"expected regular expressions: {error}") from None
    return number(source, config, key) if chosen is None else number(source, patterns, chosen)


def write_peft(
    place: Path,
    layers: Mapping[str, LowRankAdapter],
    base_model: str | None,
    tied: bool,
    blocks: Collection[str] = (),
    system_prompt: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes adapters into the folder `place`.

    `tied` says that the model's head is its embedding. `blocks` are the names of its experts, such
    as "model.layers.0.mlp.switch_mlp". The system prompt is a key of pyloss, which PEFT ignores.
    `metadata` is further metadata of the file of arrays.

    Raises ValueError for adapters that the layout cannot express.
    """
    kind = low_rank_kind("PEFT's layout", layers)
    experts = {name: layer for name, layer in layers.items() if layer.lora_a.ndim == 3}
    if experts and kind == "dora":
        raise ValueError(
            f"{next(iter(experts))}: PEFT has no DoRA over experts; "
            "fuse() keeps it in the model's weights (pyloss fuse, pyloss export --to hf)"
        )
    arrays: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    embeddings, parameters = False, []
    own_names = any(block.endswith(".router") for block in blocks)
    for place_of, parameter, size, scale, pair in whole_parameters(experts, own_names):
        arrays |= {
            f"{_PREFIX}{place_of}.lora_{half}.weight": np.ascontiguousarray(array)
            for half, array in pair.items()
        }
        ranks[parameter], alphas[parameter] = size, _plain(scale * size)
        parameters.append(parameter)
    for name, layer in layers.items():
        if name in experts:
            continue
        embedding, target = isinstance(layer.base, Embedding), peft_name(name, own_names)
        router = f"{name.removesuffix('.gate')}.switch_mlp" in blocks
        if name.removesuffix(".layer") in blocks:  # of a Granite
            router, target = True, name.removesuffix(".layer")
        at = f"{_PREFIX}{target}"
        # PEFT takes the names of MLPs' matrices beside experts for those of the experts.
        beside = bool(blocks) and kind == "lora" and target.endswith(_EXPERTS_NAMES)
        if router or beside:  # a router is a parameter of its block in transformers, not a layer
            target += ".weight"
            parameters.append(target)
        ranks[target], alphas[target] = layer.rank, _plain(layer.scale * layer.rank)
        if embedding and kind == "dora":
            raise ValueError(f"{name}: PEFT's DoRA of an embedding scales columns, pyloss's rows")
        for half, array in (("A", layer.lora_a), ("B", layer.lora_b)):
            arrays[f"{at}.lora_embedding_{half}" if embedding else f"{at}.lora_{half}.weight"] = (
                np.ascontiguousarray(array.T)
            )
        if kind == "dora":
            arrays[f"{at}.lora_magnitude_vector"] = layer.m
        embeddings |= embedding
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT has no dropout over parameters.
        "lora_dropout": 0.0 if parameters else max(layer.dropout for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": kind == "dora",
        "target_modules": sorted(set(ranks) - set(parameters)),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if system_prompt is not None:
        config[KEY] = system_prompt
    if embeddings and tied:
        config["ensure_weight_tying"] = True
    write_safetensors(place / PEFT_FILE, arrays, {"format": "pt", **(metadata or {})})
    write_json(place / CONFIG_FILE, config, sort_keys=True)


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value
