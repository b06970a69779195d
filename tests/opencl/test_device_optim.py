"""Optimizers whose parameters are on a device, against the same updates on the host."""

from functools import partial

import numpy as np
import pytest

import pyloss
from pyloss import optim

SHAPES = {"matrix": (9, 6), "wide": (4, 40), "table": (12, 5)}
KINDS = [
    optim.AdamW,
    optim.AdamATan2,
    partial(optim.SGD, momentum=0.9),
    optim.Lion,
    optim.Muon,
    optim.Adafactor,
    optim.SparseSignSGD,
]


def some(rng, scale=1.0):
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_updates_on_a_device_are_those_of_the_host(device, kind, rng):
    host = some(rng)
    there = {name: pyloss.to_device(array, device) for name, array in host.items()}
    one, two = kind(0.01), kind(0.01)
    for t in range(4):
        grads = some(rng, 0.1)
        grads["table"][t:] = 0
        one.update(host, grads, grad_scale=0.5)
        two.update(there, grads, grad_scale=0.5)
    for name, array in host.items():
        np.testing.assert_allclose(there[name].numpy(), array, rtol=2e-5, atol=2e-6)
    saved, kept = one.state_dict(), two.state_dict()
    assert set(saved) == set(kept)
    for key, value in saved.items():
        np.testing.assert_allclose(kept[key], value, rtol=2e-5, atol=2e-6)


def test_rows_of_a_table_on_a_device(device, rng):
    table = rng.standard_normal((12, 5)).astype(np.float32)
    there, before = pyloss.to_device(table, device), table.copy()
    values = rng.standard_normal((4, 5)).astype(np.float32)
    one, two = optim.SparseSignSGD(0.1), optim.SparseSignSGD(0.1)
    one.update({"t": table}, {"t": optim.RowGradient([3, 7, 3, 0], values)})
    moved = optim.RowGradient([3, 7, 3, 0], pyloss.to_device(values, device))
    two.update({"t": there}, {"t": moved})
    np.testing.assert_allclose(there.numpy(), table, rtol=1e-6, atol=1e-6)
    kept = [row for row in range(12) if row not in (0, 3, 7)]
    np.testing.assert_array_equal(there.numpy()[kept], before[kept])


def test_an_average_of_parameters_on_a_device(device, rng):
    host = some(rng)
    there = {name: pyloss.to_device(array, device) for name, array in host.items()}
    one, two = optim.EMA(host, 0.9), optim.EMA(there, 0.9)
    for _ in range(3):
        for name, step in some(rng).items():
            host[name] += step
            there[name][...] = host[name]
        one.update(host)
        two.update(there)
    restored = optim.EMA(there, 0.9)
    restored.load_state_dict(two.state_dict())
    restored.update(there)
    two.update(there)
    with two.swapped(there), restored.swapped({n: a.copy() for n, a in there.items()}):
        one.update(host)
        for name in SHAPES:
            np.testing.assert_allclose(
                there[name].numpy(), one.averages[name], rtol=1e-5, atol=1e-6
            )
    for name, array in host.items():
        np.testing.assert_array_equal(there[name].numpy(), array)
        np.testing.assert_array_equal(restored.averages[name].numpy(), two.averages[name].numpy())
