"""Which tokens hold which characters, with and without the tokenizer's offsets."""

import pytest
from tiny import byte_tokenizer

from pyloss.models.text.positions import Positions, common


class Plain:
    """A tokenizer without known offsets."""

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode


@pytest.mark.parametrize("wrap", [lambda t: t, Plain])
def test_tokens_across_a_border_belong_to_the_range(wrap):
    text = "say hello wo 👩 12</s>x"
    tokenizer = byte_tokenizer()
    positions = Positions(wrap(tokenizer), text)
    whole = [tokenizer.decode([t]) for t in positions.ids]
    assert "hello" in whole

    def held(part):
        at = text.index(part)
        first, end = positions.tokens(at, at + len(part))
        return tokenizer.decode(positions.ids[first:end])

    assert held("hello") == held("ell") == "hello"
    assert held("👩") == "👩" and held("</s>") == held("/s") == "</s>"
    assert held("x") == "x" and held(text) == text
    assert positions.tokens(4, 4) == (positions.tokens(4, 5)[0],) * 2
    assert positions.boundary(text.index("/s")) == text.index("</s>")
    assert positions.boundary(text.index("</s>")) == text.index("</s>")


def test_common_prefixes():
    assert [
        common(a, b)
        for a, b in (("", "a"), ("abc", "abd"), ("abc", "abc"), ("x", "abc"), ("ab", "abc"))
    ] == [0, 2, 3, 0, 2]
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
