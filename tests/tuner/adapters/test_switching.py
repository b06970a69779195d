"""Switching adapters off and on."""

import numpy as np
import pytest
import tiny

from pyloss.tuner import linear_to_lora_layers, unfreeze_layers
from pyloss.tuner.adapters.switching import AdapterSwitch


@pytest.fixture
def model(tmp_path):
    return tiny.load_tiny(tmp_path / "tiny")


def test_off_is_the_base_and_on_the_adapter(model):
    tokens = np.array([[3, 5, 7]])
    base = np.array(model(tokens))
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = 0.3
    adapted = np.array(model(tokens))
    assert not np.array_equal(base, adapted)
    switch = AdapterSwitch(model)
    for on, wanted in ((False, base), (True, adapted), (False, base)):
        switch.turn()
        assert switch.on is on
        np.testing.assert_array_equal(np.array(model(tokens)), wanted)


def test_models_without_adapters_are_refused(model):
    with pytest.raises(ValueError, match="no adapter"):
        AdapterSwitch(model)
    unfreeze_layers(model, 1)
    with pytest.raises(ValueError, match="full fine-tuning replaced"):
        AdapterSwitch(model)
