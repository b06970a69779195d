"""Qwen3.5 and Qwen3-Next: the gated delta rule in place of attention in most layers."""

import numpy as np
import pytest
from mixer_checks import (
    gguf_tensors,
    packed_as_alone,
    same_through_the_cache,
    same_when_checkpointed,
    with_lora,
)
from slopes import gradient_error
from tiny import TOKENS, byte_tokenizer

import pyloss
from pyloss.io.gguf import read_gguf
from pyloss.models.config import ModelConfig
from pyloss.models.config.delta_net import DeltaNet
from pyloss.models.config.mixture import Mixture
from pyloss.models.files.gguf_writer import GGUFTensor, write_gguf, write_gguf_file
from pyloss.models.synthetic import random_model

TYPES = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "partial_rotary_factor": 0.34,
}


def model(delta=(2, 4, 8, 5, 4), seed=0, family="qwen3_5_text", **changes):
    values = {**SIZES, "layer_types": TYPES, "delta": DeltaNet(*delta), **changes}
    net = random_model(ModelConfig(family, **values))
    rng = np.random.default_rng(seed)
    for layer in net.layers:
        if layer.self_attn.taps:
            mixer = layer.linear_attn
            mixer.conv1d.weight[...] = rng.standard_normal(mixer.conv1d.weight.shape) / 2
            for array in (mixer.A_log, mixer.dt_bias):
                array[...] = rng.standard_normal(array.shape)
    return net


def adapted(net, rank=3):
    """LoRA over all linear layers, with the delta rule's own parameters trained."""
    with_lora(net, rank)
    for layer in net.layers:
        if layer.self_attn.taps:
            layer.linear_attn.conv1d.unfreeze()
            layer.linear_attn.norm.unfreeze()
            layer.linear_attn.unfreeze(recurse=False)
    return net


NEXT = {"family": "qwen3_next", "mixture": Mixture(4, 2, 6, True, shared_size=5)}


@pytest.mark.parametrize("options", [{}, NEXT], ids=["qwen3_5", "qwen3_next"])
def test_gradients_of_a_model_in_float64(options):
    small = {
        "vocab_size": 11, "hidden_size": 6, "intermediate_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 2, "layer_types": TYPES[:2],
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    if options:  # one expert for every token: routing has no gradient, but jumps
        options = {**options, "mixture": Mixture(1, 1, 6, True, shared_size=5)}
    net = adapted(model((2, 4, 3, 2, 3), **small, **options), rank=1)
    names = net.trainable_parameters()
    fused = ("in_proj_qkvz.lora_a", "in_proj_qkvz.lora_b", "in_proj_ba.lora_b")
    apart = ("in_proj_qkv.lora_a", "in_proj_z.lora_b", "in_proj_a.lora_a", "in_proj_b.lora_a")
    own = ("out_proj.lora_a", "conv1d.weight", "norm.weight", "A_log", "dt_bias")
    for part in (*(fused if options else apart), *own):
        assert f"model.layers.0.linear_attn.{part}" in names
    assert "model.layers.1.self_attn.q_proj.lora_a" in names
    tokens = np.random.default_rng(1).integers(0, 11, 8).astype(np.int32)
    offsets = np.array([0, 3, 4, 8], np.int32)
    assert gradient_error(net, tokens, offsets) < 1e-6


def test_packed_sequences_do_not_see_each_other():
    """Also sequences that are shorter than the convolution, whose bits are those of each alone."""

    def delta_rule(rows, rng):
        sizes = {"q": 16, "k": 16, "v": 20, "g": 4, "beta": 4}
        arrays = [rng.standard_normal((rows, n)).astype(np.float32) for n in sizes.values()]
        arrays[3] = -np.abs(arrays[3])
        return arrays, lambda *given: pyloss.ops.delta_rule(*given, 8, 0.3)

    packed_as_alone(model(), (1, 2, 3, 9, 1, 130), delta_rule, 2e-5)


def test_checkpointed_layers_have_the_same_gradients():
    same_when_checkpointed(adapted(model()), 70)


def test_a_long_prompt_in_parts_and_one_token_at_a_time():
    same_through_the_cache(model((2, 2, 16, 16, 5)))


@pytest.mark.parametrize("batched", [False, True])
def test_a_step_that_fails_can_be_repeated(batched, monkeypatch):
    net = model()
    tokens = np.random.default_rng(6).integers(0, 29, 12)
    want = net(tokens[None])[0]
    cache = net.make_batch_cache(3) if batched else net.make_cache()
    if batched:
        cache.enter({1: (4, 20)})

    def step(i):
        if batched:
            return net.step_each(tokens[i : i + 1], cache, [1])[0]
        return net.step(tokens[i : i + 1], cache)

    net.step(tokens[:4], cache.prompt(1) if batched else cache)
    for i in range(4, 12):
        if i in (5, 9):
            with monkeypatch.context() as patch:
                patch.setattr(type(net), "head", lambda *_: 1 / 0)
                cache.next = {} if batched else None
                with pytest.raises(ZeroDivisionError):
                    step(i)
        np.testing.assert_allclose(step(i), want[i], rtol=0, atol=5e-5)


def test_configurations():
    def made(**changes):
        return ModelConfig("qwen3_5_text", **{**SIZES, **changes})

    assert made().layer_types == [*["linear_attention"] * 3, "full_attention"]
    assert made().delta == DeltaNet(4, 4, 6, 6, 4)
    for changes, message in (
        ({"layer_types": ["conv"] * 4}, "must be of full_attention, linear_attention, got"),
        ({"layer_types": TYPES[:3]}, "layer_types names 3 layers"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**changes)
    with pytest.raises(ValueError, match="linear_num_value_heads 3 is not a multiple of"):
        DeltaNet(2, 3)
    with pytest.raises(ValueError, match="linear_conv_kernel_dim is 0"):
        DeltaNet(taps=0)


def gguf(**changes):
    values = {
        "block_count": 3, "context_length": 128, "embedding_length": 24, "feed_forward_length": 40,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 8, "rope.dimension_count": 4, "rope.freq_base": 1e6, "ssm.conv_kernel": 4,
        "ssm.state_size": 8, "ssm.group_count": 2, "ssm.time_step_rank": 2, "ssm.inner_size": 12,
        "full_attention_interval": 2,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {
        "general.architecture": "qwen35",
        **{f"qwen35.{key}": value for key, value in values.items() if value is not None},
    }


def test_gguf():
    tensors = gguf_tensors()

    def read(**changes):
        return ModelConfig.from_gguf(gguf(**changes), tensors, "m.gguf")

    config = read()
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert config.delta == DeltaNet(2, 2, 8, 6, 4)
    assert (config.head_dim, config.rotary_dim) == (8, 4)
    assert read(full_attention_interval=None).layer_types == ["linear_attention"] * 3
    for changes, message in (
        ({"ssm__group_count": 3}, "linear_num_value_heads 2 is not a multiple of"),
        ({"ssm__inner_size": 13}, "ssm.inner_size.*2 heads do not divide 13"),
        ({"ssm__state_size": None}, "ssm.state_size: this key is missing"),
        ({"full_attention_interval": 0}, "full_attention_interval"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)


def test_what_gguf_cannot_describe(tmp_path):
    types = ["linear_attention", "full_attention"] * 2
    for changes, message in (
        ({"delta": (2, 4, 8, 8)}, "layer_types that repeat with one full_attention at the end"),
        ({"layer_types": types}, "linear_value_head_dim 5 cannot be written: llama.cpp needs that"),
    ):
        with pytest.raises(ValueError, match=message):
            write_gguf(model(vocab_size=TOKENS, **changes), tmp_path / "m.gguf", byte_tokenizer())


@pytest.mark.parametrize("format", ["f32", "q8_0", "q4_0"])
def test_heads_of_values_in_llama_cpps_order(format, tmp_path):
    """Twice as many as heads of keys; quantized columns stay where they are in the file."""
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": TOKENS}
    sizes["partial_rotary_factor"] = 0.5
    net = model((2, 6, 32, 32, 4), layer_types=types, **sizes)
    write_gguf(net, tmp_path / "m.gguf", byte_tokenizer(), format)
    again = pyloss.load_model(tmp_path / "m.gguf")
    tokens = np.arange(30)[None] % TOKENS
    if format == "f32":
        np.testing.assert_allclose(again(tokens), net(tokens), rtol=0, atol=1e-4)
    out = again.layers[0].linear_attn.out_proj.weight
    assert (out.columns is None) == (format == "f32")
    write_gguf(again, tmp_path / "again.gguf", byte_tokenizer())
    first, second = (read_gguf(tmp_path / name).tensors for name in ("m.gguf", "again.gguf"))
    for name, tensor in first.items():
        if name.endswith("ssm_a"):  # its logarithm has been rounded
            continue
        np.testing.assert_array_equal(second[name].data, tensor.data, err_msg=name)
    again.save(tmp_path / "hf")
    saved = pyloss.load_model(tmp_path / "hf")
    np.testing.assert_allclose(saved(tokens), again(tokens), rtol=0, atol=1e-4)


def fused_model():
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    sizes = {"hidden_size": 64, "head_dim": 16, "vocab_size": TOKENS, "partial_rotary_factor": 0.5}
    experts = Mixture(4, 2, 32, True, shared_size=32)
    options = {**NEXT, **sizes, "mixture": experts, "intermediate_size": 64}
    return model((2, 6, 32, 32, 4), layer_types=types, **options)


def rewritten(path, change):
    """A GGUF file with other tensors: `change` takes and gives (name, shape, format, bytes)."""
    file = read_gguf(path)
    tensors = [
        (tensor.name, tensor.shape, tensor.dtype.lower(), tensor.data)
        for tensor in file.tensors.values()
    ]
    made = [GGUFTensor(*entry[:3], lambda data=entry[3]: data) for entry in change(tensors)]
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    write_gguf_file(path, "qwen3next", metadata, made)


@pytest.mark.parametrize("format", ["f32", "q8_0", "q4_0"])
def test_fused_projections_in_gguf(format, tmp_path):
    """They are in parts there, in another order of rows, and whole in early files."""
    net = fused_model()
    write_gguf(net, tmp_path / "m.gguf", byte_tokenizer(), format)
    parts = read_gguf(tmp_path / "m.gguf").tensors
    assert parts["blk.0.attn_qkv.weight"].shape == (2 * 64 + 192, 64)
    assert parts["blk.0.attn_gate.weight"].shape == (192, 64) and "blk.0.ssm_in.weight" not in parts
    again = pyloss.load_model(tmp_path / "m.gguf")
    tokens = np.arange(30)[None] % TOKENS
    if format == "f32":
        np.testing.assert_allclose(again(tokens), net(tokens), rtol=0, atol=1e-4)
    whole = again.layers[0].linear_attn.in_proj_qkvz.weight
    assert whole.format == format
    write_gguf(again, tmp_path / "again.gguf", byte_tokenizer())
    second = read_gguf(tmp_path / "again.gguf").tensors
    for name, tensor in parts.items():
        if not name.endswith("ssm_a"):  # its logarithm has been rounded
            np.testing.assert_array_equal(second[name].data, tensor.data, err_msg=name)

    def early(tensors):
        for name, *entry in tensors:
            layer = name.split(".")[1]
            if name.endswith("attn_qkv.weight"):
                matrix = again.layers[int(layer)].linear_attn.in_proj_qkvz.weight
                yield f"blk.{layer}.ssm_in.weight", matrix.shape, matrix.format, matrix.raw
            elif not name.endswith("attn_gate.weight"):
                yield name, *entry

    rewritten(tmp_path / "again.gguf", early)
    np.testing.assert_array_equal(pyloss.load_model(tmp_path / "again.gguf")(tokens), again(tokens))


def test_parts_of_several_formats_and_gates_with_ups(tmp_path):
    """As mixtures of K-quants store the parts, and as some converters store experts."""
    net = fused_model()
    write_gguf(net, tmp_path / "m.gguf", byte_tokenizer())
    tokens = np.arange(30)[None] % TOKENS

    def change(tensors):
        kept = {name: entry for name, *entry in tensors}
        for name, (shape, format, data) in kept.items():
            if name.endswith("ffn_up_exps.weight"):
                gates = kept[name.replace("up_exps", "gate_exps")][2].reshape(shape[0], -1)
                both = np.concatenate([gates, data.reshape(shape[0], -1)], axis=1)
                name = name.replace("up_exps", "gate_up_exps")
                yield name, (shape[0], 2 * shape[1], shape[2]), format, both.reshape(-1)
            elif name.endswith("attn_gate.weight"):
                values = np.frombuffer(data, np.float32).reshape(shape)
                yield name, shape, "q8_0", pyloss.Weight.quantize(values, "q8_0").raw
            elif not name.endswith("ffn_gate_exps.weight"):
                yield name, shape, format, data

    rewritten(tmp_path / "m.gguf", change)
    again = pyloss.load_model(tmp_path / "m.gguf")
    assert again.layers[0].linear_attn.in_proj_qkvz.weight.format == "f16"
    np.testing.assert_allclose(again(tokens), net(tokens), rtol=0, atol=0.1)
    for part in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(
            getattr(again.layers[1].mlp.switch_mlp, part).weight.matrices[3].dequantize(),
            getattr(net.layers[1].mlp.switch_mlp, part).weight.matrices[3].dequantize(),
        )


def test_importance_reaches_the_parts_of_a_matrix(tmp_path):
    net = fused_model()
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    importance = {name: np.arange(1, 65, dtype=np.float32) ** 4}
    write_gguf(net, tmp_path / "a.gguf", byte_tokenizer(), "iq4_nl")
    write_gguf(net, tmp_path / "b.gguf", byte_tokenizer(), "iq4_nl", importance=importance)
    first, second = (read_gguf(tmp_path / f"{name}.gguf").tensors for name in "ab")
    changed = {name for name in first if not np.array_equal(first[name].data, second[name].data)}
    assert changed == {"blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"}


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_projections_in_mlx_folders(bits, tmp_path):
    net = fused_model()
    pyloss.models.conversion.quantize_model(net, f"q{bits}", group_size=32)
    net.save(tmp_path / "mlx")
    again = pyloss.load_model(tmp_path / "mlx")
    tokens = np.arange(30)[None] % TOKENS
    np.testing.assert_allclose(again(tokens), net(tokens), rtol=0, atol=1e-5)
    write_gguf(again, tmp_path / "m.gguf", byte_tokenizer())
    parts = read_gguf(tmp_path / "m.gguf").tensors
    assert parts["blk.0.attn_qkv.weight"].dtype == "F16"
    np.testing.assert_allclose(
        pyloss.load_model(tmp_path / "m.gguf")(tokens), net(tokens), rtol=0, atol=0.02
    )
