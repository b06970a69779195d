"""SentencePiece's vocabularies in GGUF files against SentencePiece itself."""

import random

import pytest
from test_tokenizer_parity import PIECES, strings
from trained_sentencepiece import KINDS, SIZE, gguf_metadata, train

from pyloss.models.text.gguf_vocabulary import vocabulary_metadata
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

RUNS = 200  # texts of few characters, the last ones of `texts`


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """(SentencePiece's processor, our tokenizer) of one vocabulary."""
    theirs = train(request.param, tmp_path_factory.mktemp("spm"), PIECES)
    return theirs, Tokenizer.from_gguf(gguf_metadata(theirs, request.param), "m.gguf")


def texts():
    marks = ("<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<unk>")
    made = [text for text in strings() if not any(mark in text for mark in marks)]
    rng = random.Random(1)
    runs = [
        "".join(rng.choices([" ", "  ", "\n", "a", "aa", "--", "b", "ab", "ba"], k=30))
        for _ in range(RUNS)
    ]
    return [text for text in [*made, *runs] if "\x00" not in text]


def test_the_same_tokens(both):
    theirs, ours = both
    assert len(texts()) > 400
    for text in texts():
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text


def test_the_same_text(both):
    theirs, ours = both
    for text in texts():
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.add, ids), stream.flush()]) == text


def test_special_tokens(both):
    theirs, ours = both
    bos, turn = theirs.bos_id(), theirs.piece_to_id("<end_of_turn>")
    assert ours.encode("a") == [bos, *theirs.encode("a")]
    assert ours.encode("a<end_of_turn>b") == [bos, *theirs.encode("a"), turn, *theirs.encode("b")]
    assert ours.eos_token_ids == {theirs.eos_id(), turn}
    assert ours.unk_token_id == theirs.unk_id()


def test_a_folder_of_it_goes_back_into_gguf(both, tmp_path):
    theirs, ours = both
    ours.save(tmp_path)
    again = Tokenizer.from_gguf(vocabulary_metadata(Tokenizer.from_folder(tmp_path), SIZE + 20))
    for text in texts():
        assert again.encode(text, add_special_tokens=False) == theirs.encode(text), text
