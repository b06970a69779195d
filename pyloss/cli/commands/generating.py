"""`pyloss generate`: one answer, printed while it is generated, or those of a file of prompts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyloss import models
from pyloss.checks.numbers import real, whole
from pyloss.cli.commands.shared import Flags, choose_model, flag_text, join, move
from pyloss.io.console import lost, out, say
from pyloss.models.text.special import encode_text
from pyloss.runtime import precision
from pyloss.tuner.data.system_prompt import system_prompt_of

#: flags with text
TEXTS = ("prompt", "system_prompt", "prefill_response", "extra_eos_token", "chat_template_config")


def generate(flags: Flags) -> int:
    """`pyloss generate`: prints the answer, or with --prompts writes the answers of a file."""
    with precision.matmul_precision(flags["matmul_precision"]):
        return _generate(flags)


def _generate(flags: Flags) -> int:
    from pyloss.generation import stream_generate

    whole(flags["batch_size"], flag_text("batch_size"), 1)
    check_flags(flags)
    group = join(flags.pop("distributed") or "auto")
    records = _records(flags)
    if records is None and group.size() > 1:
        raise ValueError(
            f"{group.size()} processes can share the prompts of a file (--prompts), not one prompt"
        )
    model, tokenizer = load(flags)
    if records is not None:
        from pyloss.cli.commands.generating_files import generate_file

        encode = encoder(flags, tokenizer, model)
        generate_file(flags, records, model, tokenizer, encode, group)
        return 0
    last, ids = None, _prompt_ids(flags, tokenizer, model)
    warn_of_context([ids], model)
    for last in stream_generate(
        model,
        tokenizer,
        ids,
        max_tokens=flags["max_tokens"],
        temperature=flags["temp"],
        top_p=flags["top_p"],
        min_p=flags["min_p"],
        top_k=flags["top_k"],
        seed=flags["seed"],
    ):
        out(last.text, end="", flush=True, foreign=True)
        if lost():
            return 0  # the output is closed; `main` reports it
    out("")
    if flags["verbose"] and last is not None:
        say_speed(last)
    return 0


def warn_of_context(prompts: Sequence[Sequence[int]], model: Any) -> None:
    """Warns of prompts that are longer than what the model was trained on."""
    context = model.config.max_position_embeddings
    long = [len(ids) for ids in prompts if len(ids) > context]
    if long:
        which = "a prompt has" if len(long) == 1 else f"{len(long)} prompts have up to"
        say(
            f"warning: {which} {max(long)} tokens, and the model's context has {context}: "
            "answers may be of no use",
            always=True,
        )


def say_speed(last: Any) -> None:
    """Prints the speed of an answer, given its last step."""
    speeds = f"prompt {last.prompt_tps:.1f} tokens/s, generation {last.generation_tps:.1f} tokens/s"
    say(f"[{speeds}, ended by {last.finish_reason}]")


def check_flags(flags: Flags) -> None:
    """Checks the flags of sampling and of the prompt's text, and decodes the latter."""
    for name, least in (("max_tokens", 1), ("top_k", 0)) + (
        (("seed", 0),) if flags["seed"] is not None else ()
    ):
        whole(flags[name], flag_text(name), least)
    for name, most in (("temp", None), ("top_p", 1), ("min_p", 1)):
        real(flags[name], flag_text(name), 0, most)
    _utf8(flags, *TEXTS)
    if flags["no_system_prompt"] and flags["system_prompt"] is not None:
        raise ValueError(
            "--system-prompt and --no-system-prompt contradict each other: give one of them"
        )


def load(flags: Flags) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer with the end tokens of the flags."""
    choose_model(flags)
    model, tokenizer = models.load(flags["model"], adapter_path=flags["adapter_path"])
    for token in flags["extra_eos_token"]:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"--extra-eos-token {token!r} is {len(ids)} tokens; it must be a single token"
            )
        tokenizer.eos_token_ids.add(ids[0])
    move(model, flags["device"])
    return model, tokenizer


def _records(flags: Flags) -> Any:
    """The lines of --prompts, checked; None without it."""
    if flags["prompts"] is None:
        if flags["output"] is not None:
            raise ValueError("--output needs --prompts, the file with the prompts")
        return None
    from pyloss.cli.commands.generating_files import check_files

    if flags["prompt"] is not None:
        raise ValueError("--prompt and --prompts contradict each other: give one of them")
    return check_files(flags)


def _prompt_ids(flags: Flags, tokenizer: Any, model: Any) -> list[int]:
    """The prompt's tokens."""
    text = "hello" if flags["prompt"] is None else flags["prompt"]
    text = text.replace("\\n", "\n").replace("\\t", "\t")
    if text == "-":
        text = _read_input()
    return encoder(flags, tokenizer, model)([{"role": "user", "content": text}], None)


def encoder(
    flags: Flags, tokenizer: Any, model: Any
) -> Callable[[list[dict[str, Any]], Any], list[int]]:
    """Makes the token ids of a conversation (and tools), by the chat template where there is one.

    Without a template the conversation must be a single message.
    """
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
    options = {"add_generation_prompt": True} | options
    beginning = flags.get("prefill_response") or ""
    plain = flags.get("ignore_chat_template") or not tokenizer.chat_template
    system = None if plain else system_prompt(flags, model)

    def encode(messages: list[dict[str, Any]], tools: Any) -> list[int]:
        if plain:
            if len(messages) > 1 or not isinstance(messages[0]["content"], str):
                raise ValueError("a conversation of several messages needs a chat template")
            return encode_text(tokenizer, messages[0]["content"] + beginning)
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        given = options if tools is None else options | {"tools": tools}
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **given) + beginning
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    return encode


def standard_input(what: str) -> Any:
    """Standard input as a stream of bytes, or of text where it has no bytes below.

    `what` reads it, for the error if it is closed.
    """
    if sys.stdin is None:
        raise ValueError(f"{what} reads standard input, which is closed")
    return getattr(sys.stdin, "buffer", sys.stdin)


def _read_input() -> str:
    """Standard input, read as UTF-8 in every locale."""
    try:
        text = standard_input("--prompt -").read()
        return str(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None


def utf8_text(text: str) -> str:
    """A text whose bytes a locale other than UTF-8 escaped, read as UTF-8. Raises UnicodeError."""
    escaped = not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)
    return os.fsencode(text).decode() if escaped else text


def _utf8(flags: Flags, *names: str) -> None:
    """Decodes the flags `names` as UTF-8: other locales leave escaped bytes in arguments."""
    for name in names:
        given = flags.get(name)
        try:
            if given:
                flags[name] = (
                    utf8_text(given)
                    if isinstance(given, str)
                    else [utf8_text(text) for text in given]
                )
        except UnicodeError:
            raise ValueError(f"{flag_text(name)} is not UTF-8 text") from None


def system_prompt(flags: Flags, model: Any) -> str | None:
    """The system prompt of the flags, else the adapter's, with a note; None for none."""
    if flags["no_system_prompt"] or flags["system_prompt"] is not None:
        return None if flags["no_system_prompt"] else str(flags["system_prompt"])
    prompt = system_prompt_of(getattr(model, "adapter_config", None))
    if prompt is not None:
        say(f"with the adapter's system prompt (--no-system-prompt leaves it out): {prompt}")
    return prompt
