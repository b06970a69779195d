"""Checks that a change left every result as it was: records hashes, compares two records.

    PYTHONPATH=old/checkout python benchmarks/bits.py --out a.json
    PYTHONPATH=new/checkout python benchmarks/bits.py --out b.json
    python benchmarks/bits.py --compare a.json b.json

A record has an entry for each operation of the core, losses and gradients included, on every
instruction set of this machine and the first OpenCL device, with every float type and weight
format; and an entry for each run of 20 training steps: LoRA, DoRA, QLoRA, a mixture of experts,
full, bfloat16. --model adds steps of a stored model. Records of different machines are not
comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import pyloss
from pyloss import _core, measuring, nn
from pyloss.models.config import ModelConfig
from pyloss.models.config.mixture import Mixture
from pyloss.models.synthetic import random_model
from pyloss.optim import AdamW
from pyloss.tuner import default_loss
from pyloss.tuner.adapters.full import unfreeze_layers
from pyloss.weights import Weight
from pyloss.weights.formats import FORMATS

STEPS = 20
#: sizes of the dimensions in ops.def; I is a multiple of every format's block
SIZES = {
    "A": 1, "B": 1, "C": 1, "D": 64, "E": 5, "G": 2, "H": 6, "I": 512, "K": 2, "M": 74, "N": 37,
    "O": 96, "P": 50, "R": 7, "S": 4, "V": 5003,
}  # fmt: skip
#: of operations whose letters mean something else
SIZES_OF = {
    "[*P,Q,R]": {"O": 11, "P": 11, "S": 11, "M": 11, "N": 37, "Q": 37, "T": 37, "K": 37}
    | dict.fromkeys("DRUL", 64),
    "offsets:i32[B+1]": {"B": 3, "C": 4, "E": 48},
}
FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
ARGUMENT = re.compile(r"=?(\w+)(\?)?:(\w+)(?:\[([^\]]*)\])?(?:<(\w))?(?:\^(\w))?")


def digest(arrays: Any) -> str:
    """The hash of the arrays' bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


# ---- operations


def weight(rng: np.random.Generator, rows: int, cols: int, format: str) -> Weight:
    """A random stored matrix; of a read-only format, random bytes without NaN and inf."""
    layout = FORMATS[format]
    if layout.encodes:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return Weight.quantize(values, format, **({"group_size": 64} if layout.bits else {}))
    blocks = rng.integers(0, 256, rows * cols // layout.elements * layout.bytes, dtype=np.uint8)
    return Weight(blocks & np.uint8(0xBF), format, (rows, cols))


class Arguments:
    """Random arguments of an operation, from its line in ops.def."""

    def __init__(
        self, spec: str, sizes: dict[str, int], floats: str, format: str, full: bool
    ) -> None:
        self.rng = np.random.default_rng(7)
        self.sizes, self.floats, self.format, self.full = sizes, FLOATS[floats], format, full
        self.wide = floats == "f64"
        inputs, outputs = spec.split(">")
        self.values = [self.draw(*m) for m in ARGUMENT.findall(inputs)]
        begin = len(self.values)
        self.values += [self.draw(*m) for m in ARGUMENT.findall(outputs)]
        self.outputs = [a for a in self.values[begin:] if a is not None]

    def shape(self, dims: str) -> tuple[int, ...]:
        """The sizes of dimensions such as "N,I", "E+1", "D/2" or "1"."""
        found = []
        for dim in dims.replace("*", "").split(","):
            terms = [int(t) if t.isdigit() else self.sizes[t[0]] for t in dim.split("+")]
            found.append(sum(terms) // (2 if dim.endswith("/2") else 1))
        return tuple(found)

    def draw(self, name: str, optional: str, kind: str, dims: str, below: str, offsets: str) -> Any:
        """One argument. Unless `full`, optional inputs are absent (not gradients), flags are 0."""
        if optional and not self.full and not name.startswith("d"):
            return None
        if kind == "int":
            return {"seed": 12345, "window": 11, "ahead": 0}.get(name, int(self.full))
        if kind == "real":
            return (
                0.3
                if self.full or name not in ("label_smoothing", "z_loss", "softcap", "gamma")
                else 0.0
            )
        shape = self.shape(dims)
        if kind == "weight":
            return weight(self.rng, *shape, self.format).handle
        if kind == "stack":
            return tuple(weight(self.rng, *shape[1:], self.format).handle for _ in range(shape[0]))
        if offsets:
            inner = np.sort(self.rng.integers(0, self.sizes[offsets] + 1, shape[0] - 2))
            return np.concatenate([[0], inner, [self.sizes[offsets]]]).astype(np.int32)
        if below:
            limit, count = self.sizes[below], int(np.prod(shape))
            drawn = (
                self.rng.permutation(limit)[:count]
                if count <= limit
                else self.rng.integers(0, limit, count)
            )
            return drawn.reshape(shape).astype(np.int32)
        if kind in ("i32", "u8"):
            return np.zeros(shape, np.int32 if kind == "i32" else np.uint8)
        type = {"f32": np.float32, "f64": np.float64, "float": self.floats}.get(
            kind, np.float64 if self.wide else np.float32
        )
        values = self.rng.standard_normal(shape)
        return (np.abs(values) if name in ("v", "squares", "rstd", "lse") else values).astype(type)


def moved(argument: Any, put: Callable[[np.ndarray], Any]) -> Any:
    """An argument with `put` applied to its arrays, also inside handles."""
    if isinstance(argument, tuple):
        return tuple(moved(part, put) for part in argument)
    return put(argument) if isinstance(argument, np.ndarray) else argument


def run_operation(name: str, arguments: Arguments, device: str) -> str:
    """The hash of the outputs that were passed."""
    if device == "cpu":
        plain = [
            a.view(np.uint16) if getattr(a, "dtype", None) == ml_dtypes.bfloat16 else a
            for a in arguments.values
        ]
        getattr(_core, name)(*plain)
        return digest(arguments.outputs)
    there = [moved(a, lambda array: pyloss.to_device(array, device)) for a in arguments.values]
    getattr(_core, name)(*there)
    return digest(a.numpy() for a in there if isinstance(a, pyloss.DeviceArray))


def variants(spec: str) -> Iterator[tuple[str, dict[str, int], str, str, bool, str]]:
    """The runs of an operation: (name, sizes, float type, weight format, full, precision)."""
    floats = list(FLOATS) if ":float[" in spec else ["f32"]
    stored = ":weight[" in spec or ":stack[" in spec
    formats = list(FORMATS) if stored else ["f32"]
    product = stored or ",I]" in spec
    rows = (37, 3) if product else (37,)
    precisions = ("float32", "bfloat16") if product else ("float32",)
    for type, format, n, full, precision in itertools.product(
        floats, formats, rows, (True, False), precisions
    ):
        sizes = {**SIZES, "N": n, **({"V": 300, "D": 512} if "w:weight[V,D]" in spec else {})}
        sizes |= {k: v for part, own in SIZES_OF.items() if part in spec for k, v in own.items()}
        if "rows:i32[M]<N" in spec or "rows:i32[N,K]<M" in spec:
            sizes |= {"M": 20, "N": 37} if "rows:i32[M]<N" in spec else {}
        yield (
            f"{type} {format} n={n} {'full' if full else 'bare'} {precision}",
            sizes,
            type,
            format,
            full,
            precision,
        )


def operations(device: str, wanted: Callable[[str], bool]) -> dict[str, str]:
    """The hashes of all operations, with the C kernels in use or on an OpenCL device."""
    found = {}
    for name, spec in _core.ops():
        if not wanted(name):
            continue
        for label, sizes, floats, format, full, precision in variants(spec):
            if device != "cpu" and precision != "float32":
                continue
            pyloss.set_matmul_precision(precision)
            found[f"{name} {label}"] = run_operation(
                name, Arguments(spec, sizes, floats, format, full), device
            )
        pyloss.set_matmul_precision("float32")
    return found


# ---- training


def tiny(format: str = "f32", experts: bool = False) -> Any:
    """A model whose steps take milliseconds."""
    config = ModelConfig(
        "qwen3_moe" if experts else "llama",
        vocab_size=1003,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=not experts,
        mixture=Mixture(6, 2, 64, True) if experts else None,
    )
    return random_model(config, format)


def full_step(model: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """Steps that train all weights."""
    unfreeze_layers(model)
    model.train()
    optimizer, gradients = AdamW(1e-3), nn.value_and_grad(model, default_loss)

    def step(batch: np.ndarray, lengths: np.ndarray) -> float:
        (loss, _), grads = gradients(model, batch, lengths)
        optimizer.update(model, grads)
        return float(loss)

    return step


def train(model: Any, steps: int, kind: str, device: str = "cpu") -> str:
    """The hash of the losses of some steps and of the trained parameters."""
    pyloss.random.seed(1)
    config = {"rank": 6, "scale": 8.0, "dropout": 0.1}
    step = (
        full_step(model)
        if kind == "full"
        else measuring.training_step(model, config, kind == "dora", kind == "checkpoint", 1e-3)
    )
    pyloss.to_device(model, device)
    rng, losses = np.random.default_rng(3), []
    for _ in range(steps):
        batch = rng.integers(0, model.vocab_size, (3, 41)).astype(np.int32)
        losses.append(step(batch, np.array([(0, 41), (5, 30), (9, 41)], np.int32)))
    pyloss.to_device(model, "cpu")
    return digest([np.array(losses), *(a for _, a in sorted(model.trainable_parameters().items()))])


def training(model: str | None, device: str = "cpu") -> dict[str, str]:
    """The hashes of the runs of training."""
    kinds = ("lora", "dora", "checkpoint", "full") if device == "cpu" else ("lora", "dora")
    found = {f"training {kind}": train(tiny(), STEPS, kind, device) for kind in kinds}
    for format in ("q4_0", "affine4", "nf4"):
        found[f"training lora {format}"] = train(tiny(format), STEPS, "lora", device)
    found["training experts"] = train(tiny("q8_0", experts=True), STEPS, "lora", device)
    if device == "cpu":
        pyloss.set_matmul_precision("bfloat16")
        found["training bfloat16"] = train(tiny(), STEPS, "lora")
        pyloss.set_matmul_precision("float32")
    if model:
        found[f"training {model}"] = train(pyloss.load_model(model), 2, "lora", device)
    return found


def record(path: str, model: str | None, wanted: Callable[[str], bool], places: list[str]) -> None:
    """Writes the hashes of the instruction sets and devices `places`."""
    pyloss.set_num_threads(2)
    found = {}
    for isa in _core.isas():
        if isa not in places:
            continue
        _core.use_isa(isa)
        entries = operations("cpu", wanted) | (training(model) if wanted("training") else {})
        found |= {f"{isa}: {name}": bits for name, bits in entries.items()}
    if "opencl" in places and _core.opencl_devices()[0]:
        entries = operations("opencl:0", wanted) | (
            training(None, "opencl:0") if wanted("training") else {}
        )
        found |= {f"opencl: {name}": bits for name, bits in entries.items()}
    Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(found)} entries of {os.path.dirname(pyloss.__file__)} in {path}")


def compare(first: str, second: str) -> int:
    """Prints the differences between two records; returns 1 if there are any."""
    a, b = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (first, second))
    other = [name for name in a if name in b and a[name] != b[name]]
    for name in other:
        print("other bits:", name)
    for path, names in (
        (first, [n for n in a if n not in b]),
        (second, [n for n in b if n not in a]),
    ):
        if names:
            print(f"{len(names)} entries are in {path} only, such as {names[0]}")
    print(f"{sum(name in b for name in a)} entries compared, {len(other)} differ")
    return int(bool(other) or a.keys() != b.keys())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write a record here")
    parser.add_argument(
        "--model", help="also train a stored model, such as smollm2-135m, for two steps"
    )
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression of operations to run; training is one more name",
    )
    parser.add_argument(
        "--places", default=",".join([*_core.isas(), "opencl"]), help="instruction sets, and opencl"
    )
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="compare two records")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    if not options.out:
        parser.error("--out or --compare is needed")
    record(
        options.out,
        options.model,
        lambda name: re.search(options.only, name) is not None,
        options.places.split(","),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
