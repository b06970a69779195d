"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json, write_safetensors
from .transformer import Model


def refuse_adapters(model: Model) -> None:
    """Raises ValueError when the model has unfused adapters, which the files of models have no place for."""
    adapters = [name for name, module in model.named_modules() if hasattr(module, "from_base")]
    if adapters:
        raise ValueError(
            f"the model has {len(adapters)} unfused adapters ({adapters[0]}, ...): call model.fuse() before saving it"
        )


def save_model(model: Model, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Writes config.json, model.safetensors (float32) and the tokenizer's files into the folder `path`.

    Raises ValueError when the model has unfused adapters, OSError naming the path when it cannot be written.
    """
    refuse_adapters(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {name: weight.dequantize() for name, weight in model.stored().items()}
    write_safetensors(folder / "model.safetensors", {**tensors, **model.parameters()}, {"format": "pt"})
    write_json(folder / "config.json", model.config.to_hf())
    if tokenizer is not None:
        tokenizer.save(folder)
