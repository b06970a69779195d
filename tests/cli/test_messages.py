"""What commands say beside their results: --quiet, --verbose, colors, completion in shells."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_commands import TRAIN, fails

import pyloss
from pyloss.cli import main
from pyloss.cli.flags import build_parser
from pyloss.io import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_leaves_results_warnings_and_errors(world, capsys, monkeypatch, flag):
    assert main([*TRAIN, "--train", "--test", flag]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("loss ") and out.count("\n") == 1 and err == ""
    (Path("data") / "valid.jsonl").unlink()
    assert main([*TRAIN, flag]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err == "No validation data found: training goes on without validation.\n"
    fails(capsys, [*TRAIN, flag, "--data", "none.jsonl"], "none.jsonl: there is no such file")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main([*TRAIN, flag]) == 0 and "\r" not in sys.stderr.getvalue()
    # The next command is not quiet.
    assert main(TRAIN) == 0 and "plan: " in capsys.readouterr().out


def test_verbose_says_versions_and_shows_tracebacks(world, capsys, monkeypatch):
    found = {"version": "0", "isa": "avx2", "threads": 2, "numpy": "2"}
    monkeypatch.setattr(pyloss, "info", lambda: found)
    assert main([*TRAIN, "-v"]) == 0
    assert capsys.readouterr().err.startswith("pyloss 0, avx2, 2 threads, Python ")
    assert main([*TRAIN, "-v", "--data", "none.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("pyloss: error: none.jsonl: there is no such file\n")
    fails(capsys, [*TRAIN, "-v", "-q"], "--quiet and --verbose are given: give one of them")


def test_short_names_of_a_command_stay(capsys):
    flags = vars(build_parser().parse_args(["convert", "--output", "o", "-q", "nf4", "--quiet"]))
    assert flags["quantize"] == "nf4" and flags["messages_quiet"] is True
    flags = vars(build_parser().parse_args(["generate", "--verbose", "false", "-v", "-q"]))
    assert flags["verbose"] is False and flags["messages_verbose"] and flags["messages_quiet"]


def test_colors_are_for_terminals_that_want_them(world, monkeypatch):
    def shown(stream, **environment):
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([*TRAIN, "--mask-prompt", "--preview", "1"]) == 0
        return stream.getvalue()

    assert "\x1b[32m" in shown(Terminal(), TERM="xterm")
    for plain in (
        shown(io.StringIO(), TERM="xterm"),
        shown(Terminal(), NO_COLOR="1"),
        shown(Terminal(), TERM="dumb"),
    ):
        assert "\x1b" not in plain and "[+" in plain
    monkeypatch.setenv("NO_COLOR", "")  # empty is unset, as no-color.org says
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert console.colored()


def completed(line, folder):
    """The words that argcomplete offers at the end of `line`, as it answers bash."""
    answer = folder / "answer"
    environment = os.environ | {
        "PYTHONPATH": str(Path(pyloss.__file__).parents[1]),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    subprocess.run(
        [sys.executable, "-m", "pyloss"], env=environment, cwd=folder, timeout=60, check=True
    )
    return {word.strip() for word in answer.read_text().split("\n")}


def test_shells_complete_commands_flags_and_values(tmp_path):
    pytest.importorskip("argcomplete")
    assert completed("pyloss re", tmp_path) == {"report"}
    assert {"--epochs", "--data"} <= completed("pyloss train --", tmp_path)
    assert completed("pyloss train --fine-tune-type ", tmp_path) >= {"lora", "dora", "full"}
    assert completed("pyloss train --optimizer adamw", tmp_path) == {"adamw"}
    (tmp_path / "mine.jsonl").write_text("")
    assert completed("pyloss train --data mi", tmp_path) == {"mine.jsonl"}
