"""GGUF files of every type against transformers; written by gguf like llama.cpp's converter."""

import numpy as np
import pytest
from parity_gguf import write_gguf
from parity_models import make_tiny, our_logits, torch, torch_logits, torch_model
from rope_settings import llama3

import pyloss
from pyloss.errors import FormatError

gguf = pytest.importorskip("gguf", reason="writes GGUF files with it (parity extra)")

# Every row length is a multiple of the 32 numbers of a group.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
LLAMA3 = llama3(8.0)
IDS = np.random.default_rng(0).integers(0, 300, 60)


def check(tmp_path, theirs, type_of, ids=IDS):
    path = tmp_path / "model.gguf"
    write_gguf(theirs, path, type_of)
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
    # Storing changes the weights, within the limits of the type.
    change = np.abs(torch_logits(theirs, IDS) - plain).max()
    low, high = {"F32": (0, 0), "F16": (1e-4, 0.1), "BF16": (1e-3, 0.5), "Q8_0": (1e-3, 0.5)}.get(
        kind, (0.1, np.inf)
    )
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
    """Only far positions show the factors: they change the slowest frequencies."""
    ids = np.random.default_rng(1).integers(0, 300, 400)
    options = {**SHAPE, "head_dim": 32, "rope_theta": 5e5, "num_hidden_layers": 1}
    scaled, plain = make_tiny(**options, rope_scaling=LLAMA3), make_tiny(**options)
    assert np.abs(torch_logits(scaled, ids) - torch_logits(plain, ids)).max() > 1e-2
    ours = check(tmp_path, scaled, lambda name: "Q8_0", ids)
    assert ours.config.rope_scaling == LLAMA3


def test_types_are_mixed_freely(tmp_path):
    """llama.cpp's own recipes mix types too: the head is stored with more bits."""
    kinds = {
        name: TYPES[i % len(TYPES)]
        for i, (name, _) in enumerate(
            make_tiny(**SHAPE, tie_word_embeddings=False).named_parameters()
        )
    }
    ours = check(tmp_path, make_tiny(**SHAPE, tie_word_embeddings=False), kinds.__getitem__)
    assert len({weight.format for weight in ours.stored().values()}) == len(TYPES)


def test_a_hugging_face_folder_of_a_gguf_file(tmp_path):
    """Rows return to Hugging Face's order."""
    theirs = make_tiny(**SHAPE, attention_bias=True)
    ours = check(tmp_path, theirs, lambda name: "Q4_0")
    ours.save(tmp_path / "folder")
    reread = torch_model(tmp_path / "folder")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, reread.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["IQ3_S", "IQ2_XS", "TQ1_0", "TQ2_0"])
def test_other_types_are_refused_by_name(tmp_path, kind):
    """One tensor of an unsupported type in an otherwise readable file; its bytes are never read."""
    path = tmp_path / "model.gguf"
    theirs = make_tiny(**{**SHAPE, "hidden_size": 256, "head_dim": 64})
    tensor_type = gguf.GGMLQuantizationType[kind]
    group, size = gguf.GGML_QUANT_SIZES[tensor_type]
    rows, columns = theirs.config.intermediate_size, theirs.config.hidden_size
    raw = np.zeros((rows, columns // group * size), np.uint8)
    quantize, dequantize = gguf.quants.quantize, gguf.quants.dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf.quants, "quantize", lambda data, t: raw if t == tensor_type else quantize(data, t)
        )
        patch.setattr(
            gguf.quants,
            "dequantize",
            lambda data, t: (
                np.zeros((rows, columns), np.float32) if t == tensor_type else dequantize(data, t)
            ),
        )
        write_gguf(
            theirs,
            path,
            lambda name: kind if name == "model.layers.1.mlp.up_proj.weight" else "F32",
        )
    with pytest.raises(
        FormatError,
        match=rf"model\.gguf: blk\.1\.ffn_up\.weight: stored as {kind}, and pyloss reads F32.*Q8_0",
    ):
        pyloss.load_model(path)
