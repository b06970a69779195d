"""A LoRA config: rank, scale and alpha, ranks by name, and refused values."""

import json

import numpy as np
import pytest
import tiny
from adapted_models import CONFIG, TOKENS, randomize
from tiny_training import samples

from pyloss.optim import AdamW
from pyloss.tuner import TrainingArgs, linear_to_lora_layers, load_adapters, save_adapter, train
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.utils import remove_lora_layers


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "model", tied=False)


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
        ({**CONFIG, "rank": 65537}, "rank must be"),
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
    """PEFT's definitions: alpha / r, or alpha / sqrt(r) for rsLoRA; files hold the scale."""
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
    """PEFT's definition.

    A file has one scale for all, so training and save_adapter fold the others into lora_b.
    """
    linear_to_lora_layers(
        model,
        -1,
        {"rank": 4, "alpha": 8, "rslora": rslora, "rank_pattern": {"self_attn.q_proj": 2}},
    )
    found = {layer.rank: layer.scale for layer in adapter_modules(model).values()}
    assert found == {4: scales[0], 2: pytest.approx(scales[1])}
    randomize(model)
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
    """Files for older versions of mlx-lm have both."""
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
    randomize(model)
    logits = model(TOKENS)
    save_adapter(model, tmp_path / "saved")
    remove_lora_layers(model)
    assert load_adapters(model, tmp_path / "saved")(TOKENS).tobytes() == logits.tobytes()
