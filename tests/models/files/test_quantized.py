"""Quantized folders are read back as written, and inconsistent ones are refused by name."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from pyloss import FormatError
from pyloss.models import conversion, load_model
from pyloss.models.files.quantized import Quantization
from pyloss.models.saving import model_dtype, save_model
from pyloss.nn import Linear
from pyloss.weights.weight import Weight

KINDS = ["q2", "q3", "q4", "q5", "q6", "q8", "nf4"]
UP = "model.layers.0.mlp.up_proj"


def quantized(tmp_path, kind="q4", group_size=32, dtype="f32", tied=True, **options):
    """(model, folder) of a tiny model quantized and saved."""
    tiny.write_folder(tmp_path / "float", dtype=dtype, tied=tied, bias=True)
    model = load_model(tmp_path / "float")
    conversion.quantize_model(model, kind, group_size, **options)
    save_model(model, tmp_path / kind)
    return model, tmp_path / kind


def same_weights(a, b):
    """Whether two models hold the same bytes."""
    one, other = a.stored(), b.stored()
    assert one.keys() == other.keys() and a.parameters().keys() == b.parameters().keys()
    for name, weight in one.items():
        assert (weight.format, weight.shape, weight.nbytes) == (
            other[name].format,
            other[name].shape,
            other[name].nbytes,
        ), name
        np.testing.assert_array_equal(weight.dequantize(), other[name].dequantize(), err_msg=name)
    for name, array in a.parameters().items():
        np.testing.assert_array_equal(array, b.parameters()[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_keeps_what_is_quantized(tmp_path, kind, dtype):
    model, folder = quantized(tmp_path, kind, dtype=dtype, tied=kind != "q4")
    again = load_model(folder)
    same_weights(model, again)
    tokens = np.array([[3, 1, 4, 1, 5]])
    np.testing.assert_array_equal(model(tokens), again(tokens))
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == {"f32": "float32", "bf16": "bfloat16"}[dtype]
    formats = {weight.format for weight in again.stored().values()}
    if kind == "nf4":
        assert (
            formats == {"nf4", dtype} and config["quantization_config"]["bnb_4bit_use_double_quant"]
        )
    else:
        assert formats == {f"affine{kind[1:]}"}
        assert config["quantization"] == {"group_size": 32, "bits": int(kind[1:]), "mode": "affine"}
    # Also from mapped bytes.
    save_model(again, tmp_path / "again")
    one, other = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def test_layers_may_differ(tmp_path):
    tiny.write_folder(tmp_path / "float")
    model = load_model(tmp_path / "float")
    conversion.quantize_model(model, "q4", 32)
    dense = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    model.set_module(UP, Linear.from_weight(Weight.quantize(dense, "affine8", group_size=32)))
    model.set_module(
        "model.layers.1.mlp.up_proj", Linear.from_weight(Weight.quantize(dense, "bf16"))
    )
    save_model(model, tmp_path / "mixed")
    content = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert content["quantization"][UP] == {"group_size": 32, "bits": 8, "mode": "affine"}
    again = load_model(tmp_path / "mixed")
    same_weights(model, again)
    # mlx-lm writes the same object under both names; older folders have one of them.
    for key in ("quantization", "quantization_config"):
        (tmp_path / "mixed" / "config.json").write_text(
            json.dumps({k: v for k, v in content.items() if k != key})
        )
        same_weights(model, load_model(tmp_path / "mixed"))


def test_which_layers_are_left(tmp_path):
    tiny.write_folder(tmp_path / "float", tied=False)
    model = load_model(tmp_path / "float")
    left = conversion.quantize_model(model, "nf4")
    assert left.keys() == {"model.embed_tokens", "lm_head"} and "bitsandbytes" in left["lm_head"]
    model = load_model(tmp_path / "float")
    left = conversion.quantize_model(model, "q4", 64)  # only down_proj has rows of 64
    assert "rows of 32 values are no whole number of groups of 64" in left[UP]
    assert {
        name.rsplit(".", 2)[-2] for name, weight in model.stored().items() if not weight.is_float
    } == {"down_proj"}


def test_scales_have_the_type_of_the_model_or_the_one_asked_for(tmp_path):
    model, _ = quantized(tmp_path, dtype="bf16")
    assert model_dtype(model) == "bfloat16"
    conversion.quantize_model(model, "q8", 32)
    assert model_dtype(model) == "float16", "of a model that is quantized already"
    conversion.dequantize_model(model, "bfloat16")
    assert {weight.format for weight in model.stored().values()} == {"bf16"}
    conversion.quantize_model(model, "q4", 32, dtype="float32")
    assert model_dtype(model) == "float32"


@pytest.mark.parametrize(
    ("name", "format"), [("float32", "f32"), ("float16", "f16"), ("bfloat16", "bf16")]
)
def test_floats_are_saved_in_their_type_or_another(tmp_path, name, format):
    tiny.write_folder(tmp_path / "own", dtype=format)
    model = load_model(tmp_path / "own")
    save_model(model, tmp_path / "same")
    same_weights(model, load_model(tmp_path / "same"))
    kinds = {
        array.dtype.name for array in load_file(tmp_path / "same" / "model.safetensors").values()
    }
    assert kinds == {name}
    tiny.write_folder(tmp_path / "wide")
    save_model(load_model(tmp_path / "wide"), tmp_path / "cast", dtype=name)
    assert {
        array.dtype.name for array in load_file(tmp_path / "cast" / "model.safetensors").values()
    } == {name}
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == name
    with pytest.raises(
        ValueError, match="dtype must be one of float32, float16, bfloat16, not 'f32'"
    ):
        save_model(model, tmp_path / "no", dtype="f32")
    assert not (tmp_path / "no").exists()


def test_shards_that_were_there_before_are_not_read_again(tmp_path):
    tiny.write_folder(tmp_path / "own")
    model = load_model(tmp_path / "own")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"gone": "gone.safetensors"}}'
    )
    save_model(model, tmp_path / "saved")
    same_weights(model, load_model(tmp_path / "saved"))


def test_a_parameter_that_would_lose_digits_stays_float32(tmp_path):
    tiny.write_folder(tmp_path / "own", dtype="bf16")
    model = load_model(tmp_path / "own")
    model.model.norm.weight[0] = 1.0001
    save_model(model, tmp_path / "saved")
    arrays = load_file(tmp_path / "saved" / "model.safetensors")
    assert arrays["model.norm.weight"].dtype == np.float32
    assert arrays["model.layers.0.input_layernorm.weight"].dtype.name == "bfloat16"


@pytest.mark.parametrize("kind", ["q4", "nf4"])
def test_weights_are_views_of_the_mapped_file(tmp_path, kind):
    _, folder = quantized(tmp_path, kind)
    for name, weight in load_model(folder).stored().items():
        arrays = [weight.raw]
        if weight.groups:
            arrays += [array for array in weight.groups if isinstance(array, np.ndarray)]
        assert not any(array.flags.owndata or array.flags.writeable for array in arrays), name


def test_fusing_keeps_the_folder_quantized(tmp_path):
    from pyloss.tuner.utils import linear_to_lora_layers

    for kind in ("q8", "nf4"):
        model, _ = quantized(tmp_path / kind, kind)
        linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
        for name, array in model.trainable_parameters().items():
            array[...] = np.random.default_rng(len(name)).standard_normal(array.shape)
        with pytest.raises(ValueError, match="unfused adapters"):
            conversion.quantize_model(model, kind)
        model.fuse()
        save_model(model, tmp_path / "fused")
        same_weights(model, load_model(tmp_path / "fused"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "q7"}, "quantize must be one of q2, q3, q4, q5, q6, q8, nf4, not 'q7'"),
        ({"group_size": 48}, "power of two from 32 to 4096, not 48"),
        ({"group_size": 16}, "not 16"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_bad_options_are_named_and_nothing_changes(tmp_path, options, message):
    tiny.write_folder(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        conversion.quantize_model(model, **{"quantization": "q4", **options})
    assert all(weight.is_float for weight in model.stored().values())


def test_a_folder_is_of_one_kind(tmp_path):
    model, _ = quantized(tmp_path)
    weight = Weight.quantize(np.ones((64, 32), np.float32), "nf4")
    model.set_module(UP, Linear.from_weight(weight))
    with pytest.raises(ValueError, match="nf4 or in affine groups, not both"):
        save_model(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()


# Valid and invalid entries of config.json


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            {"quantization_config": {"quant_method": "hqq", "bits": 4}},
            ValueError,
            "quantized by 'hqq'; pyloss reads mlx's",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            ValueError,
            "in 8 bits",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            ValueError,
            "as 'fp4'",
        ),
        (
            {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
            ValueError,
            "in mode 'mxfp4'",
        ),
        ({"quantization": [4]}, FormatError, r"expected an object, got \[4\]"),
        ({"quantization": {}}, FormatError, "bits must be one of 2, 3, 4, 5, 6, 8, got None"),
        (
            {"quantization": {"bits": 7, "group_size": 64}},
            FormatError,
            "bits must be one of .* got 7",
        ),
        ({"quantization": {"bits": 4.0, "group_size": 64}}, FormatError, "got 4.0"),
        ({"quantization": {"bits": 4}}, FormatError, "group_size must be .* got None"),
        ({"quantization": {"bits": 4, "group_size": 48}}, FormatError, "got 48"),
        ({"quantization": {"bits": 4, "group_size": "64"}}, FormatError, "got '64'"),
    ],
)
def test_what_is_said_of_quantization(content, error, message):
    with pytest.raises(error, match=message) as caught:
        Quantization("config.json", content)
    assert "config.json" in str(caught.value)


def damaged(folder, change, **config):
    """The folder with changed arrays or entries of config.json."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in {**content, **config}.items() if v is not None})
    )
    return folder


def put(name, value):
    return lambda arrays: arrays.__setitem__(
        name, value(arrays[name]) if callable(value) else value
    )


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (put(f"{UP}.weight", lambda a: a[:, :3]), {}, r"up_proj.weight: U32 of shape \(64, 3\), expected U32 of \(64, 4\) for 4-bit"),
        (put(f"{UP}.weight", lambda a: a.view(np.int32)), {}, "I32 of shape"),
        (put(f"{UP}.scales", lambda a: a[:9]), {}, r"up_proj.scales: F32 of shape \(9, 1\), expected F32 of \(64, 1\)"),
        (put(f"{UP}.biases", lambda a: a.astype(np.float16)), {}, "up_proj.biases: F16 of shape .* expected F32"),
        (put(f"{UP}.scales", lambda a: a.astype(np.int32)), {}, "stored as I32, expected F32, F16 or BF16"),
        (lambda arrays: arrays.pop(f"{UP}.biases"), {}, "up_proj.biases: missing"),
        (lambda arrays: arrays.pop(f"{UP}.weight"), {}, "up_proj.weight: missing"),
        (lambda arrays: arrays.pop(f"{UP}.scales"), {}, "up_proj.weight: .*shape"),
        (lambda arrays: None, {"quantization": {"bits": 8, "group_size": 32}}, "for 8-bit rows of 32 in groups of 32"),
        (lambda arrays: None, {"quantization": {"bits": 4, "group_size": 64}}, "no multiple of the group size 64"),
        (lambda arrays: None, {"quantization": {"bits": 4, "group_size": 32, UP: {"bits": 9}}}, "quantization of .*up_proj: bits .* got 9"),
        (lambda arrays: None, {"quantization": None, "quantization_config": None}, "config.json has no quantization of mlx's"),
        (lambda arrays: None, {"intermediate_size": 128, "mlp_bias": False}, r"expected U32 of \(128, 4\)"),
    ],
)  # fmt: skip
def test_damaged_mlx_folders_are_named(tmp_path, change, config, message):
    _, folder = quantized(tmp_path)
    with pytest.raises(FormatError, match=message):
        load_model(damaged(folder, change, **config))


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def without(key):
    def changed(array):
        return np.frombuffer(
            json.dumps({k: v for k, v in json.loads(array.tobytes()).items() if k != key}).encode(),
            np.uint8,
        )

    return put(STATE, changed)


def state(**changes):
    def changed(array):
        return np.frombuffer(
            json.dumps({**json.loads(array.tobytes()), **changes}).encode(), np.uint8
        )

    return put(STATE, changed)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (put(STATE, np.frombuffer(b"{}", np.uint8)), {}, "not bitsandbytes' state of an nf4 tensor: 'blocksize'"),
        (put(STATE, np.frombuffer(b"\xff{", np.uint8)), {}, "not bitsandbytes' state"),
        (put(STATE, np.frombuffer(b"[1]", np.uint8)), {}, "not bitsandbytes' state"),
        (state(quant_type="fp4"), {}, "quant_type 'fp4'"),
        (state(shape=[32, 64]), {}, r"says shape \[32, 64\], where the configuration gives \(64, 32\)"),
        (state(blocksize=33), {}, "absmax: U8 of shape .* for 2048 values in blocks of 33"),
        (state(blocksize=0), {}, "not bitsandbytes' state"),
        (without("nested_blocksize"), {}, "says no nested_blocksize"),
        (without("nested_offset"), {}, "not bitsandbytes' state of an nf4 tensor: 'nested_offset'"),
        (state(nested_blocksize="256"), {}, "not bitsandbytes' state"),
        (state(nested_offset=None), {}, "not bitsandbytes' state"),
        (state(nested_offset=float("nan")), {}, "nested_offset nan"),
        (state(blocksize=2**60), {}, "absmax: U8 of shape"),
        (state(nested_blocksize=2**60), {}, "power of two of scales, got 1152921504606846976"),
        (state(nested_blocksize=3), {}, "nested_absmax: F32 of shape"),
        (put(f"{UP}.weight", lambda a: a[:-1]), {}, "does not hold 2048 codes of 4 bits"),
        (put(f"{UP}.weight.absmax", lambda a: a[:-1]), {}, r"absmax: U8 of shape"),
        (put(f"{UP}.weight.absmax", lambda a: a.astype(np.float32)), {}, "absmax: F32 of shape"),
        (put(f"{UP}.weight.quant_map", lambda a: a[:15]), {}, "quant_map: F32 of shape"),
        (put(f"{UP}.weight.nested_quant_map", lambda a: a[:255]), {}, "nested_quant_map: F32 of shape"),
        (lambda arrays: arrays.pop(f"{UP}.weight.nested_absmax"), {}, "absmax: U8 of shape .* expected F32"),
        (lambda arrays: arrays.pop(f"{UP}.weight.absmax"), {}, "absmax: missing"),
        (lambda arrays: arrays.pop(STATE), {}, "quant_state.bitsandbytes__nf4: missing"),
        (lambda arrays: None, {"quantization_config": None}, "no quantization_config of bitsandbytes'"),
    ],
)  # fmt: skip
def test_damaged_nf4_folders_are_named(tmp_path, change, config, message):
    _, folder = quantized(tmp_path, "nf4")
    with pytest.raises(FormatError, match=message):
        load_model(damaged(folder, change, **config))


def test_codes_in_words_of_another_type(tmp_path):
    """With bnb_4bit_quant_storage, bfloat16 or float32 arrays hold the same bytes."""
    model, folder = quantized(tmp_path, "nf4")
    damaged(folder, put(f"{UP}.weight", lambda a: a.reshape(-1).view(np.float32).reshape(-1, 1)))
    same_weights(model, load_model(folder))
