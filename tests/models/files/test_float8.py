"""8-bit floats with scales are expanded; other quantizations are refused before reading weights."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny
from packed_folders import E4M3, write_float8, write_plain
from safetensors.numpy import load_file, save_file

from pyloss import FormatError
from pyloss.describing import describe_model
from pyloss.io.safetensors import read_safetensors
from pyloss.models import load_model
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantization
from pyloss.models.synthetic import random_model

E5M2 = ml_dtypes.float8_e5m2
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"block": (128, 128)},
        {"block": (24, 20)},
        {"kind": E5M2},
        {"per": "row", "scale": "weight_scale"},
        {"per": "tensor"},
        {"per": "tensor", "scale": "weight_scale", "bias": True},
    ],
)
def test_layers_are_expanded(tmp_path, case):
    c, arrays = write_float8(tmp_path, **case)
    model = load_model(tmp_path)
    for name, weight in model.stored().items():
        assert weight.format == "f32"
        np.testing.assert_array_equal(weight.dequantize(), arrays[name])
    np.testing.assert_allclose(model(TOKENS)[0], tiny.logits(c, arrays, TOKENS[0]), atol=1e-4)
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_model(tmp_path / "saved")(TOKENS), model(TOKENS))


def test_they_become_bfloat16_unless_the_configuration_says_float32(tmp_path):
    _, arrays = write_float8(tmp_path, torch_dtype="bfloat16")
    weight = load_model(tmp_path).stored()[f"{UP}.weight"]
    assert weight.format == "bf16"
    nearest = arrays[f"{UP}.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(weight.dequantize(), nearest)


@pytest.mark.parametrize("stored", ["bf16", "f16", "e8m0"])
def test_types_of_scales(tmp_path, stored):
    kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "e8m0": ml_dtypes.float8_e8m0fnu}[stored]
    name = f"{UP}.weight_scale_inv"
    scales = []

    def change(arrays):
        arrays[name] = arrays[name].astype(kind)
        scales.append(arrays[name].astype(np.float32))
        scales.append(arrays[f"{UP}.weight"].astype(np.float32))

    write_float8(tmp_path, change=change)
    got = load_model(tmp_path).stored()[f"{UP}.weight"].dequantize()
    whole = np.repeat(np.repeat(scales[0], 16, 0), 32, 1)
    np.testing.assert_array_equal(got, scales[1] * whole)


@pytest.mark.parametrize("kind", [E4M3, E5M2, ml_dtypes.float8_e8m0fnu])
def test_tensors_of_8_bit_floats(tmp_path, kind):
    values = np.arange(256, dtype=np.uint8).view(kind)
    shapes = {"matrix": (8, 32), "stack": (2, 4, 32), "list": (256,)}
    save_file(
        {name: values.reshape(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors"
    )
    file = read_safetensors(tmp_path / "a.safetensors")
    want = values.astype(np.float32)
    np.testing.assert_array_equal(file.tensor("list").array(), want)
    matrix, stack = file.tensor("matrix").weight(), file.tensor("stack").stack()
    assert matrix.format == stack.format == "bf16"
    for found in (matrix, stack):
        np.testing.assert_array_equal(found.dequantize().reshape(-1), want)


def test_a_folder_of_plain_8_bit_floats(tmp_path):
    c, arrays = tiny.write_folder(tmp_path, tied=False)
    kept = {
        name: array.astype(E4M3) if array.ndim == 2 else array for name, array in arrays.items()
    }
    save_file(kept, tmp_path / "model.safetensors")
    arrays = {name: array.astype(np.float32) for name, array in kept.items()}
    got = load_model(tmp_path)(TOKENS)[0]
    np.testing.assert_allclose(got, tiny.logits(c, arrays, TOKENS[0]), atol=1e-4)


def put(part, value):
    return lambda arrays: arrays.__setitem__(f"{UP}.{part}", value(arrays[f"{UP}.{part}"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight", lambda a: a[1:]), r"up_proj.weight: has shape \(63, 32\), where the configuration gives \(64, 32\)"),
        (put("weight_scale_inv", lambda a: a[1:]), r"weight_scale_inv: has shape \(3, 1\), expected \(4, 1\) for 64 rows of 32"),
        (put("weight_scale_inv", lambda a: a.astype(np.int32)), "stored as I32"),
        (lambda arrays: arrays.pop(f"{UP}.weight_scale_inv"), "up_proj.weight_scale_inv: missing"),
        (put("weight", lambda a: a.astype(np.float32)), "up_proj.weight_scale_inv: no part of this configuration"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, change, message):
    write_float8(tmp_path, change=change)
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: expected two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"got \[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 2.0]}, "two positive integers"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4' is not supported"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantization("config.json", {"quantization_config": settings})


@pytest.mark.parametrize(
    "method",
    ["compressed-tensors", "hqq", "aqlm", "quanto", "eetq", "higgs", "torchao", "bitnet", "vptq", "spqr",
     "fbgemm_fp8", "mxfp4", "auto-round", "modelopt", "quark", "fp_quant", "llm_int8"],
)  # fmt: skip
def test_other_methods_are_refused_before_weights_are_read(tmp_path, method):
    (tmp_path / "config.json").write_text(
        json.dumps({**tiny.config(), "quantization_config": {"quant_method": method, "bits": 4}})
    )
    message = f"config.json: quantized by '{method}'; pyloss reads mlx's affine groups"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        describe_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_older_keys_of_compressed_tensors(tmp_path):
    content = {**tiny.config(), "compression_config": {"format": "pack-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="compression_config .* is not supported"):
        load_model(tmp_path)


def test_ministral3_as_published(tmp_path):
    """A scale per matrix, in the wrapper beside a part for images."""

    def wrapped(arrays):
        for name in list(arrays):
            arrays[f"language_model.{name}"] = arrays.pop(name)
        arrays["vision_tower.ln_pre.weight"] = np.ones(4, np.float32)
        arrays["multi_modal_projector.linear_1.weight"] = np.ones((4, 4), np.float32)

    write_float8(tmp_path / "plain", per="tensor")
    write_float8(tmp_path / "whole", per="tensor", change=wrapped)
    for place, inner in (("plain", False), ("whole", True)):
        content = json.loads((tmp_path / place / "config.json").read_text())
        rope = {"rope_type": "default", "rope_theta": content.pop("rope_theta")}
        text = {**content, "model_type": "ministral3", "rope_parameters": rope}
        settings = text.pop("quantization_config")
        whole = {"model_type": "mistral3", "text_config": text, "vision_config": {}}
        whole = (whole if inner else text) | {
            "quantization_config": settings,
            "torch_dtype": "float32",
        }
        (tmp_path / place / "config.json").write_text(json.dumps(whole))
    whole = load_model(tmp_path / "whole")
    assert whole.config.model_type == "ministral3"
    np.testing.assert_array_equal(whole(TOKENS), load_model(tmp_path / "plain")(TOKENS))


def test_experts(tmp_path):
    sizes = {**tiny.SIZES, "num_hidden_layers": 2}
    random_model(ModelConfig("mixtral", mixture=Mixture(4, 2, 64, True), **sizes)).save(
        tmp_path / "a"
    )
    c = json.loads((tmp_path / "a" / "config.json").read_text())
    given = c, load_file(tmp_path / "a" / "model.safetensors")
    c, arrays = write_float8(tmp_path / "fp8", given=given)
    write_plain(tmp_path / "plain", c, arrays)
    packed, plain = (load_model(tmp_path / name) for name in ("fp8", "plain"))
    np.testing.assert_array_equal(packed(TOKENS), plain(TOKENS))
