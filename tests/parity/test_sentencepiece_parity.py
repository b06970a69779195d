"""SentencePiece's vocabularies in GGUF files against SentencePiece itself, whose model is trained here as Llama's and Gemma's were."""

import random
from pathlib import Path

import pytest
from test_tokenizer_parity import PIECES, strings

sentencepiece = pytest.importorskip("sentencepiece", reason="compares with SentencePiece (parity extra)")

from pyloss.models.tokenizer import StreamDecoder, Tokenizer

USER_DEFINED = ["▁▁", "▁▁▁▁", "\n\n", "<b>", "</b>"]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def both(request, tmp_path_factory):
    """(SentencePiece's processor, our tokenizer) of a vocabulary with the options of a family."""
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    repository = Path(__file__).parents[2]
    own = [path.read_text() for path in sorted([*repository.glob("*.md"), *repository.glob("docs/*.md")])]
    text.write_text("\n".join([*own, *(piece.replace("\x00", "") for piece in PIECES)]))
    gemma = request.param == "gemma"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "m"), model_type="bpe", vocab_size=900, character_coverage=0.99,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=not gemma, num_threads=1, minloglevel=2,
        user_defined_symbols=USER_DEFINED if gemma else [], control_symbols=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "m.model"))
    return theirs, Tokenizer.from_gguf(gguf_metadata(theirs, USER_DEFINED if gemma else [], not gemma), "m.gguf")


def gguf_metadata(processor, user_defined, prefix):
    """As llama.cpp's converter writes it."""
    tokens, kinds = [], []
    for index in range(processor.get_piece_size()):
        kind = 2 if processor.is_unknown(index) else 3 if processor.is_control(index) else 6 if processor.is_byte(index) else 1
        text = processor.id_to_piece(index)
        if text in user_defined:
            text, kind = text.replace("▁", " "), 4
        tokens.append(text)
        kinds.append(kind)
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [processor.get_score(index) for index in range(len(tokens))],
        "token_type": kinds,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_space_prefix": prefix,
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def texts():
    marks = ("<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<unk>")
    made = [text for text in strings() if not any(mark in text for mark in marks)]
    rng = random.Random(1)
    runs = ["".join(rng.choices([" ", "  ", "\n", "a", "aa", "--", "b", "ab", "ba"], k=30)) for _ in range(200)]
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
