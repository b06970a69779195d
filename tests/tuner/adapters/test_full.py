"""Full fine-tuning: trained weights and their form; saving, loading, resuming and merging."""

import json
import logging

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_training import samples

import pyloss
from pyloss import nn
from pyloss.models import load_model
from pyloss.tuner import (
    linear_to_lora_layers,
    load_adapters,
    remove_lora_layers,
    save_adapter,
    unfreeze_layers,
)
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
LINEARS = [f"self_attn.{n}_proj.weight" for n in "qkvo"] + [
    f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]


def load_quantised(folder, format="Q4_1", **options):
    tiny.write_gguf(folder / "model.gguf", format=format, **options)
    return load_model(folder / "model.gguf")


def train(model, folder, iters=6, **settings):
    options = {
        "batch_size": 2,
        "iters": iters,
        "steps_per_save": 2,
        "steps_per_eval": 2,
        "seed": 3,
        "progress": False,
    } | settings
    args = pyloss.TrainingArgs(adapter_file=folder / "adapters.safetensors", **options)
    pyloss.train(model, pyloss.optim.AdamW(0.01), samples(), samples(3, 9), args)
    return model


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(0, []), (1, [2]), (2, [1, 2]), (-1, [0, 1, 2])]
)
def test_the_last_layers_are_trained_whole(tmp_path, num_layers, layers):
    model = tiny.load_tiny(tmp_path)
    before = model(TOKENS)
    unfreeze_layers(model, num_layers)
    assert sorted(model.trainable_parameters()) == sorted(
        f"model.layers.{i}.{name}" for i in layers for name in LINEARS + NORMS
    )
    assert all(
        a.dtype == np.float32 and a.flags.carray for a in model.trainable_parameters().values()
    )
    np.testing.assert_allclose(model(TOKENS), before, atol=1e-5)
    assert len(model.stored()) == 1 + 7 * (3 - len(layers))
    assert model.adapter_config == {
        "fine_tune_type": "full",
        "num_layers": num_layers,
        "lora_parameters": None,
    }


def test_biases_are_trained_too(tmp_path):
    model = tiny.load_tiny(tmp_path, bias=True)
    unfreeze_layers(model, 1)
    assert len(model.trainable_parameters()) == 7 + 7 + 2


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["mlp"], [f"model.layers.2.{n}" for n in LINEARS[4:]]),
        (
            ["self_attn.q_proj", "input_layernorm"],
            ["model.layers.2.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight"],
        ),
        (
            ["model.embed_tokens", "mlp.up_proj"],
            ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"],
        ),
        (["lm_head", "model.norm"], ["lm_head.weight", "model.norm.weight"]),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_keys_choose_parts(tmp_path, keys, names):
    model = tiny.load_tiny(tmp_path, tied=False)
    unfreeze_layers(model, 1, keys)
    assert sorted(model.trainable_parameters()) == sorted(names)
    assert model.adapter_config["full_keys"] == keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["mlp.upproj"],
            r"'mlp\.upproj' is not|no part of the model is named 'mlp\.upproj'; did you mean .*mlp\.up_proj",
        ),
        (["x", "mlp"], "'x'"),
    ],
)
def test_keys_that_match_nothing(tmp_path, keys, message):
    model = tiny.load_tiny(tmp_path)
    with pytest.raises(ValueError, match=message):
        unfreeze_layers(model, 1, keys)
    with pytest.raises(ValueError, match="num_layers is 4, but the model has 3"):
        unfreeze_layers(model, 4)
    assert not model.trainable_parameters() and model.adapter_config is None


def test_adapters_and_trained_weights_do_not_mix(tmp_path):
    model = tiny.load_tiny(tmp_path)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0})
    with pytest.raises(
        ValueError, match=r"has an adapter; fuse\(\) or remove_lora_layers\(\) first"
    ):
        unfreeze_layers(model, 1)
    remove_lora_layers(model)
    unfreeze_layers(model, 1)


@pytest.mark.parametrize("format", ["Q4_1", "Q8_0", "BF16", "F16"])
def test_stored_formats_are_converted_and_the_log_says_so(tmp_path, caplog, format):
    model = load_quantised(tmp_path, format)
    before, stored = model(TOKENS), dict(model.stored())
    with caplog.at_level(logging.INFO, "pyloss"):
        unfreeze_layers(model, 2)
    size = 2 * 4 * (32 * 32 * 2 + 16 * 32 * 2 + 64 * 32 * 3)
    assert f"converts {size / 1e6:.0f} MB of {format.lower()}" in caplog.text
    np.testing.assert_allclose(model(TOKENS), before, atol=1e-4)
    assert (
        type(model.layers[2].mlp.up_proj) is nn.Linear
        and model.layers[0].mlp.up_proj.weight.format == format.lower()
    )
    np.testing.assert_array_equal(
        model.layers[2].self_attn.q_proj.weight,
        stored["model.layers.2.self_attn.q_proj.weight"].dequantize(),
    )
    assert len(model.trainable_parameters()) == 18


def test_experts_are_trained_as_one_array(caplog):
    matrices = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    stack = WeightStack([Weight.quantize(matrix, "q8_0") for matrix in matrices])
    model, layer = nn.Module(), nn.Module()
    model.layers, layer.mlp = [layer], nn.SwitchLinear.from_weight(stack)
    with caplog.at_level(logging.INFO, "pyloss"):
        unfreeze_layers(model, 1)
    weight = model.trainable_parameters()["layers.0.mlp.weight"]
    np.testing.assert_array_equal(weight, stack.dequantize())
    assert weight.shape == (3, 4, 32) and "of q8_0" in caplog.text


def test_a_tied_table_gets_the_gradient_of_both_its_uses(tmp_path):
    model = tiny.load_tiny(tmp_path)
    unfreeze_layers(model, 0, ["model.embed_tokens"])
    batch, lengths = TOKENS.astype(np.int32), np.array([[0, 8]], np.int32)

    def loss():
        return float(pyloss.tuner.default_loss(model, batch, lengths)[0])

    _, grads = nn.value_and_grad(model, pyloss.tuner.default_loss)(model, batch, lengths)
    assert list(grads) == ["model.embed_tokens.weight"]
    table = model.trainable_parameters()["model.embed_tokens.weight"]
    # Tokens that are input and target, only target, and neither (head only).
    for place in ((1, 5), (6, 0), (20, 3)):
        ends, old = [], table[place]
        for step in (1e-2, -1e-2):
            table[place] = old + step
            ends.append(loss())
        table[place] = old
        assert grads["model.embed_tokens.weight"][place] == pytest.approx(
            (ends[0] - ends[1]) / 2e-2, rel=0.02, abs=1e-4
        )


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("keys", [None, ["mlp", "model.embed_tokens", "model.norm"]])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, monkeypatch, quantised, keys):
    def fresh():
        return (
            load_quantised(tmp_path) if quantised else tiny.load_tiny(tmp_path / "model", bias=True)
        )

    model = fresh()
    unfreeze_layers(model, 2, keys)
    train(model, tmp_path / "run", keep_best=False)
    logits, names = model(TOKENS), set(model.trainable_parameters())
    save_adapter(model, tmp_path / "saved")
    for folder in (tmp_path / "run", tmp_path / "saved"):
        assert set(load_file(folder / "adapters.safetensors")) == names
        assert json.loads((folder / "adapter_config.json").read_text()) == model.adapter_config
        again = load_adapters(fresh(), folder)
        assert again(TOKENS).tobytes() == logits.tobytes()
        assert (
            set(again.trainable_parameters()) == names
            and again.adapter_config == model.adapter_config
        )
        assert set(again.stored()) == set(model.stored())
    again.fuse().save(tmp_path / "fused")
    np.testing.assert_allclose(load_model(tmp_path / "fused")(TOKENS), logits, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"saved in the layout 'mlx' or by model\.save\(folder\), not as 'peft'"
    ):
        save_adapter(model, tmp_path / "peft", format="peft")
    with pytest.raises(
        ValueError, match="no trainable weights to save; call unfreeze_layers first"
    ):
        save_adapter(model.freeze(), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    models = []
    for folder, parts in ((tmp_path / "whole", [8]), (tmp_path / "parts", [3, 8])):
        for i, iters in enumerate(parts):
            model = tiny.load_tiny(tmp_path / "model")
            unfreeze_layers(model, 1)
            train(model, folder, iters, resume=i > 0)
        models.append(model)
    for name, array in models[0].trainable_parameters().items():
        np.testing.assert_array_equal(array, models[1].trainable_parameters()[name])
    unfreeze_layers(model, 2)
    with pytest.raises(
        ValueError, match="of another model or adapter: 9 parameters are in one only"
    ):
        train(model, tmp_path / "parts", resume=True)


def test_weights_of_another_model_list_all_that_does_not_fit(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    unfreeze_layers(model, 1)
    save_adapter(model, tmp_path / "saved")
    path = tmp_path / "saved" / "adapters.safetensors"
    arrays = load_file(path)
    arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 31), np.float32)
    arrays["model.layers.3.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)
    save_file(arrays, path)
    other = tiny.load_tiny(tmp_path / "model")
    before = other(TOKENS)
    with pytest.raises(ValueError, match="not one for this model") as caught:
        load_adapters(other, tmp_path / "saved")
    assert "model.layers.2.mlp.up_proj.weight: has shape (64, 31), expected (64, 32)" in str(
        caught.value
    )
    assert "model.layers.3.mlp.up_proj.weight: the model has no such parameter" in str(caught.value)
    assert other(TOKENS).tobytes() == before.tobytes() and isinstance(
        other.layers[2].mlp.up_proj.weight, Weight
    )
    save_file({}, path)
    with pytest.raises(ValueError, match="has no weights"):
        load_adapters(other, tmp_path / "saved")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no adapters\.safetensors"):
        load_adapters(other, tmp_path / "saved")
