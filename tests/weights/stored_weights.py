"""Stored matrices of every format for tests.

pyloss quantizes random values; for formats that it only reads, blocks are random bytes with modest
scales.
"""

import numpy as np

from pyloss.weights.weight import FORMATS, Weight

#: Offsets of a block's scale halves, and a scale that gives values of about 1.
K_HALVES = {
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,), "mxfp4": (),
}  # fmt: skip
K_SIZES = {
    "q2_k": 0.06, "q3_k": 0.025, "q4_k": 0.003, "q5_k": 0.0015, "q6_k": 0.0008,
    "iq4_nl": 0.015, "iq4_xs": 0.0008, "mxfp4": 0.2,
}  # fmt: skip
QUANTISED = [name for name, layout in FORMATS.items() if layout.elements > 1]
GGUF = [name for name, layout in FORMATS.items() if not layout.bits]
GROUPED = [name for name, layout in FORMATS.items() if layout.bits]


def stored(rng, rows, cols, format, head_dim=0, size=1.0):
    """A matrix of values of about `size`; columns are rounded up to the format's blocks."""
    layout = FORMATS[format]
    cols = -(-cols // layout.elements) * layout.elements
    if layout.encodes:
        values = (size * rng.standard_normal((rows, cols))).astype(np.float32)
        # 16-bit scales make products with codes exact in any order; nf4 blocks straddle rows.
        options = {"group_size": 64 if format == "nf4" else 32, "scale_format": "f16"}
        return Weight.quantize(values, format, head_dim, **options)
    blocks = rng.integers(0, 256, (rows * cols // layout.elements, layout.bytes), dtype=np.uint8)
    for at in K_HALVES[format]:
        halves = size * K_SIZES[format] * rng.uniform(0.5, 1.5, len(blocks))
        blocks[:, at : at + 2] = halves.astype("<f2").view(np.uint8).reshape(-1, 2)
    if format == "mxfp4":  # an exponent in place of a scale
        powers = np.log2(size * K_SIZES[format]) + rng.uniform(-1, 1, len(blocks))
        blocks[:, 0] = 128 + np.round(powers)
    return Weight(blocks.reshape(-1), format, (rows, cols), head_dim)
