"""`pyloss chat`: a conversation, whose answers are printed while they are generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pyloss.cli.commands.generating import (
    check_flags,
    encoder,
    load,
    say_speed,
    standard_input,
    system_prompt,
    utf8_text,
)
from pyloss.cli.commands.shared import Flags
from pyloss.cli.entry import Terminated
from pyloss.generation import KeptTokens, SamplingParams, stream_generate
from pyloss.io.console import ask, lost, out, say
from pyloss.runtime import precision
from pyloss.tuner.adapters.switching import AdapterSwitch
from pyloss.tuner.run.checkpoints import uninterrupted

HELP = """/reset          forget the conversation
/system TEXT    replace the system message and forget the conversation; without TEXT, remove it
/base           switch the adapter off, or on again; the conversation stays
/help           show these commands
/quit           end, as Ctrl-D does
A message that begins with / is written with //. Ctrl-C ends an answer."""


def chat(flags: Flags) -> int:
    """`pyloss chat`: answers the lines of standard input."""
    with precision.matmul_precision(flags["matmul_precision"]):
        return _chat(flags)


def _chat(flags: Flags) -> int:
    check_flags(flags)
    model, tokenizer = load(flags)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{flags['model']} has no chat template, which a conversation needs; "
            "`pyloss generate` continues plain text"
        )
    conversation = Conversation(flags, model, tokenizer)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        say("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the program")
    lines = _typed() if terminal else _piped()
    while True:
        try:
            for line in lines:
                if not _obeyed(line, conversation) or lost():
                    break  # if the output is closed, `main` reports it
            return 0
        except KeyboardInterrupt as stopped:  # at any moment from one prompt to the next
            out("", flush=True)
            say("[interrupted]")
            if isinstance(stopped, Terminated) or not terminal:
                raise
        except ValueError as error:
            if not terminal:
                raise
            say(f"pyloss: error: {error}", always=True)


def _obeyed(line: str, conversation: Conversation) -> bool:
    """Answers a line, or does what it commands. False for the command that ends."""
    line = utf8_text(line)
    if line.startswith("/") and not line.startswith("//"):
        if line.split()[0] == "/quit":
            return False
        conversation.command(line)
    elif line.strip():
        conversation.answer(line.removeprefix("/") if line.startswith("//") else line)
    return True


def _typed() -> Iterator[str]:
    """The lines that a user types. Ctrl-C drops a line."""
    try:
        import readline  # noqa: F401  (`input` then edits the line and remembers earlier ones)
    except ImportError:
        pass
    while True:
        try:
            yield ask("> ")
        except EOFError:
            out("")
            return
        except UnicodeDecodeError as error:
            say(f"pyloss: error: the line is not text in {error.encoding}", always=True)
        except Terminated:
            raise
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D ends)")


def _piped() -> Iterator[str]:
    """The lines of standard input."""
    for number, line in enumerate(standard_input("pyloss chat"), 1):
        try:
            text = line if isinstance(line, str) else line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of standard input is not UTF-8 text (byte {error.start})"
            ) from None
        yield text.rstrip("\r\n")


class Conversation:
    """The turns so far, and the model that answers the next one.

    Attributes:
        system: the system message, or None.
        turns: the user's and the assistant's messages, in turn.
    """

    def __init__(self, flags: Flags, model: Any, tokenizer: Any) -> None:
        self.flags, self.model, self.tokenizer = flags, model, tokenizer
        self.system = system_prompt(flags, model)
        self.turns: list[dict[str, Any]] = []
        self.encode = encoder(flags | {"no_system_prompt": True}, tokenizer, model)
        self.sampler = SamplingParams(
            temperature=flags["temp"],
            top_p=flags["top_p"],
            min_p=flags["min_p"],
            top_k=flags["top_k"],
            seed=flags["seed"],
        ).make_sampler()
        self.context = model.config.max_position_embeddings
        self.switch: AdapterSwitch | None = None
        # with the adapter, and without it
        self.kept = {on: KeptTokens(model) for on in (True, False)}

    def command(self, line: str) -> None:
        """Obeys a command. ValueError for one that does not exist or cannot be obeyed."""
        name, _, rest = line.partition(" ")
        if name == "/help":
            say(HELP)
        elif name == "/reset":
            self.turns.clear()
            say("the conversation is forgotten")
        elif name == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
            said = "no system message" if self.system is None else f"system message: {self.system}"
            say(f"{said}; the conversation is forgotten")
        elif name == "/base":
            if self.switch is None:
                self.switch = AdapterSwitch(self.model)
            self.switch.turn()
            say("with the adapter" if self.switch.on else "without the adapter")
        else:
            raise ValueError(f"{name} is no command; /help lists them, and //... is a message")

    def answer(self, text: str) -> None:
        """Prints the answer to the user's message `text`, and keeps both.

        Ctrl-C keeps what has been generated of the answer; if that is nothing, the message is
        dropped, too. It raises KeyboardInterrupt then.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        parts: list[str] = []
        last = None
        try:
            ids = self._prompt()
            kept = self.kept[self.switch is None or self.switch.on]
            steps = stream_generate(
                self.model,
                self.tokenizer,
                ids,
                max_tokens=min(self.flags["max_tokens"], self.context - len(ids)),
                sampler=self.sampler,
                kept=kept,
            )
            while last is None or last.finish_reason is None:
                if last is None:
                    last = next(steps)  # reads the prompt, which Ctrl-C may stop
                else:
                    with uninterrupted():  # so that `kept` stays whole
                        last = next(steps)
                parts.append(last.text)
                out(last.text, end="", flush=True, foreign=True)
                if lost():
                    return
        finally:
            said, ended = "".join(parts), last is not None and last.finish_reason is not None
            if said or ended:
                self.turns.append({"role": "assistant", "content": said})
            else:
                self.turns = before
        out("", flush=True)
        if self.flags["verbose"]:
            say_speed(last)

    def _prompt(self) -> list[int]:
        """The prompt's tokens. Drops the oldest turns if they and an answer exceed the context.

        Turns are then dropped down to half of the context, so that the next ones drop none.
        ValueError if the newest message alone is too long.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        ids = self.encode([*system, *self.turns], None)
        room = min(self.flags["max_tokens"], self.context // 4)
        if len(ids) + room <= self.context:
            return ids
        dropped = 0
        while len(ids) > self.context // 2 and len(self.turns) > 1:
            del self.turns[:2]
            dropped += 1
            ids = self.encode([*system, *self.turns], None)
        if len(ids) >= self.context:
            raise ValueError(
                f"the message has {len(ids)} tokens with its template, and the model's context "
                f"has {self.context}: give a shorter one"
            )
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            say(
                f"[dropped the oldest {turns}: the conversation is longer than "
                f"the model's context of {self.context} tokens]"
            )
        return ids
