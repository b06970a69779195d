"""`load` has one home, above models and adapters; test_mlx_names.py tests its arguments.

Also what it refuses before it reads weights.
"""

import pytest
import tiny

import pyloss
from pyloss import models
from pyloss.describing import describe_model
from pyloss.loading import load, load_tokenizer
from pyloss.models.files.gguf_writer import write_gguf


def test_load_has_one_home_and_two_more_names():
    assert models.load is pyloss.load is load


def folder_of(place, vocab_size, **options):
    tiny.write_folder(place, vocab_size=vocab_size, **options)
    tiny.byte_tokenizer().save(place)
    return place


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path):
    """Its first texts go on; one with a token that the model lacks is refused."""
    folder_of(tmp_path, tiny.TOKENS - 2)
    with pytest.warns(UserWarning, match=r"the tokenizer has 2 tokens more than the model, 265"):
        model, tokenizer = load(tmp_path)
    assert len(list(pyloss.stream_generate(model, tokenizer, "he", max_tokens=2))) == 2
    with pytest.raises(ValueError, match=r"token id 265 .* outside the vocabulary \[0, 265\)"):
        list(pyloss.stream_generate(model, tokenizer, "he w", max_tokens=2))
    described = [line for line in describe_model(tmp_path) if "tokens" in line]
    assert any("267 tokens, 2 more than the model" in line for line in described)


def test_an_embedding_larger_than_the_tokenizer_is_usual(tmp_path, recwarn):
    model, tokenizer = load(folder_of(tmp_path, tiny.TOKENS + 50))
    assert model.vocab_size == len(tokenizer) + 50 and not recwarn.list


def test_a_pre_tokenizer_is_refused_before_weights_are_read(tmp_path):
    model, tokenizer = load(folder_of(tmp_path / "hf", tiny.TOKENS))
    write_gguf(model, tmp_path / "m.gguf", tokenizer)
    data = (tmp_path / "m.gguf").read_bytes()
    for name in ("smollm", "output_norm.weight"):  # a pre-tokenizer and a tensor of other names
        data = data.replace(name.encode(), b"x" * len(name))
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.ggml.pre 'xxxxxx' is not supported"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_tokenizer_alone_is_that_of_the_model(tmp_path, monkeypatch, form):
    tiny.write_folder(tmp_path / "plain", vocab_size=tiny.TOKENS)
    model, place = models.load_model(tmp_path / "plain"), tmp_path / "base"
    model.save(place, tiny.byte_tokenizer())
    if form == "gguf":
        pytest.importorskip("gguf", reason="writes a GGUF file")
        place = tmp_path / "base.gguf"
        write_gguf(model, place, tiny.byte_tokenizer())
    whole = load(place)[1]
    monkeypatch.setattr("pyloss.loading.read_model", lambda *a: pytest.fail("the model was read"))
    if form == "folder":
        (place / "model.safetensors").unlink()
    alone = load_tokenizer(place)
    assert alone.encode("naïve text") == whole.encode("naïve text")
    assert alone.chat_template == whole.chat_template
    assert alone.eos_token_ids == whole.eos_token_ids
    with pytest.raises(FileNotFoundError, match="no model at 'none'"):
        load_tokenizer("none")
