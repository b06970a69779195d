"""`Source`: a file's tensors under Hugging Face's names, in its row order, of checked shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from pyloss.errors import FormatError, counted
from pyloss.io.tensor_file import StoredTensor, TensorFile, layers_held
from pyloss.models.config.gguf_reader import LONGROPE_FACTORS
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import long_from
from pyloss.models.files.names import (
    MLX_EXPERTS,
    MLX_MLP,
    OWN_EXPERTS,
    STACKS,
    expert_name,
    gguf_name,
    shared_parts,
)
from pyloss.models.files.parts import gguf_parts
from pyloss.models.files.quantized import Quantization
from pyloss.weights.formats import FORMATS
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

# Rotary tables of some files. pyloss computes them, and reads GGUF's factors separately.
_TABLES = ("rotary_emb.inv_freq", "attn_rot_embd.weight", "rope_freqs.weight")
# Prefixes of tensors for images and sound.
_OTHER_INPUTS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.",
    "model.multi_modal_projector.", "vision_model.", "audio_tower.", "v.", "mm.", "a.",
    "model.audio_tower.", "model.embed_vision.", "model.embed_audio.",
    "model.visual.", "visual.",
)  # fmt: skip
# Prefixes of layers that guess further tokens.
_FURTHER_TOKENS = ("mtp.", "model.mtp.", "language_model.mtp.")


class Source:
    """The tensors that `building` requests; one subclass per file format.

    `rotary` marks the rows of q and k, which a format may store in another order. FormatError names
    a tensor that is missing or has another shape than requested.
    """

    def __init__(self, file: TensorFile) -> None:
        self.file = file

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`, such as "model.norm.weight"."""
        return self._stored_name(name) in self.file

    def array(self, name: str, *shape: int, rotary: bool = False) -> np.ndarray:
        """The tensor `name`, a new float32 array."""
        return self._find(name, *shape).array()

    def norm(self, name: str, dims: int) -> np.ndarray:
        """The weight of the norm `name`, such as "model.norm", a new float32 array."""
        return self.array(f"{name}.weight", dims)

    def plain_norm(self, name: str, dims: int) -> np.ndarray:
        """The weight of a norm that has no offset in any format."""
        return self.array(f"{name}.weight", dims)

    def taps(self, name: str, columns: int, taps: int) -> np.ndarray:
        """The weight of the convolution `name`, a new float32 array [columns, 1, taps].

        mlx has the axis of 1 last, and GGUF does not have it.
        """
        tensor = self.file.tensor(self._stored_name(f"{name}.weight"))
        shape = (columns, 1, taps)
        if tensor.shape not in ((columns, taps), (columns, taps, 1)):
            tensor = self._find(f"{name}.weight", *shape)
        return tensor.array().reshape(shape)

    def rates(self, name: str, count: int) -> np.ndarray:
        """The logarithms of the delta rule's rates, a new float32 array."""
        return self.array(name, count)

    def matrix(self, name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        """The weight of the layer `name`, such as "model.layers.0.mlp.up_proj", not copied."""
        return self._find(f"{name}.weight", rows, cols).weight()

    def experts(self, name: str, count: int, rows: int, cols: int) -> WeightStack:
        """The weights of the experts' layer `name`, not copied.

        Such as "model.layers.0.mlp.switch_mlp.up_proj".
        """
        return self._find(f"{name}.weight", count, rows, cols).stack()

    def lacks_head(self) -> bool:
        """Whether the file is one of a model that was saved without its head."""
        return False

    def ignore(self, names: Iterable[str]) -> None:
        """Takes tensors that the model has no use for, of those that are there."""
        for name in names:
            if self.has(name):
                self.file.tensor(self._stored_name(name))

    def refuse_leftovers(self) -> None:
        """Raises FormatError for a tensor that no part of the configuration has requested."""
        left = [name for name in self.file if name not in self.file.asked]
        left = [name for name in left if not self._means_nothing(name)]
        if left:
            others = f", and {len(left) - 1} others" if len(left) > 1 else ""
            raise FormatError(
                self.file.path, left[0], f"no part of this configuration has such a tensor{others}"
            )

    def _means_nothing(self, name: str) -> bool:
        """Whether the tensor `name`, which was not requested, changes no result."""
        return name.endswith(_TABLES) or name.startswith((*_OTHER_INPUTS, *_FURTHER_TOKENS))

    def refuse_missing_layers(self, layers: int) -> None:
        """Raises FormatError if the configuration has more `layers` than the file."""
        held = layers_held(self.file, self._layers())
        if layers > held:
            reason = f"it is {layers}, and the file has tensors for {counted(held, 'layer')}"
            raise FormatError(self.file.path, "num_hidden_layers", reason)

    def _joined(self, parts: list[Weight], names: list[str]) -> Weight:
        """The rows of several matrices of equal width as one, copied unless it is one."""
        if len(parts) == 1:
            return parts[0]
        kinds = {(part.format, part.groups and part.groups.size) for part in parts}
        if len(kinds) > 1:
            first, other = (self._stored_name(name) for name in names)
            raise FormatError(
                self.file.path,
                first,
                f"it and {other} have different types, {parts[0].format} and {parts[1].format}; "
                "pyloss reads both as one matrix",
            )
        raw = np.concatenate([part.raw for part in parts])
        rows = sum(part.shape[0] for part in parts)
        groups = parts[0].groups
        if groups is not None:
            scales = [(part.groups.scales, part.groups.offsets) for part in parts if part.groups]
            joined = [np.concatenate(arrays) for arrays in zip(*scales, strict=True)]
            groups = groups._replace(scales=joined[0], offsets=joined[1])
        return Weight(raw, parts[0].format, (rows, parts[0].shape[1]), groups=groups)

    def _layers(self) -> str:
        """The prefix of the names of layers' tensors."""
        return self._stored_name("model.layers.")

    def _stored_name(self, name: str) -> str:
        return name

    def _find(self, name: str, *shape: int) -> StoredTensor:
        return self._checked(self._stored_name(name), *shape)

    def _checked(self, stored_name: str, *shape: int) -> StoredTensor:
        tensor = self.file.tensor(stored_name)
        if tensor.shape != shape:
            raise FormatError(
                tensor.path,
                tensor.name,
                f"has shape {tensor.shape}, where the configuration gives {shape}",
            )
        return tensor


class FolderSource(Source):
    """A Hugging Face folder; names have a longer prefix if it also has an image model, and none
    in embedding models.

    Experts are stacked as in mlx-lm or in transformers 5, or each is a tensor of its own.
    `quantization` is read from the configuration.
    """

    def __init__(
        self, file: TensorFile, config: ModelConfig, quantization: Quantization | None = None
    ) -> None:
        super().__init__(file)
        self._family = config.family
        self._fused = bool(config.family.experts and config.family.experts.fused)
        self._quantization = quantization or Quantization(file.path, {})

    def matrix(self, name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        """See `Source`."""
        parts = shared_parts(f"{name}.weight", False)
        if parts and self.has(parts[0]):  # as mlx-lm stores the MLP of Granite 4
            layers = [part.removesuffix(".weight") for part in parts]
            own = [self.matrix(layer, rows // len(layers), cols) for layer in layers]
            return self._joined(own, parts)
        found = self._quantized(name, rows, cols) or super().matrix(name, rows, cols, rotary)
        if found.columns is not None and (name == "lm_head" or ".experts." in name):
            raise ValueError(
                f"{self.file.path}: {name}: heads and experts quantized with desc_act are not "
                "supported"
            )
        return found

    def _means_nothing(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        if part == "bias" and f"{layer}.qweight" in self.file:
            # AutoGPTQ writes zeros for layers that have no bias.
            return not self.file.tensor(name).values().any()
        return super()._means_nothing(name)

    def norm(self, name: str, dims: int) -> np.ndarray:
        """See `Source`. mlx adds Qwen3.5's offset of norms to them."""
        stored = super().norm(name, dims)
        if self._family.linear_attention and self._of_mlx():
            return stored - np.float32(self._family.norm_offset)
        return stored

    def _of_mlx(self) -> bool:
        """Whether convolutions have mlx's layout, [columns, taps, 1]."""
        names = (name for name in self.file if name.endswith(".conv1d.weight"))
        first = next(names, None)
        return first is not None and self.file.tensors[first].shape[-1] == 1

    def lacks_head(self) -> bool:
        """See `Source`."""
        return "embed_tokens.weight" in self.file and not self.has("lm_head.weight")

    def _quantized(self, name: str, *shape: int) -> Weight | None:
        layer = self._stored_name(f"{name}.weight").removesuffix(".weight")
        return self._quantization.weight(self.file, layer, *shape)

    def experts(self, name: str, count: int, rows: int, cols: int) -> WeightStack:
        """See `Source`."""
        whole = self._quantized(name, count, rows, cols)
        if whole is not None:
            return WeightStack.from_rows(whole, count)
        block, _, part = name.partition(".switch_mlp.")
        if self.has(f"{name}.weight"):
            return super().experts(name, count, rows, cols)
        for gate_up, down in STACKS:
            if part == "down_proj" and self.has(f"{block}.{down}"):
                return self._find(f"{block}.{down}", count, rows, cols).stack()
            if part != "down_proj" and self.has(f"{block}.{gate_up}"):
                both = self._find(f"{block}.{gate_up}", count, 2 * rows, cols).stack()
                first = rows * (part == "up_proj")
                return WeightStack([one.slice_rows(first, first + rows) for one in both.matrices])
        if self._family.experts is None:  # a family that has stacks alone
            self.file.tensor(f"{block}.{STACKS[0][part == 'down_proj']}")
        names = [expert_name(name, self._family, expert) for expert in range(count)]
        return WeightStack([self.matrix(one, rows, cols) for one in names])

    def _stored_name(self, name: str) -> str:
        if "language_model.model.embed_tokens.weight" in self.file:
            return f"language_model.{name}"
        if "model.language_model.embed_tokens.weight" in self.file and name.startswith("model."):
            return name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.") and "embed_tokens.weight" in self.file:
            return name.removeprefix("model.")  # saved without a head, as embedding models are
        if ".feed_forward.w" in name and name not in self.file:
            other = name
            for own, theirs in MLX_MLP.items():  # of LFM2-MoE in mlx-lm
                other = other.replace(f".feed_forward.{own}.", f".feed_forward.{theirs}.")
            return other if other in self.file else name
        if OWN_EXPERTS in name and name not in self.file:
            other = name.replace(OWN_EXPERTS, MLX_EXPERTS)
            name = other if other in self.file else name
        if ".router.layer." in name and name not in self.file:  # as in transformers 5
            return name.replace(".router.layer.", ".router.")
        packed = f"{name.removesuffix('.weight')}.qweight" in self.file
        if ".block_sparse_moe." in name and name not in self.file and not (packed or self._fused):
            # the module's own name in transformers 5
            return name.replace(".block_sparse_moe.", ".mlp.")
        return name


class GGUFSource(Source):
    """A GGUF file. Some families interleave the two halves of each head's rows of q and k."""

    def __init__(self, file: TensorFile, config: ModelConfig) -> None:
        super().__init__(file)
        self._family, self._config = config.family, config
        self._head_dim = config.head_dim if self._family.gguf_interleaved else 0
        self._delta = None if config.family.delta_fused else config.delta
        if long_from(config.rope_scaling) is not None:
            for name in LONGROPE_FACTORS:  # which the configuration was read from
                self.file.tensor(name)

    def norm(self, name: str, dims: int) -> np.ndarray:
        """See `Source`."""
        return super().norm(name, dims) - np.float32(self._family.norm_offset)

    def rates(self, name: str, count: int) -> np.ndarray:
        """See `Source`. GGUF has the rates themselves, below 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(-self.array(name, count))

    def _find(self, name: str, *shape: int) -> StoredTensor:
        """Arrays of Mamba-2 have a second axis in GGUF: numbers of heads, and norms of groups."""
        if ".mamba." in name and len(shape) == 1:
            stored = self.file.tensor(self._stored_name(name))
            if len(stored.shape) == 2 and stored.shape[0] * stored.shape[1] == shape[0]:
                return replace(stored, shape=shape)
        return super()._find(name, *shape)

    def taps(self, name: str, columns: int, taps: int) -> np.ndarray:
        """See `Source`."""
        return self._in_order(name, super().taps(name, columns, taps))

    def _in_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """The rows of a tensor of the delta rule as Hugging Face orders them."""
        order = None if self._delta is None else self._delta.gguf_rows(name)
        return array if order is None else array[np.argsort(order)]

    def array(self, name: str, *shape: int, rotary: bool = False) -> np.ndarray:
        """See `Source`."""
        array = self._in_order(name, super().array(name, *shape))
        if rotary and self._head_dim:
            pairs = array.reshape(-1, self._head_dim // 2, 2)
            array = np.ascontiguousarray(pairs.transpose(0, 2, 1)).reshape(shape)
        return array

    def matrix(self, name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        """See `Source`."""
        parts = gguf_parts(f"{name}.weight", rows, self._config)
        fused = self._family.delta_fused and self.has(f"{name}.weight")
        if parts and not fused:  # early files of Qwen3-Next have the whole
            found = [self._find(part, len(own), cols).weight() for part, own in parts.items()]
            order = np.concatenate(list(parts.values()))
            if self._family.delta_fused and len({part.format for part in found}) > 1:
                found = [Weight.quantize(part.dequantize(), "f16") for part in found]
            joined = self._joined(found, list(parts))
            return joined if (np.diff(order) == 1).all() else with_rows(joined, order)
        stored = self.file.tensors.get(self._stored_name(f"{name}.weight"))
        if rows == 1 and stored is not None and stored.shape == (cols,):  # of older converters
            self.file.tensor(stored.name)
            return replace(stored, shape=(rows, cols)).weight()
        weight = self._find(f"{name}.weight", rows, cols).weight(self._head_dim if rotary else 0)
        if self._delta is not None:
            weight = with_rows(weight, self._delta.gguf_rows(name))
            weight = with_columns(weight, self._delta.gguf_columns(name))
        return weight

    def experts(self, name: str, count: int, rows: int, cols: int) -> WeightStack:
        """See `Source`. Gates and ups may be one tensor."""
        block, _, part = name.partition(".switch_mlp.")
        both = self._stored_name(f"{block}.switch_mlp.gate_up_proj.weight")
        if part == "down_proj" or both not in self.file:
            return super().experts(name, count, rows, cols)
        stack = self._checked(both, count, 2 * rows, cols).stack()
        first = rows * (part == "up_proj")
        return WeightStack([one.slice_rows(first, first + rows) for one in stack.matrices])

    def _layers(self) -> str:
        return "blk."

    def _stored_name(self, name: str) -> str:
        return gguf_name(name, self._family)


def with_rows(weight: Weight, order: np.ndarray | None) -> Weight:
    """A matrix in order, a copy, of one that has row order[i] at place i."""
    if order is None:
        return weight
    rows = weight.raw.reshape(weight.shape[0], -1)[np.argsort(order)]
    return Weight(rows.reshape(-1), weight.format, weight.shape)


def with_columns(weight: Weight, order: np.ndarray | None) -> Weight:
    """A matrix that has column order[i] at place i; floats are copied in order."""
    if order is None:
        return weight
    if not weight.is_float:
        return Weight(weight.raw, weight.format, weight.shape, columns=order)
    each = FORMATS[weight.format].bytes
    rows = weight.raw.reshape(weight.shape[0], -1, each)[:, np.argsort(order)]
    return Weight(np.ascontiguousarray(rows).reshape(-1), weight.format, weight.shape)
