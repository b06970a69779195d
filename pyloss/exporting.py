"""`export`: a model, or its adapter, written for another program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .files import user_path
from .keeping import output
from .models.gguf_writer import write_gguf
from .tuner.adapter import adapter_modules
from .tuner.adapter_gguf import write_lora_gguf
from .tuner.adapters import save_adapter
from .weights import SINGLE

if TYPE_CHECKING:
    from .models.tokenizer import Tokenizer
    from .models.transformer import Model

#: the adapter for PEFT or mlx-lm; the model as a GGUF file or a Hugging Face folder
FORMATS = ("peft", "mlx", "gguf", "hf")


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
) -> None:
    """Write `model` in a format of other programs. It stays as it is; of its adapters, the files get fused layers.

    Args:
        path: a folder, or the file of "gguf".
        to: "peft" or "mlx" write the model's adapter, "hf" a Hugging Face folder, "gguf" a file for llama.cpp.
        tokenizer: goes with the model into "hf", where it may be missing, and "gguf".
        adapter_only: with "gguf", write the adapter alone, which llama.cpp loads beside the base model.
        type: with "gguf", what matrices are stored as (`gguf_writer.TYPES`); without it as they are, or "f16" where GGUF has
            no name for that.
        dequantize: fuse into float32 where the base is quantised, so that nothing of the adapter is lost. That is done anyway
            where the file has no place for what the base is quantised in.
        name: the model's name in a GGUF file, or the base's in PEFT's configuration.
        overwrite: replace what is there; otherwise it is kept in a folder `previous-N` beside.

    Raises:
        ValueError: an unknown format, arguments that do not go together, a model without an adapter where one is written, or
            what the format cannot say.
        ImportError: writing GGUF needs the `gguf` package.
        OSError: naming what cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, not {to!r}")
    for option, given in (("adapter_only", adapter_only), ("type", type)):
        if given and to != "gguf":
            raise ValueError(f"{option} is for 'gguf' alone, not for {to!r}")
    if to in ("peft", "mlx"):
        save_adapter(model, path, to, base_model=name, one_rank=True, overwrite=overwrite)
    elif adapter_only:
        if type is not None:
            raise ValueError("type is for whole models: an adapter is written in float32")
        with output(user_path(path), overwrite=overwrite):
            write_lora_gguf(model, path, name)
    elif to == "hf":
        with _fused(model, dequantize or becomes_floats(model)):
            model.save(path, tokenizer, overwrite=overwrite)
    elif tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer too: give it")
    else:
        type = type if type is not None or becomes_floats(model) else "f16"
        with _fused(model, dequantize or type is not None), output(user_path(path), overwrite=overwrite):
            write_gguf(model, path, tokenizer, type, name)


def becomes_floats(model: Any) -> bool:
    """Whether the model stores floats and GGUF's formats alone; of these, Hugging Face folders have the floats."""
    return all(weight.format in SINGLE for weight in model.stored().values())


@contextmanager
def _fused(model: Any, dequantize: bool) -> Iterator[None]:
    """The adapters of the model fused, until the block ends."""
    adapters = adapter_modules(model)
    try:
        if adapters:
            model.fuse(dequantize)
        yield
    finally:
        for name, adapter in adapters.items():
            model.set_module(name, adapter)
