"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json, write_safetensors
from ..weight_stack import WeightStack
from ..weights import Weight
from .names import expert_name
from .transformer import Model


def refuse_adapters(model: Model) -> None:
    """Raises ValueError when the model has unfused adapters, which the files of models have no place for."""
    adapters = [name for name, module in model.named_modules() if hasattr(module, "from_base")]
    if adapters:
        raise ValueError(
            f"the model has {len(adapters)} unfused adapters ({adapters[0]}, ...): call model.fuse() before saving it"
        )


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """float32 tensors by Hugging Face's names, each expert's matrix one."""
    values: dict[str, Any] = {**model.stored(), **model.parameters()}
    for name, value in values.items():
        if len(value.shape) == 3:
            matrices = value.matrices if isinstance(value, WeightStack) else value
            for expert, matrix in enumerate(matrices):
                yield expert_name(name, model.config.family, expert), _dense(matrix)
        else:
            yield name, _dense(value)


def _dense(value: np.ndarray | Weight) -> np.ndarray:
    return value.dequantize() if isinstance(value, Weight) else value


def save_model(model: Model, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors (float32) and the tokenizer's files into the folder `path`.

    Raises ValueError when the model has unfused adapters, OSError naming the path when it cannot be written.
    """
    refuse_adapters(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", dict(_tensors(model)), {"format": "pt"})
    write_json(folder / "config.json", model.config.to_hf())
    if tokenizer is not None:
        tokenizer.save(folder)
