"""Ollama's Modelfile: what `ollama create` makes a model of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyloss.models.text.go_template import go_template

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

#: num_ctx at most: Ollama reserves memory for the whole context.
MOST_CONTEXT = 8192


def modelfile(file: str, tokenizer: Tokenizer, config: Any, system: str | None = None) -> str:
    """The text of a Modelfile.

    Args:
        file: the GGUF file's name beside it.
        config: the model's, for its context.
        system: the system prompt that is used unless a request has one.

    Raises ValueError for a chat template that Ollama's language does not express.
    """
    stops = [tokenizer.decode([id]) for id in sorted(tokenizer.eos_token_ids)]
    lines = [
        f"FROM ./{file}",
        f"TEMPLATE {_quoted(go_template(tokenizer))}",
        *([] if system is None else [f"SYSTEM {_quoted(system)}"]),
        *(f"PARAMETER stop {_quoted(text)}" for text in stops if text),
        f"PARAMETER num_ctx {min(config.max_position_embeddings, MOST_CONTEXT)}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A value with quotes; those of three signs may hold lines and single quotes."""
    if '"""' in text or text.endswith('"'):
        raise ValueError(f"a Modelfile cannot hold three quotation marks in a row: {text!r:.80}")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
