"""Head and loss together: LIBRARY LOSS TOKENS D V RUNS [weight].

Prints JSON: seconds, and peak memory beyond arguments and results. LIBRARY is pyloss, torch (logits
first) or cce (cut-cross-entropy's torch_compile); LOSS is cross_entropy, kl or js. Computes, in
float32, the loss and the gradient of the (student's) hidden states; with `weight` (pyloss only) of
the head too.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import THREADS, best_of, peak_gb, resident_gb


def arrays(tokens: int, d: int, v: int, heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)

    def one() -> tuple[np.ndarray, np.ndarray]:
        weight = rng.standard_normal((v, d), dtype=np.float32)
        weight /= np.float32(np.sqrt(d))
        return rng.standard_normal((tokens, d), dtype=np.float32), weight

    return [one() for _ in range(heads)]


def of_pyloss(loss: str, heads: list, labels: np.ndarray, with_weight: bool) -> Callable:
    import pyloss

    pyloss.set_num_threads(THREADS)
    function = {
        "cross_entropy": pyloss.linear_cross_entropy,
        "kl": pyloss.linear_kl_div,
        "js": pyloss.linear_js_div,
    }[loss]
    hidden, weight = heads[0]
    others = (labels,) if loss == "cross_entropy" else heads[1]
    both = pyloss.value_and_grad(
        lambda h, w: function(h, w, *others, reduction="mean"), (0, 1) if with_weight else (0,)
    )
    return lambda: both(hidden, weight)


def of_torch(loss: str, heads: list, labels: np.ndarray, cut: bool) -> Callable:
    import torch
    from loss_rows import torch_losses

    torch.set_num_threads(THREADS)
    (hidden, weight), *teacher = [tuple(map(torch.from_numpy, pair)) for pair in heads]
    hidden, index = hidden.requires_grad_(), torch.from_numpy(labels)
    if cut:
        from cut_cross_entropy import linear_cross_entropy

        def forward():
            return linear_cross_entropy(hidden, weight, index, impl="torch_compile")

    elif loss == "cross_entropy":

        def forward():
            return torch.nn.functional.cross_entropy(hidden @ weight.t(), index)

    else:
        ((other, other_weight),) = teacher

        def forward():
            function = torch_losses()["KL" if loss == "kl" else "JS"]
            return function(hidden @ weight.t(), other @ other_weight.t(), index).mean()

    def both():
        hidden.grad = None
        forward().backward()

    return both


def extra_mb(function: Callable, results: int) -> float:
    """The peak memory of a call beyond `results` bytes and the memory resident before it."""
    if "pyloss" in sys.modules:
        from pyloss import _core

        _core.trim()  # buffers kept for reuse would hide extra memory
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_gb()
    function()
    return (peak_gb() - before) * 1e3 - results / 1e6


def main(
    library: str, loss: str, tokens: int, d: int, v: int, runs: int, with_weight: bool
) -> None:
    heads = arrays(tokens, d, v, 1 if loss == "cross_entropy" else 2)
    labels = np.random.default_rng(1).integers(0, v, tokens)
    if library == "pyloss":
        function = of_pyloss(loss, heads, labels, with_weight)
    else:
        function = of_torch(loss, heads, labels, library == "cce")
    seconds = best_of(runs, function)[0]
    print(
        json.dumps(
            {"seconds": seconds, "extra_mb": extra_mb(function, 4 * d * (tokens + v * with_weight))}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]), sys.argv[7:] == ["weight"])
