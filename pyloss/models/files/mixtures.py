"""The formats that llama.cpp's quantizations give to the tensors of a model.

A quantization such as Q4_K_M is a mixture: most tensors have 4 bits, and those that answers depend
on most have more. `Mixture` chooses by a tensor's GGUF name as llama.cpp's llama-quantize does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pyloss.weights.weight import FORMATS


class _Kind(NamedTuple):
    """A mixture: the format of most tensors, and llama.cpp's number of the file type."""

    format: str
    file_type: int


_MIXTURES = {
    "q2_k": _Kind("q2_k", 10),
    "q2_k_s": _Kind("q2_k", 21),
    "q3_k_s": _Kind("q3_k", 11),
    "q3_k_m": _Kind("q3_k", 12),
    "q3_k_l": _Kind("q3_k", 13),
    "q4_k_s": _Kind("q4_k", 14),
    "q4_k_m": _Kind("q4_k", 15),
    "q5_k_s": _Kind("q5_k", 16),
    "q5_k_m": _Kind("q5_k", 17),
    "q6_k": _Kind("q6_k", 18),
    "iq4_nl": _Kind("iq4_nl", 25),
    "iq4_xs": _Kind("iq4_xs", 30),
}
#: Mixtures by name; the file type's number is `general.file_type`.
MIXTURES: Mapping[str, _Kind] = _MIXTURES
#: Other names of mixtures, as llama-quantize has them.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# What takes the place of a format whose blocks do not divide a tensor's rows.
_SMALLER_BLOCKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}  # fmt: skip

# Matrices that stay floats: routers, and small ones.
_FLOATS = re.compile(r"ffn_gate_inp|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.|_norm\.")
_VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight")


class Mixture:
    """Chooses the formats of a model's tensors.

    Args:
        name: a key of `MIXTURES` or of `ALIASES`.
        config: of the model: heads, experts, layers.
        tensors: the GGUF names of its tensors.
        importance: whether the search for scales knows the columns' importance.
    """

    def __init__(
        self, name: str, config: Any, tensors: Iterable[str], importance: bool = False
    ) -> None:
        self.name = ALIASES.get(name, name)
        self.usual, self.file_type = MIXTURES[self.name]
        names = list(tensors)
        self.tied = "output.weight" not in names
        values = sorted(
            (int(layer[1]), tensor)
            for tensor in names
            if _VALUES.search(tensor) and (layer := re.match(r"blk\.(\d+)\.", tensor))
        )
        self.values = [tensor for _, tensor in values]
        self.layers = config.num_hidden_layers
        self.experts = config.mixture.count if config.mixture else 0
        self.sharing = config.num_attention_heads // max(config.num_key_value_heads, 1)
        self.largest = config.gguf in ("llama", "qwen2") and self.layers == 80
        self.importance = importance

    def format(self, tensor: str, columns: int) -> str | None:
        """The format of the matrix `tensor` with rows of `columns`; None: floats, as they are."""
        if _FLOATS.search(tensor) or not tensor.endswith("weight"):
            return None
        chosen = self._wanted(tensor, columns)
        if columns % FORMATS[chosen].elements:
            chosen = _SMALLER_BLOCKS.get(chosen, "f16")
        return "f16" if columns % FORMATS[chosen].elements else chosen

    def _wanted(self, tensor: str, columns: int) -> str:
        head = tensor == "output.weight" or (
            self.tied and tensor in ("token_embd.weight", "per_layer_token_embd.weight")
        )
        if head:
            return "q8_0" if columns % FORMATS[self.usual].elements else "q6_k"
        if tensor in ("token_embd.weight", "per_layer_token_embd.weight"):
            return self.usual
        if tensor in self.values:
            return self._of_values(self.values.index(tensor))
        if "attn_k.weight" in tensor and self.experts == 8:
            return "q8_0"
        if "ffn_down" in tensor:
            return self._of_down(int(tensor.split(".")[1]))
        if "attn_output.weight" in tensor:
            return self._of_output()
        return self.usual

    def _of_values(self, place: int) -> str:
        """Of the values' projection that is `place` in the order of layers."""
        chosen, shared = self.usual, self.sharing >= 4
        if self.name == "q2_k":
            chosen = "q4_k" if shared else "q3_k"
        elif self.name == "q2_k_s":
            chosen = "q4_k" if shared else "q2_k"
        elif self.name == "q3_k_m":
            chosen = "q5_k" if place < 2 else "q4_k"
        elif self.name == "q3_k_l" or (self.name.startswith("iq4") and shared):
            chosen = "q5_k"
        elif self.name in ("q4_k_m", "q5_k_m") and _favored(place, len(self.values)):
            chosen = "q6_k"
        elif self.name == "q4_k_s" and place < 4:
            chosen = "q5_k"
        if self.largest and chosen in ("q3_k", "q4_k"):
            chosen = "q5_k"
        return "q8_0" if self.experts == 8 else chosen

    def _of_down(self, layer: int) -> str:
        """Of the second matrix of the block `layer`."""
        first = layer < self.layers // 8
        if self.name == "q2_k":
            return "q3_k"
        if self.name == "q2_k_s":
            return "q4_k" if first else "q2_k"
        if self.name == "q3_k_m":
            return "q5_k" if layer < self.layers // 16 else "q4_k"
        if self.name == "q3_k_l":
            return "q5_k"
        if self.name in ("q4_k_m", "q5_k_m") and _favored(layer, self.layers):
            return "q6_k"
        if first and (
            self.name == "q4_k_s" or (self.name.startswith("iq4") and not self.importance)
        ):
            return "q5_k"
        return self.usual

    def _of_output(self) -> str:
        """Of attention's output."""
        if self.experts == 8:
            small = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
            return "q5_k" if self.name in small else self.usual
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.name, self.usual)


def _favored(place: int, count: int) -> bool:
    """Whether a tensor gets more bits: in the first and last eighth, and every third between."""
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2
