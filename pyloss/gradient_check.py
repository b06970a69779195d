"""A check of gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pyloss import nn
from pyloss.autograd.differentiation import gradient_of, leaf_of
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import Tape
from pyloss.autograd.tensor import Tensor, stripped
from pyloss.autograd.trees import tree_leaves, tree_map, tree_map_with_path
from pyloss.checks.numbers import real


class GradientReport(NamedTuple):
    """How a function's gradients agree with differences, at the entry that agrees least.

    Attributes:
        ok: whether all entries agree.
        error: |gradient - difference| / (1 + |difference|) there.
        name: of the argument ("argument 0") or the model's parameter.
        entry: its index.
        gradient: that was computed.
        difference: the central difference.
        entries: how many entries were compared.
    """

    ok: bool
    error: float
    name: str
    entry: tuple[int, ...]
    gradient: float
    difference: float
    entries: int

    def __repr__(self) -> str:
        return (
            f"{self.entries} entries {'agree' if self.ok else 'do not agree'}; worst: {self.name} "
            f"at {self.entry}, gradient {self.gradient:.8g}, difference {self.difference:.8g} "
            f"(error {self.error:.1e})"
        )


def gradcheck(
    function: Callable,
    *args: Any,
    model: nn.Module | None = None,
    step: float = 1e-6,
    tolerance: float = 1e-5,
    raise_error: bool = True,
) -> GradientReport:
    """Compares gradients with central differences, both in float64.

    The function is computed twice for each entry of the arguments: use small arrays. It must give
    the same result each time, without dropout. Results with several elements are weighted by fixed
    random numbers and added up.

    Args:
        function: returns an array or Tensor of any shape.
        args: float arrays, also in dicts, lists and tuples, are converted to float64 and checked;
            others are passed as they are.
        model: its trainable parameters are checked too, as float64 arrays.
        step: of the differences.
        tolerance: of the report's `error`.
        raise_error: AssertionError, with the report, where entries do not agree.

    Raises:
        TypeError: there is no entry to check.
    """
    step, tolerance = real(step, "step", above=0), real(tolerance, "tolerance", above=0)
    checked: dict[str, np.ndarray] = {}

    def wide_copy(path: tuple[Any, ...], x: Any) -> Any:
        if not _is_float(x, len(path) > 1):
            return x
        name = f"argument {path[0]}{''.join(f'[{key!r}]' for key in path[1:])}"
        checked[name] = np.array(x, np.float64)
        return checked[name]

    given = []
    for i, x in enumerate(args):
        holds_arrays = any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(x))
        given.append(tree_map_with_path(wide_copy, x, (i,)) if holds_arrays else wide_copy((i,), x))
    arguments = list(checked)
    wide: dict[int, np.ndarray] = {}
    if model is not None:
        for name, array in model.trainable_parameters().items():
            wide[id(array)] = checked[name] = np.array(array, np.float64)
    if not any(array.size for array in checked.values()):
        without = "there is no model" if model is None else "the model has no trainable parameters"
        raise TypeError(
            f"nothing to check: no argument is a float array with elements, and {without}"
        )
    with nn.shown(model.trained_attributes() if model is not None else [], wide):
        return _compared(function, given, arguments, checked, step, tolerance, raise_error)


def _is_float(x: Any, in_container: bool) -> bool:
    """Whether an argument is checked. Numbers in containers are options."""
    if in_container and not isinstance(x, np.ndarray):
        return False
    return not isinstance(x, str | bytes | dict) and np.asarray(x).dtype.kind == "f"


def _compared(
    function: Callable,
    given: list[Any],
    arguments: list[str],
    checked: dict[str, np.ndarray],
    step: float,
    tolerance: float,
    raise_error: bool,
) -> GradientReport:
    draws = np.random.default_rng(0)
    upstream: list[np.ndarray] = []

    def weighted(args: list[Any]) -> Any:
        result = function(*args)
        if not upstream:
            upstream.append(draws.uniform(0.5, 1.5, np.shape(stripped(result))))
        return np.sum(result * upstream[0] if upstream[0].ndim else result)

    tape = Tape()
    leaves = {name: leaf_of(checked[name], tape.root) for name in arguments}
    by_array = {id(checked[name]): leaf for name, leaf in leaves.items()}
    with tape:
        watched = {name: tape.watch(x) for name, x in checked.items() if name not in leaves}
        value = weighted(tree_map(lambda x: by_array.get(id(x), x), given))
        if isinstance(value, Tensor):
            tape.backward(value, np.ones((), np.float64))
    worst, count = GradientReport(True, -1.0, "", (), 0.0, 0.0, 0), 0
    for name, array in checked.items():
        if name in leaves:
            gradient = gradient_of(leaves[name])
        else:
            leaf = watched[name]
            gradient = np.zeros_like(array) if leaf.grad is None else leaf.grad
        for index in np.ndindex(array.shape):
            before = array[index]
            values = []
            for moved in (before + step, before - step):
                array[index] = moved
                with no_grad():
                    values.append(float(np.asarray(tree_map(stripped, weighted(given)))))
            array[index] = before
            difference = (values[0] - values[1]) / (2 * step)
            error = abs(float(gradient[index]) - difference) / (1 + abs(difference))
            count += 1
            if not error <= worst.error:
                worst = GradientReport(
                    error <= tolerance, error, name, index, float(gradient[index]), difference, 0
                )
    report = worst._replace(entries=count)
    if not report.ok and raise_error:
        raise AssertionError(repr(report))
    return report
