"""mlx_lm.generate: generation with prompt caches, samplers and processors of mlx-lm's interface."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.generation.batch import BatchGenerator as OwnGenerator
from pyloss.generation.sampling import SamplingParams
from pyloss.io.console import out
from pyloss.mlx_lm.arrays import array, mx
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    read_tokens,
    trim_prompt_cache,
)
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler, make_sampler
from pyloss.mlx_lm.tokenizer_utils import TokenizerWrapper
from pyloss.mlx_lm.utils import load
from pyloss.models.text.special import encode_text
from pyloss.runtime.memory import peak_memory

__all__ = [
    "BatchResponse",
    "GenerationResponse",
    "batch_generate",
    "generate",
    "generate_step",
    "main",
    "maybe_quantize_kv_cache",
    "setup_arg_parser",
    "speculative_generate_step",
    "str2bool",
    "stream_generate",
    "wired_limit",
]

__getattr__ = absent(__name__)

DEFAULT_PROMPT = "hello"
DEFAULT_MAX_TOKENS = 100
DEFAULT_TEMP = 0.0
DEFAULT_TOP_P = 1.0
DEFAULT_MIN_P = 0.0
DEFAULT_TOP_K = 0
DEFAULT_XTC_PROBABILITY = 0.0
DEFAULT_XTC_THRESHOLD = 0.1
DEFAULT_MIN_TOKENS_TO_KEEP = 1
DEFAULT_SEED = None
DEFAULT_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"
DEFAULT_QUANTIZED_KV_START = 5000
DEFAULT_PREFILL_STEP_SIZE = 2048

#: stands for MLX's stream of generation; pyloss has none
generation_stream = None


@dataclass
class GenerationResponse:
    """A generated token, with mlx-lm's fields.

    Attributes:
        text: the text that it completes.
        token: its id.
        logprobs: the logs of all tokens' probabilities [V].
        from_draft: whether the draft model proposed it.
        prompt_tokens, generation_tokens: how many there are so far.
        prompt_tps, generation_tps: their tokens per second.
        peak_memory: of the process, in GB.
        finish_reason: "length", "stop" or None.
    """

    text: str
    token: int
    logprobs: Any
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


def str2bool(string: str) -> bool:
    """False for "false" and "f", in any case."""
    return string.lower() not in ["false", "f"]


@contextlib.contextmanager
def wired_limit(model: Any, streams: Any = None) -> Iterator[None]:
    """Does nothing: there is no such limit."""
    yield


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

    def step(tokens: np.ndarray) -> tuple[int, Any]:
        logits = read_tokens(model, tokens[None], cache, last=True)[:, -1]
        for process in logits_processors or ():
            logits = np.asarray(process(array(np.array(known)), array(logits)))
        row = logits.astype(np.float32)
        top = row.max()
        logprobs = row - (top + np.log(np.exp(row - top).sum(dtype=np.float32)))
        if sampler is None or sampler is greedy_sampler:
            token = int(logprobs.argmax())
        else:
            token = int(np.asarray(sampler(array(logprobs))).reshape(-1)[0])
        known.append(token)
        return token, array(logprobs[0])

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

    def choose(logits: np.ndarray, tokens: list[int]) -> tuple[int, np.ndarray]:
        row: Any = logits[None]
        for process in logits_processors or ():
            row = np.asarray(process(array(np.array(tokens)), array(row)))
        row = row.astype(np.float32)
        top = row.max()
        logprobs = row - (top + np.log(np.exp(row - top).sum(dtype=np.float32)))
        chosen = (sampler or greedy_sampler)(array(logprobs))
        return int(np.asarray(chosen).reshape(-1)[0]), logprobs[0]

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


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    max_tokens: int = 256,
    draft_model: Any = None,
    stream: Any = generation_stream,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Generate after a text or token ids, yielding each piece of text as it comes.

    `kwargs` are those of `generate_step`, with `draft_model` of `speculative_generate_step`.
    Ends with an end token, whose text is not part of the answer, or after `max_tokens` (-1: no
    limit). Raises ValueError for 0 `max_tokens`.
    """
    if max_tokens == 0:
        raise ValueError("Maximum number of tokens must be non-zero (use -1 for no limit).")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    ids = encode_text(tokenizer, prompt) if isinstance(prompt, str) else np.asarray(prompt)
    count = int(np.size(ids))
    detokenizer = tokenizer.detokenizer
    kwargs["max_tokens"] = max_tokens
    if draft_model is None:
        kwargs.pop("num_draft_tokens", None)
        tokens: Any = ((*pair, False) for pair in generate_step(ids, model, stream, **kwargs))
    else:
        for name in ("max_kv_size", "prompt_progress_callback"):
            kwargs.pop(name, None)
        if kwargs.pop("input_embeddings", None) is not None:
            raise ValueError("Speculative decoding does not support input embeddings.")
        tokens = speculative_generate_step(ids, model, draft_model, stream, **kwargs)
    begun = time.perf_counter()
    prompt_speed = 0.0

    def response(reason: str | None) -> GenerationResponse:
        return GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=from_draft,
            prompt_tokens=count,
            prompt_tps=prompt_speed,
            generation_tokens=n + 1,
            generation_tps=(n + 1) / max(time.perf_counter() - begun, 1e-9),
            peak_memory=peak_memory() / 1e9,
            finish_reason=reason,
        )

    for n, (token, logprobs, from_draft) in enumerate(tokens):  # noqa: B007 - read by response()
        if n == 0:
            prompt_speed = count / max(time.perf_counter() - begun, 1e-9)
            begun = time.perf_counter()
        if token in tokenizer.eos_token_ids:
            break
        detokenizer.add_token(token)
        if n + 1 == max_tokens:
            break
        yield response(None)
    detokenizer.finalize()
    yield response("stop" if token in tokenizer.eos_token_ids else "length")


def generate(model: Any, tokenizer: Any, prompt: Any, verbose: bool = False, **kwargs: Any) -> str:
    """The whole answer of `stream_generate`; `verbose` prints it as it comes, and the speed."""
    if verbose:
        out("=" * 10)
    texts = []
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        texts.append(response.text)
        if verbose:
            out(response.text, end="", flush=True, foreign=True)
    if verbose:
        out("\n" + "=" * 10)
        out(
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {response.peak_memory:.3f} GB",
            flush=True,
        )
    return "".join(texts)


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
        row = logits.astype(np.float32)
        top = row.max()
        return sampler(array((row - (top + np.log(np.exp(row - top).sum())))[None]))

    greedy = sampler is None or sampler is greedy_sampler
    shown = [
        lambda tokens, logits, process=process: np.asarray(process(array(tokens), array(logits)))
        for process in processors or ()
    ]
    generator = OwnGenerator(
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
    import copy

    from pyloss.generation.batch import BatchStats

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


def setup_arg_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.generate's flags."""
    parser = argparse.ArgumentParser(description="LLM inference script")
    add = parser.add_argument
    add("--model", type=str, default=None, help=f"the model (default {DEFAULT_MODEL})")
    add("--trust-remote-code", action="store_true", help="no effect: no model's code is run")
    add("--adapter-path", type=str, help="folder of an adapter")
    add("--extra-eos-token", type=str, default=(), nargs="+", help="more tokens that end answers")
    add("--system-prompt", default=None, help="system prompt of the chat template")
    add("--prompt", "-p", default=DEFAULT_PROMPT, help="the message; - reads standard input")
    add("--image", type=str, default=(), nargs="+", help="not supported")
    add("--prefill-response", default=None, help="the beginning of the answer")
    add("--max-tokens", "-m", type=int, default=DEFAULT_MAX_TOKENS, help="most tokens")
    add("--temp", type=float, default=DEFAULT_TEMP, help="sampling temperature")
    add("--top-p", type=float, default=DEFAULT_TOP_P, help="sampling top-p")
    add("--min-p", type=float, default=DEFAULT_MIN_P, help="sampling min-p")
    add("--top-k", type=int, default=DEFAULT_TOP_K, help="sampling top-k")
    chance, bound = DEFAULT_XTC_PROBABILITY, DEFAULT_XTC_THRESHOLD
    add("--xtc-probability", type=float, default=chance, help="probability of XTC sampling")
    add("--xtc-threshold", type=float, default=bound, help="threshold of XTC sampling")
    least = DEFAULT_MIN_TOKENS_TO_KEEP
    add("--min-tokens-to-keep", type=int, default=least, help="tokens that min-p keeps at least")
    add("--seed", type=int, default=DEFAULT_SEED, help="seed of the random numbers")
    add("--ignore-chat-template", action="store_true", help="the prompt is the model's input")
    add("--use-default-chat-template", action="store_true", help="no effect")
    add("--chat-template-config", default=None, help="variables of the template, as JSON")
    add("--verbose", type=str2bool, default=True, help="F: print the answer alone")
    add("--max-kv-size", type=int, default=None, help="most tokens in the cache")
    size = DEFAULT_PREFILL_STEP_SIZE
    add("--prefill-step-size", type=int, default=size, help="tokens of a prompt at a time")
    add("--prompt-cache-file", type=str, default=None, help="file of save_prompt_cache")
    add("--quantize-activations", "-qa", action="store_true", help="not supported")
    add("--kv-bits", type=int, default=None, help="not supported")
    add("--kv-group-size", type=int, default=64, help="not supported")
    start = DEFAULT_QUANTIZED_KV_START
    add("--quantized-kv-start", type=int, default=start, help="not supported")
    add("--draft-model", type=str, default=None, help="model that proposes tokens")
    add("--num-draft-tokens", type=int, default=3, help="tokens to propose at a time")
    return parser


def main() -> None:
    """The command `python -m pyloss.mlx_lm.generate`."""
    args = setup_arg_parser().parse_args()
    if args.image or args.quantize_activations:
        given = "--image" if args.image else "--quantize-activations"
        raise ValueError(f"{given} is not supported: leave it out")
    if args.seed is not None:
        mx.random.seed(args.seed)
    cache, metadata = None, {}
    if args.prompt_cache_file is not None:
        cache, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    name = args.model or metadata.get("model") or DEFAULT_MODEL
    if metadata.get("model", name) != name:
        raise ValueError(
            f"Providing a different model ({name}) than that used to create the prompt cache "
            f"({metadata['model']}) is an error."
        )
    settings = json.loads(metadata.get("tokenizer_config", "{}"))
    settings["trust_remote_code"] = args.trust_remote_code
    model, tokenizer = load(name, adapter_path=args.adapter_path, tokenizer_config=settings)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    prompt = _prompt_of(args, tokenizer, cache is not None)
    draft = None
    if args.draft_model is not None:
        draft, draft_tokenizer = load(args.draft_model)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError("Draft model tokenizer does not match model tokenizer.")
    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=special,
    )
    response = generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        verbose=args.verbose,
        sampler=sampler,
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        prompt_cache=cache,
        kv_bits=args.kv_bits,
        draft_model=draft,
        num_draft_tokens=args.num_draft_tokens,
    )
    if not args.verbose:
        out(response, foreign=True)


def _prompt_of(args: argparse.Namespace, tokenizer: TokenizerWrapper, cached: bool) -> list[int]:
    """The token ids of the command's prompt; what follows those of a cached prefix."""
    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    variables = json.loads(args.chat_template_config or "{}")
    messages = (
        [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    )
    messages.append({"role": "user", "content": prompt})
    begun = args.prefill_response is not None
    if begun:
        messages.append({"role": "assistant", "content": args.prefill_response})
    options = {"continue_final_message": begun, "add_generation_prompt": not begun}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options, **variables)
    if cached:
        messages[-1] = {**messages[-1], "content": "<query>"}
        probe = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        text = text[probe.index("<query>") :]
    return list(tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    as_command(main)
