"""Whether two tokenizers have the same tokens."""

import pytest
import tokenizers

from pyloss.distillation.vocabularies import check_vocabularies
from pyloss.models.tokenizer import Tokenizer


def words(*texts):
    vocabulary = {text: i for i, text in enumerate(texts)}
    return Tokenizer(
        tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=texts[0])), {}
    )


def test_equal_ones_pass():
    check_vocabularies(words("a", "b"), words("a", "b"))


def test_the_first_difference_is_named():
    with pytest.raises(ValueError, match=r"has 3 tokens and the teacher's 3, and id 1 is 'b' in"):
        check_vocabularies(words("a", "b", "c"), words("a", "x", "y"))


def test_a_missing_token_is_named():
    with pytest.raises(ValueError, match=r"id 2 is 'c' in the student's and no token in"):
        check_vocabularies(words("a", "b", "c"), words("a", "b"))
