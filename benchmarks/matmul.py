"""Matrix products of models' layer shapes with pyloss or torch.mm: LIBRARY CALLS [SIZES].

Prints GFLOP/s as JSON. LIBRARY is pyloss, torch, torch-cuda for the first CUDA card in float32 and
not TF32, or opencl:<number> for pyloss on that device. The shapes are SmolLM2-135M's with 1024
tokens, and those of Qwen3-0.6B and 1.7B with 512. With SIZES gpu there are large square matrices,
too; with SIZES small two small shapes alone. Products are in float32 and in bfloat16; pyloss's,
forward, also in int8, as far as it multiplies so many rows in it. In bfloat16, pyloss rounds
float32 rows and its weights while it multiplies, and returns float32; torch has all three in
bfloat16.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import numpy as np
from common import THREADS, best_of, table

#: tokens, inputs, outputs
SHAPES = (
    (1024, 576, 1536),
    (1024, 1536, 576),
    (1024, 576, 576),
    (1024, 576, 49152),
    (512, 1024, 3072),
    (512, 3072, 1024),
    (512, 2048, 6144),
    (512, 6144, 2048),
)
SQUARE = 4096
#: by the name of SIZES
SIZES = {
    "usual": SHAPES,
    "gpu": (*SHAPES, (SQUARE, SQUARE, SQUARE)),
    "small": ((64, 128, 256), (256, 256, 256)),
}
#: formats of weights, by precision
STORED = {
    "float32": ("f32", "q4_1"),
    "bfloat16": ("f32", "bf16", "q8_0", "q4_1", "affine4", "nf4"),
    "int8": ("q8_0", "q4_1", "q4_k", "affine4"),
}


def products(library: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray):
    """Yields (stored format, precision, direction, function) of a layer's two products.

    x [T, I], w [O, I], dy [T, O].
    """
    y, dx = np.empty_like(dy), np.empty_like(x)
    if library.startswith("torch"):
        yield from torch_products(x, w, dy, on_card=library != "torch")
        return
    import pyloss
    from pyloss import _core
    from pyloss.runtime.precision import matmul_precision
    from pyloss.weights.formats import FORMATS

    if library != "pyloss":
        yield from device_products(library, x, w, dy)
        return
    pyloss.set_num_threads(THREADS)
    for precision, formats in STORED.items():
        for name in formats:
            if w.shape[1] % FORMATS[name].elements:
                continue
            weight = w if name == "f32" else pyloss.Weight.quantize(w, name).handle
            with matmul_precision(precision):
                yield (
                    name,
                    precision,
                    "forward",
                    partial(_core.linear_forward, x, weight, None, None, None, 0.0, None, y),
                )
                if precision == "int8":
                    continue  # forward only
                yield (
                    name,
                    precision,
                    "input gradient",
                    partial(_core.linear_input_grad, dy, weight, None, None, 0, None, dx),
                )


def torch_products(x: np.ndarray, w: np.ndarray, dy: np.ndarray, on_card: bool):
    """`products` by torch.mm; on a card each call waits for its result."""
    import torch

    torch.set_num_threads(THREADS)
    torch.backends.cuda.matmul.allow_tf32 = False

    def product(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.mm(*operands, out=out)
        if on_card:
            torch.cuda.synchronize()
        return out

    for precision in ("float32",) if on_card else ("float32", "bfloat16"):
        tx, tw, tdy = (
            torch.from_numpy(a).to("cuda" if on_card else "cpu", getattr(torch, precision))
            for a in (x, w, dy)
        )
        y, dx = tdy.clone(), tx.clone()
        yield "f32", precision, "forward", partial(product, tx, tw.t(), out=y)
        yield "f32", precision, "input gradient", partial(product, tdy, tw, out=dx)


def device_products(device: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray):
    """`products` on an OpenCL device, in float32; each call waits for its result."""
    import pyloss
    from pyloss import _core
    from pyloss.ops.arrays import core_weight

    tx, tw, tdy, y, dx = (
        pyloss.to_device(a, device) for a in (x, w, dy, np.zeros_like(dy), np.zeros_like(x))
    )

    def forward(weight: object) -> pyloss.DeviceArray:
        _core.linear_forward(tx, weight, None, None, None, 0.0, None, y)
        y.wait()
        return y

    def input_gradient(weight: object) -> pyloss.DeviceArray:
        _core.linear_input_grad(tdy, weight, None, None, 0, None, dx)
        dx.wait()
        return dx

    for name, weight in (
        ("f32", tw),
        ("q4_1", core_weight(pyloss.to_device(pyloss.Weight.quantize(w, "q4_1"), device))),
    ):
        yield name, "float32", "forward", partial(forward, weight)
        yield name, "float32", "input gradient", partial(input_gradient, weight)


def products_table(speeds: dict[str, float], peers: dict[str, float]) -> str:
    """Of the GFLOP/s that pyloss and torch printed; torch.mm has no product in int8."""
    rows = []
    for key, speed in speeds.items():
        weight, stored, precision, direction = key.split(" ", 3)
        peer = peers.get(f"{weight} f32 {precision} {direction}")
        compared = (f"{peer:.0f}", f"{speed / peer:.2f}") if peer else ("", "")
        rows.append((weight, stored, precision, direction, f"{speed:.0f}", *compared))
    heads = (
        "weight (in x out)",
        "stored as",
        "product in",
        "direction",
        "pyloss, GFLOP/s",
        "torch.mm, GFLOP/s",
        "ratio",
    )
    return table(heads, rows)


def main(library: str, calls: int, sizes: str = "usual") -> None:
    rng = np.random.default_rng(0)
    speeds = {}
    for rows, inputs, outputs in SIZES[sizes]:
        x, w, dy = (
            rng.standard_normal(s, dtype=np.float32)
            for s in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        n = max(3, calls * 576 * 1536 // (inputs * outputs))
        for name, precision, direction, function in products(library, x, w, dy):
            key = f"{inputs}x{outputs} {name} {precision} {direction}"
            speeds[key] = 2 * rows * inputs * outputs / best_of(n, function)[0] / 1e9
    print(json.dumps(speeds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
