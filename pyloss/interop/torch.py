"""The losses for PyTorch: differentiable, on CPU tensors, without a copy of the logits.

    from pyloss.interop.torch import softmax_cross_entropy

    loss = softmax_cross_entropy(logits, labels, reduction="mean")
    loss.backward()

Names and arguments are pyloss's, without `out` and `return_*`: the result is one tensor. Classes
are the last axis. In `torch.nn.functional`:

    cross_entropy(logits, labels)           softmax_cross_entropy(logits, labels, reduction="mean")
    kl_div(log_softmax(q), softmax(p))      kl_div_loss(q, p): of logits, summed over the classes
    binary_cross_entropy_with_logits(x, y)  the same with reduction="mean"

With a reduction, the forward pass computes loss and gradient in one pass over memory. Without one,
the backward pass computes the gradient, when the gradients of the rows' losses are known. Second
derivatives are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyloss import losses
from pyloss.autograd.differentiation import leaf_gradient, value_and_grad
from pyloss.autograd.tape import Node, Tape, data
from pyloss.autograd.tensor import Tensor

_DIFFERENTIABLE = (
    "logits",
    "targets",
    "x",
    "logits_q",
    "logits_p",
    "hidden",
    "weight",
    "bias",
    "hidden_q",
    "weight_q",
    "hidden_p",
    "weight_p",
)


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory as an ndarray."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        what = (
            f"on {tensor.device}" if tensor.device.type != "cpu" else f"of layout {tensor.layout}"
        )
        raise TypeError(
            f"{name} must be a dense tensor on the CPU, not one {what}; "
            "move it there with .cpu() or .to_dense()"
        )
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> torch.Tensor:
    """The array's own memory as a tensor."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Recorded:
    """A call on the tape that waits for the upstream gradient."""

    def __init__(self, call: Callable, arrays: list[np.ndarray], wanted: tuple[int, ...]):
        self.tape = Tape()
        self.leaves = [(Node(self.tape.root), arrays[i]) for i in wanted]
        traced: list[Any] = list(arrays)
        for i, (node, array) in zip(wanted, self.leaves, strict=True):
            traced[i] = Tensor(array, node)
        with self.tape:
            self.result = call(*traced)

    def gradients(self, upstream: np.ndarray) -> list[np.ndarray]:
        self.tape.backward(self.result, upstream)
        return [leaf_gradient(node, array) for node, array in self.leaves]


class _Loss(torch.autograd.Function):  # type: ignore[misc]
    """A loss of differentiable tensors. `call` takes their arrays and holds all other arguments."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable, names: tuple[str, ...], known: bool, *tensors: torch.Tensor
    ) -> torch.Tensor:
        arrays = [_array(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        ctx.call, ctx.names, ctx.known = call, names, known
        ctx.wanted = tuple(i for i in range(len(tensors)) if ctx.needs_input_grad[3 + i])
        if not ctx.wanted:
            return _tensor(call(*arrays))
        if known:
            value, gradients = value_and_grad(call, ctx.wanted)(*arrays)
            ctx.save_for_backward(*map(_tensor, gradients))
            return _tensor(value)
        ctx.save_for_backward(*tensors)  # torch notices when they are changed
        ctx.recorded = _Recorded(call, arrays, ctx.wanted)
        return _tensor(data(ctx.recorded.result))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # once_differentiable would treat these gradients as constants if `upstream` needs none.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the losses of pyloss have no second derivative: "
                "call backward without create_graph=True"
            )
        saved = ctx.saved_tensors
        if ctx.known:
            gradients = saved if upstream.item() == 1 else [g * upstream.to(g.dtype) for g in saved]
        else:
            recorded, ctx.recorded = ctx.recorded, None
            if recorded is None:  # a second backward pass through the graph
                arrays = [
                    _array(name, tensor) for name, tensor in zip(ctx.names, saved, strict=True)
                ]
                recorded = _Recorded(ctx.call, arrays, ctx.wanted)
            gradients = map(
                _tensor, recorded.gradients(np.ascontiguousarray(_array("upstream", upstream)))
            )
        found: list[torch.Tensor | None] = [None] * (3 + len(ctx.names))
        for i, gradient in zip(ctx.wanted, gradients, strict=True):
            found[3 + i] = gradient
        return tuple(found)


def _for_torch(loss: Callable) -> Callable:
    signature = inspect.signature(loss)
    signature = signature.replace(
        parameters=[
            p
            for p in signature.parameters.values()
            if p.name != "out" and not p.name.startswith("return_")
        ]
    )

    @functools.wraps(loss)
    def function(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        names = tuple(name for name in tensors if name in _DIFFERENTIABLE)
        plain = {
            name: tensors.get(name, value) for name, value in given.items() if name not in names
        }
        for name, value in plain.items():
            if isinstance(value, torch.Tensor):
                if value.requires_grad and torch.is_grad_enabled():
                    raise TypeError(f"{name} gets no gradient; pass {name}.detach()")
                plain[name] = _array(name, value)

        def call(*arrays: Any) -> Any:
            return loss(**plain, **dict(zip(names, arrays, strict=True)))

        known = given.get("reduction", "none") in ("sum", "mean")
        return _Loss.apply(call, names, known, *(tensors[name] for name in names))

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


softmax_cross_entropy = _for_torch(losses.softmax_cross_entropy)
focal_loss = _for_torch(losses.focal_loss)
stablemax = _for_torch(losses.stablemax)
log_stablemax = _for_torch(losses.log_stablemax)
stablemax_cross_entropy = _for_torch(losses.stablemax_cross_entropy)
kl_div_loss = _for_torch(losses.kl_div_loss)
js_div_loss = _for_torch(losses.js_div_loss)
skew_kl_div_loss = _for_torch(losses.skew_kl_div_loss)
tvd_loss = _for_torch(losses.tvd_loss)
cosine_loss = _for_torch(losses.cosine_loss)
sparse_distillation_loss = _for_torch(losses.sparse_distillation_loss)
binary_cross_entropy_with_logits = _for_torch(losses.binary_cross_entropy_with_logits)
linear_cross_entropy = _for_torch(losses.linear_cross_entropy)
linear_kl_div = _for_torch(losses.linear_kl_div)
linear_js_div = _for_torch(losses.linear_js_div)
linear_skew_kl_div = _for_torch(losses.linear_skew_kl_div)
linear_tvd = _for_torch(losses.linear_tvd)
linear_cosine = _for_torch(losses.linear_cosine)
linear_sparse_distillation = _for_torch(losses.linear_sparse_distillation)

__all__ = [
    "softmax_cross_entropy",
    "focal_loss",
    "stablemax",
    "log_stablemax",
    "stablemax_cross_entropy",
    "kl_div_loss",
    "js_div_loss",
    "skew_kl_div_loss",
    "tvd_loss",
    "cosine_loss",
    "sparse_distillation_loss",
    "binary_cross_entropy_with_logits",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_js_div",
    "linear_skew_kl_div",
    "linear_tvd",
    "linear_cosine",
    "linear_sparse_distillation",
]
