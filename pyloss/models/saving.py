"""Writes models as Hugging Face folders: of floats, or in mlx's or bitsandbytes' quantization."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.io.bars import bar, watched
from pyloss.io.cards import CARD_FILE, has_own_card, is_edited_card
from pyloss.io.files import check_target, user_path, write_json, write_safetensors
from pyloss.io.outputs import output
from pyloss.models.config.families import Family
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.names import expert_name, mlx_names, stack_names
from pyloss.models.files.quantized import floats, layer_tensors, settings, stays_quantized
from pyloss.models.transformer import Model
from pyloss.nn import Linear, plain_parameters
from pyloss.runtime.device import to_device
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

log = logging.getLogger("pyloss")

#: Float formats by their names in configurations.
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


_MODEL_FILES = (
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json",
)  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def refuse_adapters(model: Model) -> None:
    """Raises ValueError for adapters that are unfused, or that fusing mostly lost."""
    adapters = [name for name, module in model.named_modules() if hasattr(module, "from_base")]
    if adapters:
        raise ValueError(
            f"the model has {len(adapters)} unfused adapters ({adapters[0]}, ...): "
            "call model.fuse() before saving it"
        )
    if (kept := getattr(model, "kept_of_adapter", None)) is not None:
        raise ValueError(
            f"fusing the adapter into quantized weights kept {kept:.0%} of it: load model and "
            "adapter again, and call model.fuse(dequantize=True) before saving, or save the "
            "adapter alone with save_adapter"
        )


def model_dtype(model: Model) -> str:
    """The type of most of the model's stored floats and scales; "float32" if there are none."""
    sizes: Counter[str] = Counter()
    names = {format: name for name, format in DTYPES.items()}
    for weight in model.stored().values():
        first = weight.matrices[0] if isinstance(weight, WeightStack) else weight
        if first.format != "nf4":
            sizes[
                names.get(first.groups.scale_format if first.groups else first.format, "float32")
            ] += weight.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"


def save_model(
    model: Model,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_size: int | None = None,
) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files into the folder `path`.

    Matrices in mlx's affine groups or in NF4 stay as they are, in the layout of mlx or
    bitsandbytes; those in GGUF's quantized formats, and GPTQ's with `desc_act`, become float32.
    Floats keep their type.
    Parameters take the type of most matrices if it holds their values exactly. With `dtype`
    ("float32", "float16" or "bfloat16") all floats have that type.

    A model of more than `shard_size` bytes becomes model-00001-of-00003.safetensors and so on with
    an index; no file is larger, unless it holds a single tensor.

    The files of a model in the folder, its card included, move to `previous-N`, or are removed with
    `overwrite`; the tokenizer's files stay if `tokenizer` is None. A README.md that is no card, or
    was edited, stays.

    The configuration is that of the layers that the model has.

    Raises ValueError when the model has unfused adapters or no layers, or is quantized both ways,
    OSError naming the path when it cannot be written.
    """
    refuse_adapters(model)
    check_target(path, folder=True)
    if not model.layers:
        raise ValueError("the model has no layers: it cannot be saved")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    usual = dtype or model_dtype(model)
    stored = model.stored()
    if any(stays_quantized(weight) and weight.format != "nf4" for weight in stored.values()):
        stored = dict(_for_mlx(stored, model.config))
    grouped = {
        name.removesuffix(".weight"): weight
        for name, weight in stored.items()
        if stays_quantized(weight)
    }
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name not in grouped
    ]
    config = {
        **model.config_of_layers().to_hf(),
        "torch_dtype": usual,
        **(settings(grouped, usual, plain) if grouped else {}),
    }
    tensors: dict[str, np.ndarray] = {}
    for name, weight in watched(stored.items(), "preparing the weights", "matrix"):
        if stays_quantized(weight):
            tensors |= layer_tensors(name.removesuffix(".weight"), weight, usual)
        else:
            tensors[name] = _floats(weight, DTYPES[dtype] if dtype else None)
    for name, array in {**plain_parameters(model), **model.buffers()}.items():
        array = to_device(array, "cpu")
        if "quantization" in config:
            array = _as_mlx_keeps(name, array, model.config.family)
        tensors[name] = _parameter(array, DTYPES[usual], dtype is not None)
    if "quantization" not in config:  # mlx keeps experts stacked
        tensors = dict(_single_experts(tensors, model))
    folder = user_path(path)
    replaced = (folder / "config.json").exists()
    with output(folder, _model_files(folder, tokenizer is not None), overwrite):
        _write_tensors(folder, tensors, _metadata(config), shard_size)
        write_json(folder / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(folder)
    if replaced and is_edited_card(folder):
        log.warning(
            "kept %s, which you edited: it is the card of the model that was there before",
            folder / CARD_FILE,
        )


def model_patterns() -> tuple[str, ...]:
    """Patterns of the files of a model's folder, those of the tokenizer included."""
    return _MODEL_FILES + _TOKENIZER_FILES


def _write_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str], most: int | None
) -> None:
    """One file, or the shards and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, array in tensors.items():
        if most is not None and shards[-1] and used + array.nbytes > most:
            shards.append({})
            used = 0
        shards[-1][name] = array
        used += array.nbytes
    if len(shards) == 1:
        with bar("writing model.safetensors", 1, "file"):
            return write_safetensors(folder / "model.safetensors", tensors, metadata)
    places: dict[str, str] = {}
    for number, shard in enumerate(watched(shards, "writing the weights", "file"), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        places |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)
    return None


def _model_files(folder: Path, with_tokenizer: bool) -> list[str]:
    """The names of the files in `folder` that are a model's; a new model replaces all of them."""
    patterns = _MODEL_FILES + (_TOKENIZER_FILES if with_tokenizer else ())
    # The card is about the model that is replaced.
    card = {CARD_FILE} if has_own_card(folder) else set()
    return sorted(card | {path.name for pattern in patterns for path in folder.glob(pattern)})


def _for_mlx(
    stored: Mapping[str, Weight | WeightStack], config: ModelConfig
) -> Iterator[tuple[str, Weight | WeightStack]]:
    """The stored matrices under mlx-lm's names, in parts where it has parts."""
    for name, weight in stored.items():
        names = mlx_names(name, config.family, config.mixture is not None)
        if isinstance(weight, WeightStack):
            yield names[0], weight
            continue
        rows = weight.shape[0] // len(names)
        for i, part in enumerate(names):
            yield part, weight.slice_rows(i * rows, (i + 1) * rows)


def _as_mlx_keeps(name: str, array: np.ndarray, family: Family) -> np.ndarray:
    """A parameter of Qwen3-Next as mlx-lm has it; it converts those of other families itself."""
    if not family.delta_fused:
        return array
    if name.endswith(".conv1d.weight"):
        return np.ascontiguousarray(array.swapaxes(1, 2))
    if name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight"):
        return array + np.float32(family.norm_offset)
    return array


def _single_experts(
    tensors: dict[str, np.ndarray], model: Model
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors with one matrix per expert, as Hugging Face names them."""
    stacks = stack_names(model.config.family)
    for name, array in tensors.items():
        if array.ndim == 3 and ".switch_mlp." in name and stacks is not None:
            block, _, part = name.partition(".switch_mlp.")
            if part == "down_proj.weight":
                yield f"{block}.{stacks[1]}", array
            elif part == "gate_proj.weight":
                ups = tensors[f"{block}.switch_mlp.up_proj.weight"]
                yield f"{block}.{stacks[0]}", np.concatenate([array, ups], axis=1)
        elif array.ndim == 3 and ".switch_mlp." in name:
            for expert, matrix in enumerate(array):
                yield expert_name(name, model.config.family, expert), matrix
        else:
            yield name, array


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "mlx" if "quantization" in config else "pt"}


def _floats(weight: Weight | WeightStack, format: str | None) -> np.ndarray:
    """A stored matrix as floats in Hugging Face order.

    They are in `format`; by default in the matrix's own, or in float32 if it is quantized.
    """
    if isinstance(weight, WeightStack):
        return np.stack([_floats(matrix, format) for matrix in weight.matrices])
    format = format or (weight.format if weight.is_float else "f32")
    if weight.format != format or weight.head_dim:
        weight = Weight.quantize(weight.dequantize(), format)
    return floats(weight.raw, format).reshape(weight.shape)


def _parameter(array: np.ndarray, format: str, always: bool) -> np.ndarray:
    flat = Weight.quantize(array.reshape(1, -1), format)
    exact = always or np.array_equal(flat.dequantize().reshape(array.shape), array, equal_nan=True)
    return floats(flat.raw, format).reshape(array.shape) if exact else array
