"""Putting adapters into a model, loading them, and taking them out; errors list everything and leave the model as it was."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_training import samples

from pyloss import FormatError, nn
from pyloss.optim import AdamW
from pyloss.tuner import (
    LoRALinear,
    TrainingArgs,
    default_loss,
    linear_to_lora_layers,
    load_adapters,
    save_adapter,
    train,
)
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.utils import fuse_adapters, print_trainable_parameters, remove_lora_layers

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
CONFIG = {"rank": 4, "scale": 3.0, "dropout": 0.0}


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "model", tied=False)


def adapters(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def randomise(model, seed=0):
    rng = np.random.default_rng(seed)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape) / 4


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(0, []), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (-1, [0, 1, 2])]
)
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"]])
def test_which_layers(model, num_layers, layers, keys):
    before = model(TOKENS)
    linear_to_lora_layers(model, num_layers, {**CONFIG, **({"keys": keys} if keys else {})})
    wanted = keys or [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert sorted(adapters(model)) == sorted(
        f"model.layers.{i}.{key}" for i in layers for key in wanted
    )
    assert sorted(model.trainable_parameters()) == sorted(
        f"{name}.{half}" for name in adapters(model) for half in ("lora_a", "lora_b")
    )
    assert model(TOKENS).tobytes() == before.tobytes()


def test_as_many_parameters_as_mlx_lm_trains(model, capsys):
    """rank * (in + out) for each converted matrix: mlx-lm's count for the same keys."""
    linear_to_lora_layers(model, 2, CONFIG)
    per_layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert sum(p.size for p in model.trainable_parameters().values()) == 2 * per_layer
    print_trainable_parameters(model)
    total = sum(a.size for a in tiny.tensors(tiny.config(tied=False)).values()) + 2 * per_layer
    assert (
        capsys.readouterr().out
        == f"Trainable parameters: {2 * per_layer / total:.3%} ({2 * per_layer / 1e6:.3f}M/{total / 1e6:.3f}M)\n"
    )


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["lm_head"], ["lm_head"]),
        (["model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (["lm_head", "mlp.up_proj"], ["lm_head", "model.layers.2.mlp.up_proj"]),
    ],
)
def test_full_names_reach_past_num_layers(model, keys, names):
    linear_to_lora_layers(model, 1, {**CONFIG, "keys": keys})
    assert sorted(adapters(model)) == sorted(names)
    randomise(model)
    assert np.isfinite(model(TOKENS)).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["q_proj"], r"'q_proj'.*self_attn\.q_proj"),
        (["self_attn.qproj"], r"'self_attn\.qproj'.*self_attn\.q_proj"),
        (["mlp.up_proj", "xyz"], r"'xyz'; there are .*mlp\.down_proj"),
        (["input_layernorm", "lm_heads"], r"'input_layernorm', 'lm_heads'.*lm_head"),
    ],
)
def test_keys_that_match_nothing(model, keys, message):
    with pytest.raises(ValueError, match=message):
        linear_to_lora_layers(model, -1, {**CONFIG, "keys": keys})
    assert not adapters(model) and model.adapter_config is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scale": 1.0}, "needs 'rank'"),
        ({"rank": 2}, "needs 'scale', or 'alpha'"),
        ({**CONFIG, "layers": 3}, "unknown key 'layers' in the LoRA config"),
        ({**CONFIG, "ranks": 3}, "unknown key 'ranks' in the LoRA config: did you mean 'rank'"),
        (
            {"lora_alpha": 4, "rank": 2},
            "unknown key 'lora_alpha' in the LoRA config: did you mean 'alpha'",
        ),
        ({**CONFIG, "rslora": True}, "must give 'alpha', not 'scale'"),
        (
            {**CONFIG, "rank_pattern": {"mlp.upproj": 2}},
            r"for rank_pattern, is named 'mlp\.upproj'; did you mean .*mlp\.up_proj",
        ),
        ({**CONFIG, "rank_pattern": {"mlp.up_proj": 0}}, "rank must be"),
        ({**CONFIG, "init": "olora"}, "init is 'olora'; it must be one of default, pissa, loftq"),
        ({**CONFIG, "init": "loftq"}, "go together"),
        ({**CONFIG, "loftq_model": "x"}, "go together"),
        ({**CONFIG, "init": "pissa", "dropout": 0.1}, "init 'pissa' needs dropout 0"),
        ({"rank": 0, "alpha": 8}, "rank must be"),
        ({**CONFIG, "rank": 0}, "rank must be"),
        ({**CONFIG, "rank": 65}, "rank must be"),
        ({**CONFIG, "dropout": 1}, "dropout is 1; it must be .*below 1"),
        ({**CONFIG, "scale": 10**400}, "scale is .*; it must be a finite number"),
        ({"rank": 2, "alpha": 10**400}, "alpha is .*; it must be a finite number"),
        ({"rank": 10**5000, "alpha": 8}, "rank must be .* not an integer of 16610 bits"),
    ],
)
def test_settings_that_cannot_be(model, config, message):
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        linear_to_lora_layers(model, -1, config)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": "x"},
        {"dropout": None, "alpha": "2"},
        {"keys": 3},
        {"keys": "lm_head"},
        {"rank_pattern": [2]},
    ],
)
def test_settings_of_another_type(model, wrong):
    with pytest.raises(TypeError, match="; it must be a "):
        linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0} | wrong)


def test_more_layers_than_there_are(model):
    with pytest.raises(
        ValueError, match="num_layers is 4, but the model has 3 layers; -1 takes all"
    ):
        linear_to_lora_layers(model, 4, CONFIG)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"rank": 4, "scale": 3.0}, 3.0),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "alpha": 8, "rslora": True}, 4.0),
        ({"rank": np.int64(4), "alpha": 8, "rslora": False, "scale": None}, 2.0),
    ],
)
def test_scale_and_alpha(model, tmp_path, config, scale):
    """PEFT's definitions: alpha / r, and alpha / sqrt(r) for rsLoRA; a saved adapter has the scale."""
    linear_to_lora_layers(model, 1, config)
    assert {layer.scale for layer in adapter_modules(model).values()} == {scale}
    save_adapter(model, tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (
        stored["lora_parameters"] == {"rank": 4, "scale": scale, "dropout": 0.0}
        and stored["fine_tune_type"] == "lora"
    )


@pytest.mark.parametrize(("rslora", "scales"), [(False, (2.0, 4.0)), (True, (4.0, 32**0.5))])
def test_alpha_gives_each_rank_its_scale(model, tmp_path, rslora, scales):
    """PEFT's definition; files have one scale for all, so that others are worked into lora_b, by training as by save_adapter."""
    linear_to_lora_layers(
        model,
        -1,
        {"rank": 4, "alpha": 8, "rslora": rslora, "rank_pattern": {"self_attn.q_proj": 2}},
    )
    found = {layer.rank: layer.scale for layer in adapter_modules(model).values()}
    assert found == {4: scales[0], 2: pytest.approx(scales[1])}
    randomise(model)
    logits = model(TOKENS)
    save_adapter(model, tmp_path / "saved")
    args = TrainingArgs(
        iters=1, adapter_file=tmp_path / "trained" / "adapters.safetensors", progress=False
    )
    train(model, AdamW(0.0), samples(), None, args)
    remove_lora_layers(model)
    for folder in ("saved", "trained"):
        np.testing.assert_allclose(
            load_adapters(model, tmp_path / folder)(TOKENS), logits, atol=1e-4
        )
        assert {layer.scale for layer in adapter_modules(model).values()} == {scales[0]}
        remove_lora_layers(model)


def test_scale_counts_where_alpha_is_there_too(model, caplog):
    """Files written for older versions of mlx-lm have both."""
    linear_to_lora_layers(model, 1, {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0})
    assert {layer.scale for layer in adapter_modules(model).values()} == {10.0}
    assert "scale 10.0 and alpha 16: scale is used" in caplog.text


def test_ranks_by_name(model, tmp_path):
    pattern = {"self_attn.q_proj": 2, "model.layers.2.mlp.down_proj": 7}
    linear_to_lora_layers(model, 2, {**CONFIG, "rank_pattern": pattern})
    ranks = {name: layer.rank for name, layer in adapter_modules(model).items() if layer.rank != 4}
    assert ranks == {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.2.self_attn.q_proj": 2,
        "model.layers.2.mlp.down_proj": 7,
    }
    randomise(model)
    logits = model(TOKENS)
    save_adapter(model, tmp_path / "saved")
    remove_lora_layers(model)
    assert load_adapters(model, tmp_path / "saved")(TOKENS).tobytes() == logits.tobytes()


def test_twice_is_refused(model):
    linear_to_lora_layers(model, 1, CONFIG)
    for layers in (1, -1):
        with pytest.raises(
            ValueError, match=r"has an adapter already; fuse\(\) or remove_lora_layers\(\) first"
        ):
            linear_to_lora_layers(model, layers, CONFIG)
    assert len(adapters(model)) == 7
    remove_lora_layers(model)
    linear_to_lora_layers(model, -1, CONFIG)
    assert len(adapters(model)) == 21


def test_the_base_is_frozen(tmp_path):
    model = tiny.load_tiny(tmp_path, bias=True)
    model.unfreeze()
    model.train()
    linear_to_lora_layers(model, 1, CONFIG)
    assert all(name.endswith(("lora_a", "lora_b")) for name in model.trainable_parameters())
    assert all(module.training for module in model.modules())


def test_dora_has_a_length_for_each_row(model):
    """mlx-lm's count: rank * (in + out) + out for each matrix; m begins as the norms, and the model as it was."""
    before = model(TOKENS)
    linear_to_lora_layers(model, 2, CONFIG, use_dora=True)
    rows = 32 * 2 + 16 * 2 + 64 * 2 + 32
    per_layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3) + rows
    assert sum(p.size for p in model.trainable_parameters().values()) == 2 * per_layer
    layer = model.layers[2].mlp.up_proj
    np.testing.assert_allclose(
        layer.m, np.linalg.norm(layer.base.weight.dequantize(), axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(model(TOKENS), before, atol=1e-4)
    assert model.adapter_config["fine_tune_type"] == "dora"


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_by_name(tmp_path, use_dora, tied):
    """mlx-lm's count: rank * (V + D); the adapter counts in the loss, and with a shared table also as the head."""
    model = tiny.load_tiny(tmp_path, tied=tied)
    keys = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    linear_to_lora_layers(model, 1, {**CONFIG, "keys": keys}, use_dora)
    count = 4 * (29 + 32) + (29 if use_dora else 0)
    assert sum(p.size for p in model.trainable_parameters().values()) == count * len(keys)
    batch, lengths = TOKENS.astype(np.int32), np.array([[0, 8]], np.int32)
    before = float(default_loss(model, batch, lengths)[0])
    randomise(model)
    logits = np.asarray(model(TOKENS), np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    want = (np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), TOKENS[0, 1:]]).mean()
    assert float(default_loss(model, batch, lengths)[0]) == pytest.approx(want, rel=1e-4)
    assert abs(want - before) > 1e-3
    with pytest.raises(ValueError, match=r"did you mean .*embed_tokens"):
        linear_to_lora_layers(model, 1, {**CONFIG, "keys": ["embed_tokens"]}, use_dora)


def test_fusing_and_removing(model):
    before = model(TOKENS)
    linear_to_lora_layers(model, -1, CONFIG)
    randomise(model)
    with_adapter = model(TOKENS)
    assert np.abs(with_adapter - before).max() > 0.1
    bases = {name: dict(model.named_modules())[name].linear for name in adapters(model)}
    fuse_adapters(model)
    assert not adapters(model)
    np.testing.assert_allclose(model(TOKENS), with_adapter, atol=2e-4)
    for name, base in bases.items():
        model.set_module(name, LoRALinear.from_base(base))
    assert remove_lora_layers(model) is model and model(TOKENS).tobytes() == before.tobytes()


# Loading


@pytest.fixture
def saved(model, tmp_path):
    """An adapter on disk, and the logits that it gives."""
    linear_to_lora_layers(
        model, 2, {**CONFIG, "dropout": 0.25, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    )
    randomise(model)
    for format in ("mlx", "peft"):
        save_adapter(model, tmp_path / format, format)
    logits = model(TOKENS)
    remove_lora_layers(model)
    return logits


@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_loading_gives_the_same_bits(model, saved, tmp_path, format):
    assert load_adapters(model, tmp_path / format) is model
    assert model(TOKENS).tobytes() == saved.tobytes()
    assert len(adapters(model)) == 4
    layer = dict(model.named_modules())["model.layers.2.mlp.down_proj"]
    assert layer.scale == 3.0 and layer.dropout == 0.25 and not layer.training
    assert len(model.trainable_parameters()) == 8
    assert model.adapter_config["lora_parameters"]["rank"] == 4


def edit(folder, format, change):
    path = folder / ("adapters.safetensors" if format == "mlx" else "adapter_model.safetensors")
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def test_an_adapter_for_another_model_lists_all_that_does_not_fit(model, saved, tmp_path):
    def change(arrays):
        q = "model.layers.1.self_attn.q_proj"
        arrays[f"{q}.lora_a"] = np.zeros((33, 4), np.float32)
        arrays["model.layers.2.mlp.down_proj.lora_b"] = np.zeros((4, 31), np.float32)
        arrays["model.layers.2.self_attn.q_proj.lora_b"] = np.zeros((5, 32), np.float32)
        for name in ("model.layers.7.self_attn.q_proj", "model.norm"):
            arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"] = (
                np.zeros((32, 4), np.float32),
                np.zeros((4, 32), np.float32),
            )

    edit(tmp_path / "mlx", "mlx", change)
    modules, logits = list(model.modules()), model(TOKENS)
    with pytest.raises(ValueError, match="not one for this model") as caught:
        load_adapters(model, tmp_path / "mlx")
    text = str(caught.value)
    assert str(tmp_path / "mlx") in text and len(text.splitlines()) == 6
    for part in (
        "model.layers.1.self_attn.q_proj: lora_a (33, 4) and lora_b (4, 32), expected (32, r) and (r, 32)",
        "model.layers.2.mlp.down_proj: lora_a (64, 4) and lora_b (4, 31), expected (64, r) and (r, 32)",
        "model.layers.2.self_attn.q_proj: lora_a (32, 4) and lora_b (5, 32)",
        "model.layers.7.self_attn.q_proj: the model has no such layer",
        "model.norm: the model has no such layer",
    ):
        assert part in text
    assert (
        all(a is b for a, b in zip(model.modules(), modules, strict=True))
        and model(TOKENS).tobytes() == logits.tobytes()
    )
    assert model.adapter_config is None or "keys" in model.adapter_config["lora_parameters"]


def test_long_lists_are_cut(tmp_path, model, saved):
    def change(arrays):
        for i in range(30):
            arrays[f"layer{i}.lora_a"], arrays[f"layer{i}.lora_b"] = (
                np.zeros((2, 1), np.float32),
                np.zeros((1, 2), np.float32),
            )

    edit(tmp_path / "mlx", "mlx", change)
    with pytest.raises(ValueError, match="and 10 more"):
        load_adapters(model, tmp_path / "mlx")


def test_a_second_adapter_is_refused(model, saved, tmp_path):
    load_adapters(model, tmp_path / "mlx")
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapters(model, tmp_path / "peft")
    assert model(TOKENS).tobytes() == saved.tobytes()


@pytest.mark.parametrize("format", ["mlx", "peft"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop(next(n for n in a if "lora_b" in n or "lora_B" in n)),
            r"lora_[bB].*is missing, though its other half is there",
        ),
        (
            lambda a: a.pop(next(n for n in a if "lora_a" in n or "lora_A" in n)),
            r"lora_[aA].*is missing, though its other half is there",
        ),
        (
            lambda a: a.update({next(iter(a)): np.zeros(3, np.float32)}),
            r"has shape \(3,\), expected two (or three )?dimensions",
        ),
        (
            lambda a: a.update({"base_model.model.x.q": np.zeros((2, 2), np.float32)}),
            "is not a LoRA matrix; expected names that end in",
        ),
    ],
    ids=["no B", "no A", "a vector", "another name"],
)
def test_damaged_matrices_are_named(model, saved, tmp_path, format, change, message):
    edit(tmp_path / format, format, change)
    with pytest.raises(FormatError, match=message):
        load_adapters(model, tmp_path / format)
    assert not adapters(model)


@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_missing_files_are_named(model, saved, tmp_path, format):
    for folder, message in (
        (tmp_path / "nowhere", "the folder does not exist"),
        (tmp_path / "model", "it has no adapter_config.json"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            load_adapters(model, folder)
        assert str(folder) in str(caught.value)
    file = "adapters.safetensors" if format == "mlx" else "adapter_model.safetensors"
    (tmp_path / format / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"it has no {file}"):
        load_adapters(model, tmp_path / format)


@pytest.mark.parametrize(
    ("format", "change", "error", "message"),
    [
        ("mlx", {"fine_tune_type": "soft"}, ValueError, "fine_tune_type 'soft'"),
        ("mlx", {"fine_tune_type": "dora"}, FormatError, "has no magnitudes, which DoRA needs"),
        ("mlx", {"lora_parameters": 3}, FormatError, "lora_parameters"),
        (
            "mlx",
            {"lora_parameters": {"rank": 4, "scale": "x"}},
            FormatError,
            "scale.*is 'x'; it must be a finite number",
        ),
        ("mlx", {"lora_parameters": {"rank": 4}}, FormatError, "scale.*this key is missing"),
        ("peft", {"peft_type": "IA3"}, ValueError, "peft_type 'IA3'"),
        ("peft", {"use_dora": True}, FormatError, "has no magnitudes, which DoRA needs"),
        ("peft", {"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save"),
        ("peft", {"lora_alpha": None}, FormatError, "lora_alpha"),
        ("peft", {"r": 3}, ValueError, r"rank 4, and the configuration gives 3"),
    ],
)
def test_settings_that_cannot_be_loaded(model, saved, tmp_path, format, change, error, message):
    path = tmp_path / format / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message) as caught:
        load_adapters(model, tmp_path / format)
    assert str(path) in str(caught.value) and not adapters(model)


def test_an_adapter_without_matrices(model, saved, tmp_path):
    edit(tmp_path / "mlx", "mlx", lambda arrays: arrays.clear())
    with pytest.raises(ValueError, match="no matrices"):
        load_adapters(model, tmp_path / "mlx")


def test_loading_with_the_model(tmp_path, model, saved, monkeypatch):
    from pyloss import models
    from pyloss.models import tokenizer

    monkeypatch.setattr(tokenizer.Tokenizer, "from_folder", lambda place: None)
    again, _ = models.load(tmp_path / "model", adapter_path=tmp_path / "peft")
    assert again(TOKENS).tobytes() == saved.tobytes() and isinstance(
        again.layers[2].self_attn.q_proj, LoRALinear
    )
    assert isinstance(again.layers[0].self_attn.q_proj, nn.Linear)
