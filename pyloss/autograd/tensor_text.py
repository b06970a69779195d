"""How a Tensor is shown: shape, type, place and some of its values."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss.runtime.device import DeviceArray

if TYPE_CHECKING:
    from pyloss.autograd.tensor import Tensor

_EDGE = 3  # values shown at each end of an axis
_MOST = 32  # arrays with more values are shortened


def _ends(data: Any) -> np.ndarray:
    """What is shown of an array, on the host: a large one on a device is not copied whole."""
    if not isinstance(data, DeviceArray) or data.size <= _MOST:
        return np.asarray(data)
    rows = len(data)
    # One more than is shown, so that NumPy writes "...".
    first, last = (rows, rows) if rows <= 2 * _EDGE + 1 else (_EDGE + 1, rows - _EDGE)
    if data.ndim == 1:
        return np.concatenate([data[:first].numpy(), data[last:].numpy()])
    return np.stack([_ends(data[row]) for row in (*range(first), *range(last, rows))])


def _values(data: Any) -> str:
    ends = _ends(data)
    threshold = _MOST if data.size <= _MOST else 0
    return np.array2string(
        ends, precision=4, threshold=threshold, edgeitems=_EDGE, separator=", ", max_line_width=88
    )


def _facts(t: Tensor) -> list[str]:
    data = t.data
    place = str(data.device.id) if isinstance(data, DeviceArray) else "host"
    shape = f"[{', '.join(map(str, t.shape))}]"
    return [shape, str(t.dtype), place]


def _name(t: Tensor) -> str:
    return "Parameter" if type(t).__name__ == "Parameter" else "Tensor"


def tensor_text(t: Tensor) -> str:
    """`repr` of a Tensor."""
    head = f"{_name(t)}({', '.join(_facts(t))}"
    values = _values(t.data)
    if "\n" in values:
        return f"{head},\n  {values.replace(chr(10), chr(10) + '  ')})"
    return f"{head}: {values})"


def tensor_html(t: Tensor) -> str:
    """As `tensor_text`."""
    facts = escape(f"{_name(t)} {' '.join(_facts(t))}")
    return f"<div><b>{facts}</b></div><pre>{escape(_values(t.data))}</pre>"
