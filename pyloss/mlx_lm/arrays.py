"""What of `pyloss.mlx` this room uses: arrays, and MLX's methods of models."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.autograd.tape import data
from pyloss.mlx import core as mx
from pyloss.mlx.core.arrays import result
from pyloss.mlx.nn import with_mlx_methods
from pyloss.models.transformer import Model

__all__ = ["array", "mx", "seen_as_mlx"]


def array(values: Any) -> Any:
    """An `mx.array` over an ndarray, or over a value that carries a gradient."""
    return result(values)


class _Called:
    """A language model that is called as mlx-lm's: with a cache, and for `mx.array`s."""

    def __call__(self, inputs: Any, cache: Any = None, **others: Any) -> Any:
        """Logits [B, T, V] of token ids [B, T], which continue the sequences in `cache`.

        TypeError for other arguments of mlx-lm's models.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise TypeError(
                f"the model's call takes token ids and a cache, not {given[0]}: "
                "pyloss.models has the layers"
            )
        tokens = np.asarray(data(inputs))
        if cache is None:
            return array(super().__call__(tokens))  # type: ignore[misc]
        from pyloss.mlx_lm.models.cache import read_tokens

        return array(read_tokens(self, tokens, cache))


#: the class that is called as mlx-lm's models are, for each class of models
_CLASSES: dict[type, type] = {}


def seen_as_mlx(model: Model) -> Model:
    """Give a model, and all modules in it, MLX's methods and mlx-lm's call; return the same object.

    pyloss's functions take it as before. Modules that are put into it later need another call.
    """
    with_mlx_methods(model)
    cls = type(model)
    if not issubclass(cls, _Called):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(cls.__name__, (_Called, cls), {"__module__": cls.__module__})
        object.__setattr__(model, "__class__", _CLASSES[cls])
    return model
