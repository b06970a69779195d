"""Models with random weights from mlx-lm's `ModelArgs`, for training from the beginning."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pyloss import nn, random
from pyloss.mlx_lm.arrays import seen_as_mlx
from pyloss.models import transformer
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model


class ModelArgs:
    """The keys of a config.json as attributes.

    Keys that are not given have mlx-lm's defaults (`defaults`), else config.json's.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }

    def __init__(self, model_type: str, **settings: Any) -> None:
        self.model_type = model_type
        vars(self).update(self.defaults | settings)

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> ModelArgs:
        """The settings of a config.json."""
        return cls(**params)


class _Kind(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, transformer.Model)


class Model(metaclass=_Kind):
    """A new model of this shape; all of its parameters are trained.

    Its matrices begin as those of mlx.nn's layers. Raises ValueError for an option that pyloss does
    not have, FormatError for a missing key. All models of pyloss are instances.
    """

    def __new__(cls, args: ModelArgs) -> Any:
        return new_model(args)


def new_model(args: ModelArgs) -> Any:
    """See `Model`."""
    settings = {key: value for key, value in vars(args).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        model = random_model(ModelConfig.from_hf(file))
    draw = random.generator()
    for module in list(model.modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        rows, columns = module.shape
        size = 1 / np.sqrt(columns)
        values = (
            draw.uniform(-size, size, (rows, columns))
            if isinstance(module, nn.Linear)
            else draw.normal(0, size, (rows, columns))
        )
        module.weight = values.astype(np.float32)
    shown = seen_as_mlx(model)
    shown.unfreeze()
    return shown
