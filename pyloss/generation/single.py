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
    kept: KeptTokens | None = None,
) -> Iterator[int]:
    """Token ids after `prompt` (token ids, at least one), without end, one forward pass each.

    Rows of the output past `highest_id` are no tokens, and are not generated. `kept` holds the
    tokens that the model has read already; those at the beginning of `prompt` are not read again.

    `logits_processors` are called in turn with all token ids so far and the logits [1, V], which
    they may change, as mlx-lm calls them; `sampler` takes the logits [V] that come out.
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(
            f"the prompt must hold at least one token, in one dimension; its shape is {ids.shape}"
        )
    sampler = sampler or make_sampler()
    kept = kept or KeptTokens(model)
    logits = kept.read_prompt(ids)
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
        logits = kept.read(np.array([token], np.int32))


class KeptTokens:
    """The tokens that a model has read, with their keys and values.

    A later prompt, such as the next turn of a conversation, only reads the tokens after those that
    it begins with. The model must not change in between.

    Attributes:
        ids: the token ids in the cache.
        reused: how many tokens of the latest prompt were not read again.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reused = 0
        self.clear()

    def clear(self) -> None:
        """Drops all tokens."""
        self.ids: list[int] = []
        self._cache: Any = None

    def read_prompt(self, prompt: Sequence[int] | np.ndarray) -> np.ndarray:
        """The logits [V] after a prompt, of which only the new tokens are read."""
        ids = np.asarray(prompt)
        self._keep_beginning(ids)
        self.reused = len(self.ids)
        return self.read(ids[len(self.ids) :])

    def read(self, ids: np.ndarray) -> np.ndarray:
        """The logits [V] after further tokens. If that fails, all tokens are dropped."""
        if self._cache is None:
            self._cache = self.model.make_cache()
        try:
            logits = read_prompt(self.model, ids, self._cache, first=not self.ids)
            self.ids += ids.tolist()
        except BaseException:
            self.clear()
            raise
        return logits

    def _keep_beginning(self, ids: np.ndarray) -> None:
        """Drops the tokens behind those that `ids` begins with; the last of `ids` is read anew."""
        most = min(len(self.ids), len(ids) - 1)
        same = np.asarray(self.ids[:most]) == ids[:most]
        n = most if same.all() else int(same.argmin())
        if n and self._cache.truncate(n):
            del self.ids[n:]
        else:
            self.clear()


def read_prompt(model: Any, ids: np.ndarray, cache: Any, first: bool = True) -> np.ndarray:
    """The logits [V] after tokens that are read into a cache in parts of PREFILL.

    `first`: the cache is empty.
    """
    from pyloss.models.cache import PREFILL

    if first and hasattr(cache, "least"):  # pyloss's own
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
    kept: KeptTokens | None = None,
) -> Iterator[GenerationStep]:
    """Generates after `prompt` (a text or token ids), yielding each token as it comes.

    A text gets the tokenizer's special tokens. The first one is not added if the text already
    begins with it, as the texts of chat templates do.

    Ends with the tokenizer's end tokens, whose text is not part of the answer, or after
    `max_tokens` (-1: no limit). The same `seed` gives the same answer. A `sampler`, of
    `make_sampler` or a function from logits [V] to a token id, takes the place of `temperature` to
    `seed`; `logits_processors` and `kept` as in `generate_tokens`; `prompt_tps` counts the tokens
    of the prompt that are read.
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
    kept = kept or KeptTokens(model)
    tokens = generate_tokens(model, ids, sampler or own, logits_processors, highest, kept)
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
        prompt_speed = (len(ids) - kept.reused) / max(first - begin, 1e-9)
        yield GenerationStep(text, token, reason, len(ids), prompt_speed, count, speed)
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
