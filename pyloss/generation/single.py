"""The loop that generates one sequence and streams its text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.checks.numbers import whole
from pyloss.generation.sampling import Processor, Sampler, make_sampler
from pyloss.io.console import out


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


def generate_tokens(
    model: Any,
    prompt: Sequence[int],
    sampler: Sampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
    highest_id: int | None = None,
) -> Iterator[int]:
    """Token ids after `prompt` (token ids, at least one), without end, one forward pass each.

    Rows of the output past `highest_id` are no tokens, and are not generated.

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
    logits = read_prompt(model, ids, cache)
    known, tokens = list(ids), None if highest_id is None else highest_id + 1
    while True:
        logits = logits[:tokens]
        if logits_processors:
            rows = np.array(logits, np.float32).reshape(1, -1)
            for process in logits_processors:
                rows = np.asarray(process(np.array(known), rows)).reshape(1, -1)
            logits = rows[0]
        token = int(np.asarray(sampler(logits)).reshape(-1)[0])
        known.append(token)
        yield token
        logits = model.step(np.array([token], np.int32), cache)


def read_prompt(model: Any, ids: np.ndarray, cache: Any) -> np.ndarray:
    """The logits [V] after a prompt, read into an empty cache in parts of PREFILL tokens."""
    from pyloss.models.cache import PREFILL

    if hasattr(cache, "least"):  # pyloss's own
        cache.least = len(ids)
    for begin in range(0, len(ids), PREFILL):
        logits = model.step(ids[begin : begin + PREFILL], cache)
    return logits


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
    sampler: Sampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
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
    # Tokenizers of other libraries may not say it.
    highest = getattr(tokenizer, "highest_id", None)
    tokens = generate_tokens(model, ids, sampler or own, logits_processors, highest)
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
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | None = None,
    verbose: bool = False,
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    **options: Any,
) -> Any:
    """The whole answer of `stream_generate`, or the list of the answers to `prompts`.

    `verbose` prints it as it comes, and then the speed, as in mlx-lm. `prompts` are answered many
    at a time; their `options` are those of `batch_generate`, with 256 `max_tokens` by default.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("generate takes either prompt or prompts: give one of them")
    if prompts is not None:
        from pyloss.generation.batch import batch_generate

        options.setdefault("max_tokens", 256)
        return batch_generate(model, tokenizer, prompts, verbose=verbose, **options).texts
    texts, step = [], None
    if verbose:
        out("=" * 10)
    assert prompt is not None
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
