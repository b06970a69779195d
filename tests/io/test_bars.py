"""Bars: who sees one, and that there is one at a time."""

import sys

import pytest

from pyloss.io import bars, console


class Terminal:
    """A stream that says that it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    found = Terminal()
    monkeypatch.setattr(console._err, "_stream", found)
    monkeypatch.setattr(bars, "Console", lambda: console._err)
    monkeypatch.setattr(bars, "_DELAY", 0)
    yield found
    bars.show(False)
    console.be_quiet(False)


def test_a_library_has_none_and_a_command_has_them(screen):
    assert list(bars.watched("abc", "spelling", "letter")) == list("abc")
    assert not screen.text
    bars.show(True)
    assert list(bars.watched("abc", "spelling", "letter")) == list("abc")
    assert "spelling: " in screen.text and "0/3" in screen.text
    assert screen.text.endswith("\r")  # it is gone


def test_quiet_commands_have_none(screen):
    bars.show(True)
    console.be_quiet(True)
    assert list(bars.watched("abc", "spelling")) == list("abc")
    assert not screen.text and not bars.possible()


def test_work_within_work_has_no_bar_of_its_own(screen):
    bars.show(True)
    for _ in bars.watched(range(2), "outer"):
        assert list(bars.watched(range(2), "inner")) == [0, 1]
    assert "outer" in screen.text and "inner" not in screen.text
    list(bars.watched(range(2), "inner"))  # afterwards it has one
    assert "inner" in screen.text


def test_a_failure_takes_the_bar_away(screen):
    bars.show(True)
    with pytest.raises(ValueError, match="broken"):
        for i in bars.watched(range(3), "counting"):
            if i:
                raise ValueError("broken")
    console.say("a line")
    assert screen.text.endswith("a line\n")
    before = screen.text
    list(bars.watched(range(2), "again"))
    assert "again" in screen.text[len(before) :]


def test_items_without_a_length_are_counted(screen):
    bars.show(True)
    assert list(bars.watched(iter("ab"), "spelling")) == ["a", "b"]
    assert "spelling:0it" in screen.text.replace(" ", "")


def test_without_tqdm_there_are_none(screen, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    bars.show(True)
    assert list(bars.watched("ab", "spelling")) == ["a", "b"]
    assert not screen.text
