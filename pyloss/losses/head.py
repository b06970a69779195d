"""Fused losses of hidden states under an output head.

The logits exist a few rows at a time, and so do their gradients. A public function prepares its
`Head`s and gives `fused` the loss of a part of the rows; `fused` returns the call that `RowLoss`
makes. For each part it computes the logits, the loss with its slopes (the gradient by the logits),
and the products of the slopes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyloss import _core
from pyloss.autograd.tape import data
from pyloss.ops.arrays import empty, f32
from pyloss.ops.projection import INPUTS, Backward, Product, Projection
from pyloss.runtime import device
from pyloss.runtime.precision import multiplies_by_tiles
from pyloss.weights.weight import Weight

# Bytes of logits that exist at once, but not fewer than MIN_ROWS rows, unless these take more
# than MAX_BYTES: each part of the rows reads and packs the whole head. Tiles multiply faster, so
# that packing is a larger share.
LOGITS_BYTES = 40 << 20
MIN_ROWS = 126
MIN_ROWS_BY_TILES = 256
MAX_BYTES = 160 << 20
TILE_ROWS = 42  # a multiple of the rows of the widest tiles
FILTERED_COLUMNS = 2048  # classes gathered at a time by the filter


class Head(NamedTuple):
    """Hidden states, and the projection that makes logits of them.

    Attributes:
        hidden: [..., D], as given.
        rows: float32 [N, D].
        projection: of the rows to logits [N, V].
        trained: the weight as given.
    """

    hidden: Any
    rows: np.ndarray
    projection: Projection
    trained: Any

    @property
    def vocabulary(self) -> int:
        """The number of classes."""
        return int(self.projection.weight.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(data(self.hidden)))

    @property
    def plain(self) -> bool:
        """Whether the projection has a weight only."""
        return self.projection.bias is None and self.projection.lora_a is None

    def inputs(self) -> tuple[Any, ...]:
        """The SLOTS arrays that may get a gradient."""
        return self.hidden, *self.projection._replace(weight=self.trained).inputs()


SLOTS = 1 + INPUTS


def head(hidden: Any, weight: Any, suffix: str = "", bias: Any = None) -> Head:
    """Checks hidden states, weight and bias, see `linear_cross_entropy`.

    Names in errors end in `suffix`.
    """
    source = data(hidden, f"hidden{suffix}")
    if hasattr(weight, "projection"):
        projection = weight.projection()
    elif isinstance(weight, Weight):
        projection = Projection(weight)
    else:
        array = data(weight, f"weight{suffix}")
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"weight{suffix} must be [V, D] with V and D at least 1, got shape {array.shape}"
            )
        half = array.dtype == np.float16 or device.is_bfloat16(array.dtype)
        if half and array.dtype.isnative and not device.is_device_array(array):
            raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            projection = Projection(
                Weight(raw, "f16" if array.dtype == np.float16 else "bf16", array.shape)
            )
        else:
            projection = Projection(f32(weight, f"weight{suffix}"))
    if getattr(projection.weight, "columns", None) is not None:
        raise ValueError(f"weight{suffix} must have its columns in order")
    if bias is not None:
        projection = projection._replace(bias=_checked_bias(bias, weight, projection))
    width = projection.weight.shape[1]
    if source.shape[-1:] != (width,):
        raise ValueError(
            f"hidden{suffix} has shape {source.shape}, "
            f"which does not end in weight{suffix}'s {width}"
        )
    rows = f32(hidden, f"hidden{suffix}").reshape(-1, width)
    return Head(
        hidden, rows, projection, projection.weight if hasattr(weight, "projection") else weight
    )


def _checked_bias(bias: Any, weight: Any, projection: Projection) -> Any:
    if hasattr(weight, "projection"):
        raise ValueError(
            f"bias goes with an array or a Weight; a {type(weight).__name__} brings its own"
        )
    size = projection.weight.shape[0]
    if np.shape(data(bias, "bias")) != (size,):
        raise ValueError(
            f"bias has shape {np.shape(data(bias))}, expected one per class: ({size},)"
        )
    return bias


def rows_at_once(row_bytes: int, logits_bytes: int | None = None) -> int:
    """The most rows whose logits exist together, if a row of them takes `row_bytes`.

    `logits_bytes` defaults to LOGITS_BYTES.
    """
    least = MIN_ROWS_BY_TILES if multiplies_by_tiles() else MIN_ROWS
    return max((logits_bytes or LOGITS_BYTES) // row_bytes, min(least, MAX_BYTES // row_bytes), 16)


def _parts(total: int, row_bytes: int, logits_bytes: int | None = None) -> list[slice]:
    """The rows in even parts: each part packs the whole head, so none should be short."""
    most = rows_at_once(row_bytes, logits_bytes)
    count = -(-total // most)
    whole = -(-total // max(count, 1) // TILE_ROWS) * TILE_ROWS
    if whole <= most and 2 * (total - (count - 1) * whole) >= whole:
        bounds = [min(i * whole, total) for i in range(count + 1)]
    else:
        bounds = [i * total // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def fused(
    heads: Sequence[Head],
    counted: np.ndarray | None,
    gradient_filter: float,
    kernel: Callable[
        [slice, Sequence[np.ndarray], np.ndarray | None, np.ndarray, Sequence[np.ndarray | None]],
        None,
    ],
    logits_bytes: int | None = None,
    more_columns: int = 0,
) -> Callable:
    """`rows.Run` for a loss of the logits of `heads`.

    Args:
        counted: int32 [M], the rows to compute, None for all. The other rows give 0.
        gradient_filter: classes for which no row of a part has a larger gradient (of its own loss
            by its logits) are left out of the products with the slopes.
        kernel: `kernel(part, logits, dloss, loss, dlogits)` computes a part of the counted rows.
            dlogits[i] may be logits[i]'s own buffer, or None.
        more_columns: of the buffers that `kernel` needs for a row, beside the logits.
    """
    total = len(heads[0].rows) if counted is None else len(counted)
    # The gradient of DoRA's magnitudes reads the logits, so slopes need a second buffer.
    parts = _parts(
        total,
        4 * (more_columns + sum(h.vocabulary * (1 + (h.projection.m is not None)) for h in heads)),
        logits_bytes,
    )

    def run(
        dloss: np.ndarray | None, wanted: Sequence[bool], loss: np.ndarray
    ) -> list[np.ndarray | None]:
        wanted = wanted or (False,) * SLOTS * len(heads)
        rows, values, factors = (
            [h.rows for h in heads],
            loss.reshape(-1),
            None if dloss is None else dloss.reshape(-1),
        )
        if counted is not None:
            rows, values = [_gathered(r, counted) for r in rows], empty(total)
            factors = None if factors is None else np.ascontiguousarray(factors[counted])
        slots = [tuple(wanted[SLOTS * i : SLOTS * (i + 1)]) for i in range(len(heads))]
        most = max((p.stop - p.start for p in parts), default=0)
        walks = [
            _Walk(h, r, w, most, gradient_filter)
            for h, r, w in zip(heads, rows, slots, strict=True)
        ]
        for part in parts:
            scale = None if factors is None else factors[part]
            logits, slopes = zip(*(walk.forward(part) for walk in walks), strict=True)
            kernel(part, logits, scale, values[part], slopes)
            for walk in walks:
                walk.backward(part, scale)
        if counted is not None:
            loss.reshape(-1)[...] = _spread(values, counted, loss.size)
        found: list[np.ndarray | None] = []
        for h, walk in zip(heads, walks, strict=True):
            to, *others = walk.end()
            full = (
                None if to is None else to if counted is None else _spread(to, counted, len(h.rows))
            )
            found += [None if full is None else full.reshape(h.shape), *others]
        return found

    return run


def row_loss(name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Calls a row loss where its logits are.

    On a device, other arrays are copied there, and results back.
    """
    if device.is_device_array(inputs[0]):
        device.call(name, inputs, outputs)
    else:
        getattr(_core, name)(*inputs, *outputs)


class _Walk:
    """One head, one part of its rows [N, D] after the other: logits, then wanted gradients."""

    def __init__(
        self,
        head: Head,
        rows: np.ndarray,
        wanted: tuple[bool, ...],
        most: int,
        gradient_filter: float,
    ):
        self.head, self.rows, self.filter = head, rows, gradient_filter if head.plain else 0.0
        self.product = Product((head.projection,), len(rows), rows)
        self.buffer = empty(most, head.vocabulary, like=rows)
        # Otherwise the slopes overwrite the logits, which losses on devices cannot do.
        apart = wanted[-1] or (any(wanted) and device.is_device_array(rows))
        self.slopes = empty(most, head.vocabulary, like=rows) if apart else self.buffer
        dx = empty(*rows.shape, like=rows) if wanted[0] else None
        # The filtered products add to it.
        dw = None
        if wanted[1] and self.filter:
            dw = empty(*head.projection.weight.shape, like=rows)
            dw[...] = 0
        self.gradients = Backward(self.product, wanted, dx, dw=dw) if any(wanted) else None

    def forward(self, part: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """The logits of a part, and the buffer for their slopes."""
        count = part.stop - part.start
        self.product.forward([self.buffer[:count]], part)
        return self.buffer[:count], None if self.gradients is None else self.slopes[:count]

    def backward(self, part: slice, scale: np.ndarray | None) -> None:
        if self.gradients is None:
            return
        count = part.stop - part.start
        slopes = self.slopes[:count]
        classes = _classes(slopes, scale, self.filter)
        if classes is None:
            self.gradients.add([slopes], [self.buffer[:count]], part)
        else:
            dx = self.gradients.dx
            _products(
                self.product.weight[0],
                slopes,
                self.rows[part],
                classes,
                None if dx is None else dx[part],
                self.gradients.dw[0],
            )

    def end(self) -> list[np.ndarray | None]:
        if self.gradients is None:
            return [None] * SLOTS
        return [self.gradients.dx, *self.gradients.end()[0]]


def _classes(
    slopes: np.ndarray, scale: np.ndarray | None, gradient_filter: float
) -> np.ndarray | None:
    """int32 [M], the classes for which some row's gradient is above the filter or NaN.

    None for all classes, if these are at least half of them.
    """
    if not gradient_filter:
        return None
    bounds = np.full(len(slopes), gradient_filter, np.float32)
    above = device.on_device_of(slopes, np.empty(slopes.shape[1], np.uint8))
    _core.columns_above(
        slopes,
        device.on_device_of(slopes, bounds if scale is None else bounds * np.abs(scale)),
        above,
    )
    above = np.asarray(above)
    classes = np.flatnonzero(above).astype(np.int32)
    return classes if 2 * len(classes) < len(above) else None


def _products(
    weight: Any,
    slopes: np.ndarray,
    rows: np.ndarray,
    classes: np.ndarray,
    dx: np.ndarray | None,
    dw: np.ndarray | None,
) -> None:
    """dx [N, D] = slopes weight and dw [V, D] += slopes^T rows, over some of the classes."""
    if dx is not None and not len(classes):
        dx[...] = 0
    for begin in range(0, len(classes), FILTERED_COLUMNS):
        some = device.on_device_of(rows, classes[begin : begin + FILTERED_COLUMNS])
        gathered, vectors = (
            empty(len(rows), len(some), like=rows),
            empty(len(some), rows.shape[1], like=rows),
        )
        _core.gather_columns(slopes, some, gathered)
        if dx is not None:
            _core.embedding_forward(some, weight, vectors)
            _core.matmul_nn(gathered, vectors, 1.0, int(begin > 0), dx)
        if dw is not None:
            _core.matmul_tn(gathered, rows, 1.0, 0, vectors)
            _core.embedding_grad(vectors, some, dw)


def _gathered(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    out = empty(len(counted), values.shape[1], like=values)
    _core.gather_rows(values, device.on_device_of(values, counted), out)
    return out


def _spread(values: np.ndarray, counted: np.ndarray, total: int) -> np.ndarray:
    """Rows [M, ...] at their places among `total` rows; the others are 0."""
    out, width = empty(total, *values.shape[1:], like=values), math.prod(values.shape[1:])
    rows = device.on_device_of(values, counted)
    _core.scatter_add_rows(values.reshape(len(counted), width), rows, out.reshape(total, width))
    return out
