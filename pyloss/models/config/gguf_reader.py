"""GGUF's metadata: their keys, and the fields of `ModelConfig` that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError, counted
from pyloss.io.tensor_file import StoredTensor, layers_held
from pyloss.models.config.delta_net import GGUF_INTERVAL, GGUF_KINDS, read_gguf_delta
from pyloss.models.config.families import FAMILIES, Family
from pyloss.models.config.fields import (
    CONV,
    DEFAULTS,
    FULL,
    LIMITS,
    MAMBA,
    MULTIPLIERS,
    SLIDING,
    SOFTCAPS,
    head_size,
    periodic_layers,
    rotated_layers,
)
from pyloss.models.config.gemma4 import GGUF_KEYS as GEMMA4_KEYS, read_gguf_gemma4
from pyloss.models.config.known_keys import refuse_gguf_keys
from pyloss.models.config.mamba import (
    GGUF_ARCHITECTURE,
    GGUF_KINDS as MAMBA_KINDS,
    read_gguf_mamba,
)
from pyloss.models.config.missing_blocks import missing_block
from pyloss.models.config.mixture import read_gguf_mixture
from pyloss.models.config.rope_scaling import (
    GGUF_ALL_DIM,
    read_gguf_longrope,
    read_gguf_scaling,
)
from pyloss.models.config.values import (
    FLAG,
    LIST,
    TEXT,
    Kind,
    Values,
    checked,
    counts,
    float32,
    whole,
)


def _pattern(value: Any) -> Any:
    """The period of layers without a window, or for each layer whether it has one."""
    if isinstance(value, list) and all(type(item) is bool for item in value):
        return value
    return whole()(value)


# Keys under the architecture's name, with the field that takes the value as it is.
_REQUIRED: dict[str, tuple[Kind, str]] = {
    "embedding_length": (whole(), "hidden_size"),
    "feed_forward_length": (whole(), "intermediate_size"),
    "block_count": (whole(), "num_hidden_layers"),
    "attention.head_count": (whole(), "num_attention_heads"),
    "context_length": (whole(), "max_position_embeddings"),
    "attention.layer_norm_rms_epsilon": (float32, "rms_norm_eps"),
}

# Further keys of all architectures.
_OPTIONAL: dict[str, Kind] = {
    "attention.head_count_kv": whole(),
    "attention.key_length": whole(),
    "attention.value_length": whole(),
    "attention.sliding_window": whole(),
    "rope.dimension_count": whole(),
    "rope.freq_base": float32,
    "rope.scale_linear": float32,
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": float32,
    "rope.scaling.original_context_length": whole(),
    "rope.scaling.attn_factor": float32,
    "rope.scaling.yarn_ext_factor": float32,
    "rope.scaling.yarn_attn_factor": float32,
    "rope.scaling.yarn_beta_fast": float32,
    "rope.scaling.yarn_beta_slow": float32,
    "expert_count": whole(),
}

# Keys of architectures with windows in some layers, with experts, and with a separate size of
# experts.
_OF_WINDOWS: dict[str, Kind] = {
    "attention.sliding_window_pattern": _pattern,
    "rope.freq_base_swa": float32,
}
_OF_EXPERTS: dict[str, Kind] = {"expert_used_count": whole(), "expert_weights_norm": FLAG}
_OF_SIZED_EXPERTS: dict[str, Kind] = {"expert_feed_forward_length": whole()}
_OF_SIGMOID_EXPERTS: dict[str, Kind] = {
    "leading_dense_block_count": whole(0, LIMITS["num_hidden_layers"]),
    "expert_gating_func": whole(0),
}
_OF_SHARED_EXPERTS: dict[str, Kind] = {"expert_shared_feed_forward_length": whole()}
# Keys of architectures with multipliers, and of no other one. llama.cpp requires the last; it takes
# 0 for an absent one of the others, and rope.scaling.finetuned for whether positions rotate.
_OF_MULTIPLIERS: dict[str, Kind] = {
    **dict.fromkeys(MULTIPLIERS.values(), float32),
    "rope.scaling.finetuned": FLAG,
}

# Keys of architectures with short convolutions.
_OF_CONVOLUTIONS: dict[str, Kind] = {
    "attention.head_count_kv": counts,  # 0 for a layer without attention
    "shortconv.l_cache": whole(1),
}

# Keys of architectures whose queries grow with their position.
_OF_GROWTH: dict[str, Kind] = {
    "attention.temperature_scale": float32,
    f"rope.scaling.{GGUF_ALL_DIM}": float32,
}

_OF_SOFTCAPS: dict[str, Kind] = dict.fromkeys(SOFTCAPS, float32)

_KNOWN = {*_REQUIRED, *_OPTIONAL, *_OF_WINDOWS, *_OF_EXPERTS, *_OF_SIZED_EXPERTS}
_DEFAULTS = {
    **dict.fromkeys(_OPTIONAL),
    "attention.sliding_window": 0,
    "expert_weights_norm": None,
    GGUF_INTERVAL: 4,
    "rope.dimension_sections": None,
    "expert_shared_feed_forward_length": None,
    "attention.temperature_scale": None,
    f"rope.scaling.{GGUF_ALL_DIM}": None,
    **{key: 0.0 for key in MULTIPLIERS.values() if key != "logit_scale"},
    "rope.scaling.finetuned": True,
    **dict.fromkeys(key for key in GEMMA4_KEYS if key not in _OF_EXPERTS | _OF_SIZED_EXPERTS),
}
#: The tensors of longrope's short and long factors.
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_TOKENS = ("bos", "eos", "padding")


def read_gguf_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    path: str | os.PathLike[str],
) -> dict[str, Any]:
    """The fields of `ModelConfig`, from `metadata` and, if it lacks them, from `tensors`.

    Tensors tell the vocabulary's size, ties, biases and rotary factors. `path` is for errors.
    Raises ValueError and FormatError as `hf_reader.read_hf_config` does.
    """
    model_type, read = _read(metadata, path)
    family = FAMILIES[model_type]
    vocabulary_size = _vocabulary_size(read, tensors)
    heads, head_dim = read["attention.head_count"], _head_dim(read, family)
    theta = read["rope.freq_base"]
    if theta is None:
        theta = float32(family.defaults.get("rope_theta", DEFAULTS["rope_theta"]))
    rotary = read["rope.dimension_count"] or head_dim
    short, long = (tensors.get(name) for name in LONGROPE_FACTORS)
    scaling = None
    if family.longrope:
        scaling = read_gguf_longrope(read, short, long, rotary // 2)
    elif not family.gemma4:
        scaling = read_gguf_scaling(read, tensors.get("rope_freqs.weight"), theta, head_dim)
    windows = _windows(read, family, theta)
    scanned = read.prefix == f"{GGUF_ARCHITECTURE}."
    key_value_heads, convolutions = _convolutions(read, family, scanned)
    tokens = Values(
        path,
        metadata,
        {f"{kind}_token_id": whole() for kind in _TOKENS},
        {f"{kind}_token_id": None for kind in _TOKENS},
        "tokenizer.ggml.",
    )
    mixture = read_gguf_mixture(read, family)
    if read["feed_forward_length"] is None and mixture is not None:  # no layer has an MLP
        read["feed_forward_length"] = mixture.size
    return {
        **{field: read[key] for key, (_, field) in _REQUIRED.items()},
        **windows,
        **convolutions,
        "model_type": model_type,
        "no_rope_layers": (
            [int(scanned and read["rope.scaling.finetuned"])] * read["block_count"]
            if family.position_switch
            else gguf_no_rope_layers(family, read["block_count"])
        ),
        "vocab_size": vocabulary_size,
        "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "partial_rotary_factor": _share(rotary, head_dim) if family.partial_rotary else None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors and not family.qkv_bias,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "query_pre_attn_scalar": gguf_query_scalar(
            family, read["block_count"], read["embedding_length"], heads, head_dim
        )
        if family.query_scalar
        else None,
        **{name: read.get(name) for name in SOFTCAPS},
        "llama_4_scaling_beta": read.get("attention.temperature_scale") or None,
        **_multipliers(read, family),
        "mixture": mixture,
        **read_gguf_delta(read, family),
        "mamba": (
            read_gguf_mamba(read, any(name.endswith(".ssm_conv1d.bias") for name in tensors))
            if scanned
            else None
        ),
        "bos_token_id": tokens["bos_token_id"],
        "eos_token_id": tokens["eos_token_id"],
        "pad_token_id": tokens["padding_token_id"],
        **(read_gguf_gemma4(read, tensors, windows.get("layer_types")) if family.gemma4 else {}),
    }


def _read(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[str, Values]:
    """The model_type, and the values under the architecture's name."""
    name = "general.architecture"
    arch = Values(path, metadata, {name: TEXT}, {})[name]
    count = Values(path, metadata, {"expert_count": whole()}, {"expert_count": 0}, f"{arch}.")
    sparse = count["expert_count"] > 0
    alike = {key: each.gguf_of(sparse) for key, each in FAMILIES.items()}
    scanned = arch == GGUF_ARCHITECTURE
    found = [key for key, own in alike.items() if own == arch or (scanned and FAMILIES[key].mamba)]
    if not found:
        known = {own for own in alike.values() if own is not None} | {GGUF_ARCHITECTURE}
        supported = ", ".join(sorted(known))
        kind = "architecture with experts" if sparse else "architecture"
        own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items()}
        raise ValueError(
            f"{path}: GGUF {kind} {shown(arch)} is not supported{missing_block(arch, own)}; "
            f"supported are {supported}"
        )
    # Families may share an architecture: one has windows in some layers, no rotary positions, or a
    # shared expert.
    windowed = bool(metadata.get(f"{arch}.attention.sliding_window"))
    # llama.cpp rotates in granitemoe whatever the file says.
    unrotated = metadata.get(f"{arch}.rope.scaling.finetuned") is False and not sparse
    shared = bool(metadata.get(f"{arch}.expert_shared_feed_forward_length"))
    found.sort(
        key=lambda name: (
            (FAMILIES[name].window_period is not None) != windowed,
            FAMILIES[name].position_switch != unrotated,
            bool((own := FAMILIES[name].experts) and own.shared) != shared,
        )
    )
    family = FAMILIES[found[0]]
    kinds = {key: kind for key, (kind, _) in _REQUIRED.items()} | _OPTIONAL
    if family.window_period:
        kinds |= _OF_WINDOWS
    if family.experts is not None and sparse:
        kinds |= _OF_EXPERTS | (_OF_SIZED_EXPERTS if family.experts.own_size else {})
        kinds |= _OF_SHARED_EXPERTS if family.experts.shared else {}
        kinds |= _OF_SIGMOID_EXPERTS if family.experts.sigmoid else {}
    if family.softcaps:
        kinds |= _OF_SOFTCAPS
    if family.short_conv:
        kinds |= _OF_CONVOLUTIONS
    if family.linear_attention:
        kinds |= GGUF_KINDS | {"rope.dimension_sections": LIST}
    if scanned:
        kinds |= MAMBA_KINDS | {"attention.head_count_kv": counts}
    if family.multipliers:
        kinds |= _OF_MULTIPLIERS
    if family.gemma4:
        kinds |= GEMMA4_KEYS
    if family.query_growth:
        kinds |= _OF_GROWTH
    refuse_gguf_keys(path, arch, metadata, _KNOWN | set(kinds))
    defaults = _DEFAULTS | _window_defaults(family)
    if family.gemma4:
        defaults |= dict.fromkeys(GEMMA4_KEYS)
    if family.defaults.get("intermediate_size", 0) is None:
        defaults["feed_forward_length"] = None
    return found[0], Values(path, metadata, kinds, defaults, f"{arch}.")


def _window_defaults(family: Family) -> dict[str, Any]:
    return {
        "attention.sliding_window_pattern": family.window_period,
        "rope.freq_base_swa": family.defaults.get("rope_local_base_freq"),
        # llama.cpp's values for what early files of Gemma 2 lack
        **({name: family.defaults.get(name) for name in SOFTCAPS} if family.softcaps else {}),
        **({"final_logit_softcapping": 30.0} if family.gemma4 else {}),
        **(
            {"attention.sliding_window": family.defaults["sliding_window"]}
            if family.gguf_own_windows
            else {}
        ),
    }


def _vocabulary_size(read: Values, tensors: Mapping[str, StoredTensor]) -> int:
    """The embedding's rows, since older files have no vocab_size. Refuses too many layers."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(read.path, "token_embd.weight", "this tensor is missing")
    layers, held = read["block_count"], layers_held(tensors, "blk.")
    if layers > held:
        reason = f"it is {layers}, and the file has tensors for {counted(held, 'layer')}"
        raise read.wrong("block_count", reason)
    return embedding.shape[0]


def _share(rotary: int, head_dim: int) -> float:
    """The partial_rotary_factor that stands for this number of elements."""
    factor = rotary / head_dim
    return factor if int(head_dim * factor) == rotary else (rotary + 0.5) / head_dim


def _head_dim(read: Values, family: Family) -> int:
    rotary, length = read["rope.dimension_count"], read["attention.key_length"]
    head_dim: int | None = length
    if length is None and not family.partial_rotary:
        head_dim = rotary
    if head_dim is None:
        sizes = {"hidden": read["embedding_length"], "heads": read["attention.head_count"]}
        head_dim = checked(read.path, head_size, **sizes)
    if (rotary or head_dim) != head_dim and not family.partial_rotary:
        raise ValueError(
            f"{read.path}: rope.dimension_count {rotary} of head size {head_dim}: "
            "partial is not supported"
        )
    if read["attention.value_length"] not in (None, head_dim):
        raise ValueError(
            f"{read.path}: {read.prefix}attention.value_length is not {head_dim}, "
            "the length of keys: not supported"
        )
    return head_dim


def _windows(read: Values, family: Family, theta: float) -> dict[str, Any]:
    """sliding_window, layer_types and rope_local_base_freq."""
    window = read["attention.sliding_window"]
    if family.gguf_window:
        return {"sliding_window": window or None}
    if family.window_period is None:
        if 0 < window < read["context_length"]:  # llama.cpp ignores others
            name = f"{read.prefix}attention.sliding_window {window}"
            raise read.unsupported(name, "0")
        return {}
    local_theta = read["rope.freq_base_swa"]
    if family.local_rope == "same":
        if local_theta not in (None, theta):  # llama.cpp does not use it
            name = f"{read.prefix}rope.freq_base_swa {local_theta}"
            raise read.unsupported(name, f"{theta}, that of all layers")
        local_theta = theta
    local = {"rope_local_base_freq": local_theta}
    if not window:
        return local
    key = "attention.sliding_window_pattern"
    pattern = read[key]
    if isinstance(pattern, list):
        types = [SLIDING if local else FULL for local in pattern]
        return {**local, "sliding_window": window, "layer_types": types}
    try:
        types = periodic_layers(pattern, read["block_count"])
    except ValueError as error:
        raise read.wrong(key, str(error)) from None
    return {**local, "sliding_window": window, "layer_types": types}


def _convolutions(read: Values, family: Family, scanned: bool) -> tuple[Any, dict[str, Any]]:
    """The number of key-value heads, and layer_types and conv_L_cache, which it tells of layers.

    Layers without such heads have a short convolution, or with `scanned` the scan of Mamba-2.
    """
    heads, layers = read["attention.head_count_kv"], read["block_count"]
    if not (family.short_conv or scanned):
        return heads, {}
    each = heads if isinstance(heads, list) else [heads or read["attention.head_count"]] * layers
    some = sorted(set(each) - {0})
    if len(some) > 1:
        raise read.unsupported(
            f"{read.prefix}attention.head_count_kv {shown(each)}", "0 or one number for all layers"
        )
    types = [FULL if count else MAMBA if scanned else CONV for count in each]
    if scanned:
        return (some or [None])[0], {"layer_types": types}
    return (some or [None])[0], {
        "layer_types": types,
        "conv_L_cache": read["shortconv.l_cache"],
    }


def _multipliers(read: Values, family: Family) -> dict[str, Any]:
    if not family.multipliers:
        return {}
    if not read["rope.scaling.finetuned"] and not family.position_switch:
        raise read.unsupported(f"{read.prefix}rope.scaling.finetuned false", "true")
    found = {name: read[key] for name, key in MULTIPLIERS.items()}
    absent = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": None}
    return found | {name: value for name, value in absent.items() if found[name] == 0}


def gguf_no_rope_layers(family: Family, layers: int) -> list[int] | None:
    """no_rope_layers, which GGUF does not store: llama.cpp knows the published interval."""
    if not family.unrotated_layers:
        return None
    return rotated_layers(family.defaults["no_rope_layer_interval"], layers)


def gguf_query_scalar(family: Family, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """query_pre_attn_scalar, which GGUF does not store.

    llama.cpp knows the largest of the published models by its number of layers.
    """
    return hidden // heads if layers == family.gguf_largest else head_dim
