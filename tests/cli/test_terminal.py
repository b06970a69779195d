"""Commands in a terminal of 80 and of 40 columns: bars, lines, a conversation."""

import re

import pytest
import terminal
import tiny_project

pytest.importorskip("tqdm", reason="bars need tqdm (a dependency)")

WIDTHS = pytest.mark.parametrize("columns", [80, 40])
BAR = re.compile(r"\d+%\|")


def unbroken(text):
    """A screen without the line breaks that its width makes."""
    return re.sub(r"\s+", "", text)


def ran(argv, columns, folder, typed=()):
    """A command that succeeded in a terminal, see `terminal.run`."""
    run = terminal.run(argv, columns, folder, typed)
    assert run.status == 0, run.screen.text
    return run


def bars(run):
    """The states of bars that were drawn; each begins with a carriage return."""
    return [part for part in re.split(r"[\r\n]", run.written) if BAR.search(part)]


def no_bar_stays(run):
    assert not BAR.search(run.screen.text), run.screen.text
    for state in bars(run):  # none is longer than a line, or it could not be erased
        shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", state)
        assert len(shown) <= run.screen.columns, shown


@WIDTHS
def test_training(made, tmp_path, columns):
    argv = [*tiny_project.TRAIN, "--adapter-path", str(tmp_path / "a"), "--steps-per-report", "1"]
    argv[argv.index("--iters") + 1] = "4"
    run = ran(argv, columns, made)
    no_bar_stays(run)
    drawn = bars(run)
    assert any("loss" in state for state in drawn) or columns == 40
    assert any("4/4" in state for state in drawn), drawn
    text = unbroken(run.screen.text)
    for line in (
        "plan: 4 batches of 2, 4 updates", "iteration 1/4: train loss", "iteration 4/4: train loss",
        "iteration 4/4: val loss", f"saved the adapter to {tmp_path / 'a' / 'adapters.safetensors'}",
    ):  # fmt: skip
        assert unbroken(line) in text, run.screen.text
    # Lines go above the bar: each begins in the first column.
    for number in range(1, 5):
        assert re.search(rf"^iteration {number}/4: train loss", run.screen.text, re.M)


@WIDTHS
def test_a_conversation(made, columns):
    argv = ["chat", "--model", "base", "--adapter-path", "adapters", "--max-tokens", "6"]
    run = ran(
        argv, columns, made,
        [("> ", "hello\n"), ("\n> ", "/base\n"), ("\n> ", "/nothing\n"), ("\n> ", "\x04")],
    )  # fmt: skip
    text = run.screen.text
    assert "> hello" in text.splitlines()
    assert "without the adapter" in text.splitlines()
    assert re.search(r"^pyloss: error: .*/nothing", text, re.M)
    assert unbroken("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the program") in (
        unbroken(text)
    )


@WIDTHS
def test_control_c_ends_an_answer_and_not_the_program(made, columns):
    argv = ["chat", "--model", "base", "--max-tokens", "100000", "--seed", "1"]
    run = ran(
        argv, columns, made,
        [("> ", "hello\n"), ("hello", ""), ("\n", "\x03"), ("\n> ", "/quit\n")],
    )  # fmt: skip
    assert "Traceback" not in run.screen.text


def test_control_c_between_a_prompt_and_an_answer(made):
    """The next prompt stands in a line of its own."""
    code = (
        "import signal, sys\n"
        "from pyloss.cli import main\n"
        "from pyloss.cli.commands import chatting\n"
        "whole = chatting.utf8_text\n"
        "def interrupted(line):\n"
        "    chatting.utf8_text = whole\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "chatting.utf8_text = interrupted\n"
        "sys.exit(main(['chat', '--model', 'base']))\n"
    )
    run = terminal.run_python(["-c", code], 80, made, [("> ", "hello\n"), ("\n> ", "/quit\n")])
    assert run.status == 0, run.screen.text
    assert "[interrupted]" in run.screen.text.splitlines()


@WIDTHS
def test_a_report(made, tmp_path, columns):
    adapter = str(tmp_path / "a")
    ran([*tiny_project.TRAIN, "--adapter-path", adapter], 80, made)
    page = tmp_path / "page.html"
    argv = ["report", adapter, "--output", str(page), "--prompts", "2", "--max-tokens", "4"]
    run = ran(argv, columns, made)
    no_bar_stays(run)
    assert unbroken(f"wrote {page}") in unbroken(run.screen.text)
    assert page.read_text().startswith("<!doctype html>")


LONG = {
    "quantize": (["--to", "q4", "--group-size", "32", "--output"], "quantizing to q4"),
    "export": (["--to", "gguf", "--type", "q8_0", "--output"], "writing made.gguf"),
    "convert": (["--dequantize", "--output"], "converting to float32"),
    "fuse": (["--adapter-path", "adapters", "--save-path"], "merging the adapter"),
}


@WIDTHS
@pytest.mark.parametrize("command", list(LONG))
def test_long_work_shows_what_is_done(made, tmp_path, command, columns):
    more, text = LONG[command]
    model = "base" if command != "convert" else "base.gguf"
    place = tmp_path / ("made.gguf" if command == "export" else "made")
    argv = [command, "--model", model, *more, str(place)]
    run = ran(argv, columns, made)
    no_bar_stays(run)
    drawn = [state.split(":")[0].strip() for state in bars(run)]
    assert "loading the model" in drawn and text in drawn, drawn
    quiet = terminal.run([*argv, "--quiet", "--overwrite"], columns, made)
    assert quiet.status == 0 and not bars(quiet) and not quiet.screen.text


def test_data_are_tokenized_with_a_bar(made, tmp_path):
    argv = [*tiny_project.TRAIN, "--adapter-path", str(tmp_path / "a")]
    run = terminal.run(argv, 80, made)
    assert any(state.startswith("tokenizing the data") for state in bars(run))


def test_without_a_terminal_there_are_no_bars(made, tmp_path):
    argv = ["quantize", "base", "--to", "q8", "--group-size", "32", "--output", str(tmp_path / "m")]
    done = tiny_project.command(*argv, cwd=made)
    assert done.returncode == 0 and b"%|" not in done.stdout + done.stderr and not done.stdout


def test_a_line_does_not_tear_a_bar(made, tmp_path):
    """Lines of `say` go above the bar, which is drawn again."""
    code = (
        "from pyloss.io import bars, console\n"
        "bars._DELAY = 0\n"
        "bars.show(True)\n"
        "for i in bars.watched(range(3), 'counting'):\n"
        "    console.say(f'number {i}')\n"
    )
    (tmp_path / "script.py").write_text(code)
    run = terminal.run_python([str(tmp_path / "script.py")], 40, made)
    assert run.status == 0
    no_bar_stays(run)
    assert run.screen.text.splitlines() == ["number 0", "number 1", "number 2"]


def test_an_answer_cannot_steer_the_terminal(made, tmp_path):
    """A model's escape sequences are shown there, and handed on to a pipe as they are."""
    code = (
        "from pyloss.io import console\n"
        "console.out('a\\x1b[2Jb\\tc\\x9bd\\n\u00e9', foreign=True)\n"
        "console.out('\\x1b[32mgreen\\x1b[0m')\n"
    )
    (tmp_path / "script.py").write_text(code)
    run = terminal.run_python([str(tmp_path / "script.py")], 40, made)
    assert "\x1b[2J" not in run.written and "\x1b[32m" in run.written
    assert run.screen.text.splitlines()[0].startswith("a\\x1b[2Jb")
    done = tiny_project.subprocess.run(
        [tiny_project.sys.executable, str(tmp_path / "script.py")], capture_output=True,
        env={"PYTHONPATH": str(tiny_project.Path(tiny_project.pyloss.__file__).parents[1])},
    )  # fmt: skip
    assert b"a\x1b[2Jb" in done.stdout
