"""Runs with each optimizer of the settings resume to the same bits."""

import numpy as np
import pytest
from tiny_training import Tiny, run, tiny_value_and_grad

from pyloss import nn, optim


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


GROUPS = {
    "own settings": [{"match": "*.lora_b", "weight_decay": 0.5, "rate_scale": 16}],
    "another optimizer": [{"match": "*.lora_b", "optimizer": "lion", "learning_rate": 1e-3}],
}
CASES = [*((name, {}) for name in optim.OPTIMIZERS)]
CASES += [(name, {"groups": groups}) for name in ("adamw", "muon") for groups in GROUPS.values()]


def made(name, options):
    schedule = optim.build_schedule({"name": "cosine_decay", "arguments": [0.05, 20], "warmup": 4})
    return optim.build_optimizer(name, schedule, options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_run_resumes_to_the_same_bits(tmp_path, name, options):
    settings = {"grad_accumulation_steps": 2, "keep_best": False}
    whole, _, _ = run(tmp_path / "whole", optimizer=made(name, options), iters=9, **settings)
    run(tmp_path / "parts", optimizer=made(name, options), iters=5, **settings)
    parts, _, _ = run(
        tmp_path / "parts", Tiny(seed=5), made(name, options), iters=9, resume=True, **settings
    )
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(parts.arrays[key], array)
        assert (array != Tiny().arrays[key]).any()


@pytest.mark.parametrize(
    ("name", "groups", "match"),
    [
        ("adamw", [{"match": "*.bias", "weight_decay": 0}], r"'\*\.bias' matches none of the 2"),
        ("muon", [{"match": "*.norm", "optimizer": "adamw"}], r"'\*\.norm' matches none of the 2"),
    ],
)
def test_groups_that_match_nothing_are_refused_before_anything_is_written(
    tmp_path, name, groups, match
):
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "adapters", optimizer=made(name, {"groups": groups}))
    assert not (tmp_path / "adapters").exists()


def test_a_parameter_that_muon_cannot_update_is_refused_before_anything_is_written(tmp_path):
    model = Tiny()
    model.arrays["layers.0.m"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"'layers\.0\.m' has shape \(3,\); .* groups="):
        run(tmp_path / "adapters", model, made("muon", {}))
    assert not (tmp_path / "adapters").exists()
