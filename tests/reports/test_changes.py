"""The norms of the changes of layers."""

import numpy as np
import pytest
import tiny

from pyloss.models import load_model
from pyloss.reports.changes import Change, by_layer, changes
from pyloss.tuner import linear_to_lora_layers, unfreeze_layers


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_changes_are_those_of_the_fused_weights(tmp_path, dora):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS)
    model, plain = load_model(tmp_path / "base"), load_model(tmp_path / "base")
    config = {"rank": 2, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, -1, config, use_dora=dora)
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array += rng.normal(0, 0.05, array.shape).astype(np.float32)
    found = changes(model, None)
    assert len(found) == 2 * len(model.layers)
    model.fuse(dequantize=True)
    for change in found:
        before, after = (dict(each.named_modules())[change.name].weight for each in (plain, model))
        before, after = (
            w.dequantize() if hasattr(w, "dequantize") else np.asarray(w) for w in (before, after)
        )
        assert change.weight == pytest.approx(np.linalg.norm(before), rel=1e-5)
        assert change.change == pytest.approx(np.linalg.norm(after - before), rel=1e-3)


def test_full_fine_tuning_is_compared_with_the_base(tmp_path):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS)
    model, plain = load_model(tmp_path / "base"), load_model(tmp_path / "base")
    unfreeze_layers(model, 1, ["mlp.up_proj"])
    (array,) = model.trainable_parameters().values()
    norm = np.linalg.norm(array)
    array *= 1.5
    (change,) = changes(model, plain)
    assert change.name.endswith("mlp.up_proj") and change.relative == pytest.approx(0.5, rel=1e-5)
    assert change.weight == pytest.approx(norm, rel=1e-5)


def test_layers_take_their_weights_together():
    found = [
        Change("model.layers.0.self_attn.q_proj", 3.0, 6.0),
        Change("model.layers.0.mlp.up_proj", 4.0, 8.0),
        Change("model.layers.12.mlp.up_proj", 0.0, 0.0),
        Change("lm_head", 1.0, 0.0),
    ]
    whole = by_layer(found)
    assert [each.name for each in whole] == ["layer 0", "layer 12", "lm_head"]
    assert whole[0].relative == 0.5 and whole[1].relative == 0.0
    assert whole[2].relative == float("inf")
