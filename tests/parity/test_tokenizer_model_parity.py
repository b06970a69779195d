"""tokenizer.model alone: the ids and texts of SentencePiece itself."""

import json
import shutil
from pydoc_data import topics
from unicodedata import category

import pytest
from test_sentencepiece_parity import RUNS, texts
from test_tokenizer_parity import PIECES
from trained_sentencepiece import USER_DEFINED, train_model

from pyloss import FormatError
from pyloss.models.text.gguf_vocabulary import vocabulary_metadata
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

OWN = ["<b>", "</b>"]
SPACES = [piece for piece in USER_DEFINED if piece != "\n\n"]
MODELS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "gemma": {"add_dummy_prefix": False, "user_defined_symbols": USER_DEFINED},
    "own pieces behind a prefix": {"user_defined_symbols": SPACES},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "older bpe": {"byte_fallback": False, "remove_extra_whitespaces": True,
                  "normalization_rule_name": "nmt_nfkc"},
    "unigram": {"model_type": "unigram"},
    "unigram without bytes": {"model_type": "unigram", "byte_fallback": False,
                              "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "unigram with own pieces": {"model_type": "unigram", "user_defined_symbols": OWN},
    "unigram without a prefix": {"model_type": "unigram", "add_dummy_prefix": False,
                                 "user_defined_symbols": OWN},
}  # fmt: skip
#: texts that SentencePiece and `tokenizers` normalize alike
MORE = [
    "", " ", "   ", "a", " a", "a ", "  a  b  ", "a\nb", "a\tb\r\nc", "<0x41> <0x0A>", "½ ﬁ Å ①", "ＡＢＣ　ｄｅ",
    "Zoë naïve café", "日本語のテキスト", "한국어", "العربية", "हिन्दी", "🙂👩‍👩‍👧", "𝔘𝔫𝔦", "﷽", "x" * 300, "1234567890",
    "▁", "▁▁a", "a▁b", "<b>bold</b> and", "▁▁ <b>", "\u200b", "ı İ ß", "e\u0301", "....", "\u00a0a\u00a0",
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """(SentencePiece's processor, our tokenizer, the folder) of one model."""
    folder = tmp_path_factory.mktemp("spm")
    own = topics.topics.values()  # the same text, whatever this repository says
    theirs = train_model(folder, PIECES, own, **MODELS[request.param])
    shutil.copy(folder / "m.model", folder / "tokenizer.model")
    return theirs, Tokenizer.from_folder(folder), folder


def comparable(ours):
    """Texts without what `tokenizers` does otherwise.

    It drops a mark behind a character that a charsmap replaces, its unigram model knows the names
    of bytes and breaks ties in float64, and added tokens are found before spaces become U+2581.
    """
    mapped = "Precompiled" in ours.backend.to_str()
    added = ours.backend.token_to_id("  ") is not None
    named = "Unigram" in str(ours.backend.model)
    plain = texts()[:-RUNS] if named else texts()
    return [
        *[t for t in plain if not mapped or not any(category(c)[0] == "M" for c in t)],
        *[t for t in MORE if (not named or "<0x" not in t) and (not added or "▁" not in t)],
    ]


def test_the_same_tokens(both):
    theirs, ours, _ = both
    for text in comparable(ours):
        got = ours.encode(text, add_special_tokens=False)
        assert got == theirs.encode(text), (text, theirs.encode(text, out_type=str))


def test_the_same_text(both):
    theirs, ours, _ = both
    for text in comparable(ours):
        ids = theirs.encode(text)
        if theirs.unk_id() in ids:
            continue
        assert ours.decode(ids) == theirs.decode(ids), text
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.add, ids), stream.flush()]) == theirs.decode(ids)


def test_special_tokens(both):
    theirs, ours, _ = both
    bos, turn = theirs.bos_id(), theirs.piece_to_id("<end_of_turn>")
    assert ours.encode("a") == [bos, *theirs.encode("a")]
    assert ours.encode("a<end_of_turn>b") == [bos, *theirs.encode("a"), turn, *theirs.encode("b")]
    assert ours.eos_token_ids == {theirs.eos_id()} and ours.unk_token_id == theirs.unk_id()
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", None)
    assert len(ours) == theirs.vocab_size()


def test_it_is_saved_as_tokenizer_json(both, tmp_path):
    _, ours, _ = both
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in [*texts()[:100], *MORE]:
        assert again.encode(text) == ours.encode(text)


def test_options_of_the_configuration(both, tmp_path):
    theirs, _, folder = both
    shutil.copy(folder / "tokenizer.model", tmp_path)
    size, turn = theirs.vocab_size(), theirs.piece_to_id("<end_of_turn>")
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": "<end_of_turn>",
        "added_tokens_decoder": {str(size + 1): {"content": "<mask>", "special": True}},
        "chat_template": "{{ messages[0]['content'] }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a") == [*theirs.encode("a"), turn]
    assert ours.encode("<new><mask>", add_special_tokens=False) == [size, size + 1]
    assert ours.eos_token == "<end_of_turn>" and ours.bos_token == "<s>"
    assert ours.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size + 5}))
    with pytest.raises(FormatError, match="added_tokens.json.*does not follow the vocabulary"):
        Tokenizer.from_folder(tmp_path)


def test_legacy_false_puts_no_space_behind_special_tokens(both, tmp_path):
    theirs, ours, folder = both
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    modern = Tokenizer.from_folder(tmp_path)
    for text in texts() if "Precompiled" not in ours.backend.to_str() else ():
        if text.lstrip() == text and not text.startswith("▁"):
            assert modern.encode(text) == ours.encode(text), text
    first = theirs.encode("a")
    ids = modern.encode("a<end_of_turn>xa")
    assert ids[1 : 1 + len(first)] == first
    assert modern.decode(ids[2 + len(first) :]).endswith("xa")
    if ours.encode("a<end_of_turn>b") != modern.encode("a<end_of_turn>b"):
        assert ours.decode(ours.encode("a<end_of_turn>b")).endswith("> b")


def test_as_gguf(both):
    """A model of Llama's or Gemma's kind is written; others are refused by a sentence."""
    theirs, ours, _ = both
    try:
        metadata = vocabulary_metadata(ours, len(ours))
    except ValueError as error:
        assert str(error).startswith("the tokenizer cannot be written as GGUF")
        return
    again = Tokenizer.from_gguf(metadata)
    for text in texts()[:200]:
        assert again.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_files_that_are_refused(both, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    *_, folder = both
    content = (folder / "tokenizer.model").read_bytes()

    def changed(change):
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(content)
        change(proto)
        return proto.SerializeToString()

    def model_type(number):
        return lambda proto: setattr(proto.trainer_spec, "model_type", number)

    cases = [
        (b"", "not a model of SentencePiece"),
        (b"IQ== 0\nIg== 1\n", "not a model of SentencePiece"),  # as Llama 3's tokenizer.model
        (content.replace("▁".encode(), b"\xff\x96\x81", 1), "expected different texts in UTF-8"),
        (content[:-3], "not a model of SentencePiece"),
        (changed(model_type(4)), "models of characters are not supported"),
        (changed(lambda p: setattr(p.pieces[5], "piece", p.pieces[6].piece)), "different texts"),
        (changed(lambda p: setattr(p.pieces[900 - 1], "score", float("nan"))), "finite numbers"),
        (changed(lambda p: setattr(p.trainer_spec, "treat_whitespace_as_suffix", True)), "suffix is not supported"),
        (changed(lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"\xff\xff\xff\xffaa")), "precompiled_charsmap: its trie has"),
    ]  # fmt: skip
    for data, message in cases:
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)
