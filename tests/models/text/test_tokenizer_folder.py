"""Tokenizers from folders: special tokens, end tokens, chat templates, and damage."""

import json
import os

import pytest
from tiny_tokenizer import CHAT, STRINGS, TEMPLATE, tokenizer

from pyloss.errors import FormatError
from pyloss.models.tokenizer import Tokenizer


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
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor"):
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
