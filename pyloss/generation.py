"""Generation: choosing tokens, and the loop that streams them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss import random
from pyloss.checks.numbers import real, whole
from pyloss.io.console import out

_PREFILL = 512  # prompt tokens per forward pass: bounds the memory of long prompts


@dataclass
class GenerationStep:
    """One generated token.

    Attributes:
        text: the text that it adds to the answer.
        token: its id.
        finish_reason: None, "stop" or "length".
        prompt_tokens: tokens of the prompt.
        prompt_tps: prompt tokens per second.
        generation_tokens: tokens generated so far.
        generation_tps: generated tokens per second.
    """

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float


def make_sampler(
    temp: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    *,
    generator: np.random.Generator | None = None,
    temperature: float | None = None,
) -> Callable[[np.ndarray], int]:
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


def generate_tokens(
    model: Any,
    prompt: Sequence[int],
    sampler: Callable[[np.ndarray], Any] | None = None,
    logits_processors: Sequence[Callable[[np.ndarray, np.ndarray], Any]] | None = None,
) -> Iterator[int]:
    """Token ids after `prompt` (token ids, at least one), without end, one forward pass each.

    `logits_processors` are called in turn with all token ids so far and the logits [1, V], which
    they may change, as mlx-lm calls them; `sampler` takes the logits [V] that come out.
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(
            f"the prompt must hold at least one token, in one dimension; its shape is {ids.shape}"
        )
    sampler = sampler or make_sampler()
    cache = model.make_cache()
    for begin in range(0, len(ids), _PREFILL):
        logits = model.step(ids[begin : begin + _PREFILL], cache)
    known = list(ids)
    while True:
        if logits_processors:
            rows = np.array(logits, np.float32).reshape(1, -1)
            for process in logits_processors:
                rows = np.asarray(process(np.array(known), rows)).reshape(1, -1)
            logits = rows[0]
        token = int(np.asarray(sampler(logits)).reshape(-1)[0])
        known.append(token)
        yield token
        logits = model.step(np.array([token], np.int32), cache)


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    *,
    sampler: Callable[[np.ndarray], Any] | None = None,
    logits_processors: Sequence[Callable[[np.ndarray, np.ndarray], Any]] | None = None,
) -> Iterator[GenerationStep]:
    """Generates after `prompt` (a text or token ids), yielding each token as it comes.

    A text gets the tokenizer's special tokens. The first one is not added if the text already
    begins with it, as the texts of chat templates do.

    Ends with the tokenizer's end tokens, whose text is not part of the answer, or after
    `max_tokens` (-1: no limit). The same `seed` gives the same answer. A `sampler`, of
    `make_sampler` or a function from logits [V] to a token id, takes the place of `temperature` to
    `seed`; `logits_processors` as in `generate_tokens`.
    """
    from pyloss.models.text.special import encode_text
    from pyloss.models.tokenizer import StreamDecoder

    if max_tokens != -1:
        max_tokens = whole(max_tokens, "max_tokens", 1)
    if not isinstance(prompt, (str, Iterable)):
        raise TypeError(f"the prompt must be a text or token ids, not {prompt!r:.40}")
    ids = encode_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    generator = (
        None if seed is None else np.random.Generator(np.random.PCG64(whole(seed, "seed", 0)))
    )
    own = make_sampler(temperature, top_p, min_p, top_k=top_k, generator=generator)
    if sampler is not None and (temperature, top_p, min_p, top_k, seed) != (0.0, 1.0, 0.0, 0, None):
        raise ValueError(
            "sampler takes the place of temperature, top_p, min_p, top_k and seed: "
            "give one or the others"
        )
    tokens = generate_tokens(model, ids, sampler or own, logits_processors)
    decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
    begin = time.perf_counter()
    first = begin
    for count in itertools.count(1):
        token = next(tokens)
        now = time.perf_counter()
        if count == 1:
            first = now
        stop = token in tokenizer.eos_token_ids
        reason = "stop" if stop else "length" if count == max_tokens else None
        text = "" if stop else decoder.add(token)
        if reason:
            text += decoder.flush()
        speed = (count - 1) / (now - first) if count > 1 else 0.0
        yield GenerationStep(
            text, token, reason, len(ids), len(ids) / max(first - begin, 1e-9), count, speed
        )
        if reason:
            return


def generate(
    model: Any, tokenizer: Any, prompt: str | Sequence[int], verbose: bool = False, **options: Any
) -> str:
    """The whole answer of `stream_generate`.

    `verbose` prints it as it comes, and then the speed, as in mlx-lm.
    """
    texts, step = [], None
    if verbose:
        out("=" * 10)
    for step in stream_generate(model, tokenizer, prompt, **options):
        texts.append(step.text)
        if verbose:
            out(step.text, end="", flush=True)
    if verbose and step is not None:
        out("\n" + "=" * 10)
        out(f"Prompt: {step.prompt_tokens} tokens, {step.prompt_tps:.3f} tokens-per-sec")
        out(
            f"Generation: {step.generation_tokens} tokens, "
            f"{step.generation_tps:.3f} tokens-per-sec",
            flush=True,
        )
    return "".join(texts)
