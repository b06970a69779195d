"""Ollama's Modelfile: what `ollama create` makes a model of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pyloss.checks.numbers import real
from pyloss.models.text.go_template import go_template

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

#: Ollama's parameters of sampling, by their names in generation_config.json.
SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
#: num_ctx at most: Ollama reserves memory for the whole context.
MOST_CONTEXT = 8192


def modelfile(file: str, tokenizer: Tokenizer, config: Any, system: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        file: the GGUF file's name beside it.
        config: the model's, for its context.
        system: the system prompt that is used unless a request has one.

    Sampling is as generation_config.json of the model's folder says, if it does.

    Raises ValueError for a chat template that Ollama's language does not express, and for values of
    sampling that are no numbers.
    """
    stops = [tokenizer.decode([id]) for id in sorted(tokenizer.eos_token_ids)]
    lines = [
        f"FROM ./{file}",
        f"TEMPLATE {_quoted(go_template(tokenizer))}",
        *([] if system is None else [f"SYSTEM {_quoted(system)}"]),
        *(f"PARAMETER stop {_quoted(text)}" for text in stops if text),
        *(f"PARAMETER {name} {value}" for name, value in _sampling(tokenizer.generation_config)),
        f"PARAMETER num_ctx {min(config.max_position_embeddings, MOST_CONTEXT)}",
    ]
    return "\n".join(lines) + "\n"


def _sampling(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Ollama's names and values. Greedy generation (`do_sample` false) is temperature 0."""
    if config.get("do_sample") is False:
        yield "temperature", "0"
        return
    for name, theirs in SAMPLING.items():
        if config.get(name) is not None:
            value = real(config[name], f"generation_config.json: {name}", 0)
            yield theirs, f"{value:g}"


def _quoted(text: str) -> str:
    """A value with quotes; those of three signs may hold lines and single quotes."""
    if '"""' in text or text.endswith('"'):
        raise ValueError(f"a Modelfile cannot hold three quotation marks in a row: {text!r:.80}")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
