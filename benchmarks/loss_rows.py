"""The row losses of one library: LIBRARY ROWS V DTYPE SECONDS; prints milliseconds as JSON, forward and loss with gradient.

LIBRARY is pyloss, torch, compile (torch.compile), mlx (mlx-lm's tuner on the CPU), or trip: what it takes to read the logits
once, and to read them and write one gradient, with the fastest plain operation of torch or of pyloss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from common import THREADS, best_of

LOSSES = ("cross entropy", "KL", "JS", "stablemax cross entropy")
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
Work = Iterator[tuple[str, Callable[[], object]]]  # name of the work, function


def logits(rows: int, v: int, dtype: str, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The student's and the teacher's logits, and labels."""
    rng = np.random.default_rng(0)
    q, p = (scale * rng.standard_normal((rows, v), dtype=np.float32) for _ in range(2))
    return q.astype(DTYPES[dtype]), p.astype(DTYPES[dtype]), rng.integers(0, v, rows)


def tensor(array: np.ndarray) -> Any:
    """The array as a tensor over the same memory."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_losses(p: Any, labels: Any) -> dict[str, Callable]:
    """The losses of a tensor of logits, as people write them."""
    import torch
    import torch.nn.functional as F

    def kl(q: Any) -> Any:
        return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="none").sum(-1)

    def js(q: Any) -> Any:
        log_q, log_p = F.log_softmax(q, -1), F.log_softmax(p, -1)
        log_m = torch.logaddexp(log_q, log_p) - 0.6931471805599453
        return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))

    def stablemax(x: Any) -> Any:
        s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        return -torch.gather(torch.log(s / s.sum(-1, keepdim=True)), -1, labels[:, None]).squeeze(-1)

    return dict(zip(LOSSES, (lambda x: F.cross_entropy(x, labels, reduction="none"), kl, js, stablemax), strict=True))


def pyloss_losses(p: Any, labels: Any) -> dict[str, Callable]:
    import pyloss

    functions = (
        lambda x: pyloss.softmax_cross_entropy(x, labels),
        lambda q: pyloss.kl_div_loss(q, p),
        lambda q: pyloss.js_div_loss(q, p),
        lambda x: pyloss.stablemax_cross_entropy(x, labels),
    )
    return dict(zip(LOSSES, functions, strict=True))


def mlx_losses(p: Any, labels: Any) -> dict[str, Callable]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.losses import js_div_loss, kl_div_loss

    def stablemax(x: Any) -> Any:
        s = mx.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        return -mx.take_along_axis(mx.log(s / s.sum(-1, keepdims=True)), labels[:, None], -1).squeeze(-1)

    functions = (
        lambda x: nn.losses.cross_entropy(x, labels),
        lambda q: kl_div_loss(q, p),
        lambda q: js_div_loss(q, p),
        stablemax,
    )
    return dict(zip(LOSSES, functions, strict=True))


def of_pyloss(q: np.ndarray, p: np.ndarray, labels: np.ndarray) -> Work:
    import pyloss

    pyloss.set_num_threads(THREADS)
    for name, loss in pyloss_losses(p, labels).items():
        both = pyloss.value_and_grad(lambda x, loss=loss: loss(x).sum())
        yield f"{name} forward", lambda: loss(q)
        yield f"{name} both", lambda: both(q)


def of_torch(q: np.ndarray, p: np.ndarray, labels: np.ndarray, compiled: bool) -> Work:
    import torch

    torch.set_num_threads(THREADS)
    x = tensor(q).clone().requires_grad_()
    for name, loss in torch_losses(tensor(p), torch.from_numpy(labels)).items():
        if compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)

        def forward() -> None:
            with torch.no_grad():
                loss(x)

        def both() -> None:
            x.grad = None
            loss(x).sum().backward()

        yield f"{name} forward", forward
        yield f"{name} both", both


def of_mlx(q: np.ndarray, p: np.ndarray, labels: np.ndarray) -> Work:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    a, b = (mx.array(x.astype(np.float32)).astype(mx.bfloat16 if x.itemsize == 2 else mx.float32) for x in (q, p))
    for name, loss in mlx_losses(b, mx.array(labels)).items():
        both = mx.value_and_grad(lambda x, loss=loss: loss(x).sum())
        yield f"{name} forward", lambda: mx.eval(loss(a))
        yield f"{name} both", lambda: mx.eval(*both(a))


def of_memory(q: np.ndarray) -> Work:
    """Trips over as many bytes as the logits have, as float32 whatever their type is; the fastest way that was found counts."""
    import torch

    import pyloss
    from pyloss import _core

    pyloss.set_num_threads(THREADS)
    arrays = [np.ones(q.nbytes // 4, np.float32) for _ in range(3)]
    x, y, z = arrays
    total = np.zeros(1)
    yield "read 1", lambda: _core.sum_squares(x, total)
    yield "read 2", lambda: (_core.sum_squares(x, total), _core.sum_squares(y, total))
    yield "read 1, write 1", lambda: _core.scale(1.0, x, z)
    yield "read 2, write 1", lambda: _core.add(x, y, z)
    torch.set_num_threads(THREADS)
    a, b, out = map(torch.from_numpy, arrays)
    yield "read 1", lambda: torch.sum(a)
    yield "read 1", lambda: torch.amax(a)
    yield "read 1", lambda: torch.dot(a, a)
    yield "read 2", lambda: torch.dot(a, b)
    yield "read 2", lambda: (torch.sum(a), torch.sum(b))
    yield "read 1, write 1", lambda: out.copy_(a)
    yield "read 1, write 1", lambda: torch.add(a, 1, out=out)
    yield "read 2, write 1", lambda: torch.add(a, b, out=out)


def best_ms(function: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit into the time: a few of slow functions, hundreds of fast ones."""
    once = best_of(1, function)[0]
    return min(once, best_of(int(seconds / once), function)[0] if once < seconds else once) * 1e3


def main(library: str, rows: int, v: int, dtype: str, seconds: float) -> None:
    q, p, labels = logits(rows, v, dtype)
    work = {
        "pyloss": lambda: of_pyloss(q, p, labels),
        "torch": lambda: of_torch(q, p, labels, False),
        "compile": lambda: of_torch(q, p, labels, True),
        "mlx": lambda: of_mlx(q, p, labels),
        "trip": lambda: of_memory(q),
    }[library]()
    times: dict[str, float] = {}
    for name, function in work:
        times[name] = min(best_ms(function, seconds), times.get(name, float("inf")))
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
