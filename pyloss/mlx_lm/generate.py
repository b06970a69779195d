"""mlx_lm.generate: answers as text, and the command; `steps.py` and `batching.py` make them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyloss.checks.numbers import real, whole
from pyloss.io.console import out
from pyloss.mlx_lm.arrays import mx
from pyloss.mlx_lm.batching import BatchResponse, batch_generate
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.models.cache import load_prompt_cache
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.sample_utils import make_sampler
from pyloss.mlx_lm.steps import (
    DEFAULT_QUANTIZED_KV_START,
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
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
DEFAULT_PREFILL_STEP_SIZE = 2048


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
    limit). Raises ValueError for `max_tokens` of 0 or below -1.
    """
    if max_tokens == 0:
        raise ValueError("Maximum number of tokens must be non-zero (use -1 for no limit).")
    whole(max_tokens, "max_tokens", -1)
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
    whole(args.max_tokens, "--max-tokens", -1)
    real(args.temp, "--temp", 0)
    for name in ("top_p", "min_p", "xtc_probability"):
        real(getattr(args, name), f"--{name.replace('_', '-')}", 0, 1)
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
