"""Adapters on disk: both layouts bit for bit, their settings, and what they cannot express."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from torch_files import torch_file

from pyloss.tuner import LoRALinear, linear_to_lora_layers, load_adapters, save_adapter
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.folder import read_adapter

LAYOUTS = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}


@pytest.fixture
def model(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", bias=True)
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.5, "dropout": 0.125})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape)
    return model


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_a_round_trip_keeps_every_bit(model, tmp_path, format):
    save_adapter(model, tmp_path / "a" / "deep", format)
    assert sorted(p.name for p in (tmp_path / "a" / "deep").iterdir()) == sorted(
        [LAYOUTS[format], "adapter_config.json"]
    )
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a" / "deep")
    layers = adapter_modules(again)
    assert layers.keys() == adapter_modules(model).keys()
    for name, layer in adapter_modules(model).items():
        assert (
            layers[name].lora_a.tobytes() == layer.lora_a.tobytes()
            and layers[name].lora_b.tobytes() == layer.lora_b.tobytes()
        )
        assert (layers[name].scale, layers[name].dropout) == (2.5, 0.125)
    # A loaded adapter is saved as the same files, from either layout.
    save_adapter(again, tmp_path / "b", format)
    for name in (LAYOUTS[format], "adapter_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / "deep" / name).read_bytes()


@pytest.mark.parametrize("named", [False, True])
def test_tensors_in_a_file_of_torch(model, tmp_path, named):
    """adapter_model.bin, by its folder or by its own name."""
    place = tmp_path / "a"
    save_adapter(model, place, "peft")
    arrays = load_file(place / LAYOUTS["peft"])
    (place / LAYOUTS["peft"]).unlink()
    (place / "adapter_model.bin").write_bytes(torch_file(arrays))
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, place / "adapter_model.bin" if named else place)
    for name, array in model.trainable_parameters().items():
        np.testing.assert_array_equal(again.trainable_parameters()[name], array)


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_saving_over_an_older_adapter(model, tmp_path, format):
    save_adapter(model, tmp_path / "a", format)
    model.trainable_parameters()["model.layers.2.mlp.up_proj.lora_b"][...] = 7
    save_adapter(model, tmp_path / "a", format)
    stored = read_adapter(tmp_path / "a").layers["model.layers.2.mlp.up_proj"]
    assert (
        (stored.arrays["lora_b"] == 7).all()
        and stored.arrays["lora_a"].shape == (32, 3)
        and stored.arrays["lora_b"].shape == (3, 64)
    )


def test_names_and_settings_of_the_mlx_layout(model, tmp_path):
    save_adapter(model, tmp_path / "a")
    arrays = load_file(tmp_path / "a" / "adapters.safetensors")
    assert arrays["model.layers.1.self_attn.k_proj.lora_a"].shape == (32, 3)
    assert arrays["model.layers.1.self_attn.k_proj.lora_b"].shape == (3, 16)
    assert len(arrays) == 2 * 7 * 2 and all(a.dtype == np.float32 for a in arrays.values())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.125},
    }  # fmt: skip


def test_names_and_settings_of_the_peft_layout(model, tmp_path):
    save_adapter(model, tmp_path / "a", "peft", base_model="some/model")
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert arrays["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert arrays["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].shape == (16, 3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == (
        "LORA",
        3,
        7.5,
        0.125,
    )
    assert config["base_model_name_or_path"] == "some/model" and len(config["target_modules"]) == 14


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({}, 2.5),
        ({"use_rslora": True}, 7.5 / np.sqrt(3)),
        ({"lora_alpha": 6}, 2.0),
        ({"alpha_pattern": {}, "bias": "none"}, 2.5),
    ],
)
def test_the_scale_of_peft(model, tmp_path, extra, scale):
    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
    adapter = read_adapter(tmp_path / "a")
    assert [layer.options["scale"] for layer in adapter.layers.values()] == [
        pytest.approx(scale)
    ] * 14
    assert adapter.config["lora_parameters"]["scale"] == pytest.approx(scale)


@pytest.fixture
def mixed(model):
    """Layers with several ranks, scales and dropouts."""
    for name, rank, scale in (
        ("model.layers.2.mlp.up_proj", 5, 2.5),
        ("model.layers.1.self_attn.q_proj", 3, 0.5),
        ("model.layers.1.mlp.up_proj", 2, 4),
    ):
        base = dict(model.named_modules())[name].linear
        layer = LoRALinear.from_base(base, r=rank, scale=scale, dropout=0.125)
        layer.lora_b[...] = np.random.default_rng(rank).standard_normal(layer.lora_b.shape)
        model.set_module(name, layer)
    return model


def test_ranks_and_scales_of_single_layers_in_peft(mixed, tmp_path):
    save_adapter(mixed, tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 7.5)
    assert config["rank_pattern"] == {
        "model.layers.1.mlp.up_proj": 2,
        "model.layers.2.mlp.up_proj": 5,
    }
    patterns = {
        "model.layers.1.self_attn.q_proj": 1.5,
        "model.layers.1.mlp.up_proj": 8,
        "model.layers.2.mlp.up_proj": 12.5,
    }
    assert config["alpha_pattern"] == patterns
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a")
    for name, layer in adapter_modules(mixed).items():
        found = dict(again.named_modules())[name]
        assert (found.rank, found.scale) == (layer.rank, layer.scale)
        assert (
            found.lora_a.tobytes() == layer.lora_a.tobytes()
            and found.lora_b.tobytes() == layer.lora_b.tobytes()
        )


@pytest.mark.parametrize("one_rank", [False, True])
def test_ranks_and_scales_of_single_layers_in_mlx(mixed, tmp_path, one_rank):
    """The layout has one scale and mlx-lm one rank; the layers compute the same."""
    save_adapter(mixed, tmp_path / "a", one_rank=one_rank)
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a")
    ranks = {name: layer.rank for name, layer in adapter_modules(again).items()}
    assert set(ranks.values()) == ({5} if one_rank else {2, 3, 5})
    assert again.adapter_config["lora_parameters"]["rank"] == (5 if one_rank else 3)
    for name, layer in adapter_modules(mixed).items():
        np.testing.assert_allclose(
            dict(again.named_modules())[name].delta(), layer.delta(), rtol=1e-5, atol=1e-6
        )


def test_patterns_of_peft_are_regular_expressions_for_the_ends_of_names(model, tmp_path):
    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    patterns = {"layers.1.mlp.up_proj": 6, r"self_attn\.[qk]_proj": 9, "q_proj": 1}
    path.write_text(
        json.dumps(
            {
                **config,
                "alpha_pattern": patterns,
                "rank_pattern": {"up_proj": 3},
                "use_rslora": True,
            }
        )
    )
    layers = read_adapter(tmp_path / "a").layers
    scales = {
        "layers.1.mlp.up_proj": 6,
        "layers.2.mlp.up_proj": 7.5,
        "layers.2.self_attn.q_proj": 9,
        "layers.1.self_attn.k_proj": 9,
        "layers.1.self_attn.v_proj": 7.5,
    }
    assert {
        name: layers[f"model.{name}"].options["scale"] * np.sqrt(3) for name in scales
    } == pytest.approx(scales)
    path.write_text(json.dumps({**config, "rank_pattern": {"up_proj": 4}}))
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj: rank 3, and the configuration gives 4\n"
    ):
        read_adapter(tmp_path / "a")
    for pattern, message in (
        ([], "expected an object"),
        ({"(": 1}, "expected regular expressions"),
        ({"up_proj": "x"}, "it must be a finite number"),
        ({"up_proj": 10**400}, "it must be a finite number"),
    ):
        path.write_text(json.dumps({**config, "alpha_pattern": pattern or 3}))
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "a")


INERT = {
    "peft_version": "9.1",
    "use_magic": False,
    "magic_config": None,
    "magic_strength": 3,
    "eva_config": {"rho": 2.0},
    "auto_mapping": {"unsloth_fixed": True},
}


@pytest.mark.parametrize(
    "setting",
    [
        {"use_magic": True},
        {"magic_config": {"a": 1}},
        {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"fan_in_fan_out": True},
        {"target_parameters": [[0] * 20_000]},
    ],
)
def test_unknown_settings_are_refused_where_they_act(model, tmp_path, setting):
    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_config.json"
    config = {**json.loads(path.read_text()), **INERT, "init_lora_weights": "gaussian"}
    path.write_text(json.dumps(config))
    assert len(read_adapter(tmp_path / "a").layers) == 14
    path.write_text(json.dumps({**config, **setting}))
    with pytest.raises(ValueError, match=f"{next(iter(setting))} = .* is not supported") as error:
        read_adapter(tmp_path / "a")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("rank", [0, -1, 2.5, "3", True, None, float("nan")])
def test_ranks_that_cannot_be(model, tmp_path, rank):
    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": rank}))
    with pytest.raises(
        ValueError,
        match=r"adapter_config.json: r: (expected a rank of 1 or more|the value is .* finite|this key is missing)",
    ):
        read_adapter(tmp_path / "a")


def test_tensors_that_say_the_same(model, tmp_path):
    from safetensors.numpy import save_file

    save_adapter(model, tmp_path / "a", "peft")
    path = tmp_path / "a" / "adapter_model.safetensors"
    arrays = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({**arrays, name.replace("A.weight", "embedding_A"): arrays[name]}, path)
    with pytest.raises(
        ValueError,
        match="model.layers.1.mlp.up_proj.lora_.*: another tensor holds this parameter of the layer",
    ):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("format", list(LAYOUTS))
@pytest.mark.parametrize("beginning", ["language_model.model.", "model.language_model."])
def test_an_adapter_of_a_model_that_was_beside_others(model, tmp_path, format, beginning):
    """Names by mlx-lm and PEFT for the language model of a checkpoint that also reads images."""
    save_adapter(model, tmp_path / "a", format)
    file = tmp_path / "a" / LAYOUTS[format]
    arrays = {
        name.replace("model.layers.", f"{beginning}layers."): array
        for name, array in load_file(file).items()
    }
    save_file(arrays, file)
    again = tiny.load_tiny(tmp_path / "model", bias=True)
    load_adapters(again, tmp_path / "a")
    ids = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(again(ids), model.eval()(ids))


def test_every_tensor_that_does_not_fit_is_listed(model, tmp_path):
    from safetensors.numpy import save_file

    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapters.safetensors"
    arrays = load_file(path)
    del arrays["model.layers.1.mlp.up_proj.lora_a"], arrays["model.layers.2.mlp.up_proj.lora_b"]
    save_file(
        {
            **arrays,
            "x.other": np.zeros(3, np.float32),
            "model.layers.1.mlp.gate_proj.m": np.zeros(64, np.float32),
        },
        path,
    )
    with pytest.raises(ValueError) as caught:
        read_adapter(tmp_path / "a")
    for line in (
        f"{path}: is not an adapter of the kind 'lora', which {tmp_path / 'a'}",
        "x.other: is not one of its arrays; expected names that end in .lora_a, .lora_b",
        "model.layers.1.mlp.up_proj.lora_a: is missing",
        "model.layers.2.mlp.up_proj.lora_b: is missing",
    ):
        assert line in str(caught.value)
    save_file(
        {
            **load_file(path),
            **{
                f"{n}.{h}": np.zeros((32, 3) if h == "lora_a" else (3, 64), np.float32)
                for n in ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
                for h in ("lora_a", "lora_b")
            },
        },
        path,
    )
    arrays = load_file(path)
    del arrays["x.other"]
    save_file(arrays, path)
    with pytest.raises(
        ValueError,
        match=r"of the kind 'lora', .*\n.*model.layers.1.mlp.gate_proj.m: is not one of its arrays",
    ):
        read_adapter(tmp_path / "a")


def test_models_that_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="format must be 'mlx' or 'peft', not 'gguf'"):
        save_adapter(model, tmp_path / "a", "gguf")
    model.adapter_config = None  # adapters that were put in by hand
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"].pop("keys") == sorted(adapter_modules(model))
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.125},
    }
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_adapter(tiny.load_tiny(tmp_path / "other"), tmp_path / "a")


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_a_folder_that_is_a_file(model, tmp_path, format):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        save_adapter(model, tmp_path / "a", format)


def test_adapters_in_half_precision_are_read(model, tmp_path):
    from safetensors.numpy import save_file

    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapters.safetensors"
    arrays = load_file(path)
    save_file({name: array.astype(np.float16) for name, array in arrays.items()}, path)
    for name, layer in read_adapter(tmp_path / "a").layers.items():
        for half, array in layer.arrays.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(
                array, arrays[f"{name}.{half}"].astype(np.float16).astype(np.float32)
            )
