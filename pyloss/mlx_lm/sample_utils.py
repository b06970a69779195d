"""mlx_lm.sample_utils: samplers of log-probabilities [..., V], and processors of logits [B, V]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pyloss.mlx_lm.arrays import array, mx
from pyloss.mlx_lm.names import absent

__all__ = [
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "apply_xtc",
    "categorical_sampling",
    "greedy_sampler",
    "make_frequency_penalty",
    "make_logits_processors",
    "make_presence_penalty",
    "make_repetition_penalty",
    "make_sampler",
]

__getattr__ = absent(__name__)

Sampler = Callable[[Any], Any]
LogitsProcessor = Callable[[Any, Any], Any]


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
) -> Sampler:
    """A function from log-probabilities to tokens; with `temp` 0 the most likely ones.

    Else candidates are narrowed by `apply_top_p`, `apply_min_p`, `apply_xtc` and `apply_top_k`, in
    this order, and one is drawn.
    """
    if temp == 0:
        return greedy_sampler
    steps: list[Sampler] = []
    if 0 < top_p < 1.0:
        steps.append(lambda x: apply_top_p(x, top_p))
    if min_p != 0.0:
        steps.append(lambda x: apply_min_p(x, min_p, min_tokens_to_keep))
    if xtc_probability > 0.0:
        special = xtc_special_tokens or []
        steps.append(lambda x: apply_xtc(x, xtc_probability, xtc_threshold, special))
    if top_k > 0:
        steps.append(lambda x: apply_top_k(x, top_k))

    def sampler(logprobs: Any) -> Any:
        for step in steps:
            logprobs = step(logprobs)
        return categorical_sampling(logprobs, temp)

    return sampler


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = 20,
    presence_penalty: float | None = None,
    presence_context_size: int | None = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int | None = 20,
) -> list[LogitsProcessor]:
    """Functions of the tokens so far and the logits [B, V], which return changed logits.

    `logit_bias` is added to the logits of its tokens. The penalties are those of the functions
    below, over so many of the last tokens; None and 0 leave one out.
    """
    processors: list[LogitsProcessor] = []
    if logit_bias:
        places, values = list(logit_bias), np.array(list(logit_bias.values()), np.float32)

        def add_bias(_: Any, logits: Any) -> Any:
            return _changed(logits, lambda row: np.add.at(row, places, values))

        processors.append(add_bias)
    for make, penalty, size in (
        (make_repetition_penalty, repetition_penalty, repetition_context_size),
        (make_presence_penalty, presence_penalty, presence_context_size),
        (make_frequency_penalty, frequency_penalty, frequency_context_size),
    ):
        if penalty is not None and penalty != 0:
            processors.append(make(penalty, 20 if size is None else size))
    return processors


def greedy_sampler(logprobs: Any) -> Any:
    """The most likely tokens."""
    return array(np.argmax(np.asarray(logprobs), axis=-1))


def apply_top_k(logprobs: Any, top_k: int) -> Any:
    """-inf for all but the `top_k` largest. ValueError unless 0 < top_k < V."""
    values = np.asarray(logprobs)
    size = values.shape[-1]
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 < top_k < size:
        raise ValueError(
            f"`top_k` has to be an integer in the (0, {size}) interval, but is {top_k}."
        )
    others = np.argpartition(-values, top_k - 1, axis=-1)[..., top_k:]
    kept = values.copy()
    np.put_along_axis(kept, others, np.array(-np.inf, kept.dtype), axis=-1)
    return array(kept)


def apply_min_p(logprobs: Any, min_p: float, min_tokens_to_keep: int = 1) -> Any:
    """-inf for what is less likely than `min_p` times the likeliest token, but for so many.

    Raises ValueError for numbers out of range.
    """
    if not 0 <= min_p <= 1.0:
        raise ValueError(f"`min_p` has to be a float in the [0, 1] interval, but is {min_p}")
    if not isinstance(min_tokens_to_keep, int) or min_tokens_to_keep < 1:
        raise ValueError(
            f"`min_tokens_to_keep` has to be a positive integer, but is {min_tokens_to_keep}"
        )
    values = np.asarray(logprobs)
    least = values.max(axis=-1, keepdims=True) + (math.log(min_p) if min_p else -math.inf)
    removed = values < least
    if min_tokens_to_keep > 1:
        first = np.argpartition(values, -min_tokens_to_keep, axis=-1)[..., -min_tokens_to_keep:]
        np.put_along_axis(removed, first, False, axis=-1)
    return array(np.where(removed, np.array(-np.inf, values.dtype), values))


def apply_top_p(logprobs: Any, top_p: float) -> Any:
    """-inf for all but the fewest tokens whose probabilities sum to `top_p` of the total."""
    values = np.asarray(logprobs)
    ordered = np.sort(values, axis=-1)
    likely = np.exp(ordered.astype(np.float32))
    above = np.cumsum(likely[..., ::-1], axis=-1)[..., ::-1]
    total, above = above[..., :1], above - likely
    dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    least = np.take_along_axis(ordered, dropped, axis=-1)
    return array(np.where(values < least, np.array(-np.inf, values.dtype), values))


def apply_xtc(
    logits: Any, xtc_probability: float, xtc_threshold: float, xtc_special_tokens: list[int]
) -> Any:
    """With `xtc_probability`: -inf for all tokens above the threshold but the least likely of them.

    Raises ValueError for numbers out of range.
    """
    if not 0 <= xtc_threshold <= 0.5:
        raise ValueError(
            f"`threshold` has to be a float in the [0, 0.5] interval, but is {xtc_threshold}"
        )
    if not 0 <= xtc_probability <= 1.0:
        raise ValueError(
            f"`probability` has to be a float in the [0, 1] interval, but is {xtc_probability}"
        )
    values = np.asarray(logits)
    likely = np.exp(values - values.max(axis=-1, keepdims=True))
    likely /= likely.sum(axis=-1, keepdims=True)
    least = np.where(likely > xtc_threshold, likely, np.inf).min(axis=-1, keepdims=True)
    removed = likely > least
    if xtc_special_tokens:
        removed[..., xtc_special_tokens] = False
    if float(mx.random.uniform(0, 1).item()) > xtc_probability:
        return array(values)
    return array(np.where(removed, np.array(-np.inf, values.dtype), values))


def categorical_sampling(logits: Any, temp: float) -> Any:
    """Draw tokens by the softmax of `logits / temp`."""
    return mx.random.categorical(array(logits) * (1.0 / temp))


def make_repetition_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Divides the positive logits of recent tokens by `penalty`, and multiplies negative ones.

    arXiv:1909.05858. Raises ValueError for a negative penalty.
    """
    if not isinstance(penalty, int | float) or penalty < 0:
        raise ValueError(f"penalty must be a non-negative float, got {penalty}")

    def change(row: np.ndarray, tokens: Sequence[int]) -> None:
        chosen = row[tokens]
        row[tokens] = np.where(chosen < 0, chosen * penalty, chosen / penalty)

    return _recent(change, context_size)


def make_presence_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Subtracts `penalty` from the logits of recent tokens."""

    def change(row: np.ndarray, tokens: Sequence[int]) -> None:
        row[tokens] -= penalty

    return _recent(change, context_size)


def make_frequency_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Subtracts `penalty` from the logits of recent tokens, for each time that one occurs."""

    def change(row: np.ndarray, tokens: Sequence[int]) -> None:
        np.subtract.at(row, tokens, penalty)

    return _recent(change, context_size)


def _recent(change: Callable[[np.ndarray, Any], None], context_size: int) -> LogitsProcessor:
    """A processor that changes rows of logits by the last tokens."""

    def process(tokens: Any, logits: Any) -> Any:
        last = np.asarray(tokens)[-context_size:].astype(np.int64)
        return _changed(logits, lambda row: change(row, last)) if len(last) else logits

    return process


def _changed(logits: Any, change: Callable[[np.ndarray], Any]) -> Any:
    found = np.array(np.asarray(logits))
    for row in found:
        change(row)
    return array(found)
