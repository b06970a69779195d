"""The fingerprint of a base does not depend on its place, but on its weights."""

import re

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import optim
from pyloss.tuner import linear_to_lora_layers, unfreeze_layers
from pyloss.tuner.run.fingerprint import fingerprint
from pyloss.tuner.trainer import TrainingArgs, train

DATA = [([1, 2, 3, 4, 5, 6], 1), ([4, 3, 2, 1, 2], 0)]


def of(model):
    return fingerprint(model, set(model.trainable_parameters()))


def adapted(folder):
    model = pyloss.load_model(folder)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0})
    return model


def settings(folder, iters, **more):
    return TrainingArgs(
        iters=iters,
        batch_size=2,
        adapter_file=folder / "adapters.safetensors",
        progress=False,
        seed=0,
        **more,
    )


def test_it_is_the_bases_whatever_is_trained_over_it(tmp_path):
    base = of(tiny.load_tiny(tmp_path / "m"))
    assert of(pyloss.load_model(tmp_path / "m")) == base
    model = adapted(tmp_path / "m")
    before = of(model)
    for array in model.trainable_parameters().values():
        array[...] = 7
    assert of(model) == before
    assert of(adapted(tmp_path / "m")) == before


@pytest.mark.parametrize("where", ["first", "last", "norm"])
def test_one_matrix_or_norm_that_differs_is_noticed(tmp_path, where):
    model = tiny.load_tiny(tmp_path / "m")
    before = of(model)
    if where == "norm":
        model.layers[0].input_layernorm.weight[0] += 1
    else:
        layer = model.layers[0].mlp.up_proj
        values = np.array(
            layer.weight if isinstance(layer.weight, np.ndarray) else layer.weight.dequantize()
        )
        values.reshape(-1)[0 if where == "first" else -1] += 1
        model.set_module(
            "model.layers.0.mlp.up_proj",
            type(layer).from_weight(pyloss.Weight.quantize(values, "f32")).freeze(),
        )
    assert of(model) != before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (slice(None), "m (llama, 3 layers of 32), and this one is other"),
        (slice(0, 1), "its weights are not those of this one: the shapes agree"),
    ],
    ids=["all", "one row"],
)
def test_a_run_is_not_resumed_over_another_base(tmp_path, changed, message):
    tiny.load_tiny(tmp_path / "m")
    model = adapted(tmp_path / "m")
    train(model, optim.AdamW(0.01), DATA, None, settings(tmp_path / "a", 2))
    other = pyloss.load_model(tmp_path / "m")
    layer = other.layers[0].mlp.down_proj  # a layer without an adapter
    values = np.array(layer.weight.dequantize())
    values[changed] *= 1.01
    stored = type(layer).from_weight(pyloss.Weight.quantize(values, "f32"))
    other.set_module("model.layers.0.mlp.down_proj", stored.freeze())
    other.save(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    expected = re.escape(f"over another base model: {message}") + ".*--resume-adapter-file"
    with pytest.raises(ValueError, match=expected):
        train(
            adapted(tmp_path / "other"),
            optim.AdamW(0.01),
            DATA,
            None,
            settings(tmp_path / "a", 4, resume=True),
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    result = train(
        adapted(tmp_path / "m"),
        optim.AdamW(0.01),
        DATA,
        None,
        settings(tmp_path / "a", 4, resume=True),
    )
    assert result.iterations == 4


def test_full_fine_tuning_is_resumed_over_what_it_leaves_alone(tmp_path):
    tiny.load_tiny(tmp_path / "m")
    for iters, resume in ((2, False), (4, True)):
        model = pyloss.load_model(tmp_path / "m")
        unfreeze_layers(model, 1, ["mlp"])
        result = train(
            model, optim.AdamW(0.01), DATA, None, settings(tmp_path / "a", iters, resume=resume)
        )
    assert result.iterations == 4
