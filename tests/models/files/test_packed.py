"""GPTQ's and AWQ's folders give what their dequantized weights give, and are refused by name."""

import json
from itertools import islice

import ml_dtypes
import numpy as np
import pytest
import tiny
from packed_folders import write_packed, write_plain
from safetensors.numpy import load_file, save_file

import pyloss
from pyloss import FormatError, nn
from pyloss.generation.single import generate_tokens
from pyloss.losses import softmax_cross_entropy
from pyloss.models import conversion, load_model
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantization
from pyloss.models.synthetic import random_model
from pyloss.tuner.trainer import grad_checkpoint
from pyloss.tuner.utils import linear_to_lora_layers

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
BIG = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
CASES = {
    "gptq": {},
    "symmetric": {"sym": True},
    "v2": {"format": "gptq_v2"},
    "bias": {"bias": True},
    "one group": {"group_size": -1},
    "unequal groups": {"group_size": 64},
    "no g_idx": {"g_idx": False},
    "g_idx of zeros": {"g_idx": "zeros"},
    "desc_act": {"order": True},
    "desc_act, unequal groups": {
        "order": True,
        "group_size": 64,
        "sym": True,
        "hidden_size": 128,
        "head_dim": 32,
    },
    "bfloat16": {"scale_type": ml_dtypes.bfloat16},
    "float32": {"scale_type": np.float32},
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "3 bits, desc_act": {"bits": 3, "order": True},
    "8 bits": {"bits": 8, "sym": True},
    "zero biases": {"zero_biases": True},
    "awq": {"method": "awq"},
    "awq, one group": {"method": "awq", "group_size": -1},
    "awq, bias": {"method": "awq", "bias": True},
}


def both(tmp_path, **case):
    """The packed model, and the one of floats."""
    c, arrays = write_packed(tmp_path / "packed", **{**BIG, **case})
    write_plain(tmp_path / "plain", c, arrays)
    return load_model(tmp_path / "packed"), load_model(tmp_path / "plain"), (c, arrays)


@pytest.mark.parametrize("case", CASES)
def test_packed_folders_are_their_dequantized_weights(tmp_path, case):
    packed, plain, (c, arrays) = both(tmp_path, **CASES[case])
    bits = CASES[case].get("bits", 4)
    stored = packed.stored()
    kinds = {weight.format for name, weight in stored.items() if "layers" in name}
    assert kinds == {f"affine{bits}"}
    assert stored["lm_head.weight"].format == "f32"
    for name, weight in plain.stored().items():
        if case != "float32":
            np.testing.assert_array_equal(stored[name].dequantize(), weight.dequantize())
        ordered = "order" in CASES[case] and "layers" in name
        assert (stored[name].columns is not None) == ordered
    np.testing.assert_allclose(packed(TOKENS), plain(TOKENS), atol=1e-4)
    np.testing.assert_allclose(packed(TOKENS)[0], tiny.logits(c, arrays, TOKENS[0]), atol=1e-4)


@pytest.mark.parametrize("order", [None, True])
@pytest.mark.parametrize("sym", [False, True])
def test_symmetric_scales_stay_in_their_type(tmp_path, sym, order):
    packed, *_ = both(tmp_path, sym=sym, order=order)
    weight = packed.stored()["model.layers.0.mlp.up_proj.weight"]
    assert weight.groups.scale_format == ("f16" if sym else "f32")


def gradients(model, seed=1, dropout=0.0, kind="lora", steps=1):
    pyloss.random.seed(seed)
    linear_to_lora_layers(
        model, -1, {"rank": 4, "scale": 2.0, "dropout": dropout}, use_dora=kind == "dora"
    )
    rng = np.random.default_rng(seed)
    for name, array in model.trainable_parameters().items():
        if name.endswith("lora_b"):
            array[...] = rng.standard_normal(array.shape) / 10
    labels = np.roll(TOKENS, -1)

    def loss(model, tokens):
        return softmax_cross_entropy(model(tokens), labels, reduction="mean")

    for _ in range(steps):  # the second one runs the recorded calls
        found = nn.value_and_grad(model, loss)(model, TOKENS)
    return found


def assert_same(found, wanted, within=1e-5):
    """Two losses with their gradients; products add in another order where columns have one."""
    (one, ours), (other, theirs) = found, wanted
    assert one == pytest.approx(other, abs=1e-5) and ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        atol = within * max(1, np.abs(gradient).max())
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=atol, err_msg=name)


def same_gradients(packed, plain):
    assert_same(gradients(packed), gradients(plain))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "case", ["gptq", "desc_act", "desc_act, unequal groups", "3 bits, desc_act", "awq"]
)
def test_adapters_over_packed_layers(tmp_path, case, kind):
    packed, plain, _ = both(tmp_path, **CASES[case])
    one, ours = gradients(packed, kind=kind, steps=3)
    other, theirs = gradients(plain, kind=kind, steps=3)
    # With 3 bits, rounding each weight once changes gradients by up to 3.3e-5 of the largest one or
    # of 1; swapping two columns of one weight changes them by at least 0.1.
    assert_same((one, ours), (other, theirs), 1e-4 if "3 bits" in case else 1e-5)
    assert len(ours) == (3 if kind == "dora" else 2) * 7 * 3
    for model in (packed, plain) if kind == "lora" else ():  # DoRA is never recorded
        programs = [vars(layer)["_recorded"][1]._programs for layer in model.layers]
        assert all(program and None not in program.values() for program in programs)
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 1e-4 or "lora_b" not in name


def test_gradients_of_columns_in_another_order_in_float64(tmp_path):
    packed, *_ = both(tmp_path, order=True)
    weight = packed.stored()["model.layers.0.mlp.down_proj.weight"]
    rng = np.random.default_rng(3)
    x, a, b = (rng.standard_normal(s) for s in ((5, 160), (160, 4), (4, 64)))

    def f(x, a, b):
        return (pyloss.ops.lora_linear(x, weight, None, a, b, 0.5) ** 2).sum()

    wide = pyloss.value_and_grad(f, argnums=(0, 1, 2))(x, a, b)
    narrow = pyloss.value_and_grad(f, argnums=(0, 1, 2))(*(t.astype(np.float32) for t in (x, a, b)))
    assert narrow[0] == pytest.approx(float(wide[0]), rel=1e-5)
    for one, other in zip(narrow[1], wide[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_dropout_and_checkpointing_over_columns_in_another_order(tmp_path):
    packed, *_ = both(tmp_path, order=True)
    once = gradients(packed, dropout=0.3)
    again, *_ = both(tmp_path, order=True)
    grad_checkpoint(again.layers[0])
    other = gradients(again, dropout=0.3)
    assert once[0] == other[0]
    for name, gradient in once[1].items():
        np.testing.assert_allclose(other[1][name], gradient, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("order", [None, True])
def test_generation_and_fusing(tmp_path, order):
    packed, plain, _ = both(tmp_path, order=order)
    for model in (packed, plain):
        gradients(model)
    before = packed(TOKENS)
    np.testing.assert_allclose(before, plain(TOKENS), atol=1e-4)
    one, other = (list(islice(generate_tokens(model, [3, 1, 4]), 12)) for model in (packed, plain))
    assert one == other
    packed.fuse(dequantize=True)
    np.testing.assert_allclose(packed(TOKENS), before, atol=1e-4)


@pytest.mark.parametrize("order", [None, True])
def test_saving(tmp_path, order):
    packed, *_ = both(tmp_path, order=order, sym=True)
    packed.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    kinds = {weight.format for name, weight in again.stored().items() if "layers" in name}
    assert kinds == ({"f32"} if order else {"affine4"})
    np.testing.assert_allclose(again(TOKENS), packed(TOKENS), atol=1e-4 if order else 0)
    conversion.quantize_model(packed, "q8", 32)
    assert packed.stored()["model.layers.0.mlp.up_proj.weight"].columns is None
    conversion.dequantize_model(again, "bfloat16")
    assert not order or {weight.format for weight in again.stored().values()} == {"f32"}


@pytest.mark.parametrize("order", [None, True])
def test_layers_may_differ_under_dynamic(tmp_path, order):
    c, arrays = write_packed(tmp_path / "four", order=order, **BIG)
    c, others = write_packed(tmp_path / "eight", order=order, bits=8, group_size=64, **BIG)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("four", "eight"))
    up = "model.layers.1.mlp.up_proj"
    one |= {name: array for name, array in other.items() if name.startswith(up)}
    save_file(one, tmp_path / "four" / "model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj.scales: has shape \(1, 160\), expected \(2"):
        load_model(tmp_path / "four")
    settings = {"bits": 4, "group_size": 32, "dynamic": {"+:.*up_proj": {"bits": 8}}}
    c["quantization_config"] |= settings
    (tmp_path / "four" / "config.json").write_text(json.dumps(c))
    model = load_model(tmp_path / "four")
    arrays[f"{up}.weight"] = others[f"{up}.weight"]
    assert model.stored()[f"{up}.weight"].format == "affine8"
    np.testing.assert_allclose(model(TOKENS)[0], tiny.logits(c, arrays, TOKENS[0]), atol=1e-4)


def gptq(**settings):
    return {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, **settings}
    }


def awq(**settings):
    return {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, **settings}
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gptq(bits=5), "bits must be one of 2, 3, 4, 8, got 5"),
        (gptq(bits="4"), "got '4'"),
        (gptq(checkpoint_format="marlin"), "by gptq in the format 'marlin'; pyloss reads gptq and gptq_v2"),
        (gptq(format="bitblas"), "in the format 'bitblas'"),
        (gptq(is_marlin_format=True), "is_marlin_format True of gptq is not supported"),
        (gptq(rotation="hadamard"), "rotation 'hadamard' of gptq is not supported"),
        (gptq(group_size=16), "group_size must be -1 or a multiple of 32, got 16"),
        (gptq(group_size="a"), "expected -1 or a positive integer, got 'a'"),
        (gptq(group_size=0), "got 0"),
        (awq(bits=8), "bits must be one of 4, got 8"),
        (awq(version="gemv"), "by awq in the format 'gemv'; pyloss reads gemm"),
        (awq(version="GEMV_FAST"), "in the format 'gemv_fast'"),
        (awq(format="marlin"), "in the format 'marlin'"),
        (awq(version=[1]), r"in the format \[1\]"),
        (awq(backend="llm-awq"), "in the format 'llm-awq'"),
        (awq(zero_point=False), "awq without zero points"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        Quantization("config.json", content)
    assert "config.json" in str(caught.value)


UP = "model.layers.0.mlp.up_proj"


def put(part, value):
    return lambda arrays: arrays.__setitem__(f"{UP}.{part}", value(arrays[f"{UP}.{part}"]))


@pytest.mark.parametrize(
    ("change", "case", "message"),
    [
        (put("qweight", lambda a: a[:-1]), {}, r"up_proj.qweight: I32 of shape \(7, 160\), expected I32 of \(8, 160\)"),
        (put("qweight", lambda a: a.astype(np.float32)), {}, "qweight: F32 of shape"),
        (put("qzeros", lambda a: a[:, 1:]), {}, "qzeros: I32 of shape"),
        (put("scales", lambda a: a[:1]), {}, r"g_idx: names groups from 0 to 1, and there are 1"),
        (put("scales", lambda a: a[:, 1:]), {}, r"scales: has shape \(2, 159\), expected \(2, 160\)"),
        (put("scales", lambda a: a[:1]), {"g_idx": False}, r"scales: has shape \(1, 160\), expected \(2, 160\)"),
        (lambda arrays: None, {"g_idx": False, "settings": {"group_size": 64}}, r"scales: has shape \(2, 64\), expected \(1, 64\), as group_size says"),
        (lambda arrays: None, {"method": "awq", "settings": {"group_size": 1 << 63}}, r"has shape \(2, 64\), expected \(1, 64\)"),
        (put("scales", lambda a: a.astype(np.int32)), {}, "stored as I32, expected F32, F16 or BF16"),
        (put("g_idx", lambda a: a[1:]), {}, r"g_idx: I32 of shape \(63,\), expected I32 of \(64,\)"),
        (put("g_idx", lambda a: a - 1), {}, "names groups from -1 to 0, and there are 2"),
        (put("g_idx", lambda a: np.where(np.arange(64) < 40, 0, 1).astype(np.int32)), {}, "not in runs of 32"),
        (lambda arrays: arrays.pop(f"{UP}.qzeros"), {}, "up_proj.qzeros: missing"),
        (lambda arrays: arrays.pop(f"{UP}.qweight"), {}, "up_proj"),
        (put("bias", lambda a: a + 1), {"zero_biases": True}, "up_proj.bias: no part of this configuration"),
        (put("qweight", lambda a: a[:, 1:]), {"method": "awq"}, r"qweight: I32 of shape \(64, 19\), expected I32 of \(64, 20\)"),
        (lambda arrays: None, {"settings": {"quant_method": "awq"}}, "qweight: I32 of shape"),
        (lambda arrays: None, {"settings": {"bits": 8}}, "qweight: I32 of shape"),
        (lambda arrays: None, {"settings": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "config.json has no quantization_config of its"),
        (lambda arrays: None, {"skip": ("embed_tokens",), "order": True, "vocab_size": 32}, "heads and experts quantized with desc_act"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(tmp_path, change, case, message):
    write_packed(tmp_path, change=change, **{**BIG, **case})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_packed_head_without_desc_act(tmp_path):
    packed, plain, _ = both(tmp_path, skip=("embed_tokens",), vocab_size=32)
    assert packed.stored()["lm_head.weight"].format == "affine4"
    np.testing.assert_allclose(packed(TOKENS), plain(TOKENS), atol=1e-4)


@pytest.mark.parametrize("order", [None, True])
@pytest.mark.parametrize("family", ["smollm3", "granite", "phi3", "olmo2", "olmo3"])
def test_other_families(tmp_path, family, order):
    packed, plain, _ = both(tmp_path, order=order, **tiny.FAMILIES[family])
    assert {w.format for n, w in packed.stored().items() if "layers" in n} == {"affine4"}
    np.testing.assert_allclose(packed(TOKENS), plain(TOKENS), atol=1e-4)
    same_gradients(packed, plain)


def mixture_folder(folder, **case):
    """A mixture of experts, each with tensors of its own, as packed folders have them."""
    sizes = {**tiny.SIZES, "hidden_size": 64, "num_hidden_layers": 2}
    random_model(ModelConfig("mixtral", mixture=Mixture(4, 2, 64, True), **sizes)).save(
        folder / "a"
    )
    c = json.loads((folder / "a" / "config.json").read_text())
    arrays = load_file(folder / "a" / "model.safetensors")
    skip = ("embed_tokens", "lm_head", ".gate.")
    return write_packed(folder / "packed", given=(c, arrays), skip=skip, **case)


@pytest.mark.parametrize("case", [{}, {"sym": True}, {"method": "awq"}, {"bits": 8}])
def test_experts(tmp_path, case):
    c, arrays = mixture_folder(tmp_path, **case)
    write_plain(tmp_path / "plain", c, arrays)
    packed, plain = (load_model(tmp_path / name) for name in ("packed", "plain"))
    stored = packed.stored()["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"]
    assert stored.format == f"affine{case.get('bits', 4)}" and stored.shape == (4, 64, 64)
    np.testing.assert_allclose(packed(TOKENS), plain(TOKENS), atol=1e-4)
    packed.save(tmp_path / "saved")
    np.testing.assert_allclose(load_model(tmp_path / "saved")(TOKENS), packed(TOKENS), atol=1e-6)
    same_gradients(packed, plain)


def test_experts_with_desc_act_are_refused(tmp_path):
    mixture_folder(tmp_path, order=True)
    with pytest.raises(ValueError, match="experts.*quantized with desc_act are not supported"):
        load_model(tmp_path / "packed")


@pytest.mark.parametrize("order", [None, True])
def test_gguf_and_fusing_by_export(tmp_path, order):
    sizes = {**BIG, "vocab_size": tiny.TOKENS}
    write_packed(tmp_path / "packed", order=order, **sizes)
    model, tokenizer = load_model(tmp_path / "packed"), tiny.byte_tokenizer()
    base = model(TOKENS)
    pyloss.export(model, tmp_path / "a.gguf", "gguf", tokenizer)
    again = load_model(tmp_path / "a.gguf")
    assert {w.format for n, w in again.stored().items() if "layers" in n} == {"f16"}
    np.testing.assert_allclose(again(TOKENS), base, atol=0.1)
    gradients(model)
    adapted = model(TOKENS)
    assert np.abs(adapted - base).max() > 0.1
    pyloss.export(model, tmp_path / "b.gguf", "gguf", tokenizer, dequantize=True, type="f32")
    pyloss.export(model, tmp_path / "hf", "hf", dequantize=True)
    for name in ("b.gguf", "hf"):
        np.testing.assert_allclose(load_model(tmp_path / name)(TOKENS), adapted, atol=1e-3)
    if order:  # its layers become floats anyway, so nothing is lost
        pyloss.export(model, tmp_path / "lossless", "hf")
        np.testing.assert_allclose(load_model(tmp_path / "lossless")(TOKENS), adapted, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_settings_in_a_file_of_their_own(tmp_path, method):
    """As AutoGPTQ and AutoAWQ wrote them before transformers had a place for them."""
    c, arrays = write_packed(tmp_path, method=method, **BIG)
    own = c.pop("quantization_config")
    del own["quant_method"]
    if method == "awq":
        own |= {"w_bit": own.pop("bits"), "q_group_size": own.pop("group_size")}
    (tmp_path / "config.json").write_text(json.dumps(c))
    with pytest.raises(FormatError, match="config.json has no quantization_config"):
        load_model(tmp_path)
    name = {"gptq": "quantize_config.json", "awq": "quant_config.json"}[method]
    (tmp_path / name).write_text(json.dumps(own))
    got = load_model(tmp_path)(TOKENS)[0]
    np.testing.assert_allclose(got, tiny.logits(c, arrays, TOKENS[0]), atol=1e-4)
    (tmp_path / name).write_text(json.dumps({**own, "bits": 7, "w_bit": 7}))
    with pytest.raises(ValueError, match=f"{name}: .*got 7"):
        load_model(tmp_path)
