"""`ModelConfig`: the sizes and switches of a model, read from Hugging Face's config.json or from GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.errors import FormatError
from pyloss.files import read_json
from pyloss.models.families import FAMILIES, Family
from pyloss.models.stored import StoredTensor

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = {"linear": ("factor",), "llama3": _LLAMA3_KEYS}


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer, in Hugging Face's names.

    `rope_scaling` is None or {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}.

    Raises:
        ValueError: values that don't fit together (`from_hf` and `from_gguf` make it a FormatError naming the file).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type {self.model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        _check_rope_scaling(self.rope_scaling)

    @property
    def family(self) -> Family:
        """The record of `model_type`."""
        return FAMILIES[self.model_type]

    @classmethod
    def from_hf(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read a config.json.

        Raises:
            ValueError: a model family, or an option of one, that pyloss does not have; names what it has.
            FormatError: a missing key, a value of the wrong type, or values that don't fit together.
            OSError: the file cannot be read.
        """
        content = read_json(path)
        read = _Values(path, content)
        model_type = read.get("model_type", str)
        if model_type not in FAMILIES:
            raise ValueError(f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
        _refuse_options(path, content, read)
        defaults = FAMILIES[model_type].defaults
        heads = read.get("num_attention_heads", int)
        hidden = read.get("hidden_size", int)
        theta, scaling = _read_rope(path, content, read)
        eos = content.get("eos_token_id")
        if eos is not None and type(eos) is not int and not _is_ints(eos):
            raise FormatError(path, "eos_token_id", f"expected an integer or a list of them, got {eos!r}")
        values = {
            name: read.get(name, type(field.default), defaults.get(name, field.default))
            for name, field in _FIELDS.items()
            if type(field.default) in (int, float, bool) and name != "rope_theta"
        }
        values |= {name: read.get(name, int, None) for name in ("bos_token_id", "pad_token_id")}
        return _checked(
            path,
            model_type=model_type,
            vocab_size=read.get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=read.get("intermediate_size", int),
            num_hidden_layers=read.get("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=read.get("num_key_value_heads", int, heads),
            head_dim=_head_dim(path, read.get("head_dim", int, defaults.get("head_dim")), hidden, heads),
            rope_theta=theta,
            rope_scaling=scaling,
            eos_token_id=eos,
            **values,
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: str | os.PathLike[str] = "GGUF"
    ) -> ModelConfig:
        """Read a GGUF file's `metadata`, and what its `tensors` tell of ties, biases and rotary factors.

        `path` is for errors.

        Raises: as `from_hf`.
        """
        read = _Values(path, metadata)
        arch = read.get("general.architecture", str)
        known = [name for name, family in FAMILIES.items() if family.gguf == arch]
        if not known:
            supported = ", ".join(sorted({family.gguf for family in FAMILIES.values()}))
            raise ValueError(f"{path}: GGUF architecture {arch!r} is not supported; supported are {supported}")
        model_type = known[0]
        if read.get(f"{arch}.expert_count", int, 0):
            raise ValueError(f"{path}: {arch}.expert_count: mixtures of experts are not supported")
        heads = read.get(f"{arch}.attention.head_count", int)
        hidden = read.get(f"{arch}.embedding_length", int)
        rotary = read.get(f"{arch}.rope.dimension_count", int, None)
        head_dim = _head_dim(path, read.get(f"{arch}.attention.key_length", int, rotary), hidden, heads)
        if (rotary or head_dim) != head_dim:
            raise ValueError(f"{path}: rope.dimension_count {rotary} of head size {head_dim}: partial is not supported")
        theta = _shortest(read.get(f"{arch}.rope.freq_base", float, 10000.0))
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise FormatError(path, "token_embd.weight", "this tensor is missing")
        return _checked(
            path,
            model_type=model_type,
            # The embedding has the last word: older files have no vocab_size.
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=read.get(f"{arch}.feed_forward_length", int),
            num_hidden_layers=read.get(f"{arch}.block_count", int),
            num_attention_heads=heads,
            num_key_value_heads=read.get(f"{arch}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            rms_norm_eps=_shortest(read.get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
            rope_theta=theta,
            rope_scaling=_gguf_rope_scaling(path, arch, read, tensors.get("rope_freqs.weight"), theta, head_dim),
            max_position_embeddings=read.get(f"{arch}.context_length", int),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors and not FAMILIES[model_type].qkv_bias,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            bos_token_id=read.get("tokenizer.ggml.bos_token_id", int, None),
            eos_token_id=read.get("tokenizer.ggml.eos_token_id", int, None),
            pad_token_id=read.get("tokenizer.ggml.padding_token_id", int, None),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json which transformers (4 and 5), mlx-lm and `from_hf` read."""
        return {
            "architectures": [self.family.architecture],
            "hidden_act": "silu",
            "sliding_window": None,
            "torch_dtype": "float32",
            **dataclasses.asdict(self),
        }


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_SIZES = [name for name, field in _FIELDS.items() if field.type == "int"]


class _Values:
    """Values of a parsed file, checked for their types."""

    def __init__(self, path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
        self.path = path
        self.content = content

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """`content[key]`, which must be of `kind`; a missing or null one is the `default` if there is one."""
        value = self.content.get(key)
        if value is None:
            if default:
                return default[0]
            raise FormatError(self.path, key, "this key is missing")
        # bool is an int to isinstance; and an integer is a fine float.
        if type(value) is int and kind is float and abs(value) < 1 << 1000:
            return float(value)
        if type(value) is not kind:
            raise FormatError(self.path, key, f"expected {kind.__name__}, got {type(value).__name__} {value!r:.100}")
        return value


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _checked(path: str | os.PathLike[str], **values: Any) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise FormatError(path, None, str(error)) from None


def _head_dim(path: str | os.PathLike[str], given: int | None, hidden: int, heads: int) -> int:
    if given is not None:
        return given
    if heads < 1 or hidden % heads:
        raise FormatError(path, None, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return hidden // heads


def _refuse_options(path: str | os.PathLike[str], content: Mapping[str, Any], read: _Values) -> None:
    """Options which would silently change the result if they were passed over."""
    activation = read.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{path}: hidden_act {activation!r} is not supported; supported is 'silu'")
    partial = read.get("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor {partial} is not supported; supported is 1.0")
    defaults = FAMILIES[content["model_type"]].defaults
    window = read.get("sliding_window", int, None) if "sliding_window" in content else defaults.get("sliding_window")
    if content["model_type"].startswith("qwen") and not read.get("use_sliding_window", bool, False):
        window = None
    longest = read.get("max_position_embeddings", int, defaults.get("max_position_embeddings", 2048))
    if window is not None and window < longest:
        raise ValueError(f"{path}: sliding_window {window} is not supported; supported is null")
    if "quantization_config" in content or "quantization" in content:
        raise ValueError(f"{path}: quantised Hugging Face and mlx folders are not supported; use the unquantised model")


def _read_rope(
    path: str | os.PathLike[str], content: Mapping[str, Any], read: _Values
) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from transformers 5's one `rope_parameters` or from the two keys before it."""
    nested = read.get("rope_parameters", dict, None)
    source = read if nested is None else _Values(path, nested)
    theta = source.get("rope_theta", float, read.get("rope_theta", float, _FIELDS["rope_theta"].default))
    scaling = read.get("rope_scaling", dict, None) if nested is None else nested
    if scaling is None:
        return theta, None
    values = _Values(path, scaling)
    kind = values.get("rope_type", str, values.get("type", str, "default"))
    if kind == "default":
        if any(isinstance(value, dict) for value in scaling.values()):
            raise ValueError(f"{path}: rope parameters per layer type are not supported: {', '.join(scaling)}")
        return theta, None
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{path}: rope_type {kind!r} is not supported; supported are default, {', '.join(_ROPE_KEYS)}")
    numbers = {key: values.get(key, int if key.startswith("original") else float) for key in _ROPE_KEYS[kind]}
    return theta, {"rope_type": kind, **numbers}


def _check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    if scaling is None:
        return
    keys = _ROPE_KEYS.get(scaling.get("rope_type", ""))
    if keys is None or set(scaling) != {"rope_type", *keys}:
        raise ValueError(f"rope_scaling must be None or of type {' or '.join(_ROPE_KEYS)} with its keys, got {scaling}")
    if not all(0 < scaling[key] < math.inf for key in keys):
        raise ValueError(f"rope_scaling must hold positive finite numbers, got {scaling}")
    if scaling["rope_type"] == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling's low_freq_factor must be below its high_freq_factor, got {scaling}")


def _gguf_rope_scaling(
    path: str | os.PathLike[str],
    arch: str,
    read: _Values,
    factors: StoredTensor | None,
    theta: float,
    head_dim: int,
) -> dict[str, Any] | None:
    kind = read.get(f"{arch}.rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{path}: {arch}.rope.scaling.type {kind!r} is not supported; supported are none, linear")
    if factors is None:
        if kind == "none":
            return None
        return {"rope_type": "linear", "factor": _shortest(read.get(f"{arch}.rope.scaling.factor", float))}
    # Llama 3's scaling is stored as its result, one factor per frequency; its four numbers are found again and checked.
    stored = factors.array()
    with np.errstate(all="ignore"):  # damaged numbers are not close to anything
        guess = _llama3_scaling(stored.reshape(-1).astype(np.float64), theta, head_dim)
        same = stored.shape == (head_dim // 2,) and np.allclose(stored, llama3_factors(guess, theta, head_dim), 1e-3)
    if not same:
        raise FormatError(path, factors.name, "these are not the rotary factors of Llama 3, the only ones supported")
    return guess


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that made `factors`, if it was one with the published models' two frequency factors."""
    low, high, factor, original = 1.0, 4.0, _shortest(float(factors.max())), 8192
    blended = np.flatnonzero((factors > 1.001) & (factors < 0.999 * factor))
    if len(blended) and blended[0] < head_dim // 2:
        wavelength = 2 * math.pi * theta ** (2 * blended[0] / head_dim)
        smooth = (1 / factors[blended[0]] - 1 / factor) / (1 - 1 / factor)
        original = round(wavelength * (low + smooth * (high - low)))
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """By what Llama 3's `rope_scaling` divides each rotary frequency: float64 [head_dim / 2]."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    # Frequencies that turn often keep their speed, slow ones are divided by the factor, those between are blended.
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32, so that GGUF's 9.999999747378752e-06 is 1e-05 again."""
    return float(str(np.float32(value)))
