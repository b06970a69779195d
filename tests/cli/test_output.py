"""Commands whose output is lost, or whose terminal lacks a character."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_project import TRAIN, command

from pyloss.cli import main

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture
def project(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


class Lost(io.StringIO):
    """A stream that fails after `lines` lines: its reader is gone or the disk is full."""

    def __init__(self, number=errno.EPIPE, lines=0):
        super().__init__()
        self.number, self.lines = number, lines

    def write(self, text):
        if self.lines <= 0:
            raise OSError(self.number, os.strerror(self.number))
        self.lines -= text.count("\n")
        return super().write(text)


@pytest.mark.parametrize("lines", [0, 1])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_training_goes_on_to_its_adapter(project, monkeypatch, tmp_path, number, lines):
    monkeypatch.setattr(sys, "stderr", Lost(number, lines))
    monkeypatch.setattr(sys, "stdout", Lost(number))
    # The command promises no results on standard output.
    assert main([*TRAIN, "--adapter-path", str(tmp_path / "a")]) == 0
    assert load_file(tmp_path / "a" / "adapters.safetensors")


def test_a_figure_that_nobody_got_is_no_success(project, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "stdout", Lost())
    assert main([*TRAIN, "--adapter-path", str(tmp_path / "a"), "--train", "--test"]) == 1
    assert load_file(tmp_path / "a" / "adapters.safetensors")
    for argv in (
        ["eval", "--model", "base", "--data", "data"],
        ["info"],
        ["train", "--help"],
        [*TRAIN, "--preview"],
    ):
        assert main(argv) == 1
        assert "Traceback" not in capsys.readouterr().err


def test_an_answer_ends_quietly_with_its_reader(project, monkeypatch, capsys):
    generate = ["generate", "--model", "base", "--max-tokens", "50", "--prompt", "a"]
    monkeypatch.setattr(sys, "stdout", Lost())
    assert main(generate) == 1
    assert "pyloss: " not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", Lost(errno.ENOSPC))
    assert main(generate) == 1
    assert capsys.readouterr().err.endswith(
        "pyloss: error: cannot write to standard output: No space left on device\n"
    )


def test_exports_do_not_depend_on_their_messages(project, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Lost())
    export = [
        "export",
        "--model",
        "base",
        "--adapter-path",
        "adapters",
        "--to",
        "hf",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(export) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_processes_whose_streams_are_closed_or_full(project, tmp_path):
    train = [*TRAIN, "--adapter-path", str(tmp_path / "a")]
    done = command(*train, redirect="2>&1 >&- | head -n 1")
    assert done.stdout.startswith(b"plan: ") and done.stdout.count(b"\n") == 1
    assert load_file(tmp_path / "a" / "adapters.safetensors")
    done = command(*TRAIN, "--adapter-path", str(tmp_path / "b"), redirect=">&- 2>&-")
    assert done.returncode == 0 and load_file(tmp_path / "b" / "adapters.safetensors")
    done = command("eval", "--model", "base", "--data", "data", redirect=">&-")
    assert done.returncode == 1 and b"cannot write to standard output: it is closed" in done.stderr


@needs_full
def test_a_full_disk(project):
    done = command("eval", "--model", "base", "--data", "data", redirect="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith(
        b"pyloss: error: cannot write to standard output: No space left on device\n"
    )


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_locale_that_lacks_characters(project, environment):
    done = command(
        "generate",
        "--model",
        "base",
        "--max-tokens",
        "30",
        "--prompt",
        "naïve ☃",
        "--temp",
        "3",
        "--seed",
        "2",
        **environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"\\u" in done.stdout


def test_a_progress_bar_whose_terminal_is_gone(project, monkeypatch, tmp_path):
    class Terminal(Lost):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal(errno.EIO, 1))
    assert main([*TRAIN, "--adapter-path", str(tmp_path / "a")]) == 0
    assert load_file(tmp_path / "a" / "adapters.safetensors")


@pytest.mark.parametrize("raw", ["naïve ☃".encode(), b"\xff"])
def test_prompts_are_utf_8_in_every_locale(project, monkeypatch, capsys, raw):
    generate = ["generate", "--model", "base", "--max-tokens", "4", "--prompt"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    code = main([*generate, "-"])
    piped = capsys.readouterr()
    assert main([*generate, os.fsdecode(raw)]) == code
    given = capsys.readouterr()
    if raw == b"\xff":
        assert code == 2
        assert piped.err == "pyloss: error: standard input is not UTF-8 text (byte 0)\n"
        assert given.err == "pyloss: error: --prompt is not UTF-8 text\n"
    else:
        assert code == 0 and piped.out == given.out
