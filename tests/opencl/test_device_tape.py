"""NumPy's functions of Tensors on a device, against the same on the host."""

import numpy as np
import pytest

import pyloss
from pyloss import nn
from pyloss.runtime.device import DeviceArray

FUNCTIONS = {
    "arithmetic": lambda x, y: (x * y + x - y / (2 + x * x)).sum(),
    "elements": lambda x, y: np.mean(np.tanh(x) * np.exp(-np.square(y)) + np.maximum(x, y)),
    "numbers": lambda x, y: np.sum(2 * x + np.float64(1) - y**2),
    "axes": lambda x, y: np.sum(np.max(x, -1) * np.var(y, axis=1)),
    "shapes": lambda x, y: np.sum(np.transpose(x) * np.reshape(y, (4, 3))),
    "joins": lambda x, y: np.sum(np.concatenate([x, y], 1) * np.arange(8)),
    "choices": lambda x, y: np.sum(x[:, [0, 0, 2]] * y[1:2, :3]) + np.where(x > 0, x, y).sum(),
    "products": lambda x, y: np.sum((x @ y.T) ** 2),
    "softmax": lambda x, y: np.sum(pyloss.log_softmax(x) * pyloss.softmax(y)),
    "activations": lambda x, y: np.sum(pyloss.gelu(x) * pyloss.sigmoid(y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_device_arrays(device, name):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2))
    both = pyloss.value_and_grad(FUNCTIONS[name], (0, 1))
    want, slopes = both(x, y)
    value, found = both(*(pyloss.to_device(a, device) for a in (x, y)))
    np.testing.assert_allclose(np.asarray(value), want, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, slopes, strict=True):
        assert isinstance(one, DeviceArray) and one.shape == other.shape
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "window": 3}, {"mask": np.arange(6) > 1}, {"softcap": 2.0}],
    ids=["plain", "window", "mask", "cap"],
)
def test_attention_of_device_arrays(device, options):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 6, n, 8)).astype(np.float32) for n in (4, 2, 2)]
    both = pyloss.value_and_grad(
        lambda q, k, v: np.sum(np.square(pyloss.attention(q, k, v, **options))), (0, 1, 2)
    )
    want, slopes = both(*arrays)
    value, found = both(*(pyloss.to_device(a, device) for a in arrays))
    np.testing.assert_allclose(np.asarray(value), want, rtol=1e-4)
    for one, other in zip(found, slopes, strict=True):
        assert isinstance(one, DeviceArray)
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-3, atol=1e-4)


def test_a_model_of_blocks_trains_on_a_device(device):
    pyloss.random.seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.LayerNorm(8), nn.MultiHeadAttention(8, 2, rope=nn.RoPE(4)),
        nn.Conv1d(8, 8, 3, groups=8, padding="causal"), nn.Linear(8, 5),
    )  # fmt: skip
    ids = np.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    step = nn.value_and_grad(model, lambda: pyloss.softmax_cross_entropy(model(ids), ids).mean())
    want, slopes = step()
    pyloss.to_device(model, device)
    value, found = step()
    np.testing.assert_allclose(np.asarray(value), want, rtol=1e-4)
    for name, gradient in found.items():
        assert isinstance(gradient, DeviceArray)
        np.testing.assert_allclose(gradient.numpy(), slopes[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (100,), (2, 50), (1, 9, 1), (20, 3, 40), (0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_on_a_device_is_shown_as_on_the_host(device, rng, shape, dtype):
    import ml_dtypes

    from pyloss.autograd.tensor import Tensor

    x = np.asarray(rng.standard_normal(shape)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    )
    shown = repr(Tensor(pyloss.to_device(x)))
    assert shown == repr(Tensor(x)).replace("host", device)


def test_a_module_on_a_device_is_shown_as_on_the_host(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    expected = repr(model), str(model.summary()), repr(model.trainable_parameters())
    pyloss.to_device(model)
    assert (repr(model), str(model.summary()), repr(model.trainable_parameters())) == expected
