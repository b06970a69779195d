"""Gradients larger than the caches have the bits of small batches, at any alignment.

The kernel writes them while it reads the next row.
"""

import numpy as np
import pytest

from pyloss import _core

pytestmark = pytest.mark.usefixtures("isa")

# 31 MB of float32. V is no multiple of the vector width, so that every row has another alignment.
N, V = 60, 131_103
FRAME = 64
KINDS = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}
LOSSES = {
    "softmax_cross_entropy": (0.0, 0.0, 0.0),
    "softmax_cross_entropy, smoothed": (0.1, 0.0, 0.0),
    "stablemax_cross_entropy": (),
    "kl_div": (None, 1.5, 0.0, 1.5, 0.0),
    "js_div": (None, 1.5, 0.0, 1.5, 0.0, 0.3),
    "js_div, capped": (None, 1.5, 4.0, 1.0, 2.0, 0.3),
}


def logits(rng, kind):
    x = rng.standard_normal((N // 4, V), dtype=np.float32) * 4
    x = np.concatenate([x, -x, x[::-1], x / 2])
    return (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else x.astype(KINDS[kind])


def framed(rows, dtype, offset):
    """Rows between elements of value 7, which must not change."""
    whole = np.full(rows * V + 2 * FRAME, 7, dtype)
    return whole, whole[offset : offset + rows * V].reshape(rows, V)


def run(name, arguments, upstream, rows, offset, kind, options):
    dtype = KINDS[kind]
    count = 2 if name in ("kl_div", "js_div") else 1
    frames = [framed(rows.stop - rows.start, dtype, offset) for _ in range(count)]
    loss = np.empty(rows.stop - rows.start, upstream.dtype)
    gradients = [g for _, g in frames]
    if count == 1:  # without class weights and log sums
        outer = None, upstream[rows], None, loss, None, *gradients
    else:
        outer = upstream[rows], loss, *gradients
    getattr(_core, name)(*[a[rows] for a in arguments], *options, *outer)
    for whole, gradient in frames:
        seen = gradient.copy()
        gradient[...] = 7
        assert (whole == 7).all()
        yield seen
    yield loss


CASES = [(loss, kind) for loss in LOSSES for kind in ("f32", "bf16")]
CASES += [(loss, kind) for loss in ("softmax_cross_entropy", "js_div") for kind in ("f64", "f16")]


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_same_bits_as_small_batches(rng, loss, kind):
    name = loss.split(",")[0]
    x = logits(rng, kind)
    upstream = rng.standard_normal(N).astype(np.float64 if kind == "f64" else np.float32)
    upstream[[3, 4, 17, 59]] = 0
    if name in ("kl_div", "js_div"):
        arguments = (x, x[::-1])
    else:
        labels = rng.integers(0, V, N).astype(np.int32)
        labels[[0, 5, 17, 40, 41]] = -1
        labels[[1, 2, 6]] = 0, V - 1, 2047
        arguments = (x, labels)
    together = list(run(name, arguments, upstream, slice(0, N), 0, kind, LOSSES[loss]))
    for offset in (1, FRAME):
        for a, b in zip(
            together,
            run(name, arguments, upstream, slice(0, N), offset, kind, LOSSES[loss]),
            strict=True,
        ):
            assert a.tobytes() == b.tobytes()
    for begin in range(0, N, 10):
        rows = slice(begin, begin + 10)
        for a, b in zip(
            together, run(name, arguments, upstream, rows, 0, kind, LOSSES[loss]), strict=True
        ):
            assert a[rows].tobytes() == b.tobytes()
