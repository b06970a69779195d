"""Writes GGUF files through the `gguf` package: tensors and metadata, and whole models."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyloss.io.bars import watched
from pyloss.io.files import replacing, user_path
from pyloss.io.gguf import GGML_TYPES
from pyloss.models.config.delta_net import DeltaNet, mrope_sections
from pyloss.models.config.fields import MULTIPLIERS, SOFTCAPS
from pyloss.models.config.gemma4 import rotary_divisors
from pyloss.models.config.gguf_reader import (
    LONGROPE_FACTORS,
    gguf_no_rope_layers,
    gguf_query_scalar,
)
from pyloss.models.config.mamba import Mamba2
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import gguf_scaling, llama3_factors
from pyloss.models.files.mixtures import ALIASES, MIXTURES, Mixture
from pyloss.models.files.names import gguf_name
from pyloss.models.files.parts import gguf_parts, plainly_stored, rows_of
from pyloss.models.files.sources import with_rows
from pyloss.models.saving import refuse_adapters
from pyloss.models.text.gguf_vocabulary import model_name, vocabulary_metadata
from pyloss.models.transformer import Model
from pyloss.nn import plain_parameters
from pyloss.runtime.device import to_device
from pyloss.weights.formats import FLOATS
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import FORMATS, Weight, row_bytes

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

#: Types that matrices can be converted to: one for all, or a mixture.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", *MIXTURES, *ALIASES)

# Of files: the alignment of tensors, and upper bounds of the bytes of a tensor's entry, of the
# keys of a split model with the header, and of the number of files.
_ALIGNMENT, _INFO_BYTES, _SPLIT_BYTES, _MOST_PARTS = 32, 64, 256, 65535

# general.file_type: llama.cpp's number of the most frequent type; the medium mix of K-quants.
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    "bf16": 32, "mxfp4": 38,
}  # fmt: skip

#: Options that llama.cpp lacks for some architectures, see `Family.gguf_lacks`: whether a model has
#: the option.
LACKS: dict[str, Callable[[ModelConfig], bool]] = {
    "attention_bias": lambda c: c.attention_bias,
    "conv_bias": lambda c: c.conv_bias,
    "an output head of its own": lambda c: not c.tie_word_embeddings,
    "mlp_bias": lambda c: c.mlp_bias,
    "head_dim other than hidden_size / num_attention_heads": lambda c: (
        c.head_dim * c.num_attention_heads != c.hidden_size
    ),
    "rope_scaling of type llama3": lambda c: (c.rope_scaling or {}).get("rope_type") == "llama3",
}


class GGUFTensor(NamedTuple):
    """A tensor to write. `data` returns its bytes (uint8, any shape) when they are written."""

    name: str
    shape: Sequence[int]
    format: str
    data: Callable[[], np.ndarray]


def library() -> Any:
    """The `gguf` package; if it is missing, ImportError names the package to install."""
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "writing GGUF files needs the gguf package: pip install 'pyloss[gguf]'"
        ) from None
    return gguf


def write_gguf_file(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[GGUFTensor],
    most: int | None = None,
) -> Path:
    """Write a GGUF file, completely or not at all, and return its path.

    Integers are stored as uint32, in lists as int32, other numbers as float32. None, empty texts
    and empty lists are left out.

    A model of more than `most` bytes is split: files NAME-00001-of-00003.gguf and so on, none of
    which is larger, unless it holds a single tensor. The first one has the metadata; its path is
    returned. The keys of `general` are in all of them, which tells files of two models apart.

    Raises:
        ImportError: the `gguf` package is missing; names what installs it.
        OSError: naming `path`.
    """
    gguf, path = library(), user_path(path)
    shared = {key: value for key, value in metadata.items() if key.startswith("general.")}
    sizes = _size(metadata), _size(shared)
    parts = [list(tensors)] if most is None else _in_parts(tensors, *sizes, most)
    paths = [path]
    if len(parts) > 1:
        paths = [path.with_name(part_name(path, i, len(parts))) for i in range(len(parts))]
    with ExitStack() as files:  # renames all files once the last one is written
        for i, (part, place) in enumerate(zip(parts, paths, strict=True)):
            writer = gguf.GGUFWriter(files.enter_context(replacing(place)), architecture)
            try:
                for key, value in (metadata if i == 0 else shared).items():
                    _add_value(gguf, writer, key, value)
                if len(parts) > 1:
                    writer.add_uint16("split.no", i)
                    writer.add_uint16("split.count", len(parts))
                    writer.add_int32("split.tensors.count", len(tensors))
                _write(gguf, writer, part, f"writing {place.name}")
            finally:
                writer.close()
    return paths[0]


def part_name(path: Path, number: int, count: int) -> str:
    """The name of file `number`, from 0, of a split model."""
    return f"{path.name.removesuffix('.gguf')}-{number + 1:05}-of-{count:05}.gguf"


def is_part_of(file: Path, path: Path) -> bool:
    """Whether `file` is one of a split model that was written as `path`."""
    stem = re.escape(path.name.removesuffix(".gguf"))
    name = re.fullmatch(stem + r"-\d{5}-of-\d{5}\.gguf", file.name)
    return file.parent == path.parent and name is not None


def earlier_parts(path: Path) -> list[str]:
    """The names of the files of split models that were written as `path`."""
    return sorted(file.name for file in path.parent.glob("*") if is_part_of(file, path))


def _in_parts(
    tensors: Sequence[GGUFTensor], first: int, others: int, most: int
) -> list[list[GGUFTensor]]:
    """The tensors of each file; so many bytes of the first one and of the others are metadata."""
    used = first
    parts: list[list[GGUFTensor]] = [[]]
    for tensor in tensors:
        size = -(-_tensor_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT + len(tensor.name) + _INFO_BYTES
        if parts[-1] and used + size > most:
            parts.append([])
            used = others
        parts[-1].append(tensor)
        used += size
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"a model has at most {_MOST_PARTS} files, and {most} bytes make more")
    return parts


def _size(value: Any) -> int:
    """At least the bytes of metadata."""
    if isinstance(value, Mapping):
        return sum(len(key) + 16 + _size(item) for key, item in value.items()) + _SPLIT_BYTES
    if isinstance(value, list):
        return sum(map(_size, value)) + 12
    return len(value.encode()) + 8 if isinstance(value, str) else 8


def _tensor_bytes(tensor: GGUFTensor) -> int:
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    return rows * row_bytes(tensor.format, tensor.shape[-1])


def _write(gguf: Any, writer: Any, tensors: Sequence[GGUFTensor], text: str) -> None:
    """Writes the header and the tensors of one file; `text` says so in the bar."""
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.format.upper()]
        size = _tensor_bytes(tensor)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in watched(tensors, text, "tensor"):
        writer.write_tensor_data(np.ascontiguousarray(tensor.data()))


def _add_value(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    one = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    many = {**one, int: kinds.INT32}
    if value is None or value in ("", []):
        return
    if isinstance(value, list):
        writer.add_key_value(key, value, kinds.ARRAY, many[type(value[0])])
    else:
        writer.add_key_value(key, value, one[type(value)])


def refuse_model(model: Model, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a model or a tokenizer that GGUF cannot describe."""
    _hyperparameters(model.config_of_layers())
    vocabulary_metadata(tokenizer, model.config.vocab_size)


def write_gguf(
    model: Model,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    type: str | None = None,
    name: str | None = None,
    split_max_size: int | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a model with its tokenizer as a GGUF file that llama.cpp runs, wholly or not at all.

    Args:
        type: the type of the matrices, one of `TYPES`. Default: their own, or f16 where GGUF does
            not have it. As llama.cpp does it, norms and biases are float32, embedding and head have
            8 bits or more, and rows that a format's blocks do not divide become f16. The types of
            mixtures are those that llama.cpp chooses, see `mixtures.py`.
        name: the model's name in the file; the file's own without it.
        split_max_size: bytes; a larger model is split, see `write_gguf_file`.
        importance: of the columns of matrices, by the names of their tensors; see
            `Weight.quantize`.

    Returns the path of the file, of a split model that of its first file.

    Raises:
        ValueError: unfused adapters, an unknown type, or a tokenizer that GGUF cannot describe.
        ImportError: the `gguf` package is missing.
        OSError: naming `path`.
    """
    if type is not None and type not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    refuse_adapters(model)
    mixture = mixture_of(model, type, bool(importance))
    tensors = list(_tensors(model, mixture or type, importance or {}))
    used: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            used[tensor.format] += int(np.prod(tensor.shape))
    metadata = {
        "general.type": "model",
        "general.name": model_name(name or user_path(path).stem, tokenizer),
        "general.file_type": (
            mixture.file_type if mixture else _FILE_TYPES[used.most_common(1)[0][0]]
        ),
        "general.quantization_version": 2,
        **_hyperparameters(model.config_of_layers()),
        **vocabulary_metadata(tokenizer, model.config.vocab_size),
    }
    return write_gguf_file(path, model.config_of_layers().gguf, metadata, tensors, split_max_size)


def _hyperparameters(c: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(c.rope_theta),
    }
    values |= {
        **_windows(c),
        **gguf_scaling(c.rope_scaling, c.family.query_growth),
        **(c.mixture.to_gguf(c.family) if c.mixture else {}),
    }
    if c.family.softcaps:
        values |= _softcaps(c)
    if c.gemma4 is not None:
        inner = [c.inner_size(i) for i in range(c.num_hidden_layers)]
        values |= c.gemma4.to_gguf(c.head_dim, inner)
        each = [c.key_value_heads_of(c.window(i)) for i in range(c.num_hidden_layers)]
        values["attention.head_count_kv"] = each[0] if len(set(each)) == 1 else each
    if c.llama_4_scaling_beta is not None:
        values["attention.temperature_scale"] = float(c.llama_4_scaling_beta)
    if c.family.short_conv:
        heads, layers = c.num_key_value_heads, range(c.num_hidden_layers)
        values["attention.head_count_kv"] = [0 if c.convolved(i) else heads for i in layers]
        values["shortconv.l_cache"] = c.conv_L_cache
    if c.delta is not None and c.layer_types is not None:
        values |= c.delta.to_gguf(c.layer_types)
        if not c.family.delta_fused:
            values["rope.dimension_sections"] = [*mrope_sections(c.rotary_dim // 2), 0]
    if c.mamba is not None:
        heads, layers = c.num_key_value_heads, range(c.num_hidden_layers)
        values["attention.head_count_kv"] = [0 if c.scanned(i) else heads for i in layers]
        values |= c.mamba.to_gguf(c.hidden_size)
    if c.family.multipliers:
        given = {name: getattr(c, name) for name in MULTIPLIERS}
        given["attention_multiplier"] = c.attention_scale
        values |= {
            key: 1.0 if given[name] is None else float(given[name])
            for name, key in MULTIPLIERS.items()
        }
    said = gguf_query_scalar(
        c.family, c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.head_dim
    )
    if c.query_pre_attn_scalar not in (None, said):
        raise ValueError(
            f"query_pre_attn_scalar {c.query_pre_attn_scalar} cannot be written: "
            f"llama.cpp takes {said}"
        )
    for option in c.family.gguf_lacks:
        if LACKS[option](c):
            raise ValueError(f"{option} cannot be written: llama.cpp does not have it for {c.gguf}")
    rotated = gguf_no_rope_layers(c.family, c.num_hidden_layers)
    if rotated and rotated != [int(c.rotated(i)) for i in range(c.num_hidden_layers)]:
        raise ValueError(
            f"no_rope_layers {c.no_rope_layers} cannot be written: llama.cpp takes {rotated}"
        )
    if c.family.position_switch and c.no_rope_layers is not None:
        if c.mixture is not None and c.mamba is None:
            raise ValueError(
                "position_embedding_type nope cannot be written: llama.cpp has rotary positions "
                f"in {c.gguf}"
            )
        values["rope.scaling.finetuned"] = False
    return {f"{c.gguf}.{key}": value for key, value in values.items()}


def _softcaps(c: ModelConfig) -> dict[str, float]:
    found = {name: getattr(c, name) for name in SOFTCAPS[c.gemma4 is not None :]}
    for name, value in found.items():
        if value is None:
            raise ValueError(f"{name} null cannot be written: llama.cpp caps in {c.family.gguf}")
    return {name: float(value) for name, value in found.items()}


def _windows(c: ModelConfig) -> dict[str, Any]:
    if c.family.gguf_own_windows:
        period = c.family.window_period
        if c.sliding_window is None:
            return {"attention.sliding_window": c.max_position_embeddings}
        if c.window_period != period:
            raise ValueError(
                f"layer_types {c.layer_types} cannot be written: llama.cpp takes all but every "
                f"{period}th layer with a window"
            )
        return {"attention.sliding_window": c.sliding_window}
    if c.gemma4 is not None:
        return {  # llama.cpp needs a window, though no layer may have one
            "attention.sliding_window": c.sliding_window or c.max_position_embeddings,
            "attention.sliding_window_pattern": [
                bool(c.window(i)) for i in range(c.num_hidden_layers)
            ],
            "rope.freq_base_swa": c.rope_local_base_freq,
        }
    if c.sliding_window is None:
        return {}
    if c.family.window_period is None:
        # llama.cpp applies no window in this architecture, which is right up to the window's
        # length.
        return {"context_length": min(c.sliding_window, c.max_position_embeddings)}
    if c.window_period is None:
        raise ValueError(
            "llama.cpp reads layer_types that repeat with one full_attention at the end, "
            f"got {c.layer_types}"
        )
    if c.family.local_rope == "same" and c.rope_local_base_freq != c.rope_theta:
        raise ValueError(
            f"rope_theta {c.rope_local_base_freq} of layers with a window cannot be written: "
            f"llama.cpp takes {c.rope_theta}, that of the other layers"
        )
    return {
        "attention.sliding_window": c.sliding_window,
        "attention.sliding_window_pattern": c.window_period,
        "rope.freq_base_swa": c.rope_local_base_freq,
    }


def mixture_of(model: Model, type: str | None, importance: bool = False) -> Mixture | None:
    """What chooses the formats of the model's tensors, if `type` is a mixture."""
    if type is None or (type not in MIXTURES and type not in ALIASES):
        return None
    names = [gguf_name(name, model.config.family) for name in _values(model)]
    return Mixture(type, model.config_of_layers(), names, importance)


def _values(model: Model) -> dict[str, Any]:
    """What is written, by the names of Hugging Face, in the parts that GGUF has."""
    arrays = {**plain_parameters(model), **model.buffers()}
    values: dict[str, Any] = {**model.stored()}
    values |= {name: to_device(array, "cpu") for name, array in arrays.items()}
    if model.config.family.gguf_head and model.lm_head is None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    return dict(_apart(values, model.config))


def _tensors(
    model: Model, type: str | Mixture | None, importance: Mapping[str, np.ndarray]
) -> Iterator[GGUFTensor]:
    c = model.config
    if c.rope_scaling and c.rope_scaling["rope_type"] == "llama3":
        factors = llama3_factors(c.rope_scaling, c.rope_theta, c.head_dim).astype(np.float32)
        yield GGUFTensor("rope_freqs.weight", factors.shape, "f32", lambda: factors.view(np.uint8))
    if c.rope_scaling and c.rope_scaling["rope_type"] == "longrope":
        for name, key in zip(LONGROPE_FACTORS, ("short_factor", "long_factor"), strict=True):
            numbers = np.array(c.rope_scaling[key], np.float32)
            yield GGUFTensor(name, numbers.shape, "f32", partial(numbers.view, np.uint8))
    if c.gemma4 is not None:
        divisors = rotary_divisors(c.rope_scaling, c.gemma4.global_head_dim)
        yield GGUFTensor(
            "rope_freqs.weight", divisors.shape, "f32", lambda: divisors.view(np.uint8)
        )
    for name, mean in list(importance.items()):
        rows = model.stored()[name].shape[0] if name in model.stored() else 0
        importance = {**importance, **dict.fromkeys(gguf_parts(name, rows, c), mean)}
    delta = None if c.family.delta_fused else c.delta
    for name, value in _values(model).items():
        head_dim = interleaved_head(c, name)
        columns = importance.get(name)
        if delta is not None:
            value = _in_delta_order(delta, name, value)
            if columns is not None and (order := delta.gguf_columns(name)) is not None:
                columns = columns[order]
        if isinstance(value, np.ndarray) and value.ndim == 1:
            if name.endswith(".A_log"):
                value = -np.exp(value)
            if c.mamba is not None and ".mamba." in name:
                yield _of_mamba(c.mamba, name, gguf_name(name, c.family), value)
                continue
            if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
                value = value + np.float32(c.family.norm_offset)
            yield GGUFTensor(
                gguf_name(name, c.family), value.shape, "f32", partial(_reordered, value, head_dim)
            )
        elif name.endswith(("conv.weight", "conv1d.weight")):
            taps = np.asarray(value).reshape(len(value), -1)
            yield _matrix(name, gguf_name(name, c.family), taps, "f32", 0)
        elif name.endswith("shared_expert_gate.weight"):  # as llama.cpp's converter
            yield _matrix(name, gguf_name(name, c.family), value, "f32", 0)
        else:
            yield _matrix(name, gguf_name(name, c.family), value, type, head_dim, columns)


def _of_mamba(sizes: Mamba2, name: str, stored_name: str, value: np.ndarray) -> GGUFTensor:
    """An array of a Mamba layer; llama.cpp has a second axis for some."""
    shape: tuple[int, ...] = value.shape
    if name.endswith((".A_log", ".D")):
        shape = (sizes.heads, 1)
    elif name.endswith(".norm.weight"):
        shape = (sizes.groups, sizes.inner // sizes.groups)
    return GGUFTensor(stored_name, shape, "f32", partial(value.view, np.uint8))


def _apart(values: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """The tensors, with the parts that GGUF stores of some."""
    for name, value in values.items():
        parts = gguf_parts(name, value.shape[0], config)
        if not parts:
            yield name, value
        for part, rows in parts.items():
            yield part, rows_of(value, rows)


def _in_delta_order(
    delta: DeltaNet, name: str, value: np.ndarray | Weight | WeightStack
) -> np.ndarray | Weight | WeightStack:
    """A tensor with the heads of the delta rule's values in llama.cpp's order."""
    rows, columns = delta.gguf_rows(name), delta.gguf_columns(name)
    if rows is None and columns is None:
        return value
    if isinstance(value, np.ndarray):
        return value[rows] if columns is None else value[:, columns]
    assert isinstance(value, Weight)
    if columns is not None and value.columns is not None and (value.columns == columns).all():
        return Weight(value.raw, value.format, value.shape)  # as it was in GGUF
    if rows is not None and value.columns is None and value.groups is None:
        return with_rows(value, np.argsort(rows))
    plain = value.dequantize()
    return plainly_stored(plain[rows] if columns is None else plain[:, columns], value)


def _reordered(vector: np.ndarray, head_dim: int) -> np.ndarray:
    return vector[stored_order(len(vector), head_dim)].view(np.uint8)


def stored_as(
    name: str,
    value: np.ndarray | Weight | WeightStack,
    type: str | Mixture | None,
    stored_name: str,
) -> str:
    """The format of the matrix `name` in a file with `type`; see `write_gguf`."""
    own = "f32" if isinstance(value, np.ndarray) else value.format
    if isinstance(type, Mixture):
        chosen = type.format(stored_name, value.shape[-1])
        return chosen or (own if own in FLOATS else "f16")
    kind = type or (own if own.upper() in GGML_TYPES.values() else "f16")
    if (
        type
        and FORMATS[type].bytes < FORMATS[type].elements
        and name in ("model.embed_tokens.weight", "lm_head.weight")
    ):
        kind = "q8_0"
    return "f16" if value.shape[-1] % FORMATS[kind].elements else kind


def _matrix(
    name: str,
    stored_name: str,
    value: np.ndarray | Weight | WeightStack,
    type: str | Mixture | None,
    head_dim: int,
    importance: np.ndarray | None = None,
) -> GGUFTensor:
    """A matrix, or a stack of experts as one tensor of three dimensions."""
    kind = stored_as(name, value, type, stored_name)

    def data() -> np.ndarray:
        if isinstance(value, Weight) or len(value.shape) == 2:
            return _bytes(value, kind, head_dim, importance)  # type: ignore[arg-type]
        matrices = value.matrices if isinstance(value, WeightStack) else value
        found = [_bytes(matrix, kind, head_dim, importance).reshape(-1) for matrix in matrices]
        return np.concatenate(found)

    return GGUFTensor(stored_name, value.shape, kind, data)


def _bytes(
    value: np.ndarray | Weight, kind: str, head_dim: int, importance: np.ndarray | None
) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return Weight.quantize(value, kind, head_dim, importance=importance).raw
    if value.format != kind:
        return Weight.quantize(value.dequantize(), kind, head_dim, importance=importance).raw
    if value.head_dim == head_dim:
        return value.raw
    rows = value.raw.reshape(value.shape[0], -1)[
        np.argsort(stored_order(value.shape[0], value.head_dim))
    ]
    return rows[stored_order(value.shape[0], head_dim)]


def interleaved_head(config: ModelConfig, name: str) -> int:
    """The size of the heads whose halves llama.cpp interleaves in the tensor `name`; 0: none."""
    rotary = name.split(".")[-2] in ("q_proj", "k_proj")
    return config.head_dim if rotary and config.family.gguf_interleaved else 0


def stored_order(rows: int, head_dim: int) -> np.ndarray:
    """The row at each place, [rows], of a tensor whose heads of `head_dim` rows are interleaved."""
    order = np.arange(rows)
    return order.reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1) if head_dim else order
