"""The row losses of one library: LIBRARY ROWS V DTYPE SECONDS.

Prints milliseconds as JSON: forward, and loss with gradient. LIBRARY is one of

    pyloss, opencl:<number>         the C kernels, or pyloss on that device
    torch, compile, mlx             torch, torch.compile, mlx-lm's tuner on the CPU
    cuda, cuda-compile, cuda-liger  torch, torch.compile and Liger's kernels on the first CUDA card
    memory, memory-opencl:<number>  reading the logits, and reading them and writing one gradient,
                                    by the fastest plain operation of torch or pyloss
    memory-cuda                     torch's copy on the card

Calls cycle through more arrays than caches hold, so logits come from memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np
from common import THREADS, best_of

LOSSES = ("cross entropy", "KL", "JS", "stablemax cross entropy")
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
COLD = 600 << 20  # bytes; more than caches hold
DRAWN = 512  # rows of logits that are drawn; others repeat them
Work = Iterator[tuple[str, Callable[[], object]]]  # (name, function)
Inputs = list[tuple[Any, Any, Any]]  # student, teacher, labels


def logits(
    rows: int, v: int, dtype: str, scale: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The student's and the teacher's logits, and labels."""
    rng = np.random.default_rng(seed)
    q, p = (
        (scale * rng.standard_normal((min(rows, DRAWN), v), dtype=np.float32)).astype(DTYPES[dtype])
        for _ in range(2)
    )
    return np.resize(q, (rows, v)), np.resize(p, (rows, v)), rng.integers(0, v, rows)


def tensor(array: np.ndarray) -> Any:
    """The array as a tensor over the same memory."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_losses() -> dict[str, Callable]:
    """The losses of tensors q, p and labels, as users write them."""
    import torch
    import torch.nn.functional as F

    def cross_entropy(x: Any, p: Any, labels: Any) -> Any:
        return F.cross_entropy(x, labels, reduction="none")

    def kl(q: Any, p: Any, labels: Any) -> Any:
        return F.kl_div(
            F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="none"
        ).sum(-1)

    def js(q: Any, p: Any, labels: Any) -> Any:
        log_q, log_p = F.log_softmax(q, -1), F.log_softmax(p, -1)
        log_m = torch.logaddexp(log_q, log_p) - 0.6931471805599453
        return 0.5 * (
            (log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)
        )

    def stablemax(x: Any, p: Any, labels: Any) -> Any:
        s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        return -torch.gather(torch.log(s / s.sum(-1, keepdim=True)), -1, labels[:, None]).squeeze(
            -1
        )

    return dict(zip(LOSSES, (cross_entropy, kl, js, stablemax), strict=True))


def liger_losses() -> dict[str, Callable]:
    """Liger's kernels, over torch's log-softmax where they take log-probabilities.

    Its cross entropy writes the gradient over the logits.
    """
    import torch
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD, LigerKLDIVLoss

    entropy = LigerCrossEntropyLoss(reduction="sum")
    divergence, jensen = LigerKLDIVLoss("sum", log_target=True), LigerJSD()

    def logs(q: Any, p: Any) -> tuple[Any, Any]:
        return torch.log_softmax(q, -1), torch.log_softmax(p, -1)

    functions = (
        lambda x, p, labels: entropy(x, labels),
        lambda q, p, labels: divergence(*logs(q, p)),
        lambda q, p, labels: jensen(*logs(q, p)),
    )
    return dict(zip(LOSSES, functions, strict=False))


def pyloss_losses() -> dict[str, Callable]:
    import pyloss

    functions = (
        lambda x, p, labels: pyloss.softmax_cross_entropy(x, labels),
        lambda q, p, labels: pyloss.kl_div_loss(q, p),
        lambda q, p, labels: pyloss.js_div_loss(q, p),
        lambda x, p, labels: pyloss.stablemax_cross_entropy(x, labels),
    )
    return dict(zip(LOSSES, functions, strict=True))


def mlx_losses() -> dict[str, Callable]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.losses import js_div_loss, kl_div_loss

    def stablemax(x: Any, p: Any, labels: Any) -> Any:
        s = mx.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        return -mx.take_along_axis(
            mx.log(s / s.sum(-1, keepdims=True)), labels[:, None], -1
        ).squeeze(-1)

    functions = (
        lambda x, p, labels: nn.losses.cross_entropy(x, labels),
        lambda q, p, labels: kl_div_loss(q, p),
        lambda q, p, labels: js_div_loss(q, p),
        stablemax,
    )
    return dict(zip(LOSSES, functions, strict=True))


def of_pyloss(inputs: Inputs) -> Work:
    import pyloss

    pyloss.set_num_threads(THREADS)
    turn = cycle(inputs)
    for name, loss in pyloss_losses().items():
        both = pyloss.value_and_grad(lambda *x, loss=loss: loss(*x).sum())
        yield f"{name} forward", lambda: waited(loss(*next(turn)))
        yield f"{name} both", lambda: waited(both(*next(turn))[1])


def waited(result: Any) -> Any:
    """The result, after waiting for its device."""
    if hasattr(result, "wait"):
        result.wait()
    return result


def of_opencl(inputs: Inputs, device: str) -> Work:
    """pyloss's losses of logits in the memory of an OpenCL device."""
    import pyloss

    return of_pyloss(
        [
            (pyloss.to_device(q, device), pyloss.to_device(p, device), labels)
            for q, p, labels in inputs
        ]
    )


def of_device_memory(nbytes: int, device: str) -> Work:
    """pyloss's part of `of_memory`, in the memory of a device."""
    import pyloss
    from pyloss import _core

    ones = np.ones(nbytes // 4, np.float32)
    arrays = [pyloss.to_device(ones, device) for _ in range(3 * max(COLD // (3 * nbytes), 1))]
    x, total = cycle(arrays), pyloss.to_device(np.zeros(1), device)

    def run(operation: Callable, *arguments: Any) -> None:
        operation(*arguments)
        waited(arguments[-1])

    def copied() -> None:
        to = next(x)
        to.assign(next(x))
        to.wait()

    yield "read 1", lambda: run(_core.sum_squares, next(x), total)
    yield "read 1, write 1", copied
    yield "read 1, write 1", lambda: run(_core.scale, 1.0, next(x), next(x))
    yield "read 2, write 1", lambda: run(_core.add, next(x), next(x), next(x))


def of_torch(
    inputs: Inputs,
    compiled: bool = False,
    device: str = "cpu",
    losses: Callable[[], dict[str, Callable]] = torch_losses,
) -> Work:
    import torch

    torch.set_num_threads(THREADS)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    turn = cycle(
        [
            (
                tensor(q).to(device).requires_grad_(),
                tensor(p).to(device),
                torch.from_numpy(labels).to(device),
            )
            for q, p, labels in inputs
        ]
    )
    for name, loss in losses().items():
        if compiled:
            torch._dynamo.reset()
            loss = torch.compile(loss, dynamic=False)

        def forward() -> None:
            x, p, labels = next(turn)
            with torch.no_grad():
                loss(x.detach(), p, labels)
            wait()

        def both() -> None:
            x, p, labels = next(turn)
            x.grad = None
            loss(x, p, labels).sum().backward()
            x.grad = None
            wait()

        yield f"{name} forward", forward
        yield f"{name} both", both


def of_cuda_memory(nbytes: int) -> Work:
    """torch's part of `of_memory`, on the card."""
    import torch

    count = 2 * max(COLD // (2 * nbytes), 1)
    turn = cycle([torch.ones(nbytes // 4, device="cuda") for _ in range(count)])

    def copied() -> None:
        next(turn).copy_(next(turn))
        torch.cuda.synchronize()

    yield "read 1, write 1", copied


def of_mlx(inputs: Inputs) -> Work:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    q, p, labels = inputs[0]
    kind = mx.bfloat16 if q.itemsize == 2 else mx.float32
    given = *(mx.array(x.astype(np.float32)).astype(kind) for x in (q, p)), mx.array(labels)
    for name, loss in mlx_losses().items():
        both = mx.value_and_grad(lambda *x, loss=loss: loss(*x).sum())
        yield f"{name} forward", lambda: mx.eval(loss(*given))
        yield f"{name} both", lambda: mx.eval(*both(*given))


def of_memory(nbytes: int) -> Work:
    """Plain loops over as many bytes as the logits have, as float32; the fastest one counts."""
    import torch

    import pyloss
    from pyloss import _core

    pyloss.set_num_threads(THREADS)
    torch.set_num_threads(THREADS)
    arrays = [np.ones(nbytes // 4, np.float32) for _ in range(3 * max(COLD // (3 * nbytes), 1))]
    x, total = cycle(arrays), np.zeros(1)
    yield "read 1", lambda: _core.sum_squares(next(x), total)
    yield "read 2", lambda: [_core.sum_squares(next(x), total) for _ in range(2)]
    yield "read 1, write 1", lambda: _core.scale(1.0, next(x), next(x))
    yield "read 2, write 1", lambda: _core.add(next(x), next(x), next(x))
    t = cycle(list(map(torch.from_numpy, arrays)))
    yield "read 1", lambda: torch.sum(next(t))
    yield "read 1", lambda: torch.amax(next(t))
    yield "read 2", lambda: torch.dot(next(t), next(t))
    yield "read 2", lambda: [torch.sum(next(t)) for _ in range(2)]
    yield "read 1, write 1", lambda: next(t).copy_(next(t))
    yield "read 1, write 1", lambda: torch.add(next(t), 1, out=next(t))
    yield "read 2, write 1", lambda: torch.add(next(t), next(t), out=next(t))


def best_ms(function: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit into the time."""
    once = best_of(1, function)[0]
    return min(once, best_of(int(seconds / once), function)[0] if once < seconds else once) * 1e3


def main(library: str, rows: int, v: int, dtype: str, seconds: float) -> None:
    nbytes = rows * v * np.dtype(DTYPES[dtype]).itemsize
    in_memory = library.startswith("memory")
    device = library.removeprefix("memory-")
    sets = 1 if library == "mlx" else max(COLD // (2 * nbytes), 1)
    inputs = [] if in_memory else [logits(rows, v, dtype, seed=seed) for seed in range(sets)]
    hosts = {
        "pyloss": lambda: of_pyloss(inputs),
        "torch": lambda: of_torch(inputs),
        "compile": lambda: of_torch(inputs, True),
        "cuda": lambda: of_torch(inputs, False, "cuda"),
        "cuda-compile": lambda: of_torch(inputs, True, "cuda"),
        "cuda-liger": lambda: of_torch(inputs, False, "cuda", liger_losses),
        "mlx": lambda: of_mlx(inputs),
        "memory": lambda: of_memory(nbytes),
        "memory-cuda": lambda: of_cuda_memory(nbytes),
    }
    on_device = (
        partial(of_device_memory, nbytes, device)
        if in_memory
        else partial(of_opencl, inputs, device)
    )
    times: dict[str, float] = {}
    for name, function in hosts.get(library, on_device)():
        times[name] = min(best_ms(function, seconds), times.get(name, float("inf")))
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
