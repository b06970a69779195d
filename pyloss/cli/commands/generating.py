"""`pyloss generate`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pyloss import models
from pyloss.checks.numbers import real, whole
from pyloss.cli.commands.shared import Flags, flag_text, move
from pyloss.io.console import lost, out, say
from pyloss.models.text.special import encode_text
from pyloss.tuner.data.system_prompt import system_prompt_of


def generate(flags: Flags) -> int:
    """`pyloss generate`: prints the answer while it is generated."""
    from pyloss.generation import stream_generate

    for name, least in (("max_tokens", 1), ("top_k", 0)) + (
        (("seed", 0),) if flags["seed"] is not None else ()
    ):
        whole(flags[name], flag_text(name), least)
    for name, most in (("temp", None), ("top_p", 1), ("min_p", 1)):
        real(flags[name], flag_text(name), 0, most)
    _utf8(
        flags,
        "prompt",
        "system_prompt",
        "prefill_response",
        "extra_eos_token",
        "chat_template_config",
    )
    if flags["no_system_prompt"] and flags["system_prompt"] is not None:
        raise ValueError(
            "--system-prompt and --no-system-prompt contradict each other: give one of them"
        )
    model, tokenizer = models.load(flags["model"], adapter_path=flags["adapter_path"])
    for token in flags["extra_eos_token"]:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"--extra-eos-token {token!r} is {len(ids)} tokens; it must be a single token"
            )
        tokenizer.eos_token_ids.add(ids[0])
    move(model, flags["device"])
    last = None
    for last in stream_generate(
        model,
        tokenizer,
        _prompt_ids(flags, tokenizer, model),
        max_tokens=flags["max_tokens"],
        temperature=flags["temp"],
        top_p=flags["top_p"],
        min_p=flags["min_p"],
        top_k=flags["top_k"],
        seed=flags["seed"],
    ):
        out(last.text, end="", flush=True)
        if lost():
            return 0  # the output is closed; `main` reports it
    out("")
    if flags["verbose"] and last is not None:
        speeds = (
            f"prompt {last.prompt_tps:.1f} tokens/s, generation {last.generation_tps:.1f} tokens/s"
        )
        say(f"[{speeds}, ended by {last.finish_reason}]")
    return 0


def _prompt_ids(flags: Flags, tokenizer: Any, model: Any) -> list[int]:
    """The prompt's tokens, by the chat template if there is one."""
    text = flags["prompt"].replace("\\n", "\n").replace("\\t", "\t")
    if text == "-":
        text = _read_input()
    options: Flags = {}
    if flags["chat_template_config"]:
        try:
            options = json.loads(flags["chat_template_config"])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--chat-template-config is {flags['chat_template_config']!r}: not JSON: {error}"
            ) from None
        if not isinstance(options, dict):
            raise ValueError(
                f"--chat-template-config is {flags['chat_template_config']!r}; "
                "it must be a JSON object"
            )
    if flags["ignore_chat_template"] or not tokenizer.chat_template:
        return encode_text(tokenizer, text + (flags["prefill_response"] or ""))
    messages = [{"role": "user", "content": text}]
    if (system := _system_prompt(flags, model)) is not None:
        messages.insert(0, {"role": "system", "content": system})
    options = {"add_generation_prompt": True} | options
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options) + (
        flags["prefill_response"] or ""
    )
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _read_input() -> str:
    """Standard input, read as UTF-8 in every locale."""
    if sys.stdin is None:
        raise ValueError("--prompt - reads standard input, which is closed")
    try:
        raw = getattr(sys.stdin, "buffer", None)
        return str(sys.stdin.read() if raw is None else raw.read().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None


def _utf8(flags: Flags, *names: str) -> None:
    """Decodes the flags `names` as UTF-8: other locales leave escaped bytes in arguments."""

    def read(text: str) -> str:
        return (
            text
            if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
            else os.fsencode(text).decode()
        )

    for name in names:
        given = flags[name]
        try:
            if given:
                flags[name] = (
                    read(given) if isinstance(given, str) else [read(text) for text in given]
                )
        except UnicodeError:
            raise ValueError(f"{flag_text(name)} is not UTF-8 text") from None


def _system_prompt(flags: Flags, model: Any) -> str | None:
    """The system prompt of the flags, else the adapter's, with a note; None for none."""
    if flags["no_system_prompt"] or flags["system_prompt"] is not None:
        return None if flags["no_system_prompt"] else str(flags["system_prompt"])
    prompt = system_prompt_of(getattr(model, "adapter_config", None))
    if prompt is not None:
        say(f"with the adapter's system prompt (--no-system-prompt leaves it out): {prompt}")
    return prompt
