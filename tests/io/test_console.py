"""Output of text: no stream raises, and lost results are known."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyloss
from pyloss.io import console

ENVIRONMENT = {"PYTHONPATH": str(Path(pyloss.__file__).parents[1])}


class Broken(io.StringIO):
    """A stream whose reader is gone, or whose disk is full."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self, *arguments: self.write("")


@pytest.fixture(autouse=True)
def forget():
    console.begin()
    yield
    console.begin()


def run(code, **options):
    """Run `code` in a new process."""
    program = "import sys\nfrom pyloss.io import console\n" + code
    return subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, text=True, timeout=60, **options
    )


def test_results_and_lines_go_to_their_streams(capsys):
    console.out("a", end="")
    console.out("b", flush=True)
    console.say("c")
    assert capsys.readouterr() == ("ab\n", "c\n")
    assert not console.lost() and console.why_lost() == ""


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("I/O operation on closed file."), "closed file"),
    ],
)
def test_what_cannot_be_written_is_remembered(monkeypatch, error, why):
    monkeypatch.setattr(sys, "stderr", Broken(error))
    console.say("about the work")
    assert not console.lost()  # messages about the work are no results
    monkeypatch.setattr(sys, "stdout", Broken(error))
    console.out("a result")
    assert console.lost() and why in console.why_lost()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.out("the rest")
    assert console.lost()
    console.begin()
    assert not console.lost()


def test_a_process_without_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console.say("a")
    assert not console.lost()
    console.out("a", flush=True)
    assert console.lost() and not console.finish()


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", "na\\xefve \\u2603 \\udcff"),
        ("latin-1", "naïve \\u2603 \\udcff"),
        ("utf-8", "naïve ☃ \\udcff"),
    ],
)
def test_characters_that_an_encoding_lacks_are_escapes(monkeypatch, encoding, text):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    console.out("naïve ☃ \udcff", flush=True)
    assert raw.getvalue().decode(encoding) == text + "\n"
    assert not console.lost()


def test_a_console_is_what_a_progress_bar_writes_to():
    from tqdm import tqdm

    stream = console.Console(stream=Broken(BrokenPipeError(32, "Broken pipe")))
    bar = tqdm(total=3, file=stream, dynamic_ncols=True, mininterval=0)
    for _ in range(3):
        bar.update()
    bar.write("a line", file=stream)
    bar.close()
    assert bar.n == 3 and not stream.isatty()
    shown = io.StringIO()
    bar = tqdm(total=3, file=console.Console(stream=shown), mininterval=0)
    bar.update(3)
    bar.close()
    assert "3/3" in shown.getvalue()


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_reader_that_leaves_ends_nothing(unbuffered):
    code = "from pyloss.io import console\nfor i in range(100000): console.out('x' * 20)\n"
    code += "whole = console.finish()\nconsole.say(f'{whole} {console.why_lost()}')"
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, *unbuffered, "-c", code]
    done = subprocess.run(
        program, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "False Broken pipe\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_known_at_the_end():
    with open("/dev/full", "w") as full:
        done = run(
            "console.out('a'); console.say(str(console.finish()) + console.why_lost())",
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (0, "FalseNo space left on device\n")
    with open("/dev/full", "w") as full:
        done = run(
            "console.say('a'); console.finish(); console.out('done')",
            stdout=subprocess.PIPE,
            stderr=full,
        )
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_no_file_takes_the_place_of_a_closed_descriptor(tmp_path):
    code = "console.begin()\nfile = open('file', 'w')\nimport os\nos.write(1, b'a library')\n"
    code += "console.out('a result')\nconsole.say(str(console.lost()))\nassert file.fileno() > 2"
    program = [sys.executable, "-c", "from pyloss.io import console\n" + code]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *program]
    done = subprocess.run(
        shell, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "True\n")
    assert (tmp_path / "file").read_text() == ""
