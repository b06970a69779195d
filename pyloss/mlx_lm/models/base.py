"""mlx_lm.models.base: masks, for layers of a script's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss.mlx_lm.arrays import array
from pyloss.mlx_lm.names import absent

__all__ = ["create_attention_mask", "create_causal_mask"]

__getattr__ = absent(__name__)


def create_causal_mask(
    N: int,
    offset: int = 0,
    window_size: int | None = None,
    right_padding: Any = None,
    left_padding: Any = None,
) -> Any:
    """Whether each of N tokens after `offset` sees each token so far, bool [N, offset + N].

    With `window_size` it sees so many, itself included. With paddings [B] the mask is
    [B, 1, N, offset + N], and padding is not seen.
    """
    keys, queries = np.arange(offset + N), np.arange(offset, offset + N)[:, None]
    mask = queries >= keys
    if window_size is not None:
        mask &= queries < keys + window_size
    if right_padding is not None:
        ends = offset + N - np.asarray(right_padding)
        mask = mask & (keys < ends.reshape(-1, 1, 1, 1))
    if left_padding is not None:
        mask = mask & (np.asarray(left_padding).reshape(-1, 1, 1, 1) <= keys)
    return array(mask)


def create_attention_mask(
    h: Any, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> Any:
    """The mask of hidden states [B, N, D] after those in a cache: None, "causal" or an array."""
    tokens = h.shape[1]
    if cache is not None and hasattr(cache, "make_mask"):
        return cache.make_mask(tokens, return_array=return_array, window_size=window_size)
    if tokens == 1:
        return None
    if return_array or (window_size and tokens > window_size):
        return create_causal_mask(tokens, window_size=window_size)
    return "causal"
