"""Generation for many prompts at a time: sequences leave as they end, and others enter."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyloss import _core
from pyloss.checks.numbers import whole
from pyloss.generation.sampling import Processor, Sampler, SamplingParams
from pyloss.io.console import out

if TYPE_CHECKING:
    from pyloss.models.batch_cache import BatchCache
    from pyloss.models.cache import KVCache

#: sequences that run at once, by default
BATCH_SIZE = 16


@dataclass
class Completion:
    """A finished sequence.

    Attributes:
        index: its place among the prompts.
        text: the answer, without the end token and without a stop text and what follows it.
        tokens: all generated ids, an end token included.
        finish_reason: "stop" (an end token or a stop text) or "length" (`max_tokens`).
        prompt_tokens: tokens of the prompt.
        logprobs: the natural log of each token's probability in the softmax of the model's logits,
            if asked for.
        cache: the keys and values of the prompt and of all generated tokens, if asked for.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: list[float] | None = None
    cache: KVCache | None = None


@dataclass
class BatchStats:
    """What a run has done so far.

    Attributes:
        prompt_tokens, generation_tokens: tokens read and generated.
        prompt_time, generation_time: seconds in the model and in sampling for each.
        steps: forward passes that generated; each gave one token to every running sequence.
        cache_bytes: what keys and values take at most.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_time: float = 0.0
    generation_time: float = 0.0
    steps: int = 0
    cache_bytes: int = 0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second, of all sequences together."""
        return self.generation_tokens / self.generation_time if self.generation_time else 0.0


@dataclass
class _Sequence:
    """A running sequence."""

    index: int
    ids: np.ndarray
    params: SamplingParams
    sampler: Sampler
    decoder: Any
    begun: KVCache | None = None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None

    def add(self, token: int, ends: Iterable[int]) -> None:
        """Takes a generated token, and sets `reason` if it is the last one."""
        self.tokens.append(token)
        searched = len(self.text)
        if token in ends:
            self.reason = "stop"
        else:
            self.text += self.decoder.add(token)
            if len(self.tokens) == self.params.max_tokens:
                self.reason = "length"
        if self.reason:
            self.text += self.decoder.flush()
        places = [
            (place, text)
            for text in self.params.stop
            if (place := self.text.find(text, max(0, searched - len(text) + 1))) >= 0
        ]
        if places:
            self.text, self.reason = self.text[: min(places)[0]], "stop"

    @property
    def known(self) -> int:
        """The tokens before the prompt."""
        return 0 if self.begun is None else self.begun.length

    def completion(self, logprobs: bool, cache: KVCache | None) -> Completion:
        assert self.reason is not None
        return Completion(
            self.index,
            self.text,
            self.tokens,
            self.reason,
            len(self.ids),
            self.logprobs if logprobs else None,
            cache,
        )


class BatchGenerator:
    """Generates for any number of prompts, up to `batch_size` at a time.

    Prompts are packed: no padding is computed. A sequence's text does not depend on the others: it
    is what `generate` gives alone with the same parameters.

        generator = BatchGenerator(model, tokenizer, batch_size=32)
        for done in generator.run(prompts, SamplingParams(max_tokens=100, temperature=0.8)):
            print(done.index, done.text, done.finish_reason)

    Attributes:
        stats: what the last run has done so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = BATCH_SIZE,
        *,
        logits_processors: Sequence[Processor] | None = None,
        logprobs: bool = False,
        caches: bool = False,
    ):
        """`logits_processors` as in `generate_tokens`.

        `logprobs` and `caches` fill these fields of `Completion`.
        """
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = whole(batch_size, "batch_size", 1)
        self.stats = BatchStats()
        self._processors, self._logprobs = tuple(logits_processors or ()), logprobs
        self._caches = caches
        self._pool: ThreadPoolExecutor | None = None

    def run(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        caches: Sequence[KVCache | None] | None = None,
    ) -> Iterator[Completion]:
        """Yields the answer of each prompt (a text or token ids) when it ends.

        `params` are the same for all prompts, or one for each. `caches` of the model's `make_cache`
        hold the tokens before each prompt; they do not change, and prompts may share one. Texts get
        the tokenizer's special tokens, as in `stream_generate`. ValueError, before anything is
        computed, for a prompt that has no tokens or other ids than the vocabulary's, and
        MemoryError if the keys and values of so many sequences cannot fit.
        """
        sequences = self._checked(prompts, params, caches)
        self.stats = BatchStats(cache_bytes=self._check_memory(sequences))
        return self._run(deque(sequences))

    def _checked(self, prompts: Any, params: Any, caches: Any) -> list[_Sequence]:
        from pyloss.models.text.special import encode_text
        from pyloss.models.tokenizer import StreamDecoder

        if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
            raise TypeError(f"prompts must be a list of texts or of token ids, not {prompts!r:.40}")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts, but params for {len(params)}")
        caches = [None] * len(prompts) if caches is None else list(caches)
        if len(caches) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts, but caches for {len(caches)}")
        sequences = []
        for index, (prompt, own, begun) in enumerate(zip(prompts, params, caches, strict=True)):
            if not isinstance(prompt, str | Iterable):
                raise TypeError(f"prompt {index} must be a text or token ids, not {prompt!r:.40}")
            ids = np.asarray(
                encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
            )
            if ids.ndim != 1 or not ids.size:
                raise ValueError(
                    f"prompt {index} must hold at least one token, in one dimension; "
                    f"its shape is {ids.shape}"
                )
            try:
                ids = self.model._tokens(ids, 1)
            except (TypeError, ValueError) as error:
                raise type(error)(f"prompt {index}: {error}") from None
            decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)
            sequences.append(_Sequence(index, ids, own, own.make_sampler(), decoder, begun))
        return sequences

    def _check_memory(self, sequences: Sequence[_Sequence]) -> int:
        lengths = [s.known + len(s.ids) + s.params.max_tokens for s in sequences]
        longest = sorted(lengths, reverse=True)[: self.batch_size]
        needed = self.model.cache_bytes(longest)
        free = free_memory()
        if free is not None and needed > free:
            raise MemoryError(
                f"{len(longest)} sequences of up to {longest[0]} tokens need {needed / 1e9:.2f} GB "
                f"for keys and values, and {free / 1e9:.2f} GB are free: use a smaller batch_size "
                "or max_tokens"
            )
        return needed

    def _run(self, waiting: deque[_Sequence]) -> Iterator[Completion]:
        slots = min(self.batch_size, len(waiting))
        cache = self.model.make_batch_cache(slots)
        running: dict[int, _Sequence] = {}
        try:
            while waiting or running:
                free = [slot for slot in range(slots) if slot not in running]
                entering = dict(zip(free, waiting, strict=False))
                for _ in entering:
                    waiting.popleft()
                if entering:
                    self._enter(entering, cache)
                    running |= entering
                    yield from self._ended(running, cache)
                if not running:
                    continue
                here = sorted(running)
                self._step(cache, here, [running[slot] for slot in here])
                yield from self._ended(running, cache)
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _enter(self, entering: dict[int, _Sequence], cache: BatchCache) -> None:
        """Reads prompts, and takes the first token after each."""
        begin = time.perf_counter()
        read = {slot: s.known + len(s.ids) for slot, s in entering.items()}
        cache.enter(
            {slot: (read[slot], read[slot] + s.params.max_tokens) for slot, s in entering.items()}
        )
        for slot, sequence in entering.items():
            if sequence.begun is not None:
                cache.take(slot, sequence.begun)
        sequences = list(entering.values())
        logits = self.model.read_each([s.ids for s in sequences], cache, list(entering))
        self.stats.prompt_tokens += sum(len(s.ids) for s in sequences)
        self.stats.prompt_time += time.perf_counter() - begin
        self._choose(sequences, logits)

    def _ended(self, running: dict[int, _Sequence], cache: BatchCache) -> Iterator[Completion]:
        """Takes the sequences that have ended out of `running`."""
        ended = [slot for slot in sorted(running) if running[slot].reason]
        if self._caches and ended:  # the last token has no keys yet
            self.model.step_each([running[slot].tokens[-1] for slot in ended], cache, ended)
        for slot in ended:
            kept = cache.sequence(slot) if self._caches else None
            cache.release(slot)
            yield running.pop(slot).completion(self._logprobs, kept)

    def _step(self, cache: Any, slots: list[int], sequences: list[_Sequence]) -> None:
        """One more token of each sequence."""
        begin = time.perf_counter()
        logits = self.model.step_each([s.tokens[-1] for s in sequences], cache, slots)
        self._choose(sequences, logits)
        self.stats.steps += 1
        self.stats.generation_time += time.perf_counter() - begin

    def _choose(self, sequences: Sequence[_Sequence], logits: np.ndarray) -> None:
        """The next token of each sequence from its logits [n, V]."""

        def choose(sequence: _Sequence, own: np.ndarray) -> tuple[int, float]:
            if self._processors:
                rows = np.array(own, np.float32).reshape(1, -1)
                for process in self._processors:
                    known = np.concatenate((sequence.ids, sequence.tokens)).astype(np.int64)
                    rows = np.asarray(process(known, rows)).reshape(1, -1)
                own = rows[0]
            token = int(np.asarray(sequence.sampler(own)).reshape(-1)[0])
            return token, _logprob(own, token) if self._logprobs else 0.0

        highest = getattr(self.tokenizer, "highest_id", None)
        if highest is not None:  # rows of the output past it are no tokens
            logits = logits[:, : highest + 1]
        slow = self._logprobs or any(s.params.temperature for s in sequences)
        # Functions of the caller draw and count in the order of the sequences.
        own = self._processors or any(s.params.sampler is not None for s in sequences)
        threads = slow and not own and len(sequences) > 1
        chosen = (self._map() if threads else map)(choose, sequences, logits)
        ends = self.tokenizer.eos_token_ids
        for sequence, (token, logprob) in zip(sequences, list(chosen), strict=True):
            sequence.logprobs.append(logprob)
            sequence.add(token, ends)
        self.stats.generation_tokens += len(sequences)

    def _map(self) -> Callable[..., Iterable[tuple[int, float]]]:
        """Maps in as many threads as the core has: NumPy samples without the interpreter's lock."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(int(_core.num_threads()))
        return self._pool.map


def _logprob(logits: np.ndarray, token: int) -> float:
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(wide[token] - top - np.log(np.exp(wide - top).sum()))


def free_memory() -> int | None:
    """Bytes that a process can still get, or None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration, IndexError):
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


@dataclass
class BatchResponse:
    """The answers of `batch_generate`, in the order of the prompts.

    Attributes:
        texts: of each prompt.
        stats: tokens and times of the run.
        caches: None; for mlx-lm's callers.
        token_ids, logprobs: of each prompt the generated tokens, without an end token, and the logs
            of their probabilities; None unless asked for.
        finish_reasons: "stop" or "length".
    """

    texts: list[str]
    stats: BatchStats
    caches: None = None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    finish_reasons: list[str] = field(default_factory=list)


def batch_generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    prompt_caches: None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    batch_size: int = BATCH_SIZE,
    logits_processors: Sequence[Processor] | None = None,
    **sampling: Any,
) -> BatchResponse:
    """Answers to all prompts (texts or token ids), with mlx-lm's arguments.

    `max_tokens` is a number, or one for each prompt. `sampling` holds fields of `SamplingParams`
    for all prompts; `params` takes the place of both. `verbose` prints the progress and the speed.
    ValueError for `prompt_caches` and `return_prompt_caches`, which only mlx-lm has.
    """
    if prompt_caches is not None or return_prompt_caches:
        raise ValueError("prompt_caches and return_prompt_caches are not supported: leave them out")
    if params is not None and sampling:
        raise ValueError(f"params takes the place of {', '.join(sampling)}: give one or the others")
    if params is None:
        common = SamplingParams(**sampling)
        if np.ndim(max_tokens) and len(max_tokens) != len(prompts):  # type: ignore[arg-type]
            raise ValueError(
                f"there are {len(prompts)} prompts, but max_tokens for {len(max_tokens)}"  # type: ignore[arg-type]
            )
        each: Any = max_tokens if np.ndim(max_tokens) else [max_tokens] * len(prompts)
        params = [replace(common, max_tokens=most) for most in each]
    generator = BatchGenerator(
        model,
        tokenizer,
        batch_size,
        logits_processors=logits_processors,
        logprobs=return_logprobs,
    )
    done: list[Any] = [None] * len(prompts)
    for count, completion in enumerate(generator.run(prompts, params), 1):
        done[completion.index] = completion
        if verbose:
            out(f"[batch_generate] Finished processing {count}/{len(prompts)} ...", end="\r")
    stats = generator.stats
    if verbose:
        out(f"[batch_generate] Finished processing {len(prompts)}/{len(prompts)}    ")
        out(
            f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, "
            f"{stats.prompt_tps:.3f} tokens-per-sec"
        )
        out(
            f"[batch_generate] Generation: {stats.generation_tokens} tokens, "
            f"{stats.generation_tps:.3f} tokens-per-sec",
            flush=True,
        )
    ends = tokenizer.eos_token_ids
    kept = [len(c.tokens) - (c.tokens[-1] in ends) for c in done]
    return BatchResponse(
        [c.text for c in done],
        stats,
        None,
        [c.tokens[:n] for c, n in zip(done, kept, strict=True)] if return_token_ids else None,
        [c.logprobs[:n] for c, n in zip(done, kept, strict=True)] if return_logprobs else None,
        [c.finish_reason for c in done],
    )
