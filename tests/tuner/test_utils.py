"""Adding, loading and removing adapters; errors list everything and leave the model unchanged."""

import json

import numpy as np
import pytest
import tiny
from adapted_models import CONFIG, TOKENS, adapters, randomize
from safetensors.numpy import load_file, save_file

from pyloss import FormatError, nn
from pyloss.tuner import (
    LoRALinear,
    default_loss,
    linear_to_lora_layers,
    load_adapters,
    save_adapter,
)
from pyloss.tuner.utils import fuse_adapters, print_trainable_parameters, remove_lora_layers


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "model", tied=False)


def test_as_many_parameters_as_mlx_lm_trains(model, capsys):
    """rank * (in + out) per converted matrix: mlx-lm's count for the same keys."""
    linear_to_lora_layers(model, 2, CONFIG)
    per_layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert sum(p.size for p in model.trainable_parameters().values()) == 2 * per_layer
    print_trainable_parameters(model)
    total = sum(a.size for a in tiny.tensors(tiny.config(tied=False)).values()) + 2 * per_layer
    assert (
        capsys.readouterr().out
        == f"Trainable parameters: {2 * per_layer / total:.3%} ({2 * per_layer / 1e6:.3f}M/{total / 1e6:.3f}M)\n"
    )


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
    """mlx-lm's count: rank * (in + out) + out per matrix.

    m begins as the norms, so the model is unchanged.
    """
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
    """mlx-lm's count: rank * (V + D).

    The adapter acts in the loss, and over a shared table also as the head.
    """
    model = tiny.load_tiny(tmp_path, tied=tied)
    keys = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    linear_to_lora_layers(model, 1, {**CONFIG, "keys": keys}, use_dora)
    count = 4 * (29 + 32) + (29 if use_dora else 0)
    assert sum(p.size for p in model.trainable_parameters().values()) == count * len(keys)
    batch, lengths = TOKENS.astype(np.int32), np.array([[0, 8]], np.int32)
    before = float(default_loss(model, batch, lengths)[0])
    randomize(model)
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
    randomize(model)
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
    """A saved adapter, and its logits."""
    linear_to_lora_layers(
        model, 2, {**CONFIG, "dropout": 0.25, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    )
    randomize(model)
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
            r"lora_[bB].*is missing",
        ),
        (
            lambda a: a.pop(next(n for n in a if "lora_a" in n or "lora_A" in n)),
            r"lora_[aA].*is missing",
        ),
        (
            lambda a: a.update({next(iter(a)): np.zeros(3, np.float32)}),
            r"has shape \(3,\), expected two (or three )?dimensions",
        ),
        (
            lambda a: a.update({"base_model.model.x.q": np.zeros((2, 2), np.float32)}),
            "is not one of its arrays; expected names that end in",
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
        ("mlx", {"fine_tune_type": "dora"}, FormatError, r"kind 'dora'.*\n.*\.m: is missing"),
        ("mlx", {"lora_parameters": 3}, FormatError, "lora_parameters"),
        (
            "mlx",
            {"lora_parameters": {"rank": 4, "scale": "x"}},
            FormatError,
            "scale.*is 'x'; it must be a finite number",
        ),
        ("mlx", {"lora_parameters": {"rank": 4}}, FormatError, "scale.*this key is missing"),
        ("peft", {"peft_type": "IA3"}, ValueError, "peft_type 'IA3'"),
        ("peft", {"use_dora": True}, FormatError, r"kind 'dora'.*\n.*magnitude_vector: is missing"),
        ("peft", {"modules_to_save": "lm_head"}, FormatError, "modules_to_save is 'lm_head'"),
        ("peft", {"bias": "some"}, ValueError, "bias = 'some' is not supported"),
        ("peft", {"lora_bias": True}, ValueError, "lora_bias"),
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

    monkeypatch.setattr(tokenizer.Tokenizer, "from_folder", lambda place: ())
    again, _ = models.load(tmp_path / "model", adapter_path=tmp_path / "peft")
    assert again(TOKENS).tobytes() == saved.tobytes() and isinstance(
        again.layers[2].self_attn.q_proj, LoRALinear
    )
    assert isinstance(again.layers[0].self_attn.q_proj, nn.Linear)
