"""The tokens after a prompt one by one, by a model alone or with a draft model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pyloss.mlx_lm.arrays import array
from pyloss.mlx_lm.models.cache import make_prompt_cache, read_tokens, trim_prompt_cache
from pyloss.mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler

DEFAULT_QUANTIZED_KV_START = 5000

#: stands for MLX's stream of generation; pyloss has none
generation_stream = None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The logs of the probabilities of a row of logits, float32."""
    row = logits.astype(np.float32)
    row -= row.max()
    return row - np.log(np.exp(row).sum(dtype=np.float32))


def chooser(
    sampler: Sampler | None, processors: Sequence[LogitsProcessor] | None
) -> Callable[[np.ndarray, list[int]], tuple[int, np.ndarray]]:
    """A function from logits [V] and all tokens so far to the next token and all logs [V].

    `processors` get the tokens and the logits [1, V], and `sampler` the logs [1, V].
    """

    def choose(logits: np.ndarray, tokens: list[int]) -> tuple[int, np.ndarray]:
        for process in processors or ():
            logits = np.asarray(process(array(np.array(tokens)), array(logits[None])))[0]
        logprobs = log_softmax(logits)
        if sampler is None or sampler is greedy_sampler:
            return int(logprobs.argmax()), logprobs
        return int(np.asarray(sampler(array(logprobs[None]))).reshape(-1)[0]), logprobs

    return choose


def maybe_quantize_kv_cache(
    prompt_cache: Any, quantized_kv_start: int, kv_group_size: int, kv_bits: int | None
) -> None:
    """Does nothing for `kv_bits` None. ValueError else: keys and values stay float32."""
    if kv_bits is not None:
        raise ValueError(
            f"kv_bits is {kv_bits}, and keys and values stay float32: leave it out, "
            "and bound their memory by max_kv_size"
        )


def generate_step(
    prompt: Any,
    model: Any,
    stream: Any = generation_stream,
    *,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    max_kv_size: int | None = None,
    prompt_cache: Any = None,
    prefill_step_size: int = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: Any = None,
) -> Iterator[tuple[int, Any]]:
    """Yield the tokens after a prompt, each with the logs of all probabilities [V].

    `sampler` gets the logs of the probabilities [1, V]; `logits_processors` get all tokens so far
    and the logits [1, V]. A given `prompt_cache` is continued, and holds every yielded token; a new
    one keeps at most `max_kv_size` tokens. `prompt_progress_callback` gets the tokens read so far,
    and those of the prompt. `max_tokens` -1 has no end.

    Raises ValueError for an empty prompt, and for `input_embeddings` and `kv_bits`.
    """
    if input_embeddings is not None:
        raise ValueError("Model does not support input embeddings.")
    maybe_quantize_kv_cache(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    ids = np.asarray(prompt).reshape(-1).astype(np.int32)
    if not len(ids):
        raise ValueError("Either input_embeddings or prompt (or both) must be provided.")
    given = prompt_cache is not None
    cache = prompt_cache if given else make_prompt_cache(model, max_kv_size)
    told = prompt_progress_callback or (lambda done, total: None)
    known: list[int] = ids.tolist()

    choose = chooser(sampler, logits_processors)

    def step(tokens: np.ndarray) -> tuple[int, Any]:
        logits = read_tokens(model, tokens[None], cache, last=True)[0, -1]
        token, logprobs = choose(logits, known)
        known.append(token)
        return token, array(logprobs)

    done, last = 0, len(ids) - 1
    told(0, len(ids))
    while done < last:
        part = ids[done : min(done + prefill_step_size, last)]
        read_tokens(model, part[None], cache, last=True)
        done += len(part)
        told(done, len(ids))
    token, logprobs = step(ids[done:])
    told(len(ids), len(ids))
    count = 0
    while count != max_tokens:
        ahead = step(np.array([token], np.int32)) if given else None
        yield token, logprobs
        count += 1
        if count == max_tokens:
            return
        token, logprobs = ahead or step(np.array([token], np.int32))


def speculative_generate_step(
    prompt: Any,
    model: Any,
    draft_model: Any,
    stream: Any = generation_stream,
    *,
    num_draft_tokens: int = 2,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    prompt_cache: Any = None,
    prefill_step_size: int = 512,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START,
) -> Iterator[tuple[int, Any, bool]]:
    """Yield the tokens after a prompt as `generate_step`, and whether `draft_model` proposed them.

    The draft model proposes `num_draft_tokens` at a time, and the model reads them together; those
    that it would not have chosen are dropped. A given `prompt_cache` has the objects of the model's
    layers and then of the draft model's.
    """
    maybe_quantize_kv_cache(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
    models = model, draft_model
    if prompt_cache is None:
        caches = [make_prompt_cache(own) for own in models]
    else:
        caches = [prompt_cache[: len(models[0].layers)], prompt_cache[len(models[0].layers) :]]
    ids = np.asarray(prompt).reshape(-1).astype(np.int32)
    known: list[int] = ids.tolist()

    choose = chooser(sampler, logits_processors)

    for own, cache in zip(models, caches, strict=True):
        for begin in range(0, len(ids) - 1, prefill_step_size):
            part = ids[begin : min(begin + prefill_step_size, len(ids) - 1)]
            read_tokens(own, part[None], cache, last=True)
    unread = [[int(ids[-1])], [int(ids[-1])]]
    count = 0
    while count != max_tokens:
        left = num_draft_tokens if max_tokens < 0 else min(max_tokens - count, num_draft_tokens)
        proposed: list[int] = []
        feed = unread[1]
        for _ in range(left):
            logits = read_tokens(models[1], np.array([feed], np.int32), caches[1], last=True)
            token, _ = choose(logits[0, -1], known + proposed)
            proposed.append(token)
            feed = [token]
        wanted = np.array([unread[0] + proposed], np.int32)
        logits = read_tokens(models[0], wanted, caches[0])[0]
        accepted = 0
        found: list[tuple[int, np.ndarray]] = []
        for i in range(len(proposed) + 1):
            at = len(unread[0]) - 1 + i
            found.append(choose(logits[at], known + proposed[:i]))
            if i == len(proposed) or found[-1][0] != proposed[i]:
                break
            accepted += 1
        trim_prompt_cache(caches[0], len(proposed) - accepted)
        trim_prompt_cache(caches[1], max(len(proposed) - accepted - 1, 0))
        token = found[-1][0]
        known += [*proposed[:accepted], token]
        unread = [[token], [*(proposed[-1:] if accepted == len(proposed) else []), token]]
        for i, (chosen, logprobs) in enumerate(found):
            yield chosen, array(logprobs), i < accepted
            count += 1
            if count == max_tokens:
                return
