"""SentencePiece's BPE vocabularies in GGUF files: merges by scores, bytes, spaces, special tokens, damage."""

import pytest

from pyloss import FormatError
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<end_of_turn>"]
PIECES = ["▁a", "bc", "ab", "▁ab", "▁▁", "abc", "▁", "a", "b", "c"]
TOKENS = [*SPECIAL, *BYTES, *PIECES, "  ", "[PAD]"]
FIRST = 4 + 256


def tokenizer(**changes):
    values = {
        "model": "llama",
        "tokens": TOKENS,
        "scores": [0.0] * FIRST + [-float(i) for i in range(len(PIECES))] + [-1000.0, -1000.0],
        "token_type": [2, 3, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4, 5],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}, "m.gguf")


def pieces(tok, text):
    return [TOKENS[index] for index in tok.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["▁a"]),
        ("abc", ["▁a", "bc"]),  # the joined piece with the highest score first, whatever the left or right would give
        ("cabc", ["▁", "c", "abc"]),
        ("bab", ["▁", "b", "ab"]),
        (" a", ["▁", "▁a"]),
        ("", []),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("a<end_of_turn>a", ["▁a", "<end_of_turn>", "▁a"]),
        ("a  b", ["▁a", "  ", "▁", "b"]),
        ("[PAD]", ["▁", "<0x5B>", "<0x50>", "<0x41>", "<0x44>", "<0x5D>"]),
    ],
)
def test_pieces(text, expected):
    assert pieces(tokenizer(), text) == expected


def test_without_a_space_of_its_own():
    tok = tokenizer(add_space_prefix=False)
    assert pieces(tok, "abc a") == ["abc", "▁a"]
    assert tok.decode(tok.encode(" abc", add_special_tokens=False)) == " abc"


def test_special_tokens():
    tok = tokenizer(bos_token_id=None, eos_token_id=None)
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id) == (1, 2, 0)  # llama.cpp's where the file is silent
    assert tok.encode("a") == [1, TOKENS.index("▁a")]
    assert tokenizer(add_bos_token=False, add_eos_token=True).encode("a") == [TOKENS.index("▁a"), 2]
    assert tok.eos_token_ids == {2, 3}
    assert tokenizer(eot_token_id=1).eos_token_ids == {1, 2}


def test_characters_of_several_bytes_come_whole():
    tok = tokenizer()
    text = "a→ é bc→→"
    ids = tok.encode(text, add_special_tokens=False)
    assert tok.decode(ids) == text
    stream = StreamDecoder(tok)
    parts = [*map(stream.add, ids), stream.flush()]
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)


def test_a_folder_saved_from_it_gives_the_same(tmp_path):
    tok = tokenizer()
    tok.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in ("abc  a", " é<end_of_turn> ab", ""):
        assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores", f"a list of {len(TOKENS)} numbers"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores", f"a list of {len(TOKENS)} numbers"),
        ({"scores": [0] * len(TOKENS)}, "tokenizer.ggml.scores", "numbers"),
        ({"scores": [float("nan")] * len(TOKENS)}, "tokenizer.ggml.scores", "finite"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type", "one per token"),
        ({"add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix", "true or false"),
        ({"tokens": ["<unk>"] * len(TOKENS)}, "tokenizer.ggml.tokens", "occurs twice"),
    ],
)
def test_damage_is_named(changes, what, message):
    with pytest.raises(FormatError, match=message) as caught:
        tokenizer(**changes)
    assert (caught.value.path, caught.value.what) == ("m.gguf", what)


def test_scores_without_an_order():
    with pytest.raises(ValueError, match=r"m.gguf: tokenizer.ggml.scores: '▁a' and 'bc' have the same, 0.0"):
        tokenizer(scores=[0.0] * len(TOKENS))
