"""Muon: momentum whose singular values are brought near 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyloss import _core
from pyloss.checks.numbers import real, shown, whole
from pyloss.optim.clipping import grad_norm
from pyloss.optim.optimizer import Optimizer
from pyloss.optim.schedules import Schedule
from pyloss.optim.state import empty_like

ADJUSTMENTS = ("original", "match_rms_adamw")


def orthogonalized(
    matrix: Any, coefficients: Sequence[float], steps: int, eps: float = 1e-7
) -> Any:
    """A matrix with the singular vectors of `matrix` and singular values near 1, in float32.

    `steps` Newton-Schulz iterations with X of Frobenius norm 1 at first, for at most as many rows
    as columns, otherwise with X X^T and the factors exchanged:

        A = X X^T
        X = a X + (b A + c A A) X
    """
    a, b, c = coefficients
    rows, columns = matrix.shape
    wide = rows <= columns
    side = min(rows, columns)
    x, y = empty_like(matrix), empty_like(matrix)
    gram, factor = (empty_like(matrix, (side, side)) for _ in range(2))
    _core.scale(1 / max(grad_norm({"": matrix}), eps), matrix, x)
    for _ in range(steps):
        if wide:
            _core.matmul_nt(x, x, 1.0, 0, gram)
        else:
            _core.matmul_tn(x, x, 1.0, 0, gram)
        _core.scale(b, gram, factor)
        _core.matmul_nn(gram, gram, c, 1, factor)
        _core.scale(a, x, y)
        left, right = (factor, x) if wide else (x, factor)
        _core.matmul_nn(left, right, 1.0, 1, y)
        x, y = y, x
    return x


class Muon(Optimizer):
    """Muon for the matrices of hidden layers, as torch computes it, but in float32.

        m = momentum m + (1 - momentum) g
        u = momentum m + (1 - momentum) g with `nesterov`, else m
        p -= lr wd p
        p -= lr ratio orthogonalized(u)

    `orthogonalized` brings the singular values near 1 by `ns_steps` Newton-Schulz iterations
    (Jordan et al., 2024). For a matrix of A rows and B columns, `adjust_lr_fn` "original" makes
    `ratio` sqrt(max(1, A / B)); "match_rms_adamw" makes it 0.2 sqrt(max(A, B)), so that rates and
    decay of AdamW suit (Liu et al., arXiv:2502.16982). torch iterates in bfloat16.

    Other parameters than matrices are refused; embeddings and heads should not be given either.
    `groups` and `MultiOptimizer` give them another optimizer.
    """

    slots = ("m",)

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate)
        self.weight_decay = real(weight_decay, "weight_decay", 0)
        self.momentum = real(momentum, "momentum", 0, 1)
        self.nesterov = bool(nesterov)
        if not isinstance(ns_coefficients, Sequence) or len(ns_coefficients) != 3:
            raise ValueError(
                f"ns_coefficients is {shown(ns_coefficients)}; it must be three numbers"
            )
        self.ns_coefficients = tuple(
            real(value, f"ns_coefficients[{i}]") for i, value in enumerate(ns_coefficients)
        )
        self.eps = real(eps, "eps", above=0)
        self.ns_steps = whole(ns_steps, "ns_steps", 1, 99)
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(
                f"adjust_lr_fn is {shown(adjust_lr_fn)}; allowed: {', '.join(ADJUSTMENTS)}"
            )
        self.adjust_lr_fn = adjust_lr_fn
        self.groups = groups

    def _check(self, name: str, parameter: Any) -> None:
        super()._check(name, parameter)
        if parameter.ndim != 2:
            raise ValueError(
                f"Muon updates matrices, and {name!r} has shape {parameter.shape}; "
                'give it another optimizer: groups=[{"match": "'
                + name
                + '", "optimizer": "adamw"}] '
                "in settings, or MultiOptimizer"
            )

    def _apply(
        self,
        grads: list[Any],
        parameters: list[Any],
        slots: list[list[Any]],
        rate: float,
        scale: float,
        first: bool,
    ) -> None:
        (means,) = slots
        rest = 1 - self.momentum
        # SGD's updates: m -= rest (m - scale g), then u = rest (scale g) + momentum m.
        _core.sgd(grads, rest, 0.0, 0.0, 1.0, 0, -scale, means, None)
        for grad, parameter, mean in zip(grads, parameters, means, strict=True):
            mean = mean.reshape(parameter.shape)
            update = mean
            if self.nesterov:
                update = empty_like(parameter)
                _core.scale(self.momentum, mean, update)
                _core.axpy(rest * scale, grad, update)
            update = orthogonalized(update, self.ns_coefficients, self.ns_steps, self.eps)
            rows, columns = parameter.shape
            if self.adjust_lr_fn == "original":
                ratio = math.sqrt(max(1.0, rows / columns))
            else:
                ratio = 0.2 * math.sqrt(max(rows, columns))
            _core.sgd(update, rate, 0.0, 0.0, self.weight_decay, 0, ratio, parameter, None)
