"""LFM2: short convolutions in place of attention in some layers."""

import numpy as np
import pytest
from slopes import gradient_error

import pyloss
from pyloss.errors import FormatError
from pyloss.models.config import ModelConfig
from pyloss.models.synthetic import random_model

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
}


def model(**options):
    return random_model(ModelConfig("lfm2", **SIZES, **options))


def adapted(net, rank=3):
    """LoRA over all linear layers, with the convolutions themselves trained."""
    pyloss.linear_to_lora_layers(
        net, -1, {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": None}
    )
    rng = np.random.default_rng(5)
    for name, array in net.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = rng.standard_normal(array.shape) / 8
    for layer in net.layers:
        if layer.self_attn.taps:
            layer.conv.conv.unfreeze()
    return net


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_a_model_in_float64(biased):
    small = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 3,
    }  # fmt: skip
    types = ["conv", "full_attention", "conv"]
    config = ModelConfig("lfm2", **small, layer_types=types, conv_bias=biased)
    net = adapted(random_model(config), rank=1)
    names = net.trainable_parameters()
    for part in ("conv.in_proj.lora_a", "conv.out_proj.lora_b", "feed_forward.w2.lora_a", "conv.conv.weight"):  # fmt: skip
        assert f"model.layers.2.{part}" in names
    assert ("model.layers.0.conv.conv.bias" in names) == biased
    tokens = np.random.default_rng(1).integers(0, 17, 11).astype(np.int32)
    offsets = np.array([0, 4, 5, 11], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


def test_packed_sequences_do_not_see_each_other():
    """Also sequences that are shorter than the convolution, whose bits are those of each alone."""
    net, rng = model(conv_L_cache=4), np.random.default_rng(2)
    parts = [rng.integers(0, 29, n).astype(np.int32) for n in (1, 2, 3, 9, 1, 30)]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    packed = net.hidden(np.concatenate(parts), offsets)
    taps = net.layers[0].conv.conv.weight
    x = rng.standard_normal((len(packed), 72)).astype(np.float32)
    mixed = pyloss.ops.short_conv(x, taps, None, offsets)
    for part, begin, end in zip(parts, offsets, offsets[1:], strict=False):
        alone = net.hidden(part, np.array([0, len(part)], np.int32))
        np.testing.assert_allclose(packed[begin:end], alone, rtol=1e-6, atol=2e-6)
        one = pyloss.ops.short_conv(x[begin:end], taps, None, np.array([0, len(part)], np.int32))
        np.testing.assert_array_equal(mixed[begin:end], one)


def test_checkpointed_layers_have_the_same_gradients():
    net = adapted(model()).train()
    batch = np.random.default_rng(3).integers(0, 29, (3, 21)).astype(np.int32)
    lengths = np.array([[1, 21], [7, 13], [1, 2]], np.int32)
    step = pyloss.nn.value_and_grad(net, pyloss.tuner.default_loss)
    (loss, _), grads = step(net, batch, lengths)
    net.set_grad_checkpoint(True)
    (again, _), others = step(net, batch, lengths)
    assert again == loss
    for name, grad in grads.items():
        np.testing.assert_array_equal(others[name], grad)
        assert grad.any()


def test_a_long_prompt_in_parts_and_one_token_at_a_time():
    """The cache drops the rows before a convolution's reach and keeps these."""
    net = model(conv_L_cache=5)
    tokens = np.random.default_rng(4).integers(0, 29, 300)
    want = net(tokens[None])[0]
    for sizes in ([1] * 300, [3, 1, 1, 200, 1, 1, 93], [299, 1]):
        cache, at = net.make_cache(), 0
        for n in sizes:
            got = net.step(tokens[at : at + n], cache)
            at += n
            np.testing.assert_allclose(got, want[at - 1], rtol=0, atol=5e-5)


def gguf(**changes):
    values = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 40,
        "attention.head_count": 4, "attention.head_count_kv": [0, 2, 0], "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6, "shortconv.l_cache": 3,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {
        "general.architecture": "lfm2",
        **{f"lfm2.{key}": value for key, value in values.items() if value is not None},
    }


def test_gguf():
    from pyloss.io.tensor_file import StoredTensor

    tensors = {
        name: StoredTensor("m.gguf", name, "F32", (29, 24), np.zeros(4 * 29 * 24, np.uint8))
        for name in ("token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(3)))
    }

    def read(**changes):
        return ModelConfig.from_gguf(gguf(**changes), tensors, "m.gguf")

    config = read()
    assert config.layer_types == ["conv", "full_attention", "conv"]
    assert (config.num_key_value_heads, config.conv_L_cache, config.head_dim) == (2, 3, 6)
    assert read(attention__head_count_kv=2).layer_types == ["full_attention"] * 3
    for changes, message in (
        ({"attention__head_count_kv": [0, 2, 1]}, "0 or one number for all layers"),
        ({"attention__head_count_kv": [0, 2]}, "layer_types names 2 layers"),
        ({"attention__head_count_kv": [0, -2, 0]}, "head_count_kv"),
        ({"shortconv__l_cache": 0}, "shortconv.l_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)
    with pytest.raises(FormatError, match="shortconv.l_cache: this key is missing"):
        read(shortconv__l_cache=None)
