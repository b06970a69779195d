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
from types import MappingProxyType
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError, listed
from pyloss.io.files import write_json, write_safetensors
from pyloss.nn import Embedding
from pyloss.tuner.adapters.companions import (
    BIASES,
    TokenIndices,
    main_adapters,
    read_indices,
    read_modules,
    settings_of,
)
from pyloss.tuner.adapters.layout import (
    BIAS,
    CONFIG_FILE,
    PEFT_FILE,
    StoredAdapter,
    StoredLayer,
    arrays_of,
    grouped,
    is_table,
    low_rank_kind,
    number,
)
from pyloss.tuner.adapters.lora_parameters import LoraParameters
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.adapters.merging import dense
from pyloss.tuner.adapters.mlx import mlx_config
from pyloss.tuner.adapters.peft_experts import (
    check_targets,
    peft_name,
    take_experts,
    take_own_layers,
    whole_parameters,
)
from pyloss.tuner.adapters.registry import COMPANIONS
from pyloss.tuner.data.system_prompt import KEY, checked

_PREFIX = "base_model.model."
_BASE, _BASE_BIAS = ".base_layer.weight", ".base_layer.bias"
_TOKENS = ".token_adapter.trainable_tokens_delta"
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
_INACTIVE: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
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
    beside, biases, tables = _take_companions(source, config, stripped)
    saved = read_modules(config.get("modules_to_save") or ())
    held = [name for name, layer in beside.items() if layer.kind == "whole"]
    unheld = tuple(key for key in saved if not any(_is_saved(name, (key,)) for name in held))
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
    for name, bias in biases.items():
        if name not in layers:
            raise FormatError(file, f"{name}{_BASE_BIAS}", "its layer has no adapter")
        layers[name].arrays[BIAS] = bias
    tied = bool(config.get("ensure_weight_tying"))
    if tied:
        _drop_twins(layers, tables, embeddings)
    scales = Counter(layer.options["scale"] for layer in layers.values())
    parameters = LoraParameters(
        rank=max((layer.arrays["lora_a"].shape[1] for layer in layers.values()), default=1),
        scale=scales.most_common(1)[0][0] if layers else 1.0,
        dropout=dropout,
        keys=tuple(sorted(layers)),
        ensure_weight_tying=tied
        or not any(
            is_table(name) and layer.kind != "tokens" for name, layer in (layers | beside).items()
        ),
        **_settings(layers, beside),
    )
    made = mlx_config(kind, parameters) | checked(config, source)
    tied = parameters.ensure_weight_tying
    every = layers | beside
    return StoredAdapter(str(place), kind, every, made, tables, tied, base, saved, unheld)


def _take_companions(
    source: Path, config: Mapping[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, StoredLayer], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Takes what is beside the adapters out of `arrays`: layers, biases under adapters, tables."""
    try:
        saved = read_modules(config.get("modules_to_save") or ())
        indices = read_indices(config.get("trainable_token_indices") or ())
    except TypeError as error:
        raise FormatError(source, None, str(error)) from None
    bias = config.get("bias") or "none"
    if bias not in BIASES:
        raise ValueError(f"{source}: bias = {shown(bias)} is not supported")
    layers: dict[str, StoredLayer] = {}
    biases: dict[str, np.ndarray] = {}
    tables: dict[str, np.ndarray] = {}
    _check_tokens(source, config.get("trainable_token_indices"), indices, arrays)
    for name in list(arrays):
        module, _, part = name.rpartition(".")
        if name.endswith(_TOKENS):
            module = name.removesuffix(_TOKENS)
            key = next((key for key in indices if f".{module}".endswith(f".{key}")), None)
            # The head of a tied model has the embedding's tokens.
            chosen = indices[key] if key else next(iter(indices.values()), None)
            if chosen is None:
                raise FormatError(source, "trainable_token_indices", f"has no tokens of {module}")
            rows = StoredLayer({"tokens": arrays.pop(name)}, {"indices": chosen}, "tokens")
            layers[module] = rows
        elif name.endswith(_BASE):
            module = name.removesuffix(_BASE).removesuffix(".token_adapter")
            tables[module] = arrays.pop(name)
        elif name.endswith(_BASE_BIAS) and bias != "none":
            biases[name.removesuffix(_BASE_BIAS)] = arrays.pop(name)
        elif part in ("weight", "bias") and ".lora_" not in name:
            named = _is_saved(module, saved)
            if not named and part == "weight" and is_table(module):
                tables[module] = arrays.pop(name)
            elif not named and part == "bias" and f"{module}.lora_A.weight" in arrays:
                biases[module] = arrays.pop(name)  # PEFT's names before 0.10
            elif named or (part == "bias" and bias == "all"):
                layer = layers.setdefault(module, StoredLayer({}, kind="whole"))
                layer.arrays[part] = arrays.pop(name)
    return layers, biases, tables


def _check_tokens(source: Path, given: Any, indices: TokenIndices, names: Collection[str]) -> None:
    """Raises FormatError naming the tables of `trainable_token_indices` without a tensor."""
    modules = [name.removesuffix(_TOKENS) for name in names if name.endswith(_TOKENS)]
    missing = [
        f"{key}{_TOKENS}"
        for key in indices
        if not any(f".{module}".endswith(f".{key}") for module in modules)
    ]
    # A list is of the embedding, whatever the model calls it.
    if missing and (isinstance(given, Mapping) or not modules):
        raise FormatError(
            source, "trainable_token_indices", f"the file of tensors lacks {', '.join(missing)}"
        )


def _is_saved(module: str, saved: Collection[str]) -> bool:
    """Whether `modules_to_save` names the module or one that it is in, by the end of its name."""
    parts = module.split(".")
    outer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(name.endswith(key) for name in outer for key in saved)


def _settings(
    layers: Mapping[str, StoredLayer], beside: Mapping[str, StoredLayer]
) -> dict[str, Any]:
    """The settings of pyloss for what is beside adapters."""
    whole = [n for n, layer in beside.items() if layer.kind == "whole" and "weight" in layer.arrays]
    every = any(
        layer.kind == "whole" and set(layer.arrays) == {"bias"} for layer in beside.values()
    )
    own = any(BIAS in layer.arrays for layer in layers.values())
    return {
        "modules_to_save": tuple(sorted(whole)),
        "trainable_token_indices": {
            name: tuple(layer.options["indices"])
            for name, layer in beside.items()
            if layer.kind == "tokens"
        },
        "bias": "all" if every else "lora_only" if own else "none",
    }


def _layer(arrays: dict[str, np.ndarray], scale: float, dropout: float) -> StoredLayer:
    return StoredLayer(arrays, {"scale": scale, "dropout": dropout})


def _drop_twins(
    layers: dict[str, StoredLayer], tables: dict[str, np.ndarray], embeddings: set[str]
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
                tables.pop(name, None)
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
    tables: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Writes adapters into the folder `place`.

    `tied` says that the model's head is its embedding. `blocks` are the names of its experts, such
    as "model.layers.0.mlp.switch_mlp". The system prompt is a key of pyloss, which PEFT ignores.
    `metadata` is further metadata of the file of arrays, `tables` what `adapter.own_tables` gives.

    Raises ValueError for adapters that the layout cannot express.
    """
    kind = low_rank_kind("PEFT's layout", layers)
    others = {name: layer for name, layer in layers.items() if layer.kind in COMPANIONS}
    layers = main_adapters(layers)
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
        if BIAS in layer.parameter_names():
            arrays[f"{at}{_BASE_BIAS}"] = layer.linear.bias
        embeddings |= embedding
    tables_adapted = embeddings or any(isinstance(each.base, Embedding) for each in others.values())
    more = _written_companions(arrays, layers, others, tied)
    for name, table in tables.items():
        module, _, base = name.removesuffix(".weight").rpartition(".")
        inner = {"embedding": _BASE, "linear": _BASE, "base_layer": f".token_adapter{_BASE}"}
        full = f"{module}{inner[base]}" if base in inner else name
        arrays[f"{_PREFIX}{full}"] = table
        if tied and base not in inner:
            arrays[f"{_PREFIX}lm_head.weight"] = table
    if not ranks:
        raise ValueError("PEFT's layout needs an adapter of low rank, beside what is trained whole")
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
        "bias": more.pop("bias", "none"),
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": kind == "dora",
        "target_modules": sorted(set(ranks) - set(parameters)),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
    config |= more
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if system_prompt is not None:
        config[KEY] = system_prompt
    if tables_adapted and tied:
        config["ensure_weight_tying"] = True
    write_safetensors(place / PEFT_FILE, arrays, {"format": "pt", **(metadata or {})})
    write_json(place / CONFIG_FILE, config, sort_keys=True)


def _written_companions(
    arrays: dict[str, np.ndarray],
    layers: Mapping[str, Any],
    beside: Mapping[str, Any],
    tied: bool,
) -> dict[str, Any]:
    """Adds what is beside the adapters to `arrays`; returns PEFT's settings for it."""
    for name, layer in beside.items():
        at = f"{_PREFIX}{name}"
        if layer.kind == "tokens":
            arrays[f"{at}{_TOKENS}"] = layer.tokens
            continue
        for part in layer.shapes(layer.base):
            if part == "bias" or "weight" in layer.trained:
                arrays[f"{at}.{part}"] = np.asarray(dense(getattr(layer, part)))
        if tied and isinstance(layer.base, Embedding):
            arrays[f"{_PREFIX}lm_head.weight"] = arrays[f"{at}.weight"]
    return settings_of({**layers, **beside})


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value
