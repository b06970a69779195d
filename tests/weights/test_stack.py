"""`WeightStack`: its contents, and which matrices can form one."""

import numpy as np
import pytest

from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight


def values(*shape):
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("format", ["f32", "bf16", "q8_0", "q4_0"])
def test_a_stack_of_matrices(format):
    array = values(3, 4, 64)
    stack = WeightStack.quantize(array, format)
    matrices = [Weight.quantize(matrix, format) for matrix in array]
    assert stack.shape == (3, 4, 64) and stack.format == format and len(stack.handle) == 3
    assert stack.nbytes == sum(matrix.nbytes for matrix in matrices)
    np.testing.assert_array_equal(
        stack.dequantize(), np.stack([matrix.dequantize() for matrix in matrices])
    )
    assert WeightStack(matrices).matrices == tuple(matrices) and stack.is_float == (
        format in ("f32", "bf16")
    )
    whole = Weight.quantize(array.reshape(12, 64), format)
    rows = WeightStack.from_rows(whole, 3)
    assert rows.shape == (3, 4, 64) and all(
        np.shares_memory(matrix.raw, whole.raw) for matrix in rows.matrices
    )
    np.testing.assert_array_equal(rows.dequantize(), stack.dequantize())
    assert repr(stack) == f"WeightStack({format}, shape=(3, 4, 64), {stack.nbytes} bytes)"


@pytest.mark.parametrize(
    "matrices",
    [
        [Weight.quantize(values(2, 4), "f32"), Weight.quantize(values(2, 4), "f16")],
        [Weight.quantize(values(2, 4), "f32"), Weight.quantize(values(2, 5), "f32")],
        [Weight.quantize(values(2, 4), "f32"), Weight.quantize(values(2, 4), "f32", head_dim=2)],
    ],
)
def test_matrices_that_differ(matrices):
    with pytest.raises(ValueError, match="must be alike: the first is Weight.* number 1 is Weight"):
        WeightStack(matrices)


def test_no_matrices_and_too_few_dimensions():
    with pytest.raises(ValueError, match="at least one matrix"):
        WeightStack([])
    with pytest.raises(ValueError, match=r"3 dimensions, got shape \(2, 4\)"):
        WeightStack.quantize(values(2, 4), "f32")
