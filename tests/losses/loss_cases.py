"""The losses with their arguments, types with tolerances, and layouts that tests iterate over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import loss_formulas
import ml_dtypes
import numpy as np
from loss_formulas import IGNORE

import pyloss

DTYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
REDUCTIONS = ["none", "sum", "mean"]


def some_labels(rng, shape):
    """One label per row; about one in four is ignored."""
    labels = rng.integers(0, shape[-1], shape[:-1])
    return np.where(rng.uniform(size=shape[:-1]) < 0.25, IGNORE, labels)


def _targets(rng, shape):
    return rng.choice([0.0, 0.25, 1.0], shape).astype(np.float32)


@dataclass(frozen=True)
class Loss:
    """A loss with options, as a function of logits.

    It takes `logits` arrays of one shape, then what `other` makes for that shape.
    """

    name: str
    logits: int = 1
    other: Callable | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rows: bool = True  # one value per row, else per element
    own_type: bool = False  # the result has the type of the logits
    shiftable: bool = True  # a constant added to a row of logits changes nothing

    def __str__(self):
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def arguments(self, rng, shape, dtype=np.float64, scale=3.0):
        """Logits of this dtype, and the other arguments."""
        logits = tuple(
            (scale * rng.standard_normal(shape)).astype(dtype) for _ in range(self.logits)
        )
        return logits if self.other is None else (*logits, self.other(rng, shape))

    def out_shape(self, shape):
        return tuple(shape[:-1]) if self.rows else tuple(shape)

    def result_type(self, dtype):
        """The type of the result for logits of this dtype."""
        return np.dtype(dtype) if self.own_type else result_type(dtype)

    def weights(self, rng, shape):
        """One weight per row (or element); some are 0."""
        weights = rng.uniform(0.5, 2, self.out_shape(shape))
        return np.where(rng.uniform(size=weights.shape) < 0.2, 0, weights)

    def __call__(self, *arguments, **options):
        return getattr(pyloss, self.name)(*arguments, **{**self.options, **options})

    def formula(self, *arguments, reduction="none", upstream=1.0, **options):
        """(loss, gradients) in float64."""
        upstream = np.asarray(upstream, self.result_type(arguments[0].dtype))
        return loss_formulas.reduced(
            self.name, arguments, {**self.options, **options}, reduction, upstream
        )

    def gradients(self, *arguments, upstream=1.0, **options):
        """(loss, the gradients of `(upstream * loss).sum()`) from the tape."""
        logits, other = arguments[: self.logits], arguments[self.logits :]

        def f(*logits):
            loss = self(*logits, *other, **options)
            return (loss * np.asarray(upstream, loss.dtype)).sum(), loss

        (_, loss), gradients = pyloss.value_and_grad(f, range(self.logits))(*logits)
        return loss, gradients


_classes, _pair = {"other": some_labels}, {"logits": 2}
LOSSES = [
    Loss("softmax_cross_entropy", **_classes),
    Loss("softmax_cross_entropy", **_classes, options={"label_smoothing": 0.1}),
    Loss(
        "softmax_cross_entropy",
        **_classes,
        options={"z_loss": 1e-2, "softcap": 5.0},
        shiftable=False,
    ),
    Loss("focal_loss", **_classes),
    Loss("focal_loss", **_classes, options={"gamma": 0.5, "alpha": 0.25}),
    Loss("stablemax_cross_entropy", **_classes, shiftable=False),
    Loss("kl_div_loss", **_pair),
    Loss("kl_div_loss", **_pair, options={"temperature": 2.0}),
    Loss("js_div_loss", **_pair),
    Loss("js_div_loss", **_pair, options={"beta": 0.2, "temperature": 0.5}),
    Loss("js_div_loss", **_pair, options={"beta": 0}),
    Loss("js_div_loss", **_pair, options={"beta": 1, "temperature": 2.0}),
    Loss("kl_div_loss", **_pair, options={"direction": "reverse"}),
    Loss(
        "kl_div_loss",
        **_pair,
        options={"softcap": (5.0, None), "logit_scale": (1.5, 0.5), "temperature": 2.0},
        shiftable=False,
    ),
    Loss("js_div_loss", **_pair, options={"softcap": (4.0, 6.0)}, shiftable=False),
    Loss("js_div_loss", **_pair, options={"logit_scale": (0.5, 1.5)}),
    Loss("skew_kl_div_loss", **_pair),
    Loss(
        "skew_kl_div_loss",
        **_pair,
        options={"skew": 0.7, "direction": "reverse", "temperature": 2.0},
    ),
    Loss("cosine_loss", **_pair, shiftable=False),
    Loss(
        "cosine_loss",
        **_pair,
        options={"softcap": (5.0, None), "logit_scale": (1.5, 0.5)},
        shiftable=False,
    ),
    Loss("tvd_loss", **_pair),
    Loss("tvd_loss", **_pair, options={"temperature": 2.0, "logit_scale": 0.5}),
]
BCE = Loss("binary_cross_entropy_with_logits", other=_targets, rows=False, shiftable=False)
MAPS = [
    Loss(name, rows=False, own_type=True, shiftable=False)
    for name in ("stablemax", "log_stablemax")
]
PLAIN = [loss for loss in LOSSES if not loss.options]  # each loss once
EVERY = [*LOSSES, BCE, *MAPS]


def result_type(dtype):
    """float64 for float64 logits, float32 for all others."""
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def tolerance(dtype):
    """Relative error allowed for results from logits of this dtype, for any number of classes."""
    return 1e-12 if result_type(dtype) == np.float64 else 16 * float(np.finfo(np.float32).eps)


def assert_value(loss, got, want, dtype, scale=1.0):
    """Check the result of a loss or map for logits of `dtype`."""
    (assert_gradient if loss.own_type else assert_loss)(
        np.asarray(got), np.asarray(want), dtype, scale
    )


def assert_loss(got, want, dtype, scale=1.0):
    """Check the type of losses of logits of `dtype`, and their values relative to `scale`."""
    got = np.asarray(got)
    assert got.dtype == result_type(dtype) and got.shape == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=tolerance(dtype), atol=tolerance(dtype) * scale)


def assert_gradient(got, want, dtype, scale=1.0):
    """Check gradients of logits of `dtype`, relative to the row's largest or `scale`."""
    assert got.dtype == dtype and got.shape == want.shape
    info = ml_dtypes.finfo(np.dtype(dtype).newbyteorder("="))
    rounding = 0.51 * float(info.eps) if info.bits == 16 else 0.0
    largest = np.abs(want).max(axis=-1, keepdims=True, initial=0.0, where=np.isfinite(want))
    limit = (
        tolerance(dtype) * np.maximum(largest, scale / 4)
        + (rounding + tolerance(dtype)) * np.abs(want)
        + float(info.smallest_subnormal)
    )
    got = got.astype(np.float64)
    assert (np.isnan(got) == np.isnan(want)).all()
    off = np.abs(got - want, where=np.isfinite(want), out=np.zeros(want.shape)) - limit
    assert (off <= 0).all(), (
        f"{got.flat[off.argmax()]} for {want.flat[off.argmax()]} at {np.unravel_index(off.argmax(), off.shape)}"
    )


def layouts(x):
    """The same values in other memory layouts, by name."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
    first, second = wide.copy()[..., : x.shape[-1]], wide[..., 1::2]
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.uint8)
    unaligned = (
        np.frombuffer(memoryview(raw), x.dtype, x.size).reshape(x.shape) if x.size else x.copy()
    )
    first[...] = second[...] = x
    if x.size:
        raw[...] = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    read_only = x.copy()
    read_only.flags.writeable = False
    made = {
        "Fortran": np.asfortranarray(x),
        "without the last column": first,
        "every second column": second,
        "negative strides": x[..., ::-1].copy()[..., ::-1],
        "rows backwards": x[::-1].copy()[::-1],
        "axes swapped": np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
        "unaligned": unaligned,
        "read-only": read_only,
    }
    if np.dtype(x.dtype).kind == "f":  # bfloat16 has only one byte order
        made["big-endian"] = x.astype(x.dtype.newbyteorder(">"))
    return made
