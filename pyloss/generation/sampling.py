"""Choosing tokens: samplers, and the parameters of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import random
from pyloss.checks.numbers import real, whole

#: chooses a token id from logits [V]
Sampler = Callable[[np.ndarray], Any]
#: changes logits [1, V], given all token ids so far
Processor = Callable[[np.ndarray, np.ndarray], Any]


def make_sampler(
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    *,
    generator: np.random.Generator | None = None,
    temperature: float | None = None,
) -> Sampler:
    """A function from logits [V] to a token id.

    Names and order are mlx-lm's; `temperature` is another name for `temp`.
    Temperature 0 takes the largest. Otherwise the candidates are narrowed to the `top_k` largest
    (0: all), to the smallest set whose probabilities sum to `top_p` (0 or 1: all), and to those of
    at least `min_p` times the largest probability (at least `min_tokens_to_keep` of them), and one
    is drawn by `generator` or the library's own. ValueError for numbers outside of these ranges.
    """
    temperature = temp if temperature is None else temperature
    min_tokens_to_keep = whole(min_tokens_to_keep, "min_tokens_to_keep", 1)
    temperature, top_p, min_p = (
        real(temperature, "temperature", 0),
        real(top_p, "top_p", 0, 1),
        real(min_p, "min_p", 0, 1),
    )
    top_k = whole(top_k, "top_k", 0)
    if temperature == 0:
        return lambda logits: int(np.argmax(logits))
    draws = generator or random.generator()

    def sample(logits: np.ndarray) -> int:
        tokens = _largest(logits, top_k) if top_k else np.arange(len(logits))
        scores = logits[tokens].astype(np.float64) / temperature
        p = np.exp(scores - scores.max())
        total = p.sum()
        if min_p:
            likely = np.flatnonzero(p >= min_p)
            if len(likely) < min_tokens_to_keep:
                likely = _largest(p, min_tokens_to_keep)
            tokens, p = tokens[likely], p[likely]
        if 0 < top_p < 1:
            likely = _first_of(p, top_p * total)
            tokens, p = tokens[likely], p[likely]
        sums = np.cumsum(p)
        place = int(np.searchsorted(sums, draws.random() * sums[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])

    return sample


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """The indices of the n largest values, largest first; of equal ones, the first."""
    if n >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, len(values) - n)[len(values) - n]
    above = np.flatnonzero(values > least)
    found = np.concatenate((above, np.flatnonzero(values == least)[: n - len(above)]))
    return found[np.argsort(-values[found], kind="stable")]


def _first_of(p: np.ndarray, wanted: float) -> np.ndarray:
    """The fewest indices of largest values whose sum is at least `wanted`; all if none suffice."""
    n = 64
    while True:
        largest = _largest(p, n)
        before = np.cumsum(p[largest]) - p[largest]
        if n >= len(p) or before[-1] >= wanted:
            return largest[before < wanted]
        n *= 8


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are chosen, and where it ends.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature, top_p, min_p, top_k: as in `make_sampler`.
        seed: of the sequence's own random numbers; None draws one from the library's state.
        stop: texts that end the answer before them; one text or several.
        sampler: a function from logits [V] to a token id, in place of `temperature` to `seed`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", whole(self.max_tokens, "max_tokens", 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole(self.seed, "seed", 0))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r:.80}; it must be a text or texts, none empty")
        object.__setattr__(self, "stop", stop)
        choices = (self.temperature, self.top_p, self.min_p, self.top_k, self.seed)
        if self.sampler is not None and choices != (0.0, 1.0, 0.0, 0, None):
            raise ValueError(
                "sampler takes the place of temperature, top_p, min_p, top_k and seed: "
                "give one or the others"
            )
        make_sampler(self.temperature, self.top_p, self.min_p, top_k=self.top_k, generator=_UNUSED)

    def make_sampler(self) -> Sampler:
        """A sampler of its own for one sequence."""
        if self.sampler is not None:
            return self.sampler
        generator = None if self.seed is None else np.random.Generator(np.random.PCG64(self.seed))
        return make_sampler(
            self.temperature, self.top_p, self.min_p, top_k=self.top_k, generator=generator
        )


_UNUSED = np.random.Generator(np.random.PCG64(0))  # for checks of parameters
