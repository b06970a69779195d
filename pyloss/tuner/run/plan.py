"""The plan printed before a run starts: updates, warm-up, tokens and estimated memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pyloss import _core
from pyloss.distributed import Group
from pyloss.errors import counted, size_text
from pyloss.losses.head import rows_at_once
from pyloss.models.layers import HALF_CHECKPOINT_TOKENS
from pyloss.nn import Module, count_parameters, plain_parameters, recorded_module
from pyloss.runtime.precision import (
    bfloat16_form,
    get_matmul_precision,
    int8_form,
    keeps_bfloat16,
)
from pyloss.tuner.losses import PARTS_TOGETHER, head_bytes, parts_of_rows

_NO_BIAS = "{bias_correction: false}"
#: why layers keep float32 under "mixed"
NOT_HALF = "layers with DoRA over experts, fixed factors or parts of one's own are not recorded"

#: bytes of the interpreter, the libraries and the allocator's slack
BASE_BYTES = 80_000_000
#: bytes of the packed panels of a matrix product
PACKED_BYTES = 16_000_000


class Beside(NamedTuple):
    """Bytes that a loss needs beside the model's own, for a part of a batch.

    A loss may have a method `beside(model, batch)` that returns them; `batch` is a `BatchShape`.

    Attributes:
        stored: weights at their size in the file, and other files that it reads.
        kept: arrays that exist until the part's backward pass ends.
        first: what exists before the model runs, and is free again when it does.
        columns: numbers that the head needs for each row, beside the model's logits.
    """

    stored: int = 0
    kept: int = 0
    first: int = 0
    columns: int = 0


class BatchShape(NamedTuple):
    """A batch of equally long rows.

    Attributes:
        rows: of the batch.
        longest: tokens of a row.
        tokens: in the largest part of the batch, see `losses.parts_of_rows`.
        without_gradients: the same where nothing is kept for a backward pass.
    """

    rows: int
    longest: int
    tokens: int
    without_gradients: int

    @classmethod
    def of(cls, rows: int, longest: int) -> BatchShape:
        """The shape of `rows` rows of `longest` tokens."""
        parts = (
            longest * max(map(len, parts_of_rows([longest] * rows, together)))
            for together in (1, PARTS_TOGETHER)
        )
        return cls(rows, longest, *parts)


class _Sizes(NamedTuple):
    """The widths of a model: see `estimate_memory`."""

    hidden: int
    queries: int
    key_values: int
    inner: int
    visits: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> _Sizes:
        config = getattr(model, "config", None)
        hidden = int(getattr(config, "hidden_size", 0) or 0)
        heads = int(getattr(config, "num_attention_heads", 1) or 1)
        key_value_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
        head_dim = int(getattr(config, "head_dim", 0) or hidden // heads)
        inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
        mixture = getattr(config, "mixture", None)
        visits = mixture.active if mixture is not None else 0
        if mixture is not None:
            inner = max(mixture.width, inner if mixture.dense_layers else 0)
        if (gemma4 := getattr(config, "gemma4", None)) is not None:
            visits = gemma4.top_k_experts  # beside the MLP
            inner += visits * gemma4.moe_intermediate_size
        vocabulary = int(getattr(config, "vocab_size", 0) or 0)
        return cls(hidden, heads * head_dim, key_value_heads * head_dim, inner, visits, vocabulary)


def stored_bytes(model: Any) -> int:
    """The bytes of a model's parameters and stored matrices, these at their size in the file."""
    stored = model.stored().values() if hasattr(model, "stored") else ()
    return sum(int(array.nbytes) for array in (*plain_parameters(model).values(), *stored))


def forward_bytes(model: Any, tokens: int) -> int:
    """The working memory of a forward pass that keeps nothing: `4 N (2I + 3H + 2Q + 2K)`."""
    sizes = _Sizes.of(model)
    widths = 2 * sizes.inner + 3 * sizes.hidden * (1 + sizes.visits)
    return 4 * tokens * (widths + 2 * sizes.queries + 2 * sizes.key_values)


def estimate_memory(
    model: Any,
    batch_size: int,
    max_len: int,
    grad_checkpoint: bool = False,
    optimizer_slots: int = 2,
    accumulate: bool = False,
    keep_best: bool = True,
    loss: Any = None,
) -> int:
    """Estimate the peak memory of training, in bytes.

    Batches have `batch_size` rows of `max_len` tokens. N is the number of tokens in the largest
    part of a batch (`losses.parts_of_rows`), H the hidden size, Q the query width (mostly H), K the
    key-value width, I the feed-forward width, V the vocabulary size, L the number of layers, T the
    number of trained layers (the last ones), and P the number of trainable parameters. The estimate
    is the sum of

    - the stored weights at their size in the file (a mapped page counts once it has been read);
    - `4 P (2 + slots + accumulate + keep_best)`: parameters, gradients, optimizer state,
      accumulated gradients, and the copy of the best adapter;
    - activations kept for the backward pass: `4 N (2H + 2Q + 2K + 2I)` for each of the T layers
      (input and the sum after attention; queries and attention's output; keys and values; gate and
      up). Norms of q and k add `4 N (Q + K)`; norms after attention and MLP add `8 N H`. With
      checkpointing each layer keeps only `4 N H`, and one layer is kept in full. While N is at most
      `layers.HALF_CHECKPOINT_TOKENS`, each keeps `4 N (2H + Q)`, plus `8 N K` if queries share
      keys (`ops.attention`). Where layers keep bfloat16 (`keeps_half`), all but `4 N (2H)` is half
      as much, in the working memory, too;
    - outputs that DoRA's magnitude gradients read: `4 N H` for each trained magnitude of an o_proj
      or down_proj, whose output nothing else keeps; with checkpointing only those of one layer;
    - the working memory of one layer, forward and backward: `4 N (4I + 3H + 10K)`, and 16 MB of
      packed matrices. In a mixture of experts I is the total width of a token's k experts, and
      each expert has its own rows: `4 N (3 k H)` more. Fused matrices hold their output twice while
      it is cut into parts: `4 N max(2I, Q + 2K)` more;
    - the second part of the gradient of a trained embedding table that the head shares: `4 V H`;
    - the head: `4 V` for each token computed at once (`losses.head.rows_at_once`), and `8 N H` of
      hidden states;
    - what the `loss` needs, see `Beside`: a teacher's weights and the hidden states that it gives,
      the columns of its logits, and its working memory where that is more than the student's;
    - 80 MB for the interpreter and the libraries.
    """
    of_model = sum(int(array.size) for array in model.trainable_parameters().values())
    trainable = of_model + sum(
        int(array.size) for array in getattr(loss, "loss_parameters", dict)().values()
    )
    copies = 2 + optimizer_slots + int(accumulate) + int(keep_best)
    total = BASE_BYTES + max(stored_bytes(model) - 4 * of_model, 0) + 4 * trainable * copies
    sizes = _Sizes.of(model)
    hidden, queries, key_values, inner, visits, vocabulary = sizes
    if not hidden:
        return total
    config = model.config
    family = getattr(config, "family", None)
    table = any(name.endswith("embed_tokens.weight") for name in model.trainable_parameters())
    if table and getattr(config, "tie_word_embeddings", False):
        total += 4 * vocabulary * hidden
    layers = _trained_layers(model)
    batch = BatchShape.of(batch_size, max_len)
    beside = loss.beside(model, batch) if hasattr(loss, "beside") else Beside()
    tokens = batch.tokens
    width = 4 if grad_checkpoint or not keeps_half(model) else 2
    within = 2 * queries + 2 * key_values + 2 * inner
    if family is not None:
        within += bool(family.qk_norm) * (queries + key_values) + family.post_norms * 2 * hidden
    layer = tokens * (4 * 2 * hidden + width * within)
    remembered = hidden + queries + (2 * key_values if 2 * key_values <= queries else 0)
    inputs = 4 * tokens * (hidden + (remembered if tokens <= HALF_CHECKPOINT_TOKENS else 0))
    kept = layers * inputs + layer if grad_checkpoint else layers * layer
    outputs = sum(
        name.endswith(("o_proj.m", "down_proj.m")) for name in model.trainable_parameters()
    )
    kept += width * tokens * hidden * (outputs / max(layers, 1) if grad_checkpoint else outputs)
    work = tokens * (width * (4 * inner + 10 * key_values) + 4 * 3 * hidden * (1 + visits))
    if getattr(family, "fused", False):
        work += width * tokens * max(2 * inner, queries + 2 * key_values)
    columns = vocabulary + beside.columns
    head = (
        4 * columns * min(rows_at_once(4 * max(columns, 1), head_bytes(grad_checkpoint)), tokens)
        + 8 * tokens * hidden
    )
    passes = max(kept + work + head, beside.first)
    return int(total + PACKED_BYTES + passes + beside.stored + beside.kept)


def keeps_half(model: Any) -> bool:
    """Whether the layers keep activations in bfloat16: as "mixed" says, and all can be recorded."""
    if not (keeps_bfloat16() and isinstance(model, Module)):
        return False
    fixed = any(getattr(part, "origin_a", None) is not None for part in model.modules())
    return not fixed and all(
        recorded_module(layer) is not None for layer in getattr(model, "layers", ())
    )


def _trained_layers(model: Any) -> int:
    """Count the layers of the backward pass: from the first trainable one to the model's last."""
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


def describe_plan(
    model: Any,
    optimizer: Any,
    args: Any,
    batches: Any,
    longest: int,
    first_iteration: int = 0,
    validates: bool = False,
    loss: Any = None,
    group: Group | None = None,
) -> list[str]:
    """Return the lines printed before a run starts, with all differences from mlx-lm's defaults.

    Args:
        batches: the run's iterator; a user's own has no report, so its samples are not described.
        longest: tokens in the longest row.
        validates: whether there is validation data.
        loss: of the run. Its `plan_notes(model)`, if it has that method, are lines for the user.
        group: the ranks that train together.
    """
    accumulation = args.grad_accumulation_steps
    updates = math.ceil(args.iters / accumulation)
    batch_count = counted(args.iters, "batch", "batches")
    ranks = 1 if group is None else group.size()
    first = f"plan: {batch_count} of {ranks * args.batch_size}, {counted(updates, 'update')}"
    first += f" (one every {accumulation} batches)" if accumulation > 1 else ""
    if first_iteration >= args.iters > 0:
        first += f", and the run is at batch {first_iteration}: nothing is left to train; "
        first += "a larger iters trains on"
    elif first_iteration:
        first += f", continuing after batch {first_iteration}"
    lines = [first]
    if group is not None and ranks > 1:
        hosts = counted(len(group.hosts()), "machine")
        lines.append(
            f"plan: {ranks} ranks on {hosts}, {counted(args.batch_size, 'sample')} of a batch for "
            f"each; rank 0 has {counted(_core.num_threads(), 'thread')}"
        )
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
    products = get_matmul_precision()
    if products != "float32":
        form = int8_form() if products == "int8" else bfloat16_form()
        named = "bfloat16" if products == "mixed" else products
        lines.append(f"plan: layers multiply in {named} ({form.name}): {form.reason}")
        if keeps_bfloat16():
            kept = "bfloat16" if keeps_half(model) else f"float32, at least in part: {NOT_HALF}"
            if args.grad_checkpoint:
                kept = "float32: checkpointed layers are not recorded"
            lines.append(f"plan: layers keep activations in {kept}")
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
    for note in loss.plan_notes(model) if hasattr(loss, "plan_notes") else ():
        lines.append(f"plan: {note}")
    peak = size_text(estimate_memory(model, *sizes, loss))
    share = f" ({trainable / numbers:.2%} of the model)" if numbers else ""
    lines.append(
        f"plan: {trainable:,} trainable parameters{share}, about {peak} of memory at the peak"
        f"{' of each rank' if ranks > 1 else ''}"
    )
    if hasattr(loss, "beside"):
        stored = loss.beside(model, BatchShape.of(args.batch_size, longest)).stored
        lines[-1] += f", {size_text(stored)} of it the teacher's files"
    return lines


def first_trained_layer(model: Any) -> int:
    """The number of the first layer that the backward pass reaches."""
    return len(getattr(model, "layers", ())) - _trained_layers(model)
