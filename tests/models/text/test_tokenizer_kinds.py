"""WordPiece, unigram and word tokenizers in tokenizer.json; tokenizer.model without its package."""

import json
import re
import sys
from pydoc_data import topics

import pytest
import tiny
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pyloss.describing import describe_model
from pyloss.models.text.gguf_vocabulary import vocabulary_metadata
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "<|end|>"]
TEXTS = [
    "", "Hello, world!", "don't stop: it's 3.14 (really)", "The unbelievable tokenizations", "naïve café Zoë",
    "日本語のテキスト", "🙂 emoji 👩‍👩‍👧", "  several   spaces  ", "a\nb\tc", "x = f(1)[2] # comment", "ＡＢＣ ½ ﬁ", "zzzzqqq",
]  # fmt: skip


def wordpiece():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=SPECIAL, show_progress=False
    )


def unigram():
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )
    return backend, trainer


def words():
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend, trainers.WordLevelTrainer(
        vocab_size=900, special_tokens=SPECIAL, show_progress=False
    )


KINDS = {"wordpiece": wordpiece, "unigram": unigram, "words": words}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """(the library's tokenizer, ours from its folder)"""
    backend, trainer = KINDS[request.param]()
    backend.train_from_iterator(list(topics.topics.values())[:40], trainer)
    bos, end = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", bos), ("[SEP]", end)]
    )
    folder = tmp_path_factory.mktemp(request.param)
    backend.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return backend, Tokenizer.from_folder(folder)


def test_ids(both):
    theirs, ours = both
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        plain = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == plain
    assert ours.encode("a<|end|>b", add_special_tokens=False).count(3) == 1
    assert ours.eos_token_ids == {3} and ours.bos_token_id == 1 and ours.unk_token_id == 0


def test_text(both):
    theirs, ours = both
    for text in TEXTS:
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
            stream = StreamDecoder(ours, skip)
            streamed = "".join([*map(stream.add, ids), stream.flush()])
            assert streamed == ours.decode(ids, skip), (text, skip)


def test_round_trips(both):
    _, ours = both
    kind = type(ours.backend.model).__name__
    for text in ("the value is returned", "an attribute of objects"):
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text, kind


def test_they_are_saved(both, tmp_path):
    _, ours = both
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_gguf_has_no_place_for_them(both):
    _, ours = both
    with pytest.raises(ValueError, match="the tokenizer cannot be written as GGUF"):
        vocabulary_metadata(ours, len(ours))


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf.message"])
def test_a_tokenizer_model_names_the_package_that_it_needs(tmp_path, monkeypatch, missing):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, missing, None)
    hint = r"tokenizer.model: there is no tokenizer.json beside it.* 'pyloss\[sentencepiece\]'"
    with pytest.raises(ImportError, match=hint):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    lines = describe_model(tmp_path)
    assert any(re.match(f"tokenizer: none that can be read .*{hint}", line) for line in lines)


def test_a_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
