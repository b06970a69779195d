"""Answers to many prompts of token ids, with mlx-lm's arguments."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.generation.batch import BatchGenerator, BatchStats
from pyloss.generation.sampling import SamplingParams
from pyloss.io.console import out
from pyloss.mlx_lm.arrays import array
from pyloss.mlx_lm.models.cache import (
    RotatingKVCache,
    cache_of,
    make_prompt_cache,
    own_cache,
)
from pyloss.mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler
from pyloss.mlx_lm.steps import generate_step, log_softmax
from pyloss.runtime.memory import peak_memory


@dataclass
class BatchResponse:
    """The answers of `batch_generate`, in the order of the prompts.

    Attributes:
        texts: of each prompt.
        stats: tokens and times of the run.
        caches: of each prompt, if asked for.
        token_ids, logprobs: of each prompt the generated tokens, and the logs of their
            probabilities, if asked for.
    """

    texts: list[str]
    stats: Any
    caches: list[list[Any]] | None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None


#: options of mlx-lm's BatchGenerator that change only how the work is cut
_SIZES = ("prefill_batch_size", "prefill_step_size", "stream")


def batch_generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | list[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    **kwargs: Any,
) -> BatchResponse:
    """Answers to prompts of token ids, many at a time.

    `kwargs`: `sampler` and `logits_processors` for all, `completion_batch_size` sequences at a
    time. Given caches do not change, and prompts may share one; returned ones hold all generated
    tokens. With `max_kv_size` or a RotatingKVCache the prompts are answered one by one. `logprobs`
    are those of the chosen tokens.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but max_tokens for {len(limits)}")
    sampler, processors = kwargs.pop("sampler", None), kwargs.pop("logits_processors", None)
    size, most = kwargs.pop("completion_batch_size", 32), kwargs.pop("max_kv_size", None)
    for name in _SIZES:
        kwargs.pop(name, None)
    if kwargs:
        raise TypeError(
            f"batch_generate has no option {next(iter(kwargs))!r}; known are sampler, "
            f"logits_processors, completion_batch_size, max_kv_size, {', '.join(_SIZES)}"
        )
    begun = [None] * len(prompts) if prompt_caches is None else list(prompt_caches)
    if len(begun) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but prompt_caches for {len(begun)}")
    options: dict[str, Any] = {"sampler": sampler, "logits_processors": processors}
    if most is not None or any(
        isinstance(layer, RotatingKVCache) for c in begun for layer in c or ()
    ):
        found = _one_by_one(model, tokenizer, prompts, begun, limits, most, **options)
    else:
        options |= {"caches": return_prompt_caches, "logprobs": return_logprobs}
        found = _together(model, tokenizer, prompts, begun, limits, size, **options)
    found.texts = [tokenizer.decode(ids) for ids in found.token_ids or ()]
    if verbose:
        stats = found.stats
        out(
            f"[batch_generate] Finished processing {len(prompts)}/{len(prompts)}\n"
            f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, "
            f"{stats.prompt_tps:.3f} tokens-per-sec\n"
            f"[batch_generate] Generation: {stats.generation_tokens} tokens, "
            f"{stats.generation_tps:.3f} tokens-per-sec\n"
            f"[batch_generate] Peak memory: {peak_memory() / 1e9:.3f} GB",
            flush=True,
        )
    if not return_prompt_caches:
        found.caches = None
    if not return_token_ids:
        found.token_ids = None
    if not return_logprobs:
        found.logprobs = None
    return found


def _together(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    begun: list[Any],
    limits: list[int],
    size: int,
    sampler: Sampler | None,
    logits_processors: list[LogitsProcessor] | None,
    **kept: Any,
) -> BatchResponse:
    def choose(logits: np.ndarray) -> Any:
        assert sampler is not None
        return sampler(array(log_softmax(logits)[None]))

    greedy = sampler is None or sampler is greedy_sampler
    shown = [
        lambda tokens, logits, process=process: np.asarray(process(array(tokens), array(logits)))
        for process in logits_processors or ()
    ]
    generator = BatchGenerator(model, tokenizer, size, logits_processors=shown, **kept)
    params = [
        SamplingParams(max_tokens=most, sampler=None if greedy else choose) for most in limits
    ]
    given = [list(map(int, np.asarray(prompt))) for prompt in prompts]
    own = [None if cache is None else own_cache(model, cache) for cache in begun]
    done = sorted(generator.run(given, params, own), key=lambda c: c.index) if given else []
    ids, logs = [], []
    caches: Any = []
    for c in done:
        count = len(c.tokens) - (c.finish_reason == "stop")
        ids.append(c.tokens[:count])
        logs.append((c.logprobs or [])[:count])
        caches.append(None if c.cache is None else cache_of(model, c.cache))
    return BatchResponse([], generator.stats, caches, ids, logs)


def _one_by_one(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    begun: list[Any],
    limits: list[int],
    max_kv_size: int | None,
    sampler: Sampler | None,
    logits_processors: list[LogitsProcessor] | None,
) -> BatchResponse:
    stats = BatchStats()
    ids: list[list[int]] = []
    logs: list[list[float]] = []
    kept = []
    for i, prompt in enumerate(prompts):
        given = begun[i]
        cache = make_prompt_cache(model, max_kv_size) if given is None else copy.deepcopy(given)
        chosen: list[int] = []
        logprobs: list[float] = []
        start = time.perf_counter()
        steps = generate_step(
            prompt,
            model,
            max_tokens=limits[i],
            prompt_cache=cache,
            sampler=sampler,
            logits_processors=logits_processors,
        )
        for token, logs_of in steps:
            if not chosen:
                stats.prompt_time += time.perf_counter() - start
            stats.generation_tokens += 1
            if token in tokenizer.eos_token_ids:
                break
            chosen.append(token)
            logprobs.append(float(np.asarray(logs_of)[token]))
        stats.prompt_tokens += int(np.size(prompt))
        stats.generation_time += time.perf_counter() - start
        ids.append(chosen)
        logs.append(logprobs)
        kept.append(cache)
    return BatchResponse([], stats, kept, ids, logs)
