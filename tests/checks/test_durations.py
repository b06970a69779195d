"""Durations as text."""

import pytest

from pyloss.checks.durations import duration, duration_text, every, iterations, precise_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("1h30m", 5400),
        ("1 h 30 min", 5400),
        ("90m", 5400),
        ("1.5H", 5400),
        ("45s", 45),
        ("1d 2h", 93600),
        ("2 hours", 7200),
        ("3", 3),
        ("2.5", 2.5),
        (7200, 7200),
        (0.5, 0.5),
    ],
)
def test_times_are_seconds(text, seconds):
    assert duration(text, "max_time") == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "h",
        "0",
        "-2",
        "1e3",
        "2x",
        "two hours",
        "0h",
        "-1h",
        "1h-",
        "9" * 400 + "h",
        0,
        -1,
        None,
        True,
        [2],
    ],
)
def test_others_are_refused(value):
    with pytest.raises(ValueError, match="max_time is .*2h, 90m or 1h30m"):
        duration(value, "max_time")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (45, "45 s"),
        (59.7, "1 min"),
        (720, "12 min"),
        (3599, "1 h"),
        (4320, "1 h 12 min"),
        (86399, "1 d"),
        (86400 * 2 + 3 * 3600, "2 d 3 h"),
    ],
)
def test_the_text_has_the_two_largest_units(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "found", "of_40"),
    [
        ("0.1ep", "0.1ep", 4),
        (".5 Epochs", "0.5ep", 20),
        ("2ep", "2ep", 80),
        ("0.001ep", "0.001ep", 1),
        (7, 7, 7),
        ("7", 7, 7),
    ],
)
def test_parts_of_an_epoch_and_iterations(value, found, of_40):
    assert every(value, "x") == found and iterations(every(value, "x"), 40) == of_40


@pytest.mark.parametrize("value", [0, -1, 0.5, "0ep", "ep", "0.1", "1h", "", None, True, "nanep"])
def test_what_is_no_interval(value):
    with pytest.raises(ValueError, match=r"val_every is .*; it must be a part of an epoch such as"):
        every(value, "val_every")


def test_short_times_have_a_decimal():
    found = [precise_text(seconds) for seconds in (0, 7.44, 59.94, 59.96, 4320)]
    assert found == ["0.0 s", "7.4 s", "59.9 s", "1 min", "1 h 12 min"]
