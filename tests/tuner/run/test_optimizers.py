"""Runs with each optimizer of the settings resume to the same bits."""

import numpy as np
import pytest
from tiny_training import Tiny, run, tiny_value_and_grad

from pyloss import nn, optim


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def made(name):
    schedule = optim.build_schedule({"name": "cosine_decay", "arguments": [0.05, 20], "warmup": 4})
    return optim.build_optimizer(name, schedule)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_run_resumes_to_the_same_bits(tmp_path, name):
    settings = {"grad_accumulation_steps": 2, "keep_best": False}
    whole, _, _ = run(tmp_path / "whole", optimizer=made(name), iters=9, **settings)
    run(tmp_path / "parts", optimizer=made(name), iters=5, **settings)
    parts, _, _ = run(
        tmp_path / "parts", Tiny(seed=5), made(name), iters=9, resume=True, **settings
    )
    for key, array in whole.arrays.items():
        np.testing.assert_array_equal(parts.arrays[key], array)
        assert (array != Tiny().arrays[key]).any()
