"""Answers to many prompts of token ids, with mlx-lm's arguments."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.generation.batch import BatchGenerator, BatchStats
from pyloss.generation.sampling import SamplingParams
from pyloss.io.console import out
from pyloss.mlx_lm.arrays import array
from pyloss.mlx_lm.models.cache import make_prompt_cache
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
    time. With `prompt_caches` or `return_prompt_caches` the prompts are answered one by one; given
    caches are not changed. `logprobs` are those of the chosen tokens.
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
    if prompt_caches is not None or return_prompt_caches or most is not None:
        options = {"sampler": sampler, "logits_processors": processors, "max_kv_size": most}
        found = _one_by_one(model, tokenizer, prompts, prompt_caches, limits, options)
    else:
        found = _together(model, tokenizer, prompts, limits, size, sampler, processors)
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
    limits: list[int],
    size: int,
    sampler: Sampler | None,
    processors: Sequence[LogitsProcessor] | None,
) -> BatchResponse:
    def choose(logits: np.ndarray) -> Any:
        assert sampler is not None
        return sampler(array(log_softmax(logits)[None]))

    greedy = sampler is None or sampler is greedy_sampler
    shown = [
        lambda tokens, logits, process=process: np.asarray(process(array(tokens), array(logits)))
        for process in processors or ()
    ]
    generator = BatchGenerator(
        model,
        tokenizer,
        size,
        logits_processors=shown,
        logprobs=True,
    )
    params = [
        SamplingParams(max_tokens=most, sampler=None if greedy else choose) for most in limits
    ]
    given = [list(map(int, np.asarray(prompt))) for prompt in prompts]
    done = sorted(generator.run(given, params), key=lambda c: c.index) if given else []
    ids, logs = [], []
    for c in done:
        kept = len(c.tokens) - (c.finish_reason == "stop")
        ids.append(c.tokens[:kept])
        logs.append((c.logprobs or [])[:kept])
    return BatchResponse([], generator.stats, None, ids, logs)


def _one_by_one(
    model: Any, tokenizer: Any, prompts: Any, caches: Any, limits: list[int], options: Any
) -> BatchResponse:
    stats = BatchStats()
    ids: list[list[int]] = []
    logs: list[list[float]] = []
    kept = []
    for i, prompt in enumerate(prompts):
        cache = make_prompt_cache(model, options["max_kv_size"])
        if caches is not None and caches[i] is not None:
            cache = copy.deepcopy(caches[i])
        chosen: list[int] = []
        logprobs: list[float] = []
        begun = time.perf_counter()
        steps = generate_step(
            prompt,
            model,
            max_tokens=limits[i],
            prompt_cache=cache,
            sampler=options["sampler"],
            logits_processors=options["logits_processors"],
        )
        for token, logs_of in steps:
            if not chosen:
                stats.prompt_time += time.perf_counter() - begun
            stats.generation_tokens += 1
            if token in tokenizer.eos_token_ids:
                break
            chosen.append(token)
            logprobs.append(float(np.asarray(logs_of)[token]))
        stats.prompt_tokens += int(np.size(prompt))
        stats.generation_time += time.perf_counter() - begun
        ids.append(chosen)
        logs.append(logprobs)
        kept.append(cache)
    return BatchResponse([], stats, kept, ids, logs)
