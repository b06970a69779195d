"""The marks of what differs between two answers."""

import re
from html import unescape

from hypothesis import given, strategies

from pyloss.reports.marking import marked


def test_what_differs_is_marked():
    left, right = marked("turn on the lamp", "turn off the lamp")
    assert left == "turn <del>on</del> the lamp" and right == "turn <ins>off</ins> the lamp"
    assert marked("a <b>", "a <b>") == ("a &lt;b&gt;", "a &lt;b&gt;")
    assert marked("", "x") == ("", "<ins>x</ins>")


def test_long_answers_are_marked_as_a_whole():
    long = "a " * 2000
    assert marked(long, "b") == (f"<del>{long}</del>", "<ins>b</ins>")
    assert marked(long, long) == (long, long)


@given(strategies.text("ab <&\n", max_size=20), strategies.text("ab <&\n", max_size=20))
def test_without_the_marks_the_texts_are_whole(base, tuned):
    left, right = marked(base, tuned)
    assert unescape(re.sub("</?del>", "", left)) == base
    assert unescape(re.sub("</?ins>", "", right)) == tuned
    kept = [
        unescape(re.sub(f"<{t}>.*?</{t}>", "", s, flags=re.DOTALL))
        for t, s in (("del", left), ("ins", right))
    ]
    assert kept[0] == kept[1]
