"""`export`: a model, or its adapter, written for another program."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss.io.bars import watched
from pyloss.io.files import check_target, user_path, write_text
from pyloss.io.outputs import output
from pyloss.models.files.gguf_writer import (
    TYPES,
    earlier_parts,
    library,
    mixture_of,
    refuse_model,
    stored_as,
    write_gguf,
)
from pyloss.models.files.mixtures import ALIASES, MIXTURES
from pyloss.models.files.modelfile import modelfile
from pyloss.models.files.names import gguf_name
from pyloss.models.files.parts import gguf_parts
from pyloss.models.files.quantized import stays_quantized
from pyloss.models.fusing import fuse_modules, refuse_loss
from pyloss.models.saving import DTYPES, save_model
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.folder import save_adapter
from pyloss.tuner.adapters.gguf import write_lora_gguf
from pyloss.tuner.adapters.merging import dense
from pyloss.tuner.data.system_prompt import system_prompt_of
from pyloss.weights.weight import SINGLE, Weight

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer
    from pyloss.models.transformer import Model

#: Adapters for PEFT or mlx-lm; the model as a GGUF file, a Hugging Face folder, or for Ollama.
FORMATS = ("peft", "mlx", "gguf", "hf", "ollama")
#: What is written for Ollama, and the type of the matrices unless another is asked for.
OLLAMA_FILES = ("model.gguf", "Modelfile")
OLLAMA_TYPE = "q4_k_m"

#: Ways to keep an adapter's change, on the command line and in Python.
GGUF_WAYS = (
    "--dequantize --type {0} (dequantize=True, type='{0}'), or --adapter-only, "
    "the adapter beside its base"
)
HF_WAYS = "--dequantize (dequantize=True), or --to mlx or peft, the adapter beside its base"


def export(
    model: Model,
    path: str | os.PathLike[str],
    to: str,
    tokenizer: Tokenizer | None = None,
    *,
    adapter_only: bool = False,
    type: str | None = None,
    dequantize: bool = False,
    name: str | None = None,
    overwrite: bool = False,
    split_max_size: int | str | None = None,
    importance_data: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    shard_size: int | str | None = None,
) -> Path:
    """Write `model` in another program's format. Files of models get fused adapters.

    The model itself stays as it is.

    Args:
        path: a folder; for "gguf" a file.
        to: "peft" or "mlx": the model's adapter; "hf": a Hugging Face folder; "gguf": a file for
            llama.cpp; "ollama": a folder with such a file and a Modelfile.
        tokenizer: goes into "gguf" and "ollama", and into "hf" if it is given.
        adapter_only: with "gguf", write only the adapter, which llama.cpp loads with the base.
        type: with "gguf" and "ollama", the type of the matrices (`gguf_writer.TYPES`). Default:
            their own, or "f16" if GGUF does not have that; for Ollama `OLLAMA_TYPE`.
        dequantize: fuse into float32 if the base is quantized, so that nothing of the adapter
            is lost. Always done if the file cannot hold the base's quantization.
        name: the model's name in a GGUF file, or the base's in PEFT's configuration.
        overwrite: replace an existing output, which otherwise moves to `previous-N`.
        split_max_size: with "gguf", the most bytes of a file, as a number or as "2G" or "500M"
            (powers of 1000, as in llama.cpp). A larger model becomes NAME-00001-of-00003.gguf and
            so on.
        importance_data: with a mixture as `type`, a file of records or texts whose tokens say which
            columns of the matrices matter (`models.importance`).
        dtype: with "hf", "float32", "float16" or "bfloat16" for all floats. Default: their own.
        shard_size: with "hf", the most bytes of a file, as `split_max_size`.

    Returns:
        What was written, of a split model its first file, by which it is loaded.

    Raises:
        ValueError: an unknown format, arguments that do not go together, a model without an
            adapter where one is written, or a model that the format cannot describe.
        ImportError: writing GGUF needs the `gguf` package.
        OSError: naming what cannot be written.
    """
    check_request(
        path,
        to,
        adapter_only=adapter_only,
        type=type,
        dequantize=dequantize,
        split_max_size=split_max_size,
        importance_data=importance_data,
        dtype=dtype,
        shard_size=shard_size,
    )
    if to in ("peft", "mlx"):
        save_adapter(model, path, to, base_model=name, one_rank=True, overwrite=overwrite)
    elif adapter_only:
        with output(user_path(path), overwrite=overwrite):
            write_lora_gguf(model, path, name)
    elif to == "hf":
        with _fused(model, dequantize or becomes_floats(model), HF_WAYS):
            save_model(model, path, tokenizer, dtype, overwrite, byte_count(shard_size))
    elif tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer too: give it")
    elif to == "ollama":
        folder = user_path(path)
        system = system_prompt_of(getattr(model, "adapter_config", None))
        text = modelfile(OLLAMA_FILES[0], tokenizer, model.config, system)
        file, kind = folder / OLLAMA_FILES[0], type or OLLAMA_TYPE
        with _whole(model, tokenizer, kind, dequantize, importance_data) as importance:
            with output(folder, OLLAMA_FILES, overwrite):
                write_gguf(model, file, tokenizer, kind, name, importance=importance)
                write_text(folder / OLLAMA_FILES[1], text)
    else:
        type = type if type is not None or _known_to_gguf(model) else "f16"
        file, most = user_path(path), byte_count(split_max_size)
        with _whole(model, tokenizer, type, dequantize, importance_data) as importance:
            with _gguf_output(file, most is not None, overwrite):
                return write_gguf(model, file, tokenizer, type, name, most, importance)
    return user_path(path)


@contextmanager
def _whole(
    model: Model,
    tokenizer: Tokenizer,
    type: str | None,
    dequantize: bool,
    importance_data: str | os.PathLike[str] | None,
) -> Iterator[dict[str, np.ndarray] | None]:
    """The model as a GGUF file of `type` holds it, and the importance of its columns."""
    refuse_model(model, tokenizer)
    ways = GGUF_WAYS.format({"q8_0": "f16", "f16": "f32", "bf16": "f32"}.get(type or "", "q8_0"))
    with _fused(model, dequantize or type is not None, ways, gguf_type=type):
        yield column_importance_of(model, tokenizer, importance_data)


def column_importance_of(
    model: Model, tokenizer: Tokenizer, source: str | os.PathLike[str] | None
) -> dict[str, np.ndarray] | None:
    """The importance of columns by the text of a file; None without one."""
    if source is None:
        return None
    from types import SimpleNamespace

    from pyloss.models.importance import column_importance
    from pyloss.tuner.datasets import load_whole

    datasets = load_whole(SimpleNamespace(data=os.fspath(source)), tokenizer)
    samples = (dataset.sample(i) for dataset in datasets.values() for i in range(len(dataset)))
    return column_importance(model, (sample.tokens for sample in samples))


def _gguf_output(path: Path, split: bool, overwrite: bool) -> AbstractContextManager[None]:
    if not split:
        return output(path, overwrite=overwrite)
    return output(path.parent, [path.name, *earlier_parts(path)], overwrite)


def byte_count(size: int | str | None, name: str = "split_max_size") -> int | None:
    """The bytes that the option `name` stands for. Raises ValueError for what is no size."""
    if size is None:
        return None
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    match = re.fullmatch(r"(\d{1,15})([KMG]?)B?", str(size).upper())
    if match is None or isinstance(size, bool) or not int(match[1]):
        raise ValueError(
            f"{name} must be a number of bytes above 0, such as 2G or 500M, got {size!r}"
        )
    return int(match[1]) * units[match[2]]


def _kept(name: str, adapter: Any, fused: Any, type: Any, config: Any) -> float:
    """The share of an adapter's change that a GGUF file of `type` keeps.

    It is by how much storing the layer with the adapter differs from storing it without, along the
    change. Rounding that has nothing to do with the adapter does not count: it is there without.
    """
    before, after = dense(adapter.base.weight), dense(fused.weight)
    tensor = f"{name}.weight"
    part = next(iter(gguf_parts(tensor, after.shape[0], config)), tensor)
    kind = stored_as(tensor, after, type, gguf_name(part, config.family))
    shape = (-1, after.shape[-1])
    difference, change = (
        store(after.reshape(shape)) - store(before.reshape(shape))
        for store in (lambda rows: Weight.quantize(rows, kind).dequantize(), np.copy)
    )
    size = float(np.sum(change**2, dtype=np.float64))
    return float(np.sum(difference * change, dtype=np.float64)) / size if size else 1.0


def becomes_floats(model: Any) -> bool:
    """Whether adapters are fused into floats for a Hugging Face folder.

    They are where all matrices are floats or GGUF's, or where a folder cannot hold the order of
    their columns.
    """
    stored = model.stored().values()
    return _known_to_gguf(model) or any(
        weight.format not in SINGLE and not stays_quantized(weight) for weight in stored
    )


def _known_to_gguf(model: Any) -> bool:
    """Whether GGUF has the formats of all matrices."""
    return all(weight.format in SINGLE for weight in model.stored().values())


def check_request(
    path: str | os.PathLike[str],
    to: str,
    *,
    adapter_only: bool = False,
    type: str | None = None,
    dequantize: bool = False,
    split_max_size: int | str | None = None,
    importance_data: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    shard_size: int | str | None = None,
) -> None:
    """Check a request to `export` without the model: options, packages, the output's path.

    Raises as `export` does.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, not {to!r}")
    byte_count(split_max_size)
    byte_count(shard_size, "shard_size")
    for option, part in {"dtype": dtype, "shard_size": shard_size}.items():
        if part and to != "hf":
            raise ValueError(f"{option} is for 'hf' alone, not for {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    gguf_alone = {"adapter_only": adapter_only, "split_max_size": split_max_size}
    for option, given in gguf_alone.items():
        if given and to != "gguf":
            raise ValueError(f"{option} is for 'gguf' alone, not for {to!r}")
    for option, value in {"type": type, "importance_data": importance_data}.items():
        if value and to not in ("gguf", "ollama"):
            raise ValueError(f"{option} is for 'gguf' and 'ollama', not for {to!r}")
    if adapter_only and split_max_size is not None:
        raise ValueError("split_max_size is for whole models: an adapter is one file")
    if adapter_only and type is not None:
        raise ValueError("type is for whole models: an adapter is written in float32")
    if dequantize and (adapter_only or to in ("peft", "mlx")):
        raise ValueError("dequantize is for whole models: an adapter alone is written as it is")
    if type is not None and type not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    if importance_data is not None:
        kind = type or (OLLAMA_TYPE if to == "ollama" else None)
        if kind not in MIXTURES and kind not in ALIASES:
            raise ValueError(
                "importance_data is for types whose scales are searched for: type must be one of "
                f"{', '.join(MIXTURES)}, not {type!r}"
            )
        if not user_path(importance_data).exists():
            raise FileNotFoundError(f"importance_data: there is no file {importance_data}")
    if to in ("gguf", "ollama"):
        library()
    check_target(path, folder=to != "gguf", ending=".gguf" if to == "gguf" else "")
    if to == "gguf" and user_path(path).suffix.lower() != ".gguf":
        raise ValueError(
            f"{os.fspath(path)}: a GGUF file is written: give a name that ends in .gguf, "
            f"such as {os.fspath(path)}.gguf"
        )


@contextmanager
def _fused(model: Any, dequantize: bool, ways: str, gguf_type: str | None = None) -> Iterator[None]:
    """Fuses the model's adapters until the block ends.

    Raises ValueError naming `ways` if the file would keep little of them.
    """
    adapters = adapter_modules(model)
    try:
        if adapters:
            fuse_modules(model, dequantize, ways)
            if gguf_type is not None:
                fused = {name: module for name, module in model.named_modules() if name in adapters}
                chosen = mixture_of(model, gguf_type) or gguf_type
                refuse_loss(
                    {
                        name: _kept(name, adapters[name], fused[name], chosen, model.config)
                        for name in watched(adapters, "comparing with the base", "layer")
                    },
                    ways,
                )
        yield
    finally:
        for name, adapter in adapters.items():
            model.set_module(name, adapter)
