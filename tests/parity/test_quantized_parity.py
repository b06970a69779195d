"""Quantized weights and folders have the bits of gguf, mlx, mlx-lm, bitsandbytes, transformers."""

import json
import re

import numpy as np
import pytest
import tokenizers
from packed_folders import write_float8, write_packed
from parity_models import (
    GEMMA4,
    GEMMA4_EXPERTS,
    GRANITE,
    GRANITE4,
    GRANITE4_MAMBA,
    LFM2,
    MINISTRAL3,
    MIXTURES,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN3_5,
    SMOLLM3,
    make_tiny,
    torch_model,
)

import pyloss
from pyloss.cli import main
from pyloss.io.gguf import read_gguf
from pyloss.models import conversion, load_model, saving
from pyloss.weights.formats import FORMATS
from pyloss.weights.groups import dynamic_map
from pyloss.weights.weight import Weight

mx = pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")
mlx_lm = pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")

FLOATS = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
TOKENS = np.array([[5, 80, 7, 122, 9, 33, 2]], np.int32)


def matrices():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((12, 256)).astype(np.float32)
    outlier = normal.copy()
    outlier[:, ::64] *= 300
    return {
        "normal": normal,
        "small": normal * np.float32(1e-6),
        "outlier": outlier,
        "positive": np.abs(normal),
        "zero": 0 * normal,
    }


@pytest.mark.parametrize("scale_format", list(FLOATS))
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_groups_are_mlx_to_the_bit(bits, size, scale_format):
    for name, matrix in matrices().items():
        given = mx.array(matrix).astype(FLOATS[scale_format])
        weight = Weight.quantize(
            np.array(given.astype(mx.float32)),
            f"affine{bits}",
            group_size=size,
            scale_format=scale_format,
        )
        codes, scales, biases = mx.quantize(given, size, bits)
        assert np.array(codes).tobytes() == weight.raw.tobytes(), name
        assert np.array(scales.view(mx.uint8)).tobytes() == weight.groups.scales.tobytes(), name
        assert np.array(biases.view(mx.uint8)).tobytes() == weight.groups.offsets.tobytes(), name
        # pyloss computes in float32. In the scales' own type, mlx would round the product and the
        # sum.
        expected = mx.dequantize(
            codes, scales.astype(mx.float32), biases.astype(mx.float32), size, bits
        )
        np.testing.assert_array_equal(weight.dequantize(), np.array(expected), err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny transformers model in bfloat16, with a tokenizer that mlx-lm can load."""
    place = tmp_path_factory.mktemp("tiny")
    import torch

    make_tiny(intermediate_size=128).to(torch.bfloat16).save_pretrained(place)
    write_tokenizer(place)
    return place


def write_tokenizer(place):
    """Write a tokenizer that mlx-lm can load."""
    words = {f"w{i}": i for i in range(300)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(
        str(place / "tokenizer.json")
    )
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
    )


def logits(place):
    return np.asarray(pyloss.models.load_model(place)(TOKENS))


@pytest.mark.parametrize(("bits", "size"), [(4, 64), (8, 32), (3, 32)])
def test_converting_is_mlx_lm_to_the_bit(folder, tmp_path, bits, size):
    mlx_lm.convert(
        str(folder),
        str(tmp_path / "theirs"),
        quantize=True,
        q_bits=bits,
        q_group_size=size,
        dtype="bfloat16",
    )
    flags = ["-q", "--q-bits", str(bits), "--q-group-size", str(size), "--dtype", "bfloat16"]
    assert (
        main(["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "ours"), *flags])
        == 0
    )
    theirs, ours = (
        mx.load(str(tmp_path / name / "model.safetensors")) for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert array.dtype == ours[name].dtype and mx.array_equal(array, ours[name]).item(), name
    expected, found = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization"]
        for name in ("theirs", "ours")
    )
    assert expected == found
    np.testing.assert_array_equal(logits(tmp_path / "theirs"), logits(tmp_path / "ours"))
    model, _ = mlx_lm.load(str(tmp_path / "ours"))
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(
        logits(tmp_path / "ours"), np.array(model(mx.array(TOKENS))), atol=1e-4
    )


def test_layers_of_different_bits_as_mlx_lm_writes_them(folder, tmp_path):
    def some(path, module):
        return {"group_size": 32, "bits": 6} if "down_proj" in path else "v_proj" not in path

    mlx_lm.convert(
        str(folder), str(tmp_path / "mixed"), quantize=True, quant_predicate=some, dtype="float16"
    )
    model, _ = mlx_lm.load(str(tmp_path / "mixed"))
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(
        logits(tmp_path / "mixed"), np.array(model(mx.array(TOKENS))), atol=1e-4
    )
    formats = {
        name.rsplit(".", 2)[-2]: w.format
        for name, w in pyloss.models.load_model(tmp_path / "mixed").stored().items()
    }
    assert (formats["down_proj"], formats["v_proj"], formats["q_proj"]) == (
        "affine6",
        "f16",
        "affine4",
    )


# bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes (parity extra)")
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_nf4_is_bitsandbytes_to_the_bit(bnb, size, double):
    import torch

    for name, matrix in matrices().items():
        codes, state = bnb.quantize_4bit(
            torch.tensor(matrix), blocksize=size, quant_type="nf4", compress_statistics=double
        )
        weight = Weight.quantize(matrix, "nf4", group_size=size, double=double)
        assert codes.numpy().tobytes() == weight.raw.tobytes(), name
        groups = weight.groups
        if double:
            np.testing.assert_array_equal(state.state2.code.numpy(), dynamic_map())
            # The mean of the scales is summed in another order, so codes may differ by one.
            assert groups.nested_offset == pytest.approx(state.offset.item(), rel=1e-6)
            inner, outer = state.absmax.numpy(), state.state2.absmax.numpy()
            # If all scales equal the offset, any code gives the same value.
            assert (
                name == "zero" or np.abs(inner.astype(int) - groups.scales.astype(int)).max() <= 1
            )
            groups = groups._replace(
                scales=inner, nested=outer.view(np.uint8), nested_offset=state.offset.item()
            )
        else:
            assert state.absmax.numpy().tobytes() == groups.scales.tobytes(), name
        same = Weight(weight.raw, "nf4", weight.shape, groups=groups)
        np.testing.assert_array_equal(
            same.dequantize(), bnb.dequantize_4bit(codes, state).numpy(), err_msg=name
        )


def check_against_transformers(bnb, folder, model):
    """Every layer's weights match to the bit.

    Logits match roughly: on some processors bitsandbytes computes in bfloat16.
    """
    import torch

    ours = pyloss.models.load_model(folder)
    stored = ours.stored()
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert layers.keys() == {
        name.removesuffix(".weight") for name, weight in stored.items() if weight.format == "nf4"
    }
    for name, layer in layers.items():
        expected = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().numpy()
        np.testing.assert_array_equal(stored[f"{name}.weight"].dequantize(), expected, err_msg=name)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()
    np.testing.assert_allclose(ours(TOKENS), expected, atol=0.3)


@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_what_is_written_as_nf4(bnb, folder, tmp_path, double):

    flags = [] if double else ["--single-quant"]
    assert (
        main(
            [
                "convert",
                "--model",
                str(folder),
                "-q",
                "nf4",
                "--dtype",
                "float32",
                "--output",
                str(tmp_path),
                *flags,
            ]
        )
        == 0
    )
    model = torch_model(tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.quant_state.nested is double
    check_against_transformers(bnb, tmp_path, model)


def test_layers_of_floats_among_nf4(bnb, folder, tmp_path):
    """Full fine-tuning of a layer leaves such a quantized model."""
    import torch

    model = pyloss.models.load_model(folder)
    conversion.quantize_model(model, "nf4", dtype="float32")
    pyloss.tuner.unfreeze_layers(model, 1, ["mlp"])
    saving.save_model(model, tmp_path, dtype="float32")
    theirs = torch_model(tmp_path)
    assert type(theirs.model.layers[-1].mlp.up_proj) is torch.nn.Linear
    check_against_transformers(bnb, tmp_path, theirs)


def test_nf4_as_transformers_writes_it(bnb, folder, tmp_path):
    import torch
    import transformers

    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path)
    check_against_transformers(bnb, tmp_path, model)


# GGUF


@pytest.mark.parametrize("format", [name for name, layout in FORMATS.items() if not layout.bits])
def test_every_gguf_type_reads_as_gguf_does(tmp_path, format):
    """A file with random bytes as the blocks of a matrix."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format.upper()]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    assert (FORMATS[format].elements, FORMATS[format].bytes) == (elements, size)
    data = np.random.default_rng(1).integers(0, 256, (4, 512 // elements * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "m.gguf").tensor("w")
    with np.errstate(invalid="ignore"):
        expected = gguf.quants.dequantize(data, kind).astype(np.float32)
    np.testing.assert_array_equal(tensor.weight().dequantize(), expected)
    assert np.shares_memory(tensor.weight().raw, tensor.data)


FAMILIES = {
    **{name: options for name, options in MIXTURES.items() if name != "granitemoeshared"},
    "granite 4": GRANITE4,
    "granite 4 with a mamba layer": GRANITE4_MAMBA,
    "ministral3": {**MINISTRAL3, "intermediate_size": 128},
    "granite": {**GRANITE, "intermediate_size": 128},
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "lfm2": LFM2,
    "gemma4": GEMMA4,
    "gemma4 with experts": GEMMA4_EXPERTS,
    "qwen3_5": QWEN3_5,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_both_ways_with_mlx_lm(tmp_path, family):
    make_tiny(**FAMILIES[family]).save_pretrained(tmp_path / "first")
    write_tokenizer(tmp_path / "first")
    # mlx-lm cannot read all entries that transformers 5 writes into config.json.
    assert (
        main(["convert", "--model", str(tmp_path / "first"), "--output", str(tmp_path / "float")])
        == 0
    )
    text = json.loads((tmp_path / "float" / "config.json").read_text())
    if family.startswith("qwen3_5"):  # mlx-lm has only the wrapper
        wrapped = {"model_type": family, "text_config": text, "eos_token_id": 2}
        (tmp_path / "float" / "config.json").write_text(json.dumps(wrapped))
    mlx_lm.convert(
        str(tmp_path / "float"),
        str(tmp_path / "theirs"),
        quantize=True,
        q_group_size=32,
        dtype="float32",
    )
    flags = ["-q", "q6", "--group-size", "32", "--dtype", "float32"]
    assert (
        main(
            [
                "convert",
                "--model",
                str(tmp_path / "float"),
                "--output",
                str(tmp_path / "ours"),
                *flags,
            ]
        )
        == 0
    )
    for name in ("theirs", "ours"):
        config = tmp_path / name / "config.json"
        content = config.read_text()
        if name == "ours":
            config.write_text(re.sub(r'"(qwen3_5\w*)_text"', r'"\1"', content))
        theirs, _ = mlx_lm.load(str(tmp_path / name))
        config.write_text(content)
        np.testing.assert_allclose(
            logits(tmp_path / name), np.array(theirs(mx.array(TOKENS))), atol=2e-4, err_msg=name
        )
    stored = pyloss.models.load_model(tmp_path / "theirs").stored()
    experts = family in MIXTURES or "experts" in family
    block = "switch_mlp" if experts else {"lfm2": "conv"}.get(family, "mlp")
    formats = {weight.format for name, weight in stored.items() if block in name}
    # mlx-lm stores some layers of Granite in 8 bits
    mixed = family in ("granite", "granitemoe")
    assert formats == ({"affine4", "affine8"} if mixed else {"affine4"})


@pytest.mark.parametrize("per", ["block", "tensor"])
def test_fp8_as_transformers_expands_it(tmp_path, per):
    """Both from the same folder; transformers multiplies floats with `dequantize`."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    write_float8(tmp_path, per=per)
    block = [16, 32] if per == "block" else None
    settings = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=settings
    )
    tokens = np.array([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(load_model(tmp_path)(tokens), want, atol=1e-4)


@pytest.mark.parametrize("case", [{"sym": True}, {}, {"method": "awq"}, {"bits": 3}])
def test_mlx_lm_loads_packed_folders_that_are_saved(tmp_path, case):
    from mlx_lm.utils import load_model as load_mlx

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    write_packed(tmp_path / "packed", group_size=64, **sizes, **case)
    model = load_model(tmp_path / "packed")
    model.save(tmp_path / "saved")
    theirs, _ = load_mlx(tmp_path / "saved")
    tokens = np.array([[3, 1, 4, 1, 5]])
    got = np.array(theirs(mx.array(tokens)).astype(mx.float32))
    np.testing.assert_allclose(got, model(tokens), atol=1e-3)
