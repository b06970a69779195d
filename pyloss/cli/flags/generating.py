"""Flags of `pyloss generate` and `pyloss chat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyloss.cli.parser import (
    OVERWRITE,
    command,
    device_flag,
    distributed_flag,
    ignored_flag,
    model_flags,
    precision_flag,
    real,
    truth,
    whole,
)


def generate_parser(commands: Any) -> None:
    parser = command(
        commands,
        "generate",
        text="answer a prompt, or all prompts of a file",
        description="Generate text from a model, with or without an adapter.",
        epilog="""examples:
  pyloss generate --prompt "What is a tensor?"
  pyloss generate --adapter-path adapters --prompt "turn off the lamp in the hall"
                              uses the system prompt that the adapter was trained with, if any
  pyloss generate --prompts test.jsonl --output answers.jsonl --max-tokens 50
  echo "Hello" | pyloss generate --prompt - --temp 0.7 --seed 1""",
    )
    add = parser.add_argument
    _answering_flags(parser)
    distributed_flag(parser)
    add(
        "--prompt",
        "-p",
        help="the user's message; - reads it from standard input (default: hello)",
    )
    add(
        "--prompts",
        metavar="FILE",
        help='JSONL file of {"prompt": ...} or {"messages": [...]}, all answered into --output; '
        "a line may set max_tokens, temperature, top_p, min_p, top_k, seed and stop",
    )
    add(
        "--output",
        metavar="FILE",
        help="JSONL file for the lines of --prompts with their completion, finish_reason, "
        "prompt_tokens and completion_tokens; written when all are answered",
    )
    add("--overwrite", action="store_true", help=OVERWRITE)
    add(
        "--batch-size",
        type=whole,
        default=16,
        metavar="N",
        help="prompts of --prompts that are answered at a time (default: 16)",
    )
    prompt_flags(add)
    add("--prefill-response", help="text that the answer begins with")
    sampling_flags(add, 100)
    add("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    ignored_flag(add)


def chat_parser(commands: Any) -> None:
    parser = command(
        commands,
        "chat",
        text="talk to a model",
        description="""Talk to a model, with or without an adapter, through its chat template.
/help lists commands, such as /base, which switches the adapter off and on.
Ctrl-C ends an answer, Ctrl-D the program.""",
        epilog="""examples:
  pyloss chat --model smollm2-135m
  pyloss chat --adapter-path adapters --temp 0.7 --seed 1
  echo "turn off the lamp in the hall" | pyloss chat --adapter-path adapters
                              a script's lines: each is a message, answers go to standard output""",
    )
    add = parser.add_argument
    _answering_flags(parser)
    prompt_flags(add)
    sampling_flags(add, 512)
    ignored_flag(add)


def _answering_flags(parser: Any) -> None:
    """Adds the flags that say which model answers, and how it computes."""
    model_flags(
        parser.add_argument,
        adapter="folder of an adapter, or a file such as adapters/0000100_adapters.safetensors "
        "(default: none)",
    )
    device_flag(parser)
    precision_flag(parser)


def prompt_flags(add: Callable[..., Any]) -> None:
    """Adds the flags of the system message and of the template."""
    add(
        "--system-prompt",
        "--system",
        metavar="TEXT",
        help="the system message (default: the one that the adapter was trained with, if any)",
    )
    add(
        "--no-system-prompt",
        action="store_true",
        help="use no system message, not even the adapter's",
    )
    add(
        "--chat-template-config",
        metavar="JSON",
        help="additional arguments of the chat template, a JSON object",
    )


def sampling_flags(add: Callable[..., Any], max_tokens: int) -> None:
    """Adds the flags of the answer, with the default `max_tokens`."""
    add(
        "--max-tokens",
        "-m",
        type=whole,
        default=max_tokens,
        help=f"largest number of tokens to generate (default: {max_tokens})",
    )
    add(
        "--temp",
        type=real,
        default=0.0,
        help="sampling temperature; 0 takes the most likely token (default: 0)",
    )
    add(
        "--top-p",
        type=real,
        default=1.0,
        help="sample from the most likely tokens with this total probability (default: 1)",
    )
    add(
        "--min-p",
        type=real,
        default=0.0,
        help="drop tokens below this fraction of the most likely one's probability (default: 0)",
    )
    add(
        "--top-k",
        type=whole,
        default=0,
        help="sample from the K most likely tokens; 0 for all (default: 0)",
    )
    add("--seed", type=whole, help="seed of the sampling")
    add(
        "--extra-eos-token",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="additional tokens that end the answer",
    )
    add(
        "--verbose",
        type=truth,
        default=True,
        metavar="T|F",
        help="print the speed after the answer (default: T)",
    )
