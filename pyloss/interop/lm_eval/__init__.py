"""pyloss as a model of EleutherAI's lm-eval (0.4.10 and later), under the name `pyloss`.

lm-eval finds only models that are imported. Its command line with this one is

    python -m pyloss.interop.lm_eval run --model pyloss --model_args pretrained=PATH --tasks NAME

and from Python, `import pyloss.interop.lm_eval` precedes `lm_eval.simple_evaluate(model="pyloss",
model_args={"pretrained": PATH}, ...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        'this adapter needs the package lm-eval: pip install "pyloss[lm-eval]"'
    ) from error
from tqdm.auto import tqdm

from pyloss.evaluation.likelihood import score_targets
from pyloss.generation import BatchGenerator, SamplingParams
from pyloss.loading import load
from pyloss.models.text.special import encode_text
from pyloss.runtime.device import to_device
from pyloss.tuner.data.targets import Sample

#: requests whose tokens are packed and scored together
_AT_ONCE = 64
#: of `generate_until`, for batch_size "auto" and for tasks that do not say how many tokens
_BATCH_SIZE, _MAX_TOKENS = 16, 256
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("pyloss")
class PylossLM(TemplateLM):  # type: ignore[misc]
    """A model of pyloss, with or without an adapter.

    Log-probabilities are computed in float32, and summed in float64.

    Args:
        pretrained: a model's folder, a GGUF file, or a known name.
        adapter_path: folder or file of an adapter.
        batch_size: answers that are generated at once; "auto" is 16. Results do not depend on it.
        max_batch_size: without effect.
        device: "opencl:<number>"; other names, such as the command line's default "cuda:0", mean
            the processor.
        max_length: tokens that the model reads at most; earlier ones are left out. Default: the
            model's `max_position_embeddings`.
        max_gen_toks: tokens of an answer for tasks that do not say how many.
        add_bos_token: begin texts with the tokenizer's special tokens. Default: as the tokenizer
            does it.
    """

    def __init__(
        self,
        pretrained: str,
        adapter_path: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_TOKENS,
        add_bos_token: bool | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer = load(pretrained, adapter_path=adapter_path)
        self.model.eval()
        if str(device).startswith("opencl"):
            to_device(self.model, device)
        auto = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = _BATCH_SIZE if auto else int(str(batch_size))
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self.max_gen_toks, self.add_bos_token = int(max_gen_toks), add_bos_token
        self._name = str(pretrained)

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """The token before a text without context: the first special token, else the end token."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            if self.add_bos_token is None:
                return encode_text(self.tokenizer, string)
            first = self.tokenizer.bos_token
            add_special_tokens = self.add_bos_token and not (first and string.startswith(first))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt its last message stays open."""
        text = str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
        if add_generation_prompt:
            return text
        content = chat_history[-1]["content"].strip()
        return text[: text.rindex(content) + len(content)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for begin in range(0, len(requests), _AT_ONCE):
                part = requests[begin : begin + _AT_ONCE]
                samples = [self._sample(context, text) for _, context, text in part]
                for request, scores in zip(part, score_targets(self.model, samples), strict=True):
                    answer = -float(scores.losses.sum(dtype=float)), bool(scores.greedy.all())
                    found.append(answer)
                    if request[0] is not None:
                        self.cache_hook.add_partial("loglikelihood", request[0], answer)
                bar.update(len(part))
        return found

    def _sample(self, context: list[int], continuation: list[int]) -> Sample:
        """Both, the continuation as targets, without the earliest tokens if they are too many."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, and max_length is "
                f"{self.max_length}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Sample.from_spans(tokens, [(len(tokens) - len(continuation), len(tokens))])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            found.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        given = [request.args for request in requests]
        params = [self._params(options) for _, options in given]
        prompts = []
        for (context, _), own in zip(given, params, strict=True):
            room = self.max_length - own.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {own.max_tokens}; it must be below max_length, "
                    f"{self.max_length}"
                )
            prompts.append(self.tok_encode(context)[-room:])
        answers = [""] * len(given)
        generator = BatchGenerator(self.model, self.tokenizer, self.batch_size)
        with tqdm(total=len(given), desc="generate_until", disable=disable_tqdm) as bar:
            for done in generator.run(prompts, params):
                answers[done.index] = done.text
                self.cache_hook.add_partial("generate_until", given[done.index], done.text)
                bar.update()
        return answers

    def _params(self, options: Mapping[str, Any]) -> SamplingParams:
        """The sampling of a request: greedy, unless it asks for a temperature."""
        rest = dict(options)
        limits = [rest.pop(name, None) for name in _TOKEN_LIMITS]
        most = next((limit for limit in limits if limit is not None), self.max_gen_toks)
        temperature = float(rest.pop("temperature", None) or 0.0)
        if not rest.pop("do_sample", temperature > 0):
            temperature = 0.0
        sampling = {name: rest.pop(name) for name in ("top_p", "min_p", "top_k") if name in rest}
        stop = tuple(_texts(rest.pop("until", None)))
        if rest:
            raise ValueError(
                f"generation options {', '.join(map(repr, rest))} are not supported; "
                f"known are until, do_sample, temperature, top_p, min_p, top_k and max_gen_toks"
            )
        return SamplingParams(
            max_tokens=int(most),
            temperature=temperature,
            stop=stop,
            **(sampling if temperature else {}),
        )


def _texts(until: Any) -> Iterator[str]:
    yield from filter(None, [until] if isinstance(until, str) else until or ())
