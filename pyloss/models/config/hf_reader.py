"""Hugging Face's config.json: its keys, and the fields of `ModelConfig` that follow from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pyloss.checks.numbers import shown
from pyloss.io.files import read_json
from pyloss.models.config.delta_net import KEYS as DELTA_KEYS, read_hf_delta
from pyloss.models.config.families import FAMILIES, Family
from pyloss.models.config.fields import (
    DEFAULTS,
    FULL,
    LAYER_TYPES,
    LIMITS,
    MULTIPLIERS,
    SLIDING,
    SOFTCAPS,
    head_size,
    periodic_layers,
    rotated_layers,
)
from pyloss.models.config.gemma4 import KEYS as GEMMA4_KEYS, read_hf_gemma4
from pyloss.models.config.known_keys import MAMBA_KEYS, refuse_hf_keys, refuse_rope_keys
from pyloss.models.config.lfm2 import READ as LFM2_READ, plain_keys
from pyloss.models.config.mamba import read_hf_mamba, read_hf_types
from pyloss.models.config.missing_blocks import missing_block
from pyloss.models.config.mixture import read_hf_mixture
from pyloss.models.config.rope_scaling import read_hf_scaling
from pyloss.models.config.values import (
    FLAG,
    LIST,
    OBJECT,
    TEXT,
    Kind,
    Values,
    checked,
    real,
    whole,
)


def _token_ids(value: Any) -> Any:
    if type(value) is not int and not (
        isinstance(value, list) and all(type(item) is int for item in value)
    ):
        raise TypeError(f"expected an integer or a list of them, got {shown(value)}")
    return value


def _layer_numbers(value: Any) -> Any:
    if type(value) is not list or not all(type(item) is int for item in value):
        raise TypeError(f"expected a list of layers, got {shown(value)}")
    return value


# Required keys, unless the family has a default.
_REQUIRED = {
    name: whole(1, LIMITS[name])
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
}

# Further keys of all families.
_OPTIONAL: dict[str, Kind] = {
    "num_key_value_heads": whole(),
    "head_dim": whole(),
    "max_position_embeddings": whole(),
    "rms_norm_eps": real,
    "rope_theta": real,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "original_max_position_embeddings": real,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "sliding_window": whole(),
    "layer_types": LIST,
    "bos_token_id": whole(),
    "eos_token_id": _token_ids,
    "pad_token_id": whole(),
}

# Keys of some families, with the names of those families.
_OF_SOME: dict[str, tuple[Kind, Callable[[Family], Any]]] = {
    "hidden_act": (TEXT, lambda family: family.activation == "silu"),
    "hidden_activation": (TEXT, lambda family: family.activation != "silu"),
    "use_sliding_window": (FLAG, lambda family: family.window_switch),
    "max_window_layers": (whole(), lambda family: family.windows in ("from", "alternate")),
    "sliding_window_pattern": (whole(), lambda family: family.windows == "periodic"),
    "rope_local_base_freq": (real, lambda family: family.local_rope == "own"),
    "query_pre_attn_scalar": (whole(1), lambda family: family.query_scalar),
    **{name: (real, lambda family: family.softcaps) for name in SOFTCAPS},
    **{name: (real, lambda family: family.multipliers) for name in MULTIPLIERS},
    "conv_L_cache": (whole(1), lambda family: family.short_conv),
    "conv_bias": (FLAG, lambda family: family.short_conv),
    **{key: (kind, lambda family: family.gemma4) for key, kind in GEMMA4_KEYS.items()},
    **{key: (whole(1), lambda family: family.linear_attention) for key in DELTA_KEYS.values()},
    "full_attention_interval": (whole(1), lambda family: family.linear_attention),
    "attn_output_gate": (FLAG, lambda family: family.linear_attention),
    "no_rope_layers": (LIST, lambda family: family.unrotated_layers),
    "no_rope_layer_interval": (whole(1), lambda family: family.unrotated_layers),
    "partial_rotary_factor": (real, lambda family: family.partial_rotary),
    "num_experts": (whole(), lambda family: family.experts or family.gemma4),
    "num_local_experts": (whole(), lambda family: family.experts),
    "num_experts_per_tok": (whole(), lambda family: family.experts),
    "shared_intermediate_size": (
        whole(0),
        lambda family: family.experts and family.experts.shared == "shared_intermediate_size",
    ),
    "position_embedding_type": (TEXT, lambda family: family.position_switch),
    "layers_block_type": (LIST, lambda family: family.position_switch),
    "norm_topk_prob": (FLAG, lambda family: family.experts),
    "moe_intermediate_size": (whole(), lambda family: family.experts or family.gemma4),
    "decoder_sparse_step": (whole(), lambda family: family.experts),
    "mlp_only_layers": (_layer_numbers, lambda family: family.experts),
    "shared_expert_intermediate_size": (
        whole(1),
        lambda family: (
            family.experts and family.experts.shared == "shared_expert_intermediate_size"
        ),
    ),
    "num_dense_layers": (
        whole(0, LIMITS["num_hidden_layers"]),
        lambda family: family.experts and family.experts.sigmoid,
    ),
    "use_expert_bias": (FLAG, lambda family: family.experts and family.experts.sigmoid),
    "routed_scaling_factor": (real, lambda family: family.experts and family.experts.sigmoid),
    "qkv_bias": (FLAG, lambda family: family.qkv_bias),
}

# Options that neither a family nor the file sets.
_OFF = {
    "use_sliding_window": False,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "rope_scaling": {},
    "rope_parameters": {},
    "qkv_bias": True,
    "attn_output_gate": True,
}


#: Kinds of models with a part for images, and the language model's kind where it is not said.
WRAPPERS = {"mistral3": "mistral"}


def read_hf_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of `ModelConfig`, read from the config.json at `path`.

    Raises:
        ValueError: an unsupported model family, or an unsupported option; names the families.
        FormatError: a missing key, a value of the wrong type, or values that do not fit together.
        OSError: the file cannot be read.
    """
    content = _text_part(path, read_json(path))
    model_type = Values(path, content, {"model_type": TEXT}, {})["model_type"]
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {shown(model_type)} is not supported"
            f"{missing_block(model_type, content)}; "
            f"supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    kinds = _REQUIRED | _OPTIONAL
    kinds |= {key: kind for key, (kind, has) in _OF_SOME.items() if has(family)}
    known = set(kinds) | (LFM2_READ if family.short_conv else set())
    if family.mamba:
        known |= MAMBA_KEYS
    refuse_hf_keys(path, content, known, set(_OF_SOME), model_type)
    if family.short_conv:
        content = plain_keys(path, content, family.defaults, adjusted=family.experts is None)
    defaults = {**{key: None for key in kinds if key not in _REQUIRED}, **_OFF, **DEFAULTS}
    defaults |= family.defaults
    # A null is no window and no cap; a missing key is the default.
    off = {key for key in ("sliding_window", *SOFTCAPS) if content.get(key, 0) is None}
    defaults |= dict.fromkeys(off)
    read = Values(path, content, kinds, defaults | {"num_experts": None})
    _refuse_activation(read, family)
    if family.linear_attention and not read["attn_output_gate"]:
        raise read.unsupported("attn_output_gate false", "true")
    if family.qkv_bias and not read["qkv_bias"]:
        raise read.unsupported("qkv_bias false", "true")
    heads, head_dim = read["num_attention_heads"], read["head_dim"]
    if head_dim is None:
        head_dim = checked(path, head_size, hidden=read["hidden_size"], heads=heads)
    key_value_heads = read["num_key_value_heads"]
    mamba = None
    if family.mamba:
        types = read_hf_types(read)
        read["layer_types"] = types
        mamba = None if types is None else read_hf_mamba(read, content)
    no_rope_layers = _no_rope_layers(read, family)
    mixture = read_hf_mixture(read, family)
    if family.gguf_dense is not None and mixture is None:
        read["intermediate_size"] = read["shared_intermediate_size"]
    if read["intermediate_size"] is None and mixture is not None:  # no layer has an MLP
        read["intermediate_size"] = mixture.size
    own = (*_REQUIRED, *DEFAULTS, "bos_token_id", "eos_token_id", "pad_token_id")
    windows = _windows(read, family, model_type, no_rope_layers)
    return {
        **{name: read[name] for name in own},
        **_rope(read, family),
        **windows,
        "model_type": model_type,
        "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
        "head_dim": head_dim,
        "no_rope_layers": no_rope_layers,
        **{key: read[key] for key in ("conv_L_cache", "conv_bias") if family.short_conv},
        "query_pre_attn_scalar": read.get("query_pre_attn_scalar"),
        **{name: read.get(name) for name in SOFTCAPS},
        **{name: read.get(name) for name in MULTIPLIERS},
        "mixture": mixture,
        "mamba": mamba,
        **({"gemma4": read_hf_gemma4(read, windows["layer_types"])} if family.gemma4 else {}),
        **read_hf_delta(read, family),
    }


def _text_part(path: str | os.PathLike[str], content: dict[str, Any]) -> dict[str, Any]:
    """The language model's configuration in one that also describes an image model."""
    kind = f"{content.get('model_type')}_text"
    wrapper = next((own for name, own in WRAPPERS.items() if f"{name}_text" == kind), None)
    if kind not in FAMILIES and wrapper is None:
        return content
    text = Values(path, content, {"text_config": OBJECT}, {})["text_config"]
    if wrapper is not None:
        kind = text.get("model_type", wrapper)
        # transformers has one of the two flags, and a head in the file counts more.
        tied = (part.get("tie_word_embeddings") for part in (content, text))
        said = [flag for flag in tied if flag is not None]
        text = {**text, "tie_word_embeddings": True in said or not said}
    outer = {
        key: value
        for key, value in content.items()
        if key.endswith("_token_id") and value is not None
    }
    return {**content, **text, **outer, "model_type": kind}


def _refuse_activation(read: Values, family: Family) -> None:
    key = "hidden_act" if "hidden_act" in read else "hidden_activation"
    activation = family.activation if read[key] is None else read[key]
    if {"swish": "silu"}.get(activation, activation) != family.activation:
        raise read.unsupported(f"{key} {shown(activation)}", repr(family.activation))


def _no_rope_layers(read: Values, family: Family) -> list[int] | None:
    """As in transformers, a list counts more than the interval, and may be longer than needed."""
    if family.position_switch:
        kind = read["position_embedding_type"]
        if kind not in (None, "rope", "nope"):
            raise read.unsupported(f"position_embedding_type {shown(kind)}", '"rope" or "nope"')
        return None if kind == "rope" else [0] * read["num_hidden_layers"]
    if not family.unrotated_layers:
        return None
    listed: list[int] | None = read["no_rope_layers"]
    layers = read["num_hidden_layers"]
    if listed is None:
        return rotated_layers(read["no_rope_layer_interval"], layers)
    return listed[:layers]


def _windows(
    read: Values, family: Family, model_type: str, no_rope_layers: list[int] | None
) -> dict[str, Any]:
    """sliding_window and layer_types, which families express in five ways."""
    window, types = read["sliding_window"], read["layer_types"]
    if family.short_conv or family.linear_attention or family.mamba:
        if window is not None:
            raise read.unsupported(f"sliding_window {window} for {model_type}", "null")
        return {"sliding_window": None, "layer_types": types}
    if family.windows is None:
        if window is not None and window < read["max_position_embeddings"]:
            raise ValueError(
                f"{read.path}: sliding_window {window} is not supported for {model_type}; "
                "supported is null"
            )
        window = None
    elif family.window_switch and not read["use_sliding_window"]:
        if family.windows == "unrotated" and SLIDING in (types or ()):
            raise ValueError(
                f"{read.path}: layer_types names {SLIDING}, and use_sliding_window is false"
            )
        window = None
    needed = family.windows == "fourth" or family.gemma4
    if needed and window is None and SLIDING in (types or (SLIDING,)):
        raise ValueError(f"{read.path}: sliding_window is null, and layer_types have {SLIDING}")
    if family.windows in (None, "all"):
        alike = FULL if window is None else SLIDING
        if types is not None and any(kind != alike for kind in types):
            raise read.unsupported(f"layer_types {shown(types)}", f"{alike!r} for all layers")
        types = None
    elif window is not None and types is None:
        types = _own_types(read, family, no_rope_layers)
    if family.gemma4 and types:  # as in transformers
        types = [*types[:-1], FULL]
    return {"sliding_window": window, "layer_types": types}


def _own_types(read: Values, family: Family, no_rope_layers: list[int] | None) -> list[str]:
    """The `layer_types` of a family that has windows in some layers."""
    layers = read["num_hidden_layers"]
    if no_rope_layers is not None:
        return [FULL if rotated else SLIDING for rotated in no_rope_layers]
    if family.windows in ("from", "alternate"):
        first, after = read["max_window_layers"], family.windows == "from"
        return [
            SLIDING if (i >= first if after else i < first and i % 2 == 0) else FULL
            for i in range(layers)
        ]
    try:
        return periodic_layers(
            read.get("sliding_window_pattern", family.window_period or 0), layers
        )
    except ValueError as error:
        raise read.wrong("sliding_window_pattern", str(error)) from None


def _rope(read: Values, family: Family) -> dict[str, Any]:
    """rope_theta, rope_local_base_freq and rope_scaling.

    They are in `rope_parameters` (transformers 5) or in older top-level keys. As in transformers,
    `rope_scaling` overrides `rope_parameters`, and both override the top-level keys.
    """
    local, nested = read.get("rope_local_base_freq"), read["rope_parameters"]
    if any(isinstance(value, dict) for value in nested.values()):
        if not family.local_rope or not set(nested) <= set(LAYER_TYPES):
            kinds = ", ".join(map(shown, nested))
            raise ValueError(
                f"{read.path}: rope parameters per layer type are not supported: {kinds}"
            )
        parts = Values(
            read.path, nested, dict.fromkeys(LAYER_TYPES, OBJECT), {key: {} for key in LAYER_TYPES}
        )
        local, nested = _local_theta(read, parts[SLIDING], local), parts[FULL]
    # In a family with a base per type of layer, rope_scaling replaces single keys; otherwise it
    # replaces the whole object.
    outer = read["rope_scaling"]
    scaling = {**nested, **outer} if family.local_rope else outer or nested
    if family.local_rope == "same" and local is None:
        local = _same_theta(read, nested, family)
    defaults = {"rope_theta": read["rope_theta"]}
    if family.query_growth:
        # Inert: max_position_embeddings is that of the configuration itself.
        ignored = ("max_position_embeddings",)
        scaling = {key: value for key, value in scaling.items() if key not in ignored}
        defaults["llama_4_scaling_beta"] = None
    if family.linear_attention:
        # How images' rows and columns share the rotary pairs; text has only one position.
        inert = ("mrope_section", "mrope_interleaved")
        scaling = {key: value for key, value in scaling.items() if key not in inert}
    if family.partial_rotary:
        defaults["partial_rotary_factor"] = read["partial_rotary_factor"]
    numbers = Values(read.path, scaling, dict.fromkeys(defaults, real), defaults)
    scaling = {key: value for key, value in scaling.items() if key not in numbers}
    if family.query_growth and not numbers["llama_4_scaling_beta"]:
        numbers["llama_4_scaling_beta"] = None
    return {
        **numbers,
        "rope_local_base_freq": local,
        "rope_scaling": read_hf_scaling(
            read.path,
            scaling,
            read["original_max_position_embeddings"],
            read["max_position_embeddings"],
            family.longrope,
        ),
    }


def _same_theta(read: Values, flat: Mapping[str, Any], family: Family) -> Any:
    """The base of layers with a window where rope_parameters do not say it per type of layer.

    transformers 5 then takes its own default for them, and transformers 4 rope_theta.
    """
    theta, default = read["rope_theta"], family.defaults["rope_theta"]
    if flat or theta != default:
        key = "rope_parameters" if flat else f"rope_theta {theta}"
        raise ValueError(
            f"{read.path}: {key} must be given for {FULL} and {SLIDING} each: versions of "
            "transformers take different values otherwise"
        )
    return theta


def _local_theta(read: Values, sliding: Mapping[str, Any], default: float | None) -> Any:
    """The rotary base in the rope parameters of layers with a window, which must be unscaled."""
    inner = Values(
        read.path,
        sliding,
        {"rope_type": TEXT, "rope_theta": real},
        {"rope_type": "default", "rope_theta": default},
    )
    if inner["rope_type"] != "default":
        raise read.unsupported(f"rope_type {shown(inner['rope_type'])} of {SLIDING}")
    refuse_rope_keys(read.path, sliding, set())
    return inner["rope_theta"]
