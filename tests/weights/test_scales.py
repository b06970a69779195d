"""`Scales`: the floats of quantized blocks as numbers that can be trained."""

import numpy as np
import pytest
from stored_weights import QUANTISED, stored

from pyloss.weights.scales import Scales, has_scales
from pyloss.weights.weight import Weight

TRAINED = [name for name in QUANTISED if name not in ("mxfp4", "nf4")]


def weight_in(format, rows=6, columns=512, head_dim=0):
    values = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    return Weight.quantize(values, format, head_dim)


@pytest.mark.parametrize("format", TRAINED)
def test_no_change_is_the_matrix_itself_and_a_change_scales_it(format):
    weight = weight_in(format)
    scales = Scales(weight)
    assert scales.weight_of(scales.zeros()) is weight
    change = scales.zeros()
    change[0] = 0.25
    changed = scales.weight_of(change)
    assert changed.format == format and changed.nbytes == weight.nbytes
    before = weight.dequantize()
    if scales.shape[0] == 1:  # the whole value is the scale's
        np.testing.assert_allclose(changed.dequantize(), 1.25 * before, rtol=1e-3)
    else:
        assert np.abs(changed.dequantize() - before).max() > 0.01
    assert np.array_equal(weight.dequantize(), before), "the stored matrix is never written to"


@pytest.mark.parametrize("head_dim", [0, 4])
@pytest.mark.parametrize("format", TRAINED)
def test_gradients_are_those_of_finite_differences(format, head_dim):
    weight = weight_in(format, rows=8, head_dim=head_dim)
    scales = Scales(weight)
    rng = np.random.default_rng(2)
    upstream = rng.standard_normal(weight.shape).astype(np.float32)
    found = scales.by_change(upstream)
    assert found.shape == scales.shape
    # A change of one block by 1/2 is far above the rounding of float16, and values are linear.
    for place in [(k, 5, b) for k in range(scales.shape[0]) for b in (0, scales.shape[2] - 1)]:
        ends = []
        for sign in (1, -1):
            change = scales.zeros()
            change[place] = sign * 0.5
            values = scales.weight_of(change).dequantize().astype(np.float64)
            ends.append((values * upstream).sum())
        assert found[place] == pytest.approx(ends[0] - ends[1], rel=4e-3, abs=4e-3)


@pytest.mark.parametrize("format", ["affine3", "q4_1", "q6_k"])
def test_gradients_of_chosen_rows_are_those_of_all(format):
    scales = Scales(weight_in(format, rows=9))
    upstream = np.random.default_rng(3).standard_normal(scales.weight.shape).astype(np.float32)
    rows = np.array([7, 2, 2], np.int32)
    whole = scales.by_change(upstream)
    assert np.array_equal(scales.by_change_of_rows(upstream[rows], rows), whole[:, rows])
    assert np.array_equal(scales.by_change(upstream[4:6], 4), whole[:, 4:6])


def test_rows_of_a_larger_matrix_have_their_own_scales():
    part = weight_in("affine4", rows=8).slice_rows(4, 6)
    scales = Scales(part)
    change = scales.zeros() + np.float32(1e-30)  # rounds to no change, but is written anew
    assert np.array_equal(scales.weight_of(change).dequantize(), part.dequantize())


def test_scales_beyond_the_type_end_at_its_range():
    scales = Scales(weight_in("q4_0"))
    change = scales.zeros()
    change[...] = 1e9
    assert np.isfinite(scales.weight_of(change).dequantize()).all()


@pytest.mark.parametrize("format", ["mxfp4", "nf4", "f16"])
def test_other_formats_have_no_such_scales(format):
    weight = stored(np.random.default_rng(0), 4, 64, format)
    assert not has_scales(weight)
    with pytest.raises(ValueError, match="no scales and offsets that can be trained"):
        Scales(weight)
