"""`pyloss distill`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyloss import models
from pyloss.cli.commands.shared import Flags, join, move
from pyloss.cli.commands.training import fit
from pyloss.distillation.hidden import HiddenStates
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.run import check_data
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.distillation.stored.folder import is_stored_teacher
from pyloss.distillation.vocabularies import check_vocabularies
from pyloss.errors import counted, size_text
from pyloss.io.console import say
from pyloss.io.files import check_target
from pyloss.losses.hidden import KINDS as HIDDEN_LOSSES
from pyloss.runtime import precision
from pyloss.tuner.datasets import load_dataset
from pyloss.tuner.run.settings import merge_settings


def distill(flags: Flags) -> int:
    """`pyloss distill`: trains with a teacher's probabilities as targets, or stores them."""
    folder, top_k, samples = (flags.pop(name) for name in ("write_teacher", "top_k", "samples"))
    if folder is not None:
        return _write(flags, folder, top_k, samples)
    if top_k is not None or samples is not None:
        raise ValueError("--top-k and --samples go with --write-teacher, which stores a teacher")
    return fit(flags, _objective)


def _objective(
    settings: SimpleNamespace, student: Any, tokenizer: Any, train_set: Any, valid_set: Any
) -> Callable[..., Any]:
    """The loss against the teacher of the settings."""
    options = dict(settings.distillation or {})
    source, rest = options.pop("teacher", None), options.pop("rest", None)
    share, most = options.pop("on_policy", 0.0), options.pop("max_new_tokens", 128)
    kind, pairs = options.pop("hidden_loss", None), options.pop("hidden_layers", None)
    weight = options.pop("hidden_weight", None)
    if source is None:
        raise ValueError("no teacher: give --teacher, a model's folder, .gguf file or known name")
    if kind is None and not (pairs is None and weight is None):
        raise ValueError(
            "--hidden-layers and --hidden-weight go with --hidden-loss, which says how hidden "
            f"states are compared: {' or '.join(HIDDEN_LOSSES)}"
        )
    if is_stored_teacher(Path(source)):
        if kind is not None:
            raise ValueError(
                f"--hidden-loss needs a model as its teacher; {source} has probabilities only"
            )
        if share:
            raise ValueError(
                f"--on-policy needs a model as its teacher; {source} knows its own data only"
            )
        stored = StoredTeacher(source, rest or "bucket")
        loss = DistillationLoss(stored, **options)
        stored.check_tokenizer(tokenizer)
        check_data(stored, train_set, valid_set, settings)
        say(f"teacher {source}: {counted(stored.settings.targets, 'target token')} stored")
        return loss
    if rest is not None:
        raise ValueError(f"--rest is for a stored teacher, and {source} is a model")
    teacher, known = models.load(source)
    check_vocabularies(tokenizer, known)
    move(teacher, settings.device)
    arrays = (*teacher.stored().values(), *teacher.parameters().values())
    size = size_text(sum(int(array.nbytes) for array in arrays))
    say(f"teacher {source}: {size} of weights, which are read from its file where they are used")
    hidden = None
    if kind is not None:
        hidden = HiddenStates(student, teacher, kind, pairs, weight or 1.0, settings.seed)
        say(hidden.describe())
    loss = DistillationLoss(teacher, **options, hidden=hidden)
    if not share:
        return loss
    from pyloss.distillation.on_policy import OnPolicyLoss

    return OnPolicyLoss(loss, tokenizer, share, most)


def _write(flags: Flags, folder: str, top_k: int | None, samples: int | None) -> int:
    """Stores the probabilities of the teacher of the settings for their data."""
    settings = merge_settings(flags, flags.get("config"))
    join(settings.distributed)
    options = settings.distillation or {}
    source = options.get("teacher")
    if source is None:
        raise ValueError("no teacher: give --teacher, a model's folder, .gguf file or known name")
    if settings.preview or settings.test:
        raise ValueError(
            "--write-teacher neither previews nor tests: give --preview or --test alone"
        )
    if top_k is not None and samples is not None:
        raise ValueError("give --top-k or --samples, not both")
    check_target(folder, folder=True)
    teacher, tokenizer = models.load(source)
    train_set, valid_set, _ = load_dataset(settings, tokenizer, train=True, test=False)
    move(teacher, settings.device)
    with precision.matmul_precision(settings.matmul_precision):
        write_teacher(
            teacher,
            train_set,
            folder,
            val_dataset=valid_set,
            top_k=top_k,
            samples=samples,
            temperature=options.get("temperature", 1.0),
            max_seq_length=settings.max_seq_length,
            tokenizer=tokenizer,
            seed=settings.seed,
            overwrite=settings.overwrite,
        )
    return 0
