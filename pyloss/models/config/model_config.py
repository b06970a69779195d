"""`ModelConfig`: the sizes and switches of a model.

`hf_reader` and `gguf_reader` read its fields from files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyloss.checks.numbers import real, shown, whole
from pyloss.io.tensor_file import StoredTensor
from pyloss.models.config.delta_net import DeltaNet, mrope_sections, periodic_types
from pyloss.models.config.families import FAMILIES, Family
from pyloss.models.config.fields import (
    CONV,
    DEFAULTS,
    FULL,
    LAYER_TYPES,
    LIMITS,
    LINEAR,
    MAMBA,
    MULTIPLIERS,
    SLIDING,
    SOFTCAPS,
)
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.config.gguf_reader import read_gguf_config
from pyloss.models.config.hf_reader import read_hf_config
from pyloss.models.config.lfm2 import own_keys
from pyloss.models.config.mamba import GGUF_ARCHITECTURE, Mamba2
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.rope_scaling import (
    check_rotary,
    check_scaling,
    long_from,
    yarn_for_mlx,
)
from pyloss.models.config.values import checked


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer, in Hugging Face's names.

    Attributes:
        rope_scaling: None, or {"rope_type": kind, ...} with the numbers of `rope_scaling.KEYS`.
        sliding_window: the number of tokens that a layer with a window sees, its own included.
        layer_types: one of `fields.LAYER_TYPES` per layer; None if all layers are alike.
        conv_L_cache: the rows that a convolution of a layer of type "conv" sees; None: no layer has
            one. conv_bias: whether it and its projections have biases.
        delta: the heads of layers of type "linear_attention"; None: as many as attention has.
        mamba: the heads of layers of type "mamba"; None: there are no such layers.
        no_rope_layers: 1 per layer with rotary positions, 0 per layer without; None if all have
            them.
        rope_local_base_freq: the rotary base, unscaled, of layers with a window; None: rope_theta.
        query_pre_attn_scalar: attention scores are divided by its square root; None: head_dim.
        attn_logit_softcapping: attention scores s become c tanh(s / c); None: they stay.
        final_logit_softcapping: the same of logits.
        partial_rotary_factor: the share of each head that rotates; None: 1.
        llama_4_scaling_beta: queries are multiplied by 1 + it log(1 + floor(p / n)), for their
            position p and n original_max_position_embeddings of yarn; None: they stay.
        embedding_multiplier: embeddings are multiplied by it; None: 1.
        attention_multiplier: attention scores are; None: 1 / sqrt(query_pre_attn_scalar).
        residual_multiplier: the outputs of attention and MLP are, before they are added; None: 1.
        logits_scaling: logits are divided by it; None: 1.
        mixture: the experts; None if MLPs are dense.
        gemma4: the options that only Gemma 4 has; None for other families.
        intermediate_size: the inner size of MLPs, and of experts without a separate size.

    Raises:
        ValueError: values that do not fit together; `from_hf` and `from_gguf` raise FormatError.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = DEFAULTS["rms_norm_eps"]
    rope_theta: float = DEFAULTS["rope_theta"]
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = DEFAULTS["max_position_embeddings"]
    tie_word_embeddings: bool = DEFAULTS["tie_word_embeddings"]
    attention_bias: bool = DEFAULTS["attention_bias"]
    mlp_bias: bool = DEFAULTS["mlp_bias"]
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    conv_L_cache: int | None = None
    conv_bias: bool = False
    delta: DeltaNet | None = None
    mamba: Mamba2 | None = None
    no_rope_layers: list[int] | None = None
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    partial_rotary_factor: float | None = None
    llama_4_scaling_beta: float | None = None
    embedding_multiplier: float | None = None
    attention_multiplier: float | None = None
    residual_multiplier: float | None = None
    logits_scaling: float | None = None
    mixture: Mixture | None = None
    gemma4: Gemma4 | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; "
                f"supported are {', '.join(FAMILIES)}"
            )
        for name, limit in LIMITS.items():
            if getattr(self, name) is not None:
                whole(getattr(self, name), name, 1, limit)
        for name in ("rms_norm_eps", "rope_theta", *_PARTICULAR_NUMBERS):
            if getattr(self, name) is not None:
                real(getattr(self, name), name, above=0)
        if self.residual_multiplier is not None:  # norms divide by its square
            real(self.residual_multiplier, "residual_multiplier", 1e-9)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotary_dim} of "
                f"{self.head_dim} elements of a head; it must be an even number of them, "
                "at least 2"
            )
        check_scaling(self.rope_scaling)
        if self.family.gemma4 and self.gemma4 is None:
            self.gemma4 = Gemma4(self.head_dim)
        check_rotary(self.rope_theta, self.rotary_dim_of(0), self.rope_scaling)
        if self.rope_local_base_freq is not None:
            check_rotary(self.rope_local_base_freq, self.rotary_dim, None)
        says_both = self.family.local_rope == "same" or self.family.gemma4
        if says_both and self.rope_local_base_freq is None:
            self.rope_local_base_freq = self.rope_theta
        if self.llama_4_scaling_beta is not None:
            self._check_growth()
        self._check_windows()
        if self.mamba is not None:
            self.mamba.check_hidden(self.hidden_size)
        if self.gemma4 is not None:
            self.gemma4.check_layers(self.layer_types, self.num_hidden_layers)
            if self.num_attention_heads % self.key_value_heads_of(0):
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                    f"num_global_key_value_heads {self.key_value_heads_of(0)}"
                )
        if self.no_rope_layers is not None:
            self._check_unrotated(self.no_rope_layers)

    def _check_growth(self) -> None:
        if not self.family.query_growth:
            raise ValueError(f"llama_4_scaling_beta is not supported for {self.model_type}")
        if (self.rope_scaling or {}).get("rope_type") != "yarn":
            raise ValueError("llama_4_scaling_beta is supported only with rope_type yarn")

    def _check_unrotated(self, layers: list[int]) -> None:
        if not (self.family.unrotated_layers or self.family.position_switch):
            raise ValueError(f"no_rope_layers are not supported for {self.model_type}")
        if any(type(layer) is not int or layer not in (0, 1) for layer in layers):
            raise ValueError(f"no_rope_layers must be 0 or 1 per layer, got {shown(layers)}")
        if len(layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers names {len(layers)} layers, "
                f"and num_hidden_layers is {self.num_hidden_layers}"
            )
        if self.family.position_switch and any(layers) and not all(layers):
            raise ValueError(f"{self.model_type} has rotary positions in all layers, or in none")
        if all(layers):
            self.no_rope_layers = None

    def _check_windows(self) -> None:
        """Makes equivalent configurations equal: no types if all layers are alike."""
        types = self.layer_types
        if types is not None:
            allowed = LAYER_TYPES
            if self.family.short_conv or self.family.linear_attention:
                allowed = (FULL, CONV if self.family.short_conv else LINEAR)
            if self.family.mamba:
                allowed = (FULL, MAMBA)
            wrong = [kind for kind in types if kind not in allowed]
            if wrong:
                raise ValueError(
                    f"layer_types must be of {', '.join(allowed)}, got {shown(wrong[0])}"
                )
            if len(types) != self.num_hidden_layers:
                raise ValueError(
                    f"layer_types names {len(types)} layers, "
                    f"and num_hidden_layers is {self.num_hidden_layers}"
                )
        if self.family.short_conv:
            for name in ("attention_bias", "mlp_bias"):
                if getattr(self, name):
                    raise ValueError(f"{name} is not supported for {self.model_type}")
            if types is None:
                self.layer_types = [FULL] * self.num_hidden_layers
            if self.conv_L_cache is None:
                self.conv_L_cache = self.family.defaults["conv_L_cache"]
            self.sliding_window = None
        elif self.family.linear_attention:
            if types is None:
                interval = self.family.defaults["full_attention_interval"]
                self.layer_types = periodic_types(interval, self.num_hidden_layers)
            if self.delta is None:
                heads, size = self.num_attention_heads, self.head_dim
                self.delta = DeltaNet(heads, heads, size, size)
            if self.mlp_bias:
                raise ValueError(f"mlp_bias is not supported for {self.model_type}")
            self.sliding_window = None
        elif self.family.mamba:
            if types is not None and MAMBA in types:
                if self.mamba is None:
                    raise ValueError(f"layers of type {MAMBA} need their sizes, mamba")
            else:
                self.layer_types = self.mamba = None
            self.sliding_window = None
        elif self.sliding_window is None or (types is not None and SLIDING not in types):
            self.sliding_window = self.layer_types = None
        elif types is not None and FULL not in types:
            self.layer_types = None

    @property
    def family(self) -> Family:
        """The record of `model_type`."""
        return FAMILIES[self.model_type]

    @property
    def gguf(self) -> str:
        """general.architecture in GGUF."""
        if self.mamba is not None:
            return GGUF_ARCHITECTURE
        return self.family.gguf_of(self.mixture is not None) or self.family.gguf

    def convolved(self, layer: int) -> bool:
        """Whether `layer` has a short convolution in place of attention."""
        return self.layer_types is not None and self.layer_types[layer] == CONV

    def linear(self, layer: int) -> bool:
        """Whether `layer` has the gated delta rule in place of attention."""
        return self.layer_types is not None and self.layer_types[layer] == LINEAR

    def scanned(self, layer: int) -> bool:
        """Whether `layer` has the scan of Mamba-2 in place of attention."""
        return self.layer_types is not None and self.layer_types[layer] == MAMBA

    def window(self, layer: int) -> int:
        """The number of tokens that `layer` sees, its own included; 0 for all."""
        if self.convolved(layer):
            return self.conv_L_cache or 0
        if self.linear(layer):
            return self.delta.taps if self.delta is not None else 0
        if self.scanned(layer):
            return self.mamba.taps if self.mamba is not None else 0
        local = self.layer_types is None or self.layer_types[layer] == SLIDING
        return self.sliding_window if self.sliding_window is not None and local else 0

    def rotated(self, layer: int) -> bool:
        """Whether `layer` has rotary positions."""
        return self.no_rope_layers is None or self.no_rope_layers[layer] == 1

    @property
    def rotary_dim(self) -> int:
        """The number of elements of each head that rotate, from the first on."""
        factor = self.partial_rotary_factor
        return self.head_dim if factor is None else int(self.head_dim * factor)

    def head_dim_of(self, window: int) -> int:
        """The size of a head in layers with this window, 0 for none."""
        return self.head_dim if window or self.gemma4 is None else self.gemma4.global_head_dim

    def key_value_heads_of(self, window: int) -> int:
        """The heads of keys and values in layers with this window, 0 for none."""
        own = self.gemma4.num_global_key_value_heads if self.gemma4 and not window else None
        return self.num_key_value_heads if own is None else own

    def rotary_dim_of(self, window: int) -> int:
        """`rotary_dim` in layers with this window, 0 for none."""
        return self.rotary_dim if self.gemma4 is None else self.head_dim_of(window)

    def shared_from(self, layer: int) -> int | None:
        """The layer whose keys and values `layer` takes; None if it has its own."""
        count = self.num_hidden_layers
        first = count - (self.gemma4.num_kv_shared_layers if self.gemma4 else 0)
        if layer < first:
            return None
        return max(i for i in range(first) if bool(self.window(i)) == bool(self.window(layer)))

    def inner_size(self, layer: int) -> int:
        """The inner size of the MLP of `layer`."""
        wide = self.gemma4 is not None and self.gemma4.use_double_wide_mlp
        return self.intermediate_size * (2 if wide and self.shared_from(layer) is not None else 1)

    @property
    def rotary_factor(self) -> float:
        """partial_rotary_factor, 1 where it is not given."""
        return 1.0 if self.partial_rotary_factor is None else self.partial_rotary_factor

    @property
    def query_growth(self) -> tuple[float, float] | None:
        """llama_4_scaling_beta and the positions after which queries grow; None: they do not."""
        if self.llama_4_scaling_beta is None or self.rope_scaling is None:
            return None
        return self.llama_4_scaling_beta, self.rope_scaling["original_max_position_embeddings"]

    @property
    def embedding_factor(self) -> float:
        """What embeddings are multiplied by."""
        if self.family.scaled_embedding:
            return self.hidden_size**0.5
        return 1.0 if self.embedding_multiplier is None else self.embedding_multiplier

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        if self.family.gemma4:
            return 1.0
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    @property
    def window_period(self) -> int | None:
        """p if exactly every p-th layer has no window; None if layers do not repeat so.

        1: no layer has a window. More than the number of layers: all have one.
        """
        windows = [bool(self.window(i)) for i in range(self.num_hidden_layers)]
        period = windows.index(False) + 1 if False in windows else self.num_hidden_layers + 1
        return period if windows == [(i + 1) % period != 0 for i in range(len(windows))] else None

    @classmethod
    def from_hf(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read a config.json.

        Raises:
            ValueError: a model family, or an option of one, that pyloss does not have.
            FormatError: a missing key, a value of the wrong type, or values that do not fit.
            OSError: the file cannot be read.
        """
        return checked(path, cls, **read_hf_config(path))

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        path: str | os.PathLike[str] = "GGUF",
    ) -> ModelConfig:
        """Read a GGUF file's `metadata`; its `tensors` tell ties, biases and rotary factors.

        `path` is for errors. Raises ValueError and FormatError as `from_hf`.
        """
        return checked(path, cls, **read_gguf_config(metadata, tensors, path))

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json which transformers (4 and 5), mlx-lm and `from_hf` read."""
        family, own = self.family, dataclasses.asdict(self)
        del own["mixture"], own["gemma4"], own["delta"], own["mamba"]
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
        if family.short_conv:
            content = own_keys(content, adjusted=family.experts is None)
        else:
            del content["conv_bias"]
        if self.delta is not None and self.layer_types is not None:
            content |= self.delta.to_hf(self.layer_types)
        if family.linear_attention:  # transformers and mlx-lm read the factor from here
            content["rope_parameters"] = {
                "rope_type": "default",
                **(content.pop("rope_scaling") or {}),
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_factor,
            }
            if not family.delta_fused:  # which has no variant with images
                content["rope_parameters"] |= {
                    "mrope_section": mrope_sections(self.rotary_dim // 2),
                    "mrope_interleaved": True,
                }
        if family.softcaps:  # a missing key would be the family's default
            content |= {name: own[name] for name in SOFTCAPS}
        if family.window_switch:
            content["use_sliding_window"] = self.sliding_window is not None
        if family.position_switch:
            content.pop("no_rope_layers", None)
            content |= {
                "position_embedding_type": "rope" if self.no_rope_layers is None else "nope",
                "layer_types": [
                    MAMBA if self.scanned(i) else "attention" for i in range(self.num_hidden_layers)
                ],
                "mamba_n_heads": 1,  # divides every size, which transformers checks
            }
        if self.mamba is not None:
            content |= self.mamba.to_hf(self.hidden_size)
        if family.gguf_dense is not None and self.mixture is None:
            content |= {"num_local_experts": 0, "num_experts_per_tok": 0}
            content["shared_intermediate_size"] = self.intermediate_size
        if family.unrotated_layers:
            content["no_rope_layers"] = [
                int(self.rotated(i)) for i in range(self.num_hidden_layers)
            ]
        if family.windows not in (None, "all"):
            content["layer_types"] = [
                SLIDING if self.window(i) else FULL for i in range(self.num_hidden_layers)
            ]
        if family.windows == "periodic":
            # mlx-lm reads this in place of layer_types; null if it cannot express them.
            content |= {
                "sliding_window_pattern": self.window_period,
                "hidden_activation": family.activation,
            }
        if family.local_rope == "same" or family.gemma4:
            # transformers 4 and mlx-lm read the top-level keys, transformers 5 these.
            plain = {"rope_type": "default", "rope_theta": self.rope_theta}
            content["rope_parameters"] = {
                FULL: plain | (self.rope_scaling or {}),
                SLIDING: plain | {"rope_theta": content.pop("rope_local_base_freq")},
            }
        if family.query_growth:  # transformers and mlx-lm need both keys
            content["rope_parameters"] = {
                "rope_theta": self.rope_theta,
                "original_max_position_embeddings": self.max_position_embeddings,
                **(yarn_for_mlx(content.pop("rope_scaling")) or {"rope_type": "default"}),
                "llama_4_scaling_beta": content.pop("llama_4_scaling_beta", 0.0),
            }
        if long_from(self.rope_scaling) is not None:
            # transformers takes the original length from here, and mlx-lm also the type.
            scaling = {**content["rope_scaling"], "type": "longrope"}
            original = scaling["original_max_position_embeddings"]
            content |= {"rope_scaling": scaling, "original_max_position_embeddings": original}
        if self.gemma4 is not None:
            del content["rope_scaling"], content["rope_theta"]
            content |= self.gemma4.to_hf()
        return content | (self.mixture.to_hf(family) if self.mixture else {})


# Left out of config.json if None; all but the first two are positive numbers.
_PARTICULAR_NUMBERS = (
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "partial_rotary_factor",
    "llama_4_scaling_beta",
    *SOFTCAPS,
    *MULTIPLIERS,
)
_PARTICULAR = ("layer_types", "conv_L_cache", "no_rope_layers", *_PARTICULAR_NUMBERS)
