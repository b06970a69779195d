"""What of `pyloss.mlx` this room uses: arrays, and MLX's methods of models."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.autograd.tape import data
from pyloss.mlx import core as mx
from pyloss.mlx.core.arrays import raw, result
from pyloss.mlx.nn import with_mlx_methods
from pyloss.models.layers import Packing
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

    @property
    def fuse(self) -> Any:
        """Not here: scripts call `fuse` of every module that has it, and mlx-lm's models do not.

        AttributeError that names what merges all adapters.
        """
        raise AttributeError(
            "mlx-lm's models have no fuse(): pyloss.tuner.utils.fuse_adapters merges all adapters"
        )

    @property
    def args(self) -> Any:
        """The model's configuration, by mlx-lm's name."""
        return self.config  # type: ignore[attr-defined]

    @property
    def model_type(self) -> str:
        """The family's name."""
        return self.config.model_type  # type: ignore[attr-defined]


class _Decoding:
    """The part of a model below its head, called as mlx-lm's: `model.model(ids)`."""

    _model: Any

    def __call__(self, inputs: Any, cache: Any = None, **others: Any) -> Any:
        """The last hidden states [B, T, hidden] of token ids [B, T].

        TypeError for other arguments of mlx-lm's models.
        """
        if given := [
            name for name, value in {"cache": cache, **others}.items() if value is not None
        ]:
            raise TypeError(
                f"model.model takes token ids alone, not {given[0]}: the model itself takes a cache"
            )
        tokens = np.asarray(data(inputs))
        rows, columns = tokens.shape
        offsets = np.arange(rows + 1, dtype=np.int32) * columns
        states = self._model.hidden(tokens.reshape(-1).astype(np.int32), offsets)
        return array(states).reshape(rows, columns, -1)


class _Mixing:
    """The attention of a decoder layer, which its layer alone calls."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0] if args else kwargs.get("packing"), Packing):
            raise TypeError(
                "attention is called by its layer alone: layer(h, mask) gives the hidden states "
                "after the layer, and model.model(ids) those after all"
            )
        return super().__call__(x, *args, **kwargs)  # type: ignore[misc]


class _Layered:
    """A decoder layer that is also called as mlx-lm's: `layer(h, mask, cache=None)`."""

    _model: Any

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0] if args else kwargs.get("packing"), Packing):
            return super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        return self._of_batch(x, *args, **kwargs)

    def _of_batch(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
        """The hidden states [B, T, hidden] after this layer.

        ValueError for a cache, a mask that is not causal, and where hidden states are scaled
        between layers.
        """
        states = array(x)
        rows, columns, width = states.shape
        if cache is not None:
            raise ValueError("a layer takes no cache by itself: the model takes one")
        if not _is_causal(mask, columns):
            raise ValueError('mask must be "causal" or such an array: pyloss has no other masks')
        if self._model.config.residual_multiplier not in (None, 1):
            raise ValueError("layers of this family run as parts of the model alone")
        packing = self._model._pack(np.full(rows, columns))
        packed = raw(states.reshape(rows * columns, width))
        found = super().__call__(packed, packing)  # type: ignore[misc]
        return array(found).reshape(rows, columns, width)


def _is_causal(mask: Any, tokens: int) -> bool:
    """Whether a mask lets each of so many tokens see those up to itself."""
    if mask is None or isinstance(mask, str):
        return mask == "causal" or (mask is None and tokens == 1)
    values = np.asarray(data(mask))
    seen = values if values.dtype == bool else values == 0
    wanted = np.tri(tokens, dtype=bool)
    return seen.shape[-2:] == wanted.shape and bool((seen == wanted).all())


#: the class that is called as mlx-lm's are, for each class of models, decoders and layers
_CLASSES: dict[type, type] = {}


def _called(module: Any, as_mlx: type) -> None:
    cls = type(module)
    if issubclass(cls, as_mlx):
        return
    if cls not in _CLASSES:
        # A class promises `recordable` for itself; these make the same calls of the core.
        promise = {name: vars(cls)[name] for name in ("recordable",) if name in vars(cls)}
        _CLASSES[cls] = type(cls.__name__, (as_mlx, cls), {"__module__": cls.__module__, **promise})
    object.__setattr__(module, "__class__", _CLASSES[cls])


def seen_as_mlx(model: Any) -> Any:
    """Give a model, and all modules in it, MLX's methods and mlx-lm's call; return the same object.

    A model of a script's own has its own call.

    pyloss's functions take it as before. Modules that are put into it later need another call.
    """
    with_mlx_methods(model)
    if not isinstance(model, Model):
        return model
    _called(model, _Called)
    _called(model.model, _Decoding)
    for layer in model.layers:
        _called(layer, _Layered)
        _called(layer.self_attn, _Mixing)
    for module in (model.model, *model.layers):
        object.__setattr__(module, "_model", model)
    return model
