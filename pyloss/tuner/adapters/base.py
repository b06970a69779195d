"""The base that an adapter was made for: `Base` is kept in the metadata of the adapter's file.

Nothing else of an adapter tells one base from another of the same shapes. Of some matrices of the
base a few numbers are kept, so that other stored formats of the same weights are recognized.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pyloss.checks.numbers import real, shown, whole
from pyloss.errors import FormatError, counted, listed
from pyloss.io.files import PathLike
from pyloss.models.transformer import Model
from pyloss.nn import Linear, SwitchLinear
from pyloss.runtime.device import to_device
from pyloss.tuner.adapters.adapter import Adapter
from pyloss.tuner.adapters.selection import inner_name
from pyloss.weights.formats import FLOATS
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: The key in the metadata of an adapter's file.
BASE_KEY = "base"
# So many matrices of decoder layers are compared, and so many numbers of each.
_MATRICES, _NUMBERS = 16, 8
# Relative distances: of weights that have nothing in common it is about 1.4.
_UNRELATED = 0.8
# Of the same weights in floats, and in codes of so many bits, with GPTQ's and LoftQ's changes.
_FLOATS, _CODES = 0.004, {2: 0.6, 3: 0.4, 4: 0.3, 5: 0.12, 6: 0.06, 8: 0.04}


@dataclass(frozen=True)
class Base:
    """What is known of a base.

    Attributes:
        name: of its files, as `Model.name`.
        model_type: of its configuration.
        num_hidden_layers: its layers.
        hidden_size: of its configuration.
        format: the stored format of its linear layers with the fewest bits.
        weights: some numbers of some linear layers, by the layers' names.
    """

    name: str | None
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    format: str
    weights: dict[str, list[float]]

    def __str__(self) -> str:
        layers = counted(self.num_hidden_layers, "layer")
        sizes = f"{self.model_type}, {layers} of {self.hidden_size}"
        return f"a model ({sizes})" if self.name is None else f"{self.name} ({sizes})"

    def metadata(self) -> dict[str, str]:
        """The entry of an adapter's file."""
        return {BASE_KEY: json.dumps(asdict(self), sort_keys=True)}

    def difference(self, other: Base) -> str | None:
        """What differs from the base `other`, as the end of a sentence; None: nothing is known to.

        Formats do not count, nor the differences that they make.
        """
        sizes = ("num_hidden_layers", "hidden_size")
        if any(getattr(self, name) != getattr(other, name) for name in sizes):
            return "their sizes differ"
        distance = _distance(self.weights, other.weights)
        if distance is None:
            return None
        if distance > _UNRELATED:
            return "their shapes agree, and their weights have nothing in common"
        if distance > _tolerance(self.format, other.format):
            return "their weights are related, but differ: tuned further, merged or quantized anew"
        return None


def base_of(model: Any) -> Base | None:
    """The base under a model's adapters; of weights trained in full, what they were before.

    None for a model of a user's own.
    """
    kept = getattr(model, "trained_from", None)
    if isinstance(kept, Base):
        return kept
    if not isinstance(model, Model):
        return None
    layers = dict(_linear_layers(model))
    names = list(layers)
    count = min(_MATRICES, len(names))
    chosen = [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)]
    matrices = {name: _first(layers[name].weight) for name in chosen}
    return Base(
        model.name,
        model.config.model_type,
        len(model.layers),
        model.config.hidden_size,
        min((_format(matrix) for matrix in matrices.values()), key=_bits, default="f32"),
        {name: _numbers(matrix) for name, matrix in matrices.items()},
    )


def read_base(path: PathLike, metadata: Mapping[str, str]) -> Base | None:
    """The base in the metadata of the adapter's file `path`; None: the file does not say it.

    Raises FormatError for an entry that is no base.
    """
    if BASE_KEY not in metadata:
        return None
    try:
        told = json.loads(metadata[BASE_KEY])
    except (ValueError, RecursionError) as error:
        raise FormatError(path, BASE_KEY, f"is not JSON: {error}") from None
    return base_from(path, told)


def base_from(path: PathLike, told: Any) -> Base:
    """The base of these fields, which the file `path` has. Raises FormatError."""
    names = [field.name for field in fields(Base)]
    try:
        if not isinstance(told, dict) or set(told) != set(names):
            raise TypeError(f"expected an object of {', '.join(names)}, got {shown(told)}")
        for name in ("num_hidden_layers", "hidden_size"):
            whole(told[name], name, 0)
        for name in ("name", "model_type", "format"):
            if not isinstance(told[name], str) and (name != "name" or told[name] is not None):
                raise TypeError(f"{name} must be text, got {shown(told[name])}")
        weights = told["weights"]
        if not isinstance(weights, dict) or not all(type(w) is list for w in weights.values()):
            raise TypeError(f"weights must be lists of numbers by name, got {shown(weights)}")
        for name, numbers in weights.items():
            for number in numbers:
                real(number, name)
    except (TypeError, ValueError) as error:
        raise FormatError(path, BASE_KEY, f"is not the base of an adapter: {error}") from None
    return Base(**told)


def warn_of_other_base(model: Any, base: Base | None, path: PathLike) -> None:
    """Warns if `model` is not the `base` that the adapter at `path` was made for.

    mlx-lm and PEFT load every adapter whose shapes fit, so this is no error.
    """
    own = None if base is None else base_of(model)
    if base is None or own is None or (reason := base.difference(own)) is None:
        return
    warnings.warn(
        f"the adapter in {path} was made for {base}, and this model is {own}: {reason}",
        stacklevel=4,
    )


def not_for(model: Any, base: Base | None, path: PathLike, problems: list[str]) -> str:
    """The error for an adapter that does not fit the shapes of `model`."""
    own = None if base is None else base_of(model)
    if base is None or own is None or base.difference(own) is None:
        return f"the adapter in {path} is not one for this model:{listed(problems)}"
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return (
        f"the adapter in {path} was made for {base}, and this model is {own}, which it does not "
        f"fit: {problems[0]}{more}"
    )


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of decoder layers by name, without their adapters."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or not inner_name(name)[0]:
            continue
        if isinstance(module, Adapter):
            module = module.base
            inside.add(id(module))
        if isinstance(module, Linear | SwitchLinear):
            yield name, module


def _first(weight: Any) -> Any:
    """The matrix itself, or the first of a stack."""
    if isinstance(weight, WeightStack):
        return weight.matrices[0]
    return weight if len(weight.shape) == 2 else weight[0]


def _numbers(matrix: Any) -> list[float]:
    """Some numbers of a row in the middle."""
    rows, columns = matrix.shape
    row, picked = rows // 2, np.linspace(0, columns - 1, _NUMBERS).astype(int)
    if isinstance(matrix, Weight):
        step = matrix.head_dim or 1
        begin = row // step * step
        values = matrix.slice_rows(begin, begin + step).dequantize()[row - begin]
    else:
        values = np.asarray(to_device(matrix[row : row + 1], "cpu"), np.float32)[0]
    return [float(f"{value:.5g}") for value in values[picked]]


def _format(matrix: Any) -> str:
    return matrix.format if isinstance(matrix, Weight) else "f32"


def _bits(format: str) -> int:
    """The bits of a code, which a format's name has; of floats 16."""
    digit = re.search("[2-8]", format)
    return int(digit[0]) if digit is not None and format not in FLOATS else 16


def _tolerance(one: str, other: str) -> float:
    """The distance that two formats explain; the same type of floats explains next to none."""
    bits = min(_bits(one), _bits(other))
    if bits == 16:
        return _FLOATS / 4 if one == other else _FLOATS
    return max(allowed for codes, allowed in _CODES.items() if codes >= bits)


def _distance(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float | None:
    """The root mean square of the relative distances of matrices; None if none can be compared."""
    squares = []
    for name in sorted(set(one) & set(other)):
        a, b = np.array(one[name]), np.array(other[name])
        size = max(a @ a, b @ b) if a.shape == b.shape else 0.0
        if size > 0:
            squares.append(float((a - b) @ (a - b) / size))
    return math.sqrt(sum(squares) / len(squares)) if squares else None
