"""GGUF files of every supported type, written by the gguf package as llama.cpp's converter does, against transformers."""

import numpy as np
import pytest
from parity_models import make_tiny, our_logits, torch, torch_logits

import pyloss
from pyloss.errors import FormatError

gguf = pytest.importorskip("gguf", reason="writes GGUF files with it (parity extra)")

# Every row length is a multiple of the 32 numbers of a group.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
IDS = np.random.default_rng(0).integers(0, 300, 60)


def interleaved(array, heads):
    """llama.cpp's order of the rows of q and k: the two halves of every head, which rotary embedding pairs, row by row."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def gguf_name(name, mapping):
    stem, suffix = name.rsplit(".", 1)
    return f"{mapping.get_name(stem)}.{suffix}"


def write(path, model, type_of):
    """Writes `model`, whose matrices are then replaced by what the stored ones stand for. `type_of(name)` is a matrix's type."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    if c.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(c))
    elif c.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_parameters["factor"])
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = gguf.GGMLQuantizationType[type_of(name)] if parameter.ndim == 2 else gguf.GGMLQuantizationType.F32
            stored = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind))))
            if ".q_proj." in name:
                stored = interleaved(stored, c.num_attention_heads)
            elif ".k_proj." in name:
                stored = interleaved(stored, c.num_key_value_heads)
            writer.add_tensor(gguf_name(name, mapping), np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_factors(config):
    """By what llama.cpp's converter says to divide the frequencies, worked out as it does."""
    p, dims = config.rope_parameters, config.head_dim
    low, high, length = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / p["rope_theta"] ** (np.arange(0, dims, 2) / dims):
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(p["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(factors, np.float32)


def check(tmp_path, theirs, type_of, ids=IDS):
    path = tmp_path / "model.gguf"
    write(path, theirs, type_of)
    ours = pyloss.load_model(path)
    expected = torch_logits(theirs, ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=0, atol=1e-4)
    return ours


@pytest.mark.parametrize("kind", TYPES)
def test_logits_of_each_type(tmp_path, kind):
    theirs = make_tiny(**SHAPE)
    plain = torch_logits(theirs, IDS)
    ours = check(tmp_path, theirs, lambda name: kind)
    assert {weight.format for weight in ours.stored().values()} == {kind.lower()}
    # Storing changed the weights, by no more than the type may.
    change = np.abs(torch_logits(theirs, IDS) - plain).max()
    low, high = {"F32": (0, 0), "F16": (1e-4, 0.1), "BF16": (1e-3, 0.5), "Q8_0": (1e-3, 0.5)}.get(kind, (0.1, np.inf))
    assert low <= change <= high


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 1},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=["untied", "biases", "wide heads", "one key head", "linear rotary"],
)
@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_logits_of_variants(tmp_path, changes, kind):
    check(tmp_path, make_tiny(**{**SHAPE, **changes}), lambda name: kind)


def test_llama3_rotary_factors(tmp_path):
    """Far positions only show them: a rotation of the slowest frequencies alone is changed."""
    ids = np.random.default_rng(1).integers(0, 300, 400)
    options = {**SHAPE, "head_dim": 32, "rope_theta": 5e5, "num_hidden_layers": 1}
    scaled, plain = make_tiny(**options, rope_scaling=LLAMA3), make_tiny(**options)
    assert np.abs(torch_logits(scaled, ids) - torch_logits(plain, ids)).max() > 1e-2
    ours = check(tmp_path, scaled, lambda name: "Q8_0", ids)
    assert ours.config.rope_scaling == LLAMA3


def test_types_are_mixed_freely(tmp_path):
    """As llama.cpp's own recipes do, which store the head finer than the rest."""
    kinds = {name: TYPES[i % len(TYPES)] for i, (name, _) in enumerate(make_tiny(**SHAPE, tie_word_embeddings=False).named_parameters())}
    ours = check(tmp_path, make_tiny(**SHAPE, tie_word_embeddings=False), kinds.__getitem__)
    assert len({weight.format for weight in ours.stored().values()}) == len(TYPES)


def test_a_hugging_face_folder_of_a_gguf_file(tmp_path):
    """Rows come back in Hugging Face's order."""
    from parity_models import transformers

    theirs = make_tiny(**SHAPE, attention_bias=True)
    ours = check(tmp_path, theirs, lambda name: "Q4_0")
    ours.save(tmp_path / "folder")
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, reread.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ2_XS", "TQ1_0", "TQ2_0"])
def test_other_types_are_refused_by_name(tmp_path, kind):
    """One tensor of the type in a file that is else readable. The bytes don't matter: nothing may be computed from them."""
    path = tmp_path / "model.gguf"
    theirs = make_tiny(**{**SHAPE, "hidden_size": 256, "head_dim": 64})
    tensor_type = gguf.GGMLQuantizationType[kind]
    group, size = gguf.GGML_QUANT_SIZES[tensor_type]
    rows, columns = theirs.config.intermediate_size, theirs.config.hidden_size
    raw = np.zeros((rows, columns // group * size), np.uint8)
    quantize, dequantize = gguf.quants.quantize, gguf.quants.dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", lambda data, t: raw if t == tensor_type else quantize(data, t))
        patch.setattr(gguf.quants, "dequantize", lambda data, t: np.zeros((rows, columns), np.float32) if t == tensor_type else dequantize(data, t))
        write(path, theirs, lambda name: kind if name == "model.layers.1.mlp.up_proj.weight" else "F32")
    with pytest.raises(FormatError, match=rf"model\.gguf: blk\.1\.ffn_up\.weight: stored as {kind}, and pyloss reads F32.*Q8_0"):
        pyloss.load_model(path)
