"""Which layers get adapters: the last ones, or layers by name."""

import numpy as np
import pytest
import tiny
from adapted_models import CONFIG, TOKENS, adapters, randomize

from pyloss.tuner import linear_to_lora_layers


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "model", tied=False)


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
    randomize(model)
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


def test_a_tied_head_has_the_name_of_the_embedding(tmp_path):
    tied = tiny.load_tiny(tmp_path / "model", tied=True)
    with pytest.raises(ValueError, match=r"'lm_head'; the head is tied.* model\.embed_tokens"):
        linear_to_lora_layers(tied, -1, {**CONFIG, "keys": ["lm_head"]})
    linear_to_lora_layers(tied, -1, {**CONFIG, "keys": ["model.embed_tokens"]})
    assert {name.rpartition(".")[0] for name in tied.trainable_parameters()} == {
        "model.embed_tokens"
    }


def test_more_layers_than_there_are(model):
    with pytest.raises(
        ValueError, match="num_layers is 4, but the model has 3 layers; -1 takes all"
    ):
        linear_to_lora_layers(model, 4, CONFIG)
