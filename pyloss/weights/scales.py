"""The scales and offsets of a quantized matrix as numbers that can be trained, its codes fixed.

A value is linear in the floats of its block: w = s a for formats with a scale, w = s a + o b where
there is an offset, too. Codes (and in K-quants the small scales of runs) make a and b: they are
what the block decodes to with s = 1 and o = 0, and with s = 0 and o = 1.

What is trained are changes relative to the scales, so that one learning rate suits all matrices,
whatever the size of their values:

    one scale         s (1 + t0)
    K-quants          s (1 + t0) and o (1 + t1)
    scale and offset  s (1 + t0), about the middle of the range of codes, which moves by s t1

In the last form the two gradients are nearly independent, which Adam's steps for single numbers
need; by scale and offset themselves they are not, since codes are never negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyloss import _core
from pyloss.weights.formats import FORMATS, decode, encode
from pyloss.weights.groups import Groups, raw
from pyloss.weights.weight import Weight, stored_rows

Array = np.ndarray[Any, Any]

#: The bytes of a block at which its float16 scale, and offset if it has one, lie.
_PLACES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
#: The middle of the codes of formats with a scale and an offset per group.
_MIDDLE = {"q4_1": 7.5, "q5_1": 15.5} | {
    name: ((1 << layout.bits) - 1) / 2
    for name, layout in FORMATS.items()
    if name.startswith("affine")
}
#: Values that are decoded at once.
_AT_ONCE = 1 << 22


def has_scales(weight: Any) -> bool:
    """Whether a stored matrix has scales that `Scales` takes."""
    return (
        isinstance(weight, Weight)
        and weight.columns is None
        and (weight.format in _PLACES or weight.format in _MIDDLE)
    )


class Scales:
    """The scales of a matrix [O, I], and offsets where its format has them.

    Attributes:
        weight: the matrix as it was stored.
        shape: of the changes, (1 or 2, O, blocks of a row).
        size: columns of a block.

    Raises ValueError for a format without such scales: floats, MXFP4, NF4.
    """

    def __init__(self, weight: Weight) -> None:
        if not has_scales(weight):
            raise ValueError(f"{weight} has no scales and offsets that can be trained")
        self.weight = weight
        self.size = weight.groups.size if weight.groups else FORMATS[weight.format].elements
        rows, columns = weight.shape
        self._places = _PLACES.get(weight.format, ())
        self._middle = _MIDDLE.get(weight.format)
        count = len(self._places) or 2
        self.shape = (count, rows, columns // self.size)
        self._order = stored_rows(np.arange(rows), weight.head_dim)
        self._stored = self._read()

    def _read(self) -> Array:
        """The stored floats [1 or 2, O, blocks], rows in Hugging Face's order."""
        weight, groups = self.weight, self.weight.groups
        found = np.empty(self.shape, np.float32)
        if groups is not None:
            assert groups.offsets is not None
            begin = groups.first // self.size
            for k, stored in enumerate((groups.scales, groups.offsets)):
                values = decode(stored[None], groups.scale_format)[0]
                found[k] = values[begin : begin + found[k].size].reshape(self.shape[1:])
            return found[:, self._order]
        blocks = weight.raw.reshape(*self.shape[1:], -1)
        for k, place in enumerate(self._places):
            found[k] = blocks[..., place : place + 2].copy().view("<f2")[..., 0]
        return found[:, self._order]

    def zeros(self) -> Array:
        """No change."""
        return np.zeros(self.shape, np.float32)

    def weight_of(self, change: Array) -> Weight:
        """The matrix with changed scales, rounded as its format stores them; the codes are shared.

        Without a change it is the matrix itself.
        """
        if not change.any():
            return self.weight
        old = self._stored
        if self._middle is None:
            return self._with(old * (1 + change))
        offset = old[1] + old[0] * (change[1] - np.float32(self._middle) * change[0])
        return self._with(np.stack([old[0] * (1 + change[0]), offset]))

    def by_change(self, gradient: Array, first: int = 0) -> Array:
        """The gradient by the changes of the rows from `first` on, [1 or 2, n, blocks].

        `gradient` [n, I] is the one by the values of these rows.
        """
        rows = np.arange(first, first + len(gradient), dtype=np.int32)
        return self.by_change_of_rows(gradient, rows)

    def by_change_of_rows(self, gradient: Array, rows: Array) -> Array:
        """`by_change` of the rows with these numbers, int32 [n]."""
        found = np.empty((self.shape[0], len(rows), self.shape[2]), np.float32)
        units = self._units()
        step = max(1, _AT_ONCE // self.weight.shape[1])
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            blocks = gradient[part].reshape(-1, self.shape[2], self.size)
            for k, unit in enumerate(units):
                if unit is None:
                    np.einsum("rbs->rb", blocks, out=found[k, part])
                else:
                    factors = self.values(unit, rows[part]).reshape(blocks.shape)
                    np.einsum("rbs,rbs->rb", blocks, factors, out=found[k, part])
        old = self._stored[:, rows]
        if self._middle is None:
            found *= old
        else:
            found[0] -= np.float32(self._middle) * found[1]
            found *= old[0]
        return found

    def values(self, weight: Weight, rows: Array) -> Array:
        """The rows int32 [n] of a matrix of `weight_of`, or of this one: float32 [n, I]."""
        found: Array = np.empty((len(rows), weight.shape[1]), np.float32)
        _core.embedding_forward(rows, weight.handle, found)
        return found

    def _units(self) -> list[Weight | None]:
        """Matrices whose values are a, and b if there are offsets; None where all are 1."""
        units: list[Weight | None] = []
        for k in range(self.shape[0]):
            one = np.zeros(self.shape, np.float32)
            one[k] = 1
            units.append(None if k and self._middle is not None else self._with(one))
        return units

    def _with(self, values: Array) -> Weight:
        """The matrix with these floats [1 or 2, O, blocks]."""
        weight, groups = self.weight, self.weight.groups
        stored = np.empty_like(values)
        stored[:, self._order] = values
        if groups is not None:
            kind = groups.scale_format
            scales, offsets = (raw(_held(part, kind), kind) for part in stored)
            changed = Groups(self.size, scales, kind, offsets)
            return Weight(weight.raw, weight.format, weight.shape, weight.head_dim, changed)
        blocks = weight.raw.reshape(*self.shape[1:], -1).copy()
        for k, place in enumerate(self._places):
            half = encode(_held(stored[k], "f16"), "f16")
            blocks[..., place : place + 2] = half.reshape(*self.shape[1:], 2)
        return Weight(blocks.reshape(-1), weight.format, weight.shape, weight.head_dim)


def _held(values: Array, format: str) -> Array:
    """Values within the range of a float format."""
    return np.clip(values, -65504, 65504) if format == "f16" else values
