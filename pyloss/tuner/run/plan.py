"""What a run is going to do and need, told before it starts: updates, warm-up, tokens, memory."""

from __future__ import annotations

import math
import sys
from typing import Any

from pyloss.errors import counted, size_text
from pyloss.losses.head import rows_at_once
from pyloss.models.transformer import HALF_CHECKPOINT_TOKENS
from pyloss.nn import count_parameters
from pyloss.runtime.precision import get_matmul_precision, has_instructions
from pyloss.tuner.losses import head_bytes, parts_of_rows

_NO_BIAS = "{bias_correction: false}"

#: interpreter, libraries and the allocator's slack
BASE_BYTES = 80_000_000
#: panels of a matrix product
PACKED_BYTES = 16_000_000


def estimate_memory(
    model: Any,
    batch_size: int,
    max_len: int,
    grad_checkpoint: bool = False,
    optimizer_slots: int = 2,
    accumulate: bool = False,
    keep_best: bool = True,
) -> int:
    """An estimate of the peak memory of training, in bytes, for batches of `batch_size` rows of
    `max_len` tokens.

    With N tokens in the largest part of a batch (`losses.parts_of_rows`), hidden size H, query
    width Q (mostly H), key-value width K, feed-forward width I, vocabulary V, L layers of which T,
    the last ones, are trained, and P trainable numbers, it is the sum of

    - the stored weights as they are in the file (mapped pages count once they have been read);
    - `4 P (2 + slots + accumulate + keep_best)`: parameters, gradients, optimizer state,
      accumulated gradients, and the copy of the best adapter;
    - activations kept for the backward pass: `4 N (2H + 2Q + 2K + 2I)` for each of the T layers
      (input and the sum after attention; queries and attention's output; keys and values; gate and
      up), `4 N (Q + K)` more where q and k have norms and `8 N H` more for norms after attention
      and MLP; with checkpointing `4 N H` for each, `4 N (2H + Q)` while N is at most
      `transformer.HALF_CHECKPOINT_TOKENS`, `8 N K` more then where queries share keys
      (`ops.attention`), and one layer in full;
    - what DoRA's magnitudes read again: `4 N H` for each trained one of an o_proj or down_proj,
      whose outputs nothing else keeps; with checkpointing only one layer's;
    - what one layer works on, forward and backward: `4 N (4I + 3H + 10K)`, and 16 MB of packed
      matrices; in a mixture of experts I is the width of a token's experts together, and each of
      these k has rows of its own: `4 N (3 k H)` more;
    - where a table that the head shares is trained, the second part of its gradient: `4 V H`;
    - the head: `4 V` for each token that it is computed for at once (`linear_losses.rows_at_once`),
      and `8 N H` of hidden states;
    - 80 MB for the interpreter and the libraries.
    """
    trainable = sum(int(array.size) for array in model.trainable_parameters().values())
    stored = model.stored().values() if hasattr(model, "stored") else ()
    weights: int = (
        sum(int(array.nbytes) for array in (*model.parameters().values(), *stored)) - 4 * trainable
    )
    copies = 2 + optimizer_slots + int(accumulate) + int(keep_best)
    total = BASE_BYTES + max(weights, 0) + 4 * trainable * copies
    config = getattr(model, "config", None)
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    if not hidden:
        return total
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    key_value_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
    head_dim = int(getattr(config, "head_dim", 0) or hidden // heads)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    mixture = getattr(config, "mixture", None)
    visits = mixture.active if mixture is not None else 0
    if mixture is not None:
        inner = max(visits * mixture.size, inner if mixture.dense_layers else 0)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    table = any(name.endswith("embed_tokens.weight") for name in model.trainable_parameters())
    if table and getattr(config, "tie_word_embeddings", False):
        total += 4 * vocabulary * hidden
    layers = _trained_layers(model)
    tokens = max_len * max(map(len, parts_of_rows([max_len] * batch_size)))
    key_values = key_value_heads * head_dim
    queries, family = heads * head_dim, getattr(config, "family", None)
    layer = 4 * tokens * (2 * hidden + 2 * queries + 2 * key_values + 2 * inner)
    if family is not None:
        layer += (
            4
            * tokens
            * (bool(family.qk_norm) * (queries + key_values) + family.post_norms * 2 * hidden)
        )
    remembered = hidden + queries + (2 * key_values if 2 * key_values <= queries else 0)
    inputs = 4 * tokens * (hidden + (remembered if tokens <= HALF_CHECKPOINT_TOKENS else 0))
    kept = layers * inputs + layer if grad_checkpoint else layers * layer
    outputs = sum(
        name.endswith(("o_proj.m", "down_proj.m")) for name in model.trainable_parameters()
    )
    kept += 4 * tokens * hidden * (outputs / max(layers, 1) if grad_checkpoint else outputs)
    work = 4 * tokens * (4 * inner + 3 * hidden * (1 + visits) + 10 * key_values) + PACKED_BYTES
    head = (
        4
        * vocabulary
        * min(rows_at_once(4 * max(vocabulary, 1), head_bytes(grad_checkpoint)), tokens)
        + 8 * tokens * hidden
    )
    return int(total + kept + work + head)


def _trained_layers(model: Any) -> int:
    """How many layers the backward pass goes through: from the first with a trainable parameter to
    the last.
    """
    count = len(getattr(model, "layers", ()))
    numbers = []
    for name in model.trainable_parameters():
        parts = name.split(".")
        if "layers" not in parts[:-1]:
            return count
        number = parts[parts.index("layers") + 1]
        if not number.isdigit():
            return count
        numbers.append(int(number))
    return count - min(numbers, default=count)


def peak_memory() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    try:
        # Not getrusage there: a new process begins with the figure of the one that started it.
        with open("/proc/self/status", encoding="ascii") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def describe_plan(
    model: Any,
    optimizer: Any,
    args: Any,
    batches: Any,
    longest: int,
    first_iteration: int = 0,
    validates: bool = False,
) -> list[str]:
    """The lines that a run prints before it starts, what differs from mlx-lm's defaults included.

    `batches` is its iterator (a user's own says less), `longest` the number of tokens of the
    longest row; `validates`: there is validation data.
    """
    accumulation = args.grad_accumulation_steps
    updates = math.ceil(args.iters / accumulation)
    batch_count = counted(args.iters, "batch", "batches")
    first = f"plan: {batch_count} of {args.batch_size}, {counted(updates, 'update')}"
    first += f" (one every {accumulation} batches)" if accumulation > 1 else ""
    if first_iteration >= args.iters > 0:
        first += f", and the run is at batch {first_iteration}: nothing is left to train; "
        first += "a larger iters trains on"
    elif first_iteration:
        first += f", continuing after batch {first_iteration}"
    lines = [first]
    warmup = int(getattr(optimizer.schedule, "warmup", 0))
    if warmup:
        span = "update" if warmup == 1 else f"{warmup} updates"
        lines.append(
            f"plan: warm-up over the first {span} "
            f"({counted(warmup * accumulation, 'batch', 'batches')})"
        )
        if warmup >= updates:
            lines[-1] += ": longer than the run, so the full learning rate is never reached"
    if getattr(optimizer, "bias_correction", False):
        name = type(optimizer).__name__
        lines.append(
            f"plan: {name} with bias correction; mlx-lm's has none (optimizer_config: "
            f"{{{name.lower()}: {_NO_BIAS}}})"
        )
    if validates and args.keep_best:
        lines.append(
            "plan: ends with the adapter of the lowest validation loss; mlx-lm's ends with the "
            "last (--keep-last)"
        )
    for name, scale in optimizer.rate_scales.items():
        lines.append(f"plan: the learning rate of {name} is {scale:g} times that of the others")
    if get_matmul_precision() != "float32":
        cost = (
            ""
            if has_instructions()
            else "; this processor has no instructions for it, so it takes longer than float32"
        )
        lines.append(f"plan: layers multiply in {get_matmul_precision()}{cost}")
    report = getattr(batches, "report", None)
    if report is not None:
        epochs = args.iters / batches.batches_per_epoch
        lines.append(
            f"plan: {counted(report.used, 'sample')} of up to {longest} tokens, "
            f"{report.tokens} tokens an epoch "
            f"({report.targets} of them targets), {epochs:.2g} epochs"
        )
    trainable, numbers = count_parameters(model)
    slots = len(getattr(optimizer, "slots", ()))
    sizes = (
        args.batch_size,
        longest,
        args.grad_checkpoint,
        slots,
        accumulation > 1,
        args.keep_best,
    )
    peak = size_text(estimate_memory(model, *sizes))
    share = f" ({trainable / numbers:.2%} of the model)" if numbers else ""
    lines.append(
        f"plan: {trainable:,} trainable parameters{share}, about {peak} of memory at the peak"
    )
    return lines
