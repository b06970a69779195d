"""Shallower models: which layers, what stays of them, and folders that read back."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss.models import load_model
from pyloss.models.config.fields import CONV, FULL, SLIDING
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.pruning import even_layers, parse_layers, prune_model
from pyloss.models.synthetic import random_model
from pyloss.tuner import linear_to_lora_layers

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)


def test_a_list_of_layers():
    assert parse_layers("0-3, 7,9-9") == [0, 1, 2, 3, 7, 9]


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0-999999999", "1;2"])
def test_no_list_of_layers(text):
    with pytest.raises(ValueError, match="is not a layer or a range of layers"):
        parse_layers(text)


def test_even_distances():
    assert even_layers(30, 12) == [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]
    assert even_layers(5, 5) == [0, 1, 2, 3, 4] and even_layers(5, 1) == [0]
    for keep in (0, 6):
        with pytest.raises(ValueError, match="keep"):
            even_layers(5, keep)


def test_the_kept_layers_compute_what_they_did(tmp_path):
    """Against a model in NumPy that has only the kept layers' tensors."""
    c, arrays = tiny.write_folder(tmp_path / "whole", num_hidden_layers=5, tied=False)
    model = load_model(tmp_path / "whole")
    prune_model(model, [0, 3, 4])
    renamed = {}
    for name, array in arrays.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in (0, 3, 4):
                continue
            parts[2] = str([0, 3, 4].index(int(parts[2])))
        renamed[".".join(parts)] = array
    want = tiny.logits({**c, "num_hidden_layers": 3}, renamed, TOKENS[0])
    np.testing.assert_allclose(model(TOKENS)[0], want, atol=1e-4)
    model.save(tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert again.config == model.config and len(again.layers) == 3
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


def test_layers_taken_away_by_hand_are_saved_as_they_are(tmp_path):
    tiny.write_folder(tmp_path / "whole", num_hidden_layers=5)
    model = load_model(tmp_path / "whole")
    del model.layers[3:]
    del model.layers[0]
    model.save(tmp_path / "student")
    again = load_model(tmp_path / "student")
    assert len(again.layers) == again.config.num_hidden_layers == 2
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    del model.layers[:]
    with pytest.raises(ValueError, match="no layers"):
        model.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_windows_and_dense_layers_move_with_their_layer(tmp_path):
    config = ModelConfig(
        "gemma3_text", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=3,
        layer_types=[SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING], rope_local_base_freq=1e4,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    model = random_model(config)
    prune_model(model, [1, 2, 4])
    assert model.config.layer_types == [FULL, SLIDING, FULL]
    model.save(tmp_path / "student")
    again = load_model(tmp_path / "student")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))

    config = ModelConfig(
        "smollm3", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, no_rope_layers=[1, 0, 1, 0, 1],
    )  # fmt: skip
    model = random_model(config)
    prune_model(model, [0, 1, 2])
    assert model.config.no_rope_layers == [1, 0, 1]
    model.save(tmp_path / "unrotated")
    again = load_model(tmp_path / "unrotated")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    prune_model(model, [0, 2])
    assert model.config.no_rope_layers is None

    types = ["conv", "full_attention", "conv", "full_attention", "conv"]
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    model = random_model(ModelConfig("lfm2", **sizes, layer_types=types))
    prune_model(model, [0, 2, 3])
    assert model.config.layer_types == ["conv", "conv", "full_attention"]
    model.save(tmp_path / "convolutions")
    again = load_model(tmp_path / "convolutions")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))

    config = ModelConfig(
        "qwen3_moe", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        mixture=Mixture(4, 2, 16, True, dense_layers=(1, 3)),
    )  # fmt: skip
    model = random_model(config)
    prune_model(model, [0, 3])
    assert model.config.mixture.dense_layers == (1,)
    model.save(tmp_path / "mixture")
    again = load_model(tmp_path / "mixture")
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer"),
        ([0, 7], "layers has 7; the model has layers 0 to 2"),
        ([1, 1], "layers has 1 after 1"),
        ([2, 0], "layers has 0 after 2"),
        ([-1], "layers"),
    ],
)
def test_refused_layers_change_nothing(tmp_path, layers, message):
    tiny.write_folder(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        prune_model(model, layers)
    assert len(model.layers) == 3 and model.config.num_hidden_layers == 3


def test_adapters_are_fused_first(tmp_path):
    tiny.write_folder(tmp_path)
    model = load_model(tmp_path)
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 1.0})
    with pytest.raises(ValueError, match="unfused adapters"):
        prune_model(model, [0])


def test_the_embedded_model_keeps_answering(tmp_path):
    try:
        model, tokenizer = pyloss.load("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    prune_model(model, range(28))
    ids = tokenizer.encode("The capital of France is")
    assert model(np.array([ids], np.int32)).shape == (1, len(ids), model.vocab_size)


def test_one_layer_with_attention_stays():
    config = ModelConfig(
        "lfm2",
        vocab_size=29,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        layer_types=[CONV, CONV, FULL, CONV],
    )
    model = random_model(config)
    with pytest.raises(ValueError, match="none with attention.*the first one is 2"):
        prune_model(model, [0, 3])
    prune_model(model, [0, 2])
    assert model.config.layer_types == [CONV, FULL]
