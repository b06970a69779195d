"""`tune_scales`: distilled quantization, which trains a quantized model's scales and offsets.

The codes stay as rounding chose them. Scales and offsets are trained so that the probabilities of
the next token come near those of the float original (KL divergence) on a little text, as in
mlx-lm's DWQ. They are part of the format: the result has the size, the speed and the file of any
other quantized model, and programs that know nothing of it read it. A low-rank correction would
correct more per trained number, but it is an adapter that every program has to load and compute
beside the model, and 4 bits and a correction are more bytes than 4 bits.

A step costs a forward pass of the original, and the forward and backward of full fine-tuning.
Memory is that of a LoRA step and four floats for each scale: see `ops.scaled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from pyloss.checks.numbers import real, whole
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.run import distill
from pyloss.distillation.scales import store_scales, train_scales
from pyloss.io.bars import bar
from pyloss.optim import Adam
from pyloss.optim.schedules import cosine_decay
from pyloss.tuner.data.batching import iterate_batches
from pyloss.tuner.losses import default_loss
from pyloss.tuner.progress import log_beside_results
from pyloss.tuner.run.args import TrainingArgs
from pyloss.tuner.run.evaluation import evaluate, own_data

#: Default learning rate: the relative change of a scale in a step, see `weights.scales`.
LEARNING_RATE = 1e-3


class Quality(NamedTuple):
    """How near a quantized model is to its original, on held-out text.

    Attributes:
        divergence: the KL divergence of a token's probabilities from the original's, in nats.
        perplexity: of the text.
    """

    divergence: float
    perplexity: float


class Tuned(NamedTuple):
    """What tuning did.

    Attributes:
        layers: how many layers have trained scales.
        original: the original's perplexity on the held-out text.
        before: the quantized model's quality, untuned.
        after: its quality with the trained scales.
        kept: whether the model has the trained scales: not if the divergence did not fall.
    """

    layers: int
    original: float
    before: Quality
    after: Quality
    kept: bool


def tune_scales(
    student: Any,
    original: Any,
    train_dataset: Any,
    held_out: Any,
    *,
    iters: int = 100,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 4,
    max_seq_length: int = 512,
    val_batches: int = 25,
    seed: int = 0,
    grad_checkpoint: bool = False,
    progress: bool = True,
    step: Callable[[str], Any] = lambda text: None,
) -> Tuned:
    """Trains the scales of `student`, in place, towards the probabilities of `original`.

    Args:
        student: the quantized model; layers of floats stay as they are.
        original: the model that it was made from, with the same tokens.
        train_dataset: text as `train` takes it; all of its target tokens count.
        held_out: other text, of which `val_batches` batches (-1: all) are measured.
        learning_rate: the most by which a scale changes in a step, relative to itself; it falls to
            0 along a cosine.
        grad_checkpoint: recompute layers in the backward pass. A model with experts always does,
            since their matrices are expanded.
        progress: print the run's plan, progress and reports.
        step: called with what is done next, for a line of progress.

    Raises:
        ValueError: no layer has scales that can be trained, or no text.
        KeyboardInterrupt: the student is then of no use.
    """
    rate, iters = real(learning_rate, "learning_rate", above=0), whole(iters, "iters", 1)
    loss = DistillationLoss(original)
    held_out = own_data(held_out, iterate_batches)  # tokenized once

    def mean(model: Any, measured: Callable[..., Any], text: str) -> float:
        count = -(-len(held_out) // batch_size)
        with bar(text, count if val_batches < 0 else min(count, val_batches), "batch") as shown:
            return evaluate(
                model,
                held_out,
                batch_size,
                val_batches,
                max_seq_length,
                measured,
                progress_callback=shown.step,
            )

    def perplexity(model: Any) -> float:
        found = mean(model, default_loss, "perplexity")
        return math.exp(found) if found < 700 else math.inf

    def quality() -> Quality:
        return Quality(mean(student, loss, "KL from the original"), perplexity(student))

    step("measuring the original and the quantized model on held-out text")
    known = perplexity(original)
    before = quality()
    untuned = {name: module for name, module in student.named_modules() if name}
    layers = train_scales(student)
    if not layers:
        raise ValueError(
            "no layer of the model has scales that can be trained: quantize it to affine groups "
            "(q2 to q8) or to one of GGUF's quantized types"
        )
    step(f"training the scales of {len(layers)} layers")
    experts = getattr(student.config, "mixture", None) is not None
    checkpointed = student.grad_checkpoint
    args = TrainingArgs(
        batch_size=batch_size,
        iters=iters,
        val_batches=0,
        max_seq_length=max_seq_length,
        adapter_file=None,
        grad_checkpoint=grad_checkpoint or experts,
        seed=seed,
        progress=progress,
    )
    with log_beside_results():
        distill(student, original, Adam(cosine_decay(rate, iters)), train_dataset, args=args)
    student.set_grad_checkpoint(checkpointed)
    store_scales(student)
    step("measuring the tuned model")
    after = quality()
    kept = after.divergence < before.divergence
    if not kept:
        for name in layers:
            student.set_module(name, untuned[name])
    return Tuned(len(layers), known, before, after, kept)
