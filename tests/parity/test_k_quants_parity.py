"""The encoders of K-quants and IQ4 beside llama.cpp's own, from its Python package."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyloss.weights.formats import SEARCHED
from pyloss.weights.weight import Weight


@pytest.fixture(scope="module")
def ggml():
    """ggml_quantize_chunk: matrix, format, importance -> values."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        pytest.skip("compares with llama.cpp: xllamacpp (parity extra)")
    library = next(Path(found.submodule_search_locations[0]).glob("*.so"), None)
    if library is None or not hasattr(ctypes.CDLL(str(library)), "ggml_quantize_chunk"):
        pytest.skip("this xllamacpp does not give ggml_quantize_chunk")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t

    def values(matrix, format, importance=None):
        kind = gguf.GGMLQuantizationType[format.upper()]
        raw = np.empty(gguf.quants.quant_shape_to_byte_shape(matrix.shape, kind), np.uint8)
        weights = None if importance is None else importance.ctypes.data_as(ctypes.c_void_p)
        rows, columns = (ctypes.c_int64(size) for size in matrix.shape)
        place = matrix.ctypes.data_as(ctypes.c_void_p), raw.ctypes.data_as(ctypes.c_void_p)
        assert function(int(kind), *place, ctypes.c_int64(0), rows, columns, weights) == raw.nbytes
        return gguf.quants.dequantize(raw, kind)

    return values


def rms(error):
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))


@pytest.mark.parametrize("format", list(SEARCHED))
def test_random_values(ggml, format):
    rng = np.random.default_rng(4)
    for draw in (rng.standard_normal, rng.laplace, lambda size: 1 + rng.standard_normal(size)):
        matrix = (0.02 * draw(size=(64, 1024))).astype(np.float32)
        own = Weight.quantize(matrix, format).dequantize()
        assert rms(own - matrix) < rms(ggml(matrix, format) - matrix)


@pytest.mark.parametrize("format", list(SEARCHED))
def test_random_values_with_importance(ggml, format):
    rng = np.random.default_rng(5)
    matrix = (0.02 * rng.standard_normal((64, 1024))).astype(np.float32)
    importance = rng.gamma(0.5, size=1024).astype(np.float32)
    own = Weight.quantize(matrix, format, importance=importance).dequantize()
    reference = ggml(matrix, format, importance)
    assert rms(np.sqrt(importance) * (own - matrix)) < rms(
        np.sqrt(importance) * (reference - matrix)
    )


@pytest.mark.parametrize("format", list(SEARCHED))
def test_a_trained_matrix(ggml, smollm2, format):
    """Weights of a real model, with the noise of a step, as its file has 4 bits."""
    model, _ = smollm2
    rng = np.random.default_rng(6)
    matrix = model.layers[7].mlp.down_proj.weight.dequantize()
    blocks = matrix.reshape(-1, 32)
    steps = (blocks.max(axis=1) - blocks.min(axis=1)) / 15
    noise = rng.uniform(-0.5, 0.5, blocks.shape) * steps[:, None]
    matrix = np.ascontiguousarray((blocks + noise).reshape(matrix.shape), np.float32)
    own = Weight.quantize(matrix, format).dequantize()
    assert rms(own - matrix) < rms(ggml(matrix, format) - matrix)
