"""Layer products in bfloat16 against torch's, which also rounds the results to bfloat16."""

import numpy as np
import pytest

from pyloss.ops.projection import linear
from pyloss.runtime.precision import matmul_precision

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(40, 576, 192), (64, 1536, 96)])
def test_torch_multiplies_the_same_numbers(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((rows, inputs), (outputs, inputs))
    )
    with matmul_precision("bfloat16"):
        ours = linear(x, w)
    rounded = torch.from_numpy(x).bfloat16(), torch.from_numpy(w).bfloat16()
    theirs = (rounded[0] @ rounded[1].T).float().numpy()
    terms = (rounded[0].float().abs() @ rounded[1].float().abs().T).numpy()
    # torch's last rounding adds half a unit of 8 bits; both sums are rounded in float32.
    assert (np.abs(ours - theirs) <= 2.0**-8 * np.abs(theirs) + 2.0**-20 * terms).all()
    assert (np.abs(linear(x, w) - theirs) > 2.0**-8 * np.abs(theirs) + 2.0**-20 * terms).any()
