"""What a stored teacher loses and costs: `python benchmarks/stored_teacher.py [--quick]`.

Prints the tables of docs/distillation.md. The teacher is SmolLM2-135M; the student has 28 of its
30 layers and is not trained. The targets are tokens of examples/data.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bases import MODEL
from common import machine, table

import pyloss
from pyloss import nn
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.distillation.stored.entries import drawn, likeliest
from pyloss.models.pruning import prune_model
from pyloss.tuner import linear_to_lora_layers
from pyloss.tuner.datasets import CacheDataset, load_dataset
from pyloss.tuner.losses import default_loss

DATA = Path(__file__).parents[1] / "examples" / "data"
COUNTS = (1, 4, 16, 64, 256)
DRAWS = 64
ROWS = 128  # of logits at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few targets and steps")
    options = parser.parse_args()
    print(machine(), flush=True)
    teacher, tokenizer = pyloss.load(MODEL)
    student = pyloss.load_model(MODEL)
    layers = len(student.layers)
    prune_model(student, [i for i in range(layers) if i not in (layers - 4, layers - 8)])
    data = CacheDataset(load_dataset(DATA, tokenizer)[2])
    samples = [np.array(data.sample(i).tokens) for i in range(4 if options.quick else 24)]
    print(f"\n{_errors(student, teacher, samples)}\n", flush=True)
    print(_costs(1 if options.quick else 5), flush=True)


def _errors(student: Any, teacher: Any, samples: list[np.ndarray]) -> str:
    """A row for each kind of entries: the KL from them, and its distance from the exact one."""
    found: dict[tuple[str, str], list[Any]] = {}
    exact, random = [], np.random.default_rng(0)
    for tokens in samples:
        q, p = (np.asarray(model(tokens[None]))[0, :-1] for model in (student, teacher))
        for begin in range(0, len(q), ROWS):
            _measure(q[begin : begin + ROWS], p[begin : begin + ROWS], found, exact, random)
    whole = np.mean(np.concatenate(exact))
    rows = []
    for (name, size), parts in found.items():
        left, value, other, bound = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        rows.append(
            (name, size, *(f"{x:.5f}" for x in (left.mean(), value.mean(), value.mean() - whole)),
             f"{bound.mean():.5f}", f"{other.mean():.5f}")
        )  # fmt: skip
    heads = ("entries", "bytes a token", "probability left", "KL, bucket", "error", "bound",
             "KL, renormalized")  # fmt: skip
    return f"{sum(map(len, exact))} targets, exact KL {whole:.5f}\n\n{table(heads, rows)}"


def _measure(q: Any, p: Any, found: Any, exact: Any, random: np.random.Generator) -> None:
    log_q, log_p = (_log_softmax(z.astype(np.float64)) for z in (q, p))
    exact.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    types = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for count in COUNTS:
        top = likeliest(p, 1.0, count)
        bound = _bound(log_q, log_p, top.ids)
        for name, dtype in types.items():
            if name != "float16" and count != 64:
                continue
            logprobs = top.logprobs.astype(dtype).astype(np.float32)
            scaled = logprobs + np.log((1 - top.left) / np.exp(logprobs).sum(-1))[:, None]
            values = [
                pyloss.sparse_distillation_loss(q, top.ids, scaled, rest=rest, left=top.left)
                for rest in ("bucket", "renormalize")
            ]
            key = f"top {count}, {name}", str(count * (2 + np.dtype(dtype).itemsize) + 4)
            found.setdefault(key, []).append((top.left, *values, bound))
    few = drawn(p, 1.0, DRAWS, random)
    new = np.diff(few.ids, axis=-1, prepend=-1) > 0
    counts = (few.ids[:, :, None] == few.ids[:, None, :]).sum(-1)
    value = pyloss.sparse_distillation_loss(
        q,
        np.where(new, few.ids, -1),
        few.logprobs.astype(np.float16),
        shares=np.where(new, counts / DRAWS, 0).astype(np.float32),
    )
    nothing = np.full(len(q), np.nan)
    key = f"{DRAWS} drawn, float16", str(DRAWS * 4 + 4)
    found.setdefault(key, []).append((few.left, value, nothing, nothing))


def _bound(log_q: np.ndarray, log_p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """left max log(P' / Q') of each row, P' and Q' being the distributions of the rest."""
    outside = np.ones(log_p.shape, bool)
    np.put_along_axis(outside, ids, False, -1)
    left, of_q = (np.where(outside, np.exp(z), 0).sum(-1) for z in (log_p, log_q))
    ratio = np.where(outside, log_p - log_q, -np.inf).max(-1) - np.log(left) + np.log(of_q)
    return left * ratio


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _costs(rounds: int) -> str:
    """A LoRA step from a stored teacher beside one from labels, in turn, on the same 4 x 256."""
    model, teacher = pyloss.load_model(MODEL), pyloss.load_model(MODEL)
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    rows = np.random.default_rng(1).integers(0, model.vocab_size, (4, 257)).astype(np.int32)
    batch = rows, np.array([[0, 257]] * 4, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        write_teacher(teacher, rows.tolist(), folder)
        written = time.perf_counter() - begin
        steps = {
            "labels": nn.value_and_grad(model, default_loss),
            "stored teacher": nn.value_and_grad(
                model, pyloss.DistillationLoss(StoredTeacher(folder))
            ),
        }
        wall: dict[str, list[float]] = {name: [] for name in steps}
        processor: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                begin, used = time.perf_counter(), time.process_time()
                float(step(model, *batch)[0][0])
                wall[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - used)
    rows_of = [
        (name, f"{min(wall[name]):.2f}", f"{min(processor[name]):.2f}",
         f"{min(processor[name]) / min(processor['labels']):.3f}")
        for name in steps
    ]  # fmt: skip
    heads = ("LoRA step, 4 x 256 tokens", "s", "processor s", "ratio")
    return f"{table(heads, rows_of)}\n\nwriting 1024 targets: {written:.2f} s"


if __name__ == "__main__":
    main()
