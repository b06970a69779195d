"""`distill`: a training run against a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pyloss.distillation.hidden import HiddenStates
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.stored import StoredTeacher
from pyloss.distillation.vocabularies import check_vocabularies
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.data.batching import iterate_batches
from pyloss.tuner.run.args import TrainingArgs, TrainingResult
from pyloss.tuner.run.evaluation import own_data
from pyloss.tuner.trainer import train


def distill(
    model: Any,
    teacher: Any,
    optimizer: Any,
    train_dataset: Any,
    val_dataset: Any = None,
    args: TrainingArgs | None = None,
    *,
    kind: str = "forward-kl",
    temperature: float = 1.0,
    alpha: float = 0.0,
    beta: float = 0.5,
    skew: float = 0.1,
    on_policy: float = 0.0,
    max_new_tokens: int = 128,
    hidden_loss: str | None = None,
    hidden_layers: Iterable[Sequence[int]] | str | None = None,
    hidden_weight: float = 1.0,
    tokenizers: tuple[Any, Any] | None = None,
    training_callback: TrainingCallback | None = None,
) -> TrainingResult:
    """Train the model's trainable parameters towards a teacher's probabilities, and save them.

    The run is that of `pyloss.train`, whose arguments and errors these are, with
    `DistillationLoss` as its loss for training and validation.

    Args:
        teacher: a model of `pyloss.load`, quantized or not, with the same tokens, or a
            `StoredTeacher` of the same data.
        tokenizers: the student's and the teacher's, to compare them. Without them, the heads must
            have the same number of classes. A stored teacher's is not needed: None.
        on_policy: the share of the samples whose targets the student draws itself, up to
            `max_new_tokens` each; see `OnPolicyLoss`, which needs the student's tokenizer.

        hidden_loss: "cosine" or "mse" adds `hidden_weight` times the distance of hidden states
            between the pairs `hidden_layers`, see `HiddenStates`; the teacher must be a model.

    Raises ValueError if the vocabularies differ, or a stored teacher lacks a sample.
    """
    hidden = None
    if hidden_loss is not None:
        seed = (args.seed if args is not None else None) or 0
        hidden = HiddenStates(model, teacher, hidden_loss, hidden_layers, hidden_weight, seed)
    elif hidden_layers is not None:
        raise ValueError("hidden_layers goes with hidden_loss, which says how states are compared")
    loss: Any = DistillationLoss(teacher, kind, temperature, alpha, beta, skew, hidden)
    if on_policy:
        from pyloss.distillation.on_policy import OnPolicyLoss

        if tokenizers is None:
            raise ValueError("on_policy needs tokenizers=(student's, teacher's)")
        loss = OnPolicyLoss(loss, tokenizers[0], on_policy, max_new_tokens)
    if isinstance(teacher, StoredTeacher):
        # No sample is tokenized twice.
        train_dataset, val_dataset = (
            None if data is None else own_data(data, iterate_batches)
            for data in (train_dataset, val_dataset)
        )
        if tokenizers is not None:
            teacher.check_tokenizer(tokenizers[0])
        check_data(teacher, train_dataset, val_dataset, args or TrainingArgs())
    elif tokenizers is not None:
        check_vocabularies(*tokenizers)
    elif (head := getattr(teacher, "head_layer", None)) is not None:
        sizes = model.head_layer.shape[0], head.shape[0]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the student's head has {sizes[0]} classes and the teacher's {sizes[1]}: "
                "give tokenizers=(student's, teacher's), which tell whether that is padding"
            )
    return train(
        model,
        optimizer,
        train_dataset,
        val_dataset,
        args,
        loss=loss,
        training_callback=training_callback,
    )


def check_data(teacher: StoredTeacher, train_dataset: Any, val_dataset: Any, args: Any) -> None:
    """Raises ValueError for a sample that the teacher lacks and a run with `args` reads.

    `args` has max_seq_length and val_batches.
    """
    teacher.check_data(train_dataset, args.max_seq_length, "training")
    if val_dataset is not None and args.val_batches:
        teacher.check_data(val_dataset, args.max_seq_length, "validation")
