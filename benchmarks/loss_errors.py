"""Errors of the row losses and their gradients against float64: ROWS V; prints JSON.

{"<loss> <type>": {"pyloss" or "torch": [loss max, loss mean, gradient max, gradient mean]}}. Errors
of a loss are absolute; errors of a gradient are relative to the row's largest. The formulas are the
tests'.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from common import HERE, THREADS
from loss_rows import DTYPES, LOSSES, logits, pyloss_losses, tensor, torch_losses

sys.path.insert(0, str(HERE.parent / "tests"))

FORMULAS = ("softmax_cross_entropy", "kl_div_loss", "js_div_loss", "stablemax_cross_entropy")


def main(rows: int, v: int) -> None:
    import loss_formulas
    import torch

    import pyloss

    torch.set_num_threads(THREADS)
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in DTYPES:
        q, p, labels = logits(rows, v, dtype)
        in_pyloss, in_torch = pyloss_losses(), torch_losses()
        for name, formula in zip(LOSSES, FORMULAS, strict=True):
            exact, (slope, *_) = getattr(loss_formulas, formula)(
                q, p if formula.endswith("div_loss") else labels
            )
            largest = np.abs(slope).max(-1, keepdims=True)

            def errors(loss: np.ndarray, gradient: np.ndarray) -> list[float]:
                off = (
                    np.abs(loss.astype(np.float64) - exact),
                    np.abs(gradient.astype(np.float64) - slope) / largest,
                )
                return [float(f(x)) for x in off for f in (np.max, np.mean)]

            (_, loss), gradient = pyloss.value_and_grad(
                lambda x: (lambda y: (y.sum(), y))(in_pyloss[name](x, p, labels))
            )(q)
            x = tensor(q).clone().requires_grad_()
            theirs = in_torch[name](x, tensor(p), torch.from_numpy(labels))
            theirs.sum().backward()
            found[f"{name} {dtype}"] = {
                "pyloss": errors(loss, gradient),
                "torch": errors(theirs.detach().double().numpy(), x.grad.double().numpy()),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
