"""`ModelConfig`: the sizes and switches of a model, read from Hugging Face's config.json or from GGUF metadata."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyloss.checks.numbers import LARGEST, real, shown, whole
from pyloss.errors import FormatError, counted
from pyloss.io.files import read_json
from pyloss.io.tensor_file import StoredTensor, layers_held
from pyloss.models.config.families import FAMILIES, Family
from pyloss.models.config.known_keys import refuse_gguf_keys, refuse_hf_keys, refuse_rope_keys
from pyloss.models.config.mixture import Mixture, read_gguf_mixture, read_hf_mixture
from pyloss.models.config.rope_scaling import (
    check_rotary,
    check_scaling,
    read_gguf_scaling,
    read_hf_scaling,
)
from pyloss.models.config.values import Values, shortest


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer, in Hugging Face's names.

    `rope_scaling` is None or {"rope_type": kind, ...} with the numbers of one of `rope_scaling.KEYS`.
    `sliding_window` is how many tokens a layer sees, up to its own: every layer, or those that `layer_types` calls
    "sliding_attention" and not "full_attention". Where `rope_local_base_freq` is not None, it is their rotary base, unscaled.
    Attention scores are divided by the square root of `query_pre_attn_scalar`, or of head_dim.
    Families of mixtures of experts have a `mixture`; `intermediate_size` is that of the MLPs they have beside, or of the experts.

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
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: int | None = None
    mixture: Mixture | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        for name in _SIZES:
            whole(getattr(self, name), name, 1, _LIMITS.get(name))
        for name in ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"):
            if getattr(self, name) is not None:
                real(getattr(self, name), name, above=0)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        check_scaling(self.rope_scaling)
        check_rotary(self.rope_theta, self.head_dim, self.rope_scaling)
        if self.rope_local_base_freq is not None:
            check_rotary(self.rope_local_base_freq, self.head_dim, None)
        self._check_windows()

    def _check_windows(self) -> None:
        """Makes configurations that say the same equal: no types where all layers are alike."""
        if self.sliding_window is not None:
            whole(self.sliding_window, "sliding_window", 1, _LIMITS["sliding_window"])
        types = self.layer_types
        if types is not None:
            wrong = [kind for kind in types if kind not in LAYER_TYPES]
            if wrong:
                raise ValueError(
                    f"layer_types must be of {', '.join(LAYER_TYPES)}, got {shown(wrong[0])}"
                )
            if len(types) != self.num_hidden_layers:
                raise ValueError(
                    f"layer_types names {len(types)} layers, and num_hidden_layers is {self.num_hidden_layers}"
                )
        if self.sliding_window is None or (types is not None and LAYER_TYPES[1] not in types):
            self.sliding_window = self.layer_types = None
        elif types is not None and LAYER_TYPES[0] not in types:
            self.layer_types = None

    @property
    def family(self) -> Family:
        """The record of `model_type`."""
        return FAMILIES[self.model_type]

    def window(self, layer: int) -> int:
        """How many tokens `layer` sees, up to its own; 0 when all."""
        local = self.layer_types is None or self.layer_types[layer] == LAYER_TYPES[1]
        return self.sliding_window if self.sliding_window is not None and local else 0

    @property
    def window_period(self) -> int | None:
        """p where every p-th layer and no other has no window (1: none has; past the last layer: all have), if there is one."""
        windows = [bool(self.window(i)) for i in range(self.num_hidden_layers)]
        period = windows.index(False) + 1 if False in windows else self.num_hidden_layers + 1
        return period if windows == [(i + 1) % period != 0 for i in range(len(windows))] else None

    @classmethod
    def from_hf(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read a config.json.

        Raises:
            ValueError: a model family, or an option of one, that pyloss does not have; names what it has.
            FormatError: a missing key, a value of the wrong type, or values that don't fit together.
            OSError: the file cannot be read.
        """
        content = _text_part(path, read_json(path))
        read = Values(path, content)
        model_type = read.get("model_type", str)
        if model_type not in FAMILIES:
            raise ValueError(
                f"{path}: model_type {shown(model_type)} is not supported; supported are {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        _refuse_options(path, content, read, family)
        defaults = family.defaults

        def number(name: str) -> int:
            value = read.get(name, int, *([defaults[name]] if name in defaults else []))
            return (
                read.whole(name, 1, _LIMITS.get(name)) if content.get(name) is not None else value
            )

        heads, hidden, layers = (
            number("num_attention_heads"),
            number("hidden_size"),
            number("num_hidden_layers"),
        )
        inner = number("intermediate_size")
        longest = read.get(
            "max_position_embeddings", int, defaults.get("max_position_embeddings", 2048)
        )
        theta, local_theta, scaling = _read_rope(path, read, family, longest)
        window, layer_types = _read_windows(path, content, read, family, layers)
        eos = content.get("eos_token_id")
        if eos is not None and type(eos) is not int and not _is_ints(eos):
            raise FormatError(
                path, "eos_token_id", f"expected an integer or a list of them, got {shown(eos)}"
            )
        values = {
            name: read.get(name, type(field.default), defaults.get(name, field.default))
            for name, field in _FIELDS.items()
            if type(field.default) in (int, float, bool) and name != "rope_theta"
        }
        values |= {name: read.get(name, int, None) for name in ("bos_token_id", "pad_token_id")}
        return _checked(
            path,
            model_type=model_type,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.get(
                "num_key_value_heads", int, defaults.get("num_key_value_heads", heads)
            ),
            head_dim=_head_dim(
                path, read.get("head_dim", int, defaults.get("head_dim")), hidden, heads
            ),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=window,
            layer_types=layer_types,
            rope_local_base_freq=local_theta,
            query_pre_attn_scalar=number("query_pre_attn_scalar")
            if "query_pre_attn_scalar" in defaults
            else None,
            mixture=read_hf_mixture(path, read, family, inner, layers),
            eos_token_id=eos,
            **values,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        path: str | os.PathLike[str] = "GGUF",
    ) -> ModelConfig:
        """Read a GGUF file's `metadata`, and what its `tensors` tell of ties, biases and rotary factors.

        `path` is for errors.

        Raises: as `from_hf`.
        """
        read = Values(path, metadata)
        arch = read.get("general.architecture", str)
        sparse = read.get(f"{arch}.expert_count", int, 0) > 0
        known = [
            name
            for name, family in FAMILIES.items()
            if family.gguf == arch and bool(family.experts) == sparse
        ]
        if not known:
            supported = ", ".join(
                sorted(
                    {family.gguf for family in FAMILIES.values() if bool(family.experts) == sparse}
                )
            )
            kind = "architecture with experts" if sparse else "architecture"
            raise ValueError(
                f"{path}: GGUF {kind} {shown(arch)} is not supported; supported are {supported}"
            )
        model_type = known[0]
        family = FAMILIES[model_type]
        _refuse_gguf_options(path, arch, read, family)
        inner = read.get(f"{arch}.feed_forward_length", int)
        heads = read.get(f"{arch}.attention.head_count", int)
        hidden = read.get(f"{arch}.embedding_length", int)
        rotary = read.get(f"{arch}.rope.dimension_count", int, None)
        head_dim = _head_dim(
            path, read.get(f"{arch}.attention.key_length", int, rotary), hidden, heads
        )
        if (rotary or head_dim) != head_dim:
            raise ValueError(
                f"{path}: rope.dimension_count {rotary} of head size {head_dim}: partial is not supported"
            )
        if read.get(f"{arch}.attention.value_length", int, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {arch}.attention.value_length is not {head_dim}, the length of keys: not supported"
            )
        theta = shortest(
            read.get(f"{arch}.rope.freq_base", float, family.defaults.get("rope_theta", 10000.0))
        )
        layers = read.get(f"{arch}.block_count", int)
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise FormatError(path, "token_embd.weight", "this tensor is missing")
        held = layers_held(tensors, "blk.")
        if layers > held:
            reason = f"it is {layers}, and the file has tensors for {counted(held, 'layer')}"
            raise FormatError(path, f"{arch}.block_count", reason)
        local_theta = scalar = None
        if "rope_local_base_freq" in family.defaults:
            local_theta = shortest(
                read.get(
                    f"{arch}.rope.freq_base_swa", float, family.defaults["rope_local_base_freq"]
                )
            )
        if "query_pre_attn_scalar" in family.defaults:
            scalar = gguf_query_scalar(layers, hidden, heads, head_dim)
        window, layer_types = _read_gguf_windows(path, arch, read, family, layers)
        return _checked(
            path,
            model_type=model_type,
            # The embedding has the last word: older files have no vocab_size.
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.get(f"{arch}.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            rms_norm_eps=shortest(read.get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
            rope_theta=theta,
            rope_scaling=read_gguf_scaling(
                path, arch, read, tensors.get("rope_freqs.weight"), theta, head_dim
            ),
            max_position_embeddings=read.get(f"{arch}.context_length", int),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors and not family.qkv_bias,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            sliding_window=window,
            layer_types=layer_types,
            rope_local_base_freq=local_theta,
            query_pre_attn_scalar=scalar,
            mixture=read_gguf_mixture(path, arch, read, family, inner),
            bos_token_id=read.get("tokenizer.ggml.bos_token_id", int, None),
            eos_token_id=read.get("tokenizer.ggml.eos_token_id", int, None),
            pad_token_id=read.get("tokenizer.ggml.padding_token_id", int, None),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json which transformers (4 and 5), mlx-lm and `from_hf` read."""
        family, own = self.family, dataclasses.asdict(self)
        del own["mixture"]
        content = {
            "architectures": [family.architecture],
            "hidden_act": family.activation,
            "torch_dtype": "float32",
            **{
                name: value
                for name, value in own.items()
                if value is not None or name not in _PARTICULAR
            },
        }
        if "use_sliding_window" in family.defaults:
            content["use_sliding_window"] = self.sliding_window is not None
        if "max_window_layers" in family.defaults or "sliding_window_pattern" in family.defaults:
            content["layer_types"] = [
                LAYER_TYPES[self.window(i) > 0] for i in range(self.num_hidden_layers)
            ]
        if "sliding_window_pattern" in family.defaults:
            # What mlx-lm reads in place of layer_types; null where it could not say the same.
            content |= {
                "sliding_window_pattern": self.window_period,
                "hidden_activation": family.activation,
            }
        return content | (self.mixture.to_hf(family) if self.mixture else {})


_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
LAYER_TYPES = ("full_attention", "sliding_attention")
# Left out of config.json where they are None.
_PARTICULAR = ("layer_types", "rope_local_base_freq", "query_pre_attn_scalar")
_SIZES = [name for name, field in _FIELDS.items() if field.type == "int"]
# Far beyond any model. Counts size lists, and windows and sizes are 32-bit integers in the kernels.
_LIMITS = {
    **dict.fromkeys((*_SIZES, "sliding_window"), (1 << 31) - 1),
    "num_hidden_layers": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": LARGEST,
}


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
        raise FormatError(
            path, None, f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return hidden // heads


def _text_part(path: str | os.PathLike[str], content: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model in one that also has parts for images."""
    kind = f"{content.get('model_type')}_text"
    if kind not in FAMILIES:
        return content
    text = Values(path, content).get("text_config", dict)
    outer = {
        key: value
        for key, value in content.items()
        if key.endswith("_token_id") and value is not None
    }
    return {**content, **text, **outer, "model_type": kind}


def _refuse_options(
    path: str | os.PathLike[str], content: Mapping[str, Any], read: Values, family: Family
) -> None:
    """Options which would silently change the result if they were passed over."""
    key = "hidden_act" if family.activation == "silu" else "hidden_activation"
    activation = read.get(key, str, family.activation)
    if {"swish": "silu"}.get(activation, activation) != family.activation:
        raise ValueError(
            f"{path}: {key} {shown(activation)} is not supported; supported is {family.activation!r}"
        )
    refuse_hf_keys(path, content, family)
    window = read.get("sliding_window", int, None)
    longest = read.get("max_position_embeddings", int, _FIELDS["max_position_embeddings"].default)
    if "sliding_window" not in family.defaults and window is not None and window < longest:
        raise ValueError(
            f"{path}: sliding_window {window} is not supported for {content['model_type']}; supported is null"
        )


def _refuse_gguf_options(
    path: str | os.PathLike[str], arch: str, read: Values, family: Family
) -> None:
    refuse_gguf_keys(path, arch, read.content)
    window = read.get(f"{arch}.attention.sliding_window", int, 0)
    if "sliding_window_pattern" not in family.defaults and 0 < window < read.get(
        f"{arch}.context_length", int
    ):
        # llama.cpp passes over it.
        raise ValueError(
            f"{path}: {arch}.attention.sliding_window {window} is not supported; supported is 0"
        )


def _read_windows(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    read: Values,
    family: Family,
    layers: int,
) -> tuple[int | None, list[str] | None]:
    """sliding_window and layer_types, which families say in four ways."""
    defaults = family.defaults
    # A null is no window; a missing key is the family's own.
    window = (
        read.get("sliding_window", int, None)
        if "sliding_window" in content
        else defaults.get("sliding_window")
    )
    if "use_sliding_window" in defaults and not read.get("use_sliding_window", bool, False):
        window = None
    types = read.get("layer_types", list, None)
    some = "sliding_window_pattern" in defaults or "max_window_layers" in defaults
    if "sliding_window" not in defaults:
        window = None
    alike = LAYER_TYPES[window is not None]
    if not some and types is not None and any(kind != alike for kind in types):
        raise ValueError(
            f"{path}: layer_types {shown(types)} is not supported; supported is {alike!r} for all layers"
        )
    if window is None or not some:
        return window, types if some else None
    if types is None and "max_window_layers" in defaults:
        first = read.get("max_window_layers", int, defaults["max_window_layers"])
        types = [LAYER_TYPES[i >= first] for i in range(layers)]
    elif types is None:
        types = _periodic(
            path,
            read.get("sliding_window_pattern", int, defaults["sliding_window_pattern"]),
            layers,
        )
    return window, types


def _periodic(path: str | os.PathLike[str], period: int, layers: int) -> list[str]:
    if period < 1:
        raise FormatError(path, "sliding_window_pattern", f"must be at least 1, got {period}")
    return [LAYER_TYPES[(i + 1) % period != 0] for i in range(layers)]


def _read_gguf_windows(
    path: str | os.PathLike[str], arch: str, read: Values, family: Family, layers: int
) -> tuple[int | None, list[str] | None]:
    window = read.get(f"{arch}.attention.sliding_window", int, 0)
    if "sliding_window_pattern" not in family.defaults or not window:
        return None, None
    period = read.get(
        f"{arch}.attention.sliding_window_pattern", int, family.defaults["sliding_window_pattern"]
    )
    return window, _periodic(path, period, layers)


def _read_rope(
    path: str | os.PathLike[str], read: Values, family: Family, longest: int
) -> tuple[float, float | None, dict[str, Any] | None]:
    """rope_theta, rope_local_base_freq and rope_scaling, from `rope_parameters` (transformers 5) or the keys before it.

    As in transformers, `rope_scaling` goes before `rope_parameters`, and what either of them says before the keys outside.
    `longest` is max_position_embeddings.
    """
    two = "rope_local_base_freq" in family.defaults
    theta = read.get(
        "rope_theta", float, family.defaults.get("rope_theta", _FIELDS["rope_theta"].default)
    )
    local = (
        read.get("rope_local_base_freq", float, family.defaults["rope_local_base_freq"])
        if two
        else None
    )
    nested = read.get("rope_parameters", dict, {})
    if any(isinstance(value, dict) for value in nested.values()):
        if not two or not set(nested) <= set(LAYER_TYPES):
            raise ValueError(
                f"{path}: rope parameters per layer type are not supported: {', '.join(map(shown, nested))}"
            )
        inner = Values(path, Values(path, nested).get(LAYER_TYPES[1], dict, {}))
        if inner.get("rope_type", str, "default") != "default":
            raise ValueError(
                f"{path}: rope_type {shown(inner.content['rope_type'])} of sliding_attention is not supported"
            )
        refuse_rope_keys(path, inner.content, set())
        local = inner.get("rope_theta", float, local)
        nested = Values(path, nested).get(LAYER_TYPES[0], dict, {})
    scaling = read.get("rope_scaling", dict, {})
    # Of two bases, one for each type of layers, rope_scaling changes what it names; else it stands in place of all.
    scaling = {**nested, **scaling} if two else scaling or nested
    theta = Values(path, scaling).get("rope_theta", float, theta)
    return (
        theta,
        local,
        read_hf_scaling(
            path, scaling, read.get("original_max_position_embeddings", float, None), longest
        ),
    )


def gguf_query_scalar(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """query_pre_attn_scalar, which GGUF does not store: llama.cpp knows the largest of the published models by its layers."""
    return hidden // heads if layers == 62 else head_dim
