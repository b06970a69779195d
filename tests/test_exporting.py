"""`export`: every format from a tiny model, which stays unchanged."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss.io.gguf import read_gguf
from pyloss.models import conversion, load, load_model
from pyloss.tuner import linear_to_lora_layers, load_adapters

IDS = np.arange(30)[None] * 11 % tiny.TOKENS


def logits(model):
    return pyloss.autograd.data(model(IDS))


@pytest.fixture
def plain(tmp_path):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS)
    return load_model(tmp_path / "base")


@pytest.fixture
def model(plain):
    linear_to_lora_layers(
        plain, -1, {"rank": 3, "scale": 1.5, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    )
    rng = np.random.default_rng(0)
    for array in plain.trainable_parameters().values():
        array[...] = rng.normal(0, 0.3, array.shape)
    return plain


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_adapters(model, tmp_path, to):
    pyloss.export(model, tmp_path / "a", to, name="base")
    again = load_model(tmp_path / "base")
    load_adapters(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), logits(model))


def test_models(model, tmp_path):
    before, names = logits(model), set(model.trainable_parameters())
    tokenizer = tiny.byte_tokenizer()
    pyloss.export(model, tmp_path / "hf", "hf", tokenizer)
    pyloss.export(model, tmp_path / "new" / "m.gguf", "gguf", tokenizer, name="mine")
    pyloss.export(model, tmp_path / "half.gguf", "gguf", tokenizer, type="f16")
    pyloss.export(model, tmp_path / "lora.gguf", "gguf", adapter_only=True)
    assert set(model.trainable_parameters()) == names
    np.testing.assert_array_equal(logits(model), before)
    for place in (tmp_path / "hf", tmp_path / "new" / "m.gguf"):
        again, text = load(place)
        np.testing.assert_allclose(logits(again), before, rtol=0, atol=1e-4)
        assert text.encode("hello w12") == tokenizer.encode("hello w12")
    assert read_gguf(tmp_path / "new" / "m.gguf").metadata["general.name"] == "mine"
    assert {
        t.dtype for t in read_gguf(tmp_path / "half.gguf").tensors.values() if len(t.shape) == 2
    } == {"F16"}
    assert len(read_gguf(tmp_path / "lora.gguf").tensors) == 2 * 3 * 2


@pytest.mark.parametrize("kept", [False, True])
def test_over_a_quantized_base(tmp_path, kept, recwarn):
    """Folders and GGUF files of other types cannot hold the base's format; nothing is lost."""
    tiny.write_gguf(tmp_path / "base.gguf", format="Q4_0", vocab_size=tiny.TOKENS)
    model = load_model(tmp_path / "base.gguf")
    linear_to_lora_layers(model, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    before, tokenizer = logits(model), tiny.byte_tokenizer()
    pyloss.export(model, tmp_path / "hf", "hf", tokenizer)
    pyloss.export(model, tmp_path / "f32.gguf", "gguf", tokenizer, type="f32")
    assert not recwarn.list
    for place in ("hf", "f32.gguf"):
        np.testing.assert_allclose(logits(load_model(tmp_path / place)), before, rtol=0, atol=1e-4)
    if kept:
        pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, dequantize=True)
    else:
        names = set(model.trainable_parameters())
        for type in (None, "q4_0", "q4_1"):
            with pytest.raises(
                ValueError, match=r"would keep 0% .*--dequantize --type q8_0 .*--adapter-only"
            ):
                pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, type=type)
        assert set(model.trainable_parameters()) == names and not (tmp_path / "same.gguf").exists()
        np.testing.assert_array_equal(logits(model), before)
        for array in model.trainable_parameters().values():
            array *= 2
        before = logits(model)
        pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, type="f16", dequantize=True)
        moved = np.abs(logits(load_model(tmp_path / "base.gguf")) - before).max()
        assert np.abs(logits(load_model(tmp_path / "same.gguf")) - before).max() < 0.05 * moved
        return
    kinds = {
        tensor.dtype
        for name, tensor in read_gguf(tmp_path / "same.gguf").tensors.items()
        if "ffn_up" in name
    }
    assert kinds == {"F32"}
    assert np.abs(logits(load_model(tmp_path / "same.gguf")) - before).max() < 1e-4


def test_a_model_whose_adapter_was_lost_in_fusing_is_not_saved(tmp_path):
    tiny.write_gguf(tmp_path / "base.gguf", format="Q4_0", vocab_size=tiny.TOKENS)
    model = load_model(tmp_path / "base.gguf")
    linear_to_lora_layers(model, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    with pytest.warns(UserWarning, match="storing the fused weight as q4_0"):
        model.fuse()
    with pytest.raises(ValueError, match=r"kept 0% of it.*fuse\(dequantize=True\)"):
        model.save(tmp_path / "out")
    with pytest.raises(ValueError, match="kept 0% of it"):
        pyloss.export(model, tmp_path / "out.gguf", "gguf", tiny.byte_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_over_a_base_in_a_format_that_gguf_does_not_have(plain, tmp_path, recwarn):
    conversion.quantize_model(plain, "q4", 32)
    linear_to_lora_layers(plain, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in plain.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    pyloss.export(plain, tmp_path / "m.gguf", "gguf", tiny.byte_tokenizer())
    assert not recwarn.list
    assert {
        t.dtype for t in read_gguf(tmp_path / "m.gguf").tensors.values() if len(t.shape) == 2
    } == {"F16"}
    np.testing.assert_allclose(
        logits(load_model(tmp_path / "m.gguf")), logits(plain), rtol=0, atol=0.05
    )


def test_a_model_without_an_adapter_is_converted(plain, tmp_path):
    pyloss.export(plain, tmp_path / "m.gguf", "gguf", tiny.byte_tokenizer())
    np.testing.assert_array_equal(logits(load_model(tmp_path / "m.gguf")), logits(plain))
    for to, options in (("peft", {}), ("mlx", {}), ("gguf", {"adapter_only": True})):
        with pytest.raises(ValueError, match="the model has no adapter"):
            pyloss.export(plain, tmp_path / "a", to, **options)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onnx", {}, "to must be one of peft, mlx, gguf, hf, not 'onnx'"),
        ("hf", {"adapter_only": True}, "adapter_only is for 'gguf' alone, not for 'hf'"),
        ("peft", {"type": "f16"}, "type is for 'gguf' alone, not for 'peft'"),
        ("gguf", {"type": "f16", "adapter_only": True}, "type is for whole models"),
        ("gguf", {"type": "q3"}, "type must be one of f32, f16"),
        ("gguf", {"dequantize": True, "adapter_only": True}, "dequantize is for whole models"),
        ("mlx", {"dequantize": True}, "dequantize is for whole models"),
        ("gguf", {"tokenizer": None}, "a GGUF file holds the tokenizer too"),
    ],
)
def test_arguments_that_do_not_go_together(model, tmp_path, to, options, message):
    names = set(model.trainable_parameters())
    with pytest.raises(ValueError, match=message):
        pyloss.export(
            model, tmp_path / "out", to, **{"tokenizer": tiny.byte_tokenizer(), **options}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert set(model.trainable_parameters()) == names
