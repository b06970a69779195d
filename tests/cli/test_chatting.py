"""`chat`: turns, its commands, what it keeps, and Ctrl-C at a terminal."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from fake import FakeTokenizer
from tiny_commands import fails

import pyloss
from pyloss.cli import main
from pyloss.cli.commands import chatting
from pyloss.tuner import linear_to_lora_layers
from pyloss.tuner.adapters import adapter as adapters

ARGV = ["chat", "--max-tokens", "6", "--verbose", "F"]


class Tokenizer(FakeTokenizer):
    def __init__(self):
        super().__init__()
        self.eos_token_ids = set(self.eos_token_ids)
        self.rendered = []

    def apply_chat_template(self, messages, **options):
        self.rendered.append([(m["role"], m["content"]) for m in messages])
        return super().apply_chat_template(messages, **options)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A tiny model that the command loads, and its tokenizer."""
    model = tiny.load_tiny(tmp_path / "tiny", vocab_size=258)
    tokenizer = Tokenizer()
    monkeypatch.setattr(pyloss.models, "load", lambda path, adapter_path=None: (model, tokenizer))
    monkeypatch.chdir(tmp_path)
    return model, tokenizer


@pytest.fixture
def chat(world, monkeypatch, capsys):
    """Runs the command on lines; returns its standard output and error."""

    def run(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main([*ARGV, *flags]) == 0
        return capsys.readouterr()

    return run


def adapted(model):
    """Adds an adapter that changes the answers."""
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 20.0})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.normal(0, 0.5, array.shape)
    model.eval()


def test_products_are_in_the_precision_of_the_flag(chat, monkeypatch):
    seen, check = [], chatting.check_flags
    monkeypatch.setattr(
        chatting,
        "check_flags",
        lambda flags: seen.append(pyloss.get_matmul_precision()) or check(flags),
    )
    chat("Hi", flags=["--matmul-precision", "int8"])
    chat("Hi")
    assert seen == ["int8", "float32"] and pyloss.get_matmul_precision() == "float32"


def test_each_turn_has_the_earlier_ones(world, chat):
    out, err = chat("ab", "", "cd", flags=["--system", "Be"])
    prompts = world[1].rendered
    assert prompts[0] == [("system", "Be"), ("user", "ab")]
    assert prompts[1][:2] == prompts[0]
    assert [role for role, _ in prompts[1]] == ["system", "user", "assistant", "user"]
    first = prompts[1][2][1]
    assert first and out.startswith(first + "\n")
    assert err == ""


@pytest.mark.parametrize("family", [None, "phi3", "olmo3"])
def test_answers_are_those_of_whole_prompts_but_only_new_tokens_are_read(
    world, chat, monkeypatch, family, tmp_path
):
    model, tokenizer = world
    if family:
        options = tiny.FAMILIES[family]
        model = tiny.load_tiny(tmp_path / family, vocab_size=258, **options)
        monkeypatch.setattr(pyloss.models, "load", lambda *a, **k: (model, tokenizer))
    read, step = [], model.step
    monkeypatch.setattr(
        model, "step", lambda tokens, cache: read.append(len(tokens)) or step(tokens, cache)
    )
    out, _ = chat("ab", "cd")
    whole = tokenizer.rendered[1]
    messages = [{"role": role, "content": content} for role, content in whole]
    text = FakeTokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    alone = pyloss.generate(model, tokenizer, ids, max_tokens=6)
    assert out == f"{whole[1][1]}\n{alone}\n"
    if family is None:  # the bytes of an answer may make no text, and are then read again
        second = [n for n in read if n > 1][1]
        assert second < len(ids) - 10


def test_reset_and_system_forget_the_conversation(world, chat):
    _, err = chat("ab", "/reset", "cd", "/system Be brief", "ef", "/system", "gh")
    assert world[1].rendered == [
        [("user", "ab")],
        [("user", "cd")],
        [("system", "Be brief"), ("user", "ef")],
        [("user", "gh")],
    ]
    assert "system message: Be brief; the conversation is forgotten" in err
    assert "no system message" in err


def test_base_switches_the_same_adapter_off_and_on(world, chat):
    model, _ = world
    plain, _ = chat("ab")
    adapted(model)
    before = adapters.adapter_modules(model)
    out, err = chat("ab", "/reset", "/base", "ab", "/reset", "/base", "ab")
    assert err.count("without the adapter") == 1 and err.count("with the adapter") == 1
    answers = out.split("\n")
    assert len(answers) == 4 and answers[0] == answers[2] != answers[1] == plain.rstrip("\n")
    after = adapters.adapter_modules(model)
    assert before and all(after[name] is module for name, module in before.items())


def test_quit_help_and_messages_with_a_slash(world, chat, capsys, monkeypatch):
    _, err = chat("/help", "//ab", "/quit", "cd")
    assert "/reset" in err and "/base" in err
    assert world[1].rendered == [[("user", "/ab")]]
    for line, *parts in (
        ("/nothing", "/nothing is no command", "/help"),
        ("/base", "there is no adapter"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\n"))
        fails(capsys, ARGV, *parts)


def test_the_oldest_turns_are_dropped(world, chat, capsys, monkeypatch):
    _, tokenizer = world
    lines = [c * 60 for c in "abcdefghijkl"]
    _, err = chat(*lines, flags=["--system", "Be"])
    assert "the oldest" in err and "context of 512 tokens" in err
    last = tokenizer.rendered[-1]
    assert last[0] == ("system", "Be") and last[1][0] == "user" and last[1][1] != lines[0]
    assert last[-1] == ("user", lines[-1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n" + "x" * 600 + "\n"))
    fails(capsys, ARGV, "the message has", "context has 512")


def test_seeds_repeat_a_conversation(chat):
    sampled = ["--temp", "1", "--seed", "3"]
    first, _ = chat("ab", "ab", flags=sampled)
    assert chat("ab", "ab", flags=sampled)[0] == first
    assert chat("ab", "ab", flags=["--temp", "1", "--seed", "4"])[0] != first


def test_a_model_without_a_template_is_refused(world, capsys):
    world[1].chat_template = None
    fails(capsys, ARGV, "has no chat template", "pyloss generate")


def test_input_that_is_no_text_is_refused(world, capsys, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"ab\n\xff\n"))
    monkeypatch.setattr(sys, "stdin", stream)
    fails(capsys, ARGV, "line 2 of standard input is not UTF-8 text (byte 0)")
    monkeypatch.setattr(sys, "stdin", None)
    fails(capsys, ARGV, "closed")


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, argv, cwd):
        self.master, slave = pty.openpty()
        environment = os.environ | {
            "PYTHONPATH": str(Path(pyloss.__file__).parents[1]),
            "PYLOSS_NUM_THREADS": "1",
            "TERM": "dumb",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyloss", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C then signals
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, wanted, seconds=60):
        """Reads until `wanted` has come; returns the text up to there."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        found, _, self.text = self.text.partition(wanted)
        return found

    def type(self, text):
        os.write(self.master, text.encode())

    def press_ctrl_c(self, wanted):
        """Presses Ctrl-C until `wanted` has come.

        Python's `input` notices a signal with the next one if it comes just after the prompt.
        """
        for _ in range(60):
            self.type("\x03")
            try:
                return self.wait_for(wanted, 1)
            except AssertionError:
                continue
        raise AssertionError(self.text)


def test_ctrl_c_at_a_terminal_ends_an_answer_and_not_the_program(tmp_path):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS, max_position_embeddings=100_000)
    tiny.byte_tokenizer(eos_token_id=0).save(tmp_path / "base")
    terminal = Terminal(["chat", "--model", "base", "--max-tokens", "90000"], tmp_path)
    try:
        terminal.wait_for("> ")
        terminal.press_ctrl_c("/quit or Ctrl-D ends")  # at the prompt
        terminal.wait_for("> ")
        for message in ("hello", "again"):
            terminal.type(f"{message}\n")
            terminal.wait_for(message)  # the echo
            time.sleep(1)
            terminal.press_ctrl_c("[interrupted]")
            terminal.wait_for("> ")
        terminal.type("/nothing\n")
        terminal.wait_for("/nothing is no command")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_sigterm_ends_the_program(tmp_path):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS)
    tiny.byte_tokenizer().save(tmp_path / "base")
    terminal = Terminal(["chat", "--model", "base"], tmp_path)
    try:
        terminal.wait_for("> ")
        while terminal.process.poll() is None:  # see `press_ctrl_c`
            terminal.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert terminal.process.wait() == 143
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
