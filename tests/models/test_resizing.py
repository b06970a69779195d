"""New tokens of a model and its tokenizer."""

import numpy as np
import pytest
import tiny
from stored_weights import stored

import pyloss
from pyloss.models import add_tokens, load_model
from pyloss.nn import Embedding
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter

NEW = ["<think>", "</think>"]


def load(folder, tied=True, **options):
    tiny.write_folder(folder, vocab_size=tiny.TOKENS, tied=tied, **options)
    return load_model(folder), tiny.byte_tokenizer()


def logits(model, ids):
    return np.array(pyloss.autograd.data(model(np.asarray([ids]))))[0]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_others(tmp_path, tied, dtype):
    model, tokenizer = load(tmp_path / "model", tied, dtype=dtype)
    ids = tokenizer.encode("hello")
    before = logits(model, ids)
    table = model.model.embed_tokens.weight.dequantize()
    assert add_tokens(model, tokenizer, [*NEW, "h"]) == [
        tiny.TOKENS, tiny.TOKENS + 1, *tokenizer.encode("h", add_special_tokens=False),
    ]  # fmt: skip
    assert model.vocab_size == len(tokenizer) == tokenizer.highest_id + 1 == tiny.TOKENS + 2
    assert tokenizer.encode("a<think>b", add_special_tokens=False)[1] == tiny.TOKENS
    after = logits(model, [*ids, tiny.TOKENS])
    np.testing.assert_array_equal(after[: len(ids), : tiny.TOKENS], before)
    grown = model.model.embed_tokens.weight
    assert grown.format == dtype and grown.shape == (tiny.TOKENS + 2, 32)
    np.testing.assert_allclose(
        grown.dequantize()[-1],
        table.mean(axis=0),
        rtol=1e-2 if dtype == "bf16" else 1e-5,
        atol=1e-6,
    )
    model.save(tmp_path / "saved", tokenizer)
    again, other = pyloss.models.load(tmp_path / "saved")
    assert other.encode("a<think>b") == tokenizer.encode("a<think>b")
    np.testing.assert_array_equal(
        logits(again, [*ids, tiny.TOKENS]), logits(model, [*ids, tiny.TOKENS])
    )


def test_padded_tables_have_room(tmp_path):
    tiny.write_folder(tmp_path / "model", vocab_size=tiny.TOKENS + 8)
    model, tokenizer = load_model(tmp_path / "model"), tiny.byte_tokenizer()
    table = model.model.embed_tokens
    assert add_tokens(model, tokenizer, NEW) == [tiny.TOKENS, tiny.TOKENS + 1]
    assert model.model.embed_tokens is table and not model.own_tables


@pytest.mark.parametrize("format", ["affine4", "q8_0", "nf4", "mxfp4"])
def test_quantized_tables(tmp_path, format):
    """Rows of blocks keep their bytes; a format that is only read becomes float32."""
    model, tokenizer = load(tmp_path / "model", tied=False)
    before = stored(np.random.default_rng(0), tiny.TOKENS, 32, format)
    model.model.embed_tokens = Embedding.from_weight(before)
    add_tokens(model, tokenizer, NEW)
    after = model.model.embed_tokens.weight
    assert after.format == ("f32" if format == "mxfp4" else format)
    assert after.shape == (tiny.TOKENS + 2, 32)
    rows, old = after.dequantize(), before.dequantize()
    if format == "nf4":  # whose scales are quantized together
        np.testing.assert_allclose(rows[: tiny.TOKENS], old, rtol=0, atol=np.abs(old).max() / 8)
    else:
        np.testing.assert_array_equal(rows[: tiny.TOKENS], old)
    np.testing.assert_allclose(rows[-1], old.mean(axis=0), rtol=0, atol=np.abs(old).max() / 8)


@pytest.mark.parametrize("format", ["mlx", "peft"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_carry_the_tables(tmp_path, tied, format):
    model, tokenizer = load(tmp_path / "model", tied)
    new = add_tokens(model, tokenizer, NEW)
    settings = {"rank": 2, "scale": 2.0, "trainable_token_indices": new}
    linear_to_lora_layers(model, -1, settings)
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array += 0.2 * rng.standard_normal(array.shape).astype(np.float32)
    save_adapter(model, tmp_path / "a", format)
    again = load_adapters(load_model(tmp_path / "model"), tmp_path / "a")
    ids = [*tokenizer.encode("hello"), *new]
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))
    assert again.vocab_size == tiny.TOKENS + 2


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("<a>", TypeError, "tokens must be a list of texts"),
        ([1], TypeError, "tokens must be a list of texts"),
        ([""], ValueError, "a token must not be empty"),
    ],
)
def test_tokens_that_cannot_be(tmp_path, tokens, error, message):
    model, tokenizer = load(tmp_path / "model")
    with pytest.raises(error, match=message):
        add_tokens(model, tokenizer, tokens)


def test_adapted_tables_are_refused(tmp_path):
    model, tokenizer = load(tmp_path / "model")
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0, "keys": ["model.embed_tokens"]})
    with pytest.raises(ValueError, match="model.embed_tokens has an adapter; fuse"):
        add_tokens(model, tokenizer, NEW)
    assert len(tokenizer) == tiny.TOKENS
