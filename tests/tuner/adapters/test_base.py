"""An adapter knows the base that it was made for, and says so over another one."""

import json
import warnings

import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_training import samples

import pyloss
from pyloss.errors import FormatError
from pyloss.models import load_model
from pyloss.models.naming import name_of
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter, unfreeze_layers
from pyloss.tuner.adapters.base import base_of

FILES = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
MODEL = r"{} \(llama, 3 layers of 32\)"


def over(folder, **options):
    model = tiny.load_tiny(folder, **options)
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.0})
    return model


def silently(model, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapters(model, adapter)


@pytest.mark.parametrize("layout", list(FILES))
def test_another_model_of_the_same_shapes_is_named(tmp_path, layout):
    save_adapter(over(tmp_path / "first"), tmp_path / "a", layout)
    silently(load_model(tmp_path / "first"), tmp_path / "a")
    other = tiny.load_tiny(tmp_path / "second", seed=7)
    expected = rf"was made for {MODEL.format('first')}, and this model is {MODEL.format('second')}"
    with pytest.warns(UserWarning, match=f"{expected}: .*nothing in common"):
        load_adapters(other, tmp_path / "a")


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_another_format_of_the_base_is_the_same_base(tmp_path, format):
    save_adapter(over(tmp_path / "first"), tmp_path / "a")
    tiny.write_gguf(tmp_path / "base.gguf", format=format)
    silently(load_model(tmp_path / "base.gguf"), tmp_path / "a")
    tiny.write_gguf(tmp_path / "other.gguf", format=format, seed=7)
    with pytest.warns(UserWarning, match=r"this model is other \(llama.*nothing in common"):
        load_adapters(load_model(tmp_path / "other.gguf"), tmp_path / "a")


def test_a_base_that_was_tuned_further_is_said(tmp_path):
    """Such as one that this very adapter is fused into."""
    model = over(tmp_path / "first")
    for array in model.trainable_parameters().values():
        array[...] = 0.1 * np.random.default_rng(0).standard_normal(array.shape)
    save_adapter(model, tmp_path / "a")
    model.fuse().save(tmp_path / "fused")
    with pytest.warns(UserWarning, match=r"and this model is fused .*are related, but differ"):
        load_adapters(load_model(tmp_path / "fused"), tmp_path / "a")


def test_the_record_is_made_of_the_base_whatever_is_over_it(tmp_path):
    base = base_of(tiny.load_tiny(tmp_path / "m"))
    assert len(base.weights) == 16 and base.name == "m" and base.format == "f32"
    model = over(tmp_path / "m")
    for array in model.trainable_parameters().values():
        array[...] = 7
    assert base_of(model) == base


def test_weights_trained_in_full_remember_what_they_were(tmp_path):
    model = tiny.load_tiny(tmp_path / "m")
    base = base_of(model)
    unfreeze_layers(model, 1)
    for array in model.trainable_parameters().values():
        array += 1
    save_adapter(model, tmp_path / "a")
    again = load_model(tmp_path / "m")
    silently(again, tmp_path / "a")
    assert base_of(again) == base
    save_adapter(again, tmp_path / "b")
    silently(load_model(tmp_path / "m"), tmp_path / "b")
    with pytest.warns(UserWarning, match=r"nothing in common"):
        load_adapters(tiny.load_tiny(tmp_path / "other", seed=7), tmp_path / "b")
    # A new adapter over the tuned weights is made for these.
    again.freeze()
    linear_to_lora_layers(again, 1, {"rank": 2, "scale": 1.0})
    assert base_of(again) != base


def test_every_file_of_a_run_says_it(tmp_path):
    options = {"batch_size": 2, "iters": 4, "steps_per_save": 2, "steps_per_eval": 2}
    args = pyloss.TrainingArgs(
        adapter_file=tmp_path / "a" / "adapters.safetensors", progress=False, seed=1, **options
    )
    model = over(tmp_path / "first")
    pyloss.train(model, pyloss.optim.AdamW(0.01), samples(), samples(3, 9), args)
    other = tiny.load_tiny(tmp_path / "second", seed=7)
    names = ("adapters", "best_adapters", "0000002_adapters", "0000004_adapters")
    for name in names:
        file = tmp_path / "a" / f"{name}.safetensors"
        with pytest.warns(UserWarning, match=r"was made for first.*this model is second"):
            load_adapters(other, file)
        other = load_model(tmp_path / "second")
    # mlx-lm reads the same arrays and configuration as before
    assert set(load_file(tmp_path / "a" / "adapters.safetensors")) == set(
        model.trainable_parameters()
    )
    args = pyloss.TrainingArgs(
        adapter_file=args.adapter_file, progress=False, resume=True, **options | {"iters": 6}
    )
    linear_to_lora_layers(other, 2, {"rank": 3, "scale": 2.0})
    with pytest.raises(ValueError, match=r"was over another base model: first \(llama.*second"):
        pyloss.train(other, pyloss.optim.AdamW(0.01), samples(), samples(3, 9), args)


def test_a_model_of_other_sizes_is_named_before_the_shapes(tmp_path):
    save_adapter(over(tmp_path / "first"), tmp_path / "a")
    other = tiny.load_tiny(tmp_path / "wide", hidden_size=64)
    expected = (
        r"was made for first \(llama, 3 layers of 32\), and this model is wide \(llama, 3 layers of "
        r"64\), which it does not fit: model.layers.1.mlp.down_proj: lora_a [^\n]*, and 13 more$"
    )
    with pytest.raises(ValueError, match=expected):
        load_adapters(other, tmp_path / "a")


def test_adapters_without_a_record_load_and_damaged_records_are_named(tmp_path):
    save_adapter(over(tmp_path / "first"), tmp_path / "a")
    file = tmp_path / "a" / "adapters.safetensors"
    arrays = load_file(file)
    with safe_open(file, framework="numpy") as opened:
        base = json.loads(opened.metadata()["base"])
    other = tiny.load_tiny(tmp_path / "second", seed=7)
    save_file(arrays, file)
    silently(other, tmp_path / "a")
    wrong = ["x", "[]", "{}", json.dumps({**base, "weights": [1]}), json.dumps({**base, "name": 3})]
    for text in [*wrong, json.dumps({**base, "weights": {"a": ["b"]}}), "[" * 100_000]:
        save_file(arrays, file, {"base": text})
        with pytest.raises(FormatError, match="base"):
            load_adapters(load_model(tmp_path / "first"), tmp_path / "a")


def test_names_of_models(tmp_path):
    cache = tmp_path / "hub" / "models--org--small-model" / "snapshots" / "0123abc"
    assert name_of(cache) == "org/small-model"
    assert name_of(cache / "model-q4.gguf") == "org/small-model"
    assert name_of(tmp_path / "My.Model-1.2") == "My.Model-1.2"
    assert name_of(tmp_path / "x.Q4_1.gguf") == "x.Q4_1"
