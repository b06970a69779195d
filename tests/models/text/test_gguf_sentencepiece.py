"""SentencePiece's BPE in GGUF files: merges by score, bytes, spaces, special tokens, damage."""

import numpy as np
import pytest
import tokenizers

from pyloss import FormatError
from pyloss.models.text.gguf_vocabulary import vocabulary_metadata
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
    return Tokenizer.from_gguf(
        {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None},
        "m.gguf",
    )


def pieces(tok, text):
    return [TOKENS[index] for index in tok.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["▁a"]),
        # The merge with the highest score comes first; the scores of its parts do not matter.
        ("abc", ["▁a", "bc"]),
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
    # llama.cpp's values for missing keys.
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id) == (1, 2, 0)
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


@pytest.mark.parametrize("prefix", [True, False])
def test_written_into_gguf_again(tmp_path, prefix):
    tok = tokenizer(add_space_prefix=prefix)
    tok.save(tmp_path)
    metadata = vocabulary_metadata(Tokenizer.from_folder(tmp_path), len(TOKENS) + 1)
    assert (
        metadata["tokenizer.ggml.model"] == "llama"
        and metadata["tokenizer.ggml.add_space_prefix"] == prefix
    )
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds == [2, 3, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4, 1, 5]
    again = Tokenizer.from_gguf(metadata)
    for text in ("abc  a", " é<end_of_turn> ab", "", "cabbbac a  a   a"):
        assert again.encode(text) == tok.encode(text)


def folder_tokenizer(merges=(("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")), **changes):
    words = {word: i for i, word in enumerate(["a", "b", "c", "ab", "bc", "abc", "▁"])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=words, merges=list(merges), byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    for key, value in changes.items():
        setattr(backend, key, value)
    return Tokenizer(backend, {})


def test_kinds_of_folders():
    space = tokenizers.pre_tokenizers.Metaspace

    def prefix(**changes):
        return vocabulary_metadata(folder_tokenizer(**changes), 7)[
            "tokenizer.ggml.add_space_prefix"
        ]

    assert prefix() is False
    assert (
        prefix(pre_tokenizer=tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")) is False
    )
    assert (
        prefix(normalizer=None, pre_tokenizer=space(prepend_scheme="always", split=False)) is True
    )
    assert (
        prefix(normalizer=None, pre_tokenizer=space(prepend_scheme="never", split=False)) is False
    )
    with pytest.warns(UserWarning, match="after special tokens"):
        assert (
            prefix(normalizer=None, pre_tokenizer=space(prepend_scheme="first", split=False))
            is True
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"merges": [("a", "b"), ("b", "c"), ("a", "bc")]},
            "'ab' and 'c' are pieces that it does not merge",
        ),
        (
            {"merges": [("ab", "c"), ("b", "c"), ("a", "bc"), ("a", "b")]},
            "merges that make 'abc' are not next to each other",
        ),
        ({"normalizer": tokenizers.normalizers.NFKC()}, "its normalizer is .*NFKC"),
        (
            {"normalizer": None, "pre_tokenizer": tokenizers.pre_tokenizers.Metaspace(split=True)},
            "its pre-tokenizer .*Metaspace",
        ),
    ],
)
def test_folders_that_scores_cannot_describe(changes, message):
    with pytest.raises(ValueError, match=f"the tokenizer cannot be written as GGUF: .*{message}"):
        vocabulary_metadata(folder_tokenizer(**changes), 7)


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


def joined(text, scores):
    """SentencePiece's rule: merge the pair with the highest score, the leftmost of several."""
    parts = list(text)
    while True:
        pairs = [
            (-scores[a + b], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in scores
        ]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def test_runs_of_one_score(tmp_path):
    """Like Llama's runs of spaces."""
    runs = ["▁" * n for n in (3, 4, 5, 7, 12)]
    tokens = [*TOKENS[: FIRST + len(PIECES)], *runs]
    scores = dict(zip(PIECES, map(float, range(0, -len(PIECES), -1)), strict=True)) | dict.fromkeys(
        ["▁▁", *runs], -1e9
    )
    kinds = [2, 3, 3, 3] + [6] * 256 + [1] * (len(PIECES) + len(runs))
    tok = tokenizer(
        tokens=tokens, token_type=kinds, scores=[scores.get(token, 0.0) for token in tokens]
    )
    tok.save(tmp_path)
    again = Tokenizer.from_gguf(vocabulary_metadata(Tokenizer.from_folder(tmp_path), len(tokens)))
    rng = np.random.default_rng(0)
    texts = [" " * n for n in range(1, 40)] + [
        "".join(rng.choice(list("  abc"), 30)) for _ in range(100)
    ]
    for text in texts:
        ids = tok.encode(text, add_special_tokens=False)
        assert [tokens[i] for i in ids] == joined("▁" + text.replace(" ", "▁"), scores), text
        assert again.encode(text, add_special_tokens=False) == ids


def test_scores_without_an_order():
    with pytest.raises(
        ValueError, match=r"m.gguf: tokenizer.ggml.scores: '▁a' and 'bc' have the same, 0.0"
    ):
        tokenizer(scores=[0.0] * len(TOKENS))
